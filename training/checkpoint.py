"""A run's checkpoint: a folder from which training goes on to the bit.

``weights.safetensors`` and ``optimizer.safetensors`` hold tensors by name, ``state.json`` the rest,
``export/`` and ``result.json`` (in the last one) the model as it is published and what was
measured, and ``CHECKPOINT.json``, written last, every file's size and sha256. Nothing is pickled,
and nothing that the list does not name or that differs from it is read.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from infra.digests import canonical_json, sha256_file
from infra.errors import UserError
from training.checkpoint_store import CheckpointDamaged
from training.optim_8bit import SCALES, scales_shape
from training.publish import LISTING_NAME, CheckpointFile, describe_folder
from training.sharding import like

CHECKPOINT_SCHEMA = 1
WEIGHTS_NAME = "weights.safetensors"
OPTIMIZER_NAME = "optimizer.safetensors"
STATE_NAME = "state.json"
EXPORT_FOLDER = "export"


@dataclass(frozen=True)
class TrainingState:
    """What a run has come to, besides tensors.

    ``step`` counts finished optimizer steps, ``batch`` the global batches used or passed by;
    together with the configuration, which ``config_sha256`` pins, that is the loader's position
    and the place in all randomness. ``losses`` are the last steps' losses, ``init`` says where the
    weights came from, ``guard`` what went wrong, and ``coverage`` which samples were seen.
    """

    step: int
    config_sha256: str
    batch: int = 0
    losses: list[float] = field(default_factory=list)
    init: dict[str, Any] = field(default_factory=dict)
    guard: dict[str, Any] = field(default_factory=dict)
    coverage: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint in memory: tensors by name."""

    weights: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    state: TrainingState


def save_checkpoint(folder: Path, checkpoint: Checkpoint) -> None:
    """Write the checkpoint's files; ``seal_folder`` completes it."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(_plain(checkpoint.weights), folder / WEIGHTS_NAME)
    save_file(_plain(checkpoint.optimizer), folder / OPTIMIZER_NAME)
    (folder / STATE_NAME).write_bytes(canonical_json(asdict(checkpoint.state)))


def _plain(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def seal_folder(folder: Path) -> None:
    """Write ``CHECKPOINT.json`` over all files of the folder."""
    files = [asdict(file) for file in describe_folder(folder) if file.path != LISTING_NAME]
    listing = {"schema_version": CHECKPOINT_SCHEMA, "files": files}
    (folder / LISTING_NAME).write_bytes(canonical_json(listing))


def verify_folder(folder: Path) -> list[str]:
    """What is wrong with a sealed folder, a line per file; empty when all bytes are right."""
    try:
        raw = json.loads((folder / LISTING_NAME).read_bytes())
        if raw["schema_version"] != CHECKPOINT_SCHEMA:
            return [f"{LISTING_NAME} has schema {raw['schema_version']!r}, not {CHECKPOINT_SCHEMA}"]
        files = [CheckpointFile(**file) for file in raw["files"]]
    except FileNotFoundError:
        return [f"{LISTING_NAME} is missing"]
    except (ValueError, KeyError, TypeError) as error:
        return [f"{LISTING_NAME} is damaged ({error})"]
    problems = [problem for file in files if (problem := _problem(folder, file)) is not None]
    listed = {file.path for file in files}
    needed = {WEIGHTS_NAME, OPTIMIZER_NAME, STATE_NAME} - listed
    return problems + [f"{name} is not listed" for name in sorted(needed)]


def _problem(folder: Path, file: CheckpointFile) -> str | None:
    path = folder / file.path
    if not path.is_file():
        return f"{file.path}: missing"
    if path.stat().st_size != file.num_bytes:
        return f"{file.path}: expected {file.num_bytes} bytes, got {path.stat().st_size}"
    found = sha256_file(path)
    if found != file.sha256:
        return f"{file.path}: expected sha256 {file.sha256}, got {found}"
    return None


def load_checkpoint(folder: Path, config_sha256: str) -> Checkpoint:
    """Read a sealed checkpoint of this configuration, every digest checked.

    Raises ``CheckpointDamaged`` for other bytes and ``UserError`` for another configuration.
    """
    problems = verify_folder(folder)
    if problems:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise CheckpointDamaged(
            f"the run's checkpoint is damaged: {problems[0]}{more}; delete the run's folder to "
            "train the stage again"
        )
    try:
        state = TrainingState(**json.loads((folder / STATE_NAME).read_bytes()))
        weights = load_file(folder / WEIGHTS_NAME)
        optimizer = load_file(folder / OPTIMIZER_NAME)
    except (SafetensorError, ValueError, TypeError) as error:
        raise CheckpointDamaged(
            f"the run's checkpoint does not read ({error}); delete the run's folder to train the "
            "stage again"
        ) from error
    if state.config_sha256 != config_sha256:
        raise UserError(
            expected=f"a checkpoint of configuration {config_sha256[:12]}",
            got=state.config_sha256[:12],
            remedy="another recipe used this run's name; delete the run's folder",
        )
    return Checkpoint(weights, optimizer, state)


# --- optimizer state by parameter name -----------------------------------------------------------


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's state as ``<parameter>/<moment>``; groups carry ``names``."""
    return {
        f"{name}/{key}": torch.as_tensor(value)
        for name, parameter in _named(optimizer)
        for key, value in optimizer.state[parameter].items()
    }


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Put ``optimizer_tensors`` back; raises ``CheckpointDamaged`` for names that do not fit."""
    left: dict[str, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        name, _, moment = key.rpartition("/")
        left.setdefault(name, {})[moment] = value
    for name, parameter in _named(optimizer):
        state = left.pop(name, {})
        shapes_fit = all(_fits(moment, value, parameter) for moment, value in state.items())
        if not state or not shapes_fit:
            raise CheckpointDamaged(f"the run's checkpoint has no fitting moments of {name}")
        # Counts of steps lie beside the weights, where AdamW's kernels look for them; that of 8-bit
        # moments is read by Python, which would wait for a GPU at every parameter.
        counts_on = "cpu" if SCALES & state.keys() else parameter.device
        optimizer.state[parameter] = {
            moment: like(value, parameter) if value.ndim else value.to(counts_on, copy=True)
            for moment, value in state.items()
        }
    if left:
        raise CheckpointDamaged(
            f"the run's checkpoint has moments of {len(left)} unknown parameters, such as "
            f"{sorted(left)[0]}"
        )


def _fits(moment: str, value: Tensor, parameter: Tensor) -> bool:
    if moment in SCALES:
        return value.shape == scales_shape(parameter)
    return value.ndim == 0 or value.shape == parameter.shape


def _named(optimizer: torch.optim.Optimizer) -> list[tuple[str, torch.nn.Parameter]]:
    return [
        pair
        for group in optimizer.param_groups
        for pair in zip(group["names"], group["params"], strict=True)
    ]
