"""Model folders: config.json and safetensors weights, read strictly and written whole.

Weights are one `<stem>.safetensors`, or shards named by `<stem>.safetensors.index.json`.
Pickled checkpoints are refused: reading them can run code.
"""

import difflib
import json
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import MISSING, Field, fields
from pathlib import Path
from types import UnionType
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from model.errors import ModelError
from model.quantize import QuantizedLinear

PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
DIFFUSERS_STEM = "diffusion_pytorch_model"
TRANSFORMERS_STEM = "model"
# What weights may be stored as. Packed types (two values of four bits in a byte) are none of them.
FLOATS = (
    torch.float64, torch.float32, torch.float16, torch.bfloat16,
    torch.float8_e4m3fn, torch.float8_e5m2,
)  # fmt: skip
_MAPPED_BYTES = 64 << 20

ConfigT = TypeVar("ConfigT")
ModuleT = TypeVar("ModuleT", bound=nn.Module)


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in `path`; one line when the file is missing, broken or not an object."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(f"{path} is missing: expected a model folder with this file") from None
    except OSError as error:
        raise ModelError(f"{path} cannot be read ({error.strerror}): expected a file") from None
    except (ValueError, RecursionError) as error:
        raise ModelError(
            f"{path} is not valid JSON ({error}): fetch or export the folder again"
        ) from None
    if not isinstance(value, dict):
        raise ModelError(f"{path} holds a {type(value).__name__}: expected a JSON object")
    return value


def read_lines(path: Path) -> list[str]:
    """The lines of the UTF-8 text in `path`; one line of error when it cannot be read."""
    try:
        return path.read_text(encoding="utf-8").split("\n")
    except OSError as error:
        raise ModelError(f"{path} cannot be read ({error.strerror}): expected a file") from None
    except UnicodeDecodeError as error:
        raise ModelError(
            f"{path} is not UTF-8 text ({error}): fetch or export the folder again"
        ) from None


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write `value` as the published files are: sorted keys, two spaces, a final newline."""
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def parse_config(
    cls: type[ConfigT], values: Mapping[str, Any], source: str, ignore_unknown: bool = False
) -> ConfigT:
    """Build the dataclass `cls` from a config.json; keys that start with `_` are skipped.

    All unknown and missing keys are reported in one line, unknown ones with the nearest known name.
    """
    known: dict[str, Field[Any]] = {f.name: f for f in fields(cls)}  # type: ignore[arg-type]  # cls is a dataclass
    given = {key: value for key, value in values.items() if not key.startswith("_")}
    problems = []
    for key in sorted(set(given) - set(known)):
        if ignore_unknown:
            del given[key]
            continue
        near = difflib.get_close_matches(key, known, n=1)
        problems.append(f"unknown key {key!r}" + (f" (did you mean {near[0]!r}?)" if near else ""))
    for name, field in known.items():
        if name not in given and field.default is MISSING and field.default_factory is MISSING:
            problems.append(f"missing key {name!r}")
    if problems:
        raise ModelError(f"{source}: " + "; ".join(problems))
    hints = get_type_hints(cls)
    lists_as_tuples = {key: tuple(v) if isinstance(v, list) else v for key, v in given.items()}
    problems = [
        f"{key} is {given[key]!r}: expected {_words(hints[key])}"
        for key, value in lists_as_tuples.items()
        if not _is_of_kind(value, hints[key])
    ]
    if problems:
        raise ModelError(f"{source}: " + "; ".join(problems))
    return cls(**lists_as_tuples)


def out_of_range(config: object, largest: Mapping[str, int]) -> list[str]:
    """A line for each field named in `largest` that is not in 1 … its largest value.

    Building what such a config.json says would fail in torch, or not end.
    """
    problems = []
    for name, most in largest.items():
        value = getattr(config, name)
        for number in value if isinstance(value, tuple) else (value,):
            if not 1 <= number <= most:
                problems.append(f"{name} is {value}: expected 1 to {most}")
                break
    return problems


def _is_of_kind(value: object, hint: Any) -> bool:
    """Whether a JSON value fits a field's type: a number, text, truth value, None or a tuple."""
    if isinstance(hint, UnionType):
        return any(_is_of_kind(value, part) for part in get_args(hint))
    if get_origin(hint) is tuple:
        return isinstance(value, tuple) and all(_is_of_kind(v, get_args(hint)[0]) for v in value)
    if hint is float:
        return type(value) in (int, float) and math.isfinite(value)  # type: ignore[arg-type]
    return type(value) is hint


