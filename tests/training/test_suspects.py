"""What is written down about a batch that may end the process."""

from __future__ import annotations

from pathlib import Path

import pytest

from infra import storage
from training.suspects import Suspect, SuspectWatch, some_of, suspect_of


@pytest.fixture
def run_uri(tmp_path: Path) -> str:
    return storage.file_uri(tmp_path / "run")


def _lost_in(run_uri: str, batch: int, attempt: int = 1, start: int = 4) -> SuspectWatch:
    """A worker that starts after another was lost, and is lost in ``batch`` itself."""
    watch = SuspectWatch(run_uri, 0, attempt, start, is_needed=True)
    for number in range(start, batch + 1):
        watch.begin(number, number, [f"s{number}"])
    return watch


def test_nothing_is_written_while_all_goes_well(run_uri: str) -> None:
    SuspectWatch(run_uri, 0, 1, 0, is_needed=False).begin(0, 0, ["s"])
    assert suspect_of(run_uri, 0) is None


def test_losses_in_one_batch_add_up(run_uri: str) -> None:
    assert _lost_in(run_uri, 6).found is None
    assert _lost_in(run_uri, 6).found == Suspect(1, 6, 6, ["s6"], 1)
    assert _lost_in(run_uri, 6).found == Suspect(1, 6, 6, ["s6"], 2)
    assert suspect_of(run_uri, 0) == Suspect(1, 6, 6, ["s6"], 3)
    assert suspect_of(run_uri, 1) is None
    _lost_in(run_uri, 7)
    assert suspect_of(run_uri, 0) == Suspect(1, 7, 7, ["s7"], 1)


@pytest.mark.parametrize(("attempt", "start"), [(2, 4), (1, 7)])
def test_another_attempt_and_an_earlier_place_do_not_count(
    run_uri: str, attempt: int, start: int
) -> None:
    _lost_in(run_uri, 6)
    assert SuspectWatch(run_uri, 0, attempt, start, is_needed=True).found is None


def test_a_checkpoint_ends_the_writing(run_uri: str) -> None:
    watch = _lost_in(run_uri, 5)
    batches = []
    for number in (6, 7, 8):
        watch.saving()  # the first may still be on its way
        watch.begin(number, number, [])
        found = suspect_of(run_uri, 0)
        assert found is not None
        batches.append(found.batch)
    assert batches == [6, 6, 6]


def test_some_samples_are_named_and_the_others_counted() -> None:
    ids = [f"s{number}" for number in range(10)]
    assert some_of(ids) == "s0, s1, s2, s3, s4, s5, s6, s7 and 2 more"
    assert some_of(ids[:2]) == "s0, s1"
    assert str(Suspect(1, 5, 6, [])) == "batch 6 (step 5)"
