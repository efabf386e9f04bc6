"""Whether a store lets us do what a job will need, found out before the job begins."""

from __future__ import annotations

import os
import secrets

from infra import storage, storage_upload
from infra.errors import UserError

PROBE_PREFIX = "probe-"
ALLOW_UNCHECKED = "ATELIER_ALLOW_UNCHECKED_UPLOADS"


def check_store(folder_uri: str) -> None:
    """Write, read, list and delete a small object in the folder; raises the first refusal.

    On S3, bytes are also sent with the MD5 of others: a server that takes them would not notice
    when any change on their way, and is refused unless ``ATELIER_ALLOW_UNCHECKED_UPLOADS=1``.
    Nothing else is asked of a server: no conditional writes, no checksums of its own.
    """
    uri = storage.join(folder_uri, f"{PROBE_PREFIX}{secrets.token_hex(8)}")
    data = secrets.token_bytes(64)
    storage.write_bytes(uri, data)
    try:
        if storage.read_bytes(uri) != data:
            raise UserError(
                expected=f"what was just written at {uri}",
                got="other bytes",
                remedy="use a store that reads its own writes",
            )
        if [info.num_bytes for info in storage.list_objects(folder_uri) if info.uri == uri] != [64]:
            raise UserError(
                expected=f"{uri}, just written, in a listing of {folder_uri}",
                got="none",
                remedy="use a store whose listings are up to date",
            )
        if storage_upload.takes_other_bytes(uri) and os.environ.get(ALLOW_UNCHECKED) != "1":
            raise UserError(
                expected="a server that compares the Content-MD5 of what it is sent",
                got=f"one that took other bytes at {uri}",
                remedy=f"use another, or set {ALLOW_UNCHECKED}=1 and verify every dataset",
            )
    finally:
        storage.delete(uri)
