"""Running a worker function under Ray Train: start, retries, errors in one line.

Ray Train's defaults start four helper processes and torch in its controller for every run: 19
CPU seconds before the first line of training. This keeps the worker, the controller and the one
helper that reports need: 9 CPU seconds. On a shared cluster the helpers that clean up after a
dead controller and watch for preemption stay.

Retries: a lost worker, storage that was away and unknown errors are tried again from the last
checkpoint, ``MAX_FAILURES`` times without a newer one, or another shard's tokens, in between; a
``UserError`` (a diverged loss, a bad configuration) is final at once. Checkpoints are the run's own
(``training.checkpoint_store``); Ray keeps none.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import ray
import ray.exceptions
from ray._private.ray_logging import stdout_deduplicator
from ray.train.v2._internal.callbacks import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import (
    PlacementGroupCleanerCallback,
)
from ray.train.v2._internal.exceptions import WorkerHealthCheckTimeoutError
from ray.train.v2._internal.execution.failure_handling import (
    DefaultFailurePolicy,
    FailureDecision,
)
from ray.train.v2.api.config import (
    FailureConfig,
    RunConfig,
    ScalingConfig,
)
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer
from ray.train.v2.api.exceptions import ControllerError, TrainingFailedError, WorkerGroupError

from infra import storage
from infra.environment import applied, credentials
from infra.errors import UserError
from infra.run_filesystem import run_filesystem
from infra.storage import StorageUnavailable
from infra.tracking_server import TrackingUnavailable
from training.checkpoint_store import CheckpointStore
from training.group import TorchGroupConfig
from training.progress import read_progress
from training.room import NO_ROOM_ERRORS, check_room, why_none_came
from training.suspects import suspect_of
from training.waste import PROGRESS_NAME

MAX_FAILURES = 3
MAX_CONTROLLER_FAILURES = 3
MAX_PREEMPTIONS = 20
POLL_SECONDS = 0.25  # Ray's default of 2 s delays every report and the end by as much
TRANSIENT_ERRORS = (StorageUnavailable, TrackingUnavailable)
# A worker that does not even say so is frozen, and is killed after this long; Ray's ten minutes of
# a GPU that waits are too many. Training itself leaves the thread that answers alone.
FROZEN_SECONDS = 120
LOCAL_SETTINGS = {
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    "RAY_TRAIN_METRICS_ENABLED": "0",
}
# How long a cluster has to bring the machines, each of ``MAX_CONTROLLER_FAILURES`` + 1 times: Ray's
# minute is less than a new machine takes.
CLUSTER_SETTINGS = {"RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "600"}

WorkerFunction = Callable[[dict[str, Any]], object]
OnStart = Callable[[Callable[[], None]], None]


@dataclass(frozen=True)
class Launch:
    """What Ray needs to know: nothing here changes the result."""

    name: str
    store_uri: str
    num_workers: int = 1
    cpus_per_worker: int = 2
    use_gpu: bool = False
    is_local: bool = True


@dataclass(frozen=True)
class Trained:
    """The run's last checkpoint, and what was measured."""

    checkpoint_uri: str
    metrics: Mapping[str, float]


class TrainingFailed(UserError):
    """Training ended without a result; ``detail`` is the worker's own account, for a file."""

    def __init__(self, message: str, detail: str = "") -> None:
        super().__init__(message)
        self.detail = detail


# --- what runs in Ray's controller ---------------------------------------------------------------


