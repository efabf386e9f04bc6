"""The embeddings of a dataset's version: planned, made by Spark a shard at a time, published last.

``embeddings/<model key>/`` under the dataset's root holds ``images/``, ``texts/`` and ``rows/``
(content-named), ``units/<shard>.json`` (one marker per shard), ``parts/<shard>/`` (of shards under
way) and, per dataset version, ``<version>/manifest.json``. Markers go by the shard's bytes: a
version that shares shards with an older one costs only its new shards.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

from pydantic import TypeAdapter, ValidationError

from infra import storage
from infra.digests import canonical_json, sha256_bytes
from infra.environment import applied
from infra.errors import UserError
from infra.lease import Lease
from infra.manifest import (
    DatasetManifest,
    FileEntry,
    ShardEntry,
    dataset_root,
    load_manifest,
    store_root,
)
from infra.storage_probe import check_store
from pipelines.clip_model import LIBRARIES, ClipIdentity, identify, publish_weights
from pipelines.embed import EmbeddedShard, EmbedTask, embed_shard, embeddings_folder
from pipelines.embed_parts import forget_parts
from pipelines.exclusive import refuse_while_removing
from pipelines.scoring_config import ClipConfig
from pipelines.units import ProgressCallback, run_units, watching
from pipelines.workspace import Workspace

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

EMBEDDINGS_SCHEMA_VERSION = 1
_READ_THREADS = 8


@dataclass(frozen=True)
class EmbeddingsManifest:
    """The embeddings of one version by one model; ``version`` below is the sha256 of its bytes."""

    dataset: str
    dataset_version: str
    model: dict[str, Any]
    units: list[EmbeddedShard]
    counts: dict[str, int]
    schema_version: int = EMBEDDINGS_SCHEMA_VERSION

    def to_bytes(self) -> bytes:
        """Canonical JSON."""
        return canonical_json(asdict(self))

    @property
    def sha256(self) -> str:
        """What these embeddings are known by."""
        return sha256_bytes(self.to_bytes())

    @property
    def identity(self) -> ClipIdentity:
        """The model."""
        return ClipIdentity(**self.model)


@dataclass(frozen=True)
class EmbeddingsJob(Workspace):
    """One dataset version and one model; travels to the workers."""

    manifest: DatasetManifest
    version: str
    unit: EmbedTask
    weights: str
    environment: Mapping[str, str] = field(default_factory=dict, repr=False)

    @property
    def folder(self) -> str:
        """Where this model's embeddings of the dataset lie."""
        return storage.join(self.unit.dataset_root, self.unit.folder)

    @property
    def manifest_uri(self) -> str:
        """The address of the embeddings' manifest, which is written last."""
        return storage.join(self.folder, self.version, "manifest.json")


@dataclass(frozen=True)
class EmbeddingsResult:
    """Published embeddings. ``num_made`` of the shards were embedded by this call."""

    manifest_uri: str
    manifest: EmbeddingsManifest
    num_made: int


def store_of(manifest_uri: str) -> str:
    """``<store>`` of ``<store>/datasets/<name>/<version>/manifest.json``."""
    return store_root(dataset_root(manifest_uri))


def plan_embeddings(manifest_uri: str, config: ClipConfig) -> EmbeddingsJob:
    """What there is to embed, and with which model; reads the model, and no shard."""
    manifest = load_manifest(manifest_uri)
    identity, weights = identify(config)
    unit = EmbedTask(
        dataset_root=dataset_root(manifest_uri),
        identity=identity,
        weights_uri="",
        batch_size=config.batch_size,
        num_threads=config.num_threads,
        decode_threads=config.decode_threads,
        checkpoint_seconds=config.checkpoint_seconds,
        decode_deadline_seconds=config.decode_deadline_seconds,
    )
    return EmbeddingsJob(manifest, manifest.version, unit, weights)


