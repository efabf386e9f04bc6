"""Working files of a finished build, made again from its version and the inputs.

A retry goes on from working files. They are gone after a takedown or a cleaning, and after a repair
they are those of the version before. The ledger knows how every row ended, the inputs have the
captions, and the shards the signatures; nothing is asked of the web.

Two steps: per ledger file the marker of the unit or partition whose rows it has, then per partition
the rows. Only those that are worth a retry, or that have an image to compare with, get their ends
back; of an image no byte is needed, for it is in its shard.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

import polars as pl
import pyarrow as pa

from infra import storage
from infra.errors import UserError
from infra.manifest import SHARD_SIZES, DatasetManifest, FileEntry, ShardEntry
from pipelines.build import Build, PartMarker, ReadMarker
from pipelines.captions import caption_counts
from pipelines.duplicates import (
    CONTAMINATED_IMAGE,
    DUPLICATE_IMAGE,
    DUPLICATE_OF_OTHER,
    NEAR_DUPLICATE,
    PLACEHOLDER,
)
from pipelines.inputs import Unit
from pipelines.ledger import COMMITTED, REJECTED, count, is_worth_a_retry, part_of
from pipelines.outcomes import OUTCOME_SCHEMA
from pipelines.plan import metadata_units
from pipelines.read_rows import TRAVEL_SCHEMA, without_removed
from pipelines.recorded import FETCHED, matches
from pipelines.references import Reference, read_reference
from pipelines.stage_images import images_path, in_round, leave, prepared_rows

# What write_shards says of images that others are compared with, though they stay out.
_COPIES = (DUPLICATE_IMAGE, NEAR_DUPLICATE, PLACEHOLDER, DUPLICATE_OF_OTHER, CONTAMINATED_IMAGE)
_ENDS = ("disposition", "reason", "retryable", "detail", *FETCHED.values())


def restore_ends(
    build: Build, manifest: DatasetManifest, units: Sequence[Unit], index: int
) -> None:
    """One task: the marker of the unit or partition whose rows the n-th ledger file has."""
    with build.task(f"restored-ledger-{index:06d}"):
        entry = manifest.ledger[index]
        data = storage.read_bytes(storage.join(build.dataset_root, entry.path), entry.sha256)
        kind, _, number = part_of(data).partition("-")
        if kind not in ("read", "part") or not number.isdecimal():
            raise UserError(
                expected=f"in {entry.path} the name of the work whose rows it has",
                got=part_of(data) or "none",
                remedy="curate without --retry-failed, or under another name",
            )
        rows = pl.read_parquet(data)
        counts = count(rows)
        if kind == "read":
            unit = units[int(number)]
            build.write(_read(manifest, units, unit, counts.rejected, entry), unit.index)
            return
        named = set(rows["shard"].drop_nulls().unique())
        shards = [shard for shard in manifest.shards if shard.path in named]
        sizes = manifest.attributes.get(SHARD_SIZES, {})
        marker = PartMarker(
            shards=shards,
            ledger=entry,
            committed=counts.committed,
            rejected=counts.rejected,
            failed=counts.failed,
            shard_sizes={each.path: sizes[each.path] for each in shards if each.path in sizes},
            recorded=matches(rows),
        )
        build.write(marker, int(number))


def restore_empty(build: Build, manifest: DatasetManifest, units: Sequence[Unit]) -> None:
    """After ``restore_ends``: the markers of those that have no row in the ledger."""
    for index in metadata_units(units) - build.read_all(ReadMarker, len(units)).keys():
        build.write(_read(manifest, units, units[index], {}, None), index)
    known = build.read_all(PartMarker, build.num_partitions).keys()
    for index in range(build.num_partitions):
        if index not in known:
            build.write(PartMarker([], None, 0, {}, {}), index)


def _read(
    manifest: DatasetManifest,
    units: Sequence[Unit],
    unit: Unit,
    rejected: dict[str, int],
    ledger: FileEntry | None,
) -> ReadMarker:
    num_rows = sum(unit.file.row_groups[n] for n in unit.row_groups) * unit.file.rows_per_record
    # What is unknown is counted for all rows together; one unit has the sum.
    is_first = unit.index == min(metadata_units(units))
    return ReadMarker(
        num_rows=num_rows,
        num_kept=num_rows - sum(rejected.values()),
        rejected=rejected,
        ledger=ledger,
        unknown=manifest.attributes.get("unknown", {}) if is_first else {},
    )


def restore_rows(build: Build, partition: int, batches: Iterable[pa.RecordBatch]) -> None:
    """One task: the partition's rows as a fetch left them, from the inputs' and its ledger.

    Raises ``RuntimeError`` when a row that is worth a retry is not among those of the inputs.
    """
    with build.task(f"restored-{partition:05d}") as folder:
        part = build.read(PartMarker, partition)
        if part is None:
            raise storage.ObjectMissing(build.marker_uri(PartMarker, partition))
        rows = prepared_rows(pa.Table.from_batches(batches, TRAVEL_SCHEMA), build.config)
        rows = without_removed(rows, build.tombstones)
        ends = _ends(build, part)
        rows = _with_ends(rows, ends.join(_signatures(build, part.shards), "sample_id", "left"))
        num_waiting = ends.filter(is_worth_a_retry()).height
        if rows.filter(is_worth_a_retry()).height != num_waiting:
            raise RuntimeError(f"{num_waiting} rows of {part.ledger} are not those of the inputs")
        build.write(replace(part, captions=caption_counts(rows)), partition)
        images = images_path(folder, 0)
        images.touch()
        leave(build, partition, rows, folder, images, round=0, pace=(part.seconds, 0))


def _ends(build: Build, part: PartMarker) -> pl.DataFrame:
    """By sample id, how the rows ended that are worth a retry or have an image to compare with."""
    columns = ["sample_id", *_ENDS]
    if part.ledger is None:
        return pl.DataFrame(
            schema={name: OUTCOME_SCHEMA.get(name, pl.String()) for name in columns}
        )
    uri = storage.join(build.dataset_root, part.ledger.path)
    rows = pl.read_parquet(storage.read_bytes(uri, part.ledger.sha256), columns=columns)
    is_copy = pl.col("reason").is_in(_COPIES)
    has_image = pl.col("sha256").is_not_null() & ((pl.col("disposition") == COMMITTED) | is_copy)
    # In a fetch's rows, one that has an image has not ended yet.
    return rows.filter(is_worth_a_retry() | has_image).with_columns(
        pl.when(has_image).then(pl.lit(None, pl.String)).otherwise(name).alias(name)
        for name in ("disposition", "reason", "detail")
    )


def _with_ends(rows: pl.DataFrame, ends: pl.DataFrame) -> pl.DataFrame:
    """The rows in a fetch's columns. All others ended for good: why, only the ledger knows."""
    asked = rows.with_columns(is_asked=pl.col("reason").is_null(), refused=pl.col("reason"))
    joined = asked.drop("reason").join(
        ends.with_columns(is_known=True), on="sample_id", how="left", maintain_order="left"
    )
    is_known = pl.col("is_asked") & pl.col("is_known").fill_null(False)
    otherwise = {
        "disposition": pl.lit(REJECTED),
        "reason": pl.col("refused"),
        "retryable": pl.lit(False),
    }
    outcome = [
        pl.when(is_known).then(pl.col(name)).otherwise(otherwise.get(name)).cast(kind).alias(name)
        if name in ends.columns
        else pl.lit(None, kind).alias(name)
        for name, kind in OUTCOME_SCHEMA.items()
    ]
    columns = [name for name in rows.columns if name != "reason"]
    return joined.select(*columns, *outcome, in_round(0))


def _signatures(build: Build, shards: Sequence[ShardEntry]) -> pl.DataFrame:
    """By sample id, what the samples of these shards look like; of the shards, one at a time."""
    found = [pl.DataFrame(schema={"sample_id": pl.String(), "signature": pl.Binary()})]
    for shard in shards if build.config.signs_images else []:
        uri = storage.join(build.dataset_root, shard.path)
        file = Reference(uri, shard.sha256, "shard", DUPLICATE_OF_OTHER, is_signed=True)
        images = pl.DataFrame(pl.from_arrow(read_reference(file)))
        sample_id = pl.col("rank").str.split("-").list.last().alias("sample_id")
        found.append(images.select(sample_id, "signature"))
    return pl.concat(found)
