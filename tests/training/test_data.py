from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from infra.errors import UserError
from training.config import StageConfig
from training.data import TokenDataset, TokenShard, choose_caption, in_memory, select

SmallConfig = Callable[..., StageConfig]
NewShard = Callable[..., TokenShard]


def test_batches_hold_what_the_shards_hold(
    small_config: SmallConfig, token_shard: NewShard
) -> None:
    shards = [token_shard(5, 0), token_shard(3, 1)]
    batch = in_memory(shards, small_config(unknown_preference_score=2.5)).batch_at(0)
    for number, sample_id in enumerate(batch.sample_ids):
        shard, row = shards[int(sample_id[:2])], int(sample_id[3:])
        assert np.array_equal(batch.tokens_BHW[number].numpy(), shard.tokens_NHW[row])
        assert batch.captions[number] in {text for _, text in shard.captions[row]}
        conditions = batch.micro_conditions_B5[number].numpy()
        assert np.array_equal(conditions[:4], shard.sizes_and_crops_N4[row])
        score = shard.preference_score_N[row]
        assert conditions[4] == (2.5 if np.isnan(score) else score)


def test_micro_conditions_stand_in_the_networks_order(
    small_config: SmallConfig, token_shard: NewShard
) -> None:
    shard = token_shard(2)
    shard.sizes_and_crops_N4[:] = [640, 480, 3, 7]
    shard.preference_score_N[:] = 5.5
    batch = in_memory([shard], small_config(global_batch_size=1)).batch_at(0)
    assert batch.micro_conditions_B5.tolist() == [[640, 480, 3, 7, 5.5]]


def test_steps_go_through_epochs_without_repeats(
    small_config: SmallConfig, token_shard: NewShard
) -> None:
    config = small_config(global_batch_size=4)
    dataset = in_memory([token_shard(5, 0), token_shard(5, 1)], config)
    ids = [name for step in range(5) for name in dataset.batch_at(step).sample_ids]
    assert len(set(ids[:10])) == len(set(ids[10:])) == 10
    assert ids[:10] != ids[10:]


def test_ranks_see_slices_of_the_same_batch(
    small_config: SmallConfig, token_shard: NewShard
) -> None:
    dataset = in_memory([token_shard(5, 0), token_shard(5, 1)], small_config())
    whole = dataset.batch_at(2)
    parts = [dataset.batch_at(2, rows) for rows in (slice(0, 2), slice(2, 6))]
    assert [i for part in parts for i in part.sample_ids] == whole.sample_ids
    assert [c for part in parts for c in part.captions] == whole.captions


def test_the_mix_decides_how_often_an_origin_is_seen(
    small_config: SmallConfig, token_shard: NewShard
) -> None:
    config = small_config(caption_mix={"alt": 0.25, "synthetic": 0.75}, global_batch_size=500)
    dataset = in_memory([token_shard(500)], config)
    first, second = dataset.batch_at(0).captions, dataset.batch_at(1).captions
    share = sum(caption.startswith("a long") for caption in first + second) / 1000
    assert abs(share - 0.75) < 0.05
    assert set(first) != set(second)  # another epoch draws anew
    assert first == in_memory([token_shard(500)], config).batch_at(0).captions


def test_a_caption_of_a_missing_origin_is_never_drawn() -> None:
    captions = (("alt", "a"), ("synthetic", "s"), ("synthetic", "t"))
    assert {choose_caption(captions, {"alt": 1.0}, d) for d in (0.0, 0.5, 0.999)} == {"a"}
    draws = [choose_caption(captions, {"alt": 1.0, "synthetic": 1.0}, d) for d in (0.1, 0.6, 0.9)]
    assert draws == ["a", "s", "t"]
    assert choose_caption((("alt", "a"),), {"alt": 0.1, "synthetic": 0.9}, 0.99) == "a"
    with pytest.raises(ValueError, match="no caption"):
        choose_caption((("alt", "a"),), {"synthetic": 1.0}, 0.5)


def test_filters_count_what_they_leave_out(
    small_config: SmallConfig, token_shard: NewShard
) -> None:
    shard = token_shard(9)
    shard.aesthetic_score_N[:] = [np.nan, 4, 5, 6, 7, np.nan, 5, 4, 3]
    dataset = in_memory([shard], small_config(min_aesthetic_score=5.0))
    assert len(dataset) == 4
    assert dataset.left_out["aesthetic_score"] == 5
    with pytest.raises(UserError, match="loosen"):
        in_memory([shard], small_config(min_aesthetic_score=9.0))


def test_a_threshold_of_zero_is_a_threshold(
    small_config: SmallConfig, token_shard: NewShard
) -> None:
    shard = token_shard(4)
    shard.preference_score_N[:] = [-1, 0, 1, np.nan]
    assert len(in_memory([shard], small_config(min_preference_score=0.0))) == 2


def test_shards_in_memory_are_bounded_and_read_again(
    small_config: SmallConfig, token_shard: NewShard
) -> None:
    shards = [token_shard(4, number) for number in range(6)]
    reads: list[int] = []

    def load(number: int) -> TokenShard:
        reads.append(number)
        return shards[number]

    def ids(dataset: TokenDataset) -> list[str]:
        return [name for step in range(12) for name in dataset.batch_at(step).sample_ids]

    tight = small_config(max_resident_bytes=1, shuffle_window_shards=1)
    bounded = ids(select(load, [4] * 6, [(4, 4)] * 6, tight))
    assert len(reads) > 6
    reads.clear()
    roomy = small_config(shuffle_window_shards=1)
    assert ids(select(load, [4] * 6, [(4, 4)] * 6, roomy)) == bounded
    assert sorted(reads) == list(range(6))


def test_whole_shards_are_not_read_for_the_filters(
    small_config: SmallConfig, token_shard: NewShard
) -> None:
    def load(number: int) -> TokenShard:
        raise AssertionError("read too early")

    assert len(select(load, [4, 4], [(4, 4)] * 2, small_config())) == 8


def test_the_painters_score_comes_from_the_samples(
    small_config: SmallConfig, token_shard: NewShard
) -> None:
    shard = token_shard(4)
    shard.preference_score_N[:] = [5, np.nan, 7, 8]
    dataset = in_memory([shard], small_config(unknown_preference_score=1.0))
    assert sorted(dataset.preference_scores(1).tolist()) == [1, 5, 7, 8]
