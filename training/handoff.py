"""After training: a published checkpoint becomes a registered version, and perhaps `ready`.

Every step can be repeated: what is there is found by its stage key and left as it is. A version is
handed over when it passed its gate, `ready` points to it, its run is FINISHED and, last of all,
its tag ``handoff`` says so.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib import metadata
from typing import Any

from infra.digests import canonical_json
from infra.tracking_server import TrackedRun, TrackingServer, json_number, now_ms
from training import keys, registry, versions
from training.expected import TAG_WORK, work_digest
from training.plan import (
    TAG_EVALUATION,
    TAG_METRICS,
    TAG_MODEL_ID,
    TAG_PARENT,
    TAG_SCORES,
    TAG_STEP,
    TAG_TOKENIZER,
    Pin,
    StagePlan,
)
from training.publish import PublishedCheckpoint
from training.stages import TOKENIZER_STAGE
from training.versions import RegisteredVersion

FAILED = "failed"
UNKNOWN = "none"


@dataclass(frozen=True)
class Outcome:
    """A trained stage: where it lies, and what is known about it."""

    published: PublishedCheckpoint
    step: int
    metrics: Mapping[str, float]
    scores: Mapping[str, float]
    evaluation_key: str
    problems: tuple[str, ...]


def provenance(plan: StagePlan, run: TrackedRun, step: int, metrics: Mapping[str, float]) -> Any:
    """Where a checkpoint comes from, as it is stored beside it."""
    parent, dataset = plan.parent, plan.dataset
    return {
        "schema_version": 1,
        "recipe": plan.spec.recipe,
        "stage": plan.spec.stage,
        "stage_key": plan.key,
        "key_parts": plan.key_parts,
        "run_name": plan.run_name,
        "mlflow_run_id": run.run_id,
        "init_policy": plan.spec.init_policy,
        "parent": None if parent is None else asdict(parent),
        "dataset": None if dataset is None else asdict(dataset),
        "mixed_in": [asdict(pin) for pin in plan.mixed_in],
        "parts": [asdict(part) for part in plan.parts],
        "step": step,
        "metrics": {name: value for name, value in sorted(metrics.items())},
        "libraries": _library_versions(),
        "published_at": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _library_versions() -> dict[str, str]:
    names = ("torch", "lightning", "ray", "safetensors", "numpy")
    return {name: metadata.version(name) for name in names}


def register(
    server: TrackingServer, plan: StagePlan, run: TrackedRun, outcome: Outcome
) -> RegisteredVersion:
    """The registered version of a published checkpoint, with its logged model and its scores."""
    name = keys.model_name(plan.spec.recipe, plan.spec.stage)
    published = outcome.published
    identity = {
        versions.TAG_STAGE: plan.spec.stage,
        versions.TAG_STAGE_KEY: plan.key or "",
        versions.TAG_SHA256: published.sha256,
    }
    facts = {
        TAG_STEP: str(outcome.step),
        **_dataset_tags(plan),
        TAG_PARENT: UNKNOWN if plan.parent is None else str(plan.parent.version),
        TAG_TOKENIZER: _tokenizer_sha256(plan, published),
        TAG_METRICS: _numbers(outcome.metrics),
        "init_policy": plan.spec.init_policy,
        "run_name": plan.run_name or "",
        TAG_WORK: work_digest(plan.spec),
    }
    model_id = versions.logged_model(
        server,
        run.experiment_id,
        name,
        run.run_id,
        plan.key or "",
        params={"init_policy": plan.spec.init_policy, "steps": str(plan.spec.steps)},
        tags={**identity, "uri": published.uri},
    )
    _log_results(server, run, model_id, outcome)
    server.log_outputs(run.run_id, [model_id], outcome.step)
    versions.create_registered_model(server, name)
    version = versions.create_version(
        server,
        name,
        published.uri,
        run.run_id,
        {**facts, **identity, TAG_MODEL_ID: model_id},
        model_id,
    )
    verdict = {
        TAG_SCORES: _numbers(outcome.scores),
        TAG_EVALUATION: outcome.evaluation_key,
        versions.TAG_GATE: FAILED if outcome.problems else versions.PASSED,
    }
    versions.set_version_tags(server, version, **verdict)
    return versions.get_version(server, name, version.version)


def _dataset_tags(plan: StagePlan) -> dict[str, str]:
    """The versions that a stage trains on, so that they can be searched for."""
    own = UNKNOWN if plan.dataset is None else plan.dataset.version
    mixed_in = {versions.mixed_in_tag(pin.version): pin.version for pin in plan.mixed_in}
    return {versions.TAG_DATASET: own, **mixed_in}


def _tokenizer_sha256(plan: StagePlan, published: PublishedCheckpoint) -> str:
    if plan.spec.stage == TOKENIZER_STAGE:
        return published.sha256
    return "" if plan.parent is None else plan.parent.tokenizer_sha256


def _log_results(server: TrackingServer, run: TrackedRun, model_id: str, outcome: Outcome) -> None:
    """Scores and final metrics of the run, tied to the logged model."""
    at_ms = max(now_ms(), run.started_at_ms)
    points = [
        {
            "key": key,
            "value": json_number(value),
            "timestamp": at_ms,
            "step": outcome.step,
            "model_id": model_id,
        }
        for key, value in {
            **{f"final/{name}": value for name, value in outcome.metrics.items()},
            **{f"score/{name}": value for name, value in outcome.scores.items()},
        }.items()
    ]
    if points:
        server.log_batch(run.run_id, metrics=points)


def hand_over(
    server: TrackingServer,
    store_uri: str,
    version: RegisteredVersion,
    run: TrackedRun,
    *,
    passed: bool,
    why: str,
) -> RegisteredVersion:
    """Move the aliases; only a version that passed becomes `ready` and ends its run well.

    Raises ``UserError`` for one that a rollback took back: only a person makes it ready again.
    """
    registry.promote(server, store_uri, version, registry.CANDIDATE, why=why)
    if not passed:
        return version
    registry.newest_in_use(store_uri, [version])
    registry.promote(server, store_uri, version, registry.READY, why=why)
    server.update_run(run.run_id, "FINISHED")
    versions.set_version_tags(server, version, **{versions.TAG_HANDOFF: versions.COMPLETE})
    return versions.get_version(server, version.name, version.version)


def pin_of(plan: StagePlan, version: RegisteredVersion) -> Pin:
    """What the next stage starts from."""
    return Pin.of(plan.spec.stage, version)


def _numbers(values: Mapping[str, float]) -> str:
    return canonical_json({name: float(value) for name, value in values.items()}).decode()


def run_tags(plan: StagePlan, attempt: int, parent_run_id: str | None) -> dict[str, str]:
    """What MLflow's run says about the stage, besides its key."""
    tags = {
        "stage": plan.spec.stage,
        "recipe": plan.spec.recipe,
        "attempt": str(attempt),
        "decision": plan.decision,
        "reason": plan.reason,
        "init_policy": plan.spec.init_policy,
        "run_name": plan.run_name or "",
        **_dataset_tags(plan),
        TAG_PARENT: UNKNOWN if plan.parent is None else str(plan.parent.version),
        "parent_sha256": UNKNOWN if plan.parent is None else plan.parent.sha256,
    }
    if parent_run_id is not None:
        tags["mlflow.parentRunId"] = parent_run_id
    return tags


def flat_params(values: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """A configuration as MLflow params: dotted names, values as text."""
    flat: dict[str, str] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            flat |= flat_params(value, f"{prefix}{name}.")
        else:
            text = value if isinstance(value, str) else json.dumps(value)
            flat[prefix + name] = text[:5000]
    return flat
