"""How many distinct images more rows will hold, from how often each came in the rows so far.

Copies grow with the rows: of a hundred rows hardly any is a copy, of a billion a third. The counts
of copies are fitted by the Pitman-Yor process, the family that has finite sets of images (discount
below 0), ones that grow as a logarithm (0) and ones that grow as a power (up to 1), and whose
likelihood and expected growth are known in closed form (Pitman, 1995; Lijoi, Mena and Prünster,
2007).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

_FINITE = (-1000.0, -100.0, -30.0, -10.0, -5.0, -2.0, -1.0, -0.5, -0.2, -0.1, -0.05)
_GROWING = (*(step / 25 for step in range(1, 25)), 0.98, 0.995)
_STEPS = 60
_GOLDEN = (math.sqrt(5) - 1) / 2


def distinct_of(times: Mapping[int, int], num_draws: float) -> float:
    """Expected distinct things among ``num_draws``; ``times``: count -> things seen so often.

    More draws than were seen are extrapolated, fewer are thinned out. Where nothing came twice,
    all are expected to be distinct.
    """
    seen = sum(count * number for count, number in times.items())
    distinct = sum(times.values())
    if distinct == seen or num_draws <= 1:
        return num_draws
    discount, strength = _fitted(times, seen, distinct)
    if num_draws < seen:
        thinned = _expected(discount, strength, num_draws) / _expected(discount, strength, seen)
        return distinct * thinned
    grown = _rising(strength, discount, num_draws) - _rising(strength, discount, seen)
    more = (distinct + strength / discount) * math.expm1(grown)
    return distinct + min(max(more, 0.0), num_draws - seen)


def _rising(strength: float, discount: float, num_draws: float) -> float:
    return math.lgamma(strength + discount + num_draws) - math.lgamma(strength + num_draws)


def _expected(discount: float, strength: float, num_draws: float) -> float:
    grown = _rising(strength, discount, num_draws) - _rising(strength, discount, 0)
    return strength / discount * math.expm1(grown)


def _fitted(times: Mapping[int, int], seen: int, distinct: int) -> tuple[float, float]:
    """Discount and strength of the highest likelihood: over a grid, then between its neighbours."""
    grid = sorted((*_FINITE, *_GROWING))

    def best_strength(discount: float) -> tuple[float, float]:
        return _strength(times, seen, distinct, discount)

    place = max(range(len(grid)), key=lambda index: best_strength(grid[index])[0])
    low, high = grid[max(place - 1, 0)], grid[min(place + 1, len(grid) - 1)]
    if low < 0 < high:  # 0 itself has a form of its own, and its neighbours are near
        low, high = (low, grid[place]) if grid[place] < 0 else (grid[place], high)
    discount = _highest(lambda value: best_strength(value)[0], low, high)
    return discount, best_strength(discount)[1]


def _strength(
    times: Mapping[int, int], seen: int, distinct: int, discount: float
) -> tuple[float, float]:
    """The log likelihood at the best strength, and that strength."""
    repeats = sum(
        number * (math.lgamma(count - discount) - math.lgamma(1 - discount))
        for count, number in times.items()
    )

    def likelihood(logarithm: float) -> float:
        size = math.exp(logarithm)
        if discount < 0:  # so many things that were not seen
            strength = -discount * (distinct + size)
            new = math.lgamma(distinct + size) - math.lgamma(size + 1)
        else:
            strength = size
            new = math.lgamma(size / discount + distinct) - math.lgamma(size / discount + 1)
        new += (distinct - 1) * math.log(abs(discount))
        return new - math.lgamma(strength + seen) + math.lgamma(strength + 1) + repeats

    found = _highest(likelihood, math.log(1e-3), math.log(1e8))
    size = math.exp(found)
    return likelihood(found), -discount * (distinct + size) if discount < 0 else size


def _highest(function: Callable[[float], float], low: float, high: float) -> float:
    """Where a function with one peak is highest, by golden sections."""
    left, right = high - _GOLDEN * (high - low), low + _GOLDEN * (high - low)
    at_left, at_right = function(left), function(right)
    for _ in range(_STEPS):
        if at_left < at_right:
            low, left, at_left = left, right, at_right
            right = low + _GOLDEN * (high - low)
            at_right = function(right)
        else:
            high, right, at_right = right, left, at_left
            left = high - _GOLDEN * (high - low)
            at_left = function(left)
    return (low + high) / 2
