"""Which files go in: found, checked against the schema contract in seconds, then digested.

A file is read in batches, so that a task's memory does not depend on how large a row group is.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any, Literal

import polars as pl
import pyarrow as pa
from pydantic import TypeAdapter, ValidationError

from infra import storage
from infra.digests import sha256_bytes
from infra.errors import UserError
from infra.progress import Progress, Silent, progress
from infra.tar_stream import BadTar
from pipelines.captions import CAPTION_COLUMNS, canonical_captions, check_caption_schema
from pipelines.columns import Layout, RawRows, layout_of, records_that_may_stay
from pipelines.config import CurationConfig
from pipelines.input_patterns import uris_behind
from pipelines.json_lines import MAX_LINE_BYTES, BlockCutter, columns_of, read_lines
from pipelines.parquet import open_parquet, parquet_batches
from pipelines.sources import SOURCE_FORMATS
from pipelines.tar_samples import SampleCutter, samples_in, table_of, tables_of, tar_name

Kind = Literal["metadata", "captions"]

# Row groups are read by one Spark task up to this many rows.
ROWS_PER_UNIT = 500_000
_THREADS = 8
_READ_BYTES = 1 << 20
_PIECE_BYTES = 4 << 20
_SAMPLES_LOOKED_AT = 16  # for the columns of a tar
_MB = 1_000_000
_SHOWN_FROM_BYTES = 1_000 * _MB
# Less than this is always read again: that costs seconds, and what is behind a server's back, it
# finds too.
READ_AGAIN_BYTES = 2_000 * _MB


@dataclass(frozen=True)
class InputFile:
    """A file as it was when planned. ``row_groups`` are their record counts.

    A jsonl file's row groups are blocks of lines, a tar's are blocks of samples; ``offsets`` says
    where they begin, and the end.
    """

    kind: Kind
    uri: str
    num_bytes: int
    sha256: str
    row_groups: tuple[int, ...]
    rows_per_record: int = 1
    offsets: tuple[int, ...] = ()

    @property
    def num_rows(self) -> int:
        return sum(self.row_groups) * self.rows_per_record

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


def find_inputs(config: CurationConfig, memory_uri: str | None = None) -> list[InputFile]:
    """Every metadata and caption file, in an order that names and places do not influence.

    Checks every schema first, from the files' footers, in seconds; then reads each file once for
    its digest. Of many gigabytes, what was read is noted in the folder ``memory_uri``, and a file
    that has not been written since is not read again. Raises ``UserError`` in one line for a
    pattern that matches nothing, a file that is not whole, a schema that does not fit, or aesthetic
    scores on two scales.
    """
    found = check_inputs(config)
    total = sum(storage.stat(uri).num_bytes for _, uri, _ in found)
    with ExitStack() as stack:
        bar: Progress = Silent()
        if total > _SHOWN_FROM_BYTES:
            bar = stack.enter_context(progress("reading the inputs", total // _MB, "MB"))

        def digest(item: tuple[Kind, str, Layout | None]) -> InputFile:
            kind, uri, layout = item
            rows_per_record = 1 if layout is None else SOURCE_FORMATS[layout.format].rows_per_record
            is_small = total < READ_AGAIN_BYTES
            memory = None if memory_uri is None or is_small else _Memory(memory_uri, uri)
            known = None if memory is None else memory.recall()
            if known is not None and (known.kind, known.rows_per_record) == (kind, rows_per_record):
                bar.advance(known.num_bytes // _MB)
                return known
            file = _digested(kind, uri, rows_per_record, bar)
            if memory is not None:
                memory.note(file)
            return file

        pool = stack.enter_context(ThreadPoolExecutor(_THREADS))
        files = list(pool.map(digest, found))
    return sorted(files, key=lambda file: (file.kind, file.sha256, file.uri))


@dataclass(frozen=True)
class _Note:
    """A file as it was read, and what said then that it is the same."""

    fingerprint: str
    file: InputFile


class _Memory:
    """What is known of one file, on storage, as long as the file has not been written again."""

    def __init__(self, folder_uri: str, uri: str) -> None:
        name = sha256_bytes(uri.encode())[:32]
        self._note_uri = storage.join(folder_uri, f"{name}.json")
        self._uri = uri
        self._fingerprint = storage.fingerprint(uri)

    def recall(self) -> InputFile | None:
        """The file as it was read, or None when it was not, or is another by now."""
        try:
            noted = TypeAdapter(_Note).validate_json(storage.read_bytes(self._note_uri))
        except (storage.ObjectMissing, ValidationError):  # a note that cannot be read is none
            return None
        is_this = self._fingerprint == noted.fingerprint and noted.file.uri == self._uri
        return noted.file if is_this else None

    def note(self, file: InputFile) -> None:
        """Remember; nothing is noted of a file that was written while it was read."""
        known = self._fingerprint
        if known is not None and storage.fingerprint(self._uri) == known:
            storage.write_json(self._note_uri, asdict(_Note(known, file)))


def check_inputs(config: CurationConfig) -> list[tuple[Kind, str, Layout | None]]:
    """Kind, address and layout of every file, from schemas alone; caption files have no layout."""
    found: list[tuple[Kind, str]] = [("metadata", uri) for uri in uris_behind(config.metadata)]
    found += [("captions", uri) for uri in uris_behind(config.captions.files)]

    def check(item: tuple[Kind, str]) -> tuple[Kind, str, Layout | None]:
        kind, uri = item
        if kind == "metadata":
            return kind, uri, read_layout(uri, config)
        with open_parquet(uri) as parquet:
            check_caption_schema(parquet.schema_arrow, uri)
        return kind, uri, None

    with ThreadPoolExecutor(_THREADS) as pool:
        checked = list(pool.map(check, found))
    _refuse_two_scales(checked)
    if config.fetch.on_hash_mismatch == "reject":
        _refuse_no_digests(checked)
    _refuse_one_name(uri for kind, uri, _ in checked if kind == "metadata" and is_tar(uri))
    return checked


def _refuse_one_name(tars: Iterable[str]) -> None:
    """Images of two tars would have the same addresses."""
    first: dict[str, str] = {}
    for uri in tars:
        if (other := first.setdefault(tar_name(uri), uri)) != uri:
            raise UserError(
                expected="tars that differ in their own name or their folder's",
                got=f"{other} and {uri}",
                remedy="rename one of the folders, or make a dataset of each",
            )


def _refuse_two_scales(checked: Sequence[tuple[Kind, str, Layout | None]]) -> None:
    """Scores of v1 and v2 in one dataset would be ranked against each other."""
    first: dict[str, str] = {}
    for _, uri, layout in checked:
        if layout is not None and layout.aesthetic_scale is not None:
            first.setdefault(layout.aesthetic_scale, uri)
    if len(first) > 1:
        raise UserError(
            expected="aesthetic scores on one scale in one dataset",
            got=" and ".join(f"{scale} in {uri}" for scale, uri in sorted(first.items())),
            remedy="make a dataset of each",
        )


def _refuse_no_digests(checked: Sequence[tuple[Kind, str, Layout | None]]) -> None:
    """Not a body would be held against anything, where the recipe asks for it."""
    layouts = [(uri, layout) for _, uri, layout in checked if layout is not None]
    if not any(layout.has_digests for _, layout in layouts):
        uri, layout = layouts[0]
        others = f" nor in {len(layouts) - 1:,} others" if len(layouts) > 1 else ""
        raise UserError(
            expected="a sha256 or md5 of the images in the metadata, for fetch.on_hash_mismatch is "
            "reject",
            got=f"no such column in {uri} ({layout.format}){others}",
            remedy="take a variant of the set that has one (laion2B-en-md5, for one), or set "
            "fetch.on_hash_mismatch to keep",
        )


def read_layout(uri: str, config: CurationConfig) -> Layout:
    """How a metadata file spells the canonical columns, from its footer, first line or samples."""
    if is_tar(uri):
        with one_line_tar(uri):
            found = islice(samples_in(_head_of(uri), 0, tar_name(uri)), _SAMPLES_LOOKED_AT)
            samples = list(found)
            if not samples:
                raise BadTar("no sample")
        names = dict.fromkeys(name for sample in samples for name in sample.record())
        table = table_of(samples, tar_name(uri), list(names))
        return layout_of(table.schema, config, uri, "tar")
    if not _is_jsonl(uri):
        with open_parquet(uri) as parquet:
            return layout_of(parquet.schema_arrow, config, uri)
    head = bytearray()
    for chunk in _head_of(uri):
        head += chunk
        if b"\n" in head:
            break
    columns = columns_of(bytes(head), uri)
    line = read_lines(bytes(head).partition(b"\n")[0], columns)
    return layout_of(line.schema, config, uri, "jsonl")


def _head_of(uri: str) -> Iterator[bytes]:
    """The file's first bytes, in pieces: ``MAX_LINE_BYTES`` and at most a piece more."""
    with storage.open_stream(uri) as stream:
        num_bytes = 0
        while num_bytes < MAX_LINE_BYTES and (chunk := stream.read(_READ_BYTES)):
            num_bytes += len(chunk)
            yield chunk


