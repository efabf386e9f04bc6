"""A14: a concept poisoned with mismatched pairs, planted as embeddings of a published dataset."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from infra import storage
from infra.digests import sha256_bytes
from infra.manifest import FileEntry, dataset_root, verify_dataset
from pipelines.clip_model import ClipIdentity
from pipelines.embed import ROWS_SCHEMA, EmbeddedShard
from pipelines.embeddings import EmbeddingsManifest
from pipelines.mismatches import PairModel, Pairs, learn, words_of
from pipelines.pair_check import drawn, learn_pairs
from pipelines.report import make_page
from pipelines.scores import ScoresJob, ScoresManifest, finished_scores, publish_scores, score_shard
from pipelines.scoring_config import MismatchConfig, RefilterConfig
from pipelines.shards import read_shard
from pipelines.verdicts import job_of, preview
from tests.pipelines.scoring.by_hand import derived_version
from tests.pipelines.scoring.conftest import make_dataset

DIM, NUM_CONCEPTS, NUM_PLANTED = 128, 12, 80
MIN_FOUND, MAX_FALSE = 0.95, 0.01
THINGS = [
    f"{first}{second}"
    for first in ("wolf", "gull", "moth")
    for second in ("hound", "stone", "light", "grass")
]


def unit(vectors: Any) -> Any:
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


class PlantedWorld:
    """Embeddings as CLIP's are: a narrow cone, concepts in it, noise of a falling spectrum.

    The first ``num_planted`` samples that say "wolfhound" have the image of a "wolfstone".
    """

    def __init__(self, num_samples: int, num_planted: int = NUM_PLANTED, seed: int = 5) -> None:
        rng = np.random.default_rng(seed)
        spectrum = np.arange(1, DIM + 1) ** -0.5
        spectrum /= np.linalg.norm(spectrum)

        def noise(size: float) -> Any:
            breadth = rng.uniform(0.6, 1.5, (num_samples, 1))
            return size * rng.normal(size=(num_samples, DIM)) * spectrum * breadth

        centres = unit(rng.normal(size=(NUM_CONCEPTS, DIM)))
        cone, text_cone = unit(rng.normal(size=(2, DIM)))
        said = rng.integers(0, NUM_CONCEPTS, num_samples)
        self.planted = np.flatnonzero(said == 0)[:num_planted]
        shown = said.copy()
        shown[self.planted] = 1
        self.images = unit(centres[shown] * 0.6 + cone + noise(0.4)).astype(np.float16)
        self.texts = unit(centres[said] * 0.3 + text_cone + noise(0.4)).astype(np.float16)
        honest = unit(centres[said] * 0.6 + cone + noise(0.4))
        self.recorded = (honest * self.texts).sum(axis=1) * 0.8 + 0.05
        self.computed = (self.images.astype(float) * self.texts).sum(axis=1)
        places = rng.integers(0, 400, num_samples)
        self.captions = [
            f"photo of a {THINGS[kind]} near place{'abcdefghijklmnopqrst'[place % 20]}"
            for kind, place in zip(said, places, strict=True)
        ]

    def pairs(self, *, is_recorded: bool = True) -> Pairs:
        recorded = self.recorded if is_recorded else [None] * len(self.captions)
        return Pairs(
            pl.Series(self.captions),
            pl.Series(recorded, dtype=pl.Float64),
            pl.Series(self.computed),
            self.images,
        )


@pytest.mark.parametrize("is_recorded", [True, False])
def test_eighty_planted_pairs_stand_out_of_their_concept(is_recorded: bool) -> None:
    world = PlantedWorld(6000)
    pairs = world.pairs(is_recorded=is_recorded)
    config = MismatchConfig()
    model = learn(pairs, config)
    assert set(THINGS) <= set(model.concepts["word"])
    assert "photo" not in set(model.concepts["word"])  # in every caption: it says nothing
    suspected = model.suspected(pairs, config.max_deviations).to_numpy()
    found = suspected[world.planted].mean()
    false = (suspected.sum() - suspected[world.planted].sum()) / len(suspected)
    print(f"\nplanted pairs: {1 - found:.1%} missed, {false:.2%} of the others suspected")
    assert found >= MIN_FOUND
    assert false <= MAX_FALSE
    clean = PlantedWorld(6000, num_planted=0).pairs(is_recorded=is_recorded)
    assert learn(clean, config).suspected(clean, config.max_deviations).mean() <= MAX_FALSE  # type: ignore[operator]


def test_an_image_changed_since_it_was_scored_is_seen_without_any_concept() -> None:
    world = PlantedWorld(3000, num_planted=0)
    changed = np.arange(0, 3000, 50)
    world.computed[changed] -= 0.4
    pairs = replace(world.pairs(), captions=pl.Series([""] * 3000))
    model = learn(pairs, MismatchConfig())
    assert model.concepts.is_empty()
    suspected = model.suspected(pairs, 4.0).to_numpy()
    assert suspected[changed].all()
    assert suspected.sum() <= len(changed) + 30
    unknown = replace(pairs, recorded=pl.Series([None] * 3000, dtype=pl.Float64))
    assert not learn(unknown, MismatchConfig()).suspected(unknown, 4.0).any()


def test_a_model_reads_back_as_it_was_written(tmp_path: Path) -> None:
    pairs = PlantedWorld(1500).pairs()
    model = learn(pairs, MismatchConfig())
    model.write(tmp_path / "a.parquet")
    again = PairModel.read((tmp_path / "a.parquet").read_bytes())
    assert again.deviations(pairs).equals(model.deviations(pairs))
    again.write(tmp_path / "b.parquet")
    assert (tmp_path / "a.parquet").read_bytes() == (tmp_path / "b.parquet").read_bytes()


def test_words_are_letters_once_per_caption() -> None:
    found = words_of(pl.Series(["A fox, a FOX & 12 hens", "", "Ein schöner Fuchs", "x"]))
    assert found.rows() == [
        (0, "fox"), (0, "hens"), (2, "ein"), (2, "schöner"), (2, "fuchs"),
    ]  # fmt: skip


def stored(root: str, name: str, data: bytes, num_rows: int) -> FileEntry:
    storage.write_bytes(storage.join(root, name), data)
    return FileEntry(name, len(data), sha256_bytes(data), num_rows)


def as_npy(array: Any) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()


def planted_embeddings(dataset: Any, world: PlantedWorld) -> tuple[EmbeddingsManifest, set[str]]:
    """What `atelier score` leaves of embeddings, with the world's in the model's place."""
    root, manifest = dataset.root, dataset.manifest
    units, bad, start = [], set(), 0
    planted = set(world.planted.tolist())
    for number, shard in enumerate(manifest.shards):
        keys = [key for key, _ in read_shard(storage.read_bytes(storage.join(root, shard.path)))]
        mine = slice(start, start + len(keys))
        rows = [
            {"sample_id": key, "row": row, "caption": world.captions[start + row],
             "clip_similarity": float(world.recorded[start + row]), "url": "http://x.example/"}
            for row, key in enumerate(keys)
        ]  # fmt: skip
        bad |= {key for row, key in enumerate(keys) if start + row in planted}
        buffer = io.BytesIO()
        pq.write_table(pa.Table.from_pylist(rows, ROWS_SCHEMA), buffer)
        units.append(
            EmbeddedShard(
                shard.path,
                shard.sha256,
                len(keys),
                len(keys),
                stored(root, f"e/images-{number}.npy", as_npy(world.images[mine]), len(keys)),
                stored(root, f"e/texts-{number}.npy", as_npy(world.texts[mine]), len(keys)),
                stored(root, f"e/rows-{number}.parquet", buffer.getvalue(), len(keys)),
            )
        )
        start += len(keys)
    identity = ClipIdentity({"embed_dim": DIM}, {}, "0" * 64, "fp32")
    counts = {"samples": start, "embedded": start, "failed": 0}
    found = EmbeddingsManifest(manifest.name, manifest.version, asdict(identity), units, counts)
    return found, bad


@pytest.fixture
def planted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[Any, EmbeddingsManifest, ScoresManifest, set[str]]]:
    monkeypatch.setenv("ATELIER_HOME", str(tmp_path / "home"))

    def make(num_samples: int) -> tuple[Any, EmbeddingsManifest, ScoresManifest, set[str]]:
        dataset = make_dataset((tmp_path / "store").as_uri(), num_samples, per_shard=400)
        embeddings, bad = planted_embeddings(dataset, PlantedWorld(num_samples))
        scoring = ScoresJob(dataset.root, embeddings, ())
        for each in embeddings.units:
            score_shard(scoring, each, tmp_path)
        scores = publish_scores(scoring, finished_scores(scoring))
        return dataset, embeddings, scores, bad

    return make


def test_a_poisoned_concept_is_told_with_its_miss_rate_and_rejected(planted: Any) -> None:
    dataset, embeddings, scores, bad = planted(2400)
    assert len(bad) == NUM_PLANTED
    for rejects in (False, True):
        asked = MismatchConfig(reject=rejects)
        keep = RefilterConfig(mismatches=asked)
        job = job_of(dataset.manifest_uri, embeddings, scores, keep)
        pairs, told = learn_pairs(job, asked)
        job = replace(job, pairs=pairs, pairs_told=told)
        assert told["samples"] == told["swapped"] == 2400
        assert told["suspected"] >= MIN_FOUND * NUM_PLANTED
        assert told["words"][0][0] == "wolfhound"
        assert 0.01 < told["swapped_unnoticed"] / told["swapped"] < 0.2  # one in 12 fits by chance
        manifest = derived_version(job)
        uri = storage.join(dataset.root, manifest.version, "manifest.json")
        assert dataset_root(uri) == dataset.root
        assert verify_dataset(uri) == []
        gone = manifest.rejected.get("mismatched", 0)
        assert preview(job)["committed"] == manifest.counts["committed"] == 2400 - gone
        page = make_page(uri, manifest)
        assert f"Of 2,400 samples looked at, {told['suspected']:,}" in page
        assert f"{told['swapped_unnoticed']:,} (" in page
        assert "went unnoticed" in page
        if not rejects:
            assert gone == 0
            continue
        rows = pl.concat(
            pl.read_parquet(storage.read_bytes(storage.join(dataset.root, entry.path)))
            for entry in manifest.ledger
        )
        rejected = set(rows.filter(pl.col("reason") == "mismatched")["sample_id"])
        assert len(rejected) == gone == told["suspected"]
        assert len(rejected & bad) >= MIN_FOUND * NUM_PLANTED
        assert len(rejected - bad) <= MAX_FALSE * 2400


def test_learning_is_bounded_and_spread_over_the_version() -> None:
    entry = FileEntry("x", 1, "0" * 64, 1)
    units = [EmbeddedShard(f"s{n}", "0" * 64, 100, 100, entry, entry, entry) for n in range(50)]
    embeddings = EmbeddingsManifest("d", "v", {}, units, {})
    assert drawn(embeddings, 10_000) == list(range(50))
    assert drawn(embeddings, 1_000) == list(range(0, 50, 5))
    assert drawn(embeddings, 100) == [0]
