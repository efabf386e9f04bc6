"""A published version without its copies and what evaluation sets hold; nothing is fetched.

What leaves is decided as in a curation, by ``duplicates_among`` and the same prompts. Digests and
captions are read from the shards, and signatures, where samples have them; else the stored
pictures are signed.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import polars as pl
import pyarrow as pa

from infra import storage
from infra.config import semantic_part
from infra.digests import canonical_json, sha256_bytes
from infra.environment import applied
from infra.lease import Lease
from infra.manifest import DatasetManifest, dataset_root, load_manifest
from pipelines.config import CurationConfig
from pipelines.decontaminate import CONTAMINATED, decontamination_part, repeats_a_prompt
from pipelines.derive import Derivation
from pipelines.duplicates import DUPLICATES, IMAGES, duplicates_among, rank_of
from pipelines.engine import run_by_slot
from pipelines.exclusive import refuse_while_removing
from pipelines.images import signature_of
from pipelines.references import find_references, reference_images, references_part
from pipelines.scoring_config import PruneConfig
from pipelines.shards import read_shard
from pipelines.workspace import one_line_errors

if TYPE_CHECKING:
    from pyspark.sql import DataFrame, SparkSession

PRUNE_VERSION = 1
_SEEN = f"{IMAGES}, is_contaminated boolean"
_LEAVING: dict[str, pl.DataType] = {
    "sample_id": pl.String(),
    "reason": pl.String(),
    "detail": pl.String(),
}


@dataclass(frozen=True)
class PruneJob(Derivation):
    """One version and what to take out of it; travels to the workers."""

    kind: ClassVar[str] = "prune"

    dataset_root: str
    manifest: DatasetManifest
    config: PruneConfig
    references: Mapping[str, Any]
    environment: Mapping[str, str] = field(default_factory=dict, repr=False)

    @property
    def key(self) -> str:
        """The sha256 over everything that decides the new version."""
        identity = {
            "dataset": self.manifest.version,
            "prune": self.choices(),
            "references": self.references,
            "version": PRUNE_VERSION,
        }
        return sha256_bytes(canonical_json(identity))

    @property
    def asked(self) -> CurationConfig:
        """The rules, as a curation has them."""
        rules = {name: getattr(self.config, name) for name in ("duplicates", "decontaminate")}
        return CurationConfig(metadata=["(published)"], **rules)

    def leaving_uri(self, index: int) -> str:
        """Where it is noted what leaves the n-th shard."""
        return storage.join(self.folder, "leaving", f"{index:06d}.json")

    @property
    def judged_uri(self) -> str:
        """Written once all of that is noted."""
        return storage.join(self.folder, "judged.json")

    def decide(self, index: int, folder: Path) -> pl.DataFrame:
        """The samples that leave, each with what it is like."""
        found = storage.read_json(self.leaving_uri(index))
        return pl.DataFrame(found, schema=_LEAVING, orient="row")

    def choices(self) -> dict[str, Any]:
        """The rules."""
        return semantic_part(self.config)

    def record(self) -> dict[str, Any]:
        """The rules, and what was compared with."""
        return {"rules": self.choices(), **self.references}


def prune_job(
    manifest_uri: str, config: PruneConfig, environment: Mapping[str, str] | None = None
) -> PruneJob:
    """What ``config`` takes out of a version; reads the evaluation sets."""
    with applied(environment or {}):
        manifest = load_manifest(manifest_uri)
        references = prune_part(config)
    return PruneJob(
        dataset_root(manifest_uri), manifest, config, references, dict(environment or {})
    )


def prune_part(config: PruneConfig) -> dict[str, Any]:
    """What the recipe's operational fields name, by content."""
    return {
        **decontamination_part(config.decontaminate),
        **references_part(config.duplicates, config.decontaminate),
    }


