from __future__ import annotations

import threading
from dataclasses import dataclass

import pytest

from training.resident import READERS, ResidentShards


@dataclass(frozen=True)
class Shard:
    number: int
    num_bytes: int = 10


def test_what_is_wanted_is_read_meanwhile_and_once() -> None:
    reads: list[int] = []
    begun = threading.Event()

    def load(number: int) -> Shard:
        reads.append(number)
        begun.set()
        return Shard(number)

    shards = ResidentShards(load, max_bytes=1000)
    shards.want([3])
    assert begun.wait(5)
    shards.want([3])
    assert [shards.get(3).number, shards.get(3).number] == [3, 3]
    assert reads == [3]


def test_memory_is_bounded_and_what_is_in_use_stays() -> None:
    reads: list[int] = []

    def load(number: int) -> Shard:
        reads.append(number)
        return Shard(number)

    shards = ResidentShards(load, max_bytes=40)
    for first in range(0, 12, 2):
        window = [first, first + 1]
        for number in window * 3:
            shards.want([*window, first + 2, first + 3])
            assert shards.get(number).number == number
            assert shards.num_bytes <= 40
    assert sorted(reads) == sorted(set(reads))  # none was read twice


def test_no_more_are_read_at_a_time_than_fit() -> None:
    reads: list[int] = []

    def load(number: int) -> Shard:
        reads.append(number)
        return Shard(number)

    shards = ResidentShards(load, max_bytes=20)
    shards.get(0)
    shards.want(range(9))
    assert shards.get(1).number == 1
    assert sorted(reads) == [0, 1]
    assert READERS < 9


def test_an_error_comes_where_the_shard_is_needed() -> None:
    def load(number: int) -> Shard:
        if number == 1:
            raise OSError("gone")
        return Shard(number)

    shards = ResidentShards(load, max_bytes=100)
    shards.want([0, 1])
    assert shards.get(0).number == 0
    with pytest.raises(OSError, match="gone"):
        shards.get(1)
