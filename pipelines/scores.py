"""Scores of every embedded image, kept beside their provenance: score once, threshold many times.

``scores/<key>/`` under the dataset's root, where the key names the CLIP model and the heads' files,
holds ``files/`` (parquet, content-named), ``units/`` (one marker per shard) and, per dataset
version, ``<version>/manifest.json``, written last.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl
import pyarrow as pa
from pydantic import TypeAdapter, ValidationError

from infra import storage
from infra.digests import canonical_json, sha256_bytes
from infra.environment import applied
from infra.errors import UserError
from infra.lease import Lease
from infra.manifest import FileEntry, dataset_root
from pipelines.embed import (
    KEY_CHARS,
    EmbeddedShard,
    publish_file,
    read_embeddings,
    read_rows,
)
from pipelines.embeddings import EmbeddingsManifest
from pipelines.exclusive import refuse_while_removing
from pipelines.heads import Head
from pipelines.units import ProgressCallback, run_units, watching
from pipelines.workspace import Workspace

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

SCORES_SCHEMA_VERSION = 1
SCORE_COLUMNS = ("clip_similarity", "unsafe_prob", "watermark_prob", "aesthetic_score")
# One row per sample of the shard; a score is null where no head gives it or no embedding is there.
SCORES_SCHEMA = pa.schema(
    [("sample_id", pa.string()), *((name, pa.float64()) for name in SCORE_COLUMNS)]
)
_READ_THREADS = 8


@dataclass(frozen=True)
class ScoredShard:
    """The scores of one shard: the marker of a unit and an entry of the manifest."""

    shard_sha256: str
    embeddings_sha256: str
    scores: FileEntry


@dataclass(frozen=True)
class ScoresManifest:
    """The scores of one dataset version. ``heads`` say layout, column, scale and sha256 of each;
    ``clip_similarity`` is the cosine of image and caption by the model of ``model_key``."""

    dataset: str
    dataset_version: str
    embeddings_sha256: str
    model_key: str
    heads: list[dict[str, Any]]
    units: list[ScoredShard]
    schema_version: int = SCORES_SCHEMA_VERSION

    def to_bytes(self) -> bytes:
        """Canonical JSON."""
        return canonical_json(asdict(self))

    @property
    def sha256(self) -> str:
        """What these scores are known by."""
        return sha256_bytes(self.to_bytes())

    def provenance(self) -> dict[str, Any]:
        """Per column: which head, on which model's embeddings."""
        found: dict[str, Any] = {"clip_similarity": {"model": self.model_key}}
        for head in self.heads:
            found[head["column"]] = {"model": self.model_key, **head}
        return found


@dataclass(frozen=True)
class ScoresJob(Workspace):
    """One set of embeddings and the heads to put on them; travels to the workers."""

    dataset_root: str
    embeddings: EmbeddingsManifest
    heads: tuple[Head, ...]
    environment: Mapping[str, str] = field(default_factory=dict, repr=False)

    @property
    def key(self) -> str:
        """The sha256 over the model's key and the heads' identities."""
        heads = sorted((head.identity() for head in self.heads), key=lambda each: each["column"])
        return sha256_bytes(canonical_json({"model": self.embeddings.identity.key, "heads": heads}))

    @property
    def relative(self) -> str:
        """The job's folder under the dataset's root."""
        return f"scores/{self.key[:KEY_CHARS]}"

    @property
    def folder(self) -> str:
        """The job's folder."""
        return storage.join(self.dataset_root, self.relative)

    @property
    def manifest_uri(self) -> str:
        """The address of the scores' manifest."""
        return storage.join(self.folder, self.embeddings.dataset_version, "manifest.json")

    def marker_uri(self, unit: EmbeddedShard) -> str:
        """The marker of one shard's scores."""
        return storage.join(self.folder, "units", f"{unit.shard_sha256[:32]}.json")

    def read_marker(self, unit: EmbeddedShard) -> ScoredShard | None:
        """The marker, or None when it is missing, unreadable or of other embeddings."""
        try:
            data = storage.read_bytes(self.marker_uri(unit))
            marker = TypeAdapter(ScoredShard).validate_json(data, strict=True)
        except (storage.ObjectMissing, ValidationError):
            return None
        return marker if marker.embeddings_sha256 == unit.images.sha256 else None


@dataclass(frozen=True)
class ScoresResult:
    """Published scores. ``num_made`` of the shards were scored by this call."""

    manifest_uri: str
    manifest: ScoresManifest
    num_made: int


