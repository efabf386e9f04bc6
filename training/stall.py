"""A worker that makes no step for too long ends itself, and Ray starts it again.

A step that hangs (a collective that a lost neighbour never joins, a kernel that does not return)
holds its worker for ever: nothing dies, so nothing is tried again. The clock is C's, which needs
neither Python's lock nor its main thread. It writes where every thread stood, and the next start
finds that. A process that is frozen from outside does not see its own clock; Ray's health check
does (``training.launch.FROZEN_SECONDS``).
"""

from __future__ import annotations

import faulthandler
import tempfile
import time
from pathlib import Path
from typing import IO

from infra import storage
from infra.digests import sha256_bytes
from infra.errors import UserError

REARM_SECONDS = 1.0
REPORT_FOLDER = "stalls"


class StallWatch:
    """Ends this process when ``stepped`` is not called for ``limit_seconds`` (None: never).

    ``found`` is what an earlier worker of this run and rank left on this machine when it ended
    itself: the places where its threads stood.
    """

    def __init__(
        self, run_uri: str, rank: int, limit_seconds: float | None, local_dir: str | None = None
    ) -> None:
        name = f"atelier-stall-{sha256_bytes(run_uri.encode())[:12]}-{rank}.txt"
        self._path = Path(local_dir or tempfile.gettempdir()) / name
        self._limit_seconds = limit_seconds
        self.found = self._path.read_text(errors="replace") if self._path.is_file() else ""
        self._file: IO[str] | None = None
        if limit_seconds is not None:
            self._file = self._path.open("w", encoding="utf-8")
        self._armed_at = 0.0

    def stepped(self) -> None:
        """A step is made: the clock starts anew."""
        now = time.monotonic()
        if (
            self._file is None
            or self._limit_seconds is None
            or now - self._armed_at < REARM_SECONDS
        ):
            return
        self._armed_at = now
        faulthandler.dump_traceback_later(self._limit_seconds, exit=True, file=self._file)

    def pause(self) -> None:
        """Something else than steps takes its time."""
        self._armed_at = 0.0
        if self._file is not None:
            faulthandler.cancel_dump_traceback_later()

    def close(self) -> None:
        """No clock any more."""
        self.pause()
        if self._file is not None:
            self._file.close()
            self._path.unlink(missing_ok=True)
            self._file = None


def keep_report(run_uri: str, attempt: int, rank: int, step: int, text: str) -> str | None:
    """Store where the threads stood; returns its address, None when storage is away."""
    uri = storage.join(run_uri, REPORT_FOLDER, f"attempt-{attempt}-step-{step}-worker-{rank}.txt")
    try:
        storage.write_bytes(uri, text.encode())
    except UserError:
        return None
    return uri
