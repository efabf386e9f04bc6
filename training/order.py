"""Which sample comes when: a pure function of (seed, epoch, position).

An epoch visits every sample exactly once. Shards come in a random order; the samples of each
window of consecutive shards are shuffled together, so a reader holds only that many shards. A
position counts samples from the start of training, over all workers: it is the loader's whole
state. A step takes the next ``global_batch_size`` positions, across the end of an epoch where it
falls so, and each rank takes a contiguous slice of them: the sequence does not depend on how many
workers there are.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from infra.errors import UserError
from training.randomness import permutation

_CACHED_WINDOWS = 4


class Visit(NamedTuple):
    """Samples in order, and the epoch each visit belongs to; both (N,) int64."""

    indices: NDArray[np.int64]
    epochs: NDArray[np.int64]


class PlannedOrder:
    """The order over shards of ``shard_sizes`` samples; sample i of the dataset counts through
    the shards in their given order."""

    def __init__(self, shard_sizes: Sequence[int], seed: int, window_shards: int) -> None:
        self.num_samples = int(sum(shard_sizes))
        if self.num_samples == 0:
            raise UserError(
                expected="at least one sample to train on",
                got="none",
                remedy="loosen the stage's filters or curate more",
            )
        self._sizes = np.asarray(shard_sizes, dtype=np.int64)
        self._starts = np.concatenate(([0], np.cumsum(self._sizes)))
        self._seed = seed
        self._window_shards = window_shards
        self._window = lru_cache(_CACHED_WINDOWS)(self._make_window)
        self._plan = lru_cache(_CACHED_WINDOWS)(self._make_plan)

    def visit(self, start: int, stop: int) -> Visit:
        """The samples at positions start … stop - 1."""
        parts: list[NDArray[np.int64]] = []
        epochs: list[NDArray[np.int64]] = []
        position = start
        while position < stop:
            epoch, offset = divmod(position, self.num_samples)
            ends = self._plan(epoch)[1]
            window = int(np.searchsorted(ends, offset, side="right"))
            window_start = int(ends[window - 1]) if window else 0
            num_taken = min(stop - position, int(ends[window]) - offset)
            begin = offset - window_start
            parts.append(self._window(epoch, window)[begin : begin + num_taken])
            epochs.append(np.full(num_taken, epoch, dtype=np.int64))
            position += num_taken
        empty = np.empty(0, dtype=np.int64)
        return Visit(np.concatenate([empty, *parts]), np.concatenate([empty, *epochs]))

    def shards_ahead(self, position: int) -> list[int]:
        """The shards of the window that holds ``position``, then those of the window after it."""
        epoch, offset = divmod(position, self.num_samples)
        shards, ends = self._plan(epoch)
        window = int(np.searchsorted(ends, offset, side="right"))
        ahead = shards[window * self._window_shards :][: 2 * self._window_shards]
        if window + 1 == len(ends):
            ahead = np.append(ahead, self._plan(epoch + 1)[0][: self._window_shards])
        return [int(number) for number in dict.fromkeys(ahead.tolist())]

    def _make_plan(self, epoch: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The epoch's shard order, and the offset at which each of its windows ends."""
        shards = permutation(len(self._sizes), self._seed, "shard order", epoch)
        ends = np.cumsum(self._sizes[shards])
        last = np.arange(self._window_shards - 1, len(shards), self._window_shards)
        if len(last) == 0 or last[-1] != len(shards) - 1:
            last = np.append(last, len(shards) - 1)
        return shards, ends[last]

    def _make_window(self, epoch: int, window: int) -> NDArray[np.int64]:
        shards = self._plan(epoch)[0]
        chosen = shards[window * self._window_shards : (window + 1) * self._window_shards]
        indices = np.concatenate(
            [np.arange(self._starts[s], self._starts[s + 1], dtype=np.int64) for s in chosen]
        )
        return indices[permutation(len(indices), self._seed, "sample order", epoch, window)]


def rank_slice(global_batch_size: int, rank: int, world_size: int) -> slice:
    """The part of a global batch that ``rank`` (0 … world_size - 1) trains on.

    Slices are contiguous, cover the batch and differ by at most one sample.
    """
    if global_batch_size < world_size:
        raise UserError(
            expected=f"a global_batch_size of at least {world_size}, one sample per worker",
            got=str(global_batch_size),
            remedy="use fewer workers or a larger batch",
        )
    return slice(
        global_batch_size * rank // world_size, global_batch_size * (rank + 1) // world_size
    )
