"""One version without what was taken down: what its ledger says is to go, and what it became.

The ledger is looked through once. What was found is then sorted by shard, so that the task of a
shard reads one note, and shards that lose nothing have no task.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import polars as pl

from infra import storage
from infra.digests import canonical_json, sha256_bytes
from infra.manifest import DatasetManifest, FileEntry
from pipelines.derive import Derivation
from pipelines.duplicates import LIKE
from pipelines.embed import publish_file
from pipelines.ledger import COMMITTED, REJECTED, REMOVED, without_addresses
from pipelines.tombstones import TAKEDOWN, Tombstones
from pipelines.workspace import READ_THREADS, read_markers, read_tables

TAKEDOWN_VERSION = 2
# What a row that was noted is: named by the request; a copy of a named one by its bytes alone; gone
# since an earlier takedown; or a sample that stays and looks like a row that goes.
NAMED, COPY, WENT, ALIKE = "named", "copy", "went", "alike"
_READ = ["sample_id", "url", "sha256", "shard", "disposition", "reason", "detail"]
NOTED_SCHEMA: dict[str, pl.DataType] = {
    "sample_id": pl.String(),
    "url": pl.String(),
    "sha256": pl.String(),
    "shard": pl.String(),
    "like": pl.String(),
    "what": pl.String(),
}


@dataclass(frozen=True)
class Found:
    """What one ledger file holds that is looked for: ``num_rows``, and those worth a note."""

    num_rows: int
    rows: FileEntry | None


@dataclass(frozen=True)
class TakedownJob(Derivation):
    """One version without what ``tombstones`` cover; travels to the workers.

    ``named``: those of them that are no more than digests of the others' bytes are not in it;
    ``alike``: ids of samples that rows that go are like. Both say only what is told of a row.
    """

    kind: ClassVar[str] = "takedown"

    dataset_root: str
    manifest: DatasetManifest
    tombstones: Tombstones
    named: Tombstones
    alike: frozenset[str] = frozenset()
    environment: Mapping[str, str] = field(default_factory=dict, repr=False)

    @property
    def key(self) -> str:
        """The sha256 over everything that decides the new version."""
        identity = {
            "dataset": self.manifest.version,
            "tombstones": self.tombstones.digest,
            "version": TAKEDOWN_VERSION,
        }
        return sha256_bytes(canonical_json(identity))

    def look(self, index: int) -> None:
        """One task: note what the n-th ledger file holds that is to go."""
        with self.task(f"found-{index:06d}") as folder:
            entry = self.manifest.ledger[index]
            data = storage.read_bytes(storage.join(self.dataset_root, entry.path), entry.sha256)
            rows = pl.read_parquet(data, columns=_READ)
            rows = rows.with_columns(what=self._what(rows)).drop_nulls("what")
            noted = rows.with_columns(like=_like()).select(list(NOTED_SCHEMA))
            note = None
            if noted.height:
                path = folder / "found.parquet"
                noted.write_parquet(path)
                relative = f"{self.relative}/rows"
                note = publish_file(path, self.dataset_root, relative, "parquet", noted.height)
            num_rows = noted.filter(pl.col("what").is_in([NAMED, COPY])).height
            storage.write_json(self.marker_uri("found", index), asdict(Found(num_rows, note)))

    def _what(self, rows: pl.DataFrame) -> pl.Series:
        covered = self._covers(rows)
        named = covered & self.named.covers(rows)
        url = pl.col("url").fill_null("")
        went = (pl.col("reason") == TAKEDOWN) & url.str.starts_with(REMOVED)
        stays = (pl.col("disposition") == COMMITTED) & pl.col("sample_id").is_in(list(self.alike))
        what = (
            pl.when(named)
            .then(pl.lit(NAMED))
            .when(covered)
            .then(pl.lit(COPY))
            .when(went)
            .then(pl.lit(WENT))
            .when(stays)
            .then(pl.lit(ALIKE))
        )
        return rows.select(what=what)["what"]

    def looked(self) -> dict[int, Found]:
        """Ledger file's number -> what was noted of it; of those that were looked through."""
        numbers = range(len(self.manifest.ledger))
        listed = {info.uri for info in storage.list_objects(storage.join(self.folder, "found"))}
        noted = [number for number in numbers if self.marker_uri("found", number) in listed]
        found = read_markers((self.marker_uri("found", number) for number in noted), Found)
        return {n: each for n, each in zip(noted, found, strict=True) if each is not None}

    def noted(self, found: Mapping[int, Found]) -> pl.DataFrame:
        """The rows of these notes, columns as ``NOTED_SCHEMA`` has them."""
        entries = [each.rows for each in found.values() if each.rows is not None]
        tables = read_tables(self.dataset_root, entries)
        return pl.concat([pl.DataFrame(schema=NOTED_SCHEMA), *tables])

    def sort_out(self, noted: pl.DataFrame) -> None:
        """Leave for each shard that loses samples a note of these, and last which shards do."""
        going = noted.filter(pl.col("what").is_in([NAMED, COPY])).drop_nulls("shard")
        numbers = {shard.path: number for number, shard in enumerate(self.manifest.shards)}
        by_shard = going.group_by("shard").agg(pl.col("sample_id").unique().sort())
        lost = {numbers[path]: ids for path, ids in by_shard.iter_rows()}

        def leave(number: int) -> None:
            storage.write_json(self.marker_uri("gone", number), lost[number])

        with ThreadPoolExecutor(READ_THREADS) as pool:
            list(pool.map(leave, lost))
        storage.write_json(self._affected_uri, sorted(lost))

    def affected(self) -> Sequence[int]:
        """The shards that lose samples."""
        return [int(number) for number in storage.read_json(self._affected_uri)]

    def decide(self, index: int, folder: Path) -> pl.DataFrame:
        """The shard's samples that are to go."""
        gone = storage.read_json(self.marker_uri("gone", index))
        samples = pl.Series("sample_id", gone, dtype=pl.String)
        return samples.to_frame().with_columns(reason=pl.lit(TAKEDOWN))

    def edit_ledger(self, rows: pl.DataFrame) -> pl.DataFrame:
        """Whatever else is covered, rejected or failed, ends as a takedown too, address and all."""
        covered = self._covers(rows)
        return without_addresses(
            rows.with_columns(
                pl.when(covered)
                .then(pl.lit(REJECTED))
                .otherwise("disposition")
                .alias("disposition"),
                pl.when(covered).then(pl.lit(TAKEDOWN)).otherwise("reason").alias("reason"),
                pl.when(covered).then(pl.lit(False)).otherwise("retryable").alias("retryable"),
                pl.when(pl.col("reason").eq_missing(TAKEDOWN) | covered)
                .then(pl.lit(None, pl.String))
                .otherwise("detail")
                .alias("detail"),
            )
        )

    def choices(self) -> dict[str, Any]:
        """Which tombstones, by their digest alone."""
        return {"tombstones": self.tombstones.digest}

    def parents(self) -> list[dict[str, Any]]:
        """What the version it came from was made of: that one is withdrawn."""
        return self.manifest.parents

    @property
    def _affected_uri(self) -> str:
        return storage.join(self.folder, "affected.json")

    def _covers(self, rows: pl.DataFrame) -> pl.Series:
        return self.tombstones.covers(rows) & rows["reason"].ne_missing(TAKEDOWN)


def _like() -> pl.Expr:
    """The id of the sample that a row was rejected for being like; null for other rows."""
    is_copy = pl.col("detail").str.starts_with(LIKE)
    return pl.when(is_copy).then(pl.col("detail").str.strip_prefix(LIKE)).otherwise(None)
