"""Prove that a dataset's bytes are the ones its manifest promises."""

from __future__ import annotations

import hashlib
import os
import tarfile
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import IO, TypeVar, cast

from pydantic import TypeAdapter, ValidationError

from infra import storage
from infra.errors import UserError
from infra.manifest import (
    MANIFEST_NAME,
    FileEntry,
    ShardEntry,
    dataset_root,
    listed_files,
    load_manifest,
    manifest_problems,
)
from infra.progress import Progress
from infra.shard_members import Inventory

MIN_THREADS = 4  # more than cores where storage answers slowly; hashing lets go of the lock
_Entry = TypeVar("_Entry", ShardEntry, FileEntry)
DRAIN_BYTES = 1 << 20
MEGABYTE = 1_000_000


def verify(
    manifest_uri: str, progress: Progress | None = None, *, memory_uri: str | None = None
) -> list[str]:
    """Read every listed byte and return the problems found, one line each, in manifest order.

    Finds missing files, wrong sizes, digests and row counts, members that are not plain files,
    and counts that do not add up. Streams: memory stays at a few MiB per thread. ``progress`` is
    told megabytes read, of those listed. Raises ``StorageUnavailable`` when storage itself fails,
    for then nothing is proven.

    With ``memory_uri``, an address for a note, files that were found right and have not been
    written since are not read again. That finds whatever anyone wrote, and no decay at rest.
    """
    try:
        manifest = load_manifest(manifest_uri)
    except (storage.ObjectMissing, storage.DigestMismatch) as error:
        return [str(error)]
    root = dataset_root(manifest_uri)
    meter = _Meter(progress, sum(entry.num_bytes for entry in listed_files(manifest)))
    memory = _Memory(root, memory_uri)
    checks: list[Callable[[], list[str]]] = [
        *(
            lambda shard=shard: memory.check(shard, _check_shard, meter)
            for shard in manifest.shards
        ),
        *(lambda file=file: memory.check(file, _check_ledger, meter) for file in manifest.ledger),
    ]
    problems: dict[int, list[str]] = {}
    with ThreadPoolExecutor(max(MIN_THREADS, os.cpu_count() or 1)) as pool:
        futures = {pool.submit(check): index for index, check in enumerate(checks)}
        try:
            for future in as_completed(futures):
                problems[futures[future]] = future.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
        finally:
            memory.save()
    found = [problem for index in sorted(problems) for problem in problems[index]]
    return manifest_problems(manifest) + found


def unlisted_files(root: str) -> list[str]:
    """Shards and ledger files under a dataset's root that no readable manifest there lists.

    Paths relative to ``root``, sorted. No damage: a build under way, or one that was given up,
    leaves such files, and readers never look at them.
    """
    prefix = root.rstrip("/") + "/"
    listed: set[str] = set()
    found: list[str] = []
    for info in storage.list_objects(root):
        path = info.uri.removeprefix(prefix)
        folder, _, name = path.rpartition("/")
        if folder in ("shards", "ledger"):
            found.append(path)
        elif name == MANIFEST_NAME and "/" not in folder:
            try:
                listed.update(entry.path for entry in listed_files(load_manifest(info.uri)))
            except (storage.DigestMismatch, storage.ObjectMissing, UserError):
                continue  # verify names it
    return sorted(path for path in found if path not in listed)


