"""The folder of one build: what is done is what a marker says, and markers are written last.

``work/<key12>/`` under the dataset's root holds per unit ``read-NNNNN.json``, per partition
``staged-NNNNN.json`` (images fetched) and ``part-NNNNN.json`` (shards written), and at the end
``result.json``. A marker names its files with size and sha256; one that is unreadable, or whose
files are not there in full size, counts as not written. Files carry their digest in their name, so
a second attempt at the same work can never tear the first one's apart.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from infra import storage
from infra.digests import sha256_file
from infra.manifest import FileEntry, ShardEntry
from infra.storage_once import upload_once
from pipelines.config import CurationConfig
from pipelines.tombstones import Tombstones
from pipelines.workspace import Workspace, read_marker, read_markers

KEY_CHARS = 12


@dataclass(frozen=True)
class ReadMarker:
    """A unit was read: ``num_kept`` rows went on, the others are in ``ledger``.

    ``unknown``: policy -> value -> how many of those that went on lack it while it is asked for.
    """

    num_rows: int
    num_kept: int
    rejected: dict[str, int]
    ledger: FileEntry | None
    unknown: dict[str, dict[str, int]] = field(default_factory=dict)


@dataclass(frozen=True)
class PartMarker:
    """A partition is done, up to a round: its shards, and how each of its rows ended.

    ``shard_sizes``: width and height of every image of a shard, px, where they are alike.
    ``captions``: what was done to the captions of its rows -> how many rows.
    ``recorded``: how many of the committed rows' bytes are those that the metadata recorded, see
    ``recorded.matches``. ``pictures``: of copies that stay out, see ``rejected``. ``seconds``:
    what the task took, for estimates.
    """

    shards: list[ShardEntry]
    ledger: FileEntry | None
    committed: int
    rejected: dict[str, int]
    failed: dict[str, int]
    round: int = 0
    shard_sizes: dict[str, list[int]] = field(default_factory=dict)
    captions: dict[str, int] = field(default_factory=dict)
    recorded: dict[str, dict[str, int]] = field(default_factory=dict)
    pictures: FileEntry | None = None
    seconds: float = 0.0

    @property
    def num_rows(self) -> int:
        return self.committed + sum(self.rejected.values()) + sum(self.failed.values())


@dataclass(frozen=True)
class StagedMarker:
    """A partition was fetched: its rows, and the encoded images they point into.

    After a retry, both are those of the ``round`` alone; ``carried`` is what the rounds before it
    came to. ``pictures``: of bodies that were rejected, see ``rejected``. ``seconds``: what the
    first round's task took to ask for ``num_asked`` bodies, for estimates.
    """

    rows: FileEntry
    images: FileEntry
    round: int = 0
    captions: dict[str, int] = field(default_factory=dict)
    carried: PartMarker | None = None
    pictures: FileEntry | None = None
    seconds: float = 0.0
    num_asked: int = 0

    @property
    def carried_files(self) -> list[FileEntry | ShardEntry | None]:
        """What the rounds before left, and this one relies on."""
        return [] if self.carried is None else [*self.carried.shards, self.carried.ledger]


Marker = ReadMarker | StagedMarker | PartMarker
_Marker = TypeVar("_Marker", ReadMarker, StagedMarker, PartMarker)
_NAMES: dict[type[Any], str] = {
    ReadMarker: "read",
    StagedMarker: "staged",
    PartMarker: "part",
}


@dataclass(frozen=True)
class Build(Workspace):
    """One build; travels to the workers. ``environment`` is set in every task.

    ``base_key`` is the key that it has while nothing is taken down. ``tars``: where images lie that
    are not on the web, name -> address, see ``tar_samples``.
    """

    dataset_root: str
    key: str
    config: CurationConfig
    num_partitions: int
    base_key: str = ""
    tars: Mapping[str, str] = field(default_factory=dict)
    tombstones: Tombstones = field(default_factory=Tombstones)
    environment: Mapping[str, str] = field(default_factory=dict, repr=False)

    @property
    def folder(self) -> str:
        return storage.join(self.dataset_root, "work", self.key[:KEY_CHARS])

    @property
    def lease_uri(self) -> str:
        return storage.join(self.folder, "lease.json")

    @property
    def result_uri(self) -> str:
        return storage.join(self.folder, "result.json")

    @property
    def retry_uri(self) -> str:
        return storage.join(self.folder, "retry.json")

    def marker_uri(self, kind: type[Marker], index: int) -> str:
        return storage.join(self.folder, f"{_NAMES[kind]}-{index:05d}.json")

    def write(self, marker: Marker, index: int) -> None:
        storage.write_json(self.marker_uri(type(marker), index), asdict(marker))

    def read(self, kind: type[_Marker], index: int) -> _Marker | None:
        """The marker, or None when it is missing or unreadable. Does not look at its files."""
        return read_marker(self.marker_uri(kind, index), kind)

    def read_all(self, kind: type[_Marker], count: int) -> dict[int, _Marker]:
        """Index -> marker for those of the first ``count`` that are written."""
        prefix = storage.join(self.folder, f"{_NAMES[kind]}-")
        listed = {info.uri for info in storage.list_objects(self.folder)}
        indices = [index for index in range(count) if f"{prefix}{index:05d}.json" in listed]
        markers = read_markers((f"{prefix}{index:05d}.json" for index in indices), kind)
        found = zip(indices, markers, strict=True)
        return {index: marker for index, marker in found if marker is not None}

    def forget_markers(self) -> None:
        """Nothing counts as done any more; the files stay for ``clean``."""
        starts = tuple(storage.join(self.folder, f"{name}-") for name in _NAMES.values())
        for info in list(storage.list_objects(self.folder)):
            if info.uri.startswith(starts):
                storage.delete(info.uri)

    def stage(self, path: Path, kind: str, num_rows: int) -> FileEntry:
        """Upload a working file under its digest."""
        sha256 = sha256_file(path)
        relative = f"work/{self.key[:KEY_CHARS]}/{kind}/{sha256[:32]}"
        stored = upload_once(path, storage.join(self.dataset_root, relative), sha256)
        return FileEntry(relative, stored.num_bytes, sha256, num_rows)

    def fetch_staged(self, entry: FileEntry, folder: Path) -> Path:
        """Download a working file, digest checked."""
        path = folder / entry.path.rpartition("/")[2]
        storage.download(storage.join(self.dataset_root, entry.path), path, entry.sha256)
        return path

    def open_round(self) -> int | None:
        """The retry that was begun and is not published, if one is; rounds count from 1."""
        begun = _number(self.retry_uri, "round")
        return begun if begun > _number(self.result_uri, "round") else None

    def begin_round(self) -> int:
        """Begin the next retry; until it is published, the build is not finished."""
        number = self.open_round() or _number(self.result_uri, "round") + 1
        storage.write_json(self.retry_uri, {"round": number})
        return number

    def finish(self, version: str) -> None:
        """Say which version came out, and drop the images: the shards have them now."""
        number = _number(self.retry_uri, "round")
        result = {"version": version, "round": number, "base_key": self.base_key}
        if self.tars:  # a repair looks for the images there
            result["tars"] = dict(self.tars)
        self.forget("failures")
        storage.write_json(self.result_uri, result)
        self.forget("images")


def _number(uri: str, key: str) -> int:
    """A whole number in a small JSON object; 0 when it is not there."""
    try:
        found = storage.read_json(uri)
    except storage.ObjectMissing:
        return 0
    value = found.get(key) if isinstance(found, dict) else None
    return value if isinstance(value, int) else 0
