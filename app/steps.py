"""The steps of a run: each decides, records why, works or skips, and records what came out."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from app.recipe import Recipe
from app.recipe_checks import WORLD_MARK
from app.selection import DATASET_PREFIX, DERIVED_PREFIX, SHEET, WORLD, Selection
from app.session import Session
from app.status import StepStatus
from infra import storage
from infra.config import semantic_part
from infra.digests import canonical_json, code_digest, sha256_bytes
from infra.errors import UserError
from infra.manifest import load_manifest, verify_dataset
from infra.progress import progress

if TYPE_CHECKING:
    from pathlib import Path

    from app.world import WorldPlan
    from pipelines.config import CurationConfig
    from pipelines.curate import CurationPlan
    from training.plan import Pin, PlanContext, StagePlan
    from training.progress import StageProgress
    from training.stages import DatasetPin, StageSpec

REMEDY = "restore it, or give the same command with --repair to make it again"


# --- the painted world ---------------------------------------------------------------------------


def make_world(session: Session, repair: bool) -> None:
    """Have the painted world of the recipe, if it has one."""
    config = session.recipe.world
    if config is None:
        return

    from app.world import make_world, plan_world

    plan = plan_world(config, session.home)
    session.world_folder = plan.folder
    if not any(step.name == WORLD for step in session.file.status.steps):
        if plan.decision != "SKIP":
            raise _not_curated(session, "the painted world is not made")
        return
    with session.running(WORLD) as step:
        session.decide(step, plan.decision, plan.reason, plan.key)
        step.output = str(plan.folder)
        if not repair:
            refuse_damaged_world(plan)
        if plan.decision != "SKIP":
            make_world(config, plan)


def refuse_damaged_world(plan: WorldPlan) -> None:
    """A finished world with changed bytes is told, not mended."""
    if plan.damaged:
        raise UserError(f"{plan.folder / plan.damaged[0]} is damaged; {REMEDY}")


# --- datasets ------------------------------------------------------------------------------------


def placed(config: CurationConfig, world_folder: Path | None) -> CurationConfig:
    """The configuration with the painted world's folder in its paths."""
    if world_folder is None:
        return config

    def put(paths: list[str]) -> list[str]:
        return [path.replace(WORLD_MARK, str(world_folder)) for path in paths]

    captions = config.captions.model_copy(update={"files": put(config.captions.files)})
    return config.model_copy(update={"metadata": put(config.metadata), "captions": captions})


def uses_world(config: CurationConfig) -> bool:
    """Whether a dataset is made of the painted world."""
    return any(WORLD_MARK in path for path in (*config.metadata, *config.captions.files))


def curate_dataset(session: Session, name: str, selection: Selection, repair: bool) -> DatasetPin:
    """Have a dataset's version for this recipe and these inputs; returns it, pinned."""
    from pipelines.curate import plan_curation
    from pipelines.publish import funnel_of
    from training.stages import DatasetPin

    written = session.recipe.datasets[name]
    config = placed(written, session.world_folder)
    place = session.place
    with session.running(DATASET_PREFIX + name) as step:
        plan = plan_curation(name, config, place.store_uri)
        session.decide(step, plan.decision, plan.reason, plan.build_key)
        if plan.manifest_uri is None or selection.retry_failed:
            if not repair:
                refuse_damage(name, plan)
            if not selection.may_curate:
                raise _not_curated(session, f"dataset {name} is not curated for this recipe")
            uri = _mend(session, step, name, plan) or _curate(
                session, step, name, config, plan.rows_in, selection
            )
        else:
            uri = plan.manifest_uri
        manifest = load_manifest(uri)
        step.manifest_uri = uri
        step.dataset_version = manifest.version
        step.funnel = funnel_of(manifest)
        step.output = place.local_path(uri) or uri
    return DatasetPin(name, manifest.version, uri)


def derive_dataset(
    session: Session,
    name: str,
    pins: Mapping[str, DatasetPin],
    selection: Selection,
    repair: bool,
) -> DatasetPin:
    """Have the version of a curated dataset that a derived one's thresholds leave."""
    from pipelines.derived import make_derived, plan_derived
    from pipelines.publish import funnel_of
    from training.stages import DatasetPin

    config, sections = session.recipe.derived[name], session.recipe.sections
    with session.running(DERIVED_PREFIX + name) as step:
        plan = plan_derived(pins[config.dataset].manifest_uri, sections, config)
        session.decide(step, plan.decision, plan.reason, plan.key)
        uri = plan.manifest_uri
        if uri is None:
            if not repair:
                refuse_damaged(name, plan.problems)
            if not selection.may_curate:
                raise _not_curated(session, f"dataset {name} is not made for this recipe")
            bars = session.bars(step)
            environment = session.place.environment
            uri, _ = make_derived(plan, sections, config, session.spark, bars, environment)
        manifest = load_manifest(uri)
        step.manifest_uri = uri
        step.dataset_version = manifest.version
        step.funnel = funnel_of(manifest)
        step.output = session.place.local_path(uri) or uri
    return DatasetPin(name, manifest.version, uri)


