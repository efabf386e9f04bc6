"""A new version of a dataset from its scores: nothing is fetched and nothing is embedded again.

Samples below a threshold leave their shard and stay in the ledger, with the reason. A score that
was unknown takes the computed one. Only shards with such a sample are written again; the others
are listed as they are. The version it came from stays as it was, and is named as a parent.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import polars as pl
from pydantic import TypeAdapter, ValidationError

from infra import storage
from infra.config import semantic_part
from infra.digests import canonical_json, sha256_bytes
from infra.environment import applied
from infra.lease import Lease
from infra.manifest import (
    DatasetManifest,
    FileEntry,
    ShardEntry,
    publish_manifest,
)
from pipelines.config import PreferenceConfig, ShardConfig
from pipelines.embed import checked_bytes, publish_file
from pipelines.ledger import COMMITTED, REJECTED, LedgerFile
from pipelines.report import write_report
from pipelines.scores import SCORE_COLUMNS
from pipelines.shards import ShardWriter, preference_score, read_shard
from pipelines.units import ProgressCallback, run_units, watching
from pipelines.verdicts import RefilterJob, verdicts

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

_READ_THREADS = 8
_WHOLE_SHARD = ShardConfig(max_samples=1 << 40, max_bytes=1 << 50)
_CHANGED = ("disposition", "reason", "shard", *SCORE_COLUMNS, "aesthetic_scale")


@dataclass(frozen=True)
class RefilteredShard:
    """What one shard became: itself, a smaller one, or none. ``changes`` has a row per sample."""

    shards: list[ShardEntry]
    changes: FileEntry | None
    rejected: dict[str, int]


@dataclass(frozen=True)
class RefilteredLedger:
    """What one ledger file became."""

    ledger: FileEntry


@dataclass(frozen=True)
class RefilterResult:
    """The published version, and how many of its parent's shards were written again."""

    manifest_uri: str
    manifest: DatasetManifest
    num_rewritten: int


def refilter(
    job: RefilterJob,
    spark: Callable[[], SparkSession],
    progress: ProgressCallback | None = None,
) -> RefilterResult:
    """Publish the version that ``job`` selects. Killed at any moment, a second call goes on."""
    with (
        applied(job.environment),
        Lease(storage.join(job.folder, "lease.json"), "refilter") as held,
    ):
        shards = _finish(job, "shards", len(job.manifest.shards), RefilteredShard, spark, progress)
        ledgers = _finish(job, "ledger", len(job.manifest.ledger), RefilteredLedger, spark, None)
        manifest = assemble(job, shards, ledgers)
        held.check()
        uri = publish_manifest(job.dataset_root, manifest)
        write_report(uri, manifest)
    return RefilterResult(uri, manifest, sum(each.changes is not None for each in shards))


def _lease(job: RefilterJob) -> Lease:
    return Lease(storage.join(job.folder, "lease.json"), f"refilter of {job.manifest.name}")


def _finish(
    job: RefilterJob,
    kind: str,
    count: int,
    marker: type[Any],
    spark: Callable[[], SparkSession],
    progress: ProgressCallback | None,
) -> list[Any]:
    """Run the units that lack a marker with all its files; returns every marker in order."""
    found = finished_units(job, kind, count, marker)
    missing = [index for index in range(count) if index not in found]
    if missing:
        sizes = {job.marker_uri(kind, index): _num_rows(job, kind, index) for index in missing}
        total = sum(_num_rows(job, kind, index) for index in range(count))
        with watching(sizes, total, progress):
            run_units(spark(), job, len(missing), lambda n: run_unit(job, kind, missing[n]))
        found = finished_units(job, kind, count, marker)
    return [found[index] for index in range(count)]


def _num_rows(job: RefilterJob, kind: str, index: int) -> int:
    if kind == "shards":
        return job.manifest.shards[index].num_samples
    return job.manifest.ledger[index].num_rows


def finished_units(job: RefilterJob, kind: str, count: int, marker: type[Any]) -> dict[int, Any]:
    listed = {
        info.uri: info.num_bytes
        for folder in (
            job.folder,
            *(storage.join(job.dataset_root, f) for f in ("shards", "ledger")),
        )
        for info in storage.list_objects(folder)
    }

    def read(index: int) -> Any:
        try:
            data = storage.read_bytes(job.marker_uri(kind, index))
            found = TypeAdapter(marker).validate_json(data, strict=True)
        except (storage.ObjectMissing, ValidationError):
            return None
        files = (
            [*found.shards, found.changes] if isinstance(found, RefilteredShard) else [found.ledger]
        )
        is_whole = all(
            listed.get(storage.join(job.dataset_root, each.path)) == each.num_bytes
            for each in files
            if each is not None
        )
        return found if is_whole else None

    with ThreadPoolExecutor(_READ_THREADS) as pool:
        markers = dict(enumerate(pool.map(read, range(count))))
    return {index: marker for index, marker in markers.items() if marker is not None}


def run_unit(job: RefilterJob, kind: str, index: int) -> None:
    """One Spark task: a shard, or a ledger file once all shards are done."""
    with job.task(f"{kind}-{index:06d}") as folder:
        made: RefilteredShard | RefilteredLedger
        if kind == "shards":
            made = _refilter_shard(job, index, folder)
        else:
            made = _refilter_ledger(job, job.manifest.ledger[index], folder)
        storage.write_json(job.marker_uri(kind, index), asdict(made))


