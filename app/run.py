"""The whole path, on one page: world, datasets, tokenizer, stages, contact sheet.

Each step is planned when its inputs exist, and skipped when its result is there and verifies. The
record in ``<home>/runs/`` is written after every step, so a killed run says where it was.
"""

from __future__ import annotations

import os
from pathlib import Path

from app import steps
from app.recipe import Recipe
from app.report import closing_page, results
from app.selection import SHEET, WORLD, Selection
from app.session import Session
from app.status import (
    DONE,
    FAILED,
    STOPPED,
    RunStatus,
    StatusFile,
    StepStatus,
    new_run_id,
    now,
    run_lock,
)
from app.verb import Output, lines_of
from infra.config import atelier_home

MLFLOW_STATES = {DONE: "FINISHED", FAILED: "FAILED", STOPPED: "KILLED"}


def run_recipe(
    recipe: Recipe,
    recipe_path: Path,
    out: Output,
    *,
    selection: Selection | None = None,
    repair: bool = False,
) -> RunStatus:
    """Do every selected step that is not done, and return the record.

    Raises ``UserError`` in one line when a step fails, when a finished result is damaged (and
    ``repair`` is off), or when another run is at work in this home.
    """
    selection = selection or Selection.everything(recipe)
    home = atelier_home()
    command = f"atelier {selection.command} {recipe_path}"
    with run_lock(home, command):
        file = _new_record(recipe, recipe_path, selection, home, command)
        session = Session(recipe, home, file, out)
        out.say(f"{recipe.name}: {len(file.status.steps)} steps; what they make lies in {home}")
        try:
            _do_steps(session, selection, repair)
        except BaseException as error:
            _close(session, *_how_it_ended(error))
            raise
        _close(session, DONE, None)
    is_whole = selection.command == "run"
    out.say(closing_page(file.status) if is_whole else "\n".join(["", *results(file.status)]))
    return file.status


def _do_steps(session: Session, selection: Selection, repair: bool) -> None:
    """The path itself."""
    steps.make_world(session, repair)
    pins = {
        name: steps.curate_dataset(session, name, selection, repair) for name in selection.datasets
    }
    pins |= {
        name: steps.derive_dataset(session, name, pins, selection, repair)
        for name in selection.derived
    }
    session.end_curation()
    parent = None
    for spec in selection.specs:
        parent = steps.train_stage(session, spec, pins, parent, repair)
    if not session.recipe.cluster.use_gpu:  # else the sheet is painted there
        session.end_training()
    steps.paint_sheet(session)


def _new_record(
    recipe: Recipe, recipe_path: Path, selection: Selection, home: Path, command: str
) -> StatusFile:
    kinds = [(WORLD, WORLD)] if recipe.world is not None and selection.may_curate else []
    kinds += selection.step_kinds
    if selection.command == "run" and recipe.evaluation is not None:
        kinds.append((SHEET, "sheet"))
    status = RunStatus(
        run_id=new_run_id(recipe.name),
        recipe_name=recipe.name,
        recipe_path=str(recipe_path),
        recipe_fingerprint=recipe.fingerprint,
        command=command,
        pid=os.getpid(),
        started_at=now(),
        updated_at=now(),
        steps=[StepStatus(name, kind) for name, kind in kinds],
    )
    return StatusFile.create(home, status, recipe.model_dump(mode="json"))


def _how_it_ended(error: BaseException) -> tuple[str, str]:
    """The state and the line that the record keeps."""
    if isinstance(error, KeyboardInterrupt | SystemExit):
        return STOPPED, "stopped by hand; the same command goes on"
    lines = lines_of(error) if isinstance(error, Exception) else None
    return FAILED, "; ".join(lines or [f"a bug: {type(error).__name__}: {error}"])


def _close(session: Session, state: str, error: str | None) -> None:
    """End engines, the record and MLflow's page, each even when the one before fails."""
    try:
        session.close()
    finally:
        try:
            session.file.end(state, error)
        finally:
            session.end_tracked(MLFLOW_STATES[state])
