"""Threads that decode images ahead; one that never comes back is left behind.

A thread cannot be ended, and one of ``concurrent.futures`` would keep its process from ending, too.
These are daemons: a hanging one costs its image, a deadline of waiting, and a thread.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from types import TracebackType
from typing import Any, Generic, Self, TypeVar

_Result = TypeVar("_Result")
_Job = tuple["Future[Any]", Callable[[], Any]]


class DecodePool(Generic[_Result]):
    """``with DecodePool(2, 30.0) as pool: … pool.wait(pool.submit(work))``."""

    def __init__(self, num_threads: int, deadline_seconds: float) -> None:
        self._deadline_seconds = deadline_seconds
        self._num_threads = num_threads
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()

    def __enter__(self) -> Self:
        for _ in range(self._num_threads):
            self._start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for _ in range(self._num_threads):
            self._jobs.put(None)

    def submit(self, work: Callable[[], _Result]) -> Future[_Result]:
        """Have ``work`` done by a thread."""
        future: Future[_Result] = Future()
        self._jobs.put((future, work))
        return future

    def wait(self, future: Future[_Result]) -> _Result:
        """Its result, or what it raised; ``TimeoutError`` when it does not come in time."""
        try:
            return future.result(self._deadline_seconds)
        except TimeoutError:
            if future.done():  # raised by the work itself
                raise
            if not future.cancel():  # a thread has it, and may have it for ever
                self._start()
            raise TimeoutError(f"no end in {self._deadline_seconds:g} s") from None

    def _start(self) -> None:
        threading.Thread(target=_work, args=(self._jobs,), name="decode", daemon=True).start()


def _work(jobs: queue.SimpleQueue[_Job | None]) -> None:
    while (job := jobs.get()) is not None:
        future, work = job
        if not future.set_running_or_notify_cancel():
            continue
        try:
            future.set_result(work())
        except BaseException as error:  # told to whoever waits
            future.set_exception(error)
