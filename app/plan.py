"""`atelier plan`: what `run` would do, step by step, with reasons and pinned inputs."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from app.place import Place, connect
from app.recipe import Recipe
from app.selection import DATASET_PREFIX, SHEET, WORLD, specs_of
from app.steps import evaluation_key, placed, refuse_damage, refuse_damaged_world, uses_world
from app.verb import Output
from infra.config import atelier_home
from infra.tracking_server import TrackingServer

if TYPE_CHECKING:
    from pathlib import Path

    from training.plan import StagePlan
    from training.stages import DatasetPin


@dataclass(frozen=True)
class PlannedStep:
    """One line of the plan. ``work`` is its size as far as it is known (rows, steps, bytes)."""

    name: str
    decision: str
    reason: str
    key: str | None = None
    inputs: dict[str, str] = field(default_factory=dict)
    work: dict[str, int] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """For a program."""
        return asdict(self)


def plan_run(recipe: Recipe, out: Output) -> list[PlannedStep]:
    """Every step's decision as things are now. Starts the services; makes nothing."""
    home = atelier_home()
    steps: list[PlannedStep] = []
    world_folder: Path | None = None
    if recipe.world is not None:
        from app.world import plan_world

        world = plan_world(recipe.world, home)
        world_folder = world.folder
        refuse_damaged_world(world)
        rows = {"rows": recipe.world.num_rows}
        steps.append(PlannedStep(WORLD, world.decision, world.reason, world.key, work=rows))
    is_world_there = all(step.decision == "SKIP" for step in steps)
    place = connect(recipe.services, home, out.say)
    pins: dict[str, DatasetPin] = {}
    for name in recipe.datasets:
        steps.append(_plan_dataset(recipe, name, place, world_folder, is_world_there, pins))
    stages = _plan_stages(recipe, place, pins)
    steps += stages
    if recipe.evaluation is not None:
        done = all(step.decision == "SKIP" for step in stages)
        reason = "painted by every stage" if done else "painted when every stage is done"
        steps.append(PlannedStep(SHEET, "SKIP" if done else "RUN", reason))
    return steps


def _plan_dataset(
    recipe: Recipe,
    name: str,
    place: Place,
    world_folder: Path | None,
    is_world_there: bool,
    pins: dict[str, DatasetPin],
) -> PlannedStep:
    from pipelines.curate import plan_curation
    from training.stages import DatasetPin

    written = recipe.datasets[name]
    if uses_world(written) and not is_world_there:
        return PlannedStep(
            DATASET_PREFIX + name, "RUN", "the painted world it is made of comes first"
        )
    config = placed(written, world_folder)
    plan = plan_curation(name, config, place.store_uri)
    if plan.manifest_uri is not None and plan.version is not None:
        pins[name] = DatasetPin(name, plan.version, plan.manifest_uri)
    else:
        refuse_damage(name, plan)
    return PlannedStep(
        DATASET_PREFIX + name,
        plan.decision,
        plan.reason,
        plan.build_key,
        {f"metadata {index}": file.sha256 for index, file in enumerate(plan.inputs)},
        {"rows": plan.rows_in, "input_bytes": plan.input_bytes},
    )


def _plan_stages(recipe: Recipe, place: Place, pins: dict[str, DatasetPin]) -> list[PlannedStep]:
    specs = specs_of(recipe)
    if not specs:
        return []

    from training.plan import PlanContext, plan_chain

    server = TrackingServer(place.tracking_uri)
    context = PlanContext(server, place.store_uri, pins, evaluation_key(recipe))
    return [_planned(recipe, plan) for plan in plan_chain(specs, context)]


def _planned(recipe: Recipe, plan: StagePlan) -> PlannedStep:
    inputs = {}
    if plan.dataset is not None:
        inputs[f"dataset {plan.dataset.name}"] = plan.dataset.version
    if plan.parent is not None:
        inputs[f"{plan.parent.model} version {plan.parent.version}"] = plan.parent.sha256
    work = {"steps": plan.spec.steps, "steps_done": plan.step}
    stage = recipe.stages.get(plan.spec.stage)
    if stage is not None:
        work["images"] = stage.steps * stage.global_batch_size
    return PlannedStep(plan.spec.stage, plan.decision, plan.reason, plan.key, inputs, work)


def show_plan(steps: list[PlannedStep], out: Output) -> None:
    """Print the plan for a person."""
    for step in steps:
        out.say(f"{step.decision:<7} {step.name:<16} {step.reason}")
        if step.decision != "SKIP":
            facts = [f"{amount:,} {name.replace('_', ' ')}" for name, amount in step.work.items()]
            pinned = [f"{name} {digest[:12]}" for name, digest in step.inputs.items()]
            for line in (", ".join(facts), *pinned):
                if line:
                    out.say(f"{'':<25}{line}")
    left = sum(step.decision != "SKIP" for step in steps)
    out.say(f"{left} of {len(steps)} steps would work" if left else "everything is done")