def _not_curated(session: Session, what: str) -> UserError:
    return UserError(f"{what}; run `atelier curate {session.file.status.recipe_path}`")


def refuse_damage(name: str, plan: CurationPlan) -> None:
    """A finished version with changed bytes is told, not mended; missing files are made again."""
    from pipelines.workspace import noted_version

    version = noted_version(plan.build.result_uri)
    if version is not None:
        uri = storage.join(plan.build.dataset_root, version, "manifest.json")
        refuse_damaged(name, verify_dataset(uri))


def refuse_damaged(name: str, problems: Sequence[str]) -> None:
    """One line for what ``verify_dataset`` found, unless files are merely missing."""
    problems = [line for line in problems if not line.endswith(": missing")]
    if problems:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise UserError(f"dataset {name} is damaged: {problems[0]}{more}; {REMEDY}")


def _mend(session: Session, step: StepStatus, name: str, plan: CurationPlan) -> str | None:
    """What a finished version with damaged or missing files became; None when curating it again
    is the way: nothing is finished, or shards are not what is damaged."""
    from app.upkeep import say_repair
    from pipelines.repair import CannotRepair, repair
    from pipelines.workspace import noted_version

    version = noted_version(plan.build.result_uri)
    if version is None or plan.manifest_uri is not None or plan.build.open_round() is not None:
        return None
    uri = storage.join(plan.build.dataset_root, version, "manifest.json")
    fetch = _reaching(session, name, plan.build.config).fetch
    try:
        environment = session.place.environment
        bars, tars = session.bars(step), plan.build.tars
        result = repair(uri, session.spark, bars, environment, fetch, tars)
    except (CannotRepair, storage.ObjectMissing, storage.DigestMismatch) as error:
        session.out.say(f"{name}: {error}")
        return None
    say_repair(result, version, session.out)
    return result.manifest_uri


def _reaching(session: Session, name: str, config: CurationConfig) -> CurationConfig:
    """The configuration with the way to the painted world's web server, where it is used."""
    if not uses_world(session.recipe.datasets[name]):
        return config
    connect_to = {**session.connect_to(), **config.fetch.connect_to}
    fetch = config.fetch.model_copy(update={"connect_to": connect_to})
    return config.model_copy(update={"fetch": fetch})


def _curate(
    session: Session,
    step: StepStatus,
    name: str,
    config: CurationConfig,
    num_rows: int,
    selection: Selection,
) -> str:
    """Curate; returns the manifest's address."""
    from pipelines.curate import curate

    config = _reaching(session, name, config)
    place = session.place
    with progress(f"curating {name}", num_rows, "rows") as bar:

        def report(done: int, total: int) -> None:
            bar.update(done, total)
            session.report(step, done, total, "rows")

        return curate(
            name,
            config,
            place.store_uri,
            session.spark,
            place.environment,
            report,
            retry_failed=selection.retry_failed,
            others={
                other: placed(session.recipe.datasets[other], session.world_folder)
                for other in selection.datasets[selection.datasets.index(name) + 1 :]
            },
        ).manifest_uri


# --- training ------------------------------------------------------------------------------------


def plan_context(session: Session, pins: Mapping[str, DatasetPin]) -> PlanContext:
    """Where training looks for what is there."""
    from training.plan import PlanContext

    store_uri = session.place.store_uri
    return PlanContext(session.server, store_uri, dict(pins), session.evaluation_key)


def evaluation_key(recipe: Recipe) -> str:
    """How stages are scored, as one digest; scores of another evaluation do not count as done."""
    asked = recipe.evaluation
    if asked is None:
        return ""
    how = semantic_part(asked)
    how.pop("min_scores")  # decides about a score, not what it is
    identity: dict[str, Any] = {"evaluation": how}
    if asked.prompts is not None:
        from app.evaluate import prompts_of

        how["prompts"] = sha256_bytes(canonical_json(prompts_of(asked)))
    elif recipe.world is not None:
        identity["world"] = recipe.world.model_dump(mode="json")
        identity["code"] = code_digest("demo.oracle", "demo.questions")
    for name, judge in asked.judges.items():
        from pipelines.clip_model import identify

        how["judges"][name]["clip"] = identify(judge.clip)[0].key
    return sha256_bytes(canonical_json(identity))


