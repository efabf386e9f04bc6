"""Embeddings equal those of open_clip on the raw images, and no sample or bit is lost."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from infra import storage
from infra.errors import UserError
from pipelines.clip_model import encoder_of, identify, publish_weights
from pipelines.embed import embed_shard, read_embeddings, read_rows
from pipelines.embeddings import (
    EmbeddingsJob,
    finished_units,
    load_embeddings,
    plan_embeddings,
    publish_embeddings,
    store_of,
)
from pipelines.scoring_config import ClipConfig

FLOAT16_TOLERANCE = 1e-3


def prepared(dataset: Any, folder: Path, **changes: Any) -> EmbeddingsJob:
    """A job whose weights are in the store."""
    config = ClipConfig.model_validate({"folder": str(folder), "batch_size": 4} | changes)
    job = plan_embeddings(dataset.manifest_uri, config)
    uri = publish_weights(
        job.weights,
        job.unit.identity.weights_sha256,
        store_of(job.unit.dataset_root + "/v/manifest.json"),
    )
    return replace(job, unit=replace(job.unit, weights_uri=uri))


def embed_all(job: EmbeddingsJob, tmp_path: Path) -> Any:
    for shard in job.manifest.shards:
        embed_shard(job.unit, shard, tmp_path)
    return publish_embeddings(job, finished_units(job))


def test_embeddings_are_open_clips_own(
    new_dataset: Callable[..., Any], clip_folder: Path, direct: Any, store_uri: str,
    tmp_path: Path, home: Path,
) -> None:  # fmt: skip
    dataset = new_dataset(store_uri, broken=[3, 11])
    embeddings = embed_all(prepared(dataset, clip_folder), tmp_path)
    assert embeddings.counts == {"samples": 20, "embedded": 18, "failed": 2}
    seen = set()
    for unit in embeddings.units:
        rows = read_rows(dataset.root, unit).to_pylist()
        images = read_embeddings(dataset.root, unit.images, 32)
        texts = read_embeddings(dataset.root, unit.texts, 32)
        whole = [row for row in rows if row["row"] is not None]
        assert [row["row"] for row in whole] == list(range(len(images)))
        expected_images, expected_texts = direct(
            clip_folder,
            [dataset.images[row["sample_id"]] for row in whole],
            [dataset.captions[row["sample_id"]] for row in whole],
        )
        np.testing.assert_allclose(images, expected_images, atol=FLOAT16_TOLERANCE)
        np.testing.assert_allclose(texts, expected_texts, atol=FLOAT16_TOLERANCE)
        for row in rows:
            seen.add(row["sample_id"])
            number = dataset.scores[row["sample_id"]]["number"]
            assert (row["row"] is None) == (row["error"] is not None) == (number in (3, 11))
            assert row["aesthetic_score"] == dataset.scores[row["sample_id"]]["aesthetic_score"]
            assert row["caption"] == dataset.captions[row["sample_id"]]
    assert seen == set(dataset.images)


def test_every_flipped_bit_and_every_truncation_is_detected(
    new_dataset: Callable[..., Any], clip_folder: Path, tmp_path: Path, home: Path
) -> None:
    dataset = new_dataset(tmp_path.as_uri(), num_samples=3, num_ledgers=1)
    unit = embed_all(prepared(dataset, clip_folder), tmp_path).units[0]
    readers: list[tuple[Any, Callable[[Any], object], int]] = [
        (unit.images, lambda entry: read_embeddings(dataset.root, entry, 32), 1),
        (unit.rows, lambda entry: read_rows(dataset.root, replace(unit, rows=entry)), 97),
    ]
    for entry, read, stride in readers:
        uri = storage.join(dataset.root, entry.path)
        whole = storage.read_bytes(uri)
        path = Path(uri.removeprefix("file://"))
        read(entry)
        for bit in range(0, 8 * len(whole), stride):
            damaged = bytearray(whole)
            damaged[bit // 8] ^= 1 << bit % 8
            path.write_bytes(damaged)
            with pytest.raises(storage.DigestMismatch):
                read(entry)
            if bit % 8 == 0 or stride > 1:
                path.write_bytes(whole[: bit // 8])
                with pytest.raises(storage.DigestMismatch):
                    read(entry)
        path.write_bytes(whole)
        read(entry)


def test_only_missing_or_short_shards_are_embedded_again_to_the_same_bytes(
    new_dataset: Callable[..., Any], clip_folder: Path, tmp_path: Path, home: Path
) -> None:
    dataset = new_dataset(tmp_path.as_uri())
    job = prepared(dataset, clip_folder)
    first = embed_all(job, tmp_path)
    assert load_embeddings(job.manifest_uri, first.sha256) == first
    units = first.units
    storage.delete(job.unit.marker_uri(units[0].shard_sha256))
    cut = storage.join(dataset.root, units[1].texts.path)
    storage.write_bytes(cut, storage.read_bytes(cut)[:-1])
    done = finished_units(job)
    assert set(done) == {unit.shard_sha256 for unit in units[2:]}
    with pytest.raises(RuntimeError, match="2 shards are not embedded"):
        publish_embeddings(job, done)
    for shard in job.manifest.shards:
        if shard.sha256 not in done:
            embed_shard(job.unit, shard, tmp_path)
    assert publish_embeddings(job, finished_units(job)).sha256 == first.sha256


def test_a_damaged_shard_is_not_embedded(
    new_dataset: Callable[..., Any], clip_folder: Path, tmp_path: Path, home: Path
) -> None:
    dataset = new_dataset(tmp_path.as_uri())
    job = prepared(dataset, clip_folder)
    shard = job.manifest.shards[0]
    uri = storage.join(dataset.root, shard.path)
    data = bytearray(storage.read_bytes(uri))
    data[600] ^= 1
    storage.write_bytes(uri, bytes(data))
    with pytest.raises(storage.DigestMismatch):
        embed_shard(job.unit, shard, tmp_path)


def test_bf16_stays_within_its_tolerance_and_has_its_own_key(
    new_dataset: Callable[..., Any], clip_folder: Path, direct: Any, tmp_path: Path, home: Path
) -> None:
    dataset = new_dataset(tmp_path.as_uri(), num_samples=6, num_ledgers=1)
    exact, fast = (prepared(dataset, clip_folder, precision=kind) for kind in ("fp32", "bf16"))
    assert exact.folder != fast.folder
    unit = embed_all(fast, tmp_path).units[0]
    rows = read_rows(dataset.root, unit).to_pylist()
    images = read_embeddings(dataset.root, unit.images, 32).astype(np.float64)
    expected, _ = direct(clip_folder, [dataset.images[r["sample_id"]] for r in rows], ["x"])
    assert np.all(1 - (images * expected).sum(1) < 1e-3)
    assert np.abs(images - expected).max() > 1e-4  # it is bf16 indeed


def test_a_model_is_known_by_its_bytes_and_not_by_its_place(
    clip_folder: Path, new_clip: Callable[..., Path], tmp_path: Path
) -> None:
    def key(folder: Path, **changes: Any) -> str:
        return identify(ClipConfig.model_validate({"folder": str(folder)} | changes))[0].key

    moved = tmp_path / "moved"
    moved.mkdir()
    for path in clip_folder.iterdir():
        (moved / path.name).write_bytes(path.read_bytes())
    assert key(moved) == key(clip_folder)
    assert key(moved, batch_size=7, num_threads=2) == key(clip_folder)
    assert key(moved, precision="bf16") != key(clip_folder)
    assert key(new_clip(tmp_path / "other", seed=1)) != key(clip_folder)


@pytest.mark.parametrize(
    ("spoil", "line"),
    [
        ("pickle", r"got 0 and model\.pt; a pickle can run code: convert model\.pt once"),
        ("two", r"expected one \.safetensors file in .*got 2"),
        ("no_config", r"expected open_clip_config\.json"),
        ("empty", "no such folder, or an empty one"),
        ("hub", r"text_cfg\.hf_tokenizer_name 'x/y', which is fetched from a model hub"),
        ("misfit", r"expected weights that fit open_clip_config\.json"),
    ],
)
def test_what_is_not_a_whole_model_is_one_line(
    clip_folder: Path, tmp_path: Path, home: Path, spoil: str, line: str
) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    weights = (clip_folder / "open_clip_model.safetensors").read_bytes()
    config = (clip_folder / "open_clip_config.json").read_text()
    if spoil != "no_config":
        if spoil == "hub":
            config = config.replace(
                '"context_length"', '"hf_tokenizer_name": "x/y", "context_length"'
            )
        if spoil == "misfit":
            config = config.replace('"embed_dim": 32', '"embed_dim": 16')
        (folder / "open_clip_config.json").write_text(config)
    (folder / ("model.pt" if spoil == "pickle" else "model.safetensors")).write_bytes(weights)
    if spoil == "two":
        (folder / "more.safetensors").write_bytes(weights)
    if spoil == "empty":
        folder = tmp_path / "nothing"

    with pytest.raises(UserError, match=line):
        encoder_of(*identify(ClipConfig(folder=str(folder))))
