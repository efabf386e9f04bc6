"""A few kills of every kind while four stages train; the record of a hundred is in the docs."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults.training_drill import KINDS, Drill

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
NUM_KILLS = 6


def test_killed_at_random_the_weights_are_the_same(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    drill = Drill(tmp_path, NUM_KILLS, seed=7, mlflow_away_seconds=5.0)
    is_equal = drill.run()
    with capsys.disabled():
        print(drill.page())
    assert is_equal
    assert drill.rounds_equal >= 1
    assert len(drill.kills) == NUM_KILLS
    assert len({kill.kind for kill in drill.kills}) > 1
    assert {kill.kind for kill in drill.kills} <= set(KINDS)
