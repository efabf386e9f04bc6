"""Shards in memory: those in use, and those that come next, which are read meanwhile."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, Protocol, TypeVar

READERS = 4  # shards read at a time


class Sized(Protocol):
    """A shard that knows about how much memory it takes."""

    @property
    def num_bytes(self) -> int:
        """Bytes."""


T = TypeVar("T", bound=Sized)


class ResidentShards(Generic[T]):
    """At most ``max_bytes`` of shards (always the one in use), the longest unused leaving first.

    ``get`` and ``want`` belong to one thread. An error of reading is raised by the ``get`` that
    needs the shard.
    """

    def __init__(self, load: Callable[[int], T], max_bytes: int) -> None:
        self._load = load
        self._max_bytes = max_bytes
        self._resident: OrderedDict[int, T] = OrderedDict()
        self._coming: dict[int, Future[T]] = {}
        self._num_bytes = 0
        self._largest = 0
        self._readers: ThreadPoolExecutor | None = None

    @property
    def num_bytes(self) -> int:
        """What the shards in memory take, without those being read."""
        return self._num_bytes

    def get(self, number: int) -> T:
        """Shard ``number``, read now unless it is there or on its way."""
        if number in self._resident:
            self._resident.move_to_end(number)
            return self._resident[number]
        coming = self._coming.pop(number, None)
        shard = self._load(number) if coming is None else coming.result()
        self._resident[number] = shard
        self._num_bytes += shard.num_bytes
        self._largest = max(self._largest, shard.num_bytes)
        while self._num_bytes > self._max_bytes and len(self._resident) > 1:
            self._num_bytes -= self._resident.popitem(last=False)[1].num_bytes
        return shard

    def want(self, numbers: Iterable[int]) -> None:
        """Begin to read those of these that are not there, the first first, as memory allows;
        others leave for them. A shard is taken to be as large as the largest so far."""
        wanted = list(numbers)
        room = self._max_bytes // self._largest if self._largest else READERS
        wanted = wanted[: max(room, 1)]
        for number in wanted:
            if len(self._coming) >= READERS:
                return
            if number in self._resident or number in self._coming:
                continue
            self._make_room(set(wanted))
            if self._readers is None:
                self._readers = ThreadPoolExecutor(READERS, "shard")
            self._coming[number] = self._readers.submit(self._load, number)

    def _make_room(self, kept: set[int]) -> None:
        """Let go of what is not wanted until one more shard fits beside those on their way."""
        coming_bytes = self._largest * (len(self._coming) + 1)
        for number in [each for each in self._resident if each not in kept]:
            if self._num_bytes + coming_bytes <= self._max_bytes:
                return
            self._num_bytes -= self._resident.pop(number).num_bytes
