"""A few kills of every kind while four stages train; the record of a hundred is in the docs."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).with_name("training_drill.py")


def _load_drill() -> Any:
    spec = importlib.util.spec_from_file_location("training_drill", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["training_drill"] = module  # its dataclasses look themselves up
    spec.loader.exec_module(module)
    return module


drill_module = _load_drill()
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
NUM_KILLS = 6


def test_killed_at_random_the_weights_are_the_same(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    drill = drill_module.Drill(tmp_path, NUM_KILLS, seed=7, mlflow_away_seconds=5.0)
    is_equal = drill.run()
    with capsys.disabled():
        print(drill.page())
    assert is_equal
    assert drill.rounds_equal >= 1
    assert len(drill.kills) == NUM_KILLS
    assert len({kill.kind for kill in drill.kills}) == NUM_KILLS
    assert sum(kill.step > 0 for kill in drill.kills) > NUM_KILLS / 2
    assert {kill.kind for kill in drill.kills} <= set(drill_module.KINDS)
