"""A task that dies in a long shard costs what came since its last part, and not a bit differs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from infra import storage
from pipelines.clip_model import ClipEncoder
from pipelines.embed import EmbedTask, embed_shard
from pipelines.embed_parts import forget_parts, stored_parts
from tests.pipelines.scoring.test_embeddings import prepared

BATCH_SIZE = 4
NUM_BATCHES = 5


class Killed(BaseException):
    """What no code of ours catches."""


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Counts the batches that the model sees; it dies in place of batch ``dies_at``."""
    known = {"batches": 0, "dies_at": -1}
    encode = ClipEncoder.encode_image

    def counted(self: ClipEncoder, images: Any) -> Any:
        if known["batches"] == known["dies_at"]:
            raise Killed
        known["batches"] += 1
        return encode(self, images)

    monkeypatch.setattr(ClipEncoder, "encode_image", counted)
    return known


def one_shard(new_dataset: Callable[..., Any], clip_folder: Path, root: Path) -> Any:
    """A task and its only shard: 20 samples, of which some are no images."""
    dataset = new_dataset(
        root.as_uri(), num_samples=20, per_shard=20, num_ledgers=1, broken=[1, 8, 13]
    )
    job = prepared(dataset, clip_folder, batch_size=BATCH_SIZE, checkpoint_seconds=0.0)
    (shard,) = job.manifest.shards
    return job.unit, shard


def die(task: EmbedTask, shard: Any, folder: Path, encoded: dict[str, int], at: int) -> None:
    encoded.update(batches=0, dies_at=at)
    with pytest.raises(Killed):
        embed_shard(task, shard, folder)
    encoded.update(batches=0, dies_at=-1)


def test_a_task_goes_on_after_its_last_part(
    new_dataset: Callable[..., Any],
    clip_folder: Path,
    tmp_path: Path,
    home: Path,
    encoded: dict[str, int],
) -> None:
    task, shard = one_shard(new_dataset, clip_folder, tmp_path / "store")
    undisturbed = asdict(embed_shard(task, shard, tmp_path))
    assert encoded["batches"] == NUM_BATCHES
    for at in range(NUM_BATCHES):
        storage.delete_prefix(storage.join(task.dataset_root, task.folder))
        die(task, shard, tmp_path, encoded, at)
        assert task.read_marker(shard) is None
        assert stored_parts(task.parts(shard.sha256), BATCH_SIZE).end == at * BATCH_SIZE
        assert asdict(embed_shard(task, shard, tmp_path)) == undisturbed
        assert encoded["batches"] == NUM_BATCHES - at
        assert list(storage.list_objects(task.parts(shard.sha256))) == []


def test_a_part_that_is_not_as_it_was_written_counts_as_not_there(
    new_dataset: Callable[..., Any],
    clip_folder: Path,
    tmp_path: Path,
    home: Path,
    encoded: dict[str, int],
) -> None:
    task, shard = one_shard(new_dataset, clip_folder, tmp_path / "store")
    undisturbed = asdict(embed_shard(task, shard, tmp_path))
    storage.delete_prefix(storage.join(task.dataset_root, task.folder))
    die(task, shard, tmp_path, encoded, NUM_BATCHES - 1)
    folder = task.parts(shard.sha256)
    assert stored_parts(folder, BATCH_SIZE + 1).end == 0  # other batches round otherwise
    _, second, *_ = storage.list_objects(folder)
    data = bytearray(storage.read_bytes(second.uri))
    data[len(data) // 2] ^= 1
    storage.write_bytes(second.uri, bytes(data))
    assert stored_parts(folder, BATCH_SIZE).end == BATCH_SIZE
    assert asdict(embed_shard(task, shard, tmp_path)) == undisturbed
    assert encoded["batches"] == NUM_BATCHES - 1


def test_parts_of_finished_shards_are_forgotten_and_no_others(tmp_path: Path) -> None:
    folder = (tmp_path / "embeddings").as_uri()
    for stem in ("a" * 32, "b" * 32):
        storage.write_bytes(storage.join(folder, "parts", stem, "part.npz"), b"1")
    forget_parts(folder, ["a" * 64])
    assert [info.uri.split("/")[-2] for info in storage.list_objects(folder)] == ["b" * 32]