class RetryWhileItAdvances(DefaultFailurePolicy):
    """Ray's retry budgets, anew after every checkpoint, and every shard that was encoded before
    the first one; a user's mistake is not repeated."""

    def __init__(
        self, failure_config: FailureConfig, run_uri: str, environment: Mapping[str, str]
    ) -> None:
        super().__init__(failure_config)
        self._run_uri, self._environment = run_uri, environment
        self._newest = (-1, -1)
        self._shards_encoded = 0

    def make_decision(self, training_failed_error: TrainingFailedError) -> FailureDecision:
        """RAISE for a ``UserError`` in any worker, else what Ray decides."""
        if isinstance(training_failed_error, WorkerGroupError):
            failures = training_failed_error.worker_failures.values()
            if any(is_final(failure) for failure in failures):
                return FailureDecision.RAISE
        if self._has_advanced():
            self._worker_group_failures = self._preemption_failures = 0
        return super().make_decision(training_failed_error)

    def _has_advanced(self) -> bool:
        os.environ.update(self._environment)
        try:
            found = CheckpointStore(self._run_uri).complete()
        except UserError:
            return False
        newest = (found[0].generation, found[0].step) if found else (-1, -1)
        progress = read_progress(storage.join(self._run_uri, PROGRESS_NAME))
        shards_encoded = 0 if progress is None else progress.shards_encoded
        has_advanced = newest > self._newest or shards_encoded > self._shards_encoded
        self._newest = newest
        self._shards_encoded = max(shards_encoded, self._shards_encoded)
        return has_advanced


def is_final(failure: BaseException) -> bool:
    """Whether trying again would fail in the same way."""
    return isinstance(failure, UserError) and not isinstance(failure, TRANSIENT_ERRORS)


class StageTrainer(DataParallelTrainer):
    """Ray's trainer with fewer helpers, final user errors, and Ctrl-C left to the driver."""

    def __init__(
        self,
        *arguments: Any,
        run_uri: str,
        is_local: bool,
        on_start: OnStart | None,
        **options: Any,
    ) -> None:
        self._run_uri = run_uri
        self._is_local = is_local
        self._on_start = on_start
        # What is started here has this process's environment already.
        self._environment = {} if is_local else credentials(os.environ)
        group = TorchGroupConfig(self._environment)
        super().__init__(*arguments, backend_config=group, **options)

    def _create_default_callbacks(self) -> list[Any]:
        unused: tuple[type, ...] = (DatasetsCallback,)
        if self._is_local:  # the cluster ends with the driver, and so does what is on it
            unused = (*unused, PlacementGroupCleanerCallback)
        defaults = super()._create_default_callbacks()
        return [each for each in defaults if not isinstance(each, unused)]

    def _initialize_and_run_controller(self, **options: Any) -> Any:
        config: Any = self.run_config.failure_config
        options["failure_policy"] = RetryWhileItAdvances(config, self._run_uri, self._environment)
        return super()._initialize_and_run_controller(**options)

    def _register_sigint_handler(self, controller: Any) -> None:
        """No handler: Ray's would leave with exit code 0."""
        if self._on_start is not None:
            self._on_start(lambda: ray.kill(controller))


# --- what the driver calls -----------------------------------------------------------------------


def train(
    job: Mapping[str, Any],
    launch: Launch,
    function: WorkerFunction,
    on_start: OnStart | None = None,
) -> Trained:
    """Run ``function(job)`` in every worker until it ends well; returns the last checkpoint.

    The same ``launch.name`` continues the same run from its last checkpoint. In a main thread,
    ``on_start`` is given a function that stops everything at once. Raises ``TrainingFailed`` with
    the cause in one line.
    """
    check_room(launch)
    runs_uri = storage.join(launch.store_uri, "runs")
    filesystem, path = run_filesystem(runs_uri)
    settings = {
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": str(POLL_SECONDS),
        "RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S": str(FROZEN_SECONDS),
    }
    settings |= LOCAL_SETTINGS if launch.is_local else CLUSTER_SETTINGS
    unset = {name: value for name, value in settings.items() if name not in os.environ}
    # Ray tells of a lost worker on stdout, ten lines each time; `explain` does it in one.
    stdout_deduplicator.skip_re = re.compile("")
    with applied(unset):
        trainer = StageTrainer(
            function,
            run_uri=storage.join(runs_uri, launch.name),
            is_local=launch.is_local,
            on_start=on_start,
            train_loop_config=dict(job),
            scaling_config=ScalingConfig(
                num_workers=launch.num_workers,
                use_gpu=launch.use_gpu,
                resources_per_worker={"CPU": launch.cpus_per_worker},
            ),
            run_config=RunConfig(
                name=launch.name,
                storage_path=path,
                storage_filesystem=filesystem,
                failure_config=FailureConfig(
                    max_failures=MAX_FAILURES,
                    controller_failure_limit=MAX_CONTROLLER_FAILURES,
                    max_preemption_failures=MAX_PREEMPTIONS,
                ),
            ),
        )
        try:
            trainer.fit()
        except (TrainingFailedError, ray.exceptions.RayError) as error:
            raise explain(error, launch) from error
    found = CheckpointStore(storage.join(runs_uri, launch.name)).result()
    if found is None:
        raise TrainingFailed(f"training {launch.name} ended without a result; this is a bug")
    return Trained(*found)


