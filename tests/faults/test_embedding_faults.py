"""Embeddings from bad samples, bad models and killed writers: named, whole, or refused."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from infra import storage
from infra.errors import UserError
from infra.manifest import load_manifest, publish_manifest
from pipelines import clip_model, embed
from pipelines.clip_model import ClipEncoder, _encoder, encoder_of, weights_uri
from pipelines.embed import (
    EmbeddedShard,
    ShardEmbeddings,
    embed_shard,
    read_embeddings,
    read_rows,
)
from pipelines.embeddings import EmbeddingsJob, finished_units, load_embeddings, publish_embeddings
from pipelines.scores import ScoresJob, score_shard
from tests.pipelines.scoring.conftest import SmallDataset, make_clip, make_dataset
from tests.pipelines.scoring.test_embeddings import embed_all, prepared
from tests.pipelines.test_build import Crash, crash_after

if TYPE_CHECKING:
    import torch

DIM = 32


@pytest.fixture(scope="session")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_clip(tmp_path_factory.mktemp("clip") / "model")


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATELIER_HOME", str(tmp_path / "home"))


def job_of(tmp_path: Path, clip: Path, **changes: Any) -> tuple[SmallDataset, EmbeddingsJob]:
    dataset = make_dataset(tmp_path.as_uri(), **({"num_samples": 6, "num_ledgers": 1} | changes))
    return dataset, prepared(dataset, clip)


def number_of(dataset: SmallDataset, sample_id: str) -> int:
    return int(dataset.scores[sample_id]["number"])


def test_three_corrupt_images_are_three_named_failures(tmp_path: Path, clip: Path) -> None:
    broken = (1, 4, 7)
    dataset, job = job_of(tmp_path, clip, num_samples=12, broken=broken)
    embeddings = embed_all(job, tmp_path)
    assert embeddings.counts == {"samples": 12, "embedded": 9, "failed": 3}
    rows = [row for unit in embeddings.units for row in read_rows(dataset.root, unit).to_pylist()]
    named = {number_of(dataset, row["sample_id"]): row["error"] for row in rows if row["error"]}
    assert named == dict.fromkeys(broken, "decode: UnidentifiedImageError")
    assert len(rows) == 12


def test_killed_before_any_write_a_shard_is_embedded_whole_or_not_at_all(
    tmp_path: Path, clip: Path
) -> None:
    _, job = job_of(tmp_path, clip)
    (shard,) = job.manifest.shards
    with pytest.MonkeyPatch.context() as patch:
        count = crash_after(patch, 10**9)
        whole = embed_shard(job.unit, shard, tmp_path)
        num_writes = count()
    assert num_writes >= 4, "two arrays, the rows, the marker"
    expected = {info.uri: info.num_bytes for info in storage.list_objects(job.folder)}
    for number in range(num_writes):
        storage.delete_prefix(job.folder)
        with pytest.MonkeyPatch.context() as patch:
            crash_after(patch, number)
            with pytest.raises(Crash):
                embed_shard(job.unit, shard, tmp_path)
        assert finished_units(job) == {}, number
        assert embed_shard(job.unit, shard, tmp_path) == whole
        assert {i.uri: i.num_bytes for i in storage.list_objects(job.folder)} == expected
    assert set(finished_units(job)) == {shard.sha256}


def test_a_shard_without_one_whole_image_is_recorded_as_no_rows(tmp_path: Path, clip: Path) -> None:
    dataset, job = job_of(tmp_path, clip, num_samples=3, broken=range(3))
    embeddings = embed_all(job, tmp_path)
    (unit,) = embeddings.units
    assert embeddings.counts == {"samples": 3, "embedded": 0, "failed": 3}
    assert (unit.images.num_rows, unit.texts.num_rows, unit.rows.num_rows) == (0, 0, 3)
    assert read_embeddings(dataset.root, unit.images, DIM).shape == (0, DIM)
    assert all(row["error"] for row in read_rows(dataset.root, unit).to_pylist())
    storage.delete(job.unit.marker_uri(unit.shard_sha256))
    with pytest.raises(RuntimeError, match="1 shards are not embedded"):
        publish_embeddings(job, finished_units(job))  # lost is not empty


def test_a_dataset_without_shards_has_embeddings_of_nothing(tmp_path: Path, clip: Path) -> None:
    dataset, job = job_of(tmp_path, clip)
    counts = {"rows_in": 1, "committed": 0, "rejected": 1, "failed": 0}
    none = replace(dataset.manifest, shards=[], ledger=[], counts=counts, rejected={"x": 1})
    uri = publish_manifest(dataset.root, none)
    job = replace(job, manifest=load_manifest(uri), version=none.version)
    assert publish_embeddings(job, finished_units(job)).counts == {
        "samples": 0, "embedded": 0, "failed": 0,
    }  # fmt: skip


def spoil_in_network(monkeypatch: pytest.MonkeyPatch, kind: str, factor: float) -> None:
    """The network's second output of a batch, before clip-retrieval divides by its length."""
    encode = getattr(ClipEncoder, f"encode_{kind}")

    def spoilt(self: ClipEncoder, batch: torch.Tensor) -> torch.Tensor:
        made: torch.Tensor = encode(self, batch)
        made[1] *= factor
        return made

    monkeypatch.setattr(ClipEncoder, f"encode_{kind}", spoilt)


