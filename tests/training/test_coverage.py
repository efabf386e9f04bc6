"""What each worker trained, added up, is every sample of an epoch once, whatever happened."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from training.coverage import Coverage, CoverageBroken, Tally, signed, unsigned
from training.order import GroupedOrder, Order, PlannedOrder, Visit, rank_slice

SIZES, SEED, BATCH = [7, 11, 5, 9, 13], 3, 8
NUM_SAMPLES = sum(SIZES)


def planned() -> Order:
    return PlannedOrder(SIZES, SEED, window_shards=2)


def in_groups() -> Order:
    return GroupedOrder(SIZES, ["a", "b", "a", "b", "b"], BATCH, SEED, window_shards=2)


def visit_of(order: Order, number: int, rank: int, world: int) -> Visit:
    rows = rank_slice(BATCH, rank, world)
    return order.visit(number * BATCH + rows.start, number * BATCH + rows.stop)


@pytest.mark.parametrize("new_order", [planned, in_groups])
def test_two_then_one_then_three_workers_lose_and_repeat_nothing(
    new_order: Callable[[], Order],
) -> None:
    seen: list[tuple[int, int]] = []
    state: dict[str, object] = {}
    number = 0
    for world, num_batches in ((2, 5), (1, 4), (3, 9)):  # each time a restart from what was kept
        order = new_order()
        coverage = Coverage(NUM_SAMPLES, SEED)
        coverage.restore(state)
        for _ in range(num_batches):
            together: dict[int, Tally] = {}
            for rank in range(world):
                visit = visit_of(order, number, rank, world)
                seen += zip(visit.epochs.tolist(), visit.indices.tolist(), strict=True)
                for epoch, tally in coverage.tallies(visit).items():
                    together[epoch] = together.get(epoch, Tally()) + tally
            coverage.add(together)
            number += 1
        state = coverage.to_json()
    assert number * BATCH == 144
    assert coverage.finished == 144 // NUM_SAMPLES == 3
    for epoch in range(3):
        assert sorted(i for e, i in seen if e == epoch) == list(range(NUM_SAMPLES))


@pytest.mark.parametrize("mistake", ["one lost, one twice", "one for another", "one after all"])
def test_one_sample_wrong_is_found(mistake: str) -> None:
    visit = PlannedOrder(SIZES, SEED, window_shards=2).visit(0, NUM_SAMPLES)
    coverage = Coverage(NUM_SAMPLES, SEED)
    indices = visit.indices.copy()
    if mistake == "one after all":
        assert coverage.add(coverage.tallies(visit)) == [0]
        indices = indices[:1]
    elif mistake == "one for another":
        indices[4] = 1 - indices[4]
    else:
        indices[0] = indices[1]
    wrong = Visit(indices, visit.epochs[: len(indices)])
    with pytest.raises(CoverageBroken, match="epoch 0 saw"):
        coverage.add(coverage.tallies(wrong))


def test_the_sum_wraps_as_int64_does() -> None:
    rng = np.random.default_rng(0)
    bits = [int(x) for x in rng.integers(0, 1 << 63, 9, dtype=np.uint64) * np.uint64(2)]
    total = np.array([signed(each) for each in bits], dtype=np.int64).sum()
    assert unsigned(int(total)) == sum(bits) % (1 << 64)
