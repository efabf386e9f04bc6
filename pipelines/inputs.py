"""Which files go in: found, digested and checked against the schema contract before any work."""

from __future__ import annotations

import fnmatch
import glob
import hashlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal
from urllib.parse import unquote

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from infra import storage
from infra.errors import UserError
from pipelines.captions import CAPTION_COLUMNS, canonical_captions, check_caption_schema
from pipelines.columns import canonical_rows, layout_of
from pipelines.config import CurationConfig

Kind = Literal["metadata", "captions"]

# Row groups are read together up to this many rows: what one Spark task holds in memory.
ROWS_PER_UNIT = 500_000
_THREADS = 8
_GLOB = frozenset("*?[")
_READ_BYTES = 1 << 20


@dataclass(frozen=True)
class InputFile:
    """A parquet file as it was when planned. ``row_groups`` are their row counts."""

    kind: Kind
    uri: str
    num_bytes: int
    sha256: str
    row_groups: tuple[int, ...]

    @property
    def num_rows(self) -> int:
        return sum(self.row_groups)

    def identity(self) -> dict[str, Any]:
        """What the file is, wherever it lies: goes into the build key and the manifest."""
        known = asdict(self)
        return {name: known[name] for name in ("kind", "num_bytes", "sha256")} | {
            "num_rows": self.num_rows
        }


@dataclass(frozen=True)
class Unit:
    """The work of one reading task: some row groups of one file."""

    index: int
    file: InputFile
    row_groups: tuple[int, ...]


def find_inputs(config: CurationConfig) -> list[InputFile]:
    """Every metadata and caption file, in an order that names and places do not influence.

    Reads each file once for its digest. Raises ``UserError`` in one line for a pattern that
    matches nothing, a file that is not whole parquet, or a schema that does not fit.
    """
    found: list[tuple[Kind, str]] = [("metadata", uri) for uri in _resolve(config.metadata)]
    found += [("captions", uri) for uri in _resolve(config.captions.files)]

    def inspect(item: tuple[Kind, str]) -> InputFile:
        return _inspect(item[0], item[1], config)

    with ThreadPoolExecutor(_THREADS) as pool:
        files = list(pool.map(inspect, found))
    return sorted(files, key=lambda file: (file.kind, file.sha256, file.uri))


def units_of(files: Sequence[InputFile]) -> list[Unit]:
    """Split the files into units of whole row groups of about ``ROWS_PER_UNIT`` rows."""
    units: list[Unit] = []
    for file in files:
        group: list[int] = []
        num_rows = 0
        for index, group_rows in enumerate(file.row_groups):
            if group and num_rows + group_rows > ROWS_PER_UNIT:
                units.append(Unit(len(units), file, tuple(group)))
                group, num_rows = [], 0
            group.append(index)
            num_rows += group_rows
        if group:
            units.append(Unit(len(units), file, tuple(group)))
    return units


def read_metadata(unit: Unit, config: CurationConfig) -> pl.DataFrame:
    """The unit's rows, canonical."""
    with _parquet(unit.file.uri) as parquet:
        layout = layout_of(parquet.schema_arrow, config, unit.file.uri)
        return canonical_rows(_read(parquet, unit, layout.columns), layout, config.source)


def read_captions(unit: Unit, config: CurationConfig) -> pl.DataFrame:
    """The unit's long captions: ``url, caption, model``."""
    with _parquet(unit.file.uri) as parquet:
        present = [name for name in CAPTION_COLUMNS if name in parquet.schema_arrow.names]
        return canonical_captions(_read(parquet, unit, present), config.filters.max_caption_chars)


def _read(parquet: pq.ParquetFile, unit: Unit, columns: list[str]) -> pa.Table:
    """The unit's row groups; text that is not UTF-8 is an Arrow error like any."""
    table = parquet.read_row_groups(list(unit.row_groups), columns=columns, use_threads=False)
    table.validate(full=True)
    return table


def _inspect(kind: Kind, uri: str, config: CurationConfig) -> InputFile:
    with _parquet(uri) as parquet:
        if kind == "metadata":
            layout_of(parquet.schema_arrow, config, uri)
        else:
            check_caption_schema(parquet.schema_arrow, uri)
        metadata = parquet.metadata
        row_groups = tuple(
            metadata.row_group(index).num_rows for index in range(metadata.num_row_groups)
        )
    digest = hashlib.sha256()
    num_bytes = 0
    with storage.open_stream(uri) as stream:
        while chunk := stream.read(_READ_BYTES):
            digest.update(chunk)
            num_bytes += len(chunk)
    return InputFile(kind, uri, num_bytes, digest.hexdigest(), row_groups)


@contextmanager
def _parquet(uri: str) -> Iterator[pq.ParquetFile]:
    """The open file; whatever Arrow finds wrong with it becomes one line naming it."""
    storage.stat(uri)
    filesystem, path = storage.arrow_filesystem(uri)
    try:
        with filesystem.open_input_file(path) as file, pq.ParquetFile(file) as parquet:
            yield parquet
    except (pa.ArrowException, OSError) as error:
        raise UserError(
            expected=f"a whole parquet file at {uri}",
            got=str(error)[:200],
            remedy="copy it again, or take it out of the recipe",
        ) from error


def _resolve(patterns: Sequence[str]) -> list[str]:
    """The URIs behind URIs, paths, folders and globs, each once."""
    uris: dict[str, None] = {}
    for pattern in patterns:
        matches = _matches(pattern)
        if not matches:
            raise UserError(
                expected=f"at least one parquet file at {pattern}",
                got="none",
                remedy="check the path; a folder stands for the *.parquet files in it",
            )
        uris.update(dict.fromkeys(matches))
    return list(uris)


def _matches(pattern: str) -> list[str]:
    if pattern.startswith("s3://"):
        return _matches_on_s3(pattern)
    if "://" in pattern and not pattern.startswith("file:///"):
        raise UserError(
            expected="s3://bucket/key, file:///path or a path", got=pattern, remedy="mind the //"
        )
    path = unquote(pattern[len("file://") :]) if pattern.startswith("file://") else pattern
    if Path(path).is_dir():
        path = str(Path(path) / "*.parquet")
    if not _GLOB & set(path) or Path(path).exists():
        return [storage.file_uri(path)] if Path(path).exists() else []
    return [storage.file_uri(match) for match in sorted(glob.glob(path, recursive=True))]


def _matches_on_s3(pattern: str) -> list[str]:
    if not _GLOB & set(pattern):
        if storage.exists(pattern):
            return [pattern]
        pattern = pattern.rstrip("/") + "/*.parquet"
    folder = pattern[: min(pattern.index(sign) for sign in _GLOB if sign in pattern)]
    folder = folder.rpartition("/")[0]
    listed = (info.uri for info in storage.list_objects(folder))
    return [uri for uri in listed if fnmatch.fnmatchcase(uri, pattern)]
