"""What the scoring verbs do, with a loop in Spark's place."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import polars as pl
from pydantic import TypeAdapter

from infra import storage
from infra.manifest import DatasetManifest, publish_manifest
from pipelines.clip_model import publish_weights
from pipelines.derive import Derivation, DerivedLedger, DerivedShard, assemble, run_unit
from pipelines.embed import embed_shard
from pipelines.embeddings import (
    EmbeddingsManifest,
    finished_units,
    plan_embeddings,
    publish_embeddings,
    store_of,
)
from pipelines.heads import Head
from pipelines.scores import (
    ScoresJob,
    ScoresManifest,
    finished_scores,
    publish_scores,
    score_shard,
)
from pipelines.scoring_config import ClipConfig, RefilterConfig
from pipelines.shards import read_shard
from pipelines.verdicts import RefilterJob, job_of


@dataclass
class Scored:
    dataset: Any
    embeddings: EmbeddingsManifest
    scores: ScoresManifest

    def job(self, **config: Any) -> RefilterJob:
        chosen = RefilterConfig.model_validate(config)
        return job_of(self.dataset.manifest_uri, self.embeddings, self.scores, chosen)


def scored(dataset: Any, clip_folder: Path, heads: Sequence[Head], tmp_path: Path) -> Scored:
    job = plan_embeddings(dataset.manifest_uri, ClipConfig(folder=str(clip_folder), batch_size=8))
    sha256 = job.unit.identity.weights_sha256
    uri = publish_weights(job.weights, sha256, store_of(dataset.manifest_uri))
    unit = replace(job.unit, weights_uri=uri)
    for shard in dataset.manifest.shards:
        embed_shard(unit, shard, tmp_path)
    embeddings = publish_embeddings(job, finished_units(job))
    scoring = ScoresJob(dataset.root, embeddings, tuple(heads))
    for each in embeddings.units:
        score_shard(scoring, each, tmp_path)
    return Scored(dataset, embeddings, publish_scores(scoring, finished_scores(scoring)))


def derived_version(job: Derivation) -> DatasetManifest:
    """The version that a derivation publishes."""
    made: dict[str, list[Any]] = {}
    for kind, entries in (("shards", job.manifest.shards), ("ledger", job.manifest.ledger)):
        for index in range(len(entries)):
            run_unit(job, kind, index)
        made[kind] = [
            storage.read_json(job.marker_uri(kind, index)) for index in range(len(entries))
        ]
    shards = [TypeAdapter(DerivedShard).validate_python(each) for each in made["shards"]]
    ledger = [TypeAdapter(DerivedLedger).validate_python(each) for each in made["ledger"]]
    manifest = assemble(job, shards, ledger)
    publish_manifest(job.dataset_root, manifest)
    return manifest


def ledger_of(root: str, manifest: DatasetManifest) -> pl.DataFrame:
    uris = [storage.join(root, entry.path) for entry in manifest.ledger]
    return pl.concat(pl.read_parquet(storage.read_bytes(uri)) for uri in uris)


def samples_of(root: str, manifest: DatasetManifest) -> dict[str, dict[str, bytes]]:
    return {
        key: members
        for shard in manifest.shards
        for key, members in read_shard(storage.read_bytes(storage.join(root, shard.path)))
    }