def _words(hint: Any) -> str:
    return hint.__name__ if isinstance(hint, type) and not get_args(hint) else str(hint)


def weight_files(folder: Path, stem: str) -> list[Path]:
    """The safetensors files that hold the weights of `folder`, in name order."""
    single, index = folder / f"{stem}.safetensors", folder / f"{stem}.safetensors.index.json"
    if single.is_file():
        return [single]
    if index.is_file():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not all(
            isinstance(name, str) for name in weight_map.values()
        ):
            raise ModelError(f"{index} has no weight_map of tensor names to file names")
        names = sorted(set(weight_map.values()))
        bad = [name for name in names if Path(name).name != name or not name.isprintable()]
        names = [name for name in names if name not in bad]
        absent = [name for name in names if not (folder / name).is_file()]
        if bad or absent or not names:
            raise ModelError(
                f"{index} names no usable shards: missing {absent}, outside the folder {bad}"
            )
        return [folder / name for name in names]
    pickles = (
        sorted(p.name for p in folder.iterdir() if p.suffix in PICKLE_SUFFIXES)
        if folder.is_dir()
        else []
    )
    if pickles:
        raise ModelError(
            f"{folder} holds pickled weights ({', '.join(pickles)}), which can run code when read: "
            f"expected {single.name}; convert them with safetensors in a sandbox first"
        )
    raise ModelError(f"{folder} has no weights: expected {single.name} or {index.name}")


