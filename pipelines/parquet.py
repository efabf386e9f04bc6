"""Parquet files, read in pieces: what is wrong with one is a line that names it.

Polars decodes text two to three times as fast as Arrow, so it reads. It wants a path: of a file in
a bucket, the byte ranges that a task needs are copied into a sparse file at the same offsets.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from infra import storage
from infra.errors import UserError

ROWS_PER_BATCH = 1 << 16
# Polars holds a whole row group; one that is larger when decoded is left to Arrow.
GIANT_GROUP_BYTES = 1 << 29
_FOOTER_END_BYTES = 8
_GAP_BYTES = 1 << 20
_COPY_BYTES = 1 << 24


@contextmanager
def open_parquet(uri: str) -> Iterator[pq.ParquetFile]:
    """The open file; ``UserError`` for one that is not there or not whole."""
    storage.stat(uri)
    filesystem, path = storage.arrow_filesystem(uri)
    with (
        _one_line(uri),
        filesystem.open_input_file(path) as file,
        pq.ParquetFile(file) as parquet,
    ):
        yield parquet


@contextmanager
def _one_line(uri: str) -> Iterator[None]:
    try:
        yield
    except (pa.ArrowException, pl.exceptions.PolarsError, OSError) as error:
        raise UserError(
            expected=f"a whole parquet file at {uri}",
            got=str(error)[:200],
            remedy="copy it again, or take it out of the recipe",
        ) from error


def parquet_batches(
    uri: str, row_groups: Sequence[int], columns: list[str], where: pl.Expr | None = None
) -> Iterator[pa.Table | pl.DataFrame]:
    """``columns`` of neighbouring row groups, ``ROWS_PER_BATCH`` rows at a time.

    Rows that are not ``where`` may be missing: Polars does not decode their texts. Text that is
    decoded and not UTF-8 is an error like any. Memory: one row group, half a GiB at most.
    """
    with open_parquet(uri) as parquet:
        found = parquet.metadata
        groups = [found.row_group(index) for index in row_groups]
        if any(group.total_byte_size > GIANT_GROUP_BYTES for group in groups):
            yield from _arrow_batches(parquet, row_groups, columns)
            return
        first = sum(found.row_group(index).num_rows for index in range(row_groups[0]))
        num_rows = sum(group.num_rows for group in groups)
        with _on_disk(uri, found, row_groups, columns) as path:
            # What a file's statistics claim must not decide which rows are there.
            file = pl.scan_parquet(path, glob=False, use_statistics=False)
            rows = file.select(columns)
            if num_rows < found.num_rows:  # a slice of all rows would still take its time
                rows = rows.slice(first, num_rows)
            rows = rows if where is None else rows.filter(where)
            yield from rows.collect_batches(chunk_size=ROWS_PER_BATCH)


def _arrow_batches(
    parquet: pq.ParquetFile, row_groups: Sequence[int], columns: list[str]
) -> Iterator[pa.Table]:
    batches = parquet.iter_batches(
        ROWS_PER_BATCH, list(row_groups), columns=columns, use_threads=False
    )
    for batch in batches:
        batch.validate(full=True)
        yield pa.Table.from_batches([batch])


@contextmanager
def _on_disk(
    uri: str, metadata: pq.FileMetaData, row_groups: Sequence[int], columns: Sequence[str]
) -> Iterator[Path]:
    """A path where these parts of the file are, and its footer."""
    filesystem, path = storage.arrow_filesystem(uri)
    if filesystem.type_name == "local":
        yield Path(path)
        return
    with TemporaryDirectory(prefix="atelier-parquet-") as folder:
        sparse = Path(folder, "part.parquet")
        with filesystem.open_input_file(path) as source, sparse.open("wb") as target:
            num_bytes = source.size()
            footer = metadata.serialized_size + _FOOTER_END_BYTES
            ranges = [*_ranges(metadata, row_groups, columns), (num_bytes - footer, num_bytes)]
            for start, end in _joined(ranges):
                target.seek(start)
                for at in range(start, end, _COPY_BYTES):
                    target.write(source.read_at(min(_COPY_BYTES, end - at), at))
        yield sparse


def _ranges(
    metadata: pq.FileMetaData, row_groups: Sequence[int], columns: Sequence[str]
) -> list[tuple[int, int]]:
    """Where the columns' bytes lie, first and one past the last."""
    wanted = set(columns)
    found = []
    for index in row_groups:
        group = metadata.row_group(index)
        for number in range(group.num_columns):
            chunk = group.column(number)
            if chunk.path_in_schema.partition(".")[0] in wanted:
                start = chunk.dictionary_page_offset or chunk.data_page_offset
                start = min(start, chunk.data_page_offset)
                found.append((start, start + chunk.total_compressed_size))
    return found


def _joined(ranges: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """The ranges in order; those with little between them are one."""
    joined: list[tuple[int, int]] = []
    for start, end in sorted(ranges):
        if joined and start - joined[-1][1] <= _GAP_BYTES:
            joined[-1] = (joined[-1][0], max(end, joined[-1][1]))
        else:
            joined.append((start, end))
    return joined
