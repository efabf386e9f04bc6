"""A few kills of every kind, at random moments; the records of many are in docs/benchmarks.

For the record: ``ATELIER_KILLS=200 .venv/bin/python -m pytest -m slow -s -k curation`` and this
file's path.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults.curation_drill import CurationJob
from tests.faults.drill import drill, kills_wanted
from tests.faults.training_drill import TrainingJob

NUM_KILLS = kills_wanted(6)
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900 + 120 * NUM_KILLS)]


def test_curation_killed_at_random_publishes_the_same(tmp_path: Path) -> None:
    drill(CurationJob(tmp_path), tmp_path, NUM_KILLS)


def test_training_killed_at_random_gives_the_same_weights(tmp_path: Path) -> None:
    done = drill(TrainingJob(), tmp_path, NUM_KILLS)
    assert len({kill.kind for kill in done.kills}) > 1