def spoil_what_is_stored(monkeypatch: pytest.MonkeyPatch, kind: str, factor: float) -> None:
    """The second embedding of a batch, as float16."""
    take = ShardEmbeddings.__call__

    def spoilt(self: ShardEmbeddings, batch: dict[str, Any]) -> None:
        vectors = batch[f"{kind}_embs"].astype(np.float64)
        vectors[1] *= factor
        with np.errstate(over="ignore", invalid="ignore"):
            take(self, batch | {f"{kind}_embs": vectors.astype(np.float16)})

    monkeypatch.setattr(ShardEmbeddings, "__call__", spoilt)


NAN, INFINITY = float("nan"), float("inf")


@pytest.mark.parametrize("kind", ["image", "text"])
@pytest.mark.parametrize(
    ("spoil", "factor", "problem"),
    [
        (spoil_in_network, NAN, "not finite"),
        (spoil_in_network, INFINITY, "not finite"),
        (spoil_in_network, 0.0, "not finite"),
        (spoil_what_is_stored, NAN, "not finite"),
        (spoil_what_is_stored, 1e7, "not finite"),
        (spoil_what_is_stored, 0.0, "not of length one"),
        (spoil_what_is_stored, 0.9, "not of length one"),
        (spoil_what_is_stored, 1e-9, "not of length one"),
    ],
)
@pytest.mark.filterwarnings("ignore:invalid value encountered")
def test_what_a_model_should_not_give_is_rejected_with_its_key(
    tmp_path: Path, clip: Path, monkeypatch: pytest.MonkeyPatch,
    spoil: Callable[[pytest.MonkeyPatch, str, float], None], factor: float, problem: str, kind: str,
) -> None:  # fmt: skip
    """NaN, infinity, more than float16 holds, zero, too little: alone, without its neighbours."""
    spoil(monkeypatch, kind, factor)
    dataset, job = job_of(tmp_path, clip, num_samples=4)
    unit = embed_all(job, tmp_path).units[0]
    rows = read_rows(dataset.root, unit).to_pylist()
    assert [row["error"] for row in rows] == [None, f"embedding: {problem}", None, None]
    assert [row["row"] for row in rows] == [0, None, 1, 2]
    for entry in (unit.images, unit.texts):
        vectors = read_embeddings(dataset.root, entry, DIM).astype(np.float64)
        assert np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=0.01)


def test_rows_of_other_arrays_or_in_another_order_are_refused(tmp_path: Path, clip: Path) -> None:
    """Every digest is right: two shards' files were mixed up, or a writer counted wrongly."""
    dataset, job = job_of(tmp_path, clip, num_samples=12)
    one, two = embed_all(job, tmp_path).units
    read_rows(dataset.root, one)
    for mixed in (
        replace(one, rows=two.rows),
        replace(one, images=two.images),
        replace(one, texts=two.texts),
        replace(one, images=one.texts, texts=one.images),
        replace(one, num_embedded=5),
        replace(one, num_samples=7),
    ):
        with pytest.raises(UserError, match="expected rows of the embeddings"):
            read_rows(dataset.root, mixed)
    assert (one.num_samples, one.num_embedded) == (6, 6)
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = read_rows(dataset.root, one)
    shuffled = table.take([1, 0, 2, 3, 4, 5])
    sink = pa.BufferOutputStream()
    pq.write_table(shuffled, sink)
    (tmp_path / "rows.parquet").write_bytes(sink.getvalue())
    entry = embed.publish_file(
        tmp_path / "rows.parquet", dataset.root, f"{job.unit.folder}/rows", "parquet", 6
    )
    with pytest.raises(UserError, match="expected rows of the embeddings"):
        read_rows(dataset.root, replace(one, rows=entry))


