"""What happens to a stage while it trains reaches the person who ran the command."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from app.recipe import load_recipe
from app.report import status_page
from app.session import Session
from app.status import RunStatus, StatusFile, StepStatus, now, read_latest
from app.verb import Output

TINY = Path(__file__).resolve().parent.parent / "recipes" / "tiny.yaml"
BEGAN = ("started", "attempt 2: RESUME from the checkpoint of step 40")
DAMAGED = ("checkpoint passed by", "step 60: weights.safetensors: expected sha256 a, got b")


def test_a_note_is_said_once_and_stays(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    step = StepStatus("concepts", "stage")
    status = RunStatus(
        "r1", "tiny", str(TINY), "0" * 64, "atelier train", os.getpid(), now(), now(), steps=[step]
    )
    file = StatusFile.create(tmp_path, status, {})
    session = Session(load_recipe(TINY), tmp_path, file, Output())
    with file.running("concepts") as running:
        for notes in ((BEGAN,), (BEGAN, DAMAGED), (BEGAN, DAMAGED), ()):
            session.note(running, notes)
    said = capsys.readouterr().out.splitlines()
    assert said == [f"    concepts: {DAMAGED[0]}: {DAMAGED[1]}"]
    kept = read_latest(tmp_path)
    assert kept is not None
    assert kept.steps[0].notes == dict([BEGAN, DAMAGED])
    page = status_page(kept)
    assert f"concepts: {DAMAGED[0]}: {DAMAGED[1]}" in page
    assert BEGAN[1] not in page