def read_weights(folder: Path, stem: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """Every tensor of the folder by name; floating ones as `dtype`. Refuses NaN and infinity.

    Tensors that have that type already stay where the file is mapped; for others no more than
    `_MAPPED_BYTES` of the file are in memory beside what they were turned into.
    """
    weights: dict[str, Tensor] = {}
    broken = []
    for path in weight_files(folder, stem):
        try:
            for key, tensor in _tensors(path):
                if tensor.dtype in FLOATS:
                    if not _is_finite(tensor):
                        broken.append(key)
                    tensor = tensor.to(dtype)
                weights[key] = tensor
        except (SafetensorError, OSError) as error:
            raise ModelError(f"{path} is damaged ({error}): fetch or export it again") from None
    if broken:
        raise ModelError(
            f"{folder} has NaN or infinite values in {len(broken)} tensors ({_some(broken)}): "
            "the run diverged; take an earlier checkpoint"
        )
    return weights


def _tensors(path: Path) -> Iterator[tuple[str, Tensor]]:
    """Name and tensor of all in the file, which is mapped anew after each `_MAPPED_BYTES`."""
    with safe_open(path, framework="pt") as file:
        left = list(file.keys())[::-1]
    while left:
        num_bytes = 0
        with safe_open(path, framework="pt") as file:
            while left and num_bytes < _MAPPED_BYTES:
                tensor = file.get_tensor(left[-1])
                num_bytes += tensor.numel() * tensor.element_size()
                yield left.pop(), tensor


def _is_finite(tensor: Tensor) -> bool:
    """Whether no value is NaN or infinite, without a copy of the tensor."""
    if not tensor.numel():
        return True
    if tensor.dtype not in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        tensor = tensor.float()
    return all(math.isfinite(extreme) for extreme in tensor.aminmax())


def _some(names: Iterable[str], limit: int = 3) -> str:
    names = list(names)
    return ", ".join(names[:limit]) + (
        f", and {len(names) - limit} more" if len(names) > limit else ""
    )


def assign_weights(module: nn.Module, weights: Mapping[str, Tensor], source: str) -> None:
    """Put `weights` into `module` (which may be on the meta device).

    Raises one ModelError that names all missing, unexpected and misshapen tensors, and those whose
    type is none of `FLOATS`.
    """
    places = module.state_dict()
    expected = {key: tuple(place.shape) for key, place in places.items()}
    problems = []
    if missing := sorted(set(expected) - set(weights)):
        problems.append(f"{len(missing)} missing: {', '.join(missing)}")
    if extra := sorted(set(weights) - set(expected)):
        problems.append(f"{len(extra)} unexpected: {', '.join(extra)}")
    misshapen = [
        f"{key} is {tuple(weights[key].shape)}, expected {shape}"
        for key, shape in sorted(expected.items())
        if key in weights and tuple(weights[key].shape) != shape
    ]
    if misshapen:
        problems.append(f"{len(misshapen)} misshapen: {'; '.join(misshapen)}")
    odd = [
        f"{key} is {str(weights[key].dtype).removeprefix('torch.')}, expected a floating type"
        for key, place in sorted(places.items())
        if key in weights and place.is_floating_point() and weights[key].dtype not in FLOATS
    ]
    if odd:
        problems.append(f"{len(odd)} of another type: {'; '.join(odd)}")
    if problems:
        raise ModelError(f"{source} does not fit its config.json: " + " | ".join(problems))
    module.load_state_dict(dict(weights), strict=True, assign=True)


def load_module(
    build: Callable[[], ModuleT],
    folder: Path,
    stem: str,
    dtype: torch.dtype,
    ignore: Iterable[str] = (),
) -> ModuleT:
    """Build on the meta device, then adopt the folder's tensors: no second copy in memory."""
    weights = read_weights(folder, stem, dtype)
    for key in ignore:
        weights.pop(key, None)
    with torch.device("meta"):
        module = build()
    assign_weights(module, weights, str(folder))
    for parameter in module.parameters():
        parameter.requires_grad_(True)
    return module.eval()


def write_whole(folder: str | Path, fill: Callable[[Path], None]) -> None:
    """Let `fill` write into a fresh neighbour of `folder`, then rename it into place.

    A crash leaves the old folder (or none), never half of a new one. An old folder goes as a whole,
    so it must hold nothing but what `fill` writes anew: ModelError names what would be lost, also
    when `folder` is a file or the working folder. A symbolic link stays, and leads to the new one.
    """
    target = Path(folder).resolve()
    _check_target(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        fill(staging)
        staging.chmod(0o755)
        _sync_tree(staging)
        if foreign := sorted(_files(target) - _files(staging)):
            raise ModelError(
                f"{target} holds what is not of this model and would be lost ({_some(foreign)}): "
                "expected a new folder, since an old one is replaced as a whole"
            )
        if target.exists():
            retired = Path(tempfile.mkdtemp(prefix=f".{target.name}.old.", dir=target.parent))
            target.rename(retired / "old")
            try:
                staging.rename(target)
            except BaseException:
                (retired / "old").rename(target)
                retired.rmdir()
                raise
            shutil.rmtree(retired)
        else:
            staging.rename(target)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise


def _check_target(target: Path) -> None:
    """ModelError when there is something at `target` that cannot be replaced by a folder."""
    if target.exists() and not target.is_dir():
        raise ModelError(f"{target} is a file: expected a folder, or a name that is not taken")
    if target.is_dir() and Path.cwd().is_relative_to(target):
        raise ModelError(
            f"{target} is the folder that this process works in, and would be replaced as a whole: "
            "give the model a folder of its own inside it"
        )


def _files(folder: Path) -> set[str]:
    """All in `folder` that is no plain folder, by its path inside it; none when it is not there."""
    return {
        str(path.relative_to(folder))
        for path in folder.rglob("*")
        if path.is_symlink() or not path.is_dir()
    }


def _sync_tree(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())


def write_module(folder: Path, module: nn.Module, config: Mapping[str, Any], stem: str) -> None:
    """config.json and `<stem>.safetensors` into an existing folder; weights keep their dtype.

    Raises ModelError for eight-bit weights, which no folder holds.
    """
    if any(isinstance(part, QuantizedLinear) for part in module.modules()):
        raise ModelError(
            "these weights are quantised, which the published layout has no place for: save the "
            "network before quantising it; a folder is quantised when it is loaded"
        )
    write_json(folder / "config.json", config)
    tensors = {key: value.detach().cpu().contiguous() for key, value in module.state_dict().items()}
    save_file(tensors, folder / f"{stem}.safetensors", metadata={"format": "pt"})
