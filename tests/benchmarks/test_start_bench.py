"""How long nothing is trained: before the first step, between stages, and when all is done."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

pytestmark = [pytest.mark.bench, pytest.mark.timeout(1800)]

ROOT = Path(__file__).resolve().parent.parent.parent
RECIPE = "tests/recipes/tiny.yaml"


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Path]:
    """A home with its services up and the recipe curated."""
    folder = tmp_path / "home"
    _atelier(folder, "curate", RECIPE)
    yield folder
    _atelier(folder, "down")


def _start(home: Path, *arguments: str) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "ATELIER_HOME": str(home), "PYTHONDONTWRITEBYTECODE": ""}
    code = "from app.cli import main; main()"
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def _atelier(home: Path, *arguments: str) -> float:
    """The seconds that a command takes."""
    started = time.perf_counter()
    assert _start(home, *arguments).wait(timeout=1500) == 0, arguments
    return time.perf_counter() - started


def _steps(home: Path) -> dict[str, int]:
    """Run name -> finished steps, of every stage that has begun."""
    found = {}
    for path in (home / "s3" / "atelier" / "runs").glob("*/progress.json"):
        found[path.parent.name.rpartition("-")[0]] = int(json.loads(path.read_text())["step"])
    return found


def test_seconds_without_a_step(home: Path) -> None:
    planning = _atelier(home, "plan", RECIPE)
    began = time.perf_counter()
    first: dict[str, float] = {}
    last: dict[str, float] = {}
    before: dict[str, int] = {}
    command = _start(home, "train", RECIPE)
    while command.poll() is None:
        now, steps = time.perf_counter() - began, _steps(home)
        for stage, step in steps.items():
            if step and stage not in first:
                first[stage] = now
            if step != before.get(stage):
                last[stage] = now
        before = steps
        time.sleep(0.1)
    assert command.returncode == 0
    training = time.perf_counter() - began
    again = _atelier(home, "train", RECIPE)
    order = sorted(first, key=lambda stage: first[stage])
    print(f"\nbench  atelier plan                      {planning:6.1f} s")
    print(f"bench  atelier train, to the first step  {first[order[0]]:6.1f} s")
    for one, other in itertools.pairwise(order):
        print(f"bench  {one} to {other:<22} {first[other] - last[one]:6.1f} s")
    print(f"bench  atelier train, all of it          {training:6.1f} s")
    print(f"bench  atelier train, when all is done   {again:6.1f} s")
