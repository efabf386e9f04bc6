"""A version of a dataset made from another one: nothing is fetched again.

A ``Derivation`` decides shard by shard which samples leave and which are written anew. Only shards
with such a sample are written again; the others are listed as they are. Samples that leave stay in
the ledger, with the reason. The version it came from stays as it was, and is named as a parent.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import polars as pl
from pydantic import TypeAdapter

from infra import storage
from infra.digests import canonical_json, sha256_bytes
from infra.environment import applied
from infra.lease import Lease
from infra.manifest import (
    SHARD_SIZES,
    DatasetManifest,
    FileEntry,
    ShardEntry,
    publish_manifest,
)
from pipelines.buckets import moved
from pipelines.build import KEY_CHARS
from pipelines.config import ShardConfig
from pipelines.embed import publish_file
from pipelines.exclusive import refuse_while_removing
from pipelines.ledger import COMMITTED, FAILED, LEDGER_SCHEMA, REJECTED, LedgerFile, count, part_of
from pipelines.rejected import (
    Tray,
    offer_sample,
    publish_rejected,
    read_pictures,
    shards_pictured,
    without_taken_down,
    write_pictures,
)
from pipelines.report import write_report
from pipelines.shards import ShardWriter, read_shard
from pipelines.tombstones import load_tombstones
from pipelines.units import ProgressCallback, run_units, watching
from pipelines.workspace import Workspace, read_markers

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

SHARDS, LEDGER = "shards", "ledger"
_WHOLE_SHARD = ShardConfig(max_samples=1 << 40, max_bytes=1 << 50)
_ENDS = ("disposition", "reason", "shard")
Members = dict[str, bytes]


class Derivation(Workspace):
    """What makes one version from another. A frozen dataclass: it travels to the workers."""

    kind: ClassVar[str]
    dataset_root: str
    manifest: DatasetManifest

    @property
    def key(self) -> str:
        """The sha256 over everything that decides the new version."""
        raise NotImplementedError

    def affected(self) -> Sequence[int]:
        """The numbers of the shards that ``decide`` is asked about; the others stay, unread."""
        return range(len(self.manifest.shards))

    def decide(self, index: int, folder: Path) -> pl.DataFrame:
        """The samples of the n-th shard that leave or change; an empty frame keeps the shard.

        Columns: ``sample_id``; ``reason``, null for one that stays; and any of the ledger's, null
        where the ledger's value stays. Whatever else is there, ``rewrite`` gets.
        """
        raise NotImplementedError

    def rewrite(self, members: Members, decided: Mapping[str, Any]) -> Members:
        """A sample that stays and changes: its members from the old ones and its decided row."""
        return members

    def samples(self, index: int) -> Iterable[tuple[str, Members]]:
        """The samples of the n-th shard, in its order; those that leave may be empty."""
        shard = self.manifest.shards[index]
        data = storage.read_bytes(storage.join(self.dataset_root, shard.path), shard.sha256)
        return read_shard(data)

    def edit_ledger(self, rows: pl.DataFrame) -> pl.DataFrame:
        """A ledger file's rows, after those that left or changed; as many, in the same order."""
        return rows

    def choices(self) -> dict[str, Any]:
        """What a person chose, as JSON; goes into the new recipe fingerprint."""
        raise NotImplementedError

    def record(self) -> dict[str, Any]:
        """What the manifest says of this derivation: the choices, and what they rest on."""
        return self.choices()

    def parents(self) -> list[dict[str, Any]]:
        """What the new version was made from."""
        return [{"dataset": self.manifest.name, "version": self.manifest.version}]

    @property
    def relative(self) -> str:
        """The job's folder under the dataset's root."""
        return f"work/{self.kind}-{self.key[:KEY_CHARS]}"

    @property
    def folder(self) -> str:
        """The job's folder."""
        return storage.join(self.dataset_root, self.relative)

    def marker_uri(self, kind: str, index: int) -> str:
        """The marker of the n-th shard or ledger file."""
        return storage.join(self.folder, kind, f"{index:06d}.json")


@dataclass(frozen=True)
class DerivedShard:
    """What one shard became: itself, another one, or none. ``changes`` has what was decided,
    ``pictures`` shows some of what left."""

    shards: list[ShardEntry]
    changes: FileEntry | None
    pictures: FileEntry | None = None

    @property
    def files(self) -> list[FileEntry | ShardEntry]:
        return [*self.shards, *([self.changes] if self.changes else [])]


@dataclass(frozen=True)
class DerivedLedger:
    """What one ledger file became, and how its rows ended."""

    ledger: FileEntry
    committed: int
    rejected: dict[str, int]
    failed: dict[str, int]

    @property
    def files(self) -> list[FileEntry]:
        return [self.ledger]


@dataclass(frozen=True)
class DerivationResult:
    """The published version, and how many of its parent's shards were written again."""

    manifest_uri: str
    manifest: DatasetManifest
    num_rewritten: int


