"""What a stage needs done, and why: SKIP, RESUME, INIT or RUN. Reads, never writes.

A stage is looked up by its key. SKIP means that a version with this key passed its gate, was handed
over and not rolled back, and that every byte of it has just been verified; `ready` may be a version
of another key, which is said. The inputs are pinned here, once: a stage starts from the version
that its plan names, whatever happens to aliases meanwhile.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from infra import storage
from infra.errors import UserError
from infra.storage import ObjectMissing
from infra.tracking_server import TrackingServer
from training import keys, publish, registry, versions
from training.checkpoint_store import newest_step
from training.parts import PublishedPart, find_parts, with_digests
from training.stages import TOKENIZER_STAGE, DatasetPin, StageSpec
from training.versions import RegisteredVersion

Decision = Literal["SKIP", "RESUME", "INIT", "RUN"]

PUBLISHED_NAME = "published.json"
TAG_STEP = "step"
TAG_METRICS = "metrics"
TAG_SCORES = "scores"
TAG_EVALUATION = "evaluation"
TAG_TOKENIZER = "tokenizer_sha256"
TAG_PARENT = "parent_version"
TAG_MODEL_ID = "logged_model_id"
SHOWN_CHANGES = 3


@dataclass(frozen=True)
class Pin:
    """A finished stage as an input of the next: a version's number, its files and their digest."""

    stage: str
    model: str
    version: int
    uri: str
    sha256: str
    stage_key: str
    tokenizer_sha256: str
    model_id: str | None = None

    @classmethod
    def of(cls, stage: str, version: RegisteredVersion) -> Pin:
        """The pin of a registered version."""
        tokenizer = version.tags.get(TAG_TOKENIZER, "")
        if stage == TOKENIZER_STAGE:
            tokenizer = version.sha256
        return cls(
            stage=stage,
            model=version.name,
            version=version.version,
            uri=version.uri,
            sha256=version.sha256,
            stage_key=version.tags.get(versions.TAG_STAGE_KEY, ""),
            tokenizer_sha256=tokenizer,
            model_id=version.tags.get(TAG_MODEL_ID),
        )


@dataclass(frozen=True)
class StagePlan:
    """One line of ``atelier plan``. ``key`` is None while an input does not exist yet; then the
    stage has to be planned again. ``existing`` is the version with this key, ``published`` the
    address of its files, as far as they are there; ``step`` how far training has come."""

    spec: StageSpec
    decision: Decision
    reason: str
    key: str | None = None
    run_name: str | None = None
    key_parts: Mapping[str, Any] | None = None
    dataset: DatasetPin | None = None
    parent: Pin | None = None
    existing: RegisteredVersion | None = None
    published: str | None = None
    step: int = 0
    mixed_in: tuple[DatasetPin, ...] = ()
    parts: tuple[PublishedPart, ...] = ()

    @property
    def datasets(self) -> tuple[DatasetPin, ...]:
        """All pinned datasets, the stage's own first."""
        return (() if self.dataset is None else (self.dataset,)) + self.mixed_in

    @property
    def needs_training(self) -> bool:
        """Whether Ray is needed; a trained stage may still have to be scored or handed over."""
        return self.published is None

    @property
    def pin(self) -> Pin | None:
        """What the next stage starts from, when this one is finished."""
        if self.decision != "SKIP" or self.existing is None:
            return None
        return Pin.of(self.spec.stage, self.existing)


@dataclass(frozen=True)
class PlanContext:
    """Where to look. ``evaluation_key`` names how stages are scored: scores of another evaluation
    do not count as done. ``verify`` off trusts the files of finished stages (for a quick look)."""

    server: TrackingServer
    store_uri: str
    datasets: Mapping[str, DatasetPin]
    evaluation_key: str = ""
    verify: bool = True


def plan_chain(specs: Sequence[StageSpec], context: PlanContext) -> list[StagePlan]:
    """Every stage of a recipe; what follows an unfinished stage is planned on its word."""
    plans: list[StagePlan] = []
    for spec in specs:
        parent_plan = next((p for p in plans if p.spec.stage == spec.parent), None)
        if parent_plan is None or parent_plan.pin is not None:
            pin = None if parent_plan is None else parent_plan.pin
            plans.append(plan_stage(spec, context, parent=pin))
        else:
            plans.append(_plan_after(spec, context, parent_plan))
    return plans


