"""A stage's run in MLflow: opened with all it depends on, ended by what became of the stage."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from infra.errors import UserError
from infra.lease import LeaseLost
from infra.tracking_server import DatasetInput, TrackedRun, TrackingServer
from training import handoff
from training.plan import StagePlan

DIGEST_CHARACTERS = 32  # of the 36 that MLflow keeps of a dataset's digest
PARAMS_PER_CALL = 100


def open_run(
    plan: StagePlan,
    server: TrackingServer,
    experiment: str,
    attempt: int,
    parent_run_id: str | None,
) -> TrackedRun:
    """The one run of this stage key, RUNNING, with its tags, params and inputs."""
    experiment_id = server.experiment_id(experiment)
    identity = {"stage_key": plan.key or "", "recipe": plan.spec.recipe}
    tags = handoff.run_tags(plan, attempt, parent_run_id)
    run = server.find_or_create_run(experiment_id, plan.run_name or "", identity, tags)
    if run.status != "RUNNING":
        server.update_run(run.run_id, "RUNNING")
    server.log_batch(run.run_id, tags=tags)
    params = list(handoff.flat_params(plan.spec.semantic).items())
    for start in range(0, len(params), PARAMS_PER_CALL):
        server.log_batch(run.run_id, params=dict(params[start : start + PARAMS_PER_CALL]))
    datasets = [
        DatasetInput(
            name=pin.name,
            digest=pin.version[:DIGEST_CHARACTERS],
            source_uri=pin.manifest_uri,
            tags={"sha256": pin.version, "mlflow.data.context": "training"},
        )
        for pin in plan.datasets
    ]
    parent = plan.parent
    models = [parent.model_id] if parent is not None and parent.model_id else []
    server.log_inputs(run.run_id, datasets, models)
    return run


@contextmanager
def closing_run(server: TrackingServer, run: TrackedRun) -> Iterator[None]:
    """End the run as FAILED or KILLED when its stage does, whatever it was, and keep the cause."""
    try:
        yield
    except LeaseLost:
        raise  # the run belongs to the attempt that took over
    except KeyboardInterrupt:
        end_run(server, run, "KILLED", "interrupted from the keyboard", "")
        raise
    except Exception as error:
        detail = getattr(error, "detail", "") or repr(error)
        end_run(server, run, "FAILED", str(error), detail)
        raise


def end_run(server: TrackingServer, run: TrackedRun, status: str, cause: str, detail: str) -> None:
    """Best effort: the cause itself is on its way to the person."""
    try:
        server.log_batch(run.run_id, tags={"failure": cause[:5000]}, patience_seconds=0)
        server.put_artifact(run, "failure.txt", detail.encode(), patience_seconds=0)
        server.update_run(run.run_id, status)
    except UserError:
        return


def record_skip(server: TrackingServer, parent_run_id: str, plan: StagePlan) -> None:
    """Say on the pipeline's run which earlier run and version a skipped stage reuses."""
    existing = plan.existing
    if existing is not None:
        reused = f"run {existing.run_id}, version {existing.version}, {existing.sha256}"
        server.log_batch(parent_run_id, tags={f"skipped.{plan.spec.stage}": reused})
