"""One training stage from plan to `ready`: lease, run, train, gate, publish, score, hand over.

Each step leaves something that the next try finds: checkpoints, ``published.json``, the
registered version, the alias, the tag ``handoff``. A driver killed anywhere and started again with
the same inputs goes on from there. Nothing that others see is written without the lease.
"""

from __future__ import annotations

import getpass
import math
import os
import socket
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from infra import storage
from infra.cluster import ClusterConfig
from infra.digests import canonical_json
from infra.errors import UserError
from infra.lease import Lease, LeaseHeld
from infra.storage import ObjectMissing
from infra.tracking_server import TrackedRun, TrackingServer
from training import handoff, publish, stage_run, waste
from training.handoff import Outcome
from training.parts import with_whole_paths
from training.plan import PUBLISHED_NAME, Pin, PlanContext, StagePlan, published_uri
from training.progress import OnProgress, following_progress, read_progress_json
from training.publish import PublishedCheckpoint
from training.stop import ask_to_stop
from training.versions import RegisteredVersion

if TYPE_CHECKING:
    from training.launch import Trained

Evaluate = Callable[[str], Mapping[str, float]]  # of the published folder at an address
WorkerFunction = Callable[[dict[str, Any]], object]

EXPORT_FOLDER = "export"


class GateFailed(UserError):
    """The stage was trained and did not pass; it stays a candidate."""


@dataclass(frozen=True)
class DriverContext:
    """Where a stage runs and is recorded. ``parent_run_id`` is the MLflow run of the pipeline."""

    plan: PlanContext
    cluster: ClusterConfig
    experiment: str
    parent_run_id: str | None = None
    owner: str = field(default_factory=lambda: default_owner())

    @property
    def server(self) -> TrackingServer:
        """The MLflow server."""
        return self.plan.server

    @property
    def store_uri(self) -> str:
        """Where runs and models lie."""
        return self.plan.store_uri


@dataclass(frozen=True)
class StageResult:
    """A finished stage. ``seconds`` says how long each part took."""

    stage: str
    key: str
    run_id: str
    version: RegisteredVersion
    pin: Pin
    step: int
    metrics: Mapping[str, float]
    scores: Mapping[str, float]
    seconds: Mapping[str, float]
    waste: Mapping[str, Mapping[str, float]]


def default_owner() -> str:
    """Who holds a lease, for whoever is refused: user, host and process."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):
        user = "somebody"
    return f"{user}@{socket.gethostname()}:{os.getpid()}"


def run_stage(
    plan: StagePlan,
    context: DriverContext,
    *,
    on_progress: OnProgress | None = None,
    evaluate: Evaluate | None = None,
    function: WorkerFunction | None = None,
) -> StageResult:
    """Do what ``plan`` says is left of a stage, up to the alias `ready`.

    Needs a connected Ray (``infra.sessions.ray_session``) when ``plan.needs_training``.
    ``evaluate`` scores the published folder; ``function`` is what runs in each worker
    (``training.worker.train_worker``). Raises ``UserError`` in one line: a failed training, a
    checkpoint that does not pass (``GateFailed``), somebody else at work (``LeaseHeld``).
    """
    if plan.key is None or plan.run_name is None:
        raise ValueError(f"stage {plan.spec.stage} is planned without its inputs; plan it again")
    run_uri = storage.join(context.store_uri, "runs", plan.run_name)
    clock, stopper = _Clock(), _Stopper()
    lease_uri = storage.join(run_uri, "lease.json")
    with Lease(lease_uri, context.owner, on_lost=stopper.stop) as lease:
        run = stage_run.open_run(
            plan, context.server, context.experiment, lease.attempt, context.parent_run_id
        )
        clock.lap("open")
        with stage_run.closing_run(context.server, run):
            stage = _Stage(plan, context, run, lease, clock, stopper, run_uri)
            published, step, metrics = stage.train_and_publish(on_progress, function)
            scores = stage.score(published, evaluate)
            problems = tuple(plan.spec.bounds.problems({**metrics, **scores}))
            outcome = Outcome(
                published, step, metrics, scores, context.plan.evaluation_key, problems
            )
            version = stage.hand_over(outcome)
    if problems:
        raise GateFailed(
            f"stage {plan.spec.stage} is trained (version {version.version} of {version.name}) "
            f"and did not pass: {'; '.join(problems)}; train it longer, or change the bound and "
            "run the same command again"
        )
    return StageResult(
        stage=plan.spec.stage,
        key=plan.key,
        run_id=run.run_id,
        version=version,
        pin=handoff.pin_of(plan, version),
        step=step,
        metrics=metrics,
        scores=scores,
        seconds=clock.seconds,
        waste=publish.read_provenance(published.uri).get("waste", {}),
    )


class _Clock:
    """Seconds since the last lap, by name."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._at = time.monotonic()

    def lap(self, name: str) -> None:
        now = time.monotonic()
        self.seconds[name] = round(self.seconds.get(name, 0.0) + now - self._at, 3)
        self._at = now


