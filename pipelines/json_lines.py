"""JSON lines as columns: cut into blocks of whole lines once, then read block by block."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pyarrow as pa

from infra.errors import UserError

ROWS_PER_BLOCK = 50_000
MAX_LINE_BYTES = 16 << 20
_PAIR = 2


class BlockCutter:
    """Fed with a file's bytes in order, knows where blocks of ``ROWS_PER_BLOCK`` lines begin.

    ``offsets`` has one entry more than ``num_rows``: the end. A blank line is a row like any.
    """

    def __init__(self, rows_per_block: int = ROWS_PER_BLOCK) -> None:
        self.offsets = [0]
        self.num_rows: list[int] = []
        self._rows_per_block = rows_per_block
        self._pending = 0
        self._read = 0
        self._line_started = 0

    def feed(self, chunk: bytes) -> None:
        """The next bytes of the file."""
        ends = np.flatnonzero(np.frombuffer(chunk, np.uint8) == ord("\n")) + self._read + 1
        self._read += len(chunk)
        taken = 0
        while self._pending + len(ends) - taken >= self._rows_per_block:
            taken += self._rows_per_block - self._pending
            self._close(int(ends[taken - 1]), self._rows_per_block)
        self._pending += len(ends) - taken
        if len(ends):
            self._line_started = int(ends[-1])
        if self._read - self._line_started > MAX_LINE_BYTES:
            raise ValueError(f"a line of more than {MAX_LINE_BYTES} bytes")

    def finish(self) -> None:
        """No more bytes: the last block ends here."""
        rows = self._pending + (self._read > self._line_started)
        if rows:
            self._close(self._read, rows)

    def _close(self, offset: int, rows: int) -> None:
        self.offsets.append(offset)
        self.num_rows.append(rows)
        self._pending = 0


def columns_of(head: bytes, file: str) -> list[str]:
    """The columns of the first line, which ``head`` holds whole; ``UserError`` if it is none."""
    line = head.partition(b"\n")[0]
    if line.lstrip()[:1] == b"[":
        raise UserError(
            expected=f"one JSON record a line in {file}",
            got="one array",
            remedy="turn it into lines: jq -c '.[]'",
        )
    columns = list(flat_record(line))
    if not columns:
        raise UserError(
            expected=f"one JSON record a line in {file}",
            got=repr(line[:80]),
            remedy="copy it again, or take it out of the recipe",
        )
    return columns


def read_lines(data: bytes, columns: list[str]) -> pa.Table:
    """``columns`` of every line; a line that is no record is a row of nulls."""
    lines = data.removesuffix(b"\n").split(b"\n")
    records = [flat_record(line) for line in lines]
    return pa.table({name: _column([record.get(name) for record in records]) for name in columns})


def _column(values: list[Any]) -> pa.Array:
    """Numbers where the first value is one, else text; what does not fit is null."""
    first = next((value for value in values if value is not None), None)
    if isinstance(first, int | float):
        return pa.array(
            [float(v) if isinstance(v, int | float) else None for v in values], pa.float64()
        )
    return pa.array([v if isinstance(v, str) else None for v in values], pa.string())


def flat_record(line: bytes) -> dict[str, Any]:
    """A record with the fields of its objects as ``outer.inner`` and of its pairs as ``name_0``."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    return dict(_items(record)) if isinstance(record, dict) else {}


def _items(record: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for name, value in record.items():
        if isinstance(value, dict):
            yield from ((f"{name}.{inner}", _scalar(found)) for inner, found in value.items())
        elif isinstance(value, list) and len(value) == _PAIR:
            yield from ((f"{name}_{index}", _scalar(found)) for index, found in enumerate(value))
        else:
            yield name, _scalar(value)


def _scalar(value: Any) -> str | float | None:
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode()  # a lone surrogate is no text
    return value if isinstance(value, int | float) and not isinstance(value, bool) else None
