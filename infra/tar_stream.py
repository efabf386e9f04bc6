"""The members of a tar as its bytes go by: nothing is extracted, nothing is held but what is asked.

Python's ``tarfile`` ends in silence at a header that is damaged, or where the file was cut between
two members. Here both are errors, so that no member can go missing.
"""

from __future__ import annotations

import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass

BLOCK_BYTES = tarfile.BLOCKSIZE
_MAX_EXTENDED_BYTES = 1 << 16
_EXTENDED = (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE)
# What an extended header may say of a member without making it another one.
_HARMLESS = frozenset({"atime", "comment", "ctime", "gid", "gname", "mtime", "uid", "uname"})
_ZEROS = bytes(BLOCK_BYTES)


class BadTar(ValueError):
    """The bytes are not those of a whole, plain tar."""


@dataclass(frozen=True)
class Member:
    """A member: its header and that of its extension begin at ``start``, its bytes at ``offset``.

    ``head`` is as much of these bytes as was wanted.
    """

    info: tarfile.TarInfo
    start: int
    offset: int
    head: bytes


class TarWalker:
    """Fed with a tar's bytes in order, gives its members in order.

    ``wanted`` says of a header how many of the member's first bytes are to be held; ``at`` is where
    in the file the first byte fed lies. Memory: one such head.
    """

    def __init__(self, wanted: Callable[[tarfile.TarInfo], int], at: int = 0) -> None:
        self.at = at
        self.end: int | None = None  # where the zeros begin that end the tar
        self._wanted = wanted
        self._held = bytearray()
        self._needed = BLOCK_BYTES
        self._skip = 0
        self._info: tarfile.TarInfo | None = None
        self._began: int | None = None

    def feed(self, chunk: bytes) -> Iterator[Member]:
        """The members that are complete with these next bytes; raises ``BadTar``."""
        view = memoryview(chunk)
        while view and self.end is None:
            if self._skip:
                step = min(self._skip, len(view))
                self._skip -= step
            else:
                step = min(self._needed - len(self._held), len(view))
                self._held += view[:step]
            self.at += step
            view = view[step:]
            if not self._skip and len(self._held) == self._needed:
                member = self._header() if self._info is None else self._member(self._info)
                if member is not None:
                    yield member
        if bytes(view).strip(b"\0"):
            raise BadTar(f"more bytes behind its end at {self.end}")
        self.at += len(view)

    def finish(self) -> None:
        """No more bytes: raises ``BadTar`` unless the tar has come to its end."""
        if self.end is None:
            raise BadTar(f"it is cut at byte {self.at}")

    def _header(self) -> Member | None:
        block = bytes(self._held)
        start = self.at - BLOCK_BYTES
        if block == _ZEROS:
            self.end = start
            return None
        try:
            info = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
        except tarfile.HeaderError as error:
            raise BadTar(f"no header at byte {start} ({error})") from error
        if info.size < 0:
            raise BadTar(f"a size below zero at byte {start}")
        if self._began is None:
            self._began = start
        wanted = info.size if info.type in _EXTENDED else min(self._wanted(info), info.size)
        if info.type in _EXTENDED and info.size > _MAX_EXTENDED_BYTES:
            raise BadTar(f"an extended header of {info.size} bytes at byte {start}")
        self._info, self._needed = info, wanted
        self._held.clear()
        return None if wanted else self._member(info)

    def _member(self, info: tarfile.TarInfo) -> Member | None:
        head = bytes(self._held)
        offset = self.at - len(head)
        self._skip = -(-info.size // BLOCK_BYTES) * BLOCK_BYTES - len(head)
        self._held.clear()
        self._info, self._needed = None, BLOCK_BYTES
        if info.type in _EXTENDED:
            _refuse_renaming(head, offset)
            return None
        start, self._began = self._began, None
        return Member(info, offset - BLOCK_BYTES if start is None else start, offset, head)


def find_header(data: bytes) -> int | None:
    """Where in ``data``, which begins at a whole block, the first header lies; None without one."""
    for position in range(0, len(data) - BLOCK_BYTES + 1, BLOCK_BYTES):
        if data[position + 257 : position + 262] != b"ustar":
            continue
        try:
            tarfile.TarInfo.frombuf(data[position : position + BLOCK_BYTES], "utf-8", "replace")
        except tarfile.HeaderError:
            continue
        return position
    return None


def _refuse_renaming(records: bytes, offset: int) -> None:
    """Times and owners may be said in an extended header, names and sizes may not."""
    rest = records
    while rest:
        length = rest.partition(b" ")[0]
        num_bytes = int(length) if length.isdigit() and len(length) < 8 else 0
        name = rest[len(length) + 1 : num_bytes].partition(b"=")[0].decode("utf-8", "replace")
        if name not in _HARMLESS:
            raise BadTar(f"an extended header at byte {offset} that says {name[:40]!r}")
        rest = rest[num_bytes:]