def train_stage(
    session: Session,
    spec: StageSpec,
    pins: Mapping[str, DatasetPin],
    parent: Pin | None,
    repair: bool,
) -> Pin:
    """Have a stage trained, scored and handed over; returns it, pinned for the next one."""
    from training.plan import TAG_SCORES, json_tag, plan_stage
    from training.stage_run import record_skip

    context = plan_context(session, pins)
    with session.running(spec.stage) as step:
        if repair:
            _drop_if_damaged(session, spec)
        plan = plan_stage(spec, context, parent=parent)
        session.decide(step, plan.decision, plan.reason, plan.key)
        pin, version = plan.pin, plan.existing
        if pin is None or version is None:
            pin = _train(session, step, plan, context)
        else:
            record_skip(session.server, session.tracked_run_id, plan)
            step.mlflow_run_id = version.run_id
            step.scores = json_tag(version, TAG_SCORES) or None
        step.model_version = f"{pin.model}/{pin.version}"
        step.checkpoint_uri = pin.uri
        step.checkpoint_path = session.place.local_path(pin.uri)
        step.checkpoint_sha256 = pin.sha256
    return pin


def _train(session: Session, step: StepStatus, plan: StagePlan, context: PlanContext) -> Pin:
    from training.driver import DriverContext, run_stage

    if plan.needs_training:
        session.need_ray()
    recipe = session.recipe
    driver = DriverContext(context, recipe.cluster, recipe.name, session.tracked_run_id)
    evaluate = None
    if recipe.evaluation is not None:
        from app.evaluate import evaluate_stage

        asked = recipe.evaluation

        def evaluate(uri: str) -> dict[str, float]:
            how = (evaluate_stage, plan.spec.stage, uri, recipe.world, asked)
            return session.painting(f"scoring {plan.spec.stage}", *how)

    with progress(f"training {plan.spec.stage}", plan.spec.steps, "steps") as bar:

        def report(at: StageProgress) -> None:
            if at.is_encoding:
                session.report(step, at.shards_encoded, at.shards, "shards encoded")
                return
            bar.update(at.step, at.steps or None)
            session.note(step, at.notes)
            session.report(
                step, at.step, at.steps, "steps", loss=at.loss,
                images_per_second=at.images_per_second, eta_seconds=at.eta_seconds,
                use=dict(at.use),
            )  # fmt: skip

        result = run_stage(plan, driver, on_progress=report, evaluate=evaluate)
    step.mlflow_run_id = result.run_id
    step.waste = {cause: dict(lost) for cause, lost in result.waste.items()} or None
    if result.scores:
        step.scores = dict(result.scores)
        session.log_scores(result.scores, plan.spec.stage)
    return result.pin


def _drop_if_damaged(session: Session, spec: StageSpec) -> None:
    """Remove damaged checkpoints of a stage: its plan then finds them gone and makes them again."""
    from training.keys import model_name
    from training.publish import verify_checkpoint
    from training.versions import all_versions

    for version in all_versions(session.server, model_name(spec.recipe, spec.stage)):
        try:
            damaged = bool(verify_checkpoint(version.uri))
        except storage.ObjectMissing:
            damaged = True
        if damaged and storage.delete_prefix(version.uri):
            session.out.say(f"removed the damaged checkpoint {version.uri}")


# --- the contact sheet ---------------------------------------------------------------------------


def paint_sheet(session: Session) -> None:
    """Have a picture of the same prompts painted by every stage."""
    recipe, status = session.recipe, session.file.status
    if recipe.evaluation is None or not any(step.name == SHEET for step in status.steps):
        return

    from app.sheet import SheetRequest, plan_sheet, write_sheet

    stages = [step for step in status.steps if step.kind == "stage"]
    request = SheetRequest(recipe, status, stages, session.home / "sheets")
    with session.running(SHEET) as step:
        plan = plan_sheet(request)
        session.decide(step, plan.decision, plan.reason, plan.key)
        if plan.decision != "SKIP":
            started = time.monotonic()
            write_sheet(request, plan, session.painting)
            step.reason = f"{plan.reason}; painted in {time.monotonic() - started:.0f} s"
            session.put_artifact("contact_sheet.png", plan.path.read_bytes())
        step.output = status.contact_sheet = str(plan.path)
