"""WebDataset tars as a source: samples as rows, which say where their images lie.

A row's address is ``tar://FOLDER/NAME.tar/KEY.jpg?offset=N&bytes=N``: the last two names of the
tar's own address, the member, and its place in the tar. It stays the same when the files are moved
with their folder or listed in another order, names one image alone, and is all that is needed to
read it, so images never travel with the rows. A sample without an image has no place in it.
"""

from __future__ import annotations

import re
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from urllib.parse import quote, unquote

import pyarrow as pa

from infra.shard_members import Inventory
from infra.tar_stream import BadTar, Member, TarWalker
from pipelines.image_size import HEAD_BYTES, size_of
from pipelines.json_lines import flat_record

SCHEME = "tar://"
# What a sample has besides the fields of its JSON; a field of that name does not count.
ADDRESS, WIDTH, HEIGHT, TEXT = "__image__", "__width__", "__height__", "txt"
ROWS_PER_BLOCK = 10_000
BLOCK_BYTES = 256 << 20
_MAX_TEXT_BYTES = 1 << 20
_TABLE_BYTES = 16 << 20
_TABLE_ROWS = 5_000
_IMAGES = frozenset({"jpg", "jpeg", "png", "webp"})
_ADDRESS = re.compile(
    r"tar://([^/?#]+/[^/?#]+)/([A-Za-z0-9_-]{1,64})(?:\.[a-z]+\?offset=(\d{1,18})&bytes=(\d{1,18}))?"
)


@dataclass(frozen=True)
class Place:
    """Where an image lies: ``num_bytes`` from ``offset`` of the tar called ``tar``."""

    tar: str
    offset: int
    num_bytes: int


@dataclass
class Sample:
    """A sample as far as it was read; it begins at byte ``start`` of its tar."""

    key: str
    start: int
    image: tuple[str, Place] | None = None
    sides_px: tuple[int, int] | None = None
    texts: dict[str, bytes] = field(default_factory=dict)

    @property
    def address(self) -> str:
        """The row's address, behind ``tar://`` and the tar's name."""
        if self.image is None:
            return self.key
        extension, place = self.image
        return f"{self.key}.{extension}?offset={place.offset}&bytes={place.num_bytes}"

    def record(self) -> dict[str, str | float | None]:
        """The fields of its JSON, its caption, its image's address and sides."""
        known = flat_record(self.texts.get("json", b""))
        known.pop(TEXT, None)
        if TEXT in self.texts:
            known[TEXT] = self.texts[TEXT].decode("utf-8", "replace").strip()
        width_px, height_px = self.sides_px or (None, None)
        return known | {ADDRESS: self.address, WIDTH: width_px, HEIGHT: height_px}


def tar_name(uri: str) -> str:
    """The last two names of a tar's address, as they stand in the addresses of its images."""
    scheme, _, path = uri.partition("://")
    names = (unquote(path) if scheme == "file" else path).split("/")
    folder, name = names[-2:]
    return f"{quote(folder or '-', safe='')}/{quote(name, safe='')}"


def place_of(url: str) -> Place | None:
    """Where the image of an address lies; None of a sample without one; else ``ValueError``."""
    found = _ADDRESS.fullmatch(url)
    if found is None:
        raise ValueError(url)
    name, _, offset, num_bytes = found.groups()
    return None if offset is None else Place(name, int(offset), int(num_bytes))


class SampleCutter:
    """Fed with a tar's bytes in order, knows where blocks of whole samples begin.

    ``offsets`` has one entry more than ``num_rows``: the end. Raises ``ValueError`` for what no tar
    of samples may hold, and for one that is not whole.
    """

    def __init__(self) -> None:
        self.offsets = [0]
        self.num_rows: list[int] = []
        self._walker = TarWalker(lambda _: 0)
        self._inventory = Inventory()
        self._key = ""
        self._has_image = False
        self._pending = 0

    def feed(self, chunk: bytes) -> None:
        """The next bytes of the file."""
        for member in self._walker.feed(chunk):
            if (problem := self._inventory.problem_with(member.info)) is not None:
                raise BadTar(problem)
            key, _, extension = member.info.name.partition(".")
            if key != self._key:
                self._begin(key, member.start)
            if extension in _IMAGES:
                if self._has_image:
                    raise BadTar(f"sample {key!r} has two images")
                self._has_image = True

    def finish(self) -> None:
        """No more bytes: the last block ends where the tar does."""
        self._walker.finish()
        if self._pending:
            self._close(self._walker.end or 0)

    def _begin(self, key: str, start: int) -> None:
        is_full = self._pending >= ROWS_PER_BLOCK or start - self.offsets[-1] >= BLOCK_BYTES
        if self._pending and is_full:
            self._close(start)
        self._key, self._has_image = key, False
        self._pending += 1

    def _close(self, offset: int) -> None:
        self.offsets.append(offset)
        self.num_rows.append(self._pending)
        self._pending = 0


def samples_in(chunks: Iterable[bytes], at: int, tar: str) -> Iterator[Sample]:
    """The samples of a stretch of the tar called ``tar`` that begins at byte ``at``, at a header.

    The last one may be cut. Raises ``BadTar``.
    """
    walker, inventory = TarWalker(_wanted, at), Inventory()
    sample: Sample | None = None
    for chunk in chunks:
        for member in walker.feed(chunk):
            if (problem := inventory.problem_with(member.info)) is not None:
                raise BadTar(problem)
            key, _, extension = member.info.name.partition(".")
            if sample is None or key != sample.key:
                if sample is not None:
                    yield sample
                sample = Sample(key, member.start)
            _take(sample, extension, member, tar)
    if sample is not None:
        yield sample


def table_of(samples: Iterable[Sample], tar: str, columns: list[str]) -> pa.Table:
    """``columns`` of the samples' records; what is no text is null, but for the image's sides."""
    records = [sample.record() for sample in samples]
    for record in records:
        record[ADDRESS] = f"{SCHEME}{tar}/{record[ADDRESS]}"
    return pa.table({name: _column(name, records) for name in columns})


def tables_of(samples: Iterable[Sample], tar: str, columns: list[str]) -> Iterator[pa.Table]:
    """All samples, in tables that are bounded in rows and bytes."""
    pending: list[Sample] = []
    num_bytes = 0
    for sample in samples:
        pending.append(sample)
        num_bytes += sum(map(len, sample.texts.values()))
        if len(pending) >= _TABLE_ROWS or num_bytes >= _TABLE_BYTES:
            yield table_of(pending, tar, columns)
            pending, num_bytes = [], 0
    if pending:
        yield table_of(pending, tar, columns)


def _wanted(info: tarfile.TarInfo) -> int:
    extension = info.name.partition(".")[2]
    if extension in _IMAGES:
        return HEAD_BYTES
    return _MAX_TEXT_BYTES if extension in ("json", TEXT) else 0


def _take(sample: Sample, extension: str, member: Member, tar: str) -> None:
    if extension in _IMAGES:
        sample.image = extension, Place(tar, member.offset, member.info.size)
        sample.sides_px = size_of(member.head)
    elif extension in ("json", TEXT) and len(member.head) == member.info.size:
        sample.texts[extension] = member.head


def _column(name: str, records: list[dict[str, str | float | None]]) -> pa.Array:
    values = [record.get(name) for record in records]
    if name in (WIDTH, HEIGHT):
        return pa.array(values, pa.int64())
    return pa.array([value if isinstance(value, str) else None for value in values], pa.string())
