"""Adapters in files: the spellings of diffusers, PEFT and kohya read, that of diffusers written.

Keys name a layer and a half of its adapter: `transformer.<layer>.lora_A.weight` (diffusers),
`base_model.model.<layer>.lora_A.weight` (PEFT, a part by itself), `lora_transformer_<layer with
underscores>.lora_down.weight` (kohya). How strong an adapter is, is said by a key `….alpha`, or by
PEFT's settings, which lie in `adapter_config.json` or in the header of the weights (diffusers).
"""

import json
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from model.checkpoint import FLOATS, read_json, write_json
from model.errors import ModelError

WEIGHTS_NAME, CONFIG_NAME = "pytorch_lora_weights.safetensors", "adapter_config.json"
PEFT_WEIGHTS_NAME = "adapter_model.safetensors"
_HEADER_KEY = "lora_adapter_metadata"
_SPELLINGS = {  # suffix -> which half
    ".lora_A.weight": "down", ".lora_B.weight": "up",
    ".lora_down.weight": "down", ".lora_up.weight": "up",
    ".lora.down.weight": "down", ".lora.up.weight": "up",
    ".alpha": "alpha",
}  # fmt: skip
_PEFT_PREFIX = "base_model.model."
_KOHYA_PREFIXES = {
    "transformer": ("lora_transformer_", "lora_unet_"),
    "text_encoder": ("lora_te_",),
}
# Settings of PEFT under which a layer computes something else than W x + s B A x.
_OTHER_FORMULAS = (
    "use_dora", "use_qalora", "use_bdlora", "lora_bias", "alora_invocation_tokens",
    "layer_replication", "arrow_config", "kasa_config", "monteclora_config", "target_parameters",
)  # fmt: skip
# Starts that leave W as it is; the others subtract from it what A and B begin with.
_PLAIN_STARTS = (None, True, False, "gaussian", "eva", "orthogonal")


@dataclass(frozen=True)
class StoredAdapter:
    """The addition to the layer `name` (part.layer): alpha / rank · B A, without the weight."""

    name: str
    down: Tensor  # A, (rank, in)
    up: Tensor  # B, (out, rank)
    alpha: float
    dropout: float = 0.0


@dataclass(frozen=True)
class _Strength:
    """What a file's settings say of alpha; a pattern is a regular expression for a name's end."""

    alpha: float | None
    patterns: Mapping[str, float]
    by_root: bool  # rsLoRA: alpha / sqrt(rank) in place of alpha / rank

    def alpha_of(self, name: str, rank: int) -> float:
        """The alpha that, divided by the rank, gives the layer's factor."""
        own_name = name.partition(".")[2]
        fitting = (
            alpha
            for pattern, alpha in self.patterns.items()
            if any(re.fullmatch(rf"(.*\.)?({pattern})", whole) for whole in (own_name, name))
        )
        alpha = next(fitting, self.alpha)
        alpha = float(rank if alpha is None else alpha)
        return alpha * math.sqrt(rank) if self.by_root else alpha


_UNSAID = _Strength(None, {}, by_root=False)


def read_adapters(path: str | Path, sizes: Mapping[str, tuple[int, int]]) -> list[StoredAdapter]:
    """The adapters of a folder, or of a single .safetensors file, in float32, by name.

    sizes: inputs and outputs of every linear layer, by part.layer. ModelError names what does not
    fit these, and settings that ask for another formula.
    """
    file = _weights_file(Path(path))
    tensors, header = _read_tensors(file)
    config_file = file.with_name(CONFIG_NAME)
    if config_file.is_file():
        said, source = {"": read_json(config_file)}, str(config_file)
    else:
        said, source = _by_part(header, sizes, file), f"{file} (header)"
    strengths = {part: _strength_of(settings, source) for part, settings in said.items()}
    return _fit(tensors, sizes, strengths, str(file))


