"""The one door to objects: ``s3://bucket/key`` and ``file:///abs/path`` alike.

S3 is configured by the environment at call time (``AWS_ENDPOINT_URL_S3``, ``AWS_ACCESS_KEY_ID``,
``AWS_SECRET_ACCESS_KEY``, ``AWS_REGION``), so a driver and its workers need only share that.
Writes are whole: an object is visible with all its bytes or not at all. Nothing here relies on
conditional writes. Every failure is one of three one-line errors: ``ObjectMissing``,
``DigestMismatch``, ``StorageUnavailable``.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, TYPE_CHECKING, Any, TypeVar, cast
from urllib.parse import quote, unquote

from infra import storage_s3 as s3
from infra import storage_upload
from infra.digests import canonical_json
from infra.errors import UserError
from infra.storage_errors import (
    DigestMismatch,
    GuardedReader,
    ObjectMissing,
    StorageUnavailable,
    local_errors,
)
from infra.storage_files import TEMPORARY_PREFIX, copied, replacing
from infra.storage_upload import UnfinishedUpload

if TYPE_CHECKING:
    import pyarrow.fs

__all__ = [
    "DigestMismatch",
    "ObjectInfo",
    "ObjectMissing",
    "StorageUnavailable",
    "StoredObject",
    "UnfinishedUpload",
    "arrow_filesystem",
    "delete",
    "delete_prefix",
    "download",
    "download_folder",
    "drop_upload",
    "exists",
    "file_uri",
    "fingerprint",
    "join",
    "list_objects",
    "open_stream",
    "read_bytes",
    "read_json",
    "stat",
    "unfinished_uploads",
    "upload",
    "upload_folder",
    "write_bytes",
    "write_json",
]

READ_ATTEMPTS = 3
FOLDER_THREADS = 4
LOCAL_CLOCK_NS = 50_000_000  # file systems note times by the kernel's tick
RESERVED_PREFIXES = (TEMPORARY_PREFIX, ".rclone_temp_", ".rclone_multipart_upload_")


@dataclass(frozen=True)
class ObjectInfo:
    """An object as a listing shows it."""

    uri: str
    num_bytes: int


@dataclass(frozen=True)
class StoredObject(ObjectInfo):
    """An object as it was written, with the sha256 (64 hex digits) of the bytes sent."""

    sha256: str


@dataclass(frozen=True)
class _Location:
    """A parsed URI: ``bucket`` and ``key`` on S3, ``path`` on this machine."""

    uri: str
    bucket: str = ""
    key: str = ""
    path: Path | None = None


def _parse(uri: str) -> _Location:
    if uri.startswith("s3://"):
        bucket, _, key = uri[len("s3://") :].partition("/")
        key = key.rstrip("/")
        if bucket and not _has_odd_segment(key):
            return _Location(uri, bucket=bucket, key=key)
    elif uri.startswith("file:///"):
        path = unquote(uri[len("file://") :])
        if not _has_odd_segment(path.strip("/")):
            return _Location(uri, path=Path(path))
    raise UserError(
        expected="an address like s3://bucket/key or file:///absolute/path",
        got=repr(uri),
        remedy="write it without '..', empty or temporary names",
    )


def _has_odd_segment(key: str) -> bool:
    return bool(key) and any(_is_odd(part) for part in key.split("/"))


def _is_odd(part: str) -> bool:
    """Not a name, or one that listings hide because unfinished writes are called so."""
    return part in ("", ".", "..") or "\0" in part or part.startswith(RESERVED_PREFIXES)


def _object_location(uri: str) -> _Location:
    location = _parse(uri)
    if location.path is None and not location.key:
        raise UserError(expected="an object", got=f"the bucket {uri}", remedy="add a key")
    return location


def file_uri(path: str | Path) -> str:
    """The ``file://`` address of a local path."""
    return Path(path).absolute().as_uri()


def join(uri: str, *parts: str) -> str:
    """``uri`` with path parts appended; parts may hold slashes, never ``..``."""
    segments = [segment for part in parts for segment in part.split("/") if segment]
    if uri.startswith("file://"):
        segments = [quote(segment) for segment in segments]
    joined = "/".join([uri.rstrip("/"), *segments])
    _parse(joined)
    return joined


@contextmanager
def open_stream(uri: str) -> Iterator[IO[bytes]]:
    """The object's bytes as a file to read once from start to end; raises ``ObjectMissing``."""
    location = _object_location(uri)
    if location.path is None:
        with s3.open_stream(uri, location.bucket, location.key) as stream:
            yield stream
    else:
        with local_errors("read", uri):
            file = location.path.open("rb")
        with file:
            yield cast("IO[bytes]", GuardedReader(file, lambda: local_errors("read", uri)))


