"""Checkpoints on a machine's disk: fetched once for all of its workers, gone when all have read.

A run's checkpoint is as large as its weights, their average and two moments. Each worker needs it
when it starts, all at the same time: the first one of a machine fetches it, the others wait and
read the same files, of which the machine then keeps one copy in memory as well.
"""

from __future__ import annotations

import fcntl
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from infra import storage
from infra.config import atelier_home
from infra.digests import sha256_bytes
from infra.errors import UserError

FOLDER = "checkpoints"
WHOLE = ".whole"  # beside a folder that was fetched to its end


class NodeCopies:
    """The copies of one run's checkpoints on this machine; ``prefix_uri`` is where these lie."""

    def __init__(self, prefix_uri: str) -> None:
        self._root = atelier_home() / "cache" / FOLDER / sha256_bytes(prefix_uri.encode())[:16]

    def folder(self, uri: str) -> Path:
        """The files below ``uri`` as a local folder, not yet verified. Waits while another worker
        fetches them. Raises ``UserError`` when the disk has too little room."""
        folder = self._root / uri.rsplit("/", 1)[1]
        whole = folder.with_name(folder.name + WHOLE)
        with self._locked():
            if not whole.is_file():
                self._clear()  # of what an earlier start left, or of a damaged one
                _check_room(uri, self._root)
                storage.download_folder(uri, folder)
                whole.touch()
        return folder

    def let_go(self) -> None:
        """Remove the copies; call it when no worker will open them any more. What is already open
        stays readable."""
        if self._root.is_dir():
            with self._locked():
                self._clear()

    def _clear(self) -> None:
        for path in self._root.iterdir():
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            elif path.name.endswith(WHOLE):
                path.unlink(missing_ok=True)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        self._root.mkdir(parents=True, exist_ok=True)
        with (self._root / "lock").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)  # let go with the file, or with the process
            yield


def _check_room(uri: str, place: Path) -> None:
    needed = sum(info.num_bytes for info in storage.list_objects(uri))
    free = shutil.disk_usage(place).free
    if free < needed:
        raise UserError(
            expected=f"{needed / 1e9:.2f} GB free in {place} for the run's checkpoint",
            got=f"{free / 1e9:.2f} GB",
            remedy="free some or set ATELIER_HOME to a larger disk, and run the command again",
        )
