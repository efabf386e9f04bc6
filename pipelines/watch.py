"""How far a running build is, read from its markers while Spark works."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from infra import storage
from infra.errors import UserError
from pipelines.build import Build, ReadMarker, StagedMarker
from pipelines.plan import CurationPlan

ProgressCallback = Callable[[int, int], None]
POLL_SECONDS = 0.5

logger = logging.getLogger(__name__)


@contextmanager
def watching(plan: CurationPlan, progress: ProgressCallback | None) -> Iterator[None]:
    """Call ``progress(rows done, rows in all)`` now and then, and once more when all went well.

    A row is done when it was rejected by its metadata or its partition has been fetched.
    """
    if progress is None:
        yield
        return
    stopped = threading.Event()
    thread = threading.Thread(
        target=_watch, args=(plan, progress, stopped), name="watch", daemon=True
    )
    thread.start()
    try:
        yield
    finally:
        stopped.set()
        thread.join()
    progress(plan.rows_in, plan.rows_in)


def _watch(plan: CurationPlan, progress: ProgressCallback, stopped: threading.Event) -> None:
    done_rows: dict[str, int] = {}
    while not stopped.wait(POLL_SECONDS):
        try:
            for uri in _new_markers(plan.build, done_rows):
                done_rows[uri] = _rows_done(plan.build, uri)
            progress(min(sum(done_rows.values()), plan.rows_in), plan.rows_in)
        except UserError as error:  # the job itself reports what is wrong with storage
            logger.debug("progress: %s", error)


def _new_markers(build: Build, known: dict[str, int]) -> list[str]:
    starts = (storage.join(build.folder, "read-"), storage.join(build.folder, "staged-"))
    listed = (info.uri for info in storage.list_objects(build.folder))
    return [uri for uri in listed if uri.startswith(starts) and uri not in known]


def _rows_done(build: Build, uri: str) -> int:
    kind, _, number = uri.rpartition("/")[2].removesuffix(".json").partition("-")
    if kind == "read":
        read = build.read(ReadMarker, int(number))
        return 0 if read is None else read.num_rows - read.num_kept
    staged = build.read(StagedMarker, int(number))
    return 0 if staged is None else staged.rows.num_rows
