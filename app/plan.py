"""`atelier plan`: what `run` would do, step by step, with reasons and pinned inputs."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from app.place import Place, connect
from app.recipe import Recipe
from app.selection import DATASET_PREFIX, DERIVED_PREFIX, SHEET, WORLD, specs_of
from app.steps import (
    evaluation_key,
    placed,
    refuse_damage,
    refuse_damaged,
    refuse_damaged_world,
    uses_world,
)
from app.verb import Output
from infra import storage
from infra.config import atelier_home
from infra.errors import UserError

if TYPE_CHECKING:
    from pathlib import Path

    from training.expected import Expected
    from training.plan import StagePlan
    from training.stages import DatasetPin


@dataclass(frozen=True)
class PlannedStep:
    """One line of the plan. ``work`` is its size as far as it is known (rows, steps, bytes).

    ``estimate``: of a dataset not yet curated, what a sample of its metadata lets expect.
    ``expected``: of a stage, hours and cost at the speed it was last trained at.
    """

    name: str
    decision: str
    reason: str
    key: str | None = None
    inputs: dict[str, str] = field(default_factory=dict)
    work: dict[str, int] = field(default_factory=dict)
    estimate: dict[str, Any] | None = None
    expected: dict[str, Any] | None = None

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
    steps += [_plan_derived(recipe, name, pins) for name in recipe.derived]
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
    estimate = None
    if plan.decision != "SKIP":
        from pipelines.estimate import estimate_curation

        found = estimate_curation(config, plan.build.dataset_root, place.store_uri)
        estimate = found.to_json()
    return PlannedStep(
        DATASET_PREFIX + name,
        plan.decision,
        plan.reason,
        plan.build_key,
        {f"metadata {index}": file.sha256 for index, file in enumerate(plan.inputs)},
        {"rows": plan.rows_in, "input_bytes": plan.input_bytes},
        estimate,
    )


def _plan_derived(recipe: Recipe, name: str, pins: dict[str, DatasetPin]) -> PlannedStep:
    from pipelines.derived import plan_derived
    from training.stages import DatasetPin

    config = recipe.derived[name]
    parent = pins.get(config.dataset)
    if parent is None:
        reason = f"the dataset {config.dataset} it is made from comes first"
        return PlannedStep(DERIVED_PREFIX + name, "RUN", reason)
    plan = plan_derived(parent.manifest_uri, recipe.sections, config)
    refuse_damaged(name, plan.problems)
    if plan.version is not None and plan.manifest_uri is not None:
        pins[name] = DatasetPin(name, plan.version, plan.manifest_uri)
    inputs = {f"dataset {config.dataset}": parent.version}
    return PlannedStep(DERIVED_PREFIX + name, plan.decision, plan.reason, plan.key, inputs)


def estimate_datasets(recipe: Recipe, out: Output) -> list[PlannedStep]:
    """Each dataset's funnel from a sample of its metadata, in seconds: nothing is pinned."""
    from pipelines.estimate import estimate_curation

    home = atelier_home()
    folder: Path | None = None
    is_world_there = True
    if recipe.world is not None:
        from app.world import plan_world

        world = plan_world(recipe.world, home)
        folder, is_world_there = world.folder, world.decision == "SKIP"
    place = connect(recipe.services, home, out.say)
    steps = []
    for name, written in recipe.datasets.items():
        if uses_world(written) and not is_world_there:
            raise UserError(f"dataset {name} is made of the painted world, which is not made yet")
        root = storage.join(place.store_uri, "datasets", name)
        found = estimate_curation(placed(written, folder), root, place.store_uri)
        reason = "a sample of the metadata, nothing pinned"
        steps.append(PlannedStep(DATASET_PREFIX + name, "GUESS", reason, estimate=found.to_json()))
    return steps


def _plan_stages(recipe: Recipe, place: Place, pins: dict[str, DatasetPin]) -> list[PlannedStep]:
    specs = specs_of(recipe)
    if not specs:
        return []

    from training.expected import expected_time
    from training.plan import PlanContext, plan_chain

    context = PlanContext(place.server, place.store_uri, pins, evaluation_key(recipe))
    return [
        _planned(recipe, plan, expected_time(plan, context)) for plan in plan_chain(specs, context)
    ]


def _planned(recipe: Recipe, plan: StagePlan, expected: Expected | None) -> PlannedStep:
    inputs = {f"dataset {pin.name}": pin.version for pin in plan.datasets}
    if plan.parent is not None:
        inputs[f"{plan.parent.model} version {plan.parent.version}"] = plan.parent.sha256
    inputs |= {f"folder {part.address}": part.sha256 for part in plan.parts}
    work = {"steps": plan.spec.steps, "steps_done": plan.step}
    stage = recipe.stages.get(plan.spec.stage)
    if stage is not None:
        work["images"] = stage.steps * stage.global_batch_size
    return PlannedStep(
        plan.spec.stage,
        plan.decision,
        plan.reason,
        plan.key,
        inputs,
        work,
        expected=None if expected is None else _expected(recipe, plan, expected),
    )


