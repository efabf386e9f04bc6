"""A training stage that takes a second: run by tests in their process, and as a script to kill.

``python toy_stage.py TRACKING_URI STORE_URI RECIPE EXPORTED LOG STEP_SECONDS``
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from infra.cluster import ClusterConfig
from infra.tracking_server import TrackingServer
from training import keys
from training.driver import DriverContext, StageResult, run_stage
from training.plan import PlanContext, StagePlan, plan_stage
from training.progress import OnProgress
from training.stages import StageSpec

STEPS = 5
CLUSTER = ClusterConfig(cpus_per_worker=1)


def toy_plan(tracking_uri: str, store_uri: str, recipe: str, name: str = "toy") -> StagePlan:
    """A tokenizer stage without data; ``name`` makes another key."""
    keys.result_code_digest = lambda: "c" * 64
    spec = StageSpec(
        recipe=recipe,
        stage="tokenizer",
        kind="tokenizer",
        parent=None,
        dataset_name=None,
        init_policy="fresh",
        semantic={"name": name},
        configs={},
        steps=STEPS,
        num_workers=1,
    )
    return plan_stage(spec, PlanContext(TrackingServer(tracking_uri), store_uri, {}))


def toy_context(tracking_uri: str, store_uri: str) -> DriverContext:
    """Where it runs."""
    plan_context = PlanContext(TrackingServer(tracking_uri), store_uri, {})
    return DriverContext(plan_context, CLUSTER, "toy stages")


def toy_worker(
    exported: str, log: str, step_seconds: float = 0.0, trouble: str = ""
) -> Callable[[dict[str, Any]], None]:
    """A worker function that travels by value: it may import nothing of the tests."""

    def work(job: dict[str, Any]) -> None:
        import os
        import shutil
        import signal
        import tempfile
        import time
        from dataclasses import asdict
        from pathlib import Path

        from infra import storage
        from infra.errors import UserError
        from infra.tracking import RestTracker
        from training.checkpoint_store import CheckpointStore
        from training.publish import LISTING_NAME, describe_folder

        steps = 5
        store = CheckpointStore(job["run_uri"])
        complete = store.complete()
        step = complete[0].step if complete else 0
        with open(log, "a") as lines:
            lines.write(f"{os.getpid()} {step} {job['attempt']} {time.time()}\n")
        tracker = RestTracker(job["tracking_uri"], job["mlflow_run_id"])
        while step < steps:
            time.sleep(step_seconds)
            if trouble == "nan" and step == 2:
                raise UserError("the loss at step 2 is NaN; lower optimizer.learning_rate")
            if trouble == "bug" and step == 2:
                raise ZeroDivisionError("division by zero")
            step += 1
            tracker.log_metrics({"loss": 1.0 / step}, step)
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder)
                (path / "step").write_text(str(step))
                if step == steps:
                    shutil.copytree(exported, path / "export")
                    result = {"step": float(step), "final_loss": 1.0 / step}
                    storage.write_json((path / "result.json").as_uri(), result)
                files = [asdict(file) for file in describe_folder(path)]
                storage.write_json((path / LISTING_NAME).as_uri(), {"files": files})
                progress = {"step": step, "steps": steps, "loss": 1.0 / step}
                storage.write_json(job["progress_uri"], progress)
                tracker.flush()  # what a checkpoint covers is never sent again
                store.put(path, 0, step)
            if trouble == "die" and step == 2:
                os.kill(os.getpid(), signal.SIGKILL)
        tracker.close()
        with open(log, "a") as lines:
            lines.write(f"{os.getpid()} end {job['attempt']} {time.time()}\n")

    return work


def run_toy(
    tracking_uri: str,
    store_uri: str,
    plan: StagePlan,
    function: Callable[[dict[str, Any]], None],
    on_progress: OnProgress | None = None,
) -> StageResult:
    """Train and hand over; needs a connected Ray."""
    context = toy_context(tracking_uri, store_uri)
    return run_stage(plan, context, on_progress=on_progress, function=function)


def main(
    tracking_uri: str, store_uri: str, recipe: str, exported: str, log: str, step_seconds: str
) -> None:
    """Run the stage in a Ray of its own."""
    from infra.sessions import ray_session

    plan = toy_plan(tracking_uri, store_uri, recipe)
    with ray_session(CLUSTER, {}):
        run_toy(tracking_uri, store_uri, plan, toy_worker(exported, log, float(step_seconds)))
    Path(log).write_text(Path(log).read_text() + "done\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
