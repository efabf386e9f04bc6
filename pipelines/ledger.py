"""How every input row ended: committed, rejected with a reason, or failed with a cause.

One row per input row, with its scores, in content-named parquet files. Counts are derived from
the very table that is written, and add up to the rows that went in.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from infra import storage
from infra.digests import sha256_file
from infra.manifest import FileEntry, ledger_path
from infra.storage_once import upload_once
from pipelines.columns import CANONICAL_SCHEMA
from pipelines.tombstones import TAKEDOWN, digest_of

COMMITTED, REJECTED, FAILED = "committed", "rejected", "failed"
PART = "atelier.part"  # the work whose rows a file has, in its schema's metadata
READ = "read-"  # what the parts of ``read_rows`` begin with: rows rejected by their metadata
ROWS_AT_ONCE = 200_000
REMOVED = "removed:"  # what an address begins with that was taken down

LEDGER_SCHEMA = pa.schema(
    [field for field in CANONICAL_SCHEMA if field.name != "caption"]
    + [
        pa.field("disposition", pa.string()),
        pa.field("reason", pa.string()),
        pa.field("retryable", pa.bool_()),
        pa.field("detail", pa.string()),
        pa.field("sha256", pa.string()),
        pa.field("shard", pa.string()),
        pa.field("md5", pa.string()),  # where one was recorded
    ]
)

# The order in which rows are asked, for reports. Causes of failures follow, by name.
REASONS = (
    TAKEDOWN,
    "no_url",
    "unknown_size",
    "too_small",
    "aspect_ratio",
    "unknown_aesthetic_score",
    "low_aesthetic_score",
    "unknown_watermark_prob",
    "watermarked",
    "unknown_unsafe_prob",
    "unsafe",
    "unknown_clip_similarity",
    "low_clip_similarity",
    "unknown_language",
    "other_language",
    "caption_too_long",
    "personal_data",
    "no_caption",
    "short_caption",
    "contaminated",
    "duplicate_row",
    "duplicate_url",
    "url",
    "scheme",
    "port",
    "address",
    "redirect",
    "robots_txt",
    "tdm_reservation",
    "optout",
    "encoding",
    "hash_mismatch",
    "format",
    "pixels",
    "image_too_small",
    "image_aspect_ratio",
    "decode",
    "image_check",
    "mismatched",
    "placeholder",
    "contaminated_image",
    "duplicate_of_other",
    "duplicate_image",
    "near_duplicate",
)


# Few values, many rows; a dictionary of the others would cost time and save nothing.
_DICTIONARIES = (
    "aesthetic_scale",
    "language",
    "source",
    "disposition",
    "reason",
    "shard",
    "width_px",
    "height_px",
)


@dataclass(frozen=True)
class Counts:
    """How many rows ended how, as one ledger file says."""

    committed: int
    rejected: dict[str, int]
    failed: dict[str, int]

    @property
    def num_rows(self) -> int:
        return self.committed + sum(self.rejected.values()) + sum(self.failed.values())


def count(rows: pl.DataFrame) -> Counts:
    """Count ``disposition`` and ``reason``; another disposition is a ``ValueError``."""
    counts: dict[str, dict[str, int]] = {COMMITTED: {}, REJECTED: {}, FAILED: {}}
    for disposition, reason, num_rows in (
        rows.group_by("disposition", "reason").len().sort("disposition", "reason").iter_rows()
    ):
        if disposition not in counts or (reason is None) != (disposition == COMMITTED):
            raise ValueError(f"a row ended as {disposition!r} with reason {reason!r}")
        counts[disposition][reason or COMMITTED] = num_rows
    return Counts(counts[COMMITTED].get(COMMITTED, 0), counts[REJECTED], counts[FAILED])


def is_worth_a_retry() -> pl.Expr:
    """Rows that failed for a cause that may have passed."""
    return ((pl.col("disposition") == FAILED) & pl.col("retryable")).fill_null(False)


def without_addresses(rows: pl.DataFrame) -> pl.DataFrame:
    """Of rows that are taken down, ``removed:`` and a digest in place of the address."""
    is_plain = (pl.col("reason") == TAKEDOWN) & ~pl.col("url").str.starts_with(REMOVED)
    if not rows.select(is_plain.any()).item():
        return rows
    plain = rows.filter(is_plain)["url"].unique()
    digests = [REMOVED + digest_of(url) for url in plain]
    replaced = pl.col("url").replace_strict(plain, digests, default=None)
    return rows.with_columns(pl.when(is_plain).then(replaced).otherwise("url").alias("url"))


def ledger_batches(
    dataset_root: str, entry: FileEntry, columns: Sequence[str], folder: Path
) -> Iterator[pl.DataFrame]:
    """``columns`` of a ledger file, at most ``ROWS_AT_ONCE`` rows at a time.

    It is copied into ``folder`` first, which needs room for it: raises ``DigestMismatch`` or
    ``ObjectMissing`` before a row is given out.
    """
    path = folder / "read.parquet"
    storage.download(storage.join(dataset_root, entry.path), path, entry.sha256)
    with pq.ParquetFile(path) as file:
        for batch in file.iter_batches(columns=list(columns), batch_size=ROWS_AT_ONCE):
            yield pl.DataFrame(pl.from_arrow(pa.Table.from_batches([batch])))
    path.unlink()


def part_of(data: bytes) -> str:
    """The work whose rows a ledger file has, from its bytes; empty when it does not say."""
    metadata = pq.read_schema(pa.BufferReader(data)).metadata or {}
    return bytes(metadata.get(PART.encode(), b"")).decode()


class LedgerFile:
    """A ledger file in the making, on local disk: add frames, then publish it under its digest.

    ``part`` names the work whose rows these are. It is stored in the file, so that the same rows
    met twice (an input file and its copy) are two files, each counted.
    """

    def __init__(self, folder: Path, part: str) -> None:
        self._path = folder / "ledger.parquet"
        self._writer = pq.ParquetWriter(
            self._path,
            LEDGER_SCHEMA.with_metadata({PART: part}),
            compression="zstd",
            use_dictionary=list(_DICTIONARIES),
        )
        self._num_rows = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._writer.close()

    def add(self, rows: pl.DataFrame) -> None:
        """Append rows; columns that are missing are null, addresses taken down are digests."""
        missing = [
            pl.lit(None, dtype=pl.Boolean if name == "retryable" else pl.String).alias(name)
            for name in LEDGER_SCHEMA.names
            if name not in rows.columns
        ]
        frame = without_addresses(rows.with_columns(*missing).select(LEDGER_SCHEMA.names))
        self._writer.write_table(frame.to_arrow().cast(self._writer.schema))
        self._num_rows += rows.height

    def publish(self, dataset_root: str) -> FileEntry | None:
        """Close and upload the file; None when it holds no row."""
        self._writer.close()
        if self._num_rows == 0:
            return None
        sha256 = sha256_file(self._path)
        path = ledger_path(sha256)
        stored = upload_once(self._path, storage.join(dataset_root, path), sha256)
        return FileEntry(path, stored.num_bytes, sha256, self._num_rows)
