"""The dataset manifest: the one file in which curation and training meet.

It lists each shard's path, bytes, sha256 and sample count, and how every input row ended. It is
canonical JSON and written last; the sha256 of its bytes is the dataset's version. Under
``<store>/datasets/<name>/`` lie ``shards/`` and ``ledger/`` (content-named, shared by versions) and
``<version>/manifest.json``. Readers trust nothing that a manifest does not list.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import TYPE_CHECKING, Any, TypeVar

from infra import storage
from infra.digests import canonical_json, sha256_bytes
from infra.errors import UserError
from infra.storage_once import write_once

if TYPE_CHECKING:
    from infra.progress import Progress

MANIFEST_SCHEMA_VERSION = 1
MANIFEST_NAME = "manifest.json"
WITHDRAWN_NAME = "withdrawn.json"
# An attribute: shard path -> [width, height] of each of its images, px; for aspect buckets.
SHARD_SIZES = "shard_sizes_px"
_SHA256 = re.compile(r"[0-9a-f]{64}")
_COUNT_NAMES = {"rows_in", "committed", "rejected", "failed"}


@dataclass(frozen=True)
class ShardEntry:
    """A WebDataset tar; ``path`` is relative to the dataset's root."""

    path: str
    num_bytes: int
    sha256: str
    num_samples: int


@dataclass(frozen=True)
class FileEntry:
    """A ledger file (parquet); ``path`` is relative to the dataset's root."""

    path: str
    num_bytes: int
    sha256: str
    num_rows: int


@dataclass(frozen=True)
class DatasetManifest:
    """A version of a dataset. Holds no time, host or port: equal inputs give equal bytes.

    ``counts`` has ``rows_in``, ``committed``, ``rejected`` and ``failed``; ``rejected`` and
    ``failed`` break the last two down by reason and cause. ``parents`` are the manifests or files
    this one was made from, ``attributes`` whatever a reader should know (JSON values).
    """

    name: str
    recipe_fingerprint: str
    shards: list[ShardEntry]
    ledger: list[FileEntry]
    counts: dict[str, int]
    rejected: dict[str, int] = field(default_factory=dict)
    failed: dict[str, int] = field(default_factory=dict)
    parents: list[Any] = field(default_factory=list)
    attributes: dict[str, Any] = field(default_factory=dict)
    schema_version: int = MANIFEST_SCHEMA_VERSION

    def to_bytes(self) -> bytes:
        """Canonical JSON."""
        return canonical_json(asdict(self))

    @property
    def version(self) -> str:
        """The sha256 of ``to_bytes()``, 64 hex digits."""
        return sha256_bytes(self.to_bytes())


def shard_path(sha256: str) -> str:
    """The path of a shard, relative to the dataset's root."""
    return f"shards/{sha256[:32]}.tar"


def ledger_path(sha256: str) -> str:
    """The path of a ledger file, relative to the dataset's root."""
    return f"ledger/{sha256[:32]}.parquet"


def dataset_root(manifest_uri: str) -> str:
    """``<store>/datasets/<name>`` of ``<store>/datasets/<name>/<version>/manifest.json``."""
    parts = manifest_uri.rsplit("/", 2)
    if len(parts) != 3 or parts[2] != MANIFEST_NAME:
        raise UserError(
            expected=f"a manifest's address ending in /<version>/{MANIFEST_NAME}", got=manifest_uri
        )
    return parts[0]


def store_root(dataset_root_uri: str) -> str:
    """``<store>`` of ``<store>/datasets/<name>``; itself for a dataset that lies elsewhere."""
    return dataset_root_uri.rstrip("/").rsplit("/datasets/", 1)[0]


def listed_files(manifest: DatasetManifest) -> list[ShardEntry | FileEntry]:
    """Every file the manifest lists, shards first."""
    return [*manifest.shards, *manifest.ledger]


def manifest_problems(manifest: DatasetManifest) -> list[str]:
    """What is inconsistent inside the manifest itself; empty when it adds up."""
    problems = []
    if set(manifest.counts) != _COUNT_NAMES:
        return [f"counts are {sorted(manifest.counts)}, expected {sorted(_COUNT_NAMES)}"]
    counts = manifest.counts
    ended = counts["committed"] + counts["rejected"] + counts["failed"]
    if counts["rows_in"] != ended:
        problems.append(f"{counts['rows_in']} rows in, but {ended} rows accounted for")
    sums = {
        "committed": sum(shard.num_samples for shard in manifest.shards),
        "rejected": sum(manifest.rejected.values()),
        "failed": sum(manifest.failed.values()),
    }
    for name, total in sums.items():
        if counts[name] != total:
            problems.append(f"counts say {counts[name]} {name}, the listed ones add up to {total}")
    entries = listed_files(manifest)
    for entry in entries:
        if not _SHA256.fullmatch(entry.sha256):
            problems.append(f"{entry.path}: {entry.sha256!r} is not a sha256")
        if entry.path.startswith("/") or {"", ".", ".."} & set(entry.path.split("/")):
            problems.append(f"{entry.path!r} is not a relative path inside the dataset")
    if len({entry.path for entry in entries}) != len(entries):
        problems.append("a path is listed twice")
    return problems


