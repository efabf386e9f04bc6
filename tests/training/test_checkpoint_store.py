from __future__ import annotations

import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from infra import storage
from infra.errors import UserError
from training.checkpoint import Checkpoint, TrainingState, save_checkpoint, seal_folder
from training.checkpoint_store import CheckpointDamaged, CheckpointStore, newest_step

KEY = "c" * 64
NUM_DAMAGES = 200


def checkpoint(step: int, value: float = 1.0) -> Checkpoint:
    weights = {"a.weight": torch.full((32, 16), value), "b": torch.tensor([value])}
    moments = {"a.weight/exp_avg": torch.ones(32, 16), "a.weight/step": torch.tensor(float(step))}
    return Checkpoint(weights, moments, TrainingState(step, KEY, step))


def sealed(folder: Path, step: int, value: float = 1.0) -> Path:
    save_checkpoint(folder, checkpoint(step, value))
    seal_folder(folder)
    return folder


@pytest.fixture
def store(store_uri: str) -> CheckpointStore:
    """Empty; once in a folder and once on S3."""
    return CheckpointStore(storage.join(store_uri, "runs", "toy"))


def steps(store: CheckpointStore) -> list[int]:
    return [each.step for each in store.complete()]


def test_the_newest_is_loaded_and_an_unfinished_one_is_nothing(
    store: CheckpointStore, tmp_path: Path
) -> None:
    assert store.load(KEY) is None
    for step in (4, 12, 8):
        store.put(sealed(tmp_path / str(step), step, step), 0, step)
    cut = storage.join(store.uri, "000-00000020-01234567")
    storage.upload(tmp_path / "12" / "weights.safetensors", f"{cut}/weights.safetensors")
    loaded = store.load(KEY)
    assert loaded is not None
    assert (loaded.checkpoint.state.step, loaded.passed_by) == (12, ())
    assert torch.equal(loaded.checkpoint.weights["b"], torch.tensor([12.0]))
    assert newest_step(store.uri.rpartition("/")[0]) == 12
    assert store.load(KEY, step=8) is not None
    assert store.load(KEY, step=5) is None


def test_what_was_saved_before_going_back_is_older(store: CheckpointStore, tmp_path: Path) -> None:
    folder = sealed(tmp_path / "one", 9)
    for generation, step in ((0, 90), (1, 50), (1, 60)):
        store.put(folder, generation, step)
    assert [(each.generation, each.step) for each in store.complete()] == [
        (1, 60),
        (1, 50),
        (0, 90),
    ]


def test_another_recipes_checkpoint_is_refused_and_not_passed_by(
    store: CheckpointStore, tmp_path: Path
) -> None:
    store.put(sealed(tmp_path / "one", 1), 0, 1)
    with pytest.raises(UserError, match="another recipe"):
        store.load("d" * 64)


def test_pruning_keeps_the_newest_and_what_is_needed(
    store: CheckpointStore, tmp_path: Path
) -> None:
    for step in (10, 20, 30, 40):
        store.put(sealed(tmp_path / str(step), step), 0, step)
    storage.write_bytes(storage.join(store.uri, "000-00000035-01234567", "state.json"), b"{}")
    store.prune(2, lambda stored: stored.step == 10)
    assert steps(store) == [40, 30, 10]
    assert not any("00000035" in info.uri for info in storage.list_objects(store.uri))


def test_pruning_never_counts_a_damaged_one(tmp_path: Path) -> None:
    store = CheckpointStore((tmp_path / "run").as_uri())
    for step in (10, 20):
        store.put(sealed(tmp_path / str(step), step), 0, step)
    newest = Path(store.complete()[0].uri.removeprefix("file://"))
    flip(newest / "weights.safetensors", 77)
    loaded = store.load(KEY)
    assert loaded is not None
    assert loaded.checkpoint.state.step == 10
    store.prune(2, lambda stored: False)
    assert steps(store) == [20, 10]  # only one good one: nothing goes
    store.put(sealed(tmp_path / "30", 30), 0, 30)
    store.prune(2, lambda stored: False)
    assert steps(store) == [30, 10]
    cut = Path(store.complete()[0].uri.removeprefix("file://")) / "weights.safetensors"
    cut.write_bytes(cut.read_bytes()[:-1])
    store.put(sealed(tmp_path / "40", 40), 0, 40)
    store.prune(2, lambda stored: False)
    assert steps(store) == [40, 10]  # 30 is short: seen without reading it


def flip(path: Path, bit: int) -> None:
    data = bytearray(path.read_bytes())
    data[bit // 8 % len(data)] ^= 1 << bit % 8
    path.write_bytes(bytes(data))


def cut(path: Path, place: int) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: place % len(data)])


@pytest.mark.parametrize("damage", [flip, cut], ids=["bits flipped", "files cut"])
def test_every_damage_of_the_newest_is_found_and_the_one_before_taken(
    tmp_path: Path, damage: Any
) -> None:
    run = tmp_path / "run"
    store = CheckpointStore(run.as_uri())
    store.put(sealed(tmp_path / "5", 5, 5.0), 0, 5)
    store.put(sealed(tmp_path / "6", 6, 6.0), 0, 6)
    newest = Path(store.complete()[0].uri.removeprefix("file://"))
    whole = Path(shutil.copytree(newest, tmp_path / "whole"))
    rng = random.Random(3)
    names = sorted(path.name for path in whole.iterdir())
    found = 0
    for _ in range(NUM_DAMAGES):
        name = rng.choice(names)
        damage(newest / name, rng.randrange(1 << 30))
        loaded = CheckpointStore(run.as_uri()).load(KEY)
        assert loaded is not None
        assert torch.equal(loaded.checkpoint.weights["b"], torch.tensor([5.0]))
        found += loaded.passed_by[0].startswith("step 6: ")
        shutil.copy(whole / name, newest / name)
    assert found == NUM_DAMAGES
    again = CheckpointStore(run.as_uri()).load(KEY)
    assert again is not None
    assert again.checkpoint.state.step == 6


def test_nothing_good_is_an_error(tmp_path: Path) -> None:
    store = CheckpointStore((tmp_path / "run").as_uri())
    for step in (5, 6):
        store.put(sealed(tmp_path / str(step), step), 0, step)
    for stored in store.complete():
        (Path(stored.uri.removeprefix("file://")) / "optimizer.safetensors").unlink()
    with pytest.raises(CheckpointDamaged, match=r"all 2 checkpoints .* are damaged; step 6"):
        store.load(KEY)