def judge(job: PruneJob, spark: Callable[[], SparkSession]) -> None:
    """Find out what leaves each shard, unless that is known. Killed, it is found out again.

    ``LeaseHeld`` while another does.
    """
    held_by = f"{job.kind} of {job.manifest.name}"
    with (
        applied(job.environment),
        Lease(storage.join(job.folder, "lease.json"), held_by) as lease,
    ):
        refuse_while_removing(job.dataset_root)
        if storage.exists(job.judged_uri):
            return
        num_shards = len(job.manifest.shards)
        if num_shards:
            session = spark()
            with one_line_errors(job):
                run_by_slot(_verdicts(job, session), num_shards, lambda n, b: _note(job, n, b))
        lease.check()
        storage.write_json(job.judged_uri, {"shards": num_shards})


def _verdicts(job: PruneJob, spark: SparkSession) -> DataFrame:
    """``DUPLICATES`` of every shard, and a row that names no sample for each."""
    from pyspark.sql import functions as sf

    num_shards = len(job.manifest.shards)

    def see(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        for batch in batches:
            for index in batch.column(0).to_pylist():
                with job.task(f"seen-{index:06d}"):
                    yield _seen(job, index)

    numbers = spark.range(0, num_shards, 1, numPartitions=num_shards)
    seen = numbers.mapInArrow(see, _SEEN).persist()
    images = seen.where(~sf.col("is_contaminated")).drop("is_contaminated")
    references = find_references(job.asked)
    num_images = sum(shard.num_samples for shard in job.manifest.shards)
    if references:
        images = images.union(reference_images(spark, job, references))
        num_images += sum(each.num_images for each in references)
    found = duplicates_among(images, job.asked, num_images).where("slot >= 0")
    nothing = sf.lit(None).cast("string")
    by_caption = seen.where("is_contaminated").select(
        "slot", sf.substring_index("rank", "-", -1), sf.lit(CONTAMINATED), nothing
    )
    seeds = spark.range(num_shards).select(sf.col("id").cast("int"), nothing, nothing, nothing)
    return seeds.union(found).union(by_caption).toDF(*_names(DUPLICATES))


def _names(schema: str) -> list[str]:
    return [column.split()[0] for column in schema.split(", ")]


def _seen(job: PruneJob, index: int) -> pa.RecordBatch:
    """A shard's samples as ``_SEEN``."""
    shard = job.manifest.shards[index]
    data = storage.read_bytes(storage.join(job.dataset_root, shard.path), shard.sha256)
    rows: list[dict[str, Any]] = []
    for key, members in read_shard(data):
        known = json.loads(members["json"])
        signed = None
        if job.asked.signs_images and "signature" in known:
            signed = base64.b64decode(known["signature"])
        elif job.asked.signs_images:
            signed = signature_of(next(members[m] for m in members if m not in ("json", "txt")))
        texts = {known["caption"], *(each["text"] for each in known["captions"])}
        rows.append(
            {
                "slot": index,
                "rank": rank_of(0, known["aesthetic_score"], key),
                "sha256": known["sha256"],
                "signature": signed,
                "caption": int.from_bytes(bytes.fromhex(sha256_bytes(
                    str(known["caption"]).encode())[:16]), "big", signed=True),
                "is_contaminated": any(
                    repeats_a_prompt(text, job.config.decontaminate) for text in texts if text
                ),
            }
        )  # fmt: skip
    types = (pa.int32(), pa.string(), pa.string(), pa.binary(), pa.int64(), pa.bool_())
    schema = pa.schema(list(zip(_names(_SEEN), types, strict=True)))
    return pa.RecordBatch.from_pylist(rows, schema)


def _note(job: PruneJob, index: int, batches: Iterator[pa.RecordBatch]) -> int:
    with job.task(f"leaving-{index:06d}"):
        rows = pl.concat([pl.DataFrame(batch) for batch in batches]).drop_nulls("sample_id")
        # One reason each: a prompt's, else the first that was found.
        rows = rows.sort("sample_id", "reason").unique("sample_id", keep="first").sort("sample_id")
        storage.write_json(job.leaving_uri(index), rows.select(list(_LEAVING)).rows())
    return index
