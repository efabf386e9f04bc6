"""Scores computed once, thresholded many times; new versions account for every row."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from safetensors.torch import save_file

from infra import storage
from infra.errors import UserError
from infra.manifest import verify_dataset
from pipelines.derive import DerivedShard
from pipelines.derive import finished_units as finished_parts
from pipelines.embed import read_rows
from pipelines.heads import Affine, Head, load_head
from pipelines.scores import (
    read_scores,
    score_dataset,
)
from pipelines.scoring_config import HeadConfig
from pipelines.shards import read_shard
from pipelines.verdicts import preview
from tests.pipelines.scoring.by_hand import derived_version, ledger_of, samples_of, scored


def make_head(folder: Path, column: str, scale: str | None = None, seed: int = 0) -> Head:
    torch.manual_seed(seed)
    path = folder / f"{column}-{scale}.safetensors"
    bias = torch.tensor([5.0 if column == "aesthetic_score" else 0.5])
    save_file({"fc.weight": torch.randn(1, 32), "fc.bias": bias}, path)
    Path(f"{path}.json").write_text('{"steps": [{"affine": "fc"}]}')
    known = {"layout": "described", "weights": str(path), "column": column}
    return load_head(HeadConfig.model_validate(known | {"aesthetic_scale": scale}))


@pytest.fixture
def heads(tmp_path: Path) -> list[Head]:
    (tmp_path / "heads").mkdir()
    columns = [("aesthetic_score", "v2"), ("unsafe_prob", None), ("watermark_prob", None)]
    return [make_head(tmp_path / "heads", *each, seed=n) for n, each in enumerate(columns)]


def test_scores_are_those_of_the_heads_and_the_cosine(
    new_dataset: Callable[..., Any], clip_folder: Path, heads: list[Head], direct: Any,
    tmp_path: Path, home: Path,
) -> None:  # fmt: skip
    dataset = new_dataset(tmp_path.as_uri(), broken=[2])
    found = scored(dataset, clip_folder, heads, tmp_path)
    for unit, scores in zip(found.embeddings.units, found.scores.units, strict=True):
        rows = read_rows(dataset.root, unit).to_pylist()
        table = read_scores(dataset.root, scores.scores)
        assert table["sample_id"].to_list() == [row["sample_id"] for row in rows]
        whole = [row for row in rows if row["row"] is not None]
        images, texts = direct(
            clip_folder,
            [dataset.images[row["sample_id"]] for row in whole],
            [dataset.captions[row["sample_id"]] for row in whole],
        )
        known = table.filter(pl.col("sample_id").is_in([row["sample_id"] for row in whole]))
        cosine = (images * texts).sum(axis=1)
        np.testing.assert_allclose(known["clip_similarity"], cosine, atol=2e-3)
        for head in heads:
            np.testing.assert_allclose(known[head.score], head.scores(images), atol=5e-3)
        assert table.drop("sample_id").null_count().row(0) == (len(rows) - len(whole),) * 4
    assert found.scores.provenance()["unsafe_prob"]["sha256"] == heads[1].sha256
    (folded,) = heads[0].steps
    assert isinstance(folded, Affine)
    narrow = replace(heads[0], steps=(replace(folded, weight=np.ones((1, 8))),))
    with pytest.raises(UserError, match="for 32 numbers per embedding; got described for 8"):
        score_dataset(dataset.manifest_uri, found.embeddings, [narrow], no_spark)


def no_spark() -> Any:
    raise AssertionError("Spark was asked for")


def test_samples_below_a_threshold_leave_with_a_reason_and_others_stay_as_they_are(
    new_dataset: Callable[..., Any], clip_folder: Path, store_uri: str, tmp_path: Path, home: Path
) -> None:
    dataset = new_dataset(store_uri, num_samples=40, per_shard=3)
    found = scored(dataset, clip_folder, [], tmp_path)
    job = found.job(min_aesthetic_score=4.5, max_watermark_prob=0.75, use_computed="never")

    def verdict(row: dict[str, Any]) -> str | None:
        if row["aesthetic_score"] < 4.5:
            return "low_aesthetic_score"
        return "watermarked" if row["watermark_prob"] > 0.75 else None

    expected = {key: verdict(row) for key, row in dataset.scores.items()}
    counts = Counter(reason for reason in expected.values() if reason)
    seen = preview(job)
    assert seen == dict(sorted(counts.items())) | {"committed": 40 - counts.total()}
    manifest = derived_version(job)
    uri = storage.join(dataset.root, manifest.version, "manifest.json")
    assert verify_dataset(uri) == []
    assert manifest.rejected == {"too_small": 40, **counts}
    assert manifest.counts == {
        "rows_in": 80, "committed": 40 - counts.total(), "rejected": 40 + counts.total(),
        "failed": 0,
    }  # fmt: skip
    rows = ledger_of(dataset.root, manifest)
    assert rows.height == 80
    in_ledger = {row["sample_id"]: row for row in rows.iter_rows(named=True)}
    samples = samples_of(dataset.root, manifest)
    before = samples_of(dataset.root, dataset.manifest)
    for key, reason in expected.items():
        row = in_ledger[key]
        assert (row["disposition"] == "committed") == (reason is None) == (key in samples)
        assert row["reason"] == reason
        assert (row["shard"] is None) == (reason is not None)
        if reason is None:
            assert samples[key] == before[key]
            assert row["shard"] in {shard.path for shard in manifest.shards}
    untouched = {shard.path for shard in dataset.manifest.shards} & {
        s.path for s in manifest.shards
    }
    whole = [
        shard for shard in dataset.manifest.shards
        if all(expected[key] is None for key, _ in read_shard(
            storage.read_bytes(storage.join(dataset.root, shard.path))))
    ]  # fmt: skip
    assert untouched == {shard.path for shard in whole}
    assert whole
    assert manifest.parents[0] == {"dataset": "small", "version": dataset.manifest.version}
    # A marker without its file counts as not written; what is made again is the same.
    changed = next(s for s in manifest.shards if s.path not in untouched)
    storage.delete(storage.join(dataset.root, changed.path))
    left = finished_parts(job, "shards", DerivedShard)
    assert len(left) == len(job.manifest.shards) - 1
    assert derived_version(job).version == manifest.version
    assert verify_dataset(uri) == []


def test_unknown_scores_take_the_computed_ones_with_their_provenance(
    new_dataset: Callable[..., Any], clip_folder: Path, heads: list[Head],
    tmp_path: Path, home: Path,
) -> None:  # fmt: skip
    unknown = [1, 4, 9]
    dataset = new_dataset(tmp_path.as_uri(), unknown=unknown, per_shard=2)
    found = scored(dataset, clip_folder, heads, tmp_path)
    computed = {
        row["sample_id"]: row
        for unit in found.scores.units
        for row in read_scores(dataset.root, unit.scores).iter_rows(named=True)
    }
    ids = {key for key, row in dataset.scores.items() if row["number"] in unknown}
    bound = float(np.median([computed[key]["aesthetic_score"] for key in ids]))
    manifest = derived_version(found.job(min_aesthetic_score=bound))
    samples = samples_of(dataset.root, manifest)
    ledger = {
        row["sample_id"]: row for row in ledger_of(dataset.root, manifest).iter_rows(named=True)
    }
    for key, row in dataset.scores.items():
        effective = computed[key] if key in ids else row
        assert (key in samples) == (effective["aesthetic_score"] >= bound)
        if key in ids:
            assert ledger[key]["aesthetic_score"] == pytest.approx(computed[key]["aesthetic_score"])
        if key in samples:
            known = json.loads(samples[key]["json"])
            assert known["aesthetic_score"] == pytest.approx(effective["aesthetic_score"], abs=1e-6)
            assert known["preference_score"] == known["aesthetic_score"]
            origin = known.get("score_models", {})
            assert set(origin) == (
                {"aesthetic_score", "clip_similarity", "unsafe_prob", "watermark_prob"}
                if key in ids else set()
            )  # fmt: skip
            if key in ids:
                assert origin["aesthetic_score"]["sha256"] == heads[0].sha256
                assert origin["aesthetic_score"]["model"] == found.embeddings.identity.key
    dropped = preview(found.job(min_aesthetic_score=0.0, use_computed="never"))
    assert dropped["unknown_aesthetic_score"] == len(unknown)
    kept = preview(found.job(min_aesthetic_score=0.0, use_computed="never", on_unknown="keep"))
    assert kept == {"committed": 20}
    everywhere = preview(found.job(min_aesthetic_score=bound, use_computed="always"))
    assert everywhere["committed"] == sum(
        row["aesthetic_score"] >= bound for row in computed.values()
    )


def test_scores_of_another_scale_are_not_compared(
    new_dataset: Callable[..., Any], clip_folder: Path, tmp_path: Path, home: Path
) -> None:
    dataset = new_dataset(tmp_path.as_uri(), num_samples=6)
    head = make_head(tmp_path, "aesthetic_score", "v1")
    found = scored(dataset, clip_folder, [head], tmp_path)
    on_v1 = preview(found.job(min_aesthetic_score=0.0, aesthetic_scale="v1", use_computed="never"))
    assert on_v1 == {"unknown_aesthetic_score": 6, "committed": 0}
    computed = preview(found.job(min_aesthetic_score=0.0, aesthetic_scale="v1"))
    assert computed == {"committed": 6}
    on_v2 = preview(found.job(min_aesthetic_score=0.0, use_computed="always"))
    assert on_v2 == {"committed": 6}
