"""Prove that a dataset's bytes are the ones its manifest promises."""

from __future__ import annotations

import hashlib
import tarfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import IO, cast

from infra import storage
from infra.errors import UserError
from infra.manifest import (
    FileEntry,
    ShardEntry,
    dataset_root,
    load_manifest,
    manifest_problems,
)
from infra.progress import Progress

VERIFY_THREADS = 4
DRAIN_BYTES = 1 << 20


def verify(manifest_uri: str, progress: Progress | None = None) -> list[str]:
    """Read every listed byte and return the problems found, one line each, in manifest order.

    Finds missing files, wrong sizes, digests and row counts, members that are not plain files,
    and counts that do not add up. Streams: memory stays at a few MiB per thread. Raises
    ``StorageUnavailable`` when storage itself fails, for then nothing is proven.
    """
    try:
        manifest = load_manifest(manifest_uri)
    except (storage.ObjectMissing, storage.DigestMismatch) as error:
        return [str(error)]
    root = dataset_root(manifest_uri)
    checks: list[Callable[[], list[str]]] = [
        *(lambda shard=shard: _check_shard(root, shard) for shard in manifest.shards),
        *(lambda file=file: _check_ledger(root, file) for file in manifest.ledger),
    ]
    problems: dict[int, list[str]] = {}
    with ThreadPoolExecutor(VERIFY_THREADS) as pool:
        futures = {pool.submit(check): index for index, check in enumerate(checks)}
        try:
            for num_done, future in enumerate(as_completed(futures), start=1):
                problems[futures[future]] = future.result()
                if progress is not None:
                    progress.update(done=num_done, total=len(checks))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    found = [problem for index in sorted(problems) for problem in problems[index]]
    return manifest_problems(manifest) + found


class _Hashed:
    """A stream that hashes and counts what passes through."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream
        self._digest = hashlib.sha256()
        self.num_bytes = 0

    def read(self, size: int = -1) -> bytes:
        data = self._stream.read(size)
        self._digest.update(data)
        self.num_bytes += len(data)
        return data

    def finish(self) -> str:
        while self.read(DRAIN_BYTES):
            pass
        return self._digest.hexdigest()


def _check_shard(root: str, shard: ShardEntry) -> list[str]:
    uri = storage.join(root, shard.path)
    try:
        with storage.open_stream(uri) as stream:
            hashed = _Hashed(stream)
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
    keys: set[str] = set()
    problems: list[str] = []
    try:
        with tarfile.open(fileobj=cast("IO[bytes]", stream), mode="r|") as tar:
            for member in tar:
                folder, _, base = member.name.rpartition("/")
                if not member.isreg() or folder or base.startswith("."):
                    problems.append(f"{path}: member {member.name!r} is not a plain sample file")
                keys.add(base.split(".", 1)[0])
    except tarfile.TarError as error:
        problems.append(f"{path}: not a readable tar ({error})")
    return keys, problems


def _check_ledger(root: str, file: FileEntry) -> list[str]:
    uri = storage.join(root, file.path)
    try:
        with storage.open_stream(uri) as stream:
            hashed = _Hashed(stream)
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
