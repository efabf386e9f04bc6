from __future__ import annotations

import random
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from training import saver as saver_module
from training.checkpoint import Checkpoint, TrainingState
from training.checkpoint_store import CheckpointStore
from training.saver import CheckpointNotSaved, Saver, snapshot

KEY = "c" * 64


def checkpoint(step: int, weights: dict[str, torch.Tensor] | None = None) -> Checkpoint:
    tensors = weights or {"a": torch.full((64,), float(step))}
    return Checkpoint(tensors, {"a/step": torch.tensor(float(step))}, TrainingState(step, KEY))


def new_saver(store: CheckpointStore, **options: Any) -> Saver:
    return Saver(store, **{"num_kept": 2, "patience_seconds": 0.0, **options})


@pytest.fixture
def store(tmp_path: Path) -> CheckpointStore:
    return CheckpointStore((tmp_path / "run").as_uri())


def test_what_is_saved_is_the_snapshot_not_what_came_after(store: CheckpointStore) -> None:
    saver = new_saver(store)
    weights = {"a": torch.zeros(1000)}
    going_on = threading.Event()
    taken = snapshot(weights)

    def hold(folder: Path) -> None:
        assert going_on.wait(10.0)

    saver.save(checkpoint(1, taken), 0, hold)
    weights["a"].add_(1.0)
    assert saver.is_busy
    assert store.complete() == []  # nothing counts before it is whole
    going_on.set()
    saver.wait()
    loaded = store.load(KEY)
    assert loaded is not None
    assert not loaded.checkpoint.weights["a"].any()
    saver.close()


def test_only_so_many_are_kept(store: CheckpointStore) -> None:
    saver = new_saver(store, is_kept=lambda stored: stored.step == 2)
    for step in range(1, 7):
        saver.save(checkpoint(step), 0)
    saver.wait()
    assert [each.step for each in store.complete()] == [6, 5, 2]
    saver.close()


def test_an_error_surfaces_at_the_next_look_and_the_one_before_stays(
    store: CheckpointStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    saver = new_saver(store)
    saver.save(checkpoint(1), 0)
    saver.wait()
    monkeypatch.setattr(
        saver_module, "_existing", lambda path: Path("/proc")
    )  # a file system without room
    saver.save(checkpoint(2), 0)
    deadline = time.monotonic() + 10
    while saver.is_busy and time.monotonic() < deadline:
        time.sleep(0.01)
    with pytest.raises(CheckpointNotSaved, match=r"step 2 was not .* is full.* step 1"):
        saver.check()
    saver.check()  # told once
    assert [each.step for each in store.complete()] == [1]
    saver.close()


FULL = """
import resource, signal, sys, torch
from training.checkpoint import Checkpoint, TrainingState
from training.checkpoint_store import CheckpointStore
from training.saver import CheckpointNotSaved, Saver
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
store = CheckpointStore(sys.argv[1])
saver = Saver(store, num_kept=2, patience_seconds=0.0)
state = lambda step: TrainingState(step, "c" * 64)
saver.save(Checkpoint({"a": torch.ones(1000)}, {}, state(1)), 0)
saver.save(Checkpoint({"a": torch.ones(1000_000)}, {}, state(2)), 0)
try:
    saver.wait()
except CheckpointNotSaved as error:
    print(error)
print([each.step for each in store.complete()])
"""


def test_a_write_that_the_kernel_refuses(store: CheckpointStore) -> None:
    code = [sys.executable, "-c", FULL, store.uri.rpartition("/")[0]]
    done = subprocess.run(code, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    message, kept = done.stdout.splitlines()
    assert message.startswith("the checkpoint of step 2 was not saved: ")
    assert message.count("step 1 is kept") == 1
    assert kept == "[1]"


def test_storage_that_comes_back_only_delays(
    own_s3_server: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(saver_module, "RETRY_SECONDS", 0.2)
    store = CheckpointStore(f"{own_s3_server.store_uri}/runs/toy")
    saver = new_saver(store, patience_seconds=60.0)
    own_s3_server.kill()
    saver.save(checkpoint(3), 0)
    time.sleep(1.0)
    saver.check()  # training would go on
    assert saver.is_busy
    own_s3_server.start()
    saver.wait()
    assert [each.step for each in store.complete()] == [3]
    own_s3_server.kill()
    impatient = new_saver(store)
    impatient.save(checkpoint(4), 0)
    with pytest.raises(CheckpointNotSaved, match=r"step 4 was not saved: .*S3"):
        impatient.wait()
    saver.close()
    impatient.close()


KILLED = """
import sys, torch, os, signal, threading, time
from training.checkpoint import Checkpoint, TrainingState
from training.checkpoint_store import CheckpointStore
from training.saver import Saver
saver = Saver(CheckpointStore(sys.argv[1]), num_kept=2, patience_seconds=0.0)
threading.Timer(float(sys.argv[2]), os.kill, [os.getpid(), signal.SIGKILL]).start()
step = int(sys.argv[3])
while True:
    step += 1
    values = {"a": torch.full((50_000,), float(step))}
    saver.save(Checkpoint(values, values, TrainingState(step, "c" * 64)), 0)
"""


@pytest.mark.slow
def test_killed_while_saving_a_whole_one_is_always_there(store: CheckpointStore) -> None:
    rng, last = random.Random(1), 0
    for number in range(6):
        code = [sys.executable, "-c", KILLED, store.uri.rpartition("/")[0]]
        seconds = 0.15 + 0.3 * rng.random() if number else 1.0
        done = subprocess.run([*code, str(seconds), str(last)], check=False, timeout=120)
        assert done.returncode == -9
        found = CheckpointStore(store.uri.rpartition("/")[0]).load(KEY)
        assert found is not None
        assert found.passed_by == ()
        assert found.checkpoint.state.step >= last
        assert bool((found.checkpoint.weights["a"] == found.checkpoint.state.step).all())
        last = found.checkpoint.state.step
    assert last > 10
