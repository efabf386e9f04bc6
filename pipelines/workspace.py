"""What every job's folder on storage offers its tasks: a room, and the line a failed one leaves."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

import polars as pl
from pydantic import TypeAdapter, ValidationError

from infra import storage
from infra.errors import UserError
from infra.manifest import FileEntry
from infra.same_code import check_same_code
from infra.spark_errors import trouble_of
from infra.storage_errors import DISK_FULL_ERRNOS, disk_full

READ_THREADS = 8
_Marker = TypeVar("_Marker")


class Workspace:
    """A job's folder. ``environment`` (storage credentials) is set in every task."""

    environment: Mapping[str, str]

    @property
    def folder(self) -> str:
        """The job's folder on storage."""
        raise NotImplementedError

    @contextmanager
    def task(self, name: str) -> Iterator[Path]:
        """A task's room: the environment set, a temporary folder, and user errors kept.

        Spark reports a failed task as a Java stack trace; the line a person should read is left
        in ``failures/`` for the driver.
        """
        os.environ.update(self.environment)
        try:
            check_same_code()
            with _room() as folder:
                yield folder
        except UserError as error:
            storage.write_json(storage.join(self.folder, "failures", f"{name}.json"), str(error))
            raise
        except Exception as error:
            error.add_note(f"in task {name} of {self.folder}")
            raise

    def failures(self) -> list[str]:
        """The lines that failed tasks left."""
        listed = storage.list_objects(storage.join(self.folder, "failures"))
        return [str(storage.read_json(info.uri)) for info in listed]

    def forget(self, folder: str) -> None:
        """Remove a folder of working files."""
        storage.delete_prefix(storage.join(self.folder, folder))


@contextmanager
def _room() -> Iterator[Path]:
    """A temporary folder; that its disk is full is said in one line, whoever was writing."""
    with TemporaryDirectory(prefix="atelier-curation-") as folder:
        try:
            yield Path(folder)
        except OSError as error:
            if error.errno not in DISK_FULL_ERRNOS:
                raise
            raise disk_full("write", f"working files under {Path(folder).parent}") from error


def read_marker(uri: str, kind: type[_Marker]) -> _Marker | None:
    """The marker, or None when it is missing or unreadable. Does not look at its files."""
    try:
        return TypeAdapter(kind).validate_json(storage.read_bytes(uri), strict=True)
    except (storage.ObjectMissing, ValidationError):
        return None


def read_markers(uris: Iterable[str], kind: type[_Marker]) -> list[_Marker | None]:
    """The markers at these addresses, in their order; each is read once, several at a time."""
    with ThreadPoolExecutor(READ_THREADS) as pool:
        return list(pool.map(lambda uri: read_marker(uri, kind), uris))


def read_tables(dataset_root: str, entries: Sequence[FileEntry]) -> list[pl.DataFrame]:
    """The tables in these files, in their order, digests checked; several at a time."""

    def read(entry: FileEntry) -> pl.DataFrame:
        uri = storage.join(dataset_root, entry.path)
        return pl.read_parquet(storage.read_bytes(uri, entry.sha256))

    with ThreadPoolExecutor(READ_THREADS) as pool:
        return list(pool.map(read, entries))


def noted_version(result_uri: str) -> str | None:
    """The dataset version that a finished job's ``result.json`` names; None without one."""
    try:
        result: Any = storage.read_json(result_uri)
    except storage.ObjectMissing:
        return None
    version = result.get("version") if isinstance(result, dict) else None
    return version if isinstance(version, str) else None


@contextmanager
def one_line_errors(workspace: Workspace) -> Iterator[None]:
    """Raise one line, not Spark's trace, for what a task met that a user can change, and for what
    Spark itself lacked. Of a bug, the task's own trace, which names it: what Spark raises asks the
    JVM for its words, and is mute once that has stopped. What a task met that went well when it was
    repeated is forgotten."""
    from py4j.protocol import Py4JError
    from pyspark.errors import PySparkException

    workspace.forget("failures")
    try:
        yield
    except (PySparkException, Py4JError, ConnectionError) as error:
        lines = workspace.failures()
        told = UserError(lines[0]) if lines else trouble_of(error)
        if told is None:
            trace = str(error).partition("JVM stacktrace:")[0].rstrip()
            raise RuntimeError(f"a task of {workspace.folder} failed\n{trace}") from None
        raise told from None
    workspace.forget("failures")
