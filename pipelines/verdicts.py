"""A new version from scores: which samples stay is decided from these alone, no shard is read.

A score that was unknown takes the computed one, in the sample and in the ledger.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import polars as pl

from infra import storage
from infra.config import semantic_part
from infra.digests import canonical_json, sha256_bytes
from infra.manifest import DatasetManifest, FileEntry, dataset_root, load_manifest
from pipelines.config import FilterConfig, PreferenceConfig, UnknownPolicy
from pipelines.derive import Derivation, Members
from pipelines.duplicates import NEAR_DUPLICATE
from pipelines.embed import EmbeddedShard, read_embeddings, read_rows
from pipelines.embeddings import EmbeddingsManifest
from pipelines.filters import first_reason, metadata_filters
from pipelines.ledger import COMMITTED
from pipelines.mismatches import MISMATCHED, PairModel, Pairs
from pipelines.scores import SCORE_COLUMNS, ScoresManifest, read_scores
from pipelines.scoring_config import RefilterConfig
from pipelines.shards import preference_score

REFILTER_VERSION = 1
_READ_THREADS = 8


@dataclass(frozen=True)
class RefilterJob(Derivation):
    """One selection from one version; travels to the workers. ``dropped`` are near-duplicates,
    ``pairs`` is the file of a ``PairModel`` and ``pairs_told`` what the manifest says of it."""

    kind: ClassVar[str] = "refilter"

    dataset_root: str
    manifest: DatasetManifest
    embeddings: EmbeddingsManifest
    scores: ScoresManifest
    config: RefilterConfig
    dropped: FileEntry | None = None
    environment: Mapping[str, str] = field(default_factory=dict, repr=False)
    pairs: FileEntry | None = None
    pairs_told: Mapping[str, Any] = field(default_factory=dict)

    @property
    def key(self) -> str:
        """The sha256 over everything that decides the new version."""
        identity = {
            "refilter": semantic_part(self.config),
            "dataset": self.manifest.version,
            "scores": self.scores.sha256,
            "dropped": self.dropped.sha256 if self.dropped else None,
            "pairs": self.pairs.sha256 if self.pairs else None,
            "version": REFILTER_VERSION,
        }
        return sha256_bytes(canonical_json(identity))

    def decide(self, index: int, folder: Path) -> pl.DataFrame:
        """The samples below a threshold, and those that take a computed score."""
        found = verdicts(self, self.embeddings.units[index], self.scores.units[index].scores)
        taken = [pl.when(f"{name}_taken").then(pl.col(name)).alias(name) for name in SCORE_COLUMNS]
        scale = pl.when("aesthetic_score_taken").then(pl.lit(self.config.aesthetic_scale))
        return found.filter(pl.col("reason").is_not_null() | pl.col("is_changed")).select(
            "sample_id", "reason", *taken, scale.alias("aesthetic_scale")
        )

    def rewrite(self, members: Members, decided: Mapping[str, Any]) -> Members:
        """The sample with computed scores in its ``.json``, each with the head that gave it."""
        known = json.loads(members["json"])
        provenance = self.scores.provenance()
        origin = dict(known.get("score_models") or {})
        for name in SCORE_COLUMNS:
            if decided[name] is not None:
                known[name] = round(decided[name], 6)
                origin[name] = provenance[name]
        if decided["aesthetic_score"] is not None:
            known["aesthetic_scale"] = self.config.aesthetic_scale
            recipe = self.manifest.attributes.get("recipe", {})
            preference = PreferenceConfig.model_validate(recipe.get("preference", {}))
            known["preference_score"] = preference_score(known, preference)
        return members | {"json": canonical_json(known | {"score_models": origin})}

    def choices(self) -> dict[str, Any]:
        """The thresholds."""
        return semantic_part(self.config)

    def record(self) -> dict[str, Any]:
        """The thresholds, and whose scores they were asked of."""
        return {
            "thresholds": self.choices(),
            "scores": self.scores.sha256,
            "models": self.scores.provenance(),
            **({"pairs": dict(self.pairs_told)} if self.pairs_told else {}),
        }

    def parents(self) -> list[dict[str, Any]]:
        """The version, and the scores."""
        return [*super().parents(), {"scores": self.scores.sha256}]

    @property
    def computed_scale(self) -> str | None:
        """The scale of the computed aesthetic score, if one was computed."""
        scales = [h["aesthetic_scale"] for h in self.scores.heads]
        return next((scale for scale in scales if scale is not None), None)


def job_of(
    manifest_uri: str,
    embeddings: EmbeddingsManifest,
    scores: ScoresManifest,
    config: RefilterConfig,
    environment: Mapping[str, str] | None = None,
) -> RefilterJob:
    """What ``config`` selects from a scored version; ``ValueError`` for scores of another."""
    manifest = load_manifest(manifest_uri)
    if not (
        manifest.version == embeddings.dataset_version == scores.dataset_version
        and scores.embeddings_sha256 == embeddings.sha256
    ):
        raise ValueError("dataset, embeddings and scores are of different versions")
    root = dataset_root(manifest_uri)
    return RefilterJob(root, manifest, embeddings, scores, config, None, dict(environment or {}))


def verdicts(job: RefilterJob, unit: EmbeddedShard, scores: FileEntry) -> pl.DataFrame:
    """Per sample of a shard: ``sample_id``, ``reason`` or null, the scores that count, and
    ``is_changed`` where one of these was computed and stored otherwise."""
    rows = pl.DataFrame(pl.from_arrow(read_rows(job.dataset_root, unit)))
    computed = read_scores(job.dataset_root, scores)
    both = rows.join(computed, on="sample_id", how="left", suffix="_new", maintain_order="left")
    values, changed = [], []
    for name in SCORE_COLUMNS:
        stored, new = pl.col(name), pl.col(f"{name}_new")
        if name == "aesthetic_score":
            stored = pl.when(pl.col("aesthetic_scale") == job.config.aesthetic_scale).then(stored)
            if job.computed_scale != job.config.aesthetic_scale:
                new = pl.lit(None, pl.Float64)
        takes = (
            new.is_not_null()
            & {
                "unknown": stored.is_null(),
                "always": stored.is_null() | (stored != new),
                "never": pl.lit(False),
            }[job.config.use_computed]
        )
        values.append(pl.when(takes).then(new).otherwise(stored).alias(name))
        changed.append(takes.alias(f"{name}_taken"))
    frame = both.with_columns(*values, *changed)
    frame = frame.with_columns(
        first_reason(metadata_filters(_thresholds(job.config))),
        pl.any_horizontal([f"{name}_taken" for name in SCORE_COLUMNS]).alias("is_changed"),
    )
    asked = job.config.mismatches
    if job.pairs is not None and asked is not None and asked.reject:
        far = _suspected(job, unit, computed, asked.max_deviations)
        is_far = pl.col("reason").is_null() & pl.col("sample_id").is_in(far.implode())
        frame = frame.with_columns(
            pl.when(is_far).then(pl.lit(MISMATCHED)).otherwise("reason").alias("reason")
        )
    if job.dropped is not None:
        data = storage.read_bytes(
            storage.join(job.dataset_root, job.dropped.path), job.dropped.sha256
        )
        ids = pl.read_parquet(data, columns=["sample_id"])["sample_id"].implode()
        is_copy = pl.col("reason").is_null() & pl.col("sample_id").is_in(ids)
        frame = frame.with_columns(
            pl.when(is_copy).then(pl.lit(NEAR_DUPLICATE)).otherwise("reason").alias("reason")
        )
    return frame


def embedded_pairs(
    dataset_root_uri: str, unit: EmbeddedShard, computed: pl.DataFrame, dim: int
) -> Pairs:
    """The embedded samples of a shard, in the order of their embeddings."""
    rows = _embedded(dataset_root_uri, unit).join(
        computed.select("sample_id", pl.col("clip_similarity").alias("computed")),
        on="sample_id",
        how="left",
        maintain_order="left",
    )
    images = read_embeddings(dataset_root_uri, unit.images, dim)
    return Pairs(rows["caption"].fill_null(""), rows["clip_similarity"], rows["computed"], images)


def _embedded(dataset_root_uri: str, unit: EmbeddedShard) -> pl.DataFrame:
    rows = pl.DataFrame(pl.from_arrow(read_rows(dataset_root_uri, unit)))
    return rows.drop_nulls("row").sort("row")


def _suspected(
    job: RefilterJob, unit: EmbeddedShard, computed: pl.DataFrame, max_deviations: float
) -> pl.Series:
    """The ids of a shard's samples whose image is not what their caption says."""
    assert job.pairs is not None
    uri = storage.join(job.dataset_root, job.pairs.path)
    model = PairModel.read(storage.read_bytes(uri, job.pairs.sha256))
    pairs = embedded_pairs(job.dataset_root, unit, computed, job.embeddings.identity.dim)
    ids = _embedded(job.dataset_root, unit)["sample_id"]
    return ids.filter(model.suspected(pairs, max_deviations))


def _thresholds(config: RefilterConfig) -> FilterConfig:
    unknown = config.on_unknown
    return FilterConfig(
        min_aesthetic_score=config.min_aesthetic_score,
        aesthetic_scale=config.aesthetic_scale,
        max_watermark_prob=config.max_watermark_prob,
        max_unsafe_prob=config.max_unsafe_prob,
        min_clip_similarity=config.min_clip_similarity,
        max_caption_chars=None,
        unknown=UnknownPolicy(
            aesthetic_score=unknown,
            watermark_prob=unknown,
            unsafe_prob=unknown,
            clip_similarity=unknown,
        ),
    )


def preview(job: RefilterJob) -> dict[str, int]:
    """How many samples each reason would take and how many stay; reads scores, and no shard."""
    pairs = list(zip(job.embeddings.units, job.scores.units, strict=True))
    counts: Counter[str] = Counter()
    with ThreadPoolExecutor(_READ_THREADS) as pool:
        for reasons in pool.map(lambda p: verdicts(job, p[0], p[1].scores)["reason"], pairs):
            counts.update(reason or COMMITTED for reason in reasons)
    kept = counts.pop(COMMITTED, 0)
    return dict(sorted(counts.items())) | {COMMITTED: kept}