def _plan_after(spec: StageSpec, context: PlanContext, parent: StagePlan) -> StagePlan:
    before = parent.run_name or f"stage {parent.spec.stage}"
    reason = f"starts from the result of {before}, which comes first"
    dataset, mixed_in = _pins(spec, context)
    parts = find_parts(spec.configs)
    return StagePlan(spec, "INIT", reason, dataset=dataset, mixed_in=mixed_in, parts=parts)


def _pins(
    spec: StageSpec, context: PlanContext
) -> tuple[DatasetPin | None, tuple[DatasetPin, ...]]:
    """The stage's own dataset and those mixed in, as far as they are there."""
    dataset = context.datasets.get(spec.dataset_name) if spec.dataset_name else None
    found = tuple(context.datasets[name] for name in spec.mixed_in if name in context.datasets)
    return dataset, found


def plan_stage(spec: StageSpec, context: PlanContext, *, parent: Pin | None = None) -> StagePlan:
    """The decision for one stage whose inputs exist.

    ``parent`` is the finished stage it starts from; left out, the parent's `ready` version is
    resolved now. Raises ``UserError`` when there is none, when a finished result is damaged or was
    rolled back, or when a folder of published parts is not there.
    """
    if spec.parent is not None and parent is None:
        parent = _ready_parent(spec, context)
    published = find_parts(spec.configs)
    decision: Decision = "RUN" if parent is None else "INIT"
    base = StagePlan(spec, decision, "", parent=parent, parts=published)
    for name in spec.dataset_names:
        if name not in context.datasets:
            return replace(base, reason=f"dataset {name} is not curated yet")
    dataset, mixed_in = _pins(spec, context)
    base = replace(base, dataset=dataset, mixed_in=mixed_in)
    parts = keys.key_parts(
        stage=spec.stage,
        semantic=with_digests(spec.semantic, published),
        dataset_sha256s=[pin.version for pin in base.datasets],
        parent_sha256=None if parent is None else parent.sha256,
        tokenizer_sha256=None if parent is None else parent.tokenizer_sha256,
        init_policy=spec.init_policy,
    )
    key = keys.stage_key(parts)
    name = keys.run_name(spec.stage, key)
    base = replace(base, key=key, run_name=name, key_parts=parts)
    return _decide(base, context, key, name)


def _ready_parent(spec: StageSpec, context: PlanContext) -> Pin:
    parent = spec.parent or ""
    name = keys.model_name(spec.recipe, parent)
    found = registry.version_by_alias(context.server, name)
    if found is None:
        raise UserError(
            f"stage {spec.stage} starts from stage {parent}, and {name} has no ready version; "
            f"train stage {parent} first"
        )
    registry.check_place(context.store_uri, found)
    return Pin.of(parent, found)


def _decide(plan: StagePlan, context: PlanContext, key: str, run_name: str) -> StagePlan:
    model = keys.model_name(plan.spec.recipe, plan.spec.stage)
    of_key = versions.find_versions(context.server, model, key)
    existing = registry.newest_in_use(context.store_uri, of_key)
    if existing is not None:
        found = _decide_existing(plan, context, existing)
        if found is not None:
            return found
    run_uri = storage.join(context.store_uri, "runs", run_name)
    published = published_uri(context.store_uri, run_name)
    if published is not None:
        reason = "trained and published, not registered yet"
        return replace(plan, decision="RESUME", reason=reason, published=published)
    gone = "" if existing is None else f"the files of version {existing.version} are gone; "
    step = newest_step(run_uri)
    if step is not None:
        reason = f"{gone}a checkpoint at step {step} of {plan.spec.steps}"
        return replace(plan, decision="RESUME", reason=reason, step=step)
    reason = gone + _why_anew(plan, context, model)
    return replace(plan, reason=reason)


