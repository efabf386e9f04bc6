"""Small networks on top of embeddings: aesthetic, unsafe and watermark scores.

A head is a list of steps, applied to embeddings of length one: affine maps, ``relu``, ``sigmoid``,
and a standardisation, which is an affine map too. Affine maps that follow one another fold into
one, so LAION's aesthetic MLP, whose activations are all commented out, costs one dot product
(docs: ``christophschuhmann/improved-aesthetic-predictor``, ``simple_inference.py``).

Published layouts, as safetensors with the tensor names of the published state dict:

- ``laion_aesthetic_v1``: ``weight, bias``, one affine map (``sa_0_4_vit_l_14_linear``)
- ``laion_aesthetic_v2``: ``layers.{0,2,4,6,7}.{weight,bias}``, dim-1024-128-64-16-1, no activation
  (``sac+logos+ava1-l14-linearMSE``)
- ``laion_unsafe_l14``: ``norm.{mean,variance}``, ``linear_{1..4}.{weight,bias}``, dim-64-512-256-1,
  ReLU between, sigmoid at the end (the torch port of ``clip_autokeras_binary_nsfw``)
- ``laion_unsafe_h14``: ``layers.{0,3,6,9,12,15,16}.{weight,bias}``, ReLU after the first five, no
  sigmoid: its output is a probability by training (``h14_nsfw``)
- ``described``: ``<weights>.json`` beside the file lists the steps, for example
  ``{"steps": [{"affine": "fc1"}, "relu", {"affine": "fc2"}, "sigmoid"]}``; also
  ``{"standardise": "norm"}`` for ``norm.mean`` and ``norm.variance``
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from infra import storage
from infra.errors import UserError
from pipelines.clip_model import CONVERT, as_uri
from pipelines.columns import RANGES
from pipelines.scoring_config import HeadConfig

Floats = npt.NDArray[np.float64]
Step = tuple[
    str, str
]  # ("affine" or "standardise", tensor prefix), ("relu", "") or ("sigmoid", "")
_ROWS_AT_ONCE = 8192
RELU, SIGMOID = ("relu", ""), ("sigmoid", "")


def _layers(numbers: Sequence[int]) -> list[Step]:
    return [("affine", f"layers.{number}") for number in numbers]


def _with_relu(steps: Sequence[Step]) -> list[Step]:
    return [each for step in steps for each in (step, RELU)]


STEPS: dict[str, list[Step]] = {
    "laion_aesthetic_v1": [("affine", "")],
    "laion_aesthetic_v2": _layers((0, 2, 4, 6, 7)),
    "laion_unsafe_l14": [
        ("standardise", "norm"),
        *_with_relu([("affine", f"linear_{number}") for number in (1, 2, 3)]),
        ("affine", "linear_4"),
        SIGMOID,
    ],
    "laion_unsafe_h14": [*_with_relu(_layers((0, 3, 6, 9, 12))), *_layers((15, 16))],
}


@dataclass(frozen=True)
class Affine:
    """``x @ weight.T + bias``: weight (out, in), bias (out,)."""

    weight: Floats
    bias: Floats

    def then(self, other: Affine) -> Affine:
        """One map that does this and then ``other``."""
        return Affine(other.weight @ self.weight, other.weight @ self.bias + other.bias)


@dataclass(frozen=True)
class Head:
    """A loaded head: what it scores, what it is known by, and its folded steps."""

    score: str
    scale: str | None
    layout: str
    sha256: str
    steps: tuple[Affine | str, ...]

    @property
    def dim(self) -> int:
        """Numbers per embedding that it takes."""
        first = next(step for step in self.steps if isinstance(step, Affine))
        return int(first.weight.shape[1])

    def identity(self) -> dict[str, Any]:
        """The provenance that is stored beside its scores."""
        return {
            "column": self.score,
            "aesthetic_scale": self.scale,
            "layout": self.layout,
            "sha256": self.sha256,
        }

    def raw(self, embeddings: npt.NDArray[Any]) -> Floats:
        """Outputs for embeddings (rows, dim), computed in float64."""
        found = [np.zeros(0)]
        for start in range(0, len(embeddings), _ROWS_AT_ONCE):
            values = embeddings[start : start + _ROWS_AT_ONCE].astype(np.float64)
            for step in self.steps:
                values = _apply(step, values)
            found.append(values[:, 0])
        return np.concatenate(found)

    def scores(self, embeddings: npt.NDArray[Any]) -> Floats:
        """``raw``, put back into the range of its column, outside of which a score is unknown."""
        low, high = RANGES[self.score]
        return np.clip(self.raw(embeddings), low, high)


def _apply(step: Affine | str, values: Floats) -> Floats:
    if isinstance(step, Affine):
        return values @ step.weight.T + step.bias
    if step == "relu":
        return np.maximum(values, 0.0)
    return 0.5 * (1.0 + np.tanh(0.5 * values))  # the sigmoid, without overflow


def load_head(config: HeadConfig) -> Head:
    """Read a head's file and fold it.

    Raises ``UserError`` for a file that is not safetensors, and for tensors that are missing, left
    over, of other shapes than its layout's, or not finite.
    """
    uri = as_uri(config.weights)
    if not uri.endswith(".safetensors"):
        name = uri.rpartition("/")[2]
        raise UserError(
            expected=f"a .safetensors file for a head of layout {config.layout}",
            got=uri,
            remedy="a pickle can run code: " + CONVERT.format(name=name),
        )
    data = storage.read_bytes(uri)
    digest = hashlib.sha256(data)
    steps = STEPS.get(config.layout)
    if steps is None:
        described = storage.read_bytes(f"{uri}.json")
        digest.update(described)
        steps = _described(described, f"{uri}.json")
    folded = fold(steps, _tensors(data, uri), uri)
    return Head(config.score, config.scale, config.layout, digest.hexdigest(), folded)


# How safetensors calls its number types; bf16, which numpy has not, is a float32's upper half.
_DTYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}


def _tensors(data: bytes, uri: str) -> dict[str, Floats]:
    """The file's tensors in float64; without torch, which a plan would wait for."""
    from safetensors import SafetensorError, deserialize

    try:
        entries = deserialize(data)
    except SafetensorError as error:
        raise UserError(expected=f"a whole safetensors file at {uri}", got=str(error)) from error
    others = {entry["dtype"] for _, entry in entries} - set(_DTYPES)
    if others:
        raise UserError(
            expected=f"tensors of {', '.join(_DTYPES)} in {uri}", got=", ".join(sorted(others))
        )
    return {name: _floats(entry) for name, entry in entries}


