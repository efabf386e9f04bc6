"""A run's record: whole at every moment, one run at a time, a dead run not called running."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from app.status import (
    DONE,
    FAILED,
    RUNNING,
    STOPPED,
    RunStatus,
    StatusFile,
    StepStatus,
    holder_of_lock,
    new_run_id,
    now,
    read_latest,
    read_made,
    run_lock,
    watch,
)
from infra.errors import UserError

HOLDER = """
import sys, time
from pathlib import Path
from app.status import run_lock
with run_lock(Path(sys.argv[1]), "atelier run x.yaml"):
    print("held", flush=True)
    time.sleep(60)
"""


def new_file(home: Path, pid: int | None = None) -> StatusFile:
    status = RunStatus(
        run_id=new_run_id("tiny"),
        recipe_name="tiny",
        recipe_path="tiny.yaml",
        recipe_fingerprint="0" * 64,
        command="atelier run tiny.yaml",
        pid=os.getpid() if pid is None else pid,
        started_at=now(),
        updated_at=now(),
        steps=[StepStatus("world", "world"), StepStatus("concepts", "stage")],
    )
    return StatusFile.create(home, status, {"name": "tiny"})


def test_a_step_is_on_disk_before_and_after_it_works(tmp_path: Path) -> None:
    with run_lock(tmp_path, "atelier run"):
        file = new_file(tmp_path)
        with file.running("world") as step:
            step.decision = "RUN"
            during = read_latest(tmp_path)
            assert during is not None
            assert during.step("world").state == RUNNING
        after = read_latest(tmp_path)
        assert after is not None
        assert after.step("world").state == DONE
        assert after.step("world").seconds is not None
        assert after.step("concepts").state == "waiting"
        file.end(DONE)
    ended = read_latest(tmp_path)
    assert ended is not None
    assert ended.state == DONE
    assert ended.ended_at is not None


def test_a_failed_step_is_named(tmp_path: Path) -> None:
    file = new_file(tmp_path)
    with pytest.raises(ZeroDivisionError), file.running("concepts"):
        raise ZeroDivisionError
    file.end(FAILED, "a line")
    status = read_latest(tmp_path)
    assert status is not None
    assert (status.state, status.error) == (FAILED, "a line")
    assert status.step("concepts").state == FAILED
    assert status.step("world").state == "waiting"


def test_the_record_survives_its_own_form(tmp_path: Path) -> None:
    file = new_file(tmp_path)
    file.status.step("concepts").scores = {"background": 0.5}
    file.status.step("world").funnel = {"rows_in": 3, "committed": 3}
    raw = json.loads(json.dumps(file.status.to_json()))
    assert raw["scores"] == {"concepts": {"background": 0.5}}
    assert raw["funnel"] == {"world": {"rows_in": 3, "committed": 3}}
    raw["steps"][0]["from_a_newer_version"] = 1
    assert RunStatus.from_json(raw) == file.status


def test_latest_is_the_newest(tmp_path: Path) -> None:
    assert read_latest(tmp_path) is None
    new_file(tmp_path)
    second = new_file(tmp_path)
    latest = read_latest(tmp_path)
    assert latest is not None
    assert latest.run_id == second.status.run_id


def test_what_was_made_outlives_a_run_that_failed_or_did_a_part(tmp_path: Path) -> None:
    assert read_made(tmp_path) is None
    whole = [
        StepStatus("curate:painted", "dataset", manifest_uri="s3://a/old"),
        StepStatus("concepts", "stage", checkpoint_uri="s3://a/concepts"),
        StepStatus("alignment", "stage", checkpoint_uri="s3://a/alignment"),
    ]
    part = [
        StepStatus("curate:painted", "dataset", manifest_uri="s3://a/new"),
        StepStatus("concepts", "stage"),
    ]
    for number, (name, steps) in enumerate([("demo", whole), ("other", whole), ("demo", part)]):
        status = new_file(tmp_path / "elsewhere").status
        status.run_id, status.recipe_name, status.steps = f"2026-{number}", name, steps
        StatusFile.create(tmp_path, status, {})
    made = read_made(tmp_path)
    assert made is not None
    assert [step.manifest_uri or step.checkpoint_uri for step in made.steps] == [
        "s3://a/new",
        "s3://a/concepts",
        "s3://a/alignment",
    ]


def test_a_run_whose_process_died_is_stopped_not_running(tmp_path: Path) -> None:
    file = new_file(tmp_path, pid=2**22 + 1)
    with pytest.raises(KeyboardInterrupt), file.running("world"):
        raise KeyboardInterrupt
    status = read_latest(tmp_path)
    assert status is not None
    assert status.state == STOPPED
    assert status.step("world").state == STOPPED
    assert watch(tmp_path, lambda _: None, 0.01) is not None


def test_a_second_run_says_who_is_at_work_and_a_killed_one_is_forgotten(tmp_path: Path) -> None:
    command = [sys.executable, "-c", HOLDER, str(tmp_path)]
    holder = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        assert holder_of_lock(tmp_path) == holder.pid
        with pytest.raises(UserError) as caught, run_lock(tmp_path, "atelier run"):
            pass
        assert f"atelier run x.yaml (process {holder.pid}) is at work" in str(caught.value)
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.communicate()
    deadline = time.monotonic() + 5
    while holder_of_lock(tmp_path) is not None and time.monotonic() < deadline:
        time.sleep(0.02)
    with run_lock(tmp_path, "atelier run"):
        assert holder_of_lock(tmp_path) == os.getpid()
    assert holder_of_lock(tmp_path) is None


def test_a_home_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(UserError, match="set ATELIER_HOME"), run_lock(tmp_path / "file", "x"):
        pass
