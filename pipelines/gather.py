"""What is left of one damaged shard, from wherever it can be had, and the shard made of it again.

Its samples come from what is left of its tar, from whole shards of other versions, from the rows
that its build staged, and from the web.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import polars as pl

from infra import storage
from infra.digests import sha256_bytes
from infra.manifest import FileEntry, ShardEntry
from pipelines.arrivals import fetch_body
from pipelines.bodies import ListedBodies
from pipelines.config import ShardConfig
from pipelines.derive import Members
from pipelines.embed import publish_file
from pipelines.images import StoredImage
from pipelines.outcomes import NotStored
from pipelines.salvage import Plausible, is_whole, salvaged, texts_agree
from pipelines.shards import ShardWriter, read_shard, sample_members
from pipelines.stage_images import decoder_for, images_of
from pipelines.workspace import read_tables

if TYPE_CHECKING:
    from pipelines.repair_shards import RepairJob

_WHOLE_SHARD = ShardConfig(max_samples=1 << 40, max_bytes=1 << 50)


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
class Clues:
    """Of a damaged shard: the rows of its samples, there and in whole shards elsewhere (those have
    a ``shard_sha256``), and rows that builds left of its partition."""

    rows: FileEntry
    staged: list[FileEntry]


class Gathered:
    """The samples of one damaged shard, from wherever they can be had."""

    def __init__(self, job: RepairJob, shard: ShardEntry, clues: Clues, folder: Path) -> None:
        self._job, self._shard, self._folder = job, shard, folder
        (rows,) = read_tables(job.dataset_root, [clues.rows])
        is_own = pl.col("shard") == shard.path
        self._rows = {row["sample_id"]: row for row in rows.filter(is_own).iter_rows(named=True)}
        self._pieces = self._of_torn()
        self._torn = {key: found for key, found in self._pieces.items() if is_whole(found)}
        self._elsewhere = self._of_others(rows.filter(~is_own))
        self._staged = self._of_staged(clues.staged)
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

    def _of_others(self, elsewhere: pl.DataFrame) -> dict[str, Members]:
        """From shards of other versions, whole ones alone."""
        found: dict[str, Members] = {}
        by_shard = elsewhere.group_by("shard", "shard_sha256", maintain_order=True)
        for (path, sha256), rows in by_shard:
            wanted = set(rows["sample_id"]) - found.keys()
            if not wanted:
                continue
            uri = storage.join(self._job.dataset_root, str(path))
            try:
                samples = dict(read_shard(storage.read_bytes(uri, str(sha256))))
            except (storage.ObjectMissing, storage.DigestMismatch):
                continue
            found |= {key: samples[key] for key in wanted if key in samples}
        return found

    def _of_staged(self, staged: Iterable[FileEntry]) -> dict[str, dict[str, Any]]:
        """The rows that a build left, with captions, when its working files are there."""
        for entry in staged:
            try:
                (rows,) = read_tables(self._job.dataset_root, [entry])
            except (storage.ObjectMissing, storage.DigestMismatch):
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
