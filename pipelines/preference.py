"""A new version with preference scores by a model: how much people like an image for its caption.

Models of human choices are CLIPs trained on comparisons (HPS v2, PickScore): the score is the
cosine of image and caption, times a factor. So embeddings and cosines are made by the same jobs as
everywhere, and only the samples' ``.json`` is written anew.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import polars as pl

from infra.config import semantic_part
from infra.digests import canonical_json, sha256_bytes
from infra.manifest import DatasetManifest, dataset_root, load_manifest
from pipelines.clip_model import identify
from pipelines.derive import Derivation, Members, derive
from pipelines.embeddings import embed_dataset
from pipelines.scores import ScoresManifest, read_scores, score_dataset
from pipelines.scoring_config import ModelPreferenceConfig
from pipelines.shards import SCORE_DIGITS

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

    from pipelines.score import Bars

PREFERENCE_VERSION = 1


@dataclass(frozen=True)
class PreferenceJob(Derivation):
    """Every sample of one version gets the score of one model; travels to the workers."""

    kind: ClassVar[str] = "preference"

    dataset_root: str
    manifest: DatasetManifest
    scores: ScoresManifest
    config: ModelPreferenceConfig
    environment: Mapping[str, str] = field(default_factory=dict, repr=False)

    @property
    def key(self) -> str:
        """The sha256 over everything that decides the new version."""
        identity = {
            "preference": semantic_part(self.config),
            "dataset": self.manifest.version,
            "scores": self.scores.sha256,
            "version": PREFERENCE_VERSION,
        }
        return sha256_bytes(canonical_json(identity))

    def decide(self, index: int, folder: Path) -> pl.DataFrame:
        """Every sample of the shard, with its score; one that was not embedded has ``unknown``."""
        computed = read_scores(self.dataset_root, self.scores.units[index].scores)
        unknown = pl.lit(self.config.unknown, pl.Float64)
        liking = self.config.offset + self.config.scale * pl.col("clip_similarity")
        return computed.select(
            "sample_id",
            pl.lit(None, pl.String).alias("reason"),
            pl.coalesce(liking.round(SCORE_DIGITS), unknown).alias("preference_score"),
        )

    def rewrite(self, members: Members, decided: Mapping[str, Any]) -> Members:
        """The sample with the score in its ``.json``, and the model that gave it."""
        known = json.loads(members["json"])
        known["preference_score"] = decided["preference_score"]
        origin = dict(known.get("score_models") or {})
        origin["preference_score"] = {"model": self.scores.model_key, **self.choices()}
        return members | {"json": canonical_json(known | {"score_models": origin})}

    def choices(self) -> dict[str, Any]:
        """How a cosine becomes a score."""
        return {name: getattr(self.config, name) for name in ("scale", "offset", "unknown")}

    def record(self) -> dict[str, Any]:
        """That, and the model's cosines."""
        return {**self.choices(), "model": self.scores.model_key, "scores": self.scores.sha256}

    def parents(self) -> list[dict[str, Any]]:
        """The version, and the cosines."""
        return [*super().parents(), {"scores": self.scores.sha256}]


def preference_part(config: ModelPreferenceConfig) -> dict[str, Any]:
    """What decides the scores; reads every byte of the model. ``UserError`` for a broken one."""
    return {**semantic_part(config), "model": identify(config.clip)[0].key}


def prefer(
    manifest_uri: str,
    config: ModelPreferenceConfig,
    spark: Callable[[], SparkSession],
    bars: Bars,
    environment: Mapping[str, str] | None = None,
) -> str:
    """Publish a version with the model's scores; returns its manifest's address. It resumes."""
    manifest = load_manifest(manifest_uri)
    total = manifest.counts["committed"]
    with bars(f"embedding {manifest.name} for preference", total, "images") as bar:
        embedded = embed_dataset(manifest_uri, config.clip, spark, environment, bar.update)
    with bars("comparing with captions", total, "images") as bar:
        scored = score_dataset(manifest_uri, embedded.manifest, (), spark, environment, bar.update)
    root = dataset_root(manifest_uri)
    job = PreferenceJob(root, manifest, scored.manifest, config, dict(environment or {}))
    with bars("rewriting", total, "samples") as bar:
        return derive(job, spark, bar.update).manifest_uri
