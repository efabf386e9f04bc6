"""Damaged shards of a version: put back with the same bytes, or replaced by what is left of them.

Of each damaged shard the samples are gathered from what is left of it, from other versions that
hold them, from the build's staged rows, and from the web (the body must have the sha256 that the
ledger has). A shard whose tar then has the listed sha256 is put back. Where that fails, samples
that are proven, or at least plausible, stay, the others leave with the reason ``lost``, and a new
version is published: no byte changes in silence.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ClassVar

import polars as pl
from pydantic import TypeAdapter

from infra import storage
from infra.digests import canonical_json, sha256_bytes
from infra.manifest import (
    DatasetManifest,
    FileEntry,
)
from pipelines.build import PartMarker, StagedMarker
from pipelines.config import CurationConfig
from pipelines.derive import Derivation, Members
from pipelines.embed import publish_file
from pipelines.gather import Clues, Gathered, Mended
from pipelines.ledger import COMMITTED
from pipelines.shards import read_shard
from pipelines.stored import live_versions
from pipelines.takedown_job import Found
from pipelines.tombstones import Tombstones
from pipelines.workspace import read_marker, read_markers, read_tables

REPAIR_VERSION = 1
LOST = "lost"
_NAMED = 100
_COLUMNS = ["sample_id", "url", "sha256", "shard", "disposition"]


@dataclass(frozen=True)
class RepairJob(Derivation):
    """The damaged shards of a version, by number; travels to the workers.

    ``others``: ledger files of other versions, which may hold the same samples in other shards;
    ``tars``: where images lie that are not on the web. What ``tombstones`` bar is not fetched.
    """

    kind: ClassVar[str] = "repair"

    dataset_root: str
    manifest: DatasetManifest
    damaged: tuple[int, ...]
    others: tuple[FileEntry, ...]
    config: CurationConfig
    tars: Mapping[str, str] = field(default_factory=dict)
    tombstones: Tombstones = field(default_factory=Tombstones)
    environment: Mapping[str, str] = field(default_factory=dict, repr=False)

    @property
    def key(self) -> str:
        """The sha256 over the version, its damaged shards and where else samples are looked for."""
        identity = {
            "dataset": self.manifest.version,
            "damaged": [self.manifest.shards[index].path for index in self.damaged],
            "others": [entry.path for entry in self.others],
            "version": REPAIR_VERSION,
        }
        return sha256_bytes(canonical_json(identity))

    # --- whose samples they are ------------------------------------------------------------------

    def look(self, number: int) -> None:
        """One task: the rows of the n-th ledger file that are in damaged shards, or elsewhere."""
        ledgers = (*self.manifest.ledger, *self.others)
        with self.task(f"found-{number:06d}") as folder:
            uri = storage.join(self.dataset_root, ledgers[number].path)
            rows = pl.read_parquet(
                storage.read_bytes(uri, ledgers[number].sha256), columns=_COLUMNS
            )
            rows = rows.filter(pl.col("disposition") == COMMITTED)
            in_damaged = pl.col("shard").is_in(self._damaged_paths)
            if number < len(self.manifest.ledger):
                rows = rows.filter(in_damaged)
            else:
                ids = pl.read_parquet(storage.read_bytes(self._ids_uri))["sample_id"].implode()
                rows = rows.filter(pl.col("sample_id").is_in(ids) & ~in_damaged)
            entry = None
            if rows.height:
                path = folder / "found.parquet"
                rows.select(_COLUMNS[:-1]).write_parquet(path)
                relative = f"{self.relative}/rows"
                entry = publish_file(path, self.dataset_root, relative, "parquet", rows.height)
            marker = Found(rows.height, entry)
            storage.write_json(self.marker_uri("found", number), asdict(marker))

    def note_ids(self) -> None:
        """Once its own ledger was looked through: whom to look for in the ledgers of others."""
        made = io.BytesIO()
        self._found_in(range(len(self.manifest.ledger))).select("sample_id").write_parquet(made)
        storage.write_bytes(self._ids_uri, made.getvalue())

    def note_clues(self, numbers: Iterable[int]) -> None:
        """Once all ledgers were looked through: what there is to mend these damaged shards from.

        Every note is read once for all shards, and every shard's task reads what concerns it.
        """
        own = range(len(self.manifest.ledger))
        rows = self._found_in(own).with_columns(pl.lit(None, pl.String).alias("shard_sha256"))
        listed = {
            shard.path: shard.sha256
            for manifest in live_versions(self.dataset_root)
            for shard in manifest.shards
        }
        elsewhere = self._found_in(range(len(own), len(own) + len(self.others)))
        elsewhere = elsewhere.with_columns(
            pl.col("shard").replace_strict(listed, default=None, return_dtype=pl.String)
            .alias("shard_sha256")
        ).drop_nulls("shard_sha256")  # fmt: skip
        staged = self._staged_rows()
        with TemporaryDirectory(prefix="atelier-repair-") as folder:
            for number in numbers:
                path = self._damaged_paths[number]
                mine = rows.filter(pl.col("shard") == path).sort("sample_id")
                theirs = elsewhere.join(mine, on="sample_id", how="semi").sort("shard", "sample_id")
                file = Path(folder) / "clues.parquet"
                pl.concat([mine, theirs]).write_parquet(file)
                relative = f"{self.relative}/rows"
                num_rows = mine.height + theirs.height
                entry = publish_file(file, self.dataset_root, relative, "parquet", num_rows)
                clues = Clues(entry, staged.get(path, []))
                storage.write_json(self.marker_uri("clues", number), asdict(clues))

    def _found_in(self, numbers: Iterable[int]) -> pl.DataFrame:
        """The rows that were found in these ledger files, each note and file read once."""
        uris = [self.marker_uri("found", number) for number in numbers]
        noted = zip(uris, read_markers(uris, Found), strict=True)
        entries = []
        for uri, found in noted:
            if found is None:
                raise storage.ObjectMissing(uri)
            entries += [found.rows] if found.rows is not None else []
        frames = read_tables(self.dataset_root, entries)
        return pl.concat([pl.DataFrame(schema=dict.fromkeys(_COLUMNS[:-1], pl.String())), *frames])

    def _staged_rows(self) -> dict[str, list[FileEntry]]:
        """Damaged shard -> rows that builds left of its partition, with captions."""
        work = storage.list_objects(storage.join(self.dataset_root, "work"))
        uris = [info.uri for info in work if info.uri.rpartition("/")[2].startswith("part-")]
        found: dict[str, list[FileEntry]] = {}
        damaged = set(self._damaged_paths)
        for uri, part in zip(uris, read_markers(uris, PartMarker), strict=True):
            here = damaged & {shard.path for shard in part.shards} if part is not None else set()
            folder, _, name = uri.rpartition("/")
            staged_uri = storage.join(folder, name.replace("part-", "staged-"))
            staged = read_marker(staged_uri, StagedMarker) if here else None
            if staged is not None:
                for path in here:
                    found.setdefault(path, []).append(staged.rows)
        return found

    @property
    def _ids_uri(self) -> str:
        return storage.join(self.folder, "ids.parquet")

    @cached_property
    def _damaged_paths(self) -> list[str]:
        return [self.manifest.shards[index].path for index in self.damaged]

    # --- a damaged shard -------------------------------------------------------------------------

    def mend(self, number: int) -> None:
        """One task: put the n-th damaged shard back, or leave what stands in for it."""
        shard = self.manifest.shards[self.damaged[number]]
        with self.task(f"mended-{number:06d}") as folder:
            data = storage.read_bytes(self.marker_uri("clues", number))
            clues = TypeAdapter(Clues).validate_json(data, strict=True)
            gathered = Gathered(self, shard, clues, folder)
            mended = gathered.put_back() or gathered.stand_in()
            storage.write_json(self.marker_uri("mended", number), asdict(mended))

    def mended(self) -> dict[int, Mended]:
        """Shard's number -> what became of it; of those that are done."""
        uris = [self.marker_uri("mended", number) for number in range(len(self.damaged))]
        found = zip(self.damaged, read_markers(uris, Mended), strict=True)
        return {index: mended for index, mended in found if mended is not None}

    def _mended(self, index: int) -> Mended | None:
        if index not in self.damaged:
            return None
        return read_marker(self.marker_uri("mended", self.damaged.index(index)), Mended)

    # --- the version without what was lost -------------------------------------------------------

    def affected(self) -> Sequence[int]:
        """The damaged shards."""
        return self.damaged

    def decide(self, index: int, folder: Path) -> pl.DataFrame:
        """All samples of a shard that has a stand-in: those that are lost leave."""
        kept: list[str] = []
        lost: list[str] = []
        mended = self._mended(index)
        if mended is not None and not mended.restored:
            lost = mended.lost
            kept = [key for key, members in self.samples(index) if members]
        reasons = [None] * len(kept) + [LOST] * len(lost)
        return pl.DataFrame(
            {"sample_id": kept + lost, "reason": reasons},
            schema={"sample_id": pl.String(), "reason": pl.String()},
        )

    def samples(self, index: int) -> Iterable[tuple[str, Members]]:
        """The samples of a shard, or of what stands in for it; lost ones are empty."""
        mended = self._mended(index)
        if mended is None or mended.restored:
            return super().samples(index)
        found: dict[str, Members] = {key: {} for key in mended.lost}
        if mended.stand_in is not None:
            uri = storage.join(self.dataset_root, mended.stand_in.path)
            found |= dict(read_shard(storage.read_bytes(uri, mended.stand_in.sha256)))
        return sorted(found.items())

    def choices(self) -> dict[str, Any]:
        """Which samples were lost, by their digest, and how many are not proven."""
        lost = self.lost()
        return {
            "lost": len(lost),
            "lost_sha256": sha256_bytes(canonical_json(lost)),
            "unproven": sum(each.unproven for each in self.mended().values()),
        }

    def record(self) -> dict[str, Any]:
        """The same with the first of them by name; the ledger names all."""
        return {**self.choices(), "lost_samples": self.lost()[:_NAMED]}

    def lost(self) -> list[str]:
        """The ids of the samples that could not be had again."""
        return sorted(key for each in self.mended().values() for key in each.lost)