def score_dataset(
    dataset_manifest_uri: str,
    embeddings: EmbeddingsManifest,
    heads: Sequence[Head],
    spark: Callable[[], SparkSession],
    environment: Mapping[str, str] | None = None,
    progress: ProgressCallback | None = None,
) -> ScoresResult:
    """Put every head on the embeddings of a dataset version; resumes like ``embed_dataset``.

    Raises ``UserError`` for a head that takes embeddings of another dimension.
    """
    for head in heads:
        if head.dim != embeddings.identity.dim:
            raise UserError(
                expected=f"a {head.score} head for {embeddings.identity.dim} numbers per embedding",
                got=f"{head.layout} for {head.dim}",
                remedy="use the head that was trained on this CLIP",
            )
    root = dataset_root(dataset_manifest_uri)
    with applied(environment or {}):
        job = ScoresJob(root, embeddings, tuple(heads), dict(environment or {}))
        with Lease(storage.join(job.folder, "lease.json"), "scoring") as lease:
            refuse_while_removing(root)
            done = finished_scores(job)
            missing = [unit for unit in embeddings.units if unit.shard_sha256 not in done]
            if missing:
                sizes = {job.marker_uri(unit): unit.num_samples for unit in missing}
                with watching(sizes, embeddings.counts["samples"], progress):
                    run_units(spark(), job, len(missing), lambda i: _score(job, missing[i]))
                done = finished_scores(job)
            lease.check()
            manifest = publish_scores(job, done)
        return ScoresResult(job.manifest_uri, manifest, len(missing))


def finished_scores(job: ScoresJob) -> dict[str, ScoredShard]:
    """Shard's sha256 -> marker, for the shards whose scores are there in full size."""
    listed = {info.uri: info.num_bytes for info in storage.list_objects(job.folder)}
    units = [unit for unit in job.embeddings.units if job.marker_uri(unit) in listed]
    with ThreadPoolExecutor(_READ_THREADS) as pool:
        markers = list(pool.map(job.read_marker, units))
    return {
        marker.shard_sha256: marker
        for marker in markers
        if marker is not None
        and listed.get(storage.join(job.dataset_root, marker.scores.path))
        == marker.scores.num_bytes
    }


def _score(job: ScoresJob, unit: EmbeddedShard) -> None:
    with job.task(f"score-{unit.shard_sha256[:32]}") as folder:
        score_shard(job, unit, folder)


def score_shard(job: ScoresJob, unit: EmbeddedShard, folder: Path) -> ScoredShard:
    """Score one shard's embeddings, publish, and write the marker last."""
    dim = job.embeddings.identity.dim
    rows = pl.DataFrame(pl.from_arrow(read_rows(job.dataset_root, unit)))
    images = read_embeddings(job.dataset_root, unit.images, dim)
    texts = read_embeddings(job.dataset_root, unit.texts, dim)
    known = {"clip_similarity": cosines(images, texts)}
    known |= {head.score: head.scores(images) for head in job.heads}
    computed = pl.DataFrame({"row": np.arange(len(images), dtype=np.int32), **known})
    frame = rows.select("sample_id", "row").join(
        computed, on="row", how="left", maintain_order="left"
    )
    missing = [pl.lit(None, pl.Float64).alias(name) for name in SCORE_COLUMNS if name not in known]
    frame = frame.with_columns(*missing).select(SCORES_SCHEMA.names)
    path = folder / "scores.parquet"
    import pyarrow.parquet as pq

    pq.write_table(frame.to_arrow().cast(SCORES_SCHEMA), path, compression="zstd")
    entry = publish_file(path, job.dataset_root, f"{job.relative}/files", "parquet", frame.height)
    marker = ScoredShard(unit.shard_sha256, unit.images.sha256, entry)
    storage.write_json(job.marker_uri(unit), asdict(marker))
    return marker


def cosines(images: Any, texts: Any) -> Any:
    """The cosine of each image with its caption, in [-1, 1]; stored lengths are one to float16."""
    pairs = [array.astype(np.float64) for array in (images, texts)]
    lengths = [np.linalg.norm(array, axis=1) for array in pairs]
    return np.clip((pairs[0] * pairs[1]).sum(axis=1) / (lengths[0] * lengths[1]), -1.0, 1.0)


def publish_scores(job: ScoresJob, units: Mapping[str, ScoredShard]) -> ScoresManifest:
    """Write the manifest of what the markers say, in the order of the embeddings."""
    missing = [u.shard for u in job.embeddings.units if u.shard_sha256 not in units]
    if missing:
        raise RuntimeError(f"{len(missing)} shards are not scored, first: {missing[0]}")
    manifest = ScoresManifest(
        dataset=job.embeddings.dataset,
        dataset_version=job.embeddings.dataset_version,
        embeddings_sha256=job.embeddings.sha256,
        model_key=job.embeddings.identity.key,
        heads=sorted((h.identity() for h in job.heads), key=lambda each: str(each["column"])),
        units=[units[unit.shard_sha256] for unit in job.embeddings.units],
    )
    storage.write_bytes(job.manifest_uri, manifest.to_bytes())
    return manifest


def read_scores(dataset_root_uri: str, entry: FileEntry) -> pl.DataFrame:
    """The table of ``SCORES_SCHEMA`` of a listed file, its digest checked."""
    data = storage.read_bytes(storage.join(dataset_root_uri, entry.path), entry.sha256)
    return pl.read_parquet(data)
