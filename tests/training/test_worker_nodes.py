"""A stage on two Ray nodes of which one is lost: it goes on, on a third, to the same weights."""

from __future__ import annotations

import secrets
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file

from infra import storage
from infra.cluster import ClusterConfig
from infra.sessions import ray_session
from training.config import StageConfig
from training.launch import Launch, Trained, TrainingFailed, train
from training.progress import read_progress_json
from training.waste import WORKER_LOST, read_starts
from training.worker import train_worker

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.filterwarnings("ignore::Warning:ray.data.context"),
]

ROOT = Path(__file__).resolve().parent.parent.parent
STEPS = 400


@pytest.fixture
def two_nodes(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A head without cores and two nodes of one core each; this process has joined them."""
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN", secrets.token_hex(32))
    monkeypatch.setenv("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    import ray._raylet
    from ray._common.utils import get_ray_address_file
    from ray.cluster_utils import Cluster

    raylet: Any = ray._raylet
    # Mode and token are read once, when ray is imported, which other tests did long ago.
    raylet.Config.initialize("")
    tokens: Any = raylet.AuthenticationTokenLoader.instance()
    tokens.reset_cache()
    folder = tempfile.mkdtemp(prefix="ray-")  # short enough for sockets
    # Whatever folder a head has, its address is noted in the usual one.
    noted = Path(get_ray_address_file(None))
    noted.parent.mkdir(parents=True, exist_ok=True)
    head = {"num_cpus": 0, "temp_dir": folder, "include_dashboard": False}
    settings = {"PYTHONPATH": str(ROOT), "RAY_TRAIN_METRICS_ENABLED": "0"}
    cluster: Any = Cluster()
    try:
        cluster.add_node(**head)
        for _ in range(2):
            cluster.add_node(num_cpus=1)
        with ray_session(ClusterConfig(ray_address=cluster.address), settings):
            yield cluster
    finally:
        cluster.shutdown()
        noted.unlink(missing_ok=True)
        tokens.reset_cache()
        shutil.rmtree(folder, ignore_errors=True)


def _trained(raw: dict[str, Any], store: Path, name: str) -> Trained:
    run_uri = storage.join(store.as_uri(), "runs", name)
    how = Launch(name, store.as_uri(), num_workers=2, cpus_per_worker=1, is_local=False)
    return train({**raw, "run_uri": run_uri}, how, train_worker)


def _node_at_work(cluster: Any) -> Any:
    """A node on which a worker trains."""
    for node in cluster.worker_nodes:
        raylet = psutil.Process(node.all_processes["raylet"][0].process.pid)
        titles = [" ".join(child.cmdline()) for child in raylet.children()]
        if any("RayTrainWorker" in title for title in titles):
            return node
    raise AssertionError("no node trains")


def _weights(trained: Trained, folder: Path) -> dict[str, torch.Tensor]:
    storage.download_folder(trained.checkpoint_uri, folder)
    return load_file(folder / "weights.safetensors")


def test_a_lost_node_is_survived(
    tmp_path: Path,
    two_nodes: Any,
    raw_job: Callable[[StageConfig], dict[str, Any]],
    small_config: Callable[..., StageConfig],
) -> None:
    raw = raw_job(small_config(steps=STEPS, checkpoint_interval_steps=5))
    undisturbed = _weights(_trained(raw, tmp_path / "ray", "undisturbed"), tmp_path / "one")
    two_nodes.add_node(num_cpus=1)  # in whose place a lost one's worker goes
    lost_at: list[int] = []
    progress_uri = storage.file_uri(tmp_path / "second.json")

    def lose_a_node() -> None:
        deadline = time.monotonic() + 300
        while time.monotonic() < deadline:
            step = int(read_progress_json(progress_uri).get("step", 0))
            if step >= 10:
                break
            time.sleep(0.05)
        two_nodes.remove_node(_node_at_work(two_nodes), allow_graceful=False)
        lost_at.append(step)

    losing = threading.Thread(target=lose_a_node)
    losing.start()
    trained = _trained({**raw, "progress_uri": progress_uri}, tmp_path / "ray", "disturbed")
    losing.join()
    assert 10 <= lost_at[0] < STEPS
    assert trained.metrics["step"] == STEPS
    starts = read_starts((tmp_path / "ray").as_uri() + "/runs/disturbed")
    assert [start.cause for start in starts] == ["", WORKER_LOST]
    assert 0 < starts[1].step < STEPS
    found = _weights(trained, tmp_path / "two")
    assert all(torch.equal(found[name], value) for name, value in undisturbed.items())


def test_keys_reach_the_workers_and_no_log(
    tmp_path: Path, two_nodes: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray's agents write down what a runtime environment names, on every node, for all to read."""
    secret = secrets.token_hex(16)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", secret)
    seen = tmp_path / "seen"
    seen.mkdir()

    def keep(raw: dict[str, Any]) -> None:
        import os
        from pathlib import Path

        import ray.train

        rank = ray.train.get_context().get_world_rank()
        Path(raw["seen"], str(rank)).write_text(os.environ.get("AWS_SECRET_ACCESS_KEY", ""))

    how = Launch("keys", tmp_path.as_uri(), num_workers=2, cpus_per_worker=1, is_local=False)
    with pytest.raises(TrainingFailed, match="without a result"):  # it trained nothing
        train({"seen": str(seen)}, how, keep)
    assert [(seen / str(rank)).read_text() for rank in range(2)] == [secret] * 2
    folder = Path(two_nodes.head_node.get_session_dir_path())
    logs = [path for path in folder.rglob("*") if path.is_file()]
    assert any("runtime_env_agent" in path.name for path in logs)
    assert not [path for path in logs if secret.encode() in path.read_bytes()]