def units_of(files: Sequence[InputFile]) -> list[Unit]:
    """Split the files into units of whole row groups of about ``ROWS_PER_UNIT`` rows.

    A block of a tar is a unit: its rows are few, and its images must be read past.
    """
    units: list[Unit] = []
    for file in files:
        group: list[int] = []
        num_rows = 0
        most = 0 if is_tar(file.uri) else ROWS_PER_UNIT
        for index, group_rows in enumerate(file.row_groups):
            if group and num_rows + group_rows > most:
                units.append(Unit(len(units), file, tuple(group)))
                group, num_rows = [], 0
            group.append(index)
            num_rows += group_rows
        if group:
            units.append(Unit(len(units), file, tuple(group)))
    return units


def metadata_batches(
    unit: Unit, config: CurationConfig, *, without_rejected: bool = False
) -> Iterator[tuple[RawRows, Layout]]:
    """The unit's records, ``ROWS_PER_BATCH`` at a time, with the layout to read them by.

    ``without_rejected``: of records that a filter rejects, as many are left out as costs nothing.
    """
    layout = read_layout(unit.file.uri, config)
    if is_tar(unit.file.uri):
        for block in unit.row_groups:
            for table in _samples_of_block(unit.file, block, layout.columns):
                yield table, layout
        return
    if unit.file.offsets:
        for block in unit.row_groups:
            start, end = unit.file.offsets[block : block + 2]
            lines = read_range(unit.file.uri, start, end)
            yield read_lines(lines, layout.columns), layout
        return
    where = records_that_may_stay(layout, config.filters) if without_rejected else None
    for table in parquet_batches(unit.file.uri, unit.row_groups, layout.columns, where):
        yield table, layout


