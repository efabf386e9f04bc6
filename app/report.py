"""What a person reads: the page of a run's state, and what is shown when a run ends."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from app.status import DONE, FAILED, RUNNING, STOPPED, WAITING, RunStatus, StepStatus, watch

MARKS = {DONE: "ok", FAILED: "!!", RUNNING: ">>", STOPPED: "--", WAITING: "  "}
NOTABLE_DROP = 0.02  # a score this much below the parent's is said to be lower
MAX_REASON_CHARACTERS = 110
MAX_NOTE_CHARACTERS = 240
BEGAN = "started"  # the note of a worker's ordinary start
MACHINE_SHARES = {
    "mfu": "of the peak",
    "host/gpu_share": "GPU",
    "host/cpu_share": "CPU",
    "host/memory_share": "memory",
}


def status_page(status: RunStatus) -> str:
    """The newest run: its state, its steps, the funnel, the scores, and where to look."""
    took = "" if status.seconds is None else f" in {duration(status.seconds)}"
    lines = [f"{status.recipe_name}  {status.state}{took}  ({status.run_id})", ""]
    lines += [step_line(step) for step in status.steps]
    if status.error:
        lines += ["", status.error]
    lines += ["", *results(status)]
    return "\n".join(lines).rstrip()


def step_line(step: StepStatus) -> str:
    """``ok  concepts      RUN    1 min 40 s  no version of this key yet``."""
    took = "" if step.seconds is None else duration(step.seconds)
    reason = shortened(step.reason or "", MAX_REASON_CHARACTERS)
    if step.progress:
        reason = f"{progress_line(step.progress)}; {reason}"
    decision = step.decision or ""
    return f"{MARKS[step.state]}  {step.name:<16}  {decision:<6} {took:>11}  {reason}".rstrip()


def progress_line(progress: Mapping[str, Any]) -> str:
    """``60/100 steps (60 %), loss 5.91, 812 images/s, 3 min 20 s left; machine: 88 % CPU, …``."""
    done, total = progress.get("done", 0), progress.get("total")
    parts = [f"{done:,} {progress.get('unit', '')}".rstrip()]
    if total:
        parts = [f"{done:,}/{total:,} {progress.get('unit', '')} ({100 * done // total} %)"]
    if progress.get("loss") is not None:
        parts.append(f"loss {progress['loss']:.3f}")
    if progress.get("images_per_second") is not None:
        parts.append(f"{progress['images_per_second']:,.0f} images/s")
    if progress.get("eta_seconds") is not None:
        parts.append(f"{duration(progress['eta_seconds'])} left")
    line, use = ", ".join(parts), progress.get("use") or {}
    shown = [
        f"{use[name]:.0%} {what}".replace("%", " %")
        for name, what in MACHINE_SHARES.items()
        if name in use
    ]
    return f"{line}; machine: {', '.join(shown)}" if shown else line


def closing_page(status: RunStatus) -> str:
    """What a newcomer wants to see at the end of a run."""
    recipe = status.recipe_path
    lines = ["", *results(status), "", "What to try next"]
    stages = [step.name for step in status.steps if step.kind == "stage"]
    if stages:
        lines += [
            '  .venv/bin/atelier sample "a red circle above a blue square"',
            "  .venv/bin/atelier status --json      every step's key, versions, funnel and scores",
            f"  .venv/bin/atelier plan {recipe} --set stages.{stages[-1]}.steps=400",
        ]
    lines += [
        f"  .venv/bin/atelier run {recipe}     again: everything is verified and skipped",
        "  .venv/bin/atelier down               stop the services; what was made stays",
    ]
    return "\n".join(lines)


def results(status: RunStatus) -> list[str]:
    """The funnel, the scores and the places to look, as far as there are any."""
    lines: list[str] = []
    funnels = {s.label: s.funnel for s in status.steps if s.funnel}
    if funnels:
        lines += ["Where the rows went", *funnel_table(funnels), ""]
    scored = [step for step in status.steps if step.scores]
    if scored:
        by_oracle = any("overall" in (step.scores or {}) for step in scored)
        title = "The oracle's scores, held-out prompts" if by_oracle else "Scores"
        lines += [title, *score_table(scored), ""]
    for step in status.steps:
        for name, text in (step.notes or {}).items():
            if name != BEGAN:
                told = shortened(f"{name}: {text}", MAX_NOTE_CHARACTERS)
                lines.append(f"Happened       {step.name}: {told}")
        for cause, lost in (step.waste or {}).items():
            what = f"{lost['steps']:g} steps and {duration(lost['seconds'])}"
            lines.append(f"Lost           {step.name}: {what}; {cause}, {lost['times']:g} times")
    if status.contact_sheet:
        lines.append(f"Contact sheet  {status.contact_sheet}")
    if status.mlflow_run_url or status.mlflow_uri:
        lines.append(f"MLflow         {status.mlflow_run_url or status.mlflow_uri}")
    stages = [step for step in status.steps if step.kind == "stage" and step.checkpoint_uri]
    if stages:
        last = stages[-1]
        lines.append(f"Last model     {last.checkpoint_path or last.checkpoint_uri}")
    return lines


def funnel_table(funnels: Mapping[str, Mapping[str, int]]) -> list[str]:
    """Reasons down, datasets across, in the order in which they are asked."""
    reasons = _merged_order([list(funnel) for funnel in funnels.values()])
    rows = [
        [reason.replace("_", " "), *(f"{funnel.get(reason, 0):,}" for funnel in funnels.values())]
        for reason in reasons
    ]
    return table(["", *funnels], rows)


def _merged_order(orders: Sequence[Sequence[str]]) -> list[str]:
    """One order of all names; what comes last anywhere (``committed``) comes last."""
    merged = list(dict.fromkeys(name for order in orders for name in order[:-1]))
    ends = dict.fromkeys(order[-1] for order in orders if order)
    return [name for name in merged if name not in ends] + list(ends)


def score_table(scored: Sequence[StepStatus]) -> list[str]:
    """Scores down, stages across; a score clearly below the stage before it says so."""
    names = list(dict.fromkeys(name for step in scored for name in step.scores or {}))
    rows = []
    for name in names:
        cells = []
        before: float | None = None
        for step in scored:
            value = (step.scores or {}).get(name)
            fell = value is not None and before is not None and _fell(before, value)
            cells.append("-" if value is None else f"{value:.2f}{'v' if fell else ' '}")
            before = value if value is not None else before
        rows.append([name.replace("_", " "), *cells])
    lines = table(["", *(step.name for step in scored)], rows)
    for stage, fallen in lowered(scored):
        lines.append(f"  v {stage} is lower than the stage before it in {', '.join(fallen)}")
    return lines


def lowered(scored: Sequence[StepStatus]) -> list[tuple[str, list[str]]]:
    """(stage, scores it lowers clearly against the scored stage before it)."""
    found = []
    for parent, step in itertools.pairwise(scored):
        before, after = parent.scores or {}, step.scores or {}
        fallen = [
            f"{name.replace('_', ' ')} ({before[name]:.2f} to {after[name]:.2f})"
            for name in after
            if name in before and _fell(before[name], after[name])
        ]
        if fallen:
            found.append((step.name, fallen))
    return found


def _fell(before: float, after: float) -> bool:
    """Whether a score is clearly lower: of those up to 1 by this much, of others by this share."""
    return after < before - NOTABLE_DROP * max(1.0, abs(before))


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Columns of equal width; the first is left-aligned, the others right."""
    columns = list(zip(header, *rows, strict=True))
    widths = [max(map(len, column)) for column in columns]
    lines = []
    for first, *others in [header, *rows]:
        cells = [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        lines.append("  ".join(["  " + first.ljust(widths[0]), *cells]).rstrip())
    return lines


def duration(seconds: float) -> str:
    """``0.4 s``, ``12 s``, ``3 min 20 s``, ``2 h 5 min``."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def shortened(text: str, characters: int) -> str:
    """``text``, cut with an ellipsis when longer."""
    return text if len(text) <= characters else text[: characters - 1].rstrip() + "…"


def follow(home: Path) -> None:
    """Show the newest run until it ends: a live page on a terminal, else a line per change."""
    if sys.stdout.isatty():
        _follow_live(home)
        return
    shown: list[str] = []

    def show(status: RunStatus | None) -> None:
        lines = [] if status is None else [step_line(s) for s in status.steps if s.decision]
        for line in lines:
            if line not in shown:
                print(line, flush=True)
        shown[:] = lines

    print(status_page(ended) if (ended := watch(home, show)) else "nothing has run here yet")


def _follow_live(home: Path) -> None:
    from rich.live import Live
    from rich.text import Text

    with Live(refresh_per_second=2) as live:
        watch(
            home,
            lambda status: live.update(
                Text("nothing has run here yet" if status is None else status_page(status))
            ),
        )
