"""SIGTERM reaches this process's own handler, not Ray's, and the last step made is saved."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import Home

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
RECIPE = "tests/recipes/tiny.yaml"

CODE = """
import os, signal, sys, time
from infra.cluster import ClusterConfig
from infra.sessions import ray_session

def end(number, frame):
    sys.exit(143)

signal.signal(signal.SIGTERM, end)
with ray_session(ClusterConfig(cpus_per_worker=1), {}):
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(30)
"""


def test_sigterm_is_ours_as_soon_as_ray_runs(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ATELIER_HOME", str(tmp_path_factory.mktemp("home")))
    done = subprocess.run(
        [sys.executable, "-c", CODE], capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 143, done.stderr
    assert "SIGTERM received" not in done.stderr


def test_the_command_saves_the_last_step_and_ends(
    tmp_path: Path, new_home: Callable[[Path], Home]
) -> None:
    home = new_home(tmp_path / "home")
    home.path.mkdir()
    try:
        assert home.atelier("curate", RECIPE).returncode == 0
        runs = home.path / "s3" / "atelier" / "runs"
        longer = "tokenizer.training.steps=4000"
        with home.start("train", RECIPE, "--set", longer) as command:
            deadline = time.monotonic() + 400
            while time.monotonic() < deadline and _newest_step(runs) < 3:
                assert command.poll() is None
                time.sleep(0.2)
            command.send_signal(signal.SIGTERM)
            _, errors = command.communicate(timeout=200)
        assert command.returncode == 143
        assert "Traceback" not in errors
        (answer,) = runs.glob("tokenizer-*/stop.json")
        saved = json.loads(answer.read_text())["saved_step"]
        assert saved >= 3
        found = sorted(answer.parent.glob("checkpoints/*/CHECKPOINT.json"))
        assert int(found[-1].parent.name.split("-")[1]) == saved
    finally:
        home.atelier("down")


def _newest_step(runs: Path) -> int:
    found = runs.glob("*/progress.json")
    return max((int(json.loads(path.read_text())["step"]) for path in found), default=0)
