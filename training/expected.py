"""How long a stage will take, and so cost: from the speed of the same work before, per worker."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from infra import storage
from infra.digests import canonical_json, sha256_bytes
from training import keys, versions
from training.plan import TAG_METRICS, PlanContext, StagePlan, json_tag
from training.progress import read_progress_json
from training.stages import StageSpec

TAG_WORK = "work_sha256"
PROGRESS_NAME = "progress.json"
# What an image's training takes is decided by the network and these fields of a stage; kinds of
# processors are not known here.
WORK_FIELDS = ("compress", "crop", "lora", "precision", "resolution_px", "train_text_encoder")


@dataclass(frozen=True)
class Expected:
    """How long what is left of a stage will take on ``num_workers``, if each is as fast as one of
    the ``measured_workers`` was; ``images_per_second`` is of all."""

    hours: float
    images_per_second: float
    num_workers: int
    measured_workers: int
    known_from: str


def work_digest(spec: StageSpec) -> str:
    """One digest of what training on an image consists of; "" for the tokenizer."""
    stage: Any = spec.configs.get("stage")
    if stage is None:
        return ""
    work = {name: stage[name] for name in WORK_FIELDS}
    return sha256_bytes(canonical_json({"network": spec.configs["network"], "stage": work}))


def expected_time(plan: StagePlan, context: PlanContext) -> Expected | None:
    """From the run's own progress, or from the newest version of the stage that did the same work
    for each image; None when neither is known. Workers are taken to add up."""
    stage = plan.spec.configs.get("stage")
    if stage is None or not plan.needs_training:
        return None
    found = _own_speed(plan, context) or _speed_of_versions(plan, context)
    if found is None:
        return None
    rate, measured_workers, known_from = found
    num_workers = plan.spec.num_workers
    rate *= num_workers / measured_workers
    left = (plan.spec.steps - plan.step) * int(stage["global_batch_size"])
    return Expected(left / rate / 3600, rate, num_workers, measured_workers, known_from)


def _own_speed(plan: StagePlan, context: PlanContext) -> tuple[float, int, str] | None:
    if not plan.step or not plan.run_name:
        return None
    uri = storage.join(context.store_uri, "runs", plan.run_name, PROGRESS_NAME)
    return _speed(read_progress_json(uri), "its own last steps")


def _speed_of_versions(plan: StagePlan, context: PlanContext) -> tuple[float, int, str] | None:
    model, work = keys.model_name(plan.spec.recipe, plan.spec.stage), work_digest(plan.spec)
    for version in reversed(versions.all_versions(context.server, model)):
        known_from = f"version {version.version} of {model}"
        found = _speed(json_tag(version, TAG_METRICS), known_from)
        if found is not None and version.tags.get(TAG_WORK) == work:
            return found
    return None


def _speed(measured: dict[str, Any], known_from: str) -> tuple[float, int, str] | None:
    """Images a second, on so many workers; None unless both were measured."""
    rate, workers = measured.get("images_per_second"), measured.get("num_workers")
    if not isinstance(rate, int | float) or not isinstance(workers, int | float):
        return None
    return (float(rate), int(workers), known_from) if rate > 0 and workers >= 1 else None