def read_bytes(uri: str, sha256: str | None = None) -> bytes:
    """All bytes of an object; raises ``ObjectMissing`` or, by ``sha256``, ``DigestMismatch``."""

    def read() -> bytes:
        with open_stream(uri) as stream:
            data = stream.read()
        _compare(uri, sha256, hashlib.sha256(data).hexdigest() if sha256 else "")
        return data

    return _retried(uri, read)


def _compare(uri: str, expected: str | None, got: str) -> None:
    if expected not in (None, got):
        raise DigestMismatch(uri, expected_sha256=str(expected), got_sha256=got)


_Result = TypeVar("_Result")


def _retried(uri: str, read: Callable[[], _Result]) -> _Result:
    """A cut connection is worth another try; a server that is down or refuses is not.

    Bytes with another digest may have changed on their way: S3 is asked for them once more."""
    mismatches = 0 if uri.startswith("s3://") else 1
    for attempt in range(READ_ATTEMPTS):
        try:
            return read()
        except DigestMismatch:
            if mismatches:
                raise
            mismatches += 1
        except StorageUnavailable as error:
            if not error.broken_off or attempt == READ_ATTEMPTS - 1:
                raise
            time.sleep(0.2 * 2**attempt)
    return read()


def write_bytes(uri: str, data: bytes) -> StoredObject:
    """Write a whole object, replacing what was there."""
    location = _object_location(uri)
    if location.path is None:
        storage_upload.put(uri, location.bucket, location.key, data)
    else:
        with replacing(uri, location.path) as file:
            file.write(data)
    return StoredObject(uri, len(data), hashlib.sha256(data).hexdigest())


def stat(uri: str) -> ObjectInfo:
    """The object's size; raises ``ObjectMissing``."""
    location = _object_location(uri)
    if location.path is None:
        return ObjectInfo(uri, s3.head(uri, location.bucket, location.key))
    with local_errors("look at", uri):
        if not location.path.is_file():
            raise ObjectMissing(uri)
        return ObjectInfo(uri, location.path.stat().st_size)


def fingerprint(uri: str) -> str | None:
    """A text that changes when the object is written again; raises ``ObjectMissing``.

    Of a local file its inode, size and times of change, of an object on S3 its entity tag, size
    and time. None of what was written so lately that the same time may stand for other bytes.
    """
    location = _object_location(uri)
    if location.path is None:
        return s3.fingerprint(uri, location.bucket, location.key)
    with local_errors("look at", uri):
        if not location.path.is_file():
            raise ObjectMissing(uri)
        found = location.path.stat()
        if time.time_ns() - found.st_ctime_ns < LOCAL_CLOCK_NS:
            return None
        return f"{found.st_ino} {found.st_size} {found.st_mtime_ns} {found.st_ctime_ns}"


def exists(uri: str) -> bool:
    """Whether the object is there; raises ``StorageUnavailable`` when that cannot be known."""
    try:
        stat(uri)
    except ObjectMissing:
        return False
    return True


def list_objects(prefix_uri: str) -> Iterator[ObjectInfo]:
    """The objects in the folder ``prefix_uri`` at any depth, sorted by key; none is no error."""
    location = _parse(prefix_uri)
    if location.path is None:
        for key, num_bytes in s3.list_keys(prefix_uri, location.bucket, location.key):
            if not _has_odd_segment(key):
                yield ObjectInfo(f"s3://{location.bucket}/{key}", num_bytes)
        return
    with local_errors("list", prefix_uri):
        files = [
            Path(folder, name)
            for folder, _, names in os.walk(location.path)
            for name in names
            if not name.startswith(TEMPORARY_PREFIX)
        ]
        found = [(file.as_posix(), file) for file in files if file.is_file()]
    for _, file in sorted(found):
        yield ObjectInfo(file.as_uri(), file.stat().st_size)


def delete(uri: str) -> None:
    """Remove an object; one that is not there is no error."""
    location = _object_location(uri)
    if location.path is None:
        s3.delete_keys(uri, location.bucket, [location.key])
    else:
        with local_errors("delete", uri):
            location.path.unlink(missing_ok=True)


def delete_prefix(uri: str) -> int:
    """Remove every object in the folder ``uri`` and say how many; refuses a bucket or ``/``."""
    location = _parse(uri)
    if location.path is None:
        if not location.key:
            raise UserError(f"refused to delete the whole bucket {uri}; name a folder in it")
        listed = s3.list_keys(uri, location.bucket, location.key)
        return s3.delete_keys(uri, location.bucket, [key for key, _ in listed])
    if len(location.path.parts) < 3:
        raise UserError(f"refused to delete {uri}; name a deeper folder")
    num_deleted = 0
    with local_errors("delete", uri):
        for folder, _, names in os.walk(location.path, topdown=False):
            for name in names:
                Path(folder, name).unlink(missing_ok=True)
                num_deleted += not name.startswith(TEMPORARY_PREFIX)
            if not any(Path(folder).iterdir()):
                Path(folder).rmdir()
    return num_deleted


