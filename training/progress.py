"""How far a stage is: a worker writes a small JSON object, the driver reads it now and then."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from infra import storage
from infra.errors import UserError

POLL_SECONDS = 1.0
USES = (
    "mfu",
    "host/cpu_share",
    "host/gpu_memory_mb",
    "host/gpu_share",
    "host/memory_mb",
    "host/memory_share",
)


@dataclass(frozen=True)
class StageProgress:
    """``loss`` and the rates are None until they are known; ``eta_seconds`` is what is left, and
    ``use`` what the first worker's machine does (``training.utilisation``). Before its steps a
    stage encodes shards: then ``shards_encoded`` is less than ``shards``. ``notes`` are what
    happened to it, by name."""

    step: int
    steps: int
    images_per_second: float | None = None
    loss: float | None = None
    eta_seconds: float | None = None
    use: tuple[tuple[str, float], ...] = ()
    notes: tuple[tuple[str, str], ...] = ()
    shards_encoded: int = 0
    shards: int = 0

    @property
    def is_encoding(self) -> bool:
        """Whether shards are encoded, and no steps are made yet."""
        return self.shards_encoded < self.shards


OnProgress = Callable[[StageProgress], None]


@contextmanager
def following_progress(progress_uri: str, on_progress: OnProgress | None) -> Iterator[None]:
    """Call ``on_progress`` from a thread whenever what lies at ``progress_uri`` changes.

    Training never waits for it, and storage that is away for a while only means no news.
    """
    if on_progress is None:
        yield
        return
    stop = threading.Event()
    thread = threading.Thread(
        target=_follow, args=(progress_uri, on_progress, stop), name="progress", daemon=True
    )
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join(timeout=5.0)


def _follow(uri: str, on_progress: OnProgress, stop: threading.Event) -> None:
    last: StageProgress | None = None
    while True:
        is_last = stop.wait(POLL_SECONDS)
        now = read_progress(uri)
        if now is not None and now != last:
            last = now
            on_progress(now)
        if is_last:
            return


def read_progress(uri: str) -> StageProgress | None:
    """What lies there now; None when nothing does, or nothing that makes sense."""
    return parse_progress(read_progress_json(uri))


def read_progress_json(uri: str) -> dict[str, Any]:
    """What lies there now, with the worker's ``attempt``; empty when nothing does."""
    try:
        raw = storage.read_json(uri)
    except UserError:
        return {}
    return raw if isinstance(raw, dict) else {}


def parse_progress(raw: Any) -> StageProgress | None:
    """The progress in a worker's JSON object."""
    if not isinstance(raw, dict) or not isinstance(raw.get("step"), int):
        return None

    def number(name: str) -> float | None:
        value = raw.get(name)
        return float(value) if isinstance(value, int | float) else None

    notes = raw.get("notes")
    return StageProgress(
        step=raw["step"],
        steps=int(raw.get("steps") or 0),
        images_per_second=number("images_per_second"),
        loss=number("loss"),
        eta_seconds=number("eta_seconds"),
        use=tuple(
            (name, float(value))
            for name, value in sorted(raw.items())
            if name in USES and isinstance(value, int | float)
        ),
        shards_encoded=int(number("shards_encoded") or 0),
        shards=int(number("shards") or 0),
        notes=tuple((str(name), str(text)) for name, text in notes.items())
        if isinstance(notes, dict)
        else (),
    )