def _samples_of_block(file: InputFile, block: int, columns: list[str]) -> Iterator[pa.Table]:
    start, end = file.offsets[block : block + 2]
    name = tar_name(file.uri)
    with one_line_tar(file.uri):
        samples = samples_in(read_pieces(file.uri, start, end), start, name)
        num_rows = 0
        for table in tables_of(samples, name, columns):
            num_rows += table.num_rows
            yield table
        if num_rows != file.row_groups[block]:
            raise BadTar("another file than it was when the build began")


def read_captions(unit: Unit, config: CurationConfig) -> Iterator[pl.DataFrame]:
    """The unit's long captions: ``url, caption, model``, ``ROWS_PER_BATCH`` at a time."""
    with open_parquet(unit.file.uri) as parquet:
        present = [name for name in CAPTION_COLUMNS if name in parquet.schema_arrow.names]
    for table in parquet_batches(unit.file.uri, unit.row_groups, present):
        yield canonical_captions(table, config.filters.max_caption_chars)


def read_range(uri: str, start: int, end: int) -> bytes:
    """The file's bytes from ``start`` up to ``end``."""
    return b"".join(read_pieces(uri, start, end))


def read_pieces(uri: str, start: int, end: int) -> Iterator[bytes]:
    """The same, piece by piece; raises ``ObjectMissing``."""
    storage.stat(uri)
    filesystem, path = storage.arrow_filesystem(uri)
    with filesystem.open_input_file(path) as file:
        for at in range(start, end, _PIECE_BYTES):
            yield bytes(file.read_at(min(_PIECE_BYTES, end - at), at))


@contextmanager
def one_line_tar(uri: str) -> Iterator[None]:
    """What is wrong with a tar as one line that names it."""
    try:
        yield
    except BadTar as error:
        raise UserError(
            expected=f"a whole WebDataset tar at {uri}: images, .json and .txt, those of a sample "
            "beside each other",
            got=str(error),
            remedy="copy it again, or take it out of the recipe",
        ) from error


def is_tar(uri: str) -> bool:
    """Whether an input holds its images."""
    return uri.endswith(".tar")


def tars_of(files: Sequence[InputFile]) -> dict[str, str]:
    """The address of every tar, by the name that its images' addresses have for it."""
    return {tar_name(file.uri): file.uri for file in files if is_tar(file.uri)}


def _is_jsonl(uri: str) -> bool:
    return uri.endswith((".jsonl", ".ndjson", ".json"))


def _digested(kind: Kind, uri: str, rows_per_record: int, bar: Progress) -> InputFile:
    cutter = _cutter(kind, uri)
    digest = hashlib.sha256()
    num_bytes = 0
    with storage.open_stream(uri) as stream:
        while chunk := stream.read(_READ_BYTES):
            digest.update(chunk)
            bar.advance((num_bytes + len(chunk)) // _MB - num_bytes // _MB)
            num_bytes += len(chunk)
            if cutter is not None:
                with _one_line(uri):
                    cutter.feed(chunk)
    if cutter is not None:
        with _one_line(uri):
            cutter.finish()
        row_groups, offsets = tuple(cutter.num_rows), tuple(cutter.offsets)
    else:
        with open_parquet(uri) as parquet:
            metadata = parquet.metadata
            counts = range(metadata.num_row_groups)
            row_groups = tuple(metadata.row_group(index).num_rows for index in counts)
        offsets = ()
    return InputFile(kind, uri, num_bytes, digest.hexdigest(), row_groups, rows_per_record, offsets)


def _cutter(kind: Kind, uri: str) -> BlockCutter | SampleCutter | None:
    if kind == "metadata" and is_tar(uri):
        return SampleCutter()
    return BlockCutter() if kind == "metadata" and _is_jsonl(uri) else None


@contextmanager
def _one_line(uri: str) -> Iterator[None]:
    try:
        with one_line_tar(uri):
            yield
    except ValueError as error:
        raise UserError(
            expected=f"one JSON record a line in {uri}", got=str(error), remedy="split its records"
        ) from error