class _Meter:
    """Tells progress in megabytes; many threads add to it."""

    def __init__(self, progress: Progress | None, num_bytes: int) -> None:
        self._progress = progress
        self._total = -(-num_bytes // MEGABYTE)
        self._num_bytes = 0
        self._lock = threading.Lock()

    def add(self, num_bytes: int) -> None:
        if self._progress is None:
            return
        with self._lock:
            before = -(-self._num_bytes // MEGABYTE)
            self._num_bytes += num_bytes
            done = -(-self._num_bytes // MEGABYTE)
            if done > before:
                self._progress.update(done=done, total=self._total)


class _Memory:
    """Which files were found right, by what storage said of them then."""

    def __init__(self, root: str, uri: str | None) -> None:
        self._root = root
        self._uri = uri
        self._known: dict[str, str] = {}
        self._found: dict[str, str] = {}
        if uri is not None:
            try:
                noted = TypeAdapter(dict[str, str]).validate_json(storage.read_bytes(uri))
            except (storage.ObjectMissing, ValidationError):
                noted = {}
            self._known = noted

    def check(
        self,
        entry: _Entry,
        check: Callable[[str, _Entry, _Meter], list[str]],
        meter: _Meter,
    ) -> list[str]:
        """The problems of a file; none, unread, when it is as it was when it had none."""
        if self._uri is None:
            return _confirmed(self._root, entry, check, meter)
        try:
            fingerprint = storage.fingerprint(storage.join(self._root, entry.path))
        except storage.ObjectMissing:
            return [f"{entry.path}: missing"]
        if fingerprint is not None and self._known.get(entry.path) == fingerprint:
            meter.add(entry.num_bytes)
        elif problems := _confirmed(self._root, entry, check, meter):
            return problems
        if fingerprint is not None:
            self._found[entry.path] = fingerprint
        return []

    def save(self) -> None:
        """Note what is known by now, if that is more or less than before."""
        if self._uri is not None and self._found != self._known:
            storage.write_json(self._uri, dict(self._found))


def _confirmed(
    root: str, entry: _Entry, check: Callable[[str, _Entry, _Meter], list[str]], meter: _Meter
) -> list[str]:
    """The problems of a file; on S3 of a second reading, for bytes may change on their way."""
    problems = check(root, entry, meter)
    if problems and root.startswith("s3://"):
        return check(root, entry, _Meter(None, 0))
    return problems


class _Hashed:
    """A stream that hashes and counts what passes through."""

    def __init__(self, stream: IO[bytes], meter: _Meter) -> None:
        self._stream = stream
        self._meter = meter
        self._digest = hashlib.sha256()
        self.num_bytes = 0

    def read(self, size: int = -1) -> bytes:
        data = self._stream.read(size)
        self._digest.update(data)
        self.num_bytes += len(data)
        self._meter.add(len(data))
        return data

    def finish(self) -> str:
        while self.read(DRAIN_BYTES):
            pass
        return self._digest.hexdigest()


def _check_shard(root: str, shard: ShardEntry, meter: _Meter) -> list[str]:
    uri = storage.join(root, shard.path)
    try:
        with storage.open_stream(uri) as stream:
            hashed = _Hashed(stream, meter)
            keys, problems = _read_tar(shard.path, hashed)
            sha256 = hashed.finish()
    except storage.ObjectMissing:
        return [f"{shard.path}: missing"]
    wrong_bytes = _compare_bytes(shard, hashed.num_bytes, sha256)
    if not wrong_bytes and len(keys) != shard.num_samples:
        problems.append(f"{shard.path}: {len(keys)} samples, expected {shard.num_samples}")
    return wrong_bytes + problems


def _read_tar(path: str, stream: _Hashed) -> tuple[set[str], list[str]]:
    """The distinct sample keys (member name up to its first dot) and what is wrong inside."""
    inventory = Inventory()
    problems: list[str] = []
    try:
        with tarfile.open(fileobj=cast("IO[bytes]", stream), mode="r|") as tar:
            for member in tar:
                if (problem := inventory.problem_with(member)) is not None:
                    problems.append(f"{path}: {problem}")
    except tarfile.TarError as error:
        problems.append(f"{path}: not a readable tar ({error})")
    return inventory.keys, problems


def _check_ledger(root: str, file: FileEntry, meter: _Meter) -> list[str]:
    uri = storage.join(root, file.path)
    try:
        with storage.open_stream(uri) as stream:
            hashed = _Hashed(stream, meter)
            sha256 = hashed.finish()
    except storage.ObjectMissing:
        return [f"{file.path}: missing"]
    wrong_bytes = _compare_bytes(file, hashed.num_bytes, sha256)
    return wrong_bytes or _compare_rows(uri, file)


def _compare_rows(uri: str, file: FileEntry) -> list[str]:
    if not file.path.endswith(".parquet"):
        return []
    import pyarrow
    import pyarrow.parquet as pq

    filesystem, path = storage.arrow_filesystem(uri)
    try:
        num_rows = pq.read_metadata(path, filesystem=filesystem).num_rows
    except (pyarrow.ArrowInvalid, UserError) as error:
        return [f"{file.path}: not a readable parquet file ({error})"]
    if num_rows != file.num_rows:
        return [f"{file.path}: {num_rows} rows, expected {file.num_rows}"]
    return []


def _compare_bytes(entry: ShardEntry | FileEntry, num_bytes: int, sha256: str) -> list[str]:
    if num_bytes != entry.num_bytes:
        return [f"{entry.path}: {num_bytes} bytes, expected {entry.num_bytes}"]
    if sha256 != entry.sha256:
        return [f"{entry.path}: sha256 {sha256}, expected {entry.sha256}"]
    return []