def _refilter_shard(job: RefilterJob, index: int, folder: Path) -> RefilteredShard:
    shard = job.manifest.shards[index]
    found = verdicts(job, job.embeddings.units[index], job.scores.units[index].scores)
    gone = found.filter(pl.col("reason").is_not_null())
    if gone.is_empty() and not found["is_changed"].any():
        return RefilteredShard([shard], None, {})
    by_id = {row["sample_id"]: row for row in found.iter_rows(named=True)}
    data = checked_bytes(storage.join(job.dataset_root, shard.path), shard.sha256)
    with ShardWriter(_WHOLE_SHARD, job.dataset_root, folder) as writer:
        for key, members in read_shard(data):
            row = by_id[key]
            if row["reason"] is None:
                writer.add(key, _rescored(job, members, row) if row["is_changed"] else members)
        shards = writer.finish()
    scale = (
        pl.when("aesthetic_score_taken")
        .then(pl.lit(job.config.aesthetic_scale))
        .otherwise(pl.lit(None, pl.String))
    )
    taken = [pl.when(f"{name}_taken").then(pl.col(name)).alias(name) for name in SCORE_COLUMNS]
    is_kept = pl.col("reason").is_null()
    changes = found.select(
        "sample_id",
        pl.when(is_kept).then(pl.lit(COMMITTED)).otherwise(pl.lit(REJECTED)).alias("disposition"),
        "reason",
        pl.when(is_kept).then(pl.lit(shards[0].path if shards else None, pl.String)).alias("shard"),
        *taken,
        scale.alias("aesthetic_scale"),
    )
    path = folder / "changes.parquet"
    changes.write_parquet(path)
    entry = publish_file(
        path, job.dataset_root, f"{job.relative}/changes", "parquet", changes.height
    )
    counts = dict(sorted(Counter(gone["reason"].to_list()).items()))
    return RefilteredShard(shards, entry, counts)


def _rescored(
    job: RefilterJob, members: dict[str, bytes], row: Mapping[str, Any]
) -> dict[str, bytes]:
    """The sample with computed scores in its ``.json``, each with the head and model it is from."""
    known = json.loads(members["json"])
    provenance = job.scores.provenance()
    origin = dict(known.get("score_models") or {})
    for name in SCORE_COLUMNS:
        if row[f"{name}_taken"]:
            known[name] = round(row[name], 6)
            origin[name] = provenance[name]
    if row["aesthetic_score_taken"]:
        known["aesthetic_scale"] = job.config.aesthetic_scale
        recipe = job.manifest.attributes.get("recipe", {})
        preference = PreferenceConfig.model_validate(recipe.get("preference", {}))
        known["preference_score"] = preference_score(known["aesthetic_score"], preference)
    return members | {"json": canonical_json(known | {"score_models": origin})}


def _refilter_ledger(job: RefilterJob, ledger: FileEntry, folder: Path) -> RefilteredLedger:
    data = checked_bytes(storage.join(job.dataset_root, ledger.path), ledger.sha256)
    rows = pl.read_parquet(data)
    here = set(rows["shard"].drop_nulls().unique())
    frames = []
    for index, shard in enumerate(job.manifest.shards):
        if shard.path in here:
            made = storage.read_json(job.marker_uri("shards", index))["changes"]
            if made is not None:
                uri = storage.join(job.dataset_root, made["path"])
                frames.append(pl.read_parquet(checked_bytes(uri, made["sha256"])))
    if not frames:
        return RefilteredLedger(ledger)
    # A rejected copy of a row may have the id of the one that was committed: that one alone moves.
    changes = pl.concat(frames).with_columns(pl.lit(COMMITTED).alias("was"))
    joined = rows.join(
        changes,
        left_on=["sample_id", "disposition"],
        right_on=["sample_id", "was"],
        how="left",
        suffix="_new",
        maintain_order="left",
    )
    moved = pl.col("disposition_new").is_not_null()
    updated = joined.with_columns(
        pl.when(moved).then(f"{name}_new").otherwise(name).alias(name)
        if name in ("disposition", "reason", "shard")
        else pl.coalesce(f"{name}_new", name).alias(name)
        for name in _CHANGED
    ).select(rows.columns)
    with LedgerFile(folder, f"refilter {ledger.path}") as file:
        file.add(updated)
        entry = file.publish(job.dataset_root)
    if entry is None or entry.num_rows != ledger.num_rows:
        raise RuntimeError(f"{ledger.path} had {ledger.num_rows} rows, the new one has others")
    return RefilteredLedger(entry)


def assemble(
    job: RefilterJob, shards: Sequence[RefilteredShard], ledgers: Sequence[RefilteredLedger]
) -> DatasetManifest:
    """The new version's manifest: every row of the old one ends in exactly one place."""
    old = job.manifest
    taken: Counter[str] = Counter()
    for each in shards:
        taken.update(each.rejected)
    rejected = Counter(old.rejected) + taken
    selection = {
        "thresholds": semantic_part(job.config),
        "scores": job.scores.sha256,
        "models": job.scores.provenance(),
    }
    return replace(
        old,
        recipe_fingerprint=sha256_bytes(
            canonical_json({"parent": old.recipe_fingerprint, "refilter": selection["thresholds"]})
        ),
        shards=[entry for each in shards for entry in each.shards],
        ledger=sorted((each.ledger for each in ledgers), key=lambda entry: entry.path),
        counts={
            **old.counts,
            COMMITTED: old.counts[COMMITTED] - taken.total(),
            REJECTED: old.counts[REJECTED] + taken.total(),
        },
        rejected=dict(rejected),
        parents=[{"dataset": old.name, "version": old.version}, {"scores": job.scores.sha256}],
        attributes={**old.attributes, "refilter": selection},
    )
