"""How often a run began, from where, and what each interruption cost.

The first worker of every start adds a line to ``<run>/starts.json``. What was lost is known from
the progress that the start before it left: steps made and not saved, and the time until now.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from infra import storage
from infra.errors import UserError
from training.progress import read_progress_json
from training.stop import STOP_NAME

STARTS_NAME = "starts.json"
PROGRESS_NAME = "progress.json"
STOPPED, WORKER_LOST, WORKER_HUNG, DRIVER_LOST, WENT_BACK, DAMAGED = (
    "stopped", "worker lost", "worker hung", "driver lost", "went back", "checkpoint damaged",
)  # fmt: skip
LOST_WORKER = (WORKER_LOST, WORKER_HUNG)


@dataclass(frozen=True)
class Start:
    """One start: ``how`` in words, from ``step``. ``cause`` is why the start before it ended ("" at
    first); it lost ``lost_steps`` that had to be made again, ``lost_seconds`` that these had taken,
    and ``idle_seconds`` in which nothing was trained."""

    attempt: int
    how: str
    step: int
    cause: str = ""
    lost_steps: int = 0
    lost_seconds: float = 0.0
    idle_seconds: float = 0.0
    damaged_steps: int = 0
    damaged_seconds: float = 0.0


def record_start(
    run_uri: str,
    attempt: int,
    how: str,
    step: int,
    was_hung: bool = False,
    newest_damaged: int | None = None,
) -> Start:
    """Add this start to the run's account; before its first progress is written. ``was_hung`` says
    that the worker before ended itself, ``newest_damaged`` is the step of the newest checkpoint
    that was passed by."""
    starts = read_starts(run_uri)
    start = Start(attempt, how, step)
    if starts:
        start = _after(run_uri, starts[-1], start, newest_damaged)
        if was_hung and start.cause == WORKER_LOST:
            start = replace(start, cause=WORKER_HUNG)
    storage.write_json(
        storage.join(run_uri, STARTS_NAME), [asdict(each) for each in (*starts, start)]
    )
    return start


def _after(run_uri: str, before: Start, start: Start, newest_damaged: int | None) -> Start:
    progress = read_progress_json(storage.join(run_uri, PROGRESS_NAME))
    known = progress if progress.get("attempt") == before.attempt else {}
    saved = start.step if newest_damaged is None else max(newest_damaged, start.step)
    reached = max(int(known.get("step", before.step)), before.step, saved)
    lost_steps = reached - saved
    step_seconds = float(known.get("step_seconds") or 0.0)
    at = float(known.get("at", time.time()))
    return Start(
        attempt=start.attempt,
        how=start.how,
        step=start.step,
        cause=_cause(run_uri, before, start),
        lost_steps=lost_steps,
        lost_seconds=round(lost_steps * step_seconds, 3),
        idle_seconds=round(max(0.0, time.time() - at), 3),
        damaged_steps=saved - start.step,
        damaged_seconds=round((saved - start.step) * step_seconds, 3),
    )


def _cause(run_uri: str, before: Start, start: Start) -> str:
    if start.attempt == before.attempt:
        return WORKER_LOST
    wish = read_progress_json(storage.join(run_uri, STOP_NAME))
    is_stopped = wish.get("attempt") == before.attempt and "saved_step" in wish
    return STOPPED if is_stopped else DRIVER_LOST


def read_starts(run_uri: str) -> list[Start]:
    """Every start of a run, oldest first; none when there were none, or they do not read."""
    try:
        raw = storage.read_json(storage.join(run_uri, STARTS_NAME))
        return [Start(**each) for each in raw]
    except (UserError, TypeError):
        return []


def waste_by_cause(
    starts: Iterable[Start], events: Iterable[Mapping[str, Any]] = ()
) -> dict[str, dict[str, float]]:
    """``times``, ``steps`` and ``seconds`` lost, by cause; ``events`` are the guard's."""
    lost: dict[str, dict[str, float]] = {}

    def add(cause: str, steps: float, seconds: float) -> None:
        of_cause = lost.setdefault(cause, {"times": 0.0, "steps": 0.0, "seconds": 0.0})
        of_cause["times"] += 1
        of_cause["steps"] += steps
        of_cause["seconds"] = round(of_cause["seconds"] + seconds, 3)

    for start in starts:
        if start.cause:
            add(start.cause, start.lost_steps, start.lost_seconds + start.idle_seconds)
        if start.damaged_steps:
            add(DAMAGED, start.damaged_steps, start.damaged_seconds)
    for event in events:
        if event.get("back_to") is not None:
            add(WENT_BACK, float(event["step"]) - float(event["back_to"]), 0.0)
    return lost
