"""A worker that hangs ends itself, and says where it stood."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from infra import storage
from training.stall import StallWatch, keep_report
from training.waste import WORKER_HUNG, WORKER_LOST, record_start, waste_by_cause

HANGS = """
import ctypes, sys
from training.stall import StallWatch
watch = StallWatch("file:///run", 0, 1.0, sys.argv[1])
watch.stepped()
def a_step_that_hangs():
    ctypes.PyDLL(None).sleep(60)  # holds Python's lock, as a kernel that does not return may
a_step_that_hangs()
"""


def test_a_hung_worker_ends_and_the_next_one_knows_where(tmp_path: Path) -> None:
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", HANGS, str(tmp_path)], check=False, capture_output=True, timeout=50
    )
    assert done.returncode == 1
    assert time.monotonic() - started < 40
    again = StallWatch("file:///run", 0, 60.0, str(tmp_path))
    assert "a_step_that_hangs" in again.found
    again.close()
    assert StallWatch("file:///run", 0, None, str(tmp_path)).found == ""


def test_steps_and_other_work_put_it_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("training.stall.REARM_SECONDS", 0.0)
    watch = StallWatch("file:///run", 1, 0.8, str(tmp_path))
    for _ in range(4):
        watch.stepped()
        time.sleep(0.4)
    watch.pause()
    time.sleep(1.0)  # else this process would have ended
    watch.close()
    assert list(tmp_path.iterdir()) == []


def test_it_is_counted_apart(tmp_path: Path) -> None:
    run_uri = storage.file_uri(tmp_path)
    record_start(run_uri, 1, "INIT", 0)
    record_start(run_uri, 1, "RESUME", 2, was_hung=True)
    lost = record_start(run_uri, 1, "RESUME", 2)
    assert lost.cause == WORKER_LOST
    from training.waste import read_starts

    assert set(waste_by_cause(read_starts(run_uri))) == {WORKER_HUNG, WORKER_LOST}


def test_where_it_stood_is_kept(tmp_path: Path) -> None:
    uri = keep_report(storage.file_uri(tmp_path), 3, 1, 20, "Thread 0x1")
    assert uri is not None
    assert storage.read_bytes(uri) == b"Thread 0x1"
    assert keep_report("file:///proc/nothing", 3, 1, 20, "x") is None
