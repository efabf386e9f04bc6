"""Search gives the order of exact cosines; hits become datasets; near-duplicates are found."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from PIL import Image

from infra import storage
from infra.errors import UserError
from infra.manifest import load_manifest, verify_dataset
from pipelines.clip_model import ClipEncoder, encoder_of, publish_weights, weights_uri
from pipelines.embed import embed_shard
from pipelines.embeddings import (
    EmbeddingsManifest,
    finished_units,
    plan_embeddings,
    publish_embeddings,
    store_of,
)
from pipelines.near_duplicates import near_duplicates, publish_near_duplicates
from pipelines.scores import ScoresJob, finished_scores, publish_scores, score_shard
from pipelines.scoring_config import ClipConfig, IndexConfig, RefilterConfig
from pipelines.search import (
    Export,
    export_hits,
    find,
    image_query,
    latest_embeddings,
    point_to_latest,
    searchable_datasets,
    text_query,
)
from pipelines.shards import read_shard
from pipelines.stored import live_versions
from pipelines.tombstones import Tombstones, publish_tombstones
from pipelines.vector_index import VectorIndex, choose_kind, open_index
from pipelines.verdicts import job_of, preview


@dataclass
class Embedded:
    dataset: Any
    embeddings: EmbeddingsManifest
    uri: str
    store: str

    @property
    def encoder(self) -> ClipEncoder:
        identity = self.embeddings.identity
        return encoder_of(identity, weights_uri(self.store, identity.weights_sha256))

    def index(self, **config: Any) -> VectorIndex:
        chosen = IndexConfig.model_validate(config)
        return open_index(self.dataset.root, self.embeddings, chosen)


def embedded(dataset: Any, clip_folder: Path, tmp_path: Path) -> Embedded:
    job = plan_embeddings(dataset.manifest_uri, ClipConfig(folder=str(clip_folder)))
    store = store_of(dataset.manifest_uri)
    uri = publish_weights(job.weights, job.unit.identity.weights_sha256, store)
    unit = replace(job.unit, weights_uri=uri)
    for shard in dataset.manifest.shards:
        embed_shard(unit, shard, tmp_path)
    return Embedded(dataset, publish_embeddings(job, finished_units(job)), job.manifest_uri, store)


def test_hits_come_in_the_order_of_exact_cosines(
    new_dataset: Callable[..., Any], clip_folder: Path, direct: Any, store_uri: str,
    tmp_path: Path, home: Path,
) -> None:  # fmt: skip
    dataset = new_dataset(store_uri, num_samples=30, broken=[5])
    found = embedded(dataset, clip_folder, tmp_path)
    ids = [key for key, row in dataset.scores.items() if row["number"] != 5]
    picture = tmp_path / "query.png"
    picture.write_bytes(dataset.images[ids[7]])
    images, words = direct(clip_folder, [dataset.images[key] for key in ids], ["red car"])
    index = found.index()
    assert index.is_exact
    queries = [
        (words[0], text_query(found.encoder, "red car")),
        (images[7], image_query(found.encoder, picture)),
    ]
    stored = np.concatenate([index.unit_vectors(n) for n in range(len(found.embeddings.units))])
    for exact, query in queries:
        # Pictures look much alike to random weights: rounding to float16 changes some ranks.
        wide = stored.astype(np.float64) @ query.astype(np.float64)
        cosines = dict(zip(ids, images @ exact, strict=True))
        hits = find(index, query, 12)
        assert [hit.sample_id for hit in hits] == [ids[at] for at in np.argsort(-wide)[:12]]
        exactly = [cosines[hit.sample_id] for hit in hits]
        np.testing.assert_allclose([hit.cosine for hit in hits], exactly, atol=1e-3)
        assert min(exactly) > sorted(cosines.values())[-12] - 1e-3
        for hit in hits:
            assert hit.caption == dataset.captions[hit.sample_id]
            uri = storage.join(dataset.root, hit.shard)
            assert hit.sample_id in dict(read_shard(storage.read_bytes(uri)))
    assert find(index, queries[1][1], 1)[0].sample_id == ids[7]
    assert len(find(index, queries[0][1], 100)) == 29


def test_what_was_found_becomes_a_dataset(
    new_dataset: Callable[..., Any], clip_folder: Path, tmp_path: Path, home: Path
) -> None:
    dataset = new_dataset(tmp_path.as_uri())
    found = embedded(dataset, clip_folder, tmp_path)
    index = found.index()
    hits = find(index, text_query(found.encoder, "a thing"), 7)
    asked = {"text": "a thing", "k": 7}
    uri = export_hits(hits, index, found.store, "things", asked).manifest_uri
    assert verify_dataset(uri) == []
    manifest = load_manifest(uri)
    assert manifest.counts == {"rows_in": 7, "committed": 7, "rejected": 0, "failed": 0}
    root = storage.join(found.store, "datasets", "things")
    samples = {
        key: members["png"]
        for shard in manifest.shards
        for key, members in read_shard(storage.read_bytes(storage.join(root, shard.path)))
    }
    assert samples == {hit.sample_id: dataset.images[hit.sample_id] for hit in hits}
    assert manifest.attributes["search"]["query"] == {"text": "a thing", "k": 7}
    again = export_hits(hits[::-1], index, found.store, "things", asked)
    assert again == Export(uri, 7, 0)
    with pytest.raises(UserError, match="give another name"):
        export_hits(hits, index, found.store, "small", {})
    with pytest.raises(UserError, match="expected a dataset name"):
        export_hits(hits, index, found.store, "../things", {})


def test_what_was_taken_down_is_not_exported(
    new_dataset: Callable[..., Any], clip_folder: Path, tmp_path: Path, home: Path
) -> None:
    dataset = new_dataset(tmp_path.as_uri())
    found = embedded(dataset, clip_folder, tmp_path)
    index = found.index()
    hits = find(index, text_query(found.encoder, "a thing"), 4)
    root = storage.join(found.store, "datasets", "things")
    # From all datasets of the store, from the new one, and from the one that was searched.
    publish_tombstones(found.store, Tombstones.of(samples=[hits[0].sample_id]))
    publish_tombstones(root, Tombstones.of(samples=[hits[1].sample_id]))
    publish_tombstones(dataset.root, Tombstones.of(samples=[hits[2].sample_id]))
    made = export_hits(hits, index, found.store, "things", {})
    assert (made.num_samples, made.num_taken_down) == (1, 3)
    assert verify_dataset(made.manifest_uri) == []
    manifest = load_manifest(made.manifest_uri)
    assert manifest.counts == {"rows_in": 4, "committed": 1, "rejected": 3, "failed": 0}
    assert manifest.rejected == {"takedown": 3}
    (shard,) = manifest.shards
    assert set(dict(read_shard(storage.read_bytes(storage.join(root, shard.path))))) == {
        hits[3].sample_id
    }
    told = storage.read_bytes(storage.join(root, manifest.ledger[0].path))
    rows = pl.read_parquet(told).filter(pl.col("disposition") == "rejected")
    assert rows["url"].str.starts_with("removed:").all()
    with pytest.raises(UserError, match="all 1 samples that were found were taken down"):
        export_hits(hits[:1], index, found.store, "others", {})


def test_an_export_is_no_version_of_a_curated_dataset(
    new_dataset: Callable[..., Any], clip_folder: Path, tmp_path: Path, home: Path
) -> None:
    dataset = new_dataset(tmp_path.as_uri())
    found = embedded(dataset, clip_folder, tmp_path)
    index = found.index()
    hits = find(index, text_query(found.encoder, "a thing"), 2)
    datasets = storage.join(found.store, "datasets")
    curated = load_manifest(dataset.manifest_uri)
    for info in list(storage.list_objects(dataset.root)):
        if info.uri.endswith((".tar", ".parquet", "manifest.json")):
            path = info.uri.removeprefix(dataset.root).strip("/")
            storage.write_bytes(
                storage.join(datasets, "curated", path), storage.read_bytes(info.uri)
            )
    storage.write_json(storage.join(datasets, "under-way", "work", "0123", "read-00000.json"), {})
    for name in ("curated", "under-way"):
        with pytest.raises(UserError, match=f"got {name}, a dataset of another kind"):
            export_hits(hits, index, found.store, name, {})
    assert [each.version for each in live_versions(storage.join(datasets, "curated"))] == [
        curated.version
    ]


def test_the_newest_embeddings_are_the_ones_searched(
    new_dataset: Callable[..., Any], clip_folder: Path, store_uri: str, tmp_path: Path, home: Path
) -> None:
    dataset = new_dataset(store_uri, num_samples=4)
    with pytest.raises(UserError, match="run `atelier score RECIPE` first"):
        latest_embeddings(dataset.root)
    assert searchable_datasets(store_uri) == []
    found = embedded(dataset, clip_folder, tmp_path)
    point_to_latest(dataset.root, found.embeddings, found.uri)
    assert searchable_datasets(store_uri) == ["small"]
    assert latest_embeddings(dataset.root) == found.embeddings


def test_an_index_is_built_once_and_a_damaged_one_is_not_used(
    new_dataset: Callable[..., Any], clip_folder: Path, tmp_path: Path, home: Path
) -> None:
    dataset = new_dataset(tmp_path.as_uri(), num_samples=6)
    found = embedded(dataset, clip_folder, tmp_path)
    reported: list[tuple[int, int]] = []
    built = open_index(
        dataset.root,
        found.embeddings,
        IndexConfig(),
        lambda done, total: reported.append((done, total)),
    )
    assert reported[-1] == (6, 6)
    again = open_index(
        dataset.root, found.embeddings, IndexConfig(), lambda *_: pytest.fail("built")
    )
    assert again.faiss_index.ntotal == built.faiss_index.ntotal == 6
    (stored,) = (tmp_path / "datasets" / "small").glob("embeddings/*/*/index/*.faiss")
    data = bytearray(stored.read_bytes())
    data[-1] ^= 1
    stored.write_bytes(data)
    assert found.index().faiss_index.ntotal == 6  # from this machine's whole copy
    for copy in home.rglob("*.faiss"):
        copy.unlink()
    with pytest.raises(storage.DigestMismatch):
        found.index()


@pytest.mark.slow
def test_a_compressed_index_finds_nearly_all_and_scores_exactly(
    new_dataset: Callable[..., Any], clip_folder: Path, tmp_path: Path, home: Path
) -> None:
    """20,000 clustered vectors in 1 MiB, an eighth of an exact index with these widths."""
    from pipelines.embed import publish_file

    dataset = new_dataset(tmp_path.as_uri(), num_samples=4, num_ledgers=1)
    found = embedded(dataset, clip_folder, tmp_path)
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(200, 32))
    vectors = centres[rng.integers(0, 200, 20_000)] + 0.3 * rng.normal(size=(20_000, 32))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    units = []
    for part in np.split(vectors.astype(np.float16), 4):
        path = tmp_path / "part.npy"
        np.save(path, part)
        entry = publish_file(path, dataset.root, "embeddings/large", "npy", len(part))
        units.append(
            replace(found.embeddings.units[0], images=entry, num_samples=5000, num_embedded=5000)
        )
    counts = {"samples": 20_000, "embedded": 20_000, "failed": 0}
    large = replace(found.embeddings, units=units, counts=counts)
    small = IndexConfig(max_memory_mb=1)
    assert choose_kind(large, IndexConfig()) == "Flat"
    assert "PQ" in choose_kind(large, small)
    index = open_index(dataset.root, large, small)
    assert not index.is_exact
    stored = vectors.astype(np.float16).astype(np.float64)
    stored /= np.linalg.norm(stored, axis=1, keepdims=True)
    recalled = 0
    for query in range(0, 20_000, 500):
        cosines = stored @ stored[query]
        (hits,) = index.search(vectors[query : query + 1].astype(np.float32), 10)
        np.testing.assert_allclose([c for _, c in hits], cosines[[v for v, _ in hits]], atol=1e-3)
        assert [c for _, c in hits] == sorted((c for _, c in hits), reverse=True)
        recalled += len({v for v, _ in hits} & set(np.argsort(-cosines)[:10]))
    assert recalled / 400 > 0.8


def test_near_duplicates_fall_to_the_better_score_then_the_smaller_id(
    new_dataset: Callable[..., Any], clip_folder: Path, direct: Any, tmp_path: Path, home: Path
) -> None:
    # 3 and 10 and 17 have equal aesthetic scores, 6 a higher one; 21 would be rejected anyway.
    copies = [(3, 10), (3, 17), (5, 6), (4, 19), (8, 21)]
    dataset = new_dataset(tmp_path.as_uri(), num_samples=24, copies=copies)
    found = embedded(dataset, clip_folder, tmp_path)
    scoring = ScoresJob(dataset.root, found.embeddings, ())
    for unit in found.embeddings.units:
        score_shard(scoring, unit, tmp_path)
    scores = publish_scores(scoring, finished_scores(scoring))
    ids = sorted(dataset.images)
    number = {key: dataset.scores[key]["number"] for key in ids}
    images, _ = direct(clip_folder, [dataset.images[key] for key in ids], ["x"])
    cosines = {
        frozenset((number[a], number[b])): float(images[i] @ images[j])
        for i, a in enumerate(ids) for j, b in enumerate(ids[:i])
    }  # fmt: skip
    planted = {frozenset(pair) for pair in copies} | {frozenset((10, 17))}
    low = min(cosines[pair] for pair in planted)
    high = max(cosine for pair, cosine in cosines.items() if pair not in planted)
    assert low > high, "the random model tells other pictures apart"
    bound = (low + high) / 2
    config = RefilterConfig(min_aesthetic_score=4.1, near_duplicate_cosine=bound)
    job = job_of(dataset.manifest_uri, found.embeddings, scores, config)
    dropped = near_duplicates(found.index(), job, bound)
    by_number = {number[each.sample_id]: number[each.kept_id] for each in dropped}

    def rank(n: int) -> tuple[float, str]:
        key = next(key for key in ids if number[key] == n)
        return -dataset.scores[key]["aesthetic_score"], key

    triple = sorted((3, 10, 17), key=rank)
    expected = {triple[1]: triple[0], triple[2]: triple[0]}
    for a, b in ((5, 6), (4, 19)):
        best, worst = sorted((a, b), key=rank)
        expected[worst] = best
    assert by_number == expected
    assert by_number[5] == 6
    assert all(each.cosine >= bound for each in dropped)
    with_them = replace(job, dropped=publish_near_duplicates(job, dropped))
    assert preview(with_them)["near_duplicate"] == len(expected)
    assert with_them.key != job.key


def test_an_image_query_that_is_none_is_one_line(
    new_dataset: Callable[..., Any], clip_folder: Path, tmp_path: Path, home: Path
) -> None:
    found = embedded(new_dataset(tmp_path.as_uri(), num_samples=2), clip_folder, tmp_path)
    path = tmp_path / "x.png"
    path.write_bytes(b"no image")
    with pytest.raises(UserError, match="expected an image file"):
        image_query(found.encoder, path)
    buffer = io.BytesIO()
    Image.new("RGBA", (40, 30)).save(buffer, "PNG")
    path.write_bytes(buffer.getvalue())
    assert image_query(found.encoder, path).shape == (32,)
