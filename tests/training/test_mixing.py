"""Several datasets as one: how often each sample comes, and that it is accounted for."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from infra import storage
from infra.manifest import load_manifest
from training.checkpoint_store import CheckpointStore
from training.config import StageConfig
from training.data import TokenDataset, TokenShard, in_memory
from training.job import Job
from training.mixing import Part, mixture
from training.session import LocalSession
from training.worker import train


def _epoch(dataset: TokenDataset, number: int) -> Counter[str]:
    size = len(dataset)
    visit = dataset.order.visit(number * size, (number + 1) * size)
    return Counter(dataset.make_batch(visit).sample_ids)


@pytest.fixture
def mixed(
    small_config: Callable[..., StageConfig], token_shard: Callable[..., TokenShard]
) -> TokenDataset:
    """Shards 0 and 1 once, 2 two and a half times, 3 and 4 a quarter."""
    config = small_config()
    shards = [token_shard(40, number) for number in range(5)]
    parts = [
        Part("own", in_memory(shards[:2], config), 1.0),
        Part("often", in_memory(shards[2:3], config), 2.5),
        Part("seldom", in_memory(shards[3:], config), 0.25),
    ]
    return mixture(parts, config)


def test_an_epoch_holds_every_sample_as_often_as_its_weight_says(mixed: TokenDataset) -> None:
    first, second = _epoch(mixed, 0), _epoch(mixed, 1)
    assert first == second
    by_shard: dict[str, list[int]] = {}
    for sample_id, times in first.items():
        by_shard.setdefault(sample_id[:2], []).append(times)
    assert by_shard["00"] == by_shard["01"] == [1] * 40
    assert len(by_shard["02"]) == 40
    assert set(by_shard["02"]) == {2, 3}
    assert 90 < sum(by_shard["02"]) < 110
    seldom = by_shard["03"] + by_shard["04"]
    assert set(seldom) == {1}
    assert 10 < len(seldom) < 32


def test_datasets_alternate_within_a_window(mixed: TokenDataset) -> None:
    ids = [mixed.batch_at(number).sample_ids for number in range(20)]
    assert sum(len({sample[:2] for sample in batch}) > 1 for batch in ids) > 8


def test_a_stage_trains_on_all_of_them_and_accounts_for_each(
    tmp_path: Path,
    raw_job: Callable[[StageConfig], dict[str, Any]],
    curated: Callable[..., str],
    small_config: Callable[..., StageConfig],
) -> None:
    config = small_config(mixed_in={"more": 2.0}, steps=13)
    more_uri = curated([[(32, 32)] * 5], "more")
    pin = {"name": "more", "version": load_manifest(more_uri).version, "manifest_uri": more_uri}
    run_uri = storage.file_uri(tmp_path / "run")
    raw = {**raw_job(config), "mixed_in": [pin], "run_uri": run_uri, "cpus": 1}
    train(Job.parse(raw), LocalSession())
    folder = Path(CheckpointStore(run_uri).complete()[0].uri.removeprefix("file://"))
    coverage = json.loads((folder / "state.json").read_bytes())["coverage"]
    assert coverage["finished"] == 3  # epochs of 16 and twice 5 samples, in 13 steps of 6
    assert json.loads((folder / "result.json").read_bytes())["num_samples"] == 26.0


def test_the_stages_own_dataset_is_not_mixed_in(small_config: Callable[..., StageConfig]) -> None:
    with pytest.raises(ValueError, match="mixed_in names toy"):
        small_config(mixed_in={"toy": 1.0})
