"""What can go wrong with objects, each as one line that says what to do."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, cast

from infra.errors import UserError

DISK_FULL_ERRNOS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
DENIED_ERRNOS = (errno.EACCES, errno.EPERM, errno.EROFS)
MISSING_ERRNOS = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR)


class ObjectMissing(UserError):
    """The object, or the file to upload, is not there."""

    def __init__(self, uri: str) -> None:
        super().__init__(f"no object at {uri}; check the address, or run the step that makes it")
        self.uri = uri


class DigestMismatch(UserError):
    """The bytes are not the ones that were promised."""

    def __init__(self, uri: str, *, expected_sha256: str, got_sha256: str) -> None:
        super().__init__(
            f"{uri} is damaged: expected sha256 {expected_sha256}, got {got_sha256}; "
            "restore it, or delete it and make it again"
        )
        self.uri = uri


class StorageUnavailable(UserError):
    """Storage does not answer, refuses, or is full; ``broken_off`` when a retry may help."""

    def __init__(self, message: str, *, broken_off: bool = False) -> None:
        super().__init__(message)
        self.broken_off = broken_off


def disk_full(action: str, uri: str) -> StorageUnavailable:
    """The error for a full disk, here or behind the S3 server."""
    return StorageUnavailable(f"cannot {action} {uri}: the disk is full; free some space")


@contextmanager
def local_errors(action: str, uri: str) -> Iterator[None]:
    """Turn the ``OSError`` of a local file into one line; other errors are bugs and pass."""
    try:
        yield
    except OSError as error:
        if error.errno in DISK_FULL_ERRNOS:
            raise disk_full(action, uri) from error
        if error.errno in DENIED_ERRNOS:
            raise StorageUnavailable(
                f"cannot {action} {uri}: {error.strerror}; check its owner and mode"
            ) from error
        if error.errno in MISSING_ERRNOS:
            raise ObjectMissing(uri) from error
        raise StorageUnavailable(f"cannot {action} {uri}: {error}") from error


class GuardedReader:
    """A stream whose read errors, and only those, are turned into one line."""

    def __init__(self, body: Any, errors: Callable[[], AbstractContextManager[None]]) -> None:
        self._body = body
        self._errors = errors

    def read(self, size: int = -1) -> bytes:
        """Up to ``size`` bytes, or all that are left."""
        with self._errors():
            return cast(bytes, self._body.read(None if size < 0 else size))
