"""First task: a unit of input becomes rows for the partitions, and a ledger of the rejected.

Polars filters whole row groups; only rows that stay travel. A row's partition comes from its URL,
so that copies of one URL and its long captions meet in one partition whatever files they are in.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import polars as pl
import pyarrow as pa

from pipelines.build import Build, ReadMarker
from pipelines.columns import CANONICAL_SCHEMA
from pipelines.filters import first_reason, metadata_filters
from pipelines.inputs import Unit, read_captions, read_metadata
from pipelines.ledger import REJECTED, LedgerFile, count

# What travels: rows, long captions (``is_caption``) and one empty seed per slot (no ``url``).
TRAVEL_SCHEMA = pa.schema(
    [
        pa.field("slot", pa.int32()),
        pa.field("is_caption", pa.bool_()),
        pa.field("model", pa.string()),
        *CANONICAL_SCHEMA,
    ]
)


@dataclass(frozen=True)
class Slots:
    """The partitions still to be fetched, in order: the n-th is Spark's partition n."""

    partitions: tuple[int, ...]
    num_partitions: int

    def by_partition(self) -> Mapping[int, int]:
        return {partition: slot for slot, partition in enumerate(self.partitions)}


def partition_of(url: str, num_partitions: int) -> int:
    """The partition of a URL: its CRC-32 modulo the number of partitions."""
    return zlib.crc32(url.encode("utf-8")) % num_partitions


def seeds(slots: Slots) -> pa.RecordBatch:
    """One row per slot that says nothing: every partition's task gets to run."""
    count_slots = len(slots.partitions)
    columns = {
        name: pa.nulls(count_slots, kind)
        for name, kind in zip(TRAVEL_SCHEMA.names, TRAVEL_SCHEMA.types, strict=True)
    }
    columns["slot"] = pa.array(range(count_slots), pa.int32())
    return pa.RecordBatch.from_pydict(columns, schema=TRAVEL_SCHEMA)


def read_rows(build: Build, unit: Unit, slots: Slots) -> Iterator[pa.RecordBatch]:
    """Yield what goes on to ``slots``; write the unit's ledger and marker when not there yet."""
    with build.task(f"read-{unit.index:05d}") as folder:
        if unit.file.kind == "captions":
            captions = read_captions(unit, build.config)
            rows = captions.with_columns(pl.lit(True).alias("is_caption"))
        else:
            filters = metadata_filters(build.config.filters)
            rows = read_metadata(unit, build.config).with_columns(first_reason(filters))
            kept = pl.col("reason").is_null()
            if build.read(ReadMarker, unit.index) is None:
                rejected = rows.filter(~kept).with_columns(pl.lit(REJECTED).alias("disposition"))
                with LedgerFile(folder, f"read-{unit.index:05d}") as ledger:
                    ledger.add(rejected)
                    marker = ReadMarker(
                        num_rows=rows.height,
                        num_kept=rows.height - rejected.height,
                        rejected=count(rejected).rejected,
                        ledger=ledger.publish(build.dataset_root),
                    )
                build.write(marker, unit.index)
            rows = rows.filter(kept).with_columns(pl.lit(False).alias("is_caption"))
        yield from _travelling(rows, slots).to_batches()


def _travelling(rows: pl.DataFrame, slots: Slots) -> pa.Table:
    by_partition = slots.by_partition()
    slot_of_row = [
        by_partition.get(partition_of(url, slots.num_partitions), -1) for url in rows["url"]
    ]
    rows = rows.with_columns(pl.Series("slot", slot_of_row, dtype=pl.Int32))
    rows = rows.filter(pl.col("slot") >= 0)
    missing = [name for name in TRAVEL_SCHEMA.names if name not in rows.columns]
    rows = rows.with_columns(pl.lit(None).alias(name) for name in missing)
    return rows.select(TRAVEL_SCHEMA.names).to_arrow().cast(TRAVEL_SCHEMA)
