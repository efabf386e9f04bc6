"""Progress a person can follow: a bar on a terminal, a line every few seconds in a log."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, Protocol

LINE_INTERVAL_SECONDS = 5.0


class Progress(Protocol):
    """What ``progress`` yields; safe to call from several threads."""

    def update(self, done: int, total: int | None = None) -> None:
        """Say how many are done in all, and correct the total when it became known."""

    def advance(self, num_done: int = 1) -> None:
        """Say that ``num_done`` more are done."""


class Silent:
    """A bar that nobody sees."""

    def update(self, done: int, total: int | None = None) -> None:
        pass

    def advance(self, num_done: int = 1) -> None:
        pass


class _Lines:
    """Plain lines such as ``fetch: 812/2000 images, 203/s, 6 s left``."""

    def __init__(self, description: str, total: int | None, unit: str, out: IO[str]) -> None:
        self._description = description
        self._total = total
        self._unit = unit
        self._out = out
        self._done = 0
        self._lock = threading.Lock()
        self._started_at = time.monotonic()
        self._printed_at = self._started_at

    def update(self, done: int, total: int | None = None) -> None:
        with self._lock:
            self._done = done
            self._total = self._total if total is None else total
            self._print_when_due()

    def advance(self, num_done: int = 1) -> None:
        with self._lock:
            self._done += num_done
            self._print_when_due()

    def finish(self, failed: bool) -> None:
        with self._lock:
            elapsed_seconds = time.monotonic() - self._started_at
            end = f"{'stopped after' if failed else 'done in'} {_seconds(elapsed_seconds)}"
            self._print(f"{self._counts()}, {self._rate(elapsed_seconds)}, {end}")

    def _print_when_due(self) -> None:
        now = time.monotonic()
        if now - self._printed_at < LINE_INTERVAL_SECONDS:
            return
        self._printed_at = now
        elapsed_seconds = now - self._started_at
        line = f"{self._counts()}, {self._rate(elapsed_seconds)}"
        if self._total is not None and self._done > 0:
            left = max(self._total - self._done, 0) * elapsed_seconds / self._done
            line += f", {_seconds(left)} left"
        self._print(line)

    def _counts(self) -> str:
        total = "" if self._total is None else f"/{self._total}"
        return f"{self._description}: {self._done}{total} {self._unit}"

    def _rate(self, elapsed_seconds: float) -> str:
        rate = self._done / max(elapsed_seconds, 1e-9)
        return f"{rate:.0f}/s" if rate >= 10 else f"{rate:.2g}/s"

    def _print(self, line: str) -> None:
        print(line, file=self._out, flush=True)


@contextmanager
def progress(
    description: str, total: int | None, unit: str, *, out: IO[str] | None = None
) -> Iterator[Progress]:
    """Show how far a loop is, on ``out`` (stderr): ``with progress(…) as bar: bar.advance()``.

    A bar with rate and time left when ``out`` is a terminal, else one line about every 5 s and
    one at the end. Silent when ``ATELIER_QUIET=1``. ``total=None`` means not known yet.
    """
    out = sys.stderr if out is None else out
    if os.environ.get("ATELIER_QUIET") == "1":
        yield Silent()
    elif out.isatty():
        with _bar(description, total, unit, out) as bar:
            yield bar
    else:
        lines = _Lines(description, total, unit, out)
        failed = True
        try:
            yield lines
            failed = False
        finally:
            lines.finish(failed)


@contextmanager
def _bar(description: str, total: int | None, unit: str, out: IO[str]) -> Iterator[Progress]:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        ProgressColumn,
        TaskID,
        TextColumn,
        TimeRemainingColumn,
    )
    from rich.progress import Task as RichTask
    from rich.text import Text

    class RateColumn(ProgressColumn):
        def render(self, task: RichTask) -> Text:
            speed = task.finished_speed or task.speed
            return Text("" if speed is None else f"{speed:.3g} {unit}/s", style="cyan")

    class Bar:
        def __init__(self, rich_progress: Progress, task: TaskID) -> None:
            self._rich_progress = rich_progress
            self._task = task

        def update(self, done: int, total: int | None = None) -> None:
            if total is None:
                self._rich_progress.update(self._task, completed=done)
            else:
                self._rich_progress.update(self._task, completed=done, total=total)

        def advance(self, num_done: int = 1) -> None:
            self._rich_progress.advance(self._task, num_done)

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        RateColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(file=out), refresh_per_second=4) as rich_progress:
        yield Bar(rich_progress, rich_progress.add_task(description, total=total))


def _seconds(seconds: float) -> str:
    """A span for people: ``6 s``, ``4 min 10 s``, ``3 h 5 min``."""
    if seconds < 10:
        return f"{seconds:.1f} s" if seconds < 2 else f"{seconds:.0f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