def publish_manifest(dataset_root_uri: str, manifest: DatasetManifest) -> str:
    """Write the manifest, after its files: they must be there in full size. Returns its address.

    Raises ``ValueError`` when the manifest does not add up and ``UserError`` naming the first
    file that is missing or short.
    """
    problems = manifest_problems(manifest)
    if problems:
        raise ValueError(f"manifest of {manifest.name!r}: {'; '.join(problems)}")
    _refuse_missing_files(
        dataset_root_uri, listed_files(manifest), "run the curation again; it keeps what is whole"
    )
    uri = storage.join(dataset_root_uri, manifest.version, MANIFEST_NAME)
    write_once(uri, manifest.to_bytes())
    return uri


def _refuse_missing_files(
    root: str, entries: Sequence[ShardEntry | FileEntry], remedy: str
) -> None:
    """``UserError`` naming the first file that is missing or short, from listings alone."""
    found = {}
    for folder in sorted({entry.path.split("/")[0] for entry in entries}):
        for info in storage.list_objects(storage.join(root, folder)):
            found[info.uri] = info.num_bytes
    for entry in entries:
        num_bytes = found.get(storage.join(root, entry.path))
        if num_bytes != entry.num_bytes:
            raise UserError(
                expected=f"{entry.path} of {entry.num_bytes} bytes under {root}",
                got="nothing" if num_bytes is None else f"{num_bytes} bytes",
                remedy=remedy,
            )


def load_whole(manifest_uri: str, sha256: str | None = None) -> DatasetManifest:
    """For readers of shards, before they begin: the manifest, and every shard there in full size.

    Raises what ``load_manifest`` does, and ``UserError`` naming the first shard that is not.
    """
    manifest = load_manifest(manifest_uri, sha256)
    remedy = "run `atelier repair`, or the curation again"
    _refuse_missing_files(dataset_root(manifest_uri), manifest.shards, remedy)
    return manifest


def load_manifest(manifest_uri: str, sha256: str | None = None) -> DatasetManifest:
    """Read a manifest and check its bytes against ``sha256`` and against its folder's name.

    Raises ``ObjectMissing``, ``DigestMismatch``, or ``UserError`` for another schema version.
    """
    folder = dataset_version(manifest_uri)
    by_name = folder if _SHA256.fullmatch(folder) else None
    try:
        data = storage.read_bytes(manifest_uri, sha256 or by_name)
    except storage.ObjectMissing:
        successor = successor_of(dataset_root(manifest_uri), folder)
        if successor == folder:
            raise
        raise UserError(
            f"version {folder[:12]} was withdrawn, samples in it were taken down; "
            f"use its successor {manifest_uri.replace(folder, successor)}"
        ) from None
    if by_name is not None and sha256_bytes(data) != by_name:
        raise storage.DigestMismatch(
            manifest_uri, expected_sha256=by_name, got_sha256=sha256_bytes(data)
        )
    return parse_manifest(data, manifest_uri)


def successor_of(root: str, version: str) -> str:
    """The version that took the place of a withdrawn one; ``version`` itself when it was not."""
    seen = set()
    while version not in seen:
        seen.add(version)
        try:
            note = storage.read_json(storage.join(root, version, WITHDRAWN_NAME))
        except storage.ObjectMissing:
            break
        version = str(note["successor"])
    return version


def withdraw(root: str, version: str, successor: str) -> None:
    """Put a note in a version's place that names its successor; its manifest and pages go."""
    folder = storage.join(root, version)
    storage.write_json(storage.join(folder, WITHDRAWN_NAME), {"successor": successor})
    for info in list(storage.list_objects(folder)):
        if not info.uri.endswith(f"/{WITHDRAWN_NAME}"):
            storage.delete(info.uri)


def dataset_version(manifest_uri: str) -> str:
    """The version folder's name in a manifest's address."""
    dataset_root(manifest_uri)
    return manifest_uri.rsplit("/", 2)[1]


def parse_manifest(data: bytes, origin: str = "manifest") -> DatasetManifest:
    """The manifest in ``data``; ``origin`` names it in errors."""
    try:
        raw = json.loads(data)
    except ValueError as error:
        raise UserError(expected=f"JSON in {origin}", got=str(error)) from error
    if not isinstance(raw, dict) or "schema_version" not in raw:
        raise UserError(f"{origin} is not a dataset manifest; check the address")
    if raw["schema_version"] != MANIFEST_SCHEMA_VERSION:
        raise UserError(
            expected=f"manifest schema {MANIFEST_SCHEMA_VERSION} in {origin}",
            got=repr(raw["schema_version"]),
            remedy="use the version of atelier that wrote it, or curate again",
        )
    raw["shards"] = [_entry(ShardEntry, entry, origin) for entry in raw.get("shards", [])]
    raw["ledger"] = [_entry(FileEntry, entry, origin) for entry in raw.get("ledger", [])]
    return _entry(DatasetManifest, raw, origin)


_Record = TypeVar("_Record", ShardEntry, FileEntry, DatasetManifest)


def _entry(kind: type[_Record], raw: Any, origin: str) -> _Record:
    names = {f.name for f in fields(kind)}
    if not isinstance(raw, dict) or set(raw) != names:
        got = sorted(raw) if isinstance(raw, dict) else repr(raw)
        raise UserError(
            expected=f"{kind.__name__} fields {sorted(names)} in {origin}", got=str(got)
        )
    return kind(**raw)


def verify_dataset(
    manifest_uri: str, progress: Progress | None = None, *, memory_uri: str | None = None
) -> list[str]:
    """Read every listed byte and return the problems found: ``infra.manifest_verify.verify``."""
    from infra.manifest_verify import verify

    return verify(manifest_uri, progress, memory_uri=memory_uri)
