"""Damaged shards of a version: put back with the same bytes, or replaced by what is left of them.

Of each damaged shard the samples are gathered from what is left of it, from other versions that
hold them, from the build's staged rows, and from the web (the body must have the sha256 that the
ledger has). A shard whose tar then has the listed sha256 is put back. Where that fails, samples
that are proven, or at least plausible, stay, the others leave with the reason ``lost``, and a new
version is published: no byte changes in silence.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import polars as pl
from pydantic import TypeAdapter, ValidationError

from infra import storage
from infra.digests import canonical_json, sha256_bytes
from infra.manifest import (
    DatasetManifest,
    FileEntry,
    ShardEntry,
)
from pipelines.arrivals import fetch_body
from pipelines.bodies import ListedBodies
from pipelines.build import StagedMarker
from pipelines.config import CurationConfig, ShardConfig
from pipelines.derive import Derivation, Members
from pipelines.embed import publish_file
from pipelines.images import StoredImage
from pipelines.ledger import COMMITTED
from pipelines.outcomes import NotStored
from pipelines.salvage import Plausible, is_whole, salvaged, texts_agree
from pipelines.shards import ShardWriter, read_shard, sample_members
from pipelines.stage_images import decoder_for, images_of
from pipelines.stored import live_versions
from pipelines.takedown import Found
from pipelines.tombstones import Tombstones

if TYPE_CHECKING:
    pass

REPAIR_VERSION = 1
LOST = "lost"
_NAMED = 100
_WHOLE_SHARD = ShardConfig(max_samples=1 << 40, max_bytes=1 << 50)
_COLUMNS = ["sample_id", "url", "sha256", "shard", "disposition"]


@dataclass(frozen=True)
class Mended:
    """What became of a damaged shard: put back as it was, or ``stand_in``, a tar of what is left.

    ``lost``: ids of samples that are not in it; ``unproven``: how many come from the damaged tar.
    """

    restored: bool
    stand_in: FileEntry | None
    lost: list[str]
    unproven: int


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
                ids = self.rows()["sample_id"].implode()
                rows = rows.filter(pl.col("sample_id").is_in(ids) & ~in_damaged)
            entry = None
            if rows.height:
                path = folder / "found.parquet"
                rows.select(_COLUMNS[:-1]).write_parquet(path)
                relative = f"{self.relative}/rows"
                entry = publish_file(path, self.dataset_root, relative, "parquet", rows.height)
            marker = Found(rows.height, entry)
            storage.write_json(self.marker_uri("found", number), asdict(marker))

    def rows(self, *, elsewhere: bool = False) -> pl.DataFrame:
        """The rows of the samples in damaged shards; or where else such samples are."""
        first, last = 0, len(self.manifest.ledger)
        if elsewhere:
            first, last = last, last + len(self.others)
        frames = [pl.DataFrame(schema=dict.fromkeys(_COLUMNS[:-1], pl.String()))]
        for number in range(first, last):
            data = storage.read_bytes(self.marker_uri("found", number))
            found = TypeAdapter(Found).validate_json(data, strict=True)
            if found.rows is not None:
                uri = storage.join(self.dataset_root, found.rows.path)
                frames.append(pl.read_parquet(storage.read_bytes(uri, found.rows.sha256)))
        return pl.concat(frames)

    @cached_property
    def _damaged_paths(self) -> list[str]:
        return [self.manifest.shards[index].path for index in self.damaged]

    # --- a damaged shard -------------------------------------------------------------------------

    def mend(self, number: int) -> None:
        """One task: put the n-th damaged shard back, or leave what stands in for it."""
        shard = self.manifest.shards[self.damaged[number]]
        with self.task(f"mended-{number:06d}") as folder:
            rows = self.rows().filter(pl.col("shard") == shard.path).sort("sample_id")
            gathered = _Gathered(self, shard, rows, folder)
            mended = gathered.put_back() or gathered.stand_in()
            storage.write_json(self.marker_uri("mended", number), asdict(mended))

    def mended(self) -> dict[int, Mended]:
        """Shard's number -> what became of it; of those that are done."""
        found = {}
        for number, index in enumerate(self.damaged):
            try:
                data = storage.read_bytes(self.marker_uri("mended", number))
                found[index] = TypeAdapter(Mended).validate_json(data, strict=True)
            except (storage.ObjectMissing, ValidationError):
                continue
        return found

    # --- the version without what was lost -------------------------------------------------------

    def decide(self, index: int, folder: Path) -> pl.DataFrame:
        """All samples of a shard that has a stand-in: those that are lost leave."""
        kept: list[str] = []
        lost: list[str] = []
        mended = self.mended().get(index) if index in self.damaged else None
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
        mended = self.mended().get(index) if index in self.damaged else None
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


