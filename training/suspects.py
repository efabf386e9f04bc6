"""Which batch a worker was lost in, once it is lost again without a checkpoint in between.

A batch that ends the process (a decoder or a kernel that crashes, memory that does not suffice)
leaves no word. While training goes well nothing is written. A worker that starts after another was
lost writes down each batch before it trains on it, until a checkpoint is saved: where the next one
is lost as well, it is known in what.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

from infra import storage
from infra.errors import UserError

FOLDER = "suspects"
NAMED_SAMPLES = 8


@dataclass(frozen=True)
class Suspect:
    """The batch that a worker was lost in: its number, this worker's samples of it, and how often
    workers were lost in it, one after the other."""

    attempt: int
    step: int
    batch: int
    sample_ids: list[str]
    times: int = 1

    def __str__(self) -> str:
        samples = f", samples {some_of(self.sample_ids)}" if self.sample_ids else ""
        return f"batch {self.batch} (step {self.step}{samples})"


def some_of(sample_ids: Sequence[str]) -> str:
    """The first ids, and how many more there are."""
    num_more = len(sample_ids) - NAMED_SAMPLES
    more = f" and {num_more} more" if num_more > 0 else ""
    return ", ".join(sample_ids[:NAMED_SAMPLES]) + more


def suspect_of(run_uri: str, rank: int) -> Suspect | None:
    """What the worker of this rank wrote last; None when it wrote nothing, or it does not read."""
    try:
        return Suspect(**storage.read_json(_uri(run_uri, rank)))
    except (UserError, TypeError):
        return None


class SuspectWatch:
    """Writes down what this worker is about to train on, when ``is_needed``.

    ``found`` is where the worker before was lost, if it was in this attempt and at this ``step`` or
    after it.
    """

    def __init__(self, run_uri: str, rank: int, attempt: int, step: int, is_needed: bool) -> None:
        self._uri = _uri(run_uri, rank)
        self._attempt = attempt
        self._is_needed = is_needed
        self._has_saved = False
        last = suspect_of(run_uri, rank) if is_needed else None
        is_known = last is not None and last.attempt == attempt and last.step >= step
        self.found = last if is_known else None

    def begin(self, step: int, batch: int, sample_ids: Sequence[str]) -> None:
        """The batch that step ``step`` is about to be made with."""
        if not self._is_needed:
            return
        before = self.found
        times = 1 + (before.times if before is not None and before.batch == batch else 0)
        found = Suspect(self._attempt, step, batch, list(sample_ids), times)
        try:
            storage.write_json(self._uri, asdict(found))
        except UserError:
            return  # storage that is away is for those who save to tell

    def saving(self) -> None:
        """A checkpoint is about to be written, which waits for the one before: with the second, one
        is there, and the next start has another place to begin."""
        self._is_needed = self._is_needed and not self._has_saved
        self._has_saved = True


def _uri(run_uri: str, rank: int) -> str:
    return storage.join(run_uri, FOLDER, f"worker-{rank}.json")
