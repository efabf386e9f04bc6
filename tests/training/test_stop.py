from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest

from infra import storage
from training import stop
from training.stop import STOP_NAME, StopWatch, ask_to_stop


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stop, "POLL_SECONDS", 0.02)


@pytest.fixture
def run_uri(tmp_path: Path) -> str:
    return (tmp_path / "run").as_uri()


def test_a_wish_is_heard_and_answered(run_uri: str) -> None:
    wanted = threading.Event()
    watch = StopWatch(run_uri, 3, wanted)

    def work() -> None:
        assert wanted.wait(10.0)
        watch.answer(41)

    worker = threading.Thread(target=work)
    worker.start()
    assert ask_to_stop(run_uri, 3, 10.0) == 41
    worker.join()
    watch.close()


def test_a_wish_for_another_attempt_stops_nobody(run_uri: str) -> None:
    storage.write_json(storage.join(run_uri, STOP_NAME), {"attempt": 2, "saved_step": 9})
    wanted = threading.Event()
    watch = StopWatch(run_uri, 3, wanted)
    time.sleep(0.2)
    assert not wanted.is_set()
    watch.close()


def test_nobody_answers(run_uri: str) -> None:
    assert ask_to_stop(run_uri, 1, 0.1) is None