def derive(
    job: Derivation,
    spark: Callable[[], SparkSession],
    progress: ProgressCallback | None = None,
) -> DerivationResult:
    """Publish the version that ``job`` makes. Killed at any moment, a second call goes on.

    ``progress`` is called with (samples done, samples in all). Two of one job cannot run at once:
    ``LeaseHeld``.
    """
    held_by = f"{job.kind} of {job.manifest.name}"
    with (
        applied(job.environment),
        Lease(storage.join(job.folder, "lease.json"), held_by) as lease,
    ):
        refuse_while_removing(job.dataset_root)
        shards = _finish(job, SHARDS, DerivedShard, spark, progress)
        ledgers = _finish(job, LEDGER, DerivedLedger, spark, None)
        manifest = assemble(job, shards, ledgers)
        job.forget("failures")
        lease.check()
        uri = publish_manifest(job.dataset_root, manifest)
        pictures = (each.pictures for each in shards if each.pictures is not None)
        made = read_pictures(storage.join(job.dataset_root, entry.path) for entry in pictures)
        publish_rejected(job.dataset_root, manifest, made, job.manifest.version)
        write_report(uri, manifest, spark, job.environment)
        storage.write_json(storage.join(job.folder, "result.json"), {"version": manifest.version})
    return DerivationResult(uri, manifest, sum(each.changes is not None for each in shards))


def sizes_of(job: Derivation, kind: str) -> list[int]:
    """Samples per shard, or rows per ledger file."""
    if kind == SHARDS:
        return [shard.num_samples for shard in job.manifest.shards]
    return [ledger.num_rows for ledger in job.manifest.ledger]


def _finish(
    job: Derivation,
    kind: str,
    marker: type[Any],
    spark: Callable[[], SparkSession],
    progress: ProgressCallback | None,
) -> list[Any]:
    """Run the units that lack a marker with all its files; returns every marker in order."""
    sizes = sizes_of(job, kind)
    found = finished_units(job, kind, marker)
    missing = [index for index in range(len(sizes)) if index not in found]
    if missing:
        pending = {job.marker_uri(kind, index): sizes[index] for index in missing}
        with watching(pending, sum(sizes), progress):
            run_units(spark(), job, len(missing), lambda n: run_unit(job, kind, missing[n]))
        found = finished_units(job, kind, marker)
    return [found[index] for index in range(len(sizes))]


def finished_units(job: Derivation, kind: str, marker: type[Any]) -> dict[int, Any]:
    """Index -> marker, for the units whose marker and files are all there in full size.

    Shards that are not affected are done, as what they are.
    """
    folders = (job.folder, *(storage.join(job.dataset_root, each) for each in (SHARDS, LEDGER)))
    listed = {
        info.uri: info.num_bytes for folder in folders for info in storage.list_objects(folder)
    }
    asked = set(job.affected() if kind == SHARDS else range(len(job.manifest.ledger)))
    noted = sorted(index for index in asked if job.marker_uri(kind, index) in listed)
    markers = read_markers((job.marker_uri(kind, index) for index in noted), marker)
    found: dict[int, Any] = {
        index: made
        for index, made in zip(noted, markers, strict=True)
        if made is not None
        and all(
            listed.get(storage.join(job.dataset_root, each.path)) == each.num_bytes
            for each in made.files
        )
    }
    if kind == SHARDS:
        shards = enumerate(job.manifest.shards)
        found |= {n: DerivedShard([shard], None) for n, shard in shards if n not in asked}
    return found


def run_unit(job: Derivation, kind: str, index: int) -> None:
    """One Spark task: a shard, or a ledger file once all shards are done."""
    with job.task(f"{kind}-{index:06d}") as folder:
        made: DerivedShard | DerivedLedger
        if kind == SHARDS:
            made = _derive_shard(job, index, folder)
        else:
            made = _derive_ledger(job, job.manifest.ledger[index], folder)
        storage.write_json(job.marker_uri(kind, index), asdict(made))


def _derive_shard(job: Derivation, index: int, folder: Path) -> DerivedShard:
    shard = job.manifest.shards[index]
    decided = job.decide(index, folder)
    if decided.is_empty():
        return DerivedShard([shard], None)
    by_id = {row["sample_id"]: row for row in decided.iter_rows(named=True)}
    tray = Tray()
    is_pictured = shard.path in shards_pictured(job.manifest)
    with ShardWriter(_WHOLE_SHARD, job.dataset_root, folder) as writer:
        for key, members in job.samples(index):
            row = by_id.pop(key, None)
            if row is None:
                writer.add(key, members)
            elif row["reason"] is None:
                writer.add(key, job.rewrite(members, row))
            elif is_pictured and members:
                offer_sample(tray, row["reason"], key, members)
        shards = writer.finish()
    if by_id:
        raise RuntimeError(f"{shard.path} has no sample {min(by_id)}")
    path = folder / "changes.parquet"
    known = [name for name in decided.columns if name in LEDGER_SCHEMA.names]
    decided.select(known).write_parquet(path)
    relative = f"{job.relative}/changes"
    entry = publish_file(path, job.dataset_root, relative, "parquet", decided.height)
    pictures = without_taken_down(tray.frame(), load_tombstones(job.dataset_root))
    if pictures.is_empty():
        return DerivedShard(shards, entry)
    path = write_pictures(pictures, folder)
    relative = f"{job.relative}/pictures"
    shown = publish_file(path, job.dataset_root, relative, "parquet", pictures.height)
    return DerivedShard(shards, entry, shown)