class _Stopper:
    """Ends a running training when its lease is lost: two may not write the same checkpoints."""

    def __init__(self) -> None:
        self._stop: Callable[[], None] | None = None

    def started(self, stop: Callable[[], None]) -> None:
        self._stop = stop

    def stop(self) -> None:
        if self._stop is not None:
            self._stop()


# --- the steps -----------------------------------------------------------------------------------


@dataclass
class _Stage:
    """What the steps of one stage share."""

    plan: StagePlan
    context: DriverContext
    run: TrackedRun
    lease: Lease
    clock: _Clock
    stopper: _Stopper
    run_uri: str

    def train_and_publish(
        self, on_progress: OnProgress | None, function: WorkerFunction | None
    ) -> tuple[PublishedCheckpoint, int, dict[str, float]]:
        """The published checkpoint, its step and its training metrics."""
        uri = self._already_published()
        if uri is None:
            trained = self._train(on_progress, function)
            self.clock.lap("train")
            uri = self._publish(trained)
        facts = publish.read_provenance(uri)
        self.clock.lap("publish")
        return publish.read_listing(uri), int(facts["step"]), dict(facts["metrics"])

    def _already_published(self) -> str | None:
        """Looked up again, under the lease: an earlier attempt may have come further."""
        uri = self.plan.published or published_uri(self.context.store_uri, self.plan.run_name or "")
        if uri is None:
            return None
        problems = publish.verify_checkpoint(uri)
        if problems:
            raise UserError(publish.damage_message(uri, problems))
        return uri

    def _train(self, on_progress: OnProgress | None, function: WorkerFunction | None) -> Trained:
        from training import launch

        if function is None:
            from training.worker import train_worker

            function = train_worker
        cluster, spec = self.context.cluster, self.plan.spec
        progress_uri = storage.join(self.run_uri, "progress.json")
        job = worker_job(self.plan, self.context, self.run, self.lease.attempt, progress_uri)
        how = launch.Launch(
            name=self.plan.run_name or "",
            store_uri=self.context.store_uri,
            num_workers=spec.num_workers,
            cpus_per_worker=cluster.cpus_per_worker,
            use_gpu=cluster.use_gpu,
            is_local=cluster.ray_address is None,
        )
        with following_progress(progress_uri, on_progress):
            try:
                return launch.train(job, how, function, self.stopper.started)
            except launch.TrainingFailed:
                self.lease.check()
                raise
            except KeyboardInterrupt:
                self._save_and_stop()
                raise

    def _save_and_stop(self) -> None:
        """Let the workers, which nobody interrupted, save their last step; a second interrupt
        ends the wait. Those that have not begun have nothing to save."""
        raw = read_progress_json(storage.join(self.run_uri, "progress.json"))
        if raw.get("attempt") == self.lease.attempt and raw.get("step", 0) > 0:
            ask_to_stop(self.run_uri, self.lease.attempt)

    def _publish(self, trained: Trained) -> str:
        """Gate the exported model, then make it visible, then remember where."""
        spec, store_uri = self.plan.spec, self.context.store_uri
        with tempfile.TemporaryDirectory(prefix="atelier-gate-") as scratch:
            folder = publish.fetch_export(trained.checkpoint_uri, Path(scratch))
            self.clock.lap("fetch")
            self._gate(folder)
            self.clock.lap("gate")
            metrics = _finite(trained.metrics)
            step = int(metrics.pop("step", spec.steps))
            facts = self._facts(trained.checkpoint_uri)
            self.lease.check()
            published = publish.publish_folder(
                folder,
                store_uri,
                spec.stage,
                {**handoff.provenance(self.plan, self.run, step, metrics), **facts},
                before_listing=self.lease.check,
            )
        marker = {"stage_key": self.plan.key, "uri": published.uri, "sha256": published.sha256}
        storage.write_json(storage.join(self.run_uri, PUBLISHED_NAME), marker)
        return published.uri

    def _facts(self, checkpoint_uri: str) -> dict[str, Any]:
        """What the weights began with, how often, what was passed by, and what it all cost."""
        try:
            state = storage.read_json(storage.join(checkpoint_uri, "state.json"))
        except ObjectMissing:
            state = {}
        starts = waste.read_starts(self.run_uri)
        events = (state.get("guard") or {}).get("events", [])
        lost = waste.waste_by_cause(starts, events)
        if lost:
            tags = {"waste": canonical_json(lost).decode()}
            self.context.server.log_batch(self.run.run_id, tags=tags)
        return {
            "init": state.get("init", {}),
            "starts": [asdict(each) for each in starts],
            "bad_steps": events,
            "waste": lost,
            "coverage": state.get("coverage", {}),
        }

    def _gate(self, folder: Path) -> None:
        from training.gate import gate

        spec = self.plan.spec
        result = gate(folder, next_stage=spec.next_stage, has_transformer=spec.kind != "tokenizer")
        if not result.passed:
            more = f" (and {len(result.problems) - 1} more)" if len(result.problems) > 1 else ""
            raise GateFailed(
                f"the checkpoint of stage {spec.stage} was refused and not published: "
                f"{result.problems[0]}{more}; delete {self.run_uri} to train it again"
            )

    def score(self, published: PublishedCheckpoint, evaluate: Evaluate | None) -> dict[str, float]:
        """The scores of the published model; none for the tokenizer, which cannot paint."""
        if evaluate is None or self.plan.spec.kind == "tokenizer":
            return {}
        scores = {name: float(value) for name, value in evaluate(published.uri).items()}
        self.clock.lap("score")
        return scores

    def hand_over(self, outcome: Outcome) -> RegisteredVersion:
        """Register, and make it `ready` when it passed."""
        self.lease.check()
        server = self.context.server
        version = handoff.register(server, self.plan, self.run, outcome)
        self.lease.check()
        version = handoff.hand_over(
            server,
            self.context.store_uri,
            version,
            self.run,
            passed=not outcome.problems,
            why=f"{self.plan.run_name}, attempt {self.lease.attempt}",
        )
        if outcome.problems:
            cause = "; ".join(outcome.problems)
            stage_run.end_run(server, self.run, "FAILED", f"did not pass the gate: {cause}", cause)
        self.clock.lap("register")
        return version