def embed_dataset(
    manifest_uri: str,
    config: ClipConfig,
    spark: Callable[[], SparkSession],
    environment: Mapping[str, str] | None = None,
    progress: ProgressCallback | None = None,
) -> EmbeddingsResult:
    """Embed every image and caption of a published dataset version with Spark.

    ``spark`` is called when there is work to do. ``progress`` is called with (samples done,
    samples in all) from another thread. Killed at any moment, a second call embeds the shards that
    are missing. Two drivers cannot embed one dataset by one model at once: ``LeaseHeld``.
    """
    with applied(environment or {}):
        job = replace(plan_embeddings(manifest_uri, config), environment=dict(environment or {}))
        with Lease(storage.join(job.folder, "lease.json"), "embedding") as lease:
            refuse_while_removing(dataset_root(manifest_uri))
            done = finished_units(job)
            missing = [shard for shard in job.manifest.shards if shard.sha256 not in done]
            if missing:
                check_store(storage.join(job.unit.dataset_root, "work"))
                uri = publish_weights(
                    job.weights, job.unit.identity.weights_sha256, store_of(manifest_uri)
                )
                job = replace(job, unit=replace(job.unit, weights_uri=uri))
                sizes = {job.unit.marker_uri(s.sha256): s.num_samples for s in missing}
                with watching(sizes, job.manifest.counts["committed"], progress):
                    run_units(
                        spark(), job, len(missing), lambda i: _embed(job, missing[i]), LIBRARIES
                    )
                done = finished_units(job)
            forget_parts(job.folder, done)
            job.forget("failures")
            lease.check()
            embeddings = publish_embeddings(job, done)
        return EmbeddingsResult(job.manifest_uri, embeddings, len(missing))


def finished_units(job: EmbeddingsJob) -> dict[str, EmbeddedShard]:
    """Shard's sha256 -> marker, for the shards whose files are all there in full size."""
    listed = {info.uri: info.num_bytes for info in storage.list_objects(job.folder)}
    shards = [s for s in job.manifest.shards if job.unit.marker_uri(s.sha256) in listed]
    with ThreadPoolExecutor(_READ_THREADS) as pool:
        markers = list(pool.map(job.unit.read_marker, shards))

    def is_whole(entry: FileEntry) -> bool:
        return listed.get(storage.join(job.unit.dataset_root, entry.path)) == entry.num_bytes

    return {
        marker.shard_sha256: marker
        for marker in markers
        if marker is not None and all(map(is_whole, (marker.images, marker.texts, marker.rows)))
    }


def _embed(job: EmbeddingsJob, shard: ShardEntry) -> None:
    with job.task(f"embed-{shard.sha256[:32]}") as folder:
        embed_shard(job.unit, shard, folder)


def publish_embeddings(
    job: EmbeddingsJob, units: Mapping[str, EmbeddedShard]
) -> EmbeddingsManifest:
    """Write the manifest of what the markers say; every sample is embedded or has an error."""
    missing = [shard.path for shard in job.manifest.shards if shard.sha256 not in units]
    if missing:
        raise RuntimeError(f"{len(missing)} shards are not embedded, first: {missing[0]}")
    ordered = [replace(units[shard.sha256], shard=shard.path) for shard in job.manifest.shards]
    num_samples = sum(unit.num_samples for unit in ordered)
    num_embedded = sum(unit.num_embedded for unit in ordered)
    if num_samples != job.manifest.counts["committed"]:
        raise RuntimeError(
            f"{num_samples} samples of {job.manifest.counts['committed']} are accounted for"
        )
    embeddings = EmbeddingsManifest(
        dataset=job.manifest.name,
        dataset_version=job.version,
        model=dict(job.unit.identity.__dict__),
        units=ordered,
        counts={
            "samples": num_samples,
            "embedded": num_embedded,
            "failed": num_samples - num_embedded,
        },
    )
    storage.write_bytes(job.manifest_uri, embeddings.to_bytes())
    return embeddings


def load_embeddings(uri: str, sha256: str | None = None) -> EmbeddingsManifest:
    """Read an embeddings' manifest, checked against ``sha256`` where it is known."""
    data = storage.read_bytes(uri)
    found = sha256_bytes(data)
    if sha256 is not None and found != sha256:
        raise storage.DigestMismatch(uri, expected_sha256=sha256, got_sha256=found)
    try:
        return TypeAdapter(EmbeddingsManifest).validate_json(data, strict=True)
    except ValidationError as error:
        raise UserError(
            expected=f"a manifest of embeddings, schema {EMBEDDINGS_SCHEMA_VERSION}, at {uri}",
            got=str(error)[:200],
            remedy="embed the dataset again",
        ) from error


def embeddings_uri(dataset_root_uri: str, model_key: str, version: str) -> str:
    """The address of the embeddings' manifest of a dataset version by a model."""
    return storage.join(dataset_root_uri, embeddings_folder(model_key), version, "manifest.json")