class _Gathered:
    """The samples of one damaged shard, from wherever they can be had."""

    def __init__(self, job: RepairJob, shard: ShardEntry, rows: pl.DataFrame, folder: Path) -> None:
        self._job, self._shard, self._folder = job, shard, folder
        self._rows = {row["sample_id"]: row for row in rows.iter_rows(named=True)}
        self._pieces = self._of_torn()
        self._torn = {key: found for key, found in self._pieces.items() if is_whole(found)}
        self._elsewhere = self._of_others()
        self._staged = self._of_staged()
        self._fetched: dict[str, Members] = {}
        self._asked: set[str] = set()

    def put_back(self) -> Mended | None:
        """The shard with its listed digest; asks the web for as little as it can."""
        for sources in ((self._torn, self._elsewhere), (self._elsewhere, self._torn)):
            known: dict[str, Members] = {}
            for source in reversed(sources):
                known |= source
            self._fetch(key for key in self._rows if key not in known)
            if self._packed_right({**self._fetched, **known}):
                return Mended(True, None, [], 0)
        self._fetch(self._rows)
        if self._packed_right({**self._torn, **self._elsewhere, **self._fetched}):
            return Mended(True, None, [], 0)
        return None

    def stand_in(self) -> Mended:
        """A tar of what is proven (made again as it was, or in a whole shard) or plausible."""
        proven = dict(self._elsewhere)
        proven |= {key: made for key, made in self._fetched.items() if key in self._staged}
        candidates = {**self._torn, **self._fetched}
        plausible = Plausible()
        try:
            unproven = {
                key: candidates[key]
                for key in sorted(candidates.keys() - proven.keys())
                if plausible(self._rows[key], candidates[key])
            }
        finally:
            plausible.close()
        kept = {**unproven, **proven}
        lost = sorted(self._rows.keys() - kept.keys())
        if not kept:
            return Mended(False, None, lost, 0)
        _, path = self._pack(kept)
        relative = f"{self._job.relative}/stand-ins"
        entry = publish_file(path, self._job.dataset_root, relative, "tar", len(kept))
        return Mended(False, entry, lost, len(unproven))

    def _packed_right(self, samples: Mapping[str, Members]) -> bool:
        """Whether these are the shard; it is put back then."""
        if samples.keys() != self._rows.keys():
            return False
        sha256, path = self._pack(samples)
        if sha256 != self._shard.sha256:
            return False
        storage.upload(path, storage.join(self._job.dataset_root, self._shard.path))
        return True

    def _pack(self, samples: Mapping[str, Members]) -> tuple[str, Path]:
        tried = self._folder / "tried"
        with ShardWriter(_WHOLE_SHARD, storage.file_uri(tried), self._folder) as writer:
            for key in sorted(samples):
                writer.add(key, samples[key])
            (made,) = writer.finish()
        return made.sha256, tried / made.path

    def _of_torn(self) -> dict[str, Members]:
        try:
            data = storage.read_bytes(storage.join(self._job.dataset_root, self._shard.path))
        except storage.ObjectMissing:
            return {}
        return {key: found for key, found in salvaged(data).items() if key in self._rows}

    def _of_others(self) -> dict[str, Members]:
        """From shards of other versions, whole ones alone."""
        found: dict[str, Members] = {}
        elsewhere = self._job.rows(elsewhere=True)
        elsewhere = elsewhere.filter(pl.col("sample_id").is_in(list(self._rows)))
        listed = {
            shard.path: shard.sha256
            for manifest in live_versions(self._job.dataset_root)
            for shard in manifest.shards
        }
        for (path,), rows in elsewhere.sort("shard").group_by("shard", maintain_order=True):
            wanted = set(rows["sample_id"]) - found.keys()
            if not wanted or str(path) not in listed:
                continue
            uri = storage.join(self._job.dataset_root, str(path))
            try:
                samples = dict(read_shard(storage.read_bytes(uri, listed[str(path)])))
            except (storage.ObjectMissing, storage.DigestMismatch):
                continue
            found |= {key: samples[key] for key in wanted if key in samples}
        return found

    def _of_staged(self) -> dict[str, dict[str, Any]]:
        """The rows that the build left, with captions, when its working files are there."""
        root = self._job.dataset_root
        for info in storage.list_objects(storage.join(root, "work")):
            folder, _, name = info.uri.rpartition("/")
            if not name.startswith("part-"):
                continue
            try:
                part = json.loads(storage.read_bytes(info.uri))
                if all(each["path"] != self._shard.path for each in part["shards"]):
                    continue
                uri = storage.join(folder, name.replace("part-", "staged-"))
                marker = TypeAdapter(StagedMarker).validate_json(storage.read_bytes(uri))
                uri = storage.join(root, marker.rows.path)
                rows = pl.read_parquet(storage.read_bytes(uri, marker.rows.sha256))
            except (storage.ObjectMissing, storage.DigestMismatch, ValueError, LookupError):
                continue
            mine = rows.filter(
                pl.col("sample_id").is_in(list(self._rows)) & pl.col("offset").is_not_null()
            )
            return {row["sample_id"]: row for row in mine.iter_rows(named=True)}
        return {}

    def _fetch(self, keys: Iterable[str]) -> None:
        """Ask the web, or the tars, for those of ``keys`` that were not asked for yet."""
        todo = [key for key in keys if key not in self._asked and self._texts(key)]
        self._asked.update(todo)
        config = self._job.config
        with (
            ListedBodies(config.fetch, self._job.tars, self._job.tombstones) as source,
            ThreadPoolExecutor(config.fetch.num_threads) as pool,
        ):
            for first in range(0, len(todo), config.fetch.num_threads):
                some = todo[first : first + config.fetch.num_threads]
                bodies = pool.map(lambda key: fetch_body(self._rows[key]["url"], source), some)
                for key, body in zip(some, bodies, strict=True):
                    members = None if isinstance(body, NotStored) else self._members(key, body)
                    if members is not None:
                        self._fetched[key] = members

    def _texts(self, key: str) -> bool:
        """Whether there are captions to put beside an image that comes again."""
        if key in self._staged or key in self._elsewhere:
            return True
        return texts_agree(self._rows[key], self._pieces.get(key, {}))

    def _members(self, key: str, body: bytes) -> Members | None:
        """The sample with the body's image; None when the body is another one than it was."""
        if sha256_bytes(body) != self._rows[key]["sha256"]:
            return None
        config = self._job.config
        (image,) = images_of(body, decoder_for([config]), [config])
        if not isinstance(image, StoredImage):
            return None
        extension = config.resize.encode_format
        if key in self._staged:
            return sample_members(self._staged[key], image.data, extension, config.preference)
        known = self._elsewhere.get(key) or self._pieces[key]
        return {"json": known["json"], "txt": known["txt"], extension: image.data}
