"""What a run did so far, on disk after every step: ``<home>/runs/<run id>/status.json``.

The newest run is ``<home>/runs/latest``. One run at a time per home: ``run_lock``.
"""

from __future__ import annotations

import fcntl
import json
import os
import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from infra import storage
from infra.errors import UserError

SCHEMA_VERSION = 1
LOCK_TRIES = 4
LOCK_TRY_SECONDS = 0.05
WAITING, RUNNING, DONE, FAILED, STOPPED = "waiting", "running", "done", "failed", "stopped"


@dataclass
class StepStatus:
    """One step. ``decision`` is SKIP, RESUME, INIT or RUN; ``key`` is what the result is filed
    under; ``checkpoint_path`` is set where the store lies on this machine; ``notes`` are what
    happened to a stage in training, by name."""

    name: str
    kind: str
    state: str = WAITING
    decision: str | None = None
    reason: str | None = None
    seconds: float | None = None
    key: str | None = None
    dataset_version: str | None = None
    manifest_uri: str | None = None
    model_version: str | None = None
    checkpoint_uri: str | None = None
    checkpoint_path: str | None = None
    checkpoint_sha256: str | None = None
    mlflow_run_id: str | None = None
    funnel: dict[str, int] | None = None
    scores: dict[str, float] | None = None
    output: str | None = None
    progress: dict[str, Any] | None = None
    waste: dict[str, dict[str, float]] | None = None
    notes: dict[str, str] | None = None

    @property
    def is_made(self) -> bool:
        """Whether there is a dataset version or a checkpoint."""
        return self.manifest_uri is not None or self.checkpoint_uri is not None

    @property
    def label(self) -> str:
        """The dataset or stage, without the verb in a step's name."""
        return self.name.rpartition(":")[2]


@dataclass
class RunStatus:
    """A run. Times are ISO 8601 in UTC; ``scores`` and ``funnel`` repeat the steps', by name."""

    run_id: str
    recipe_name: str
    recipe_path: str
    recipe_fingerprint: str
    command: str
    pid: int
    started_at: str
    updated_at: str
    state: str = RUNNING
    ended_at: str | None = None
    seconds: float | None = None
    store_uri: str | None = None
    mlflow_uri: str | None = None
    mlflow_run_id: str | None = None
    mlflow_run_url: str | None = None
    contact_sheet: str | None = None
    error: str | None = None
    steps: list[StepStatus] = field(default_factory=list)
    schema_version: int = SCHEMA_VERSION

    def step(self, name: str) -> StepStatus:
        """The step called ``name``; ``KeyError`` when there is none."""
        for step in self.steps:
            if step.name == name:
                return step
        raise KeyError(name)

    def to_json(self) -> dict[str, Any]:
        """What ``status --json`` prints."""
        steps = [asdict(step) for step in self.steps]
        return {
            **{name.name: getattr(self, name.name) for name in fields(self)},
            "steps": steps,
            "funnel": {s.label: s.funnel for s in self.steps if s.funnel is not None},
            "scores": {s.name: s.scores for s in self.steps if s.scores is not None},
        }

    @classmethod
    def from_json(cls, raw: dict[str, Any]) -> RunStatus:
        """The inverse; keys of a newer version are left out."""
        own = {each.name for each in fields(cls)}
        of_step = {each.name for each in fields(StepStatus)}
        values = {key: value for key, value in raw.items() if key in own}
        values["steps"] = [
            StepStatus(**{key: value for key, value in step.items() if key in of_step})
            for step in raw.get("steps", [])
        ]
        return cls(**values)


class StatusFile:
    """Writes a run's status whole, so that a reader never sees half of one."""

    def __init__(self, folder: Path, status: RunStatus) -> None:
        self.folder = folder
        self.status = status
        self._started = time.monotonic()

    @classmethod
    def create(cls, home: Path, status: RunStatus, resolved_recipe: dict[str, Any]) -> StatusFile:
        """Make the run's folder with its resolved recipe and point ``latest`` to it."""
        folder = home / "runs" / status.run_id
        folder.mkdir(parents=True)
        write_whole(folder / "recipe.json", json.dumps(resolved_recipe, indent=1))
        file = cls(folder, status)
        file.save()
        pointer = home / "runs" / f".latest-{secrets.token_hex(4)}"
        pointer.symlink_to(status.run_id)
        os.replace(pointer, home / "runs" / "latest")
        return file

    def save(self) -> None:
        """Write the status as it is now."""
        self.status.updated_at = now()
        write_whole(self.folder / "status.json", json.dumps(self.status.to_json(), indent=1))

    def end(self, state: str, error: str | None = None) -> None:
        """Close the run, and the step that was running, as ``state``."""
        for step in self.status.steps:
            if step.state == RUNNING:
                step.state = state
                step.progress = None
        self.status.state = state
        self.status.error = error
        self.status.ended_at = now()
        self.status.seconds = round(time.monotonic() - self._started, 2)
        self.save()

    @contextmanager
    def running(self, name: str) -> Iterator[StepStatus]:
        """The step called ``name`` while it works; its time and state are kept."""
        step = self.status.step(name)
        step.state = RUNNING
        self.save()
        started = time.monotonic()
        try:
            yield step
            step.state = DONE
            step.progress = None
        finally:
            step.seconds = round(time.monotonic() - started, 2)
            self.save()


