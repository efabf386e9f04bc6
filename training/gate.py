"""The gate: a checkpoint becomes the next stage's start only when it will load and makes sense.

Files are read as they lie on disk, and networks exist on the meta device only, so a checkpoint of
any size is gated without memory for its weights: every part against its own configuration, the
transformer against the **next** stage's network under that stage's init policy, every value
finite.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from model import (
    CLIPTextConfig,
    CLIPTextEncoder,
    CLIPTokenizer,
    MaskedImageTransformer,
    ModelError,
    TransformerConfig,
    VQConfig,
    VQTokenizer,
)
from model.checkpoint import (
    DIFFUSERS_STEM,
    TRANSFORMERS_STEM,
    parse_config,
    read_json,
    weight_files,
)
from training.networks import transformer_config
from training.stages import NextStage

Shape = tuple[int, ...]
PICKLE_SUFFIXES = (".bin", ".ckpt", ".pkl", ".pt", ".pth")
SHOWN_NAMES = 3
READ_VALUES = 1 << 24  # values checked at a time: 64 MB of float32
UNUSED_TEXT_WEIGHTS = ("text_model.embeddings.position_ids",)


@dataclass(frozen=True)
class GateResult:
    """``problems`` has one line each; none means the checkpoint may be handed over."""

    problems: tuple[str, ...]

    @property
    def passed(self) -> bool:
        """Whether the checkpoint may be handed over."""
        return not self.problems


def gate(
    folder: Path,
    *,
    next_stage: NextStage | None = None,
    has_transformer: bool = True,
) -> GateResult:
    """Check an exported folder: parts, names, shapes, values, and the next stage's start.

    ``has_transformer`` is false for the tokenizer stage, which exports the other parts only.
    """
    problems = list(_pickles(folder))
    parts = {
        "vqvae": _check_part(folder / "vqvae", _vq, DIFFUSERS_STEM),
        "text_encoder": _check_part(folder / "text_encoder", _text, TRANSFORMERS_STEM),
    }
    if has_transformer:
        parts["transformer"] = _check_part(folder / "transformer", _transformer, DIFFUSERS_STEM)
    for found in parts.values():
        problems += found.problems
    problems += _tokenizer_problems(folder / "tokenizer")
    if next_stage is not None and not problems:
        shapes = parts["transformer"].shapes if has_transformer else None
        problems += _next_problems(folder, shapes, next_stage)
    return GateResult(tuple(problems))


# --- a part against its own configuration --------------------------------------------------------


@dataclass(frozen=True)
class _Part:
    shapes: Mapping[str, Shape]
    problems: tuple[str, ...]


def _vq(folder: Path) -> nn.Module:
    source = folder / "config.json"
    return VQTokenizer(parse_config(VQConfig, read_json(source), str(source)))


def _text(folder: Path) -> nn.Module:
    return CLIPTextEncoder(_text_config(folder))


def _text_config(folder: Path) -> CLIPTextConfig:
    source = folder / "config.json"
    return parse_config(CLIPTextConfig, read_json(source), str(source), ignore_unknown=True)


def _transformer(folder: Path) -> nn.Module:
    source = folder / "config.json"
    return MaskedImageTransformer(parse_config(TransformerConfig, read_json(source), str(source)))


def meta_shapes(build: Callable[[], nn.Module]) -> dict[str, Shape]:
    """The names and shapes of a network's weights, without its weights."""
    with torch.device("meta"):
        module = build()
    return {name: tuple(value.shape) for name, value in module.state_dict().items()}


def _check_part(folder: Path, build: Callable[[Path], nn.Module], stem: str) -> _Part:
    name = folder.name
    try:
        expected = meta_shapes(lambda: build(folder))
        shapes, problems = _read_weights(folder, stem)
    except ModelError as error:
        return _Part({}, (f"{name}: {error}",))
    for unused in UNUSED_TEXT_WEIGHTS:
        shapes.pop(unused, None)
    missing = sorted(set(expected) - set(shapes))
    extra = sorted(set(shapes) - set(expected))
    if missing:
        problems.append(f"{len(missing)} weights are missing: {_some(missing)}")
    if extra:
        problems.append(f"{len(extra)} weights are unknown: {_some(extra)}")
    problems += _misshapen(shapes, expected)
    return _Part(shapes, tuple(f"{name}: {problem}" for problem in problems))


