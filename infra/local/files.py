"""The services' own folder: private files, ports kept from last time, and the lock."""

from __future__ import annotations

import fcntl
import json
import os
import secrets
import string
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from infra.errors import UserError

CREDENTIALS_NAME = "credentials.json"
LOCK_SECONDS = 300.0
ACCESS_KEY_LENGTH = 20  # what S3 clients expect, and the S3 server insists on
SECRET_KEY_LENGTH = 40


def services_folder(home: Path) -> Path:
    """``<home>/services``, made private to the user when it is new."""
    folder = home / "services"
    try:
        home.mkdir(parents=True, exist_ok=True)
        folder.mkdir(mode=0o700, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"cannot make {folder}: {error.strerror}; set ATELIER_HOME to a folder you own"
        ) from error
    return folder


def read_private_json(path: Path) -> Any:
    """The JSON in ``path``, None when there is none; refuses a file that others may read."""
    for checked, wanted in ((path.parent, "700"), (path, "600")):
        try:
            found = checked.stat()
        except FileNotFoundError:
            return None
        if found.st_mode & 0o077 or found.st_uid != os.getuid():
            raise UserError(
                expected=f"{checked} private to you",
                got=f"mode {found.st_mode & 0o777:o}, owner {found.st_uid}",
                remedy=f"run chmod {wanted} {checked}",
            )
    try:
        return json.loads(path.read_bytes())
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({error}); remove it and run `atelier up`") from error


def write_private_json(path: Path, value: Any) -> None:
    """Replace ``path`` by ``value`` as JSON, mode 600, whole or not at all."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w") as file:
        json.dump(value, file, indent=1, sort_keys=True)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def load_credentials(folder: Path) -> tuple[str, str]:
    """This home's S3 access key and secret, made at random the first time."""
    path = folder / CREDENTIALS_NAME
    found = read_private_json(path)
    if found is None:
        alphabet = string.ascii_uppercase + string.digits
        found = {
            "access_key_id": "".join(secrets.choice(alphabet) for _ in range(ACCESS_KEY_LENGTH)),
            "secret_access_key": secrets.token_hex(SECRET_KEY_LENGTH // 2),
        }
        write_private_json(path, found)
    return str(found["access_key_id"]), str(found["secret_access_key"])


@contextmanager
def locked(folder: Path, say: Callable[[str], None]) -> Iterator[None]:
    """Hold the home's lock; a second holder waits. The kernel frees it when its holder dies."""
    with open(folder / "lock", "a") as file:
        deadline = time.monotonic() + LOCK_SECONDS
        told = False
        while not _try_lock(file.fileno()):
            if not told:
                say("another `atelier up` or `down` is at work here; waiting for it")
                told = True
            if time.monotonic() > deadline:
                raise UserError(
                    f"another `atelier up` or `down` has held {folder / 'lock'} for "
                    f"{LOCK_SECONDS:.0f} s; end that process and try again"
                )
            time.sleep(0.1)
        yield


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
