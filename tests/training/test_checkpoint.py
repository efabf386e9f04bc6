from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from infra.errors import UserError
from training.checkpoint import (
    Checkpoint,
    TrainingState,
    load_checkpoint,
    optimizer_tensors,
    restore_optimizer,
    save_checkpoint,
    seal_folder,
    verify_folder,
)
from training.checkpoint_store import CheckpointDamaged
from training.config import StageConfig
from training.data import TokenShard, in_memory
from training.masked_stage import MaskedStage, named_trained, train_step

NewStage = Callable[[StageConfig], MaskedStage]


def _checkpoint() -> Checkpoint:
    return Checkpoint(
        weights={"a.weight": torch.arange(6.0).reshape(2, 3), "b": torch.tensor([1.5])},
        optimizer={"a.weight/exp_avg": torch.ones(2, 3), "a.weight/step": torch.tensor(7.0)},
        state=TrainingState(7, "c" * 64, 9, [1.0, 0.5], {"source": "fresh"}, {"events": []}),
    )


def _saved(folder: Path) -> Path:
    save_checkpoint(folder, _checkpoint())
    (folder / "export").mkdir()
    (folder / "export" / "config.json").write_text("{}")
    seal_folder(folder)
    return folder


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    folder = _saved(tmp_path / "checkpoint")
    assert verify_folder(folder) == []
    loaded = load_checkpoint(folder, "c" * 64)
    assert loaded.state == _checkpoint().state
    torch.testing.assert_close(loaded.weights, _checkpoint().weights, rtol=0, atol=0)
    torch.testing.assert_close(loaded.optimizer, _checkpoint().optimizer, rtol=0, atol=0)


def test_the_listing_names_every_file(tmp_path: Path) -> None:
    folder = _saved(tmp_path / "checkpoint")
    listing = json.loads((folder / "CHECKPOINT.json").read_bytes())
    assert {file["path"] for file in listing["files"]} == {
        "export/config.json",
        "optimizer.safetensors",
        "state.json",
        "weights.safetensors",
    }


@pytest.mark.parametrize("name", ["weights.safetensors", "state.json", "export/config.json"])
def test_a_flipped_byte_is_told_with_its_file(tmp_path: Path, name: str) -> None:
    folder = _saved(tmp_path / "checkpoint")
    data = bytearray((folder / name).read_bytes())
    data[-1] ^= 1
    (folder / name).write_bytes(bytes(data))
    assert [problem.split(":")[0] for problem in verify_folder(folder)] == [name]
    with pytest.raises(CheckpointDamaged, match=name):
        load_checkpoint(folder, "c" * 64)


def test_missing_short_and_unlisted_files_are_told(tmp_path: Path) -> None:
    folder = _saved(tmp_path / "checkpoint")
    (folder / "optimizer.safetensors").unlink()
    weights = folder / "weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-3])
    problems = verify_folder(folder)
    assert any("optimizer.safetensors: missing" in problem for problem in problems)
    assert any("weights.safetensors: expected" in problem for problem in problems)
    (folder / "CHECKPOINT.json").write_text('{"schema_version": 1, "files": []}')
    assert any("weights.safetensors is not listed" in p for p in verify_folder(folder))
    (folder / "CHECKPOINT.json").unlink()
    assert verify_folder(folder) == ["CHECKPOINT.json is missing"]


def test_another_configuration_is_refused(tmp_path: Path) -> None:
    folder = _saved(tmp_path / "checkpoint")
    with pytest.raises(UserError, match="another recipe"):
        load_checkpoint(folder, "d" * 64)


def test_training_goes_on_to_the_bit(
    tmp_path: Path,
    new_stage: NewStage,
    small_config: Callable[..., StageConfig],
    token_shard: Callable[..., TokenShard],
) -> None:
    config = small_config(ema_decay=0.9, train_text_encoder=True)
    dataset = in_memory([token_shard(5, 0), token_shard(6, 1)], config)

    straight = new_stage(config)
    for step in range(6):
        train_step(straight, dataset.batch_at(step))

    first = new_stage(config)
    for step in range(3):
        train_step(first, dataset.batch_at(step))
    folder = tmp_path / "checkpoint"
    weights = {name: p.detach() for name, p in named_trained(first.optimizer)}
    weights |= {f"ema/{name}": value for name, value in (first.ema or {}).items()}
    state = TrainingState(3, "e" * 64)
    save_checkpoint(folder, Checkpoint(weights, optimizer_tensors(first.optimizer), state))
    seal_folder(folder)

    torch.manual_seed(999)  # nothing may depend on torch's own generator
    second = new_stage(config)
    loaded = load_checkpoint(folder, "e" * 64)
    with torch.no_grad():
        for name, parameter in named_trained(second.optimizer):
            parameter.copy_(loaded.weights[name])
    assert second.ema is not None
    second.ema.load_state_dict({name: loaded.weights[f"ema/{name}"] for name in second.ema})
    restore_optimizer(second.optimizer, loaded.optimizer)
    second.step = loaded.state.step
    for step in range(second.step, 6):
        train_step(second, dataset.batch_at(step))

    pairs = zip(named_trained(straight.optimizer), named_trained(second.optimizer), strict=True)
    assert all(torch.equal(a, b) for (_, a), (_, b) in pairs)
    assert straight.ema is not None
    assert all(torch.equal(straight.ema[name], second.ema[name]) for name in straight.ema)


def test_moments_that_do_not_fit_are_refused(
    new_stage: NewStage,
    small_config: Callable[..., StageConfig],
    token_shard: Callable[..., TokenShard],
) -> None:
    config = small_config()
    stage = new_stage(config)
    train_step(stage, in_memory([token_shard(6)], config).batch_at(0))
    moments = optimizer_tensors(stage.optimizer)
    name = next(iter(moments)).rpartition("/")[0]
    without = {key: value for key, value in moments.items() if not key.startswith(f"{name}/")}
    with pytest.raises(CheckpointDamaged, match="no fitting moments"):
        restore_optimizer(stage.optimizer, without)
    with pytest.raises(CheckpointDamaged, match="unknown parameters"):
        restore_optimizer(stage.optimizer, {**moments, "odd/exp_avg": torch.ones(1)})
