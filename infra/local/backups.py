"""Copies of MLflow's database, and its return when it is gone or damaged.

The server copies it every minute in which it changed, and when it ends. A copy is checked before it
counts, and whole before it has its name. Before a server starts, a database that is gone or that
sqlite finds damaged gives way to the newest copy; the damaged one stays beside it. What was written
after that copy is lost here, and registered again by the runs that made it: their checkpoints lie
in the store.
"""

from __future__ import annotations

import os
import shutil
import sqlite3
import threading
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

from infra.errors import UserError

INTERVAL_SECONDS = 60.0
NUM_KEPT = 3
FOLDER = "backups"
MARK_TABLE = "alembic_version"  # an empty file is a sound database, without MLflow's tables
_SUFFIXES = ("", "-journal", "-wal", "-shm")


class Backups:
    """Copies ``database`` from a thread until ``close``, which makes the last copy."""

    def __init__(self, database: Path, interval_seconds: float = INTERVAL_SECONDS) -> None:
        self._database = database
        self._interval_seconds = interval_seconds
        self._closing = threading.Event()
        self._copied: object = None
        self._thread = threading.Thread(target=self._loop, name="backups", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Copy what has changed since, and end."""
        self._closing.set()
        self._thread.join()

    def _loop(self) -> None:
        is_last = False
        while not is_last:
            is_last = self._closing.wait(self._interval_seconds)
            seen = _state_of(self._database)
            if seen != self._copied:
                try:
                    back_up(self._database)
                except (OSError, sqlite3.Error) as error:
                    print(f"mlflow's database was not copied: {error}", flush=True)
                    continue
                self._copied = seen


def back_up(database: Path) -> Path:
    """Copy a database that may be in use; returns the copy's path.

    Raises ``sqlite3.Error`` for a damaged one and ``OSError`` where there is no room; earlier
    copies stay then.
    """
    folder = database.with_name(FOLDER)
    folder.mkdir(mode=0o700, exist_ok=True)
    unfinished = folder / ".unfinished"
    try:
        _remove(unfinished)  # what a killed server left, with its journal
        with closing(_open(database, "ro")) as source, closing(sqlite3.connect(unfinished)) as copy:
            source.backup(copy)
        problem = problem_of(unfinished)
        if problem is not None:
            raise sqlite3.DatabaseError(problem)
        with unfinished.open("rb") as file:
            os.fsync(file.fileno())
        seconds, rest = divmod(time.time_ns(), 10**9)
        stamp = time.strftime("%Y%m%dT%H%M%S", time.gmtime(seconds))
        path = folder / f"{stamp}-{rest:09d}.db"
        os.replace(unfinished, path)
    finally:
        _remove(unfinished)
    for old in copies_of(database)[NUM_KEPT:]:
        old.unlink(missing_ok=True)
    return path


def _parts(database: Path) -> list[Path]:
    """The files of a database that are there: itself, and what sqlite keeps beside it."""
    files = (database.with_name(database.name + suffix) for suffix in _SUFFIXES)
    return [file for file in files if file.exists()]


def _remove(database: Path) -> None:
    for file in _parts(database):
        file.unlink(missing_ok=True)


def copies_of(database: Path) -> list[Path]:
    """The copies of a database, the newest first."""
    return sorted(database.with_name(FOLDER).glob("[0-9]*.db"), reverse=True)


def problem_of(database: Path) -> str | None:
    """What sqlite finds wrong with a database; None when it is well.

    Reads all of it, and finishes what a killed server left half written. A changed byte in the
    middle of a text is no damage to sqlite.
    """
    try:
        with closing(_open(database, "rw")) as connection:
            found = [str(row[0]) for row in connection.execute("PRAGMA integrity_check(1)")]
            connection.execute(f"SELECT count(*) FROM {MARK_TABLE}").fetchone()
    except (sqlite3.Error, UnicodeError) as error:
        is_in_use = "locked" in str(error)
        return None if is_in_use else str(error)
    return None if found == ["ok"] else found[0].replace("\n", " ")


def mend(database: Path, say: Callable[[str], None]) -> None:
    """Put the newest sound copy in the place of a database that is gone or damaged.

    ``say`` is told what was done. Without a copy the damaged one is set aside all the same: a
    server on it would not start, and an empty one is filled by the runs whose checkpoints are in
    the store. Raises ``UserError`` where there is no room.
    """
    copies = copies_of(database)
    if not database.exists():
        if not copies:
            return  # the first start
        what = "is gone"
    else:
        problem = problem_of(database)
        if problem is None:
            return
        what = f"is damaged ({problem}) and lies beside it now"
    stamp = time.strftime("%Y%m%dT%H%M%S")
    for part in _parts(database):  # a journal without its database, too: it fits no other
        rest = part.name.removeprefix(database.name)
        os.replace(part, part.with_name(f"{database.name}.damaged-{stamp}{rest}"))
    for copy in copies:
        if problem_of(copy) is None:
            unfinished = database.with_name(f"{database.name}.unfinished")
            try:
                shutil.copyfile(copy, unfinished)
            except OSError as error:
                unfinished.unlink(missing_ok=True)
                raise UserError(
                    f"mlflow's database {what}, and its copy {copy} cannot be put back: {error}; "
                    "mend that, and run the same command again"
                ) from error
            os.replace(unfinished, database)
            say(f"mlflow's database {what}; that of {_when(copy)} is back")
            return
    say(f"mlflow's database {what}; there is no copy, so it begins empty: run the recipes again")


def _when(copy: Path) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(copy.stat().st_mtime))


def _open(database: Path, mode: str) -> sqlite3.Connection:
    """What is not there is not made."""
    return sqlite3.connect(f"{database.absolute().as_uri()}?mode={mode}", uri=True, timeout=30.0)


def _state_of(database: Path) -> object:
    """What is another after a write."""
    found = []
    for suffix in ("", "-wal"):
        path = database.with_name(database.name + suffix)
        if path.exists():
            stat = path.stat()
            found.append((suffix, stat.st_mtime_ns, stat.st_size))
    return found
