"""A small stage through real Ray Train: killed workers, killed drivers, bad results."""

from __future__ import annotations

import importlib.util
import os
import secrets
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from infra import storage
from infra.errors import UserError
from infra.lease import LeaseLost
from infra.sessions import ray_session
from infra.tracking_server import TrackingServer
from training import registry, versions
from training.driver import GateFailed
from training.progress import StageProgress

pytestmark = [
    pytest.mark.slow,
    # ray.train imports ray.data, whose defaults warn about themselves.
    pytest.mark.filterwarnings("ignore::Warning:ray.data.context"),
]

SCRIPT = Path(__file__).with_name("toy_stage.py")


def _load_toy() -> Any:
    spec = importlib.util.spec_from_file_location("toy_stage", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


toy = _load_toy()


@pytest.fixture(scope="module")
def ray_here(_session_s3_server: Any) -> Iterator[None]:
    """A Ray for this file; its workers reach the session's S3 server."""
    with ray_session(toy.CLUSTER, _session_s3_server.environment):
        yield


@pytest.fixture
def recipe() -> str:
    return f"toy-{secrets.token_hex(4)}"


def _starts(log: Path) -> list[tuple[int, int]]:
    """(first step, attempt) of every start of the worker."""
    words = [line.split() for line in log.read_text().splitlines()]
    return [(int(each[1]), int(each[2])) for each in words if len(each) > 1 and each[1] != "end"]


@pytest.mark.usefixtures("ray_here")
def test_a_killed_worker_goes_on_from_its_checkpoint(
    server: TrackingServer, store_uri: str, recipe: str, exported: Path, tmp_path: Path
) -> None:
    log, seen = tmp_path / "log", list[StageProgress]()
    plan = toy.toy_plan(server.uri, store_uri, recipe)
    assert (plan.decision, plan.needs_training) == ("RUN", True)
    work = toy.toy_worker(str(exported), str(log), 0.05, trouble="die")
    result = toy.run_toy(server.uri, store_uri, plan, work, seen.append)
    assert _starts(log) == [(0, 1), (2, 1)]
    assert result.step == toy.STEPS
    assert result.metrics == {"final_loss": 0.2}
    assert seen[-1] == StageProgress(step=5, steps=5, loss=0.2)
    assert result.version.is_handed_over
    again = toy.toy_plan(server.uri, store_uri, recipe)
    assert again.decision == "SKIP"
    run = server.get_run(result.run_id)
    assert (run.status, run.metrics["loss"]) == ("FINISHED", 0.2)
    query = {"run_id": run.run_id, "metric_key": "loss"}
    points = server.call("GET", "mlflow/metrics/get-history", query=query)["metrics"]
    assert [point["step"] for point in points] == [1, 2, 3, 4, 5]


@pytest.mark.usefixtures("ray_here")
@pytest.mark.parametrize(
    ("trouble", "num_starts", "message"),
    [
        ("nan", 1, "stopped: the loss at step 2 is NaN; lower optimizer.learning_rate"),
        ("bug", 4, "failed in worker 0: ZeroDivisionError: division by zero"),
    ],
)
def test_a_worker_that_fails(
    server: TrackingServer,
    local_store: str,
    recipe: str,
    exported: Path,
    tmp_path: Path,
    trouble: str,
    num_starts: int,
    message: str,
) -> None:
    log = tmp_path / "log"
    plan = toy.toy_plan(server.uri, local_store, recipe)
    with pytest.raises(UserError) as caught:
        toy.run_toy(
            server.uri, local_store, plan, toy.toy_worker(str(exported), str(log), 0.0, trouble)
        )
    assert message in str(caught.value)
    assert "Traceback" not in str(caught.value)
    assert len(_starts(log)) == num_starts
    experiment_id = server.experiment_id("toy stages")
    (run,) = server.search_runs(experiment_id, {"recipe": recipe})
    assert run.status == "FAILED"
    assert message in run.tags["failure"]
    assert versions.all_versions(server, f"{recipe}-tokenizer") == []
    resumed = toy.toy_plan(server.uri, local_store, recipe)
    assert (resumed.decision, resumed.step) == ("RESUME", 2)
    mended = toy.toy_worker(str(exported), str(log))
    result = toy.run_toy(server.uri, local_store, resumed, mended)
    assert _starts(log)[-1] == (2, 2)
    assert server.get_run(result.run_id).status == "FINISHED"
    assert result.run_id == run.run_id


@pytest.mark.usefixtures("ray_here")
def test_a_model_with_nan_is_never_published(
    server: TrackingServer, local_store: str, recipe: str, exported: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(exported, tmp_path / "bad"))
    path = folder / "vqvae" / "diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    name = next(key for key, value in weights.items() if value.is_floating_point())
    weights[name].view(-1)[0] = torch.nan
    save_file(weights, path)
    plan = toy.toy_plan(server.uri, local_store, recipe)
    with pytest.raises(GateFailed, match="vqvae: 1 weights hold NaN or infinity"):
        toy.run_toy(
            server.uri, local_store, plan, toy.toy_worker(str(folder), str(tmp_path / "log"))
        )
    assert list(storage.list_objects(storage.join(local_store, "models"))) == []
    assert versions.all_versions(server, f"{recipe}-tokenizer") == []


@pytest.mark.usefixtures("ray_here")
def test_a_driver_that_was_replaced_stops_training(
    server: TrackingServer, local_store: str, recipe: str, exported: Path, tmp_path: Path
) -> None:
    plan = toy.toy_plan(server.uri, local_store, recipe)
    uri = storage.join(local_store, "runs", plan.run_name or "", "lease.json")
    log = tmp_path / "log"

    def steal(progress: StageProgress) -> None:
        storage.write_json(uri, {**storage.read_json(uri), "token": "stolen", "owner": "bob"})

    work = toy.toy_worker(str(exported), str(log), step_seconds=3.0)
    with pytest.raises(LeaseLost, match=r"attempt 1 lost .* to bob"):
        toy.run_toy(server.uri, local_store, plan, work, steal)
    assert "end" not in log.read_text()
    assert versions.all_versions(server, f"{recipe}-tokenizer") == []


@pytest.fixture
def start_script(
    server: TrackingServer, store_uri: str, recipe: str, exported: Path, tmp_path: Path
) -> Callable[[float], subprocess.Popen[bytes]]:
    """``start_script(step_seconds)``: the toy stage in a process of its own."""
    arguments = [server.uri, store_uri, recipe, str(exported), str(tmp_path / "log")]

    def start(step_seconds: float) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [sys.executable, str(SCRIPT), *arguments, str(step_seconds)],
            env={**os.environ, "ATELIER_HOME": str(tmp_path / "home")},
            stderr=subprocess.DEVNULL,
        )

    return start


