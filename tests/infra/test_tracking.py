"""The REST tracker against a real MLflow server, also while it is down."""

from __future__ import annotations

import math
import secrets
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from infra.errors import UserError
from infra.local.processes import free_port
from infra.local.programs import PROGRAMS
from infra.tracking import RestTracker, TrackingRefused, TrackingServer, TrackingUnavailable
from infra.tracking_server import DatasetInput, TrackedRun, tag_filter

pytestmark = pytest.mark.slow

MLFLOW = next(program for program in PROGRAMS if program.name == "mlflow")


@dataclass
class Server:
    """An MLflow server that can be killed and started again on the same port and database."""

    home: Path
    port: int
    process: subprocess.Popen[bytes] | None = None

    @property
    def uri(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        MLFLOW.prepare(self.home, print)
        self.process = subprocess.Popen(
            MLFLOW.command(self.home, self.port),
            env=MLFLOW.environment(("", "")),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        deadline = time.monotonic() + 120
        while not MLFLOW.answers(self.port):
            assert time.monotonic() < deadline
            assert self.process.poll() is None
            time.sleep(0.1)

    def kill(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None


@pytest.fixture(scope="module")
def mlflow(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("mlflow-home"), free_port())
    server.start()
    yield server
    server.kill()


@pytest.fixture
def run(mlflow: Server) -> TrackedRun:
    tracking = TrackingServer(mlflow.uri)
    experiment_id = tracking.experiment_id("tests")
    return tracking.create_run(experiment_id, "a run", {"mark": secrets.token_hex(4)})


def test_experiments_and_runs_are_made_once_and_found_again(mlflow: Server) -> None:
    server = TrackingServer(mlflow.uri)
    experiment_id = server.experiment_id("pipeline one")
    assert server.experiment_id("pipeline one") == experiment_id
    identity = {"stage_key": secrets.token_hex(32)}
    first = server.find_or_create_run(experiment_id, "concepts", identity, {"attempt": "1"})
    again = server.find_or_create_run(experiment_id, "concepts", identity, {"attempt": "2"})
    assert again.run_id == first.run_id
    assert again.tags["attempt"] == "1"
    assert first.status == "RUNNING"
    server.update_run(first.run_id, "FAILED")
    server.update_run(first.run_id, "RUNNING")
    assert server.get_run(first.run_id).status == "RUNNING"


def test_metrics_tags_params_and_artifacts_arrive(mlflow: Server, run: TrackedRun) -> None:
    with RestTracker(mlflow.uri, run.run_id) as tracker:
        for step in range(1200):
            tracker.log_metrics({"loss": 1 / (step + 1), "rate": 2.0}, step)
        tracker.set_tag("note", "a tag")
        tracker.log_param("steps", 1200)
        tracker.log_artifact(b"\x89PNG", "grids/step 1200.png")
        assert tracker.flush(30)
    found = TrackingServer(mlflow.uri).get_run(run.run_id)
    assert found.metrics["loss"] == pytest.approx(1 / 1200)
    assert found.metric_steps == {"loss": 1199, "rate": 1199}
    assert found.tags["note"] == "a tag"
    assert found.params["steps"] == "1200"
    stored = list((mlflow.home / "mlflow" / "artifacts").rglob("step 1200.png"))
    assert [path.read_bytes() for path in stored] == [b"\x89PNG"]


def test_nan_and_infinity_are_logged_by_name(mlflow: Server, run: TrackedRun) -> None:
    with RestTracker(mlflow.uri, run.run_id) as tracker:
        tracker.log_metrics({"loss": math.nan, "norm": math.inf}, 1)
    metrics = TrackingServer(mlflow.uri).get_run(run.run_id).metrics
    assert math.isnan(metrics["loss"])
    assert metrics["norm"] > 1e300


def test_one_refused_param_does_not_hold_back_the_rest(mlflow: Server, run: TrackedRun) -> None:
    TrackingServer(mlflow.uri).log_batch(run.run_id, params={"rate": "1"})
    with RestTracker(mlflow.uri, run.run_id) as tracker:
        tracker.log_params({"rate": 2, "other": 3})
        tracker.log_metrics({"loss": 1.0}, 0)
        assert tracker.flush(20)
        assert tracker.num_refused == 1
    found = TrackingServer(mlflow.uri).get_run(run.run_id)
    assert found.params == {"rate": "1", "other": "3"}
    assert found.metrics == {"loss": 1.0}


def test_a_resumed_run_shows_no_step_twice(mlflow: Server, run: TrackedRun) -> None:
    for steps in (range(10), range(6, 15)):
        with RestTracker(mlflow.uri, run.run_id) as tracker:
            for step in steps:
                tracker.log_metrics({"loss": float(step)}, step)
            assert tracker.flush(20)
    query = {"run_id": run.run_id, "metric_key": "loss"}
    history = TrackingServer(mlflow.uri).call("GET", "mlflow/metrics/get-history", query=query)
    assert [int(point.get("step", 0)) for point in history["metrics"]] == list(range(15))


def test_metrics_of_an_outage_are_replayed(mlflow: Server, run: TrackedRun) -> None:
    with RestTracker(mlflow.uri, run.run_id) as tracker:
        tracker.log_metrics({"loss": 0.0}, 0)
        assert tracker.flush(20)
        mlflow.kill()
        longest_wait_seconds = 0.0
        for step in range(1, 300):
            started_at = time.monotonic()
            tracker.log_metrics({"loss": float(step)}, step)
            longest_wait_seconds = max(longest_wait_seconds, time.monotonic() - started_at)
            time.sleep(0.01)
        assert longest_wait_seconds < 0.5
        assert not tracker.flush(0.2)
        mlflow.start()
        assert tracker.flush(60)
    query = {"run_id": run.run_id, "metric_key": "loss"}
    history = TrackingServer(mlflow.uri).call("GET", "mlflow/metrics/get-history", query=query)
    assert [int(point.get("step", 0)) for point in history["metrics"]] == list(range(300))


def test_eight_writers_at_once_lose_nothing(mlflow: Server) -> None:
    """sqlite has one writer: the server waits for its lock, and what it refuses is sent again."""
    tracking = TrackingServer(mlflow.uri)
    experiment_id = tracking.experiment_id("tests")
    runs = [tracking.create_run(experiment_id, f"writer {n}", {}) for n in range(8)]
    trackers = [RestTracker(mlflow.uri, run.run_id) for run in runs]
    for step in range(200):
        for tracker in trackers:
            tracker.log_metrics({"loss": float(step)}, step)
            tracker.set_tag("at", str(step))
    assert [tracker.close(60) for tracker in trackers] == [0] * 8
    assert all(tracker.num_refused == tracker.num_dropped == 0 for tracker in trackers)
    for run in runs:
        query = {"run_id": run.run_id, "metric_key": "loss", "max_results": "1000"}
        points = tracking.call("GET", "mlflow/metrics/get-history", query=query)["metrics"]
        assert sorted(int(point["step"]) for point in points) == list(range(200))
        assert tracking.get_run(run.run_id).tags["at"] == "199"


def test_a_server_that_is_away_for_a_moment_is_waited_for(mlflow: Server) -> None:
    mlflow.kill()
    with pytest.raises(TrackingUnavailable, match="does not answer"):
        TrackingServer(mlflow.uri, patience_seconds=0.5).experiment_id("x")
    mlflow.start()
    assert TrackingServer(mlflow.uri).experiment_id("x")


def test_refusals_say_why_in_one_line(mlflow: Server) -> None:
    with pytest.raises(TrackingRefused, match="RESOURCE_DOES_NOT_EXIST") as caught:
        TrackingServer(mlflow.uri).get_run("0" * 32)
    assert caught.value.code == "RESOURCE_DOES_NOT_EXIST"
    assert "\n" not in str(caught.value)


def test_addresses_that_are_no_server_are_refused() -> None:
    for address in ("sqlite:///x.db", "", "file:///tmp/mlruns"):
        with pytest.raises(UserError, match="MLFLOW_TRACKING_URI"):
            TrackingServer(address)


def test_quotes_cannot_leave_a_search() -> None:
    with pytest.raises(ValueError, match="quote"):
        tag_filter("tags", {"stage_key": "' or 1=1"})


def test_mlflow_reads_what_was_written(mlflow: Server, run: TrackedRun) -> None:
    server = TrackingServer(mlflow.uri)
    sha256 = secrets.token_hex(32)
    dataset = DatasetInput(
        "gallery", sha256[:32], "s3://atelier/datasets/gallery/x/manifest.json", {"sha256": sha256}
    )
    for _ in range(2):  # twice, as after a crash
        server.log_inputs(run.run_id, [dataset])
    server.log_batch(run.run_id, metrics=[{"key": "loss", "value": 0.5, "timestamp": 1, "step": 7}])
    server.update_run(run.run_id, "FINISHED")
    from mlflow import MlflowClient

    client = MlflowClient(mlflow.uri)
    read = client.get_run(run.run_id)
    assert read.info.status == "FINISHED"
    assert read.inputs is not None
    assert [(each.dataset.name, each.dataset.digest) for each in read.inputs.dataset_inputs] == [
        ("gallery", sha256[:32])
    ]
    assert {tag.key: tag.value for tag in read.inputs.dataset_inputs[0].tags}["sha256"] == sha256
    points = client.get_metric_history(run.run_id, "loss")
    assert [(point.step, point.value) for point in points] == [(7, 0.5)]


def test_a_digest_that_mlflow_would_refuse_is_a_bug() -> None:
    with pytest.raises(ValueError, match="36"):
        DatasetInput("gallery", "0" * 64, "s3://b/m.json", {}).to_json()