def _floats(entry: Mapping[str, Any]) -> Floats:
    numbers = np.frombuffer(bytes(entry["data"]), _DTYPES[entry["dtype"]])
    if entry["dtype"] == "BF16":
        numbers = (numbers.astype(np.uint32) << 16).view(np.float32)
    return numbers.astype(np.float64).reshape(entry["shape"])


def _described(data: bytes, uri: str) -> list[Step]:
    try:
        steps = [_step(entry) for entry in json.loads(data)["steps"]]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            expected=f'{{"steps": [{{"affine": NAME}}, "relu", "sigmoid", …]}} in {uri}',
            got=repr(error),
        ) from error
    return steps


def _step(entry: Any) -> Step:
    if entry in ("relu", "sigmoid"):
        return (entry, "")
    ((kind, name),) = entry.items()
    if kind not in ("affine", "standardise") or not isinstance(name, str):
        raise ValueError(f"step {entry!r}")
    return (kind, name)


def fold(
    steps: Sequence[Step], tensors: Mapping[str, Floats], origin: str
) -> tuple[Affine | str, ...]:
    """The steps with their tensors, affine neighbours folded into one in float64."""
    used: set[str] = set()
    folded: list[Affine | str] = []
    for kind, prefix in steps:
        if kind in ("relu", "sigmoid"):
            folded.append(kind)
            continue
        names = ("mean", "variance") if kind == "standardise" else ("weight", "bias")
        keys = [f"{prefix}.{name}" if prefix else name for name in names]
        missing = [key for key in keys if key not in tensors]
        if missing:
            raise UserError(
                expected=f"{', '.join(missing)} in {origin}", got=f"tensors {sorted(tensors)}"
            )
        used.update(keys)
        affine = _affine(kind, *(tensors[key] for key in keys))
        before = folded[-1] if folded else None
        if isinstance(before, Affine) and before.weight.shape[0] == affine.weight.shape[1]:
            folded[-1] = before.then(affine)
        else:
            folded.append(affine)
    _refuse_misfits(folded, sorted(set(tensors) - used), origin)
    return tuple(folded)


def _affine(kind: str, first: Floats, second: Floats) -> Affine:
    if kind == "affine" and (first.ndim != 2 or second.size != first.shape[0]):
        raise UserError(
            expected="a weight of shape (out, in) and a bias of out numbers",
            got=f"shapes {first.shape} and {second.shape}",
        )
    if kind == "standardise":
        scale = 1.0 / np.sqrt(second.reshape(-1))
        return Affine(np.diag(scale), -first.reshape(-1) * scale)
    return Affine(first, second.reshape(-1))


def _refuse_misfits(folded: Sequence[Affine | str], left_over: list[str], origin: str) -> None:
    affine = [step for step in folded if isinstance(step, Affine)]
    problems = [f"{left_over} left over"] if left_over else []
    widths = [step.weight.shape for step in affine]
    problems += [
        f"an output of {before[0]} numbers before an input of {after[1]}"
        for before, after in pairwise(widths)
        if before[0] != after[1]
    ]
    if not widths or widths[-1][0] != 1:
        problems.append(f"{widths[-1][0] if widths else 'no'} outputs, expected 1")
    if not all(np.isfinite(step.weight).all() and np.isfinite(step.bias).all() for step in affine):
        problems.append("numbers that are not finite")
    if problems:
        raise UserError(expected=f"a head that fits together in {origin}", got="; ".join(problems))