def _await_step(
    process: subprocess.Popen[bytes], tracking_uri: str, store_uri: str, recipe: str, step: int
) -> None:
    deadline = time.monotonic() + 120
    while toy.toy_plan(tracking_uri, store_uri, recipe).step < step:
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.1)


def test_an_interrupted_driver_says_so_and_goes_on(
    server: TrackingServer,
    store_uri: str,
    recipe: str,
    tmp_path: Path,
    start_script: Callable[[float], subprocess.Popen[bytes]],
) -> None:
    first = start_script(0.7)
    _await_step(first, server.uri, store_uri, recipe, 1)
    first.send_signal(signal.SIGINT)
    assert first.wait(timeout=60) not in (0, -signal.SIGKILL)
    (run,) = server.search_runs(server.experiment_id("toy stages"), {"recipe": recipe})
    assert run.status == "KILLED"
    assert start_script(0.0).wait(timeout=180) == 0
    assert server.get_run(run.run_id).status == "FINISHED"
    assert [attempt for _, attempt in _starts(tmp_path / "log")] == [1, 2]


def test_a_killed_driver_is_taken_over(
    server: TrackingServer,
    store_uri: str,
    recipe: str,
    tmp_path: Path,
    start_script: Callable[[float], subprocess.Popen[bytes]],
) -> None:
    first = start_script(0.7)
    _await_step(first, server.uri, store_uri, recipe, 2)
    first.kill()
    first.wait()
    resumed = toy.toy_plan(server.uri, store_uri, recipe)
    assert resumed.decision == "RESUME"
    assert start_script(0.0).wait(timeout=180) == 0
    starts = _starts(tmp_path / "log")
    assert starts[0] == (0, 1)
    assert starts[1][0] >= 2
    assert starts[1][1] == 2
    version = registry.version_by_alias(server, f"{recipe}-tokenizer")
    assert version is not None
    assert version.is_handed_over
