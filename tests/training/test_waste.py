from __future__ import annotations

from pathlib import Path

import pytest

from infra import storage
from training.stop import STOP_NAME
from training.waste import PROGRESS_NAME, read_starts, record_start, waste_by_cause


@pytest.fixture
def run_uri(tmp_path: Path) -> str:
    return (tmp_path / "run").as_uri()


def progress(run_uri: str, attempt: int, step: int, at: float) -> None:
    raw = {"attempt": attempt, "step": step, "steps": 90, "step_seconds": 0.5, "at": at}
    storage.write_json(storage.join(run_uri, PROGRESS_NAME), raw)


def test_each_interruption_has_a_cause_and_a_price(
    run_uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 1000.0
    monkeypatch.setattr("training.waste.time.time", lambda: now)
    first = record_start(run_uri, 1, "INIT with fresh weights", 0)
    assert (first.cause, first.lost_steps, first.idle_seconds) == ("", 0, 0.0)
    progress(run_uri, 1, 17, at=1000.0)
    now = 1004.0
    worker = record_start(run_uri, 1, "RESUME from the checkpoint of step 12", 12)
    assert (worker.cause, worker.lost_steps) == ("worker lost", 5)
    assert (worker.lost_seconds, worker.idle_seconds) == (2.5, 4.0)
    progress(run_uri, 1, 30, at=1010.0)
    now = 1020.0
    driver = record_start(run_uri, 2, "RESUME", 30)
    assert (driver.cause, driver.lost_steps, driver.idle_seconds) == ("driver lost", 0, 10.0)
    progress(run_uri, 2, 40, at=1030.0)
    storage.write_json(storage.join(run_uri, STOP_NAME), {"attempt": 2, "saved_step": 40})
    now = 1031.0
    assert record_start(run_uri, 3, "RESUME", 40).cause == "stopped"
    lost = waste_by_cause(read_starts(run_uri), [{"step": 13, "back_to": 8}, {"step": 4}])
    assert lost == {
        "worker lost": {"times": 1, "steps": 5, "seconds": 6.5},
        "driver lost": {"times": 1, "steps": 0, "seconds": 10.0},
        "stopped": {"times": 1, "steps": 0, "seconds": 1.0},
        "went back": {"times": 1, "steps": 5, "seconds": 0.0},
    }


def test_an_account_that_does_not_read_begins_anew(run_uri: str) -> None:
    storage.write_json(storage.join(run_uri, "starts.json"), [{"odd": 1}])
    assert record_start(run_uri, 1, "INIT", 0).cause == ""
    assert len(read_starts(run_uri)) == 1


def test_steps_that_were_saved_and_damaged_have_a_cause_of_their_own(run_uri: str) -> None:
    record_start(run_uri, 1, "INIT", 0)
    progress(run_uri, 1, 62, at=0.0)
    start = record_start(run_uri, 2, "RESUME", 40, newest_damaged=60)
    assert (start.cause, start.lost_steps, start.lost_seconds) == ("driver lost", 2, 1.0)
    assert (start.damaged_steps, start.damaged_seconds) == (20, 10.0)
    record_start(run_uri, 2, "RESUME", 62)
    lost = waste_by_cause(read_starts(run_uri))
    assert lost["checkpoint damaged"] == {"times": 1, "steps": 20, "seconds": 10.0}
    assert lost["driver lost"]["steps"] == 2