def _finite(metrics: Mapping[str, Any]) -> dict[str, float]:
    """The numbers among a run's metrics: Ray keeps NaN and infinity as null, and JSON has none."""
    numbers = {name: value for name, value in metrics.items() if isinstance(value, int | float)}
    return {name: float(value) for name, value in numbers.items() if math.isfinite(value)}


def worker_job(
    plan: StagePlan,
    context: DriverContext,
    run: TrackedRun,
    attempt: int,
    progress_uri: str,
) -> dict[str, Any]:
    """What a worker is told, as JSON values."""
    parent, dataset = plan.parent, plan.dataset
    return {
        "recipe": plan.spec.recipe,
        "stage": plan.spec.stage,
        "kind": plan.spec.kind,
        "stage_key": plan.key,
        "run_name": plan.run_name,
        "attempt": attempt,
        "configs": with_whole_paths(plan.spec.configs),
        "store_uri": context.store_uri,
        "run_uri": storage.join(context.store_uri, "runs", plan.run_name or ""),
        "resume_step": plan.step if plan.decision == "RESUME" else None,
        "manifest_uri": None if dataset is None else dataset.manifest_uri,
        "manifest_sha256": None if dataset is None else dataset.version,
        "mixed_in": [asdict(pin) for pin in plan.mixed_in],
        "init_uri": None if parent is None else parent.uri,
        "init_sha256": None if parent is None else parent.sha256,
        "parts": {part.whole_address: part.sha256 for part in plan.parts},
        "progress_uri": progress_uri,
        "tracking_uri": context.server.uri,
        "mlflow_run_id": run.run_id,
    }


__all__ = [
    "DriverContext",
    "GateFailed",
    "LeaseHeld",
    "StageResult",
    "run_stage",
]
