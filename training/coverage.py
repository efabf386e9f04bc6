"""The account of samples seen: each of an epoch once, however often and on how many workers.

A sample has 64 bits that depend on (seed, epoch, sample) alone. What was trained is kept as a count
and the sum of those bits modulo 2^64, which takes the same room for ten samples as for two billion
and does not depend on order, restarts or workers. Over a whole epoch both must be what all samples
give: one left out, or taken twice, changes the sum (a chance of 2^-64 to miss it).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from training.order import Visit
from training.randomness import hashes

CHUNK = 1 << 22
_MASK = (1 << 64) - 1


class CoverageBroken(Exception):
    """An epoch did not see every sample once: a bug, and no result may come of it."""


@dataclass
class Tally:
    """Samples of one epoch: how many, and the sum of their bits modulo 2^64."""

    count: int = 0
    bits: int = 0

    def __add__(self, other: Tally) -> Tally:
        return Tally(self.count + other.count, (self.bits + other.bits) & _MASK)


@dataclass
class Coverage:
    """What was seen of ``num_samples`` samples, by epoch; ``passed_by`` is part of ``seen``."""

    num_samples: int
    seed: int
    seen: dict[int, Tally] = field(default_factory=dict)
    passed_by: dict[int, int] = field(default_factory=dict)
    finished: int = 0

    def tallies(self, visit: Visit) -> dict[int, Tally]:
        """A visit's own account by epoch; those of several workers add up."""
        found = {}
        for epoch in np.unique(visit.epochs):
            indices = visit.indices[visit.epochs == epoch]
            found[int(epoch)] = Tally(len(indices), self._bits(indices, int(epoch)))
        return found

    def add(self, tallies: Mapping[int, Tally], *, passed_by: bool = False) -> list[int]:
        """Take samples into the account; returns the epochs that this completed.

        Raises ``CoverageBroken`` when a completed epoch is not each sample once.
        """
        for epoch, tally in tallies.items():
            if epoch < self.finished:
                raise CoverageBroken(f"epoch {epoch} saw {tally.count} samples after its end")
            self.seen[epoch] = self.seen.get(epoch, Tally()) + tally
            if passed_by:
                self.passed_by[epoch] = self.passed_by.get(epoch, 0) + tally.count
        done = [e for e, tally in sorted(self.seen.items()) if tally.count >= self.num_samples]
        for epoch in done:
            self._check(epoch, self.seen.pop(epoch))
        return done

    def _check(self, epoch: int, tally: Tally) -> None:
        whole = Tally()
        for start in range(0, self.num_samples, CHUNK):
            indices = np.arange(start, min(start + CHUNK, self.num_samples), dtype=np.int64)
            whole += Tally(len(indices), self._bits(indices, epoch))
        if tally != whole:
            raise CoverageBroken(
                f"epoch {epoch} saw {tally.count} samples of {self.num_samples}, or other ones: "
                f"{tally.bits:016x}, not {whole.bits:016x}"
            )
        self.finished = max(self.finished, epoch + 1)

    def _bits(self, indices: NDArray[np.int64], epoch: int) -> int:
        bits = hashes(indices, self.seed, "coverage", epoch)
        with np.errstate(over="ignore"):
            return int(bits.sum(dtype=np.uint64))

    def to_json(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {
            "finished": self.finished,
            "seen": {str(e): [t.count, f"{t.bits:016x}"] for e, t in self.seen.items()},
            "passed_by": {str(epoch): count for epoch, count in self.passed_by.items()},
        }

    def restore(self, raw: Mapping[str, Any]) -> None:
        """Go back to what a checkpoint kept."""
        self.finished = int(raw.get("finished", 0))
        self.seen = {
            int(e): Tally(int(count), int(bits, 16))
            for e, (count, bits) in raw.get("seen", {}).items()
        }
        self.passed_by = {int(e): int(count) for e, count in raw.get("passed_by", {}).items()}


def signed(bits: int) -> int:
    """64 bits as a number that int64 holds; sums of it wrap as those of ``bits`` do."""
    return bits - (1 << 64) if bits >> 63 else bits


def unsigned(number: int) -> int:
    """The inverse of ``signed``."""
    return number & _MASK
