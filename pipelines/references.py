"""Images that must not come into a dataset: those of evaluation sets, and of other versions.

Each becomes a row beside the dataset's own images, ranked above all of them, so the rule that
keeps the best of several copies rejects whatever is like it. Of a published version the digests
and signatures are read from its shards; one made without signatures has its stored pictures
signed, which sees of a cropped picture what was stored of it.
"""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import pyarrow as pa

from infra import storage
from infra.digests import canonical_json, sha256_bytes
from infra.errors import UserError
from infra.manifest import DatasetManifest, dataset_root, load_manifest
from pipelines.clip_model import as_uri
from pipelines.config import CurationConfig
from pipelines.duplicate_config import DecontaminationConfig, DuplicateConfig
from pipelines.duplicates import CONTAMINATED_IMAGE, DUPLICATE_OF_OTHER, IMAGES, reference_rank
from pipelines.guard import Rejected
from pipelines.images import signature_of
from pipelines.shards import read_shard
from pipelines.workspace import Workspace

if TYPE_CHECKING:
    from pyspark.sql import DataFrame, SparkSession

IMAGE_ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp")
_FILES_PER_TASK = 8
_ID_CHARS = 32


@dataclass(frozen=True)
class Reference:
    """A shard of a published version, or an image; ``reason`` of what is like it.

    ``is_signed``: whether likeness counts, or bytes alone.
    """

    uri: str
    sha256: str
    kind: Literal["shard", "image"]
    reason: str
    is_signed: bool
    num_images: int = 1


def references_part(
    duplicates: DuplicateConfig, decontaminate: DecontaminationConfig
) -> dict[str, Any]:
    """What a recipe's images are compared with, for its key and its manifest; empty for nothing.

    Reads evaluation images, and of versions the manifests.
    """
    part: dict[str, Any] = {}
    if duplicates.against:
        part["against"] = sorted({_manifest(uri).version for uri in duplicates.against})
    digests = {each.sha256 for each in evaluation_images(decontaminate)}
    if digests:
        part["evaluation_images_sha256"] = sha256_bytes(canonical_json(sorted(digests)))
    return part


def find_references(config: CurationConfig) -> list[Reference]:
    """All that the images of ``config`` are compared with, beside each other."""
    found = evaluation_images(config.decontaminate)
    is_signed = config.duplicates.perceptual is not None
    for uri in config.duplicates.against:
        found += _shards_of(as_uri(uri), DUPLICATE_OF_OTHER, is_signed=is_signed)
    return found


def evaluation_images(config: DecontaminationConfig) -> list[Reference]:
    """The images of evaluation sets; ``UserError`` for an address with none."""
    found: list[Reference] = []
    for address in config.images:
        uri = as_uri(address)
        if uri.endswith("manifest.json"):
            found += _shards_of(uri, CONTAMINATED_IMAGE, is_signed=config.images_alike)
            continue
        listed = [uri] if storage.exists(uri) else [i.uri for i in storage.list_objects(uri)]
        images = sorted(each for each in listed if each.lower().endswith(IMAGE_ENDINGS))
        if not images:
            raise UserError(
                expected="in decontaminate.images an image, a folder of images or a manifest.json",
                got=address,
                remedy="correct the address, or remove it",
            )
        for image in images:
            sha256 = sha256_bytes(storage.read_bytes(image))
            found.append(Reference(image, sha256, "image", CONTAMINATED_IMAGE, config.images_alike))
    return found


def _manifest(address: str) -> DatasetManifest:
    try:
        return load_manifest(as_uri(address))
    except storage.ObjectMissing as error:
        raise UserError(
            expected="the address of a published version's manifest.json",
            got=address,
            remedy="`atelier diff` and the report name it; correct the address, or remove it",
        ) from error


def _shards_of(manifest_uri: str, reason: str, *, is_signed: bool) -> list[Reference]:
    root = dataset_root(manifest_uri)
    return [
        Reference(
            storage.join(root, each.path), each.sha256, "shard", reason, is_signed, each.num_samples
        )
        for each in _manifest(manifest_uri).shards
    ]


def read_reference(file: Reference) -> pa.RecordBatch:
    """The images of one shard, or the image it is, as ``IMAGES``."""
    data = storage.read_bytes(file.uri, file.sha256)
    rows: list[tuple[str, str, bytes | None]] = []
    if file.kind == "image":
        rows.append((file.sha256[:_ID_CHARS], file.sha256, _signature(file, file.uri, data)))
    else:
        for key, members in read_shard(data):
            known = json.loads(members["json"])
            image = next(name for name in members if name not in ("json", "txt"))
            signed = known.get("signature")
            rows.append(
                (
                    key,
                    known["sha256"],
                    base64.b64decode(signed)
                    if signed and file.is_signed
                    else _signature(file, f"{file.uri}, sample {key}", members[image]),
                )
            )
    return pa.RecordBatch.from_pydict(
        {
            "slot": pa.array([-1] * len(rows), pa.int32()),
            "rank": pa.array([reference_rank(file.reason, row[0]) for row in rows], pa.string()),
            "sha256": pa.array([row[1] for row in rows], pa.string()),
            "signature": pa.array([row[2] for row in rows], pa.binary()),
            "caption": pa.nulls(len(rows), pa.int64()),
        }
    )


def _signature(file: Reference, name: str, data: bytes) -> bytes | None:
    if not file.is_signed:
        return None
    try:
        return signature_of(data)
    except Rejected as rejected:
        raise UserError(
            expected=f"an image that can be decoded: {name}",
            got=str(rejected),
            remedy="replace it, or remove it from the set",
        ) from rejected


def reference_images(
    spark: SparkSession, workspace: Workspace, files: Sequence[Reference]
) -> DataFrame:
    """The images of ``files`` as ``IMAGES``, read on the workers."""

    def read(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        for batch in batches:
            for index in batch.column(0).to_pylist():
                with workspace.task(f"reference-{index:05d}"):
                    yield read_reference(files[index])

    num_tasks = math.ceil(len(files) / _FILES_PER_TASK)
    numbers = spark.range(0, len(files), 1, numPartitions=num_tasks)
    return numbers.mapInArrow(read, IMAGES)
