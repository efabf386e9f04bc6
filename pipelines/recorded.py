"""Digests that the metadata recorded of an image's bytes, held against the bytes as fetched.

DataComp and its like publish sha256, LAION md5. Collisions of md5 can be made, but no file with a
given md5: what was recorded before an address changed hands still tells its bytes from others.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import polars as pl

from pipelines.columns import DIGESTS
from pipelines.guard import Rejected
from pipelines.ledger import COMMITTED

# The column of what was recorded -> that of what was fetched, which is the name of the digest, too.
FETCHED = {column: column.removeprefix("recorded_") for column in DIGESTS}


@dataclass(frozen=True)
class Recorded:
    """What is known of one row's bytes: lower-case hex, or None."""

    recorded_sha256: str | None = None
    recorded_md5: str | None = None

    def checked_md5(self, body: bytes, on_mismatch: Literal["keep", "reject"]) -> str | None:
        """The md5 of the body where one was recorded.

        Raises ``Rejected("hash_mismatch")``, which names the body's digest, where another was
        recorded and ``on_mismatch`` is ``reject``.
        """
        found: dict[str, str] = {}
        for column, name in FETCHED.items():
            recorded = getattr(self, column)
            if recorded is None or (name == "sha256" and on_mismatch == "keep"):
                continue  # the decoder tells the sha256 of what it stores
            found[name] = hashlib.new(name, body, usedforsecurity=False).hexdigest()
            if on_mismatch == "reject" and found[name] != recorded:
                raise Rejected("hash_mismatch", f"{name} {found[name]}")
        return found.get("md5")


def recorded_of(rows: pl.DataFrame) -> list[Recorded]:
    """What was recorded of each row."""
    return [Recorded(**row) for row in rows.select(list(FETCHED)).iter_rows(named=True)]


def matches(rows: pl.DataFrame) -> dict[str, dict[str, int]]:
    """Column of what was recorded -> committed rows whose bytes are the ``same``, or ``different``.

    A number of 0 is left out, and so is a column that no such row has.
    """
    committed = rows.filter(pl.col("disposition") == COMMITTED)
    counted = {}
    for recorded, fetched in FETCHED.items():
        same = committed.select(pl.col(recorded) == pl.col(fetched)).to_series()
        found = {"same": int(same.sum()), "different": int((~same).sum())}
        counted[recorded] = {name: number for name, number in found.items() if number}
    return {name: found for name, found in counted.items() if found}


def matches_in_words(attributes: Mapping[str, Any]) -> list[str]:
    """What ``matches`` came to, from a manifest's attributes; a line for each digest."""
    lines = []
    for recorded, fetched in FETCHED.items():
        found = attributes.get(recorded)
        if found:
            same, different = found.get("same", 0), found.get("different", 0)
            lines.append(
                f"{same:,} images had, when they were fetched, the {fetched} that the metadata "
                f"recorded; {different:,} ({100 * different / (same + different):.1f} %) had "
                "another"
            )
    return lines