def _decide_existing(
    plan: StagePlan, context: PlanContext, existing: RegisteredVersion
) -> StagePlan | None:
    """SKIP or RESUME on account of a version with this key; None when its files are all gone.

    Raises ``UserError`` when it is damaged or lies elsewhere.
    """
    label = f"version {existing.version} of {existing.name}"
    registry.check_place(context.store_uri, existing)
    damage = _damage(existing.uri) if context.verify else []
    if damage is None:
        return None
    if damage:
        raise UserError(publish.damage_message(existing.uri, damage))
    step = _int_tag(existing, TAG_STEP)
    found = replace(plan, existing=existing, published=existing.uri, step=step)
    left = _left_to_do(plan.spec, existing, context.evaluation_key)
    if left:
        return replace(found, decision="RESUME", reason=f"{label} is trained; {left}")
    checked = "every digest verified" if context.verify else "not verified"
    elsewhere = registry.ready_elsewhere(context.server, context.store_uri, existing)
    other = "" if elsewhere is None else f", but {elsewhere}"
    return replace(found, decision="SKIP", reason=f"{label} has this key; {checked}{other}")


def published_uri(store_uri: str, run_name: str) -> str | None:
    """Where a run's finished checkpoint lies, when it was published completely."""
    marker = _read_if_there(storage.join(store_uri, "runs", run_name, PUBLISHED_NAME))
    if not isinstance(marker, dict) or "uri" not in marker:
        return None
    uri = str(marker["uri"])
    return uri if storage.exists(storage.join(uri, publish.LISTING_NAME)) else None


def _damage(uri: str) -> list[str] | None:
    """Problems of a published folder; None when nothing at all is left of it."""
    try:
        return publish.verify_checkpoint(uri)
    except ObjectMissing:
        left = next(iter(storage.list_objects(uri)), None)
        return None if left is None else [f"{publish.LISTING_NAME}: missing"]


def _left_to_do(spec: StageSpec, existing: RegisteredVersion, evaluation_key: str) -> str:
    """What keeps a trained version from counting as done; "" when nothing does."""
    metrics = {**json_tag(existing, TAG_METRICS), **json_tag(existing, TAG_SCORES)}
    problems = spec.bounds.problems(metrics)
    gate = existing.tags.get(versions.TAG_GATE, "")
    if existing.tags.get(TAG_EVALUATION, "") != evaluation_key and spec.kind == "masked":
        return "its scores are of another evaluation"
    if problems:
        return f"the gate holds it back: {problems[0]}"
    if gate != versions.PASSED:
        return "the gate is to be asked again"
    return "" if existing.is_handed_over else "it is not handed over yet"


def _why_anew(plan: StagePlan, context: PlanContext, model: str) -> str:
    starts = [part.address for part in plan.parts]
    if plan.parent is not None:
        starts.append(f"version {plan.parent.version} of {plan.parent.model}")
    start = f"from {' and '.join(starts) or 'fresh weights'}"
    known = versions.all_versions(context.server, model)
    if not known:
        return f"never trained; starts {start}"
    changed = _changes_since(known[-1], plan.key_parts or {})
    return f"{changed} since version {known[-1].version}; starts {start}"


def _changes_since(version: RegisteredVersion, parts: Mapping[str, Any]) -> str:
    try:
        before = publish.read_provenance(version.uri).get("key_parts", {})
    except UserError:
        return "its inputs changed"
    names = keys.changed_parts(before, parts)
    more = f" and {len(names) - SHOWN_CHANGES} more" if len(names) > SHOWN_CHANGES else ""
    return f"{', '.join(names[:SHOWN_CHANGES]) or 'nothing'}{more} changed"


def _read_if_there(uri: str) -> Any:
    try:
        return storage.read_json(uri)
    except ObjectMissing:
        return None


def _int_tag(version: RegisteredVersion, name: str) -> int:
    text = version.tags.get(name, "")
    return int(text) if text.isdigit() else 0


def json_tag(version: RegisteredVersion, name: str) -> dict[str, float]:
    """A tag that holds numbers by name."""
    try:
        raw = json.loads(version.tags.get(name) or "{}")
    except ValueError:
        return {}
    return {str(key): float(value) for key, value in raw.items()} if isinstance(raw, dict) else {}
