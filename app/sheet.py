"""The contact sheet of a run: planned by what it would show, painted by every stage."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from app.contact_sheet import Row, draw_sheet, save_png
from app.recipe import EvaluationConfig, Recipe
from app.sources import lineage_of
from app.status import RunStatus, StepStatus, write_whole
from demo.world import WorldConfig
from infra.digests import canonical_json, code_digest, sha256_bytes, sha256_file

# (what is done, function, its arguments) -> what it gives; ``app.session.Session.painting``
Painting = Callable[..., Any]

CODE = ("app.contact_sheet", "app.sheet", "demo.captions", "demo.questions")


@dataclass(frozen=True)
class SheetRequest:
    """Whose images, and where the sheets of this home lie."""

    recipe: Recipe
    run: RunStatus
    stages: Sequence[StepStatus]
    folder: Path


@dataclass(frozen=True)
class SheetPlan:
    """Whether the sheet of these checkpoints is there."""

    path: Path
    key: str
    decision: str
    reason: str


def plan_sheet(request: SheetRequest) -> SheetPlan:
    """SKIP when the sheet of these checkpoints and prompts is there as it was written."""
    recipe = request.recipe
    identity = {
        "checkpoints": [[step.name, step.checkpoint_sha256] for step in request.stages],
        "evaluation": None
        if recipe.evaluation is None
        else recipe.evaluation.model_dump(mode="json"),
        "world": None if recipe.world is None else recipe.world.model_dump(mode="json"),
        "code": code_digest(*CODE),
    }
    key = sha256_bytes(canonical_json(identity))
    path = request.folder / f"{recipe.name}-{key[:12]}.png"
    try:
        written = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))["sha256"]
    except (OSError, ValueError, KeyError):
        return SheetPlan(path, key, "RUN", "no sheet of these checkpoints is there yet")
    if not path.is_file() or sha256_file(path) != written:
        return SheetPlan(path, key, "RUN", "the sheet is not as it was written")
    return SheetPlan(path, key, "SKIP", "the sheet of these checkpoints is there and was verified")


def write_sheet(request: SheetRequest, plan: SheetPlan, painting: Painting) -> None:
    """Let every stage paint the same prompts, draw the sheet, and write it with its lineage."""
    recipe = request.recipe
    if recipe.evaluation is None:
        raise ValueError("a contact sheet needs the recipe's evaluation")
    prompts = sheet_prompts(recipe.world, recipe.evaluation)
    rows = [_row(step, prompts, recipe.evaluation, painting) for step in request.stages]
    sheet = draw_sheet(f"{recipe.name}: the same prompts after every stage", prompts, rows)
    plan.path.parent.mkdir(parents=True, exist_ok=True)
    lineage = {"prompts": json.dumps(prompts), **lineage_of(request.run, request.stages[-1])}
    save_png(sheet, plan.path, lineage)
    write_whole(plan.path.with_suffix(".json"), json.dumps({"sha256": sha256_file(plan.path)}))


def sheet_prompts(world: WorldConfig | None, config: EvaluationConfig) -> list[str]:
    """The prompts of the recipe, else some that are scored: the first of a file, or the six kinds
    of question about the painted world in turn."""
    if config.sheet_prompts:
        return list(config.sheet_prompts[: config.sheet_columns])
    if world is None or config.prompts is not None:
        from app.evaluate import prompts_of

        return prompts_of(config)[: config.sheet_columns]
    from demo.questions import geneval_prompts

    return [each.prompt for each in geneval_prompts(world, config.sheet_columns, config.seed)]


def _row(
    step: StepStatus, prompts: Sequence[str], config: EvaluationConfig, painting: Painting
) -> Row:
    """One stage's images; the seeds are the same in every row."""
    from app.evaluate import paint_stage

    what = f"painting with {step.name}"
    how = (step.name, str(step.checkpoint_uri), list(prompts), config)
    resolution_px, images = painting(what, paint_stage, *how)
    notes = [f"{resolution_px} px", f"checkpoint {str(step.checkpoint_sha256)[:8]}"]
    scores = step.scores or {}
    for name in ("overall", *sorted(config.judges)):
        if name in scores:
            notes.append(f"{name} {scores[name]:.2f}")
    return Row(step.name, "\n".join(notes), images)
