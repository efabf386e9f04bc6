"""Which samples of a scored dataset version stay: decided from scores alone, no shard is read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import polars as pl

from infra import storage
from infra.config import semantic_part
from infra.digests import canonical_json, sha256_bytes
from infra.manifest import DatasetManifest, FileEntry, dataset_root, load_manifest
from pipelines.config import FilterConfig, UnknownPolicy
from pipelines.embed import KEY_CHARS, EmbeddedShard, checked_bytes, read_rows
from pipelines.embeddings import EmbeddingsManifest
from pipelines.filters import first_reason, metadata_filters
from pipelines.ledger import COMMITTED
from pipelines.scores import SCORE_COLUMNS, ScoresManifest, read_scores
from pipelines.scoring_config import RefilterConfig
from pipelines.workspace import Workspace

REFILTER_VERSION = 1
NEAR_DUPLICATE = "near_duplicate"
_READ_THREADS = 8


@dataclass(frozen=True)
class RefilterJob(Workspace):
    """One selection from one version; travels to the workers. ``dropped`` are near-duplicates."""

    dataset_root: str
    manifest: DatasetManifest
    embeddings: EmbeddingsManifest
    scores: ScoresManifest
    config: RefilterConfig
    dropped: FileEntry | None = None
    environment: Mapping[str, str] = field(default_factory=dict, repr=False)

    @property
    def key(self) -> str:
        """The sha256 over everything that decides the new version."""
        identity = {
            "refilter": semantic_part(self.config),
            "dataset": self.manifest.version,
            "scores": self.scores.sha256,
            "dropped": self.dropped.sha256 if self.dropped else None,
            "version": REFILTER_VERSION,
        }
        return sha256_bytes(canonical_json(identity))

    @property
    def relative(self) -> str:
        """The job's folder under the dataset's root."""
        return f"work/refilter-{self.key[:KEY_CHARS]}"

    @property
    def folder(self) -> str:
        """The job's folder."""
        return storage.join(self.dataset_root, self.relative)

    def marker_uri(self, kind: str, index: int) -> str:
        """The marker of the n-th shard or ledger file."""
        return storage.join(self.folder, kind, f"{index:06d}.json")

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
    rows = pl.DataFrame(pl.from_arrow(read_rows(job.dataset_root, unit.rows)))
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
    if job.dropped is not None:
        data = checked_bytes(storage.join(job.dataset_root, job.dropped.path), job.dropped.sha256)
        ids = pl.read_parquet(data, columns=["sample_id"])["sample_id"].implode()
        is_copy = pl.col("reason").is_null() & pl.col("sample_id").is_in(ids)
        frame = frame.with_columns(
            pl.when(is_copy).then(pl.lit(NEAR_DUPLICATE)).otherwise("reason").alias("reason")
        )
    return frame


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