def _expected(recipe: Recipe, plan: StagePlan, expected: Expected) -> dict[str, Any]:
    price = recipe.cluster.price_per_worker_hour
    cost = None if price is None else expected.hours * expected.num_workers * price
    return {**asdict(expected), "cost": cost}


def expected_line(expected: dict[str, Any]) -> str:
    """``0.42 hours on 8 workers, cost 1.70 (35.1 images/s; known from version 2 of demo-concepts,
    measured on 1 worker)``."""

    def workers(number: int) -> str:
        return f"{number} worker{'s' * (number != 1)}"

    cost = "" if expected["cost"] is None else f", cost {expected['cost']:,.2f}"
    source = f"{expected['known_from']}, measured on {workers(expected['measured_workers'])}"
    return (
        f"{expected['hours']:,.2f} hours on {workers(expected['num_workers'])}{cost} "
        f"({expected['images_per_second']:,.1f} images/s; known from {source})"
    )


def show_plan(steps: list[PlannedStep], out: Output) -> None:
    """Print the plan for a person."""
    for step in steps:
        out.say(f"{step.decision:<7} {step.name:<16} {step.reason}")
        if step.decision != "SKIP":
            facts = [f"{amount:,} {name.replace('_', ' ')}" for name, amount in step.work.items()]
            pinned = [f"{name} {digest[:12]}" for name, digest in step.inputs.items()]
            hours = [] if step.expected is None else [expected_line(step.expected)]
            for line in (", ".join(facts), *hours, *pinned):
                if line:
                    out.say(f"{'':<25}{line}")
        show_funnels([step], out)
    left = sum(step.decision != "SKIP" for step in steps)
    out.say(f"{left} of {len(steps)} steps would work" if left else "everything is done")


def show_funnels(steps: list[PlannedStep], out: Output) -> None:
    """Print the estimates that steps have."""
    for step in steps:
        if step.estimate is not None:
            out.say(f"{'':<8}{step.name}")
            for line in funnel_lines(step.estimate):
                out.say(f"{'':<8}{line}")


def funnel_lines(estimate: dict[str, Any]) -> list[str]:
    """An estimate for a person: what each filter takes, what is left, and what it costs."""
    rows_in = estimate["rows_in"]
    lines = [
        f"expected, from {estimate['rows_sampled']:,} of {rows_in:,} rows "
        f"({estimate['groups_sampled']} draws of {estimate['groups']} row groups, 95 % intervals)"
    ]

    def line(name: str, share: dict[str, Any], sign: str) -> str:
        ratio, margin = 100 * share["ratio"], 100 * share["margin"]
        return f"  {sign} {name:<26} {share['rows']:>15,}  {ratio:6.2f} % ± {margin:.2f}"

    lines += [line(name, share, "-") for name, share in estimate["funnel"].items()]
    lines.append(line("to fetch", estimate["to_fetch"], "="))
    lines += [line(f"of it {name}", share, " ") for name, share in estimate["unknown"].items()]
    return lines + _yield_lines(estimate) + [f"  {note}" for note in estimate["notes"]]


def _yield_lines(estimate: dict[str, Any]) -> list[str]:
    """What the web leaves, and what that takes."""
    to_fetch, fetches = estimate["to_fetch"]["rows"], estimate["fetches"]
    lines = []
    if estimate["duplicate_ratio"] is not None:
        told = f"known from {estimate['copies_known_from']}"
        lines.append(f"  - {'copies':<26} {to_fetch - fetches:>15,}  {told}")
    if estimate["fetch_success_ratio"] is not None:
        share = f"{100 * estimate['fetch_success_ratio']:.1f} %"
        lost = estimate["web"] or {"not fetched": fetches - estimate["samples"]}
        lines += [f"  - {name:<26} {rows:>15,}" for name, rows in lost.items()]
        told = f"{share} of those asked for, known from {estimate['known_from']}"
    else:
        told = "were all to come"
    lines.append(
        f"  = {'samples':<26} {estimate['samples']:>15,}  ± {estimate['samples_margin']:,} ({told})"
    )
    cost = "" if estimate["cost"] is None else f", cost {estimate['cost']:,.2f}"
    cores = f"{estimate['num_cores']:,} core" + "s" * (estimate["num_cores"] != 1)
    source = estimate["pace_known_from"]
    known = "not measured yet" if source == "nothing" else f"known from {source}"
    pace = f"{estimate['fetches_per_core_second']:,.0f} fetches a second each, {known}"
    lines.append(
        f"  stored {estimate['stored_bytes'] / 1e9:,.2f} GB, {estimate['core_hours']:,.2f} "
        f"core-hours, {estimate['hours']:,.2f} hours on {cores}{cost} ({pace})"
    )
    return lines