def _read_weights(folder: Path, stem: str) -> tuple[dict[str, Shape], list[str]]:
    """Shapes by name from the files' headers, and the weights that hold NaN or infinity."""
    shapes: dict[str, Shape] = {}
    broken: list[str] = []
    for path in weight_files(folder, stem):
        try:
            with safe_open(path, framework="pt") as file:
                for key in file.keys():  # noqa: SIM118  # safe_open is no mapping
                    part = file.get_slice(key)
                    shapes[key] = tuple(part.get_shape())
                    if not all(_is_finite(values) for values in _pieces(part, shapes[key])):
                        broken.append(key)
        except (SafetensorError, OSError) as error:
            raise ModelError(f"{path.name} is damaged ({error})") from error
    problems = []
    if broken:
        problems.append(f"{len(broken)} weights hold NaN or infinity: {_some(sorted(broken))}")
    return shapes, problems


def _pieces(part: Any, shape: Shape) -> Iterator[torch.Tensor]:
    """A stored tensor in pieces of bounded size, cut along its first axis."""
    if not shape:
        yield part[...]
        return
    values_per_row = max(1, math.prod(shape[1:]))
    rows = max(1, READ_VALUES // values_per_row)
    for start in range(0, shape[0], rows):
        yield part[start : start + rows]


def _is_finite(values: torch.Tensor) -> bool:
    return not values.is_floating_point() or bool(torch.isfinite(values).all())


def _pickles(folder: Path) -> Iterator[str]:
    names = sorted(p.name for p in folder.rglob("*") if p.suffix in PICKLE_SUFFIXES)
    if names:
        yield f"pickled files, which can run code when read: {_some(names)}"


def _tokenizer_problems(folder: Path) -> list[str]:
    try:
        CLIPTokenizer.from_pretrained(folder)
    except ModelError as error:
        return [f"tokenizer: {error}"]
    return []


# --- the next stage ------------------------------------------------------------------------------


def next_transformer_config(folder: Path, stage: NextStage) -> TransformerConfig:
    """The next stage's transformer on top of this checkpoint's text encoder and codebook."""
    source = folder / "vqvae" / "config.json"
    vq = parse_config(VQConfig, read_json(source), str(source))
    text = _text_config(folder / "text_encoder")
    return transformer_config(stage.network, text, vq.num_vq_embeddings, stage.config.compress)


def _next_problems(folder: Path, shapes: Mapping[str, Shape] | None, stage: NextStage) -> list[str]:
    try:
        config = next_transformer_config(folder, stage)
        expected = meta_shapes(lambda: MaskedImageTransformer(config))
    except ModelError as error:
        return [f"stage {stage.name} cannot start from it: {error}"]
    if shapes is None or stage.config.init.source != "parent":
        return []
    prefixes = stage.config.init.new_parameters
    absent = [name for name in sorted(expected) if name not in shapes]
    unnamed = [name for name in absent if not name.startswith(prefixes)]
    extra = sorted(set(shapes) - set(expected))
    problems = []
    if unnamed:
        problems.append(
            f"{len(unnamed)} weights are neither in it nor named by init.new_parameters: "
            f"{_some(unnamed)}"
        )
    if extra:
        problems.append(f"{len(extra)} weights have no place there: {_some(extra)}")
    problems += _misshapen(shapes, expected)
    return [f"stage {stage.name} cannot start from it: {problem}" for problem in problems]


def _misshapen(shapes: Mapping[str, Shape], expected: Mapping[str, Shape]) -> list[str]:
    wrong = [
        f"{name} is {shapes[name]}, expected {shape}"
        for name, shape in sorted(expected.items())
        if name in shapes and shapes[name] != shape
    ]
    return [f"{len(wrong)} weights have another shape: {_some(wrong)}"] if wrong else []


def _some(names: list[str]) -> str:
    more = f" and {len(names) - SHOWN_NAMES} more" if len(names) > SHOWN_NAMES else ""
    return ", ".join(names[:SHOWN_NAMES]) + more
