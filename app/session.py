"""What the steps of a run share: the record they write, and engines that start when needed."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from app.doctor import free_bytes
from app.place import Place, connect
from app.recipe import Recipe
from app.report import BEGAN, step_line
from app.status import DONE, StatusFile, StepStatus
from app.verb import Output, stop_on_terminate
from infra.errors import UserError
from infra.progress import Progress, progress
from infra.tracking_server import TrackedRun, TrackingServer

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

    from pipelines.score import Bars

Result = TypeVar("Result")
NEEDED_BYTES = 2 << 30  # what a laptop-sized run leaves, with room for its temporary files
REPORT_SECONDS = 1.0


class Session:
    """A run at work. Spark, Ray and the world's server start at first use and end with it."""

    def __init__(self, recipe: Recipe, home: Path, file: StatusFile, out: Output) -> None:
        self.recipe = recipe
        self.home = home
        self.file = file
        self.out = out
        self.world_folder: Path | None = None
        self._curation = ExitStack()
        self._training = ExitStack()
        self._spark: SparkSession | None = None
        self._connect_to: dict[str, str] | None = None
        self._has_ray = False
        self._reported_at = 0.0
        self._began: dict[str, tuple[float, int]] = {}
        self._tracked: TrackedRun | None = None

    # --- the record ------------------------------------------------------------------------------

    @contextmanager
    def running(self, name: str) -> Iterator[StepStatus]:
        """A step at work; its line is printed when it is done."""
        with self.file.running(name) as step:
            yield step
        if step.state == DONE:
            self.out.say(step_line(step))

    def decide(self, step: StepStatus, decision: str, reason: str, key: str | None) -> None:
        """Record a step's decision before anything is done."""
        step.decision, step.reason, step.key = decision, reason, key
        self.file.save()
        if decision != "SKIP":
            self._check_room()
            self.out.say(f">>  {step.name:<16}  {decision:<6}  {reason}")

    def report(
        self, step: StepStatus, done: int, total: int | None, unit: str, **more: object
    ) -> None:
        """Note how far a step is, at most once a second."""
        now = time.monotonic()
        if now - self._reported_at < REPORT_SECONDS:
            return
        self._reported_at = now
        began_at, began_done = self._began.setdefault(f"{step.name} {unit} {total}", (now, done))
        if total and done > began_done and more.get("eta_seconds") is None:
            more["eta_seconds"] = (total - done) * (now - began_at) / (done - began_done)
        step.progress = {"done": done, "total": total, "unit": unit, **more}
        self.file.save()

    def note(self, step: StepStatus, notes: Iterable[tuple[str, str]]) -> None:
        """Keep what happened to a stage, and say what is new and not how it began."""
        for name, text in notes:
            known = step.notes or {}
            if known.get(name) == text:
                continue
            step.notes = {**known, name: text}
            self.file.save()
            if name != BEGAN:
                self.out.say(f"    {step.name}: {name}: {text}")

    def bars(self, step: StepStatus) -> Bars:
        """Bars for the parts of a step; how far they are is noted in its record too."""

        @contextmanager
        def bar(description: str, total: int, unit: str) -> Iterator[Progress]:
            with progress(description, total, unit) as shown:
                yield _Noted(shown, lambda done: self.report(step, done, total, unit))

        return bar

    def _check_room(self) -> None:
        free = free_bytes(self.home)
        if free < NEEDED_BYTES:
            raise UserError(
                expected=f"{NEEDED_BYTES / 2**30:.0f} GiB free for {self.home}",
                got=f"{free / 2**30:.1f} GiB",
                remedy="free some space, or set ATELIER_HOME to a folder on another disk",
            )

    # --- the places ------------------------------------------------------------------------------

    @cached_property
    def place(self) -> Place:
        """The store and MLflow; started when they are this machine's own."""
        place = connect(self.recipe.services, self.home, self.out.say)
        self.file.status.store_uri = place.store_uri
        self.file.status.mlflow_uri = place.tracking_uri
        self.file.save()
        return place

    @cached_property
    def server(self) -> TrackingServer:
        """MLflow."""
        return self.place.server

    @cached_property
    def evaluation_key(self) -> str:
        """``app.steps.evaluation_key``; judges are read for it, once a run and not once a stage."""
        from app.steps import evaluation_key

        return evaluation_key(self.recipe)

    @cached_property
    def tracked_run_id(self) -> str:
        """The MLflow run that stands for this run; the stages' runs are its children."""
        status = self.file.status
        experiment_id = self.server.experiment_id(self.recipe.name)
        tags = {
            "atelier.command": status.command,
            "atelier.run": status.run_id,
            "recipe_fingerprint": status.recipe_fingerprint,
        }
        run = self.server.create_run(experiment_id, status.run_id, tags)
        self._tracked = run
        status.mlflow_run_id = run.run_id
        status.mlflow_run_url = (
            f"{self.place.tracking_uri}/#/experiments/{experiment_id}/runs/{run.run_id}"
        )
        self.file.save()
        self.put_artifact("recipe.json", (self.file.folder / "recipe.json").read_bytes())
        return run.run_id

    def put_artifact(self, name: str, data: bytes) -> None:
        """Keep a small file beside the run in MLflow."""
        if self._tracked is not None:
            self.server.put_artifact(self._tracked, name, data)

    def log_scores(self, scores: Mapping[str, float], stage: str) -> None:
        """A stage's scores on the run's own page."""
        at_ms = time.time_ns() // 1_000_000
        points = [
            {"key": f"{stage}.{name}", "value": value, "timestamp": at_ms, "step": 0}
            for name, value in scores.items()
        ]
        self.server.log_batch(self.tracked_run_id, metrics=points)

    def end_tracked(self, state: str) -> None:
        """Close the run's page in MLflow as FINISHED, FAILED or KILLED, as far as it answers."""
        if self._tracked is None:
            return
        try:
            self.server.call(
                "POST",
                "mlflow/runs/update",
                {"run_id": self._tracked.run_id, "status": state, "end_time": _now_ms()},
                patience_seconds=0,
            )
        except UserError as error:
            self.out.say(f"the run's page in MLflow stays open: {error}")

    # --- the engines -----------------------------------------------------------------------------

    def spark(self) -> SparkSession:
        """The Spark session of all datasets."""
        if self._spark is None:
            from infra.sessions import spark_session, stop_spark

            spark = spark_session("curation", self.recipe.cluster, self.place.environment)
            self._curation.callback(stop_spark, spark)
            self._spark = spark
        return self._spark

    def connect_to(self) -> dict[str, str]:
        """Where the painted world's hosts are found; starts its web server."""
        if self._connect_to is None:
            from app.world import serving

            if self.world_folder is None:
                raise RuntimeError("the world is served before it is made")
            self._connect_to = self._curation.enter_context(serving(self.world_folder))
        return self._connect_to

    def end_curation(self) -> None:
        """Stop Spark and the web server: training wants their memory."""
        self._curation.close()
        self._spark = self._connect_to = None

    def need_ray(self) -> None:
        """Have Ray running."""
        if not self._has_ray:
            from infra.sessions import ray_session

            self._training.enter_context(ray_session(self.recipe.cluster, self.place.environment))
            stop_on_terminate()  # Ray puts a handler of its own in its place
            self._has_ray = True

    def painting(self, what: str, function: Callable[..., Result], *arguments: Any) -> Result:
        """``function(*arguments)``, which paints: here, or on one of the cluster's GPUs."""
        if not self.recipe.cluster.use_gpu:
            return function(*arguments)
        from infra.ray_task import call_in_ray

        self.need_ray()
        self.out.say(f"{what} on a GPU")
        environment = self.place.environment
        return call_in_ray(function, *arguments, environment=environment, num_gpus=1)

    def end_training(self) -> None:
        """Stop Ray."""
        self._training.close()
        self._has_ray = False

    def close(self) -> None:
        """End every engine."""
        try:
            self.end_curation()
        finally:
            self.end_training()


class _Noted:
    """A bar whose updates someone else hears of too."""

    def __init__(self, bar: Progress, note: Callable[[int], None]) -> None:
        self._bar, self._note, self._done = bar, note, 0

    def update(self, done: int, total: int | None = None) -> None:
        self._done = done
        self._bar.update(done, total)
        self._note(done)

    def advance(self, num_done: int = 1) -> None:
        self.update(self._done + num_done)


def _now_ms() -> int:
    return time.time_ns() // 1_000_000
