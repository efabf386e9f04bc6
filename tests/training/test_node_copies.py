"""What workers of one machine fetch together, and what stays of it in memory."""

from __future__ import annotations

import gc
import shutil
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from infra import storage
from infra.errors import UserError
from training import worker
from training.checkpoint import Checkpoint, TrainingState, save_checkpoint, seal_folder
from training.checkpoint_store import CheckpointStore, Loaded, load_together
from training.config import StageConfig
from training.job import Job
from training.masked_run import MaskedRun
from training.node_copies import NodeCopies
from training.session import LocalSession
from training.worker import train

KEY = "c" * 64
WORKERS = 4


class Together:
    """One of several workers, which are threads here."""

    in_ray = False

    def __init__(self, rank: int, barrier: threading.Barrier, told: list[Any]) -> None:
        self.rank, self.world_size = rank, WORKERS
        self._barrier, self._told = barrier, told

    def from_first(self, value: Any) -> Any:
        if self.rank == 0:
            self._told.append(value)
        self.barrier()
        return self._told[-1]

    def add(self, name: str, amount: int) -> int:
        raise NotImplementedError

    def barrier(self) -> None:
        self._barrier.wait(timeout=60)

    def is_preempted(self) -> bool:
        return False


@pytest.fixture
def stored(store_uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A run with a checkpoint of step 3, in a folder and on S3."""
    monkeypatch.setenv("ATELIER_HOME", str(tmp_path / "home"))
    run_uri = storage.join(store_uri, "runs", "toy")
    weights = {"a": torch.arange(6.0)}
    save_checkpoint(tmp_path / "3", Checkpoint(weights, {}, TrainingState(3, KEY)))
    seal_folder(tmp_path / "3")
    CheckpointStore(run_uri).put(tmp_path / "3", 0, 3)
    return run_uri


def test_workers_of_a_machine_fetch_a_checkpoint_once(
    stored: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetched: list[str] = []
    download = storage.download_folder

    def counting(uri: str, path: Any) -> Any:
        fetched.append(uri)
        return download(uri, path)

    monkeypatch.setattr(storage, "download_folder", counting)
    barrier, told = threading.Barrier(WORKERS), list[Any]()

    def load(rank: int) -> Loaded | None:
        return load_together(CheckpointStore(stored), Together(rank, barrier, told), KEY)

    for times in (1, 2):  # what is damaged in storage meanwhile is not read from an old copy
        with ThreadPoolExecutor(WORKERS) as pool:
            for found in pool.map(load, range(WORKERS)):
                assert found is not None
                assert found.checkpoint.weights["a"].tolist() == [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]
        assert len(fetched) == (times if stored.startswith("s3://") else 0)
    home = tmp_path / "home"
    assert [path.name for path in home.rglob("*") if path.is_file()] in ([], ["lock"])


def test_a_fetch_that_was_cut_off_begins_anew(
    stored: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (info,) = CheckpointStore(stored).complete()
    copies = NodeCopies("a run")

    def cut(uri: str, path: Path) -> Any:
        path.mkdir()
        (path / "weights.safetensors").write_bytes(b"half")
        raise OSError("the machine went away")

    with monkeypatch.context() as patch:
        patch.setattr(storage, "download_folder", cut)
        with pytest.raises(OSError, match="went away"):
            copies.folder(info.uri)
    folder = copies.folder(info.uri)
    assert (folder / "weights.safetensors").stat().st_size > 4
    assert (folder / "CHECKPOINT.json").is_file()


def test_a_disk_without_room_is_told_before_it_is_full(
    stored: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (info,) = CheckpointStore(stored).complete()
    usage = type("Usage", (), {"free": 100})
    monkeypatch.setattr(shutil, "disk_usage", lambda place: usage)
    with pytest.raises(UserError, match=r"GB free in .*checkpoints.*free some") as caught:
        NodeCopies("a run").folder(info.uri)
    assert "\n" not in str(caught.value)


def test_a_run_that_goes_on_lets_its_checkpoint_go(
    tmp_path: Path,
    raw_job: Callable[[StageConfig], dict[str, Any]],
    small_config: Callable[..., StageConfig],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It is as large as weights, average and moments together."""
    raw = raw_job(small_config(steps=6, checkpoint_interval_steps=1, ema_decay=0.9))
    job = Job.parse({**raw, "cpus": 1, "run_uri": storage.file_uri(tmp_path / "run")})
    honest, alive = MaskedRun.train, list[bool]()
    loaded: list[weakref.ref[Loaded]] = []

    def lost(self: MaskedRun, *arguments: Any) -> Any:
        if self.step == 3:
            raise RuntimeError("lost")
        return honest(self, *arguments)

    def counted(self: MaskedRun, *arguments: Any) -> Any:
        gc.collect()
        alive.append(any(ref() is not None for ref in loaded))
        return honest(self, *arguments)

    def load(*arguments: Any) -> Loaded | None:
        found = load_together(*arguments)
        loaded.extend([] if found is None else [weakref.ref(found)])
        return found

    monkeypatch.setattr(worker, "load_together", load)
    monkeypatch.setattr(MaskedRun, "train", lost)
    with pytest.raises(RuntimeError, match="lost"):
        train(job, LocalSession())
    monkeypatch.setattr(MaskedRun, "train", counted)
    train(job, LocalSession())
    assert len(loaded) == 1
    assert set(alive) == {False}