def write_adapters(folder: Path, adapters: Sequence[StoredAdapter]) -> None:
    """Write WEIGHTS_NAME and CONFIG_NAME into an existing folder."""
    tensors = {}
    parts: dict[str, list[StoredAdapter]] = {}
    for adapter in adapters:
        tensors[f"{adapter.name}.lora_A.weight"] = adapter.down.detach().cpu().contiguous()
        tensors[f"{adapter.name}.lora_B.weight"] = adapter.up.detach().cpu().contiguous()
        parts.setdefault(adapter.name.partition(".")[0], []).append(adapter)
    header = {
        f"{part}.{key}": value
        for part, own in parts.items()
        for key, value in _settings_of(own, f"{part}.").items()
    }
    write_json(folder / CONFIG_NAME, _settings_of(adapters, ""))
    metadata = {"format": "pt", _HEADER_KEY: json.dumps(header, indent=2, sort_keys=True)}
    save_file(tensors, folder / WEIGHTS_NAME, metadata=metadata)


def _settings_of(adapters: Sequence[StoredAdapter], prefix: str) -> dict[str, Any]:
    """PEFT's settings; layers are named without `prefix`."""
    named = [(adapter.name.removeprefix(prefix), adapter) for adapter in adapters]
    rank = Counter(len(adapter.down) for adapter in adapters).most_common(1)[0][0]
    alpha = Counter(adapter.alpha for adapter in adapters).most_common(1)[0][0]
    return {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": adapters[0].dropout,
        "target_modules": sorted(name for name, _ in named),
        "rank_pattern": {name: len(a.down) for name, a in named if len(a.down) != rank},
        "alpha_pattern": {name: a.alpha for name, a in named if a.alpha != alpha},
    }


def _weights_file(path: Path) -> Path:
    if path.suffix == ".safetensors":
        return path
    found = [path / name for name in (WEIGHTS_NAME, PEFT_WEIGHTS_NAME) if (path / name).is_file()]
    if not found:
        raise ModelError(
            f"{path} has no adapters: expected {WEIGHTS_NAME} or {PEFT_WEIGHTS_NAME} in it"
        )
    return found[0]


