"""Aspect buckets: which there are, which an image goes to, and shards of one shape."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from PIL import Image
from pydantic import ValidationError

from infra import storage
from infra.manifest import SHARD_SIZES, ShardEntry, load_manifest
from infra.sessions import ClusterConfig, spark_session, stop_spark
from model import VQConfig, VQTokenizer
from pipelines.buckets import bucket_of, buckets_of, moved, shortest_side_px
from pipelines.config import ResizeConfig
from pipelines.curate import curate
from pipelines.guard import Rejected
from pipelines.images import Bounds, StoredImage, store_images
from training.config import StageConfig
from training.token_cache import ensure_token_cache, open_tokens
from training.token_format import load_cache_manifest

if TYPE_CHECKING:
    from pyspark.sql import SparkSession


def config(**changes: Any) -> ResizeConfig:
    return ResizeConfig.model_validate({"crop": "bucket"} | changes)


def stored(body: bytes, resize: ResizeConfig) -> StoredImage | Rejected:
    (found,) = store_images(body, [resize], Bounds(100_000_000))
    return found


@pytest.mark.parametrize("size", [256, 512, 1024])
def test_made_buckets_have_about_one_area_and_come_in_pairs(size: int) -> None:
    resize = config(image_size_px=size)
    found = buckets_of(resize)
    assert (size, size) in found
    assert {(h, w) for w, h in found} == set(found)
    for width, height in found:
        assert width % 64 == height % 64 == 0
        assert width * height <= size * size
        assert width * (height + 64) > size * size or height * (width + 64) > size * size
        assert max(width, height) <= 2 * min(width, height)
    assert shortest_side_px(resize) == min(map(min, found)) < size


def test_the_nearest_ratio_is_nearest_as_a_factor() -> None:
    resize = config(buckets=[[200, 100], [100, 100], [100, 200]])
    assert bucket_of(141, 100, resize) == (100, 100)
    assert bucket_of(142, 100, resize) == (200, 100)
    assert bucket_of(100, 142, resize) == (100, 200)
    assert bucket_of(3000, 10, resize) == (200, 100)


@pytest.mark.parametrize(
    ("size", "expected", "crop"),
    [
        ((400, 200), (200, 100), (0, 0)),
        ((401, 200), (200, 100), (0, 0)),
        ((500, 200), (200, 100), (50, 0)),
        ((200, 230), (100, 100), (0, 15)),
        ((100, 100), (100, 100), (0, 0)),
        ((1601, 803), (200, 100), (0, 1)),
        ((8000, 4000), (200, 100), (0, 0)),
    ],
)
def test_an_image_fills_its_bucket_and_loses_little(
    size: tuple[int, int], expected: tuple[int, int], crop: tuple[int, int],
    make_picture: Any, encode: Any,
) -> None:  # fmt: skip
    resize = config(buckets=[[200, 100], [100, 100], [100, 200]])
    image = stored(encode(make_picture(1, *size)), resize)
    assert isinstance(image, StoredImage)
    assert (image.width_px, image.height_px) == expected
    assert Image.open(io.BytesIO(image.data)).size == expected
    assert (image.crop_left_px, image.crop_top_px) == crop


def test_an_image_that_would_have_to_grow_is_refused(make_picture: Any, encode: Any) -> None:
    resize = config(buckets=[[200, 100], [100, 100]])
    for size in ((199, 100), (200, 99), (99, 99)):
        found = stored(encode(make_picture(1, *size)), resize)
        assert isinstance(found, Rejected)
        assert found.reason == "image_too_small"


def test_the_middle_is_what_stays() -> None:
    picture = Image.new("RGB", (600, 200), "red")
    picture.paste("blue", (100, 0, 500, 200))
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    resize = config(buckets=[[200, 100]], encode_format="png", encode_quality=1)
    image = stored(buffer.getvalue(), resize)
    assert isinstance(image, StoredImage)
    assert (np.asarray(Image.open(io.BytesIO(image.data))) == (0, 0, 255)).all()


@pytest.mark.parametrize(
    "changes", [{"crop": "square", "buckets": [[8, 8]]}, {"image_size_px": 32}, {"buckets": []}]
)
def test_buckets_that_cannot_be_are_told(changes: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match="bucket"):
        config(**changes)


def test_sizes_follow_shards_that_are_written_again() -> None:
    def shard(path: str) -> ShardEntry:
        return ShardEntry(path, 1, "0" * 64, 1)

    sizes = {"a": [1, 2], "b": [3, 4]}
    found = moved(sizes, [shard("a"), shard("b")], [[shard("c"), shard("d")], []])
    assert found == {"c": [1, 2], "d": [1, 2]}


@pytest.fixture
def spark() -> Iterator[Callable[[], SparkSession]]:
    sessions: list[SparkSession] = []

    def start() -> SparkSession:
        if not sessions:
            sessions.append(spark_session("buckets", ClusterConfig(), {}))
        return sessions[0]

    yield start
    for session in sessions:
        stop_spark(session)


@pytest.mark.slow
def test_every_shard_has_one_shape_which_the_manifest_says_and_training_takes(
    trap_world: Any, http_response: Any, make_picture: Any, encode: Any, tmp_path: Path,
    spark: Callable[[], SparkSession],
) -> None:  # fmt: skip
    for number in range(0, 30, 2):
        body = encode(make_picture(number, 200, 256 + number))
        trap_world.web.route(f"/good/{number}.jpg", http_response(body))
    resize = {"crop": "bucket", "image_size_px": 128, "bucket_step_px": 32}
    result = curate("bucketed", trap_world.config(resize=resize), tmp_path.as_uri(), spark)
    manifest = load_manifest(result.manifest_uri)
    sizes = manifest.attributes[SHARD_SIZES]
    assert set(sizes) == {shard.path for shard in manifest.shards}
    assert len({tuple(size) for size in sizes.values()}) >= 2
    root = result.manifest_uri.rsplit("/", 2)[0]
    for shard in manifest.shards:
        data = storage.read_bytes(storage.join(root, shard.path))
        with tarfile.open(fileobj=io.BytesIO(data)) as tar:
            for member in tar:
                file = tar.extractfile(member)
                assert file is not None
                if member.name.endswith(".jpg"):
                    assert list(Image.open(file).size) == sizes[shard.path]
                elif member.name.endswith(".json"):
                    known = json.loads(file.read())
                    assert [known["width_px"], known["height_px"]] == sizes[shard.path]
    vq = VQTokenizer(VQConfig.small((8, 8, 8), 16, 4))
    vq.save_pretrained(tmp_path / "tokenizer" / "vqvae")
    uri = ensure_token_cache(result.manifest_uri, str(tmp_path / "tokenizer"), 128, "bucket")
    cache = load_cache_manifest(uri)
    assert cache.num_samples == manifest.counts["committed"]
    in_order = [sizes[shard.path] for shard in manifest.shards]
    assert [[4 * entry.grid_width, 4 * entry.grid_height] for entry in cache.shards] == in_order
    config = StageConfig(
        dataset="x", resolution_px=128, crop="bucket", steps=9, global_batch_size=4
    )
    dataset = open_tokens(uri, config)
    shapes = {tuple(dataset.batch_at(number).tokens_BHW.shape[1:]) for number in range(20)}
    assert shapes == {(height // 4, width // 4) for width, height in in_order}