def _derive_ledger(job: Derivation, ledger: FileEntry, folder: Path) -> DerivedLedger:
    data = storage.read_bytes(storage.join(job.dataset_root, ledger.path), ledger.sha256)
    rows = pl.read_parquet(data)
    updated = job.edit_ledger(_with_changes(job, rows))
    counts = count(updated)
    entry = ledger
    if not updated.equals(rows):
        with LedgerFile(folder, part_of(data)) as file:
            file.add(updated)
            entry = file.publish(job.dataset_root) or ledger
    if entry.num_rows != ledger.num_rows or counts.num_rows != ledger.num_rows:
        raise RuntimeError(f"{ledger.path} had {ledger.num_rows} rows, the new one has others")
    return DerivedLedger(entry, counts.committed, counts.rejected, counts.failed)


def _with_changes(job: Derivation, rows: pl.DataFrame) -> pl.DataFrame:
    """The rows whose shard was written again, as they ended now."""
    here = set(rows["shard"].drop_nulls().unique())
    for index in job.affected():
        shard = job.manifest.shards[index]
        if shard.path not in here:
            continue
        made = TypeAdapter(DerivedShard).validate_python(
            storage.read_json(job.marker_uri(SHARDS, index))
        )
        if made.changes is not None:
            uri = storage.join(job.dataset_root, made.changes.path)
            changes = pl.read_parquet(storage.read_bytes(uri, made.changes.sha256))
            rows = _with_shard(rows, changes, shard.path, made.shards)
    return rows


def _with_shard(
    rows: pl.DataFrame, changes: pl.DataFrame, old: str, shards: Sequence[ShardEntry]
) -> pl.DataFrame:
    """The rows of the shard ``old`` moved to the new one, or out, and with what was decided."""
    # A rejected copy of a row may have the id of the one in the shard: that one alone changes.
    here = changes.with_columns(pl.lit(old).alias("shard"), pl.lit(True).alias("is_decided"))
    joined = rows.join(
        here, on=["sample_id", "shard"], how="left", suffix="_new", maintain_order="left"
    )
    gone = pl.col("is_decided") & pl.col("reason_new").is_not_null()
    new = pl.lit(shards[0].path if shards else None, pl.String)
    ends = [
        pl.when(gone).then(pl.lit(REJECTED)).otherwise("disposition").alias("disposition"),
        pl.when(gone).then("reason_new").otherwise("reason").alias("reason"),
        pl.when(gone)
        .then(pl.lit(None, pl.String))
        .when(pl.col("shard") == old)
        .then(new)
        .otherwise("shard")
        .alias("shard"),
    ]
    others = [
        pl.coalesce(f"{name}_new", name).alias(name)
        for name in rows.columns
        if f"{name}_new" in joined.columns and name not in _ENDS
    ]
    return joined.with_columns(*ends, *others).select(rows.columns)


def assemble(
    job: Derivation, shards: Sequence[DerivedShard], ledgers: Sequence[DerivedLedger]
) -> DatasetManifest:
    """The new version's manifest: every row of the old one ends in exactly one place."""
    old = job.manifest
    rejected: Counter[str] = Counter()
    failed: Counter[str] = Counter()
    for each in ledgers:
        rejected.update(each.rejected)
        failed.update(each.failed)
    entries = [entry for each in shards for entry in each.shards]
    counts = {
        "rows_in": old.counts["rows_in"],
        COMMITTED: sum(each.committed for each in ledgers),
        REJECTED: rejected.total(),
        FAILED: failed.total(),
    }
    in_shards = sum(entry.num_samples for entry in entries)
    ended = counts[COMMITTED] + counts[REJECTED] + counts[FAILED]
    if counts[COMMITTED] != in_shards or ended != counts["rows_in"]:
        raise RuntimeError(
            f"{counts['rows_in']} rows went in, {ended} are accounted for; "
            f"{counts[COMMITTED]} are committed, {in_shards} are in shards"
        )
    fingerprint = {"parent": old.recipe_fingerprint, job.kind: job.choices()}
    before = old.attributes.get("derivations", [])
    attributes = {**old.attributes, "derivations": [*before, {"kind": job.kind, **job.record()}]}
    if SHARD_SIZES in attributes:
        made = [each.shards for each in shards]
        attributes[SHARD_SIZES] = moved(attributes[SHARD_SIZES], old.shards, made)
    return replace(
        old,
        recipe_fingerprint=sha256_bytes(canonical_json(fingerprint)),
        shards=entries,
        ledger=sorted((each.ledger for each in ledgers), key=lambda entry: entry.path),
        counts=counts,
        rejected=dict(rejected),
        failed=dict(failed),
        parents=job.parents(),
        attributes=attributes,
    )