def upload(path: str | Path, uri: str) -> StoredObject:
    """Copy a local file to ``uri``; large ones travel in parts, aborted when one fails."""
    location = _object_location(uri)
    source = Path(path)
    with local_errors("read", str(source)):
        if not source.is_file():
            raise ObjectMissing(str(source))
    if location.path is None:
        num_bytes, sha256 = storage_upload.upload(uri, location.bucket, location.key, source)
        return StoredObject(uri, num_bytes, sha256)
    with open(source, "rb") as reader, replacing(uri, location.path) as writer:
        num_bytes, sha256 = copied(reader, writer)
    return StoredObject(uri, num_bytes, sha256)


def download(uri: str, path: str | Path, sha256: str | None = None) -> StoredObject:
    """Copy an object to a local file that appears whole and, given ``sha256``, checked.

    Raises ``ObjectMissing``, or ``DigestMismatch`` and leaves no file.
    """
    target = Path(path).absolute()

    def read() -> StoredObject:
        with open_stream(uri) as reader, replacing(file_uri(target), target) as writer:
            num_bytes, found = copied(reader, writer)
            _compare(uri, sha256, found)
        return StoredObject(uri, num_bytes, found)

    return _retried(uri, read)


def unfinished_uploads(prefix_uri: str) -> list[UnfinishedUpload]:
    """What killed writers left in the folder ``prefix_uri``: parts that became no object."""
    location = _parse(prefix_uri)
    if location.path is not None:
        return []
    return list(storage_upload.unfinished(prefix_uri, location.bucket, location.key))


def drop_upload(unfinished: UnfinishedUpload) -> None:
    """Drop the parts of an upload that nobody will finish."""
    location = _object_location(unfinished.uri)
    storage_upload.drop(unfinished.uri, location.bucket, location.key, unfinished.upload_id)


def upload_folder(path: str | Path, uri: str) -> dict[str, StoredObject]:
    """Upload every file under ``path``; returns relative path -> stored object."""
    root = Path(path)
    if not root.is_dir():
        raise UserError(expected="a folder to upload", got=str(root))
    names = sorted(file.relative_to(root).as_posix() for file in root.rglob("*") if file.is_file())
    with ThreadPoolExecutor(FOLDER_THREADS) as pool:
        stored = pool.map(lambda name: upload(root / name, join(uri, name)), names)
        return dict(zip(names, stored, strict=True))


def download_folder(uri: str, path: str | Path) -> dict[str, StoredObject]:
    """Download every object under ``uri`` into ``path``; returns relative path -> object."""
    root = Path(path)
    prefix = _parse(uri).uri.rstrip("/") + "/"
    objects = {info.uri[len(prefix) :]: info.uri for info in list_objects(uri)}
    if prefix.startswith("file://"):
        objects = {unquote(name): address for name, address in objects.items()}
    if not objects:
        raise ObjectMissing(uri)
    for name in objects:
        if PurePosixPath(name).is_absolute() or ".." in name.split("/"):
            raise UserError(f"refused the object {name!r} under {uri}; its name leaves the folder")
    with ThreadPoolExecutor(FOLDER_THREADS) as pool:
        stored = pool.map(lambda item: download(item[1], root / item[0]), objects.items())
        return dict(zip(objects, stored, strict=True))


def read_json(uri: str) -> Any:
    """The object parsed as JSON; a broken one is a ``UserError`` naming it."""
    data = read_bytes(uri)
    try:
        return json.loads(data)
    except ValueError as error:
        raise UserError(expected=f"JSON at {uri}", got=str(error)) from error


def write_json(uri: str, obj: Any) -> StoredObject:
    """Write ``obj`` as canonical JSON."""
    return write_bytes(uri, canonical_json(obj))


def arrow_filesystem(uri: str) -> tuple[pyarrow.fs.FileSystem, str]:
    """The pyarrow filesystem for ``uri`` and the path on it; make it in the process that uses it.

    A file opened for writing on it appears when it is closed. Close it only when all went well:
    on S3, closing publishes what was written so far.
    """
    location = _parse(uri)
    if location.path is not None:
        from pyarrow.fs import LocalFileSystem

        return LocalFileSystem(), str(location.path)
    return s3.arrow_filesystem(), f"{location.bucket}/{location.key}".rstrip("/")