def new_run_id(recipe_name: str) -> str:
    """Sorts by time: ``20260131T120000-demo-1f2e``."""
    return f"{datetime.now(UTC):%Y%m%dT%H%M%S}-{recipe_name}-{secrets.token_hex(2)}"


def now() -> str:
    """This moment, ISO 8601 in UTC, whole seconds."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def write_whole(path: Path, text: str) -> None:
    """Replace ``path``: a reader, or a crash, finds the old text or the new one."""
    storage.write_bytes(storage.file_uri(path), text.encode())


def read_latest(home: Path) -> RunStatus | None:
    """The newest run of this home, None before the first. A run whose process died is stopped."""
    status = _read(home / "runs" / "latest" / "status.json")
    if status is None:
        return None
    if status.state == RUNNING and holder_of_lock(home) != status.pid:
        status.state = STOPPED
        status.error = "its process ended without a word; the same command goes on"
        for step in status.steps:
            if step.state == RUNNING:
                step.state = STOPPED
    return status


def read_made(home: Path) -> RunStatus | None:
    """The newest run with every step as that recipe's runs last ended it.

    A run that failed, or did a part only, takes nothing away from what is there. What the recipe
    made in another store is not there.
    """
    newest = read_latest(home)
    if newest is None:
        return None
    steps = {step.name: step for step in newest.steps}
    stored_in = _services_of(home / "runs" / newest.run_id).get("store_uri")
    for path in sorted((home / "runs").glob("*/status.json"), reverse=True):
        earlier = None if path.parent.name == "latest" else _read(path)
        if earlier is None or earlier.recipe_name != newest.recipe_name:
            continue
        if _services_of(path.parent).get("store_uri") != stored_in:
            continue
        for step in earlier.steps:
            if step.name not in steps or (step.is_made and not steps[step.name].is_made):
                steps[step.name] = step
    newest.steps = list(steps.values())
    return newest


def recorded_services(home: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    """The recorded recipe of every run and its section `services`, the newest run's first."""
    newest = home / "runs" / "latest"
    folders = sorted((path.parent for path in (home / "runs").glob("*/recipe.json")), reverse=True)
    for folder in [newest, *(each for each in folders if each != newest)]:
        if (folder / "recipe.json").exists():
            yield folder / "recipe.json", _services_of(folder)


def _services_of(folder: Path) -> dict[str, Any]:
    """The section `services` of a run's recipe; this machine's own services have an empty one."""
    found = _json_of(folder / "recipe.json") or {}
    return {name: value for name, value in (found.get("services") or {}).items() if value}


def newest_of_each_recipe(home: Path) -> list[RunStatus]:
    """Of every recipe that ran in this home its runs, until one ended well; newest first."""
    found: list[RunStatus] = []
    ended: set[str] = set()
    for path in sorted((home / "runs").glob("*/status.json"), reverse=True):
        status = None if path.parent.name == "latest" else _read(path)
        if status is not None and status.recipe_name not in ended:
            found.append(status)
            if status.state == DONE and status.command.startswith("atelier run "):
                ended.add(status.recipe_name)
    return found


def _read(path: Path) -> RunStatus | None:
    raw = _json_of(path)
    return None if raw is None else RunStatus.from_json(raw)


def _json_of(path: Path) -> dict[str, Any] | None:
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({error}); remove it, or run again") from error
    return found


@contextmanager
def run_lock(home: Path, command: str) -> Iterator[None]:
    """Hold this home's only run; the kernel frees it when its holder dies, however it dies."""
    folder = home / "runs"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"cannot make {folder}: {error.strerror}; set ATELIER_HOME to a folder you own"
        ) from error
    with open(folder / "lock", "a+", encoding="utf-8") as file:
        if not _takes_lock(file.fileno()):
            file.seek(0)
            holder = file.read().strip() or "another process"
            raise UserError(
                f"{holder} is at work in {home}; wait for it (`atelier status --watch`), "
                "or set ATELIER_HOME to another folder"
            )
        file.truncate(0)
        file.write(f"{command} (process {os.getpid()})")
        file.flush()
        try:
            yield
        finally:
            file.truncate(0)


def holder_of_lock(home: Path) -> int | None:
    """The process that runs in this home now, None when none does."""
    try:
        with open(home / "runs" / "lock", encoding="utf-8") as file:
            if _try_lock(file.fileno(), fcntl.LOCK_SH):
                return None
            text = file.read()
    except FileNotFoundError:
        return None
    digits = text.rpartition("(process ")[2].rstrip(")\n ")
    return int(digits) if digits.isdigit() else -1


def _takes_lock(descriptor: int) -> bool:
    """Try for a moment: whoever asks `holder_of_lock` holds it for an instant."""
    for _ in range(LOCK_TRIES):
        if _try_lock(descriptor, fcntl.LOCK_EX):
            return True
        time.sleep(LOCK_TRY_SECONDS)
    return False


def _try_lock(descriptor: int, kind: int) -> bool:
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def watch(
    home: Path, show: Callable[[RunStatus | None], None], interval_seconds: float = 1.0
) -> RunStatus | None:
    """Call ``show`` until the newest run has ended; returns it."""
    while True:
        status = read_latest(home)
        show(status)
        if status is None or status.state != RUNNING:
            return status
        time.sleep(interval_seconds)
