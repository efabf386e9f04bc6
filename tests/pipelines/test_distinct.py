"""Copies grow with the rows: how many distinct images are foreseen, against what then came."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pytest

from pipelines.distinct import distinct_of

Draws = npt.NDArray[np.int64]
GROWTH = 8


def times(draws: Draws) -> Counter[int]:
    return Counter(np.unique(draws, return_counts=True)[1].tolist())


def few_and_alike(rng: np.random.Generator, n: int) -> Draws:
    return rng.integers(0, 9_000, n)


def popular_and_rare(rng: np.random.Generator, n: int) -> Draws:
    return rng.zipf(1.3, n)


def hardly_any_twice(rng: np.random.Generator, n: int) -> Draws:
    return rng.integers(0, 1_000_000, n)


def many_once_and_placeholders(rng: np.random.Generator, n: int) -> Draws:
    copied = np.where(rng.random(n) < 0.1, 1, rng.integers(0, 50_000, n))
    return np.where(rng.random(n) < 0.7, np.arange(n) + 10**9, copied)


@pytest.mark.parametrize(
    "draw", [few_and_alike, popular_and_rare, hardly_any_twice, many_once_and_placeholders]
)
@pytest.mark.parametrize("num_draws", [2_000, 20_000])
def test_an_eighth_foresees_the_whole(
    draw: Callable[[np.random.Generator, int], Draws], num_draws: int
) -> None:
    every = draw(np.random.default_rng(11), num_draws * GROWTH)
    every = np.random.default_rng(12).permutation(every)
    came = len(np.unique(every))
    assert distinct_of(times(every[:num_draws]), len(every)) == pytest.approx(came, rel=0.1)


def test_as_many_draws_give_what_was_seen_and_fewer_give_less() -> None:
    draws = popular_and_rare(np.random.default_rng(3), 10_000)
    seen = times(draws)
    assert distinct_of(seen, 10_000) == pytest.approx(sum(seen.values()))
    half = np.mean([len(np.unique(draws[start::2])) for start in (0, 1)])
    assert distinct_of(seen, 5_000) == pytest.approx(half, rel=0.05)
    assert distinct_of(seen, 1) == 1


def test_where_nothing_came_twice_all_are_distinct() -> None:
    assert distinct_of({1: 500}, 4_000) == 4_000
    assert distinct_of({1: 500}, 100) == 100


@pytest.mark.parametrize("seen", [{2: 1}, {1: 1, 2: 1}, {500: 1}, {1: 10**6, 2: 1}, {2: 10**5}])
def test_odd_counts_give_a_number_that_can_be(seen: dict[int, int]) -> None:
    drawn = sum(count * number for count, number in seen.items())
    for num_draws in (drawn + 1, drawn * 10, drawn * 10_000):
        assert sum(seen.values()) <= distinct_of(seen, num_draws) <= num_draws
