"""Files on this machine that appear whole, with all their bytes on the disk, or not at all."""

from __future__ import annotations

import hashlib
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from infra.storage_errors import local_errors

CHUNK_BYTES = 1 << 20
TEMPORARY_PREFIX = ".atelier-tmp-"


@contextmanager
def replacing(uri: str, path: Path) -> Iterator[IO[bytes]]:
    """A temporary file beside ``path`` that becomes ``path``, synced, when the block ends well."""
    with local_errors("write", uri):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.parent / f"{TEMPORARY_PREFIX}{secrets.token_hex(8)}"
        try:
            with open(temporary, "xb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def copied(reader: IO[bytes], writer: IO[bytes]) -> tuple[int, str]:
    """Copy all that ``reader`` has; returns bytes and sha256."""
    digest = hashlib.sha256()
    num_bytes = 0
    while chunk := reader.read(CHUNK_BYTES):
        digest.update(chunk)
        writer.write(chunk)
        num_bytes += len(chunk)
    return num_bytes, digest.hexdigest()
