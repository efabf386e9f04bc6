"""Which sample comes when: a pure function of (seed, epoch, position).

An epoch visits every sample exactly once. Shards come in a random order; the samples of each
window of consecutive shards are shuffled together, so a reader holds only that many shards. A
position counts samples from the start of training, over all workers: it is the loader's whole
state. A step takes the next ``global_batch_size`` positions, across the end of an epoch where it
falls so, and each rank takes a contiguous slice of them: the sequence does not depend on how many
workers there are.

Where images have several shapes (aspect buckets), a step takes samples of one shape: each shape
has an order of its own, and steps are dealt to them evenly, as often as they have samples.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from fractions import Fraction
from functools import lru_cache
from itertools import chain
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from infra.errors import UserError
from training.randomness import permutation

_CACHED_WINDOWS = 4


class Visit(NamedTuple):
    """Samples in order, and the epoch each visit belongs to; both (N,) int64."""

    indices: NDArray[np.int64]
    epochs: NDArray[np.int64]


class Order(Protocol):
    """What a loader asks. Positions and samples count from 0."""

    @property
    def num_samples(self) -> int:
        """Samples of an epoch."""

    def visit(self, start: int, stop: int) -> Visit:
        """The samples at positions start … stop - 1."""

    def epochs(self, start: int, stop: int) -> range:
        """The epochs that these samples are of."""

    def shards_ahead(self, position: int) -> list[int]:
        """The shards that this position and those after it need, the first first."""


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

    def epochs(self, start: int, stop: int) -> range:
        """The epochs of positions start … stop - 1."""
        return range(start // self.num_samples, (stop - 1) // self.num_samples + 1)

    def shards_ahead(self, position: int) -> list[int]:
        """The shards of the window that holds ``position``, then those of the window after it."""
        return list(dict.fromkeys(chain(*self.windows_ahead(position))))

    def windows_ahead(self, position: int) -> tuple[list[int], list[int]]:
        """The shards of the window that holds ``position``, and those of the window after it."""
        epoch, offset = divmod(position, self.num_samples)
        shards, ends = self._plan(epoch)
        window = int(np.searchsorted(ends, offset, side="right"))
        first = window * self._window_shards
        after = shards[first + self._window_shards :]
        if window + 1 == len(ends):
            after = self._plan(epoch + 1)[0]
        size = self._window_shards
        return shards[first : first + size].tolist(), after[:size].tolist()

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


class GroupedOrder:
    """Steps of ``batch_size`` samples that are all of one group; ``groups[i]`` is shard i's.

    Every group has an epoch of its own, in which each of its samples comes once; the epochs of all
    advance together. A group smaller than a batch has some of its samples twice in one. The shards
    of a window are dealt to the groups by their numbers of shards, at least one to each.
    """

    def __init__(
        self,
        shard_sizes: Sequence[int],
        groups: Sequence[Hashable],
        batch_size: int,
        seed: int,
        window_shards: int,
    ) -> None:
        sizes = np.asarray(shard_sizes, dtype=np.int64)
        starts = np.concatenate(([0], np.cumsum(sizes)))
        self.num_samples = int(sizes.sum())
        self._batch_size = batch_size
        self._parts: list[_Part] = []
        for group in dict.fromkeys(groups):
            shards = np.array([i for i, each in enumerate(groups) if each == group], np.int64)
            if sizes[shards].sum():
                window = max(1, window_shards * len(shards) // len(sizes))
                order = PlannedOrder(sizes[shards].tolist(), seed, window)
                ends = np.cumsum(sizes[shards])
                self._parts.append(_Part(order, shards, ends, starts[shards + 1]))
        self._turn = lru_cache(4 * len(self._parts))(self._find_turn)

    def visit(self, start: int, stop: int) -> Visit:
        """The samples at positions start … stop - 1."""
        found = [part.visit(*span) for part, *span in self._spans(start, stop)]
        empty = np.empty(0, dtype=np.int64)
        return Visit(
            np.concatenate([empty, *(each.indices for each in found)]),
            np.concatenate([empty, *(each.epochs for each in found)]),
        )

    def epochs(self, start: int, stop: int) -> range:
        """From the first to the last epoch of positions start … stop - 1."""
        found = [part.order.epochs(*span) for part, *span in self._spans(start, stop)]
        return range(min(each.start for each in found), max(each.stop for each in found))

    def shards_ahead(self, position: int) -> list[int]:
        """The shards of the windows in which the next steps are, then those of windows after."""
        first = position // self._batch_size
        windows: tuple[list[int], list[int]] = ([], [])
        for number in range(first, first + 2 * len(self._parts)):
            part, turn = self._turn(number)
            for shards, own in zip(
                windows, part.order.windows_ahead(turn * self._batch_size), strict=True
            ):
                shards.extend(part.shards[own].tolist())
        return list(dict.fromkeys(chain(*windows)))

    def _spans(self, start: int, stop: int) -> Iterator[tuple[_Part, int, int]]:
        """The positions in groups' own orders that these positions stand for."""
        while start < stop:
            number, offset = divmod(start, self._batch_size)
            part, turn = self._turn(number)
            num_taken = min(stop - start, self._batch_size - offset)
            begin = turn * self._batch_size + offset
            yield part, begin, begin + num_taken
            start += num_taken

    def _find_turn(self, number: int) -> tuple[_Part, int]:
        """The group that has step ``number``, and how many steps it had before.

        Step i of a group of n samples is due at (2 i + 1) / 2 n; steps come as they are due, of
        those due together the first group's first.
        """
        sizes = [part.order.num_samples for part in self._parts]
        # Up to this time, which is p / q, no more than ``number`` steps were due.
        p, q = max(0, 2 * number - len(sizes)), 2 * self.num_samples
        turns = [max(0, -((q - 2 * size * p) // (2 * q))) for size in sizes]
        for _ in range(number - sum(turns) + 1):
            due = [Fraction(2 * i + 1, size) for i, size in zip(turns, sizes, strict=True)]
            group = due.index(min(due))
            turns[group] += 1
        return self._parts[group], turns[group] - 1


class _Part(NamedTuple):
    """A group: its own order over ``shards`` of the dataset. ``ends`` counts its samples through
    them, ``dataset_ends`` the dataset's."""

    order: PlannedOrder
    shards: NDArray[np.int64]
    ends: NDArray[np.int64]
    dataset_ends: NDArray[np.int64]

    def visit(self, start: int, stop: int) -> Visit:
        """The samples at these positions of the group, by their places in the dataset."""
        own, epochs = self.order.visit(start, stop)
        shard = np.searchsorted(self.ends, own, side="right")
        return Visit(own - self.ends[shard] + self.dataset_ends[shard], epochs)


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