@pytest.mark.parametrize("damage", ["flip", "cut", "gone"])
def test_weights_that_changed_in_the_store_are_refused(
    tmp_path: Path, clip: Path, damage: str
) -> None:
    _, job = job_of(tmp_path, clip)
    identity = job.unit.identity
    uri = weights_uri(tmp_path.as_uri(), identity.weights_sha256)
    path = Path(uri.removeprefix("file://"))
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes(data if damage == "flip" else data[:-1])
    _encoder.cache_clear()
    with pytest.raises(UserError, match=r"is damaged|no object at"):
        embed_shard(job.unit, job.manifest.shards[0], tmp_path)
    assert finished_units(job) == {}


def test_a_cached_copy_of_weights_that_changed_is_fetched_again(tmp_path: Path, clip: Path) -> None:
    _, job = job_of(tmp_path, clip)
    _encoder.cache_clear()
    encoder_of(job.unit.identity, job.unit.weights_uri)
    (cached,) = (tmp_path / "home" / "cache" / "objects").rglob("*.safetensors")
    whole = cached.read_bytes()
    cached.write_bytes(whole[:-1] + b"\0")
    _encoder.cache_clear()
    encoder_of(job.unit.identity, job.unit.weights_uri)
    assert cached.read_bytes() == whole


def test_two_models_have_two_folders_and_are_not_mixed(tmp_path: Path, clip: Path) -> None:
    dataset, job = job_of(tmp_path, clip)
    other_clip = make_clip(tmp_path / "other", seed=1)
    other = prepared(dataset, other_clip)
    first, second = embed_all(job, tmp_path), embed_all(other, tmp_path)
    assert job.folder != other.folder
    assert finished_units(job) == {unit.shard_sha256: unit for unit in first.units}
    assert first.sha256 != second.sha256
    one, two = first.units[0], second.units[0]
    mixed: list[EmbeddedShard] = [replace(one, rows=two.rows), replace(two, images=one.images)]
    for unit in mixed:
        with pytest.raises(UserError, match="expected rows of the embeddings"):
            read_rows(dataset.root, unit)
    scores = ScoresJob(dataset.root, first, ())
    score_shard(scores, one, tmp_path)
    assert scores.read_marker(one) is not None
    assert scores.read_marker(two) is None, "a score of one model's embeddings for the other's"
    with pytest.raises(storage.DigestMismatch):
        load_embeddings(other.manifest_uri, first.sha256)
    wide = make_clip(tmp_path / "wide", embed_dim=48)
    assert prepared(dataset, wide).unit.identity.dim == 48
    with pytest.raises(UserError, match=r"embeddings of shape \(6, 48\)"):
        read_embeddings(dataset.root, one.images, 48)


def test_an_image_whose_decoding_never_ends_costs_itself(
    tmp_path: Path, clip: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two such images, and two threads that decode: both are left behind."""
    dataset, job = job_of(tmp_path, clip, num_samples=8)
    hanging = {dataset.images[key] for key in dataset.images if number_of(dataset, key) in (0, 3)}
    let_go = threading.Event()

    def prepare(encoder: ClipEncoder, data: bytes) -> torch.Tensor:
        if data in hanging:
            let_go.wait()
        return prepared_before(encoder, data)

    prepared_before = clip_model.prepared
    monkeypatch.setattr(embed, "prepared", prepare)
    unit = replace(job.unit, decode_threads=2, decode_deadline_seconds=2.0)
    try:
        embeddings = embed_all(replace(job, unit=unit), tmp_path)
    finally:
        let_go.set()
    assert embeddings.counts == {"samples": 8, "embedded": 6, "failed": 2}
    errors = {
        number_of(dataset, row["sample_id"]): row["error"]
        for each in embeddings.units
        for row in read_rows(dataset.root, each).to_pylist()
        if row["error"]
    }
    assert errors == dict.fromkeys((0, 3), "decode: no end in 2 s")