def explain(error: BaseException, launch: Launch) -> TrainingFailed:
    """The one line a person needs, from what Ray raises."""
    again = "run the same command again to continue from the last checkpoint"
    if isinstance(error, WorkerGroupError) and error.worker_failures:
        rank, failure = _root_failure(error.worker_failures)
        if isinstance(failure, UserError):
            return TrainingFailed(f"training {launch.name} stopped: {failure}", str(error))
        if _is_lost_worker(failure):
            return TrainingFailed(
                f"training {launch.name} lost a worker {MAX_FAILURES + 1} times in a row without a "
                f"new checkpoint (killed, frozen, or out of memory){_where_lost(launch, rank)}; "
                f"lower max_microbatch_size or free memory, then {again}",
                str(error),
            )
        if _is_out_of_memory(failure):
            return TrainingFailed(
                f"training {launch.name} ran out of memory in worker {rank}: lower "
                "max_microbatch_size, set gradient_checkpointing or strategy: fsdp, then "
                f"{again}",
                str(error),
            )
        return TrainingFailed(
            f"training {launch.name} failed in worker {rank}: {type(failure).__name__}: {failure}; "
            "the trace is in the run's failure.txt",
            str(error),
        )
    cause = error.controller_failure if isinstance(error, ControllerError) else error
    text = _last_words(cause)
    if type(cause).__name__ in NO_ROOM_ERRORS:
        return TrainingFailed(
            f"training {launch.name} could not begin: {why_none_came(launch)}", str(error)
        )
    return TrainingFailed(
        f"training {launch.name} failed outside its workers: {type(cause).__name__}: "
        f"{text[:300]}; {again}",
        str(error),
    )


def _where_lost(launch: Launch, rank: int) -> str:
    """The batch that did it, as far as the workers wrote it down."""
    run_uri = storage.join(launch.store_uri, "runs", launch.name)
    found = suspect_of(run_uri, rank)
    if found is None:
        return ""
    if found.times == 1:
        return f", the last one in {found}"
    return f", the last {found.times} in {found}: if it is always that one, take these samples away"


def _last_words(cause: BaseException) -> str:
    """The cause's own line: what Ray quotes from another process ends with it."""
    lines = [line.strip() for line in str(cause).splitlines() if line.strip()]
    return lines[-1] if lines else ""


def _root_failure(failures: Mapping[int, BaseException]) -> tuple[int, BaseException]:
    """The telling failure: a worker's own error before the collateral of a lost neighbour."""
    ranked = sorted(failures.items(), key=lambda item: (_is_lost_worker(item[1]), item[0]))
    final = [item for item in ranked if is_final(item[1])]
    return (final or ranked)[0]


def _is_out_of_memory(failure: BaseException) -> bool:
    """Of a GPU, or of the machine as Python and torch tell it."""
    text = f"{type(failure).__name__}: {failure}".lower()
    return "outofmemory" in text or "memoryerror" in text or "can't allocate memory" in text


def _is_lost_worker(failure: BaseException) -> bool:
    """Dead, or frozen."""
    inner = getattr(failure, "health_check_failure", failure)
    return isinstance(inner, ray.exceptions.RayActorError | WorkerHealthCheckTimeoutError)
