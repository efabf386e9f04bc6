"""Objects named by their bytes are written once: a second attempt leaves what is there as it is.

The embedded S3 server removes an object before it renames the new one into its place. Killed
between the two it leaves neither, so whatever it had acknowledged before is gone. What versions
rest on is therefore not written again while it has the same bytes. Objects that do change (leases,
notes, pages) are made anew by whoever was cut, or by the same command given again.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from infra import storage
from infra.digests import READ_CHUNK_BYTES, sha256_bytes
from infra.storage import StoredObject


def upload_once(path: Path, uri: str, sha256: str) -> StoredObject:
    """``storage.upload`` of a file with this digest, unless the object has these bytes already."""
    num_bytes = path.stat().st_size
    if _is_there(uri, num_bytes, sha256):
        return StoredObject(uri, num_bytes, sha256)
    return storage.upload(path, uri)


def write_once(uri: str, data: bytes) -> StoredObject:
    """``storage.write_bytes``, unless the object has these bytes already."""
    sha256 = sha256_bytes(data)
    if _is_there(uri, len(data), sha256):
        return StoredObject(uri, len(data), sha256)
    return storage.write_bytes(uri, data)


def _is_there(uri: str, num_bytes: int, sha256: str) -> bool:
    """Whether the object has this digest; it is read only when it has this size."""
    try:
        if storage.stat(uri).num_bytes != num_bytes:
            return False
        digest = hashlib.sha256()
        with storage.open_stream(uri) as stream:
            while chunk := stream.read(READ_CHUNK_BYTES):
                digest.update(chunk)
    except (storage.ObjectMissing, storage.StorageUnavailable):
        return False  # writing it says what is wrong
    return digest.hexdigest() == sha256
