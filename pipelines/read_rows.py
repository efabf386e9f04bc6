"""First task: a unit of input becomes rows for the partitions, and a ledger of the rejected.

Polars filters batch by batch; only rows that stay travel. A row's partition comes from its URL,
so that copies of one URL and its long captions meet in one partition whatever files they are in.
"""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import polars as pl
import pyarrow as pa

from infra.manifest import FileEntry
from pipelines.build import Build, ReadMarker
from pipelines.columns import (
    CANONICAL_SCHEMA,
    Layout,
    RawRows,
    canonical_rows,
    own_captions,
    sample_ids,
)
from pipelines.config import CurationConfig
from pipelines.filters import Filter, first_reason, metadata_filters, unknown_kept
from pipelines.inputs import Unit, metadata_batches, read_captions
from pipelines.ledger import REJECTED, LedgerFile
from pipelines.sources import SOURCE_FORMATS
from pipelines.spelling import one_addresses
from pipelines.tar_samples import SCHEME
from pipelines.tombstones import TAKEDOWN, Tombstones

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

    def of_urls(self, urls: pl.Series) -> pl.Series:
        """Per URL the slot of its partition, or -1 when that is not to be fetched."""
        slot_of = np.full(self.num_partitions, -1, np.int32)
        slot_of[list(self.partitions)] = np.arange(len(self.partitions), dtype=np.int32)
        return pl.Series("slot", slot_of[partitions_of(urls, self.num_partitions)])


def partitions_of(urls: pl.Series, num_partitions: int) -> npt.NDArray[np.int64]:
    """The partition of each URL: the CRC-32 of its one spelling's bytes modulo their number.

    Copies of an address meet, however each is spelled. One hash that every machine and version
    computes alike, unlike Polars' own.
    """
    texts = one_addresses(urls).cast(pl.Binary).to_list()
    return np.fromiter(map(zlib.crc32, texts), np.int64, len(texts)) % num_partitions


def seeds(slots: Slots) -> pa.RecordBatch:
    """One row per slot that says nothing: every partition's task gets to run."""
    count_slots = len(slots.partitions)
    columns = {
        name: pa.nulls(count_slots, kind)
        for name, kind in zip(TRAVEL_SCHEMA.names, TRAVEL_SCHEMA.types, strict=True)
    }
    columns["slot"] = pa.array(range(count_slots), pa.int32())
    return pa.RecordBatch.from_pydict(columns, schema=TRAVEL_SCHEMA)


def read_rows(
    build: Build, unit: Unit, slots: Slots, companions: Sequence[Build] = ()
) -> Iterator[pa.RecordBatch]:
    """Yield what goes on to ``slots``; write the unit's ledger and marker when not there yet.

    ``companions`` reject the same rows; those without the marker get theirs, too.
    """
    with build.task(f"read-{unit.index:05d}") as folder:
        if unit.file.kind == "captions":
            for captions in read_captions(unit, build.config):
                yield from _travelling(captions, slots, is_caption=True)
            return
        is_new = build.read(ReadMarker, unit.index) is None
        tally = _Tally(build.config)
        with LedgerFile(folder, f"read-{unit.index:05d}") as ledger:
            batches = judged_batches(unit, build.config, without_rejected=not is_new)
            for table, layout, judged in batches:
                rows = without_removed(judged, build.tombstones)
                is_kept = rows["reason"].is_null()
                kept = rows.filter(is_kept)
                if is_new:
                    rejected = rows.filter(~is_kept)
                    tally.add(kept, rejected)
                    ledger.add(_with_ids(rejected).with_columns(disposition=pl.lit(REJECTED)))
                yield from _travelling(_with_ids(kept), slots, is_caption=False)
                if layout.synthetic:
                    urls = pl.select(pl.when(is_kept).then(rows["url"])).to_series()
                    max_chars = build.config.filters.max_caption_chars
                    long = own_captions(table, urls, layout, max_chars)
                    yield from _travelling(long, slots, is_caption=True)
            if is_new:
                for each in (build, *companions):
                    if each is build or each.read(ReadMarker, unit.index) is None:
                        each.write(tally.marker(ledger.publish(each.dataset_root)), unit.index)


def judged_batches(
    unit: Unit, config: CurationConfig, *, without_rejected: bool = False
) -> Iterator[tuple[RawRows, Layout, pl.DataFrame]]:
    """Per batch the table read, its layout, and its canonical rows with a ``reason`` or null.

    ``without_rejected``: many of those with a reason are not even read; see ``metadata_batches``.
    """
    batches = metadata_batches(unit, config, without_rejected=without_rejected)
    for table, layout in batches:
        reason = first_reason(_row_filters(layout, config))
        yield table, layout, canonical_rows(table, layout, config.source).with_columns(reason)


def _row_filters(layout: Layout, config: CurationConfig) -> list[Filter]:
    """The metadata filters; and only rows that lie in a tar may have an address inside one."""
    found = metadata_filters(config.filters)
    if SOURCE_FORMATS[layout.format].container != "tar":
        found.append(Filter(pl.col("url").str.starts_with(SCHEME), "scheme"))
    return found


def without_removed(rows: pl.DataFrame, tombstones: Tombstones) -> pl.DataFrame:
    """The rows, those that are taken down with that ``reason``."""
    if not tombstones:
        return rows
    reason = pl.when(tombstones.covers(rows)).then(pl.lit(TAKEDOWN)).otherwise("reason")
    return rows.with_columns(reason.alias("reason"))


class _Tally:
    """Counts of one unit, batch by batch."""

    def __init__(self, config: CurationConfig) -> None:
        self._unknown = unknown_kept(config.filters)
        self._num_rows = 0
        self._rejected: Counter[str] = Counter()
        self._lacking: Counter[tuple[str, str]] = Counter()

    def add(self, kept: pl.DataFrame, rejected: pl.DataFrame) -> None:
        self._num_rows += kept.height + rejected.height
        self._rejected.update(dict(rejected["reason"].value_counts().iter_rows()))
        for policy, values in self._unknown.items():
            for name, number in (
                kept.select(**{n: e.sum() for n, e in values.items()}).row(0, named=True).items()
            ):
                self._lacking[policy, name] += number

    def marker(self, ledger: FileEntry | None) -> ReadMarker:
        unknown: dict[str, dict[str, int]] = {}
        for (policy, name), number in sorted(self._lacking.items()):
            if number:
                unknown.setdefault(policy, {})[name] = number
        return ReadMarker(
            num_rows=self._num_rows,
            num_kept=self._num_rows - self._rejected.total(),
            rejected=dict(self._rejected),
            ledger=ledger,
            unknown=unknown,
        )


def _with_ids(rows: pl.DataFrame) -> pl.DataFrame:
    return rows.with_columns(sample_ids(rows))


def _travelling(rows: pl.DataFrame, slots: Slots, *, is_caption: bool) -> Iterator[pa.RecordBatch]:
    rows = rows.with_columns(slots.of_urls(rows["url"]), is_caption=pl.lit(is_caption))
    rows = rows.filter(pl.col("slot") >= 0)
    missing = [pl.lit(None).alias(name) for name in TRAVEL_SCHEMA.names if name not in rows.columns]
    travelling = rows.with_columns(missing).select(TRAVEL_SCHEMA.names)
    yield from travelling.to_arrow().cast(TRAVEL_SCHEMA).to_batches()