def _read_tensors(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All tensors by key, and the header's texts."""
    try:
        with safe_open(file, framework="pt") as opened:
            tensors = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118  # no mapping
            return tensors, opened.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{file} does not read as adapters ({error})") from None


def _by_part(
    header: Mapping[str, str], names: Mapping[str, object], file: Path
) -> dict[str, dict[str, Any]]:
    """The header's settings of each part; "" are those that name none."""
    try:
        told = json.loads(header.get(_HEADER_KEY, "{}"))
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{file}: {_HEADER_KEY} in its header is no JSON ({error})") from None
    if not isinstance(told, dict):
        raise ModelError(f"{file}: {_HEADER_KEY} in its header is no JSON object")
    known = {name.partition(".")[0] for name in names}
    said: dict[str, dict[str, Any]] = {}
    for key, value in told.items():
        part, dot, field = key.partition(".")
        if dot and part in known:
            said.setdefault(part, {})[field] = value
        else:
            said.setdefault("", {})[key] = value
    return said


def _strength_of(settings: Mapping[str, Any], source: str) -> _Strength:
    """ModelError names all settings that are of no kind known here."""
    problems = []
    kind = settings.get("peft_type", "LORA")
    if str(kind).upper() != "LORA":
        problems.append(f"peft_type is {kind!r}: expected LORA")
    problems += [
        f"{name} is {settings[name]!r}: expected it off, as these adapters add s B A x alone"
        for name in _OTHER_FORMULAS
        if settings.get(name)
    ]
    start = settings.get("init_lora_weights")
    if isinstance(start, dict | list) or start not in _PLAIN_STARTS:
        problems.append(
            f"init_lora_weights is {start!r}, which changes the layers' own weights: convert the "
            "adapters to plain ones in PEFT first"
        )
    alpha, patterns = settings.get("lora_alpha"), settings.get("alpha_pattern") or {}
    if alpha is not None and not _is_number(alpha):
        problems.append(f"lora_alpha is {alpha!r}: expected a number")
    if not isinstance(patterns, dict) or not all(map(_is_number, patterns.values())):
        problems.append(f"alpha_pattern is {patterns!r}: expected a number for each name")
    elif odd := [pattern for pattern in patterns if not _compiles(pattern)]:
        problems.append(f"alpha_pattern has {odd[0]!r}: expected regular expressions")
    by_root = settings.get("use_rslora") or False
    if not isinstance(by_root, bool):
        problems.append(f"use_rslora is {by_root!r}: expected true or false")
    if problems:
        raise ModelError(f"{source}: " + "; ".join(problems))
    return _Strength(alpha, patterns, by_root)


def _is_number(value: object) -> bool:
    return type(value) in (int, float) and math.isfinite(value)  # type: ignore[arg-type]  # a number


def _compiles(pattern: str) -> bool:
    try:
        re.compile(pattern)
    except (re.error, RecursionError):
        return False
    return True


def _spellings(names: Mapping[str, object]) -> dict[str, str]:
    """part.layer by every way to write it: a part's own names where no other part has them."""
    own = Counter(name.partition(".")[2] for name in names)
    spelt = {name: name for name in names}
    for name in names:
        part, _, own_name = name.partition(".")
        if own[own_name] == 1:
            spelt.setdefault(own_name, name)
        for prefix in _KOHYA_PREFIXES.get(part, ()):
            spelt[prefix + own_name.replace(".", "_")] = name
    return spelt


def _fit(
    tensors: Mapping[str, Tensor],
    sizes: Mapping[str, tuple[int, int]],
    strengths: Mapping[str, _Strength],
    source: str,
) -> list[StoredAdapter]:
    spelt = _spellings(sizes)
    halves: dict[str, dict[str, Tensor]] = {}
    problems = []
    for key, tensor in tensors.items():
        suffix = next((s for s in _SPELLINGS if key.endswith(s)), None)
        found = spelt.get(key.removeprefix(_PEFT_PREFIX).removesuffix(suffix)) if suffix else None
        if suffix is None or found is None:
            problems.append(f"{key} is of no linear layer here")
        elif _SPELLINGS[suffix] in halves.setdefault(found, {}):
            problems.append(f"{key} says again what another key says")
        elif problem := _problem_of(tensor, _SPELLINGS[suffix]):
            problems.append(f"{key} {problem}")
        else:
            halves[found][_SPELLINGS[suffix]] = tensor
    adapters = []
    for name, half in sorted(halves.items()):
        (num_inputs, num_outputs), down, up = sizes[name], half.get("down"), half.get("up")
        if down is None or up is None:
            problems.append(f"{name} has one half only")
        elif (
            down.ndim != 2
            or down.shape[1] != num_inputs
            or not len(down)
            or up.shape != (num_outputs, len(down))
        ):
            problems.append(
                f"{name} has A {tuple(down.shape)} and B {tuple(up.shape)}: expected (rank, "
                f"{num_inputs}) and ({num_outputs}, rank)"
            )
        else:
            alpha = half.get("alpha")
            strength = strengths.get(name.partition(".")[0]) or strengths.get("") or _UNSAID
            own = strength.alpha_of(name, len(down)) if alpha is None else float(alpha)
            adapters.append(StoredAdapter(name, down.float().clone(), up.float().clone(), own))
    if problems or not adapters:
        said = "; ".join(problems[:3]) or "it holds none"
        more = f"; and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise ModelError(f"{source} does not fit this model's layers: {said}{more}")
    return adapters


def _problem_of(tensor: Tensor, half: str) -> str | None:
    """What keeps a tensor from being half of an adapter, or its alpha."""
    if half == "alpha" and (tensor.numel() != 1 or tensor.is_complex()):
        return f"has shape {tuple(tensor.shape)}: expected one number"
    if half != "alpha" and tensor.dtype not in FLOATS:
        return f"is {str(tensor.dtype).removeprefix('torch.')}: expected a floating type"
    return None if torch.isfinite(tensor.float()).all() else "has NaN or infinite values"
