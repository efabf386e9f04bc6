from __future__ import annotations

from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from infra.errors import UserError
from training.order import GroupedOrder, PlannedOrder, rank_slice

SIZES = st.lists(st.integers(0, 9), min_size=1, max_size=8).filter(any)


@given(sizes=SIZES, seed=st.integers(0, 2**63), window=st.integers(1, 4), epoch=st.integers(0, 3))
def test_every_epoch_visits_every_sample_once(
    sizes: list[int], seed: int, window: int, epoch: int
) -> None:
    order = PlannedOrder(sizes, seed, window)
    total = sum(sizes)
    visit = order.visit(epoch * total, (epoch + 1) * total)
    assert sorted(visit.indices) == list(range(total))
    assert set(visit.epochs) == {epoch}


@given(sizes=SIZES, cuts=st.lists(st.integers(0, 60), min_size=1, max_size=5))
def test_reading_in_pieces_gives_the_same_sequence(sizes: list[int], cuts: list[int]) -> None:
    whole = PlannedOrder(sizes, 3, 2).visit(0, 60)
    bounds = [0, *sorted(cuts), 60]
    order = PlannedOrder(sizes, 3, 2)
    parts = [order.visit(a, b).indices for a, b in pairwise(bounds)]
    assert np.array_equal(np.concatenate(parts), whole.indices)


@settings(max_examples=30)
@given(batch=st.integers(3, 17), seed=st.integers(0, 99))
def test_changing_the_number_of_ranks_keeps_the_sequence(batch: int, seed: int) -> None:
    sizes = [7, 5, 9, 4]
    steps_per_world = [(2, 2), (1, 3), (3, 4)]  # workers, steps
    trained: list[int] = []
    step = 0
    for world_size, num_steps in steps_per_world:
        order = PlannedOrder(sizes, seed, 2)
        for _ in range(num_steps):
            for rank in range(world_size):
                part = rank_slice(batch, rank, world_size)
                start = step * batch
                visit = order.visit(start + part.start, start + part.stop)
                trained.extend(visit.indices.tolist())
            step += 1
    alone = PlannedOrder(sizes, seed, 2).visit(0, step * batch).indices
    assert trained == alone.tolist()


