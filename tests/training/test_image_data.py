from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch

from infra import storage
from infra.errors import UserError
from infra.storage import DigestMismatch
from training.image_data import ImageBatch, ImageBatches, ImageOrder

SIZES = [[(16, 16)] * 4, [(24, 16), (16, 40), (12, 40)], [(16, 16)] * 5]
ORDER = ImageOrder(resolution_px=16, global_batch_size=4, seed=3, shuffle_window_shards=2)

Curated = Callable[..., str]


def taken(batches: ImageBatches, count: int) -> list[ImageBatch]:
    return list(itertools.islice(iter(batches), count))


def ids(batches: list[ImageBatch]) -> list[str]:
    return [each["sample_id"] for batch in batches for each in batch.known]


def test_an_epoch_holds_every_sample_once(curated: Curated) -> None:
    epoch = taken(ImageBatches(curated(SIZES), ORDER), 3)
    assert all(tuple(batch.images_B3HW.shape[1:]) == (3, 16, 16) for batch in epoch)
    assert epoch[0].images_B3HW.dtype == torch.uint8
    left_out = [name for batch in epoch for name in batch.left_out]
    assert left_out == [f"{6:016x}"]  # 12 px are fewer than 16
    assert sorted(ids(epoch) + left_out) == [f"{number:016x}" for number in range(12)]


def test_going_on_is_the_same_as_never_having_stopped(curated: Curated) -> None:
    uri = curated(SIZES)
    straight = taken(ImageBatches(uri, ORDER), 7)
    interrupted = ImageBatches(uri, ORDER)
    before = taken(interrupted, 3)
    again = ImageBatches(uri, ORDER, num_threads=1, max_resident_bytes=1)
    again.load_state_dict(interrupted.state_dict())
    after = taken(again, 4)
    assert ids(before + after) == ids(straight)
    for one, other in zip(before + after, straight, strict=True):
        assert torch.equal(one.images_B3HW, other.images_B3HW)


def test_workers_share_a_batch(curated: Curated) -> None:
    uri = curated(SIZES)
    alone = taken(ImageBatches(uri, ORDER), 5)
    workers = [taken(ImageBatches(uri, ORDER, rank, 3), 5) for rank in range(3)]
    for whole, *parts in zip(alone, *workers, strict=True):
        assert ids([whole]) == ids(parts)


def test_the_position_of_another_order_is_refused(curated: Curated) -> None:
    uri = curated(SIZES)
    other = ImageBatches(uri, ImageOrder(resolution_px=16, global_batch_size=8))
    with pytest.raises(UserError, match="global_batch_size"):
        ImageBatches(uri, ORDER).load_state_dict(other.state_dict())


def test_a_changed_shard_is_told(curated: Curated) -> None:
    uri = curated(SIZES)
    root = uri.rsplit("/", 2)[0]
    shard = next(iter(storage.list_objects(storage.join(root, "shards"))))
    data = bytearray(storage.read_bytes(shard.uri))
    data[700] ^= 1
    storage.write_bytes(shard.uri, bytes(data))
    with pytest.raises(DigestMismatch):
        taken(ImageBatches(uri, ORDER), 3)
