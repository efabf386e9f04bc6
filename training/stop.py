"""Asking a run to save and end: the driver writes a wish on storage, the first worker answers.

Workers of Ray get no signals and may be on another machine; the run's folder is where both sides
look anyway. A wish names the attempt it is for, so that an old one stops nobody.
"""

from __future__ import annotations

import threading
import time

from infra import storage
from infra.errors import UserError

STOP_NAME = "stop.json"
POLL_SECONDS = 1.0
GRACE_SECONDS = 30.0


def ask_to_stop(run_uri: str, attempt: int, grace_seconds: float = GRACE_SECONDS) -> int | None:
    """Ask, and wait for the answer: the step that was saved, None when none came in time."""
    uri = storage.join(run_uri, STOP_NAME)
    try:
        storage.write_json(uri, {"attempt": attempt})
        give_up_at = time.monotonic() + grace_seconds
        while time.monotonic() < give_up_at:
            answer = storage.read_json(uri)
            if isinstance(answer, dict) and isinstance(answer.get("saved_step"), int):
                return int(answer["saved_step"])
            time.sleep(POLL_SECONDS / 5)
    except UserError:
        return None  # storage is away: what was saved before has to do
    return None


class StopWatch:
    """Sets ``stop`` when this attempt is asked to end; looks once a second, from a thread."""

    def __init__(self, run_uri: str, attempt: int, stop: threading.Event) -> None:
        self._uri = storage.join(run_uri, STOP_NAME)
        self._attempt = attempt
        self._stop = stop
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._look, name="stop-watch", daemon=True)
        self._thread.start()

    def answer(self, step: int) -> None:
        """Say that the run has ended with a checkpoint of ``step``."""
        storage.write_json(self._uri, {"attempt": self._attempt, "saved_step": step})

    def close(self) -> None:
        """End the thread."""
        self._closing.set()
        self._thread.join(timeout=5.0)

    def _look(self) -> None:
        while not self._closing.wait(POLL_SECONDS):
            try:
                wish = storage.read_json(self._uri)
            except UserError:
                continue
            if isinstance(wish, dict) and wish.get("attempt") == self._attempt:
                self._stop.set()
                return