def test_a_window_mixes_only_its_own_shards() -> None:
    sizes = [10] * 6
    order = PlannedOrder(sizes, 5, 2)
    for epoch in range(2):
        indices = order.visit(epoch * 60, epoch * 60 + 60).indices
        for window in np.split(indices // 10, 3):
            assert len(set(window)) == 2


def test_epochs_and_seeds_differ() -> None:
    order = PlannedOrder([50], 0, 1)
    first = order.visit(0, 50).indices
    assert not np.array_equal(first, np.arange(50))
    assert not np.array_equal(first, order.visit(50, 100).indices)
    assert not np.array_equal(first, PlannedOrder([50], 1, 1).visit(0, 50).indices)


def test_the_sequence_is_pinned() -> None:
    # A change here changes what every resumed run trains on.
    assert PlannedOrder([4, 4], 7, 1).visit(0, 8).indices.tolist() == [4, 7, 5, 6, 0, 3, 2, 1]


def test_rank_slices_cover_the_batch() -> None:
    parts = [rank_slice(10, rank, 4) for rank in range(4)]
    assert [part.stop - part.start for part in parts] == [2, 3, 2, 3]
    assert parts[0].start == 0
    assert all(a.stop == b.start for a, b in pairwise(parts))


def test_more_workers_than_samples_is_refused() -> None:
    with pytest.raises(UserError, match="one sample per worker"):
        rank_slice(2, 0, 3)


def test_no_samples_is_refused() -> None:
    with pytest.raises(UserError, match="at least one sample"):
        PlannedOrder([0, 0], 0, 1)


SHARDS_AND_GROUPS = st.lists(
    st.tuples(st.integers(0, 30), st.sampled_from("abc")), min_size=1, max_size=9
).filter(lambda shards: any(size for size, _ in shards))


def _sizes_by_group(shards: list[tuple[int, str]]) -> dict[str, int]:
    found: dict[str, int] = {}
    for size, group in shards:
        found[group] = found.get(group, 0) + size
    return {group: size for group, size in found.items() if size}


@settings(max_examples=60)
@given(shards=SHARDS_AND_GROUPS, batch=st.integers(1, 7), window=st.integers(1, 4))
def test_steps_of_one_group_are_dealt_as_they_are_due(
    shards: list[tuple[int, str]], batch: int, window: int
) -> None:
    """Against a list of all steps, sorted by when they are due."""
    order = GroupedOrder([n for n, _ in shards], [g for _, g in shards], batch, 5, window)
    group_of = [group for size, group in shards for _ in range(size)]
    sizes = _sizes_by_group(shards)
    due = sorted(
        (Fraction(2 * turn + 1, 2 * size), place, group)
        for place, (group, size) in enumerate(sizes.items())
        for turn in range(40)
    )
    for number in [*range(20), 7, 0]:  # and back, as after a restart
        visit = order.visit(number * batch, (number + 1) * batch)
        assert {group_of[i] for i in visit.indices} == {due[number][2]}


@settings(max_examples=60)
@given(shards=SHARDS_AND_GROUPS, batch=st.integers(1, 7), window=st.integers(1, 4))
def test_every_group_has_exact_epochs_that_keep_together(
    shards: list[tuple[int, str]], batch: int, window: int
) -> None:
    order = GroupedOrder([n for n, _ in shards], [g for _, g in shards], batch, 5, window)
    group_of = [group for size, group in shards for _ in range(size)]
    sizes, total = _sizes_by_group(shards), len(group_of)
    num_steps = 3 * total // batch + 4 * len(sizes)
    seen: dict[str, list[tuple[int, int]]] = {group: [] for group in sizes}
    for number in range(num_steps):
        visit = order.visit(number * batch, (number + 1) * batch)
        group = group_of[visit.indices[0]]
        seen[group] += zip(visit.epochs.tolist(), visit.indices.tolist(), strict=True)
        span = order.epochs(number * batch, (number + 1) * batch)
        assert (span.start, span.stop - 1) == (min(visit.epochs), max(visit.epochs))
        for other, size in sizes.items():
            ahead = len(seen[other]) - size * (number + 1) * batch / total
            assert abs(ahead) <= batch * (1 + len(sizes)) / 2
    for group, visits in seen.items():
        own = [i for i, each in enumerate(group_of) if each == group]
        for epoch in range(visits[-1][0]):
            assert sorted(i for e, i in visits if e == epoch) == own


@given(cuts=st.lists(st.integers(0, 90), min_size=1, max_size=5))
def test_groups_read_in_pieces_give_the_same_sequence(cuts: list[int]) -> None:
    sizes, groups = [7, 5, 0, 9, 4], ["a", "b", "c", "a", "b"]
    whole = GroupedOrder(sizes, groups, 6, 3, 2).visit(0, 90)
    order = GroupedOrder(sizes, groups, 6, 3, 2)
    parts = [order.visit(a, b) for a, b in pairwise([0, *sorted(cuts), 90])]
    assert np.concatenate([p.indices for p in parts]).tolist() == whole.indices.tolist()
    assert np.concatenate([p.epochs for p in parts]).tolist() == whole.epochs.tolist()


def test_the_sequence_of_groups_is_pinned() -> None:
    order = GroupedOrder([4, 3, 4], ["a", "b", "a"], 2, 7, 1)
    assert order.visit(0, 8).indices.tolist() == [7, 10, 4, 5, 8, 9, 0, 3]


def test_the_next_steps_shards_are_named_before_those_after() -> None:
    sizes, groups = [5] * 12, ["a", "a", "b", "a", "b", "a"] * 2
    order = GroupedOrder(sizes, groups, 4, 3, 4)
    for number in range(30):
        ahead = order.shards_ahead(number * 4)
        assert len(ahead) == len(set(ahead))
        now = set((order.visit(number * 4, number * 4 + 8).indices // 5).tolist())
        assert now <= set(ahead[:6])
