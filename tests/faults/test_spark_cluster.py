"""A standalone Spark cluster: a master and two workers, the executor of one of them killed.

The dataset must be, byte for byte, what one process makes of the same rows.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pyspark
import pytest

from demo.metadata import HOSTS, build_world
from demo.web import PaintedServer
from demo.world import WorldConfig
from infra import storage
from infra.errors import UserError
from infra.java import find_java
from infra.manifest import verify_dataset
from infra.same_code import VARIABLE
from infra.sessions import ClusterConfig, spark_session, stop_spark
from pipelines.config import CurationConfig
from pipelines.curate import curate, plan_curation

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

SPARK = Path(pyspark.__file__).parent
ROOT = Path(__file__).resolve().parent.parent.parent
EXECUTOR = "org.apache.spark.executor.CoarseGrainedExecutorBackend"


@dataclass
class Cluster:
    """Running processes; ``logs`` has what they said."""

    master: str
    secret: str
    logs: Path
    folder: Path

    def config(self, **properties: str) -> ClusterConfig:
        known = {
            "spark.driver.host": "127.0.0.1", "spark.driver.bindAddress": "127.0.0.1",
            "spark.executor.memory": "512m", "spark.executor.cores": "1",
            "spark.cores.max": "2",
        }  # fmt: skip
        return ClusterConfig(spark_master=self.master, spark_properties=known | properties)

    def executors(self, host: str) -> list[int]:
        """Process ids of the executors' JVMs on a host."""
        found = []
        for entry in Path("/proc").iterdir():
            try:
                command = (entry / "cmdline").read_bytes().decode().split("\0")
            except (OSError, UnicodeDecodeError):
                continue
            if EXECUTOR in command and host in command and self.secret not in command:
                found.append(int(entry.name))
        return found


def wait_for(log: Path, pattern: str, seconds: float = 60.0) -> str:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if log.exists() and (match := re.search(pattern, log.read_text(errors="replace"))):
            return match.group(1)
        time.sleep(0.1)
    raise AssertionError(log.read_text(errors="replace")[-2000:] if log.exists() else f"no {log}")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    folder = tmp_path_factory.mktemp("cluster")
    logs = folder / "logs"
    logs.mkdir()
    secret = secrets.token_hex(16)
    properties = folder / "spark.conf"
    properties.write_text(f"spark.authenticate true\nspark.authenticate.secret {secret}\n")
    properties.chmod(0o600)
    environment = {
        **os.environ, "JAVA_HOME": str(find_java().home), "SPARK_HOME": str(SPARK),
        "PYSPARK_PYTHON": sys.executable, "SPARK_DAEMON_MEMORY": "256m",
        "PYTHONPATH": str(ROOT),
    }  # fmt: skip
    processes = []

    def start(name: str, *arguments: str) -> Path:
        log = logs / f"{name}.log"
        with log.open("wb") as output:
            process = subprocess.Popen(
                [str(SPARK / "bin" / "spark-class"), *arguments],
                env=environment, stdout=output, stderr=subprocess.STDOUT, cwd=folder,
                start_new_session=True,
            )  # fmt: skip
            processes.append(process)
        return log

    try:
        log = start(
            "master", "org.apache.spark.deploy.master.Master", "--host", "127.0.0.1",
            "--port", "0", "--webui-port", "0", "--properties-file", str(properties),
        )  # fmt: skip
        master = wait_for(log, r"Starting Spark master at (spark://\S+)")
        for host in ("127.0.0.2", "127.0.0.3"):
            environment["SPARK_LOCAL_IP"] = host
            log = start(
                f"worker-{host}", "org.apache.spark.deploy.worker.Worker", "--host", host,
                "--cores", "1", "--memory", "700m", "--webui-port", "0",
                "--work-dir", str(folder / host), "--properties-file", str(properties), master,
            )  # fmt: skip
            wait_for(log, "(Successfully registered with master)")
        yield Cluster(master, secret, logs, folder)
    finally:
        for process in processes:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[CurationConfig]:
    folder = tmp_path_factory.mktemp("painted")
    build_world(WorldConfig.model_validate({"num_rows": 400, "trap_ratio": 0.3}), folder)
    server = PaintedServer(folder)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    port = server.server_address[1]
    known: dict[str, Any] = {
        "metadata": [str(folder / "metadata" / "*.parquet")],
        "filters": {"min_aesthetic_score": 4.0},
        "fetch": {
            "connect_to": {f"{host}:80": f"127.0.0.1:{port}" for host in HOSTS},
            "total_deadline_seconds": 5.0, "backoff_seconds": 0.05, "retries": 0,
        },
        "resize": {"image_size_px": 64},
        "partitions": 8,
    }  # fmt: skip
    yield CurationConfig.model_validate(known)
    server.shutdown()
    server.server_close()
    thread.join()


def run(
    cluster: ClusterConfig, config: CurationConfig, store: str, environment: dict[str, str]
) -> str:
    sessions = []

    def spark() -> Any:
        sessions.append(spark_session("cluster", cluster, environment))
        return sessions[-1]

    try:
        result = curate("d", config, store, spark, environment)
    finally:
        for session in sessions[-1:]:
            stop_spark(session)
    assert verify_dataset(result.manifest_uri) == []
    return result.version


def test_an_executor_is_killed_and_the_dataset_is_the_same(
    cluster: Cluster, world: CurationConfig, s3_server: Any, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setenv("ATELIER_HOME", str(tmp_path / "home"))
    environment = dict(s3_server.environment)
    alone = run(ClusterConfig(), world, f"{s3_server.store_uri}/alone", environment)

    store = f"{s3_server.store_uri}/cluster"
    monkeypatch.setenv("ATELIER_SPARK_SECRET", cluster.secret)
    killed: list[int] = []
    seen: set[str] = set()
    stopped = threading.Event()

    build = plan_curation("d", world, store).build

    def kill_one() -> None:
        while not stopped.wait(0.05):
            for host in ("127.0.0.2", "127.0.0.3"):
                seen.update([host] if cluster.executors(host) else [])
            staged = [i for i in storage.list_objects(build.folder) if "/staged-" in i.uri]
            if staged and not killed and (pids := cluster.executors("127.0.0.3")):
                killed.extend(pids)
                for pid in pids:
                    os.kill(pid, signal.SIGKILL)

    thread = threading.Thread(target=kill_one)
    thread.start()
    try:
        version = run(cluster.config(), world, store, environment)
    finally:
        stopped.set()
        thread.join()
    assert killed
    assert seen == {"127.0.0.2", "127.0.0.3"}
    assert version == alone

    # No secret in any log, nor on any page or command line that Spark keeps.
    texts = [path for path in cluster.folder.rglob("*") if path.is_file()]
    texts.remove(cluster.folder / "spark.conf")
    texts += list((tmp_path / "home").rglob("*.log"))
    hidden = [cluster.secret, environment["AWS_SECRET_ACCESS_KEY"]]
    for path in texts:
        data = path.read_bytes()
        assert not [value for value in hidden if value.encode() in data], path
    log = (cluster.logs / "worker-127.0.0.3.log").read_text(errors="replace")
    assert "exitStatus 137" in log or "exit code 137" in log.lower() or "KILLED" in log


def test_workers_with_other_code_are_refused_in_one_line(
    cluster: Cluster, world: CurationConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ATELIER_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("ATELIER_SPARK_SECRET", cluster.secret)
    told = {VARIABLE: f"infra pipelines {64 * '0'}"}
    monkeypatch.setattr("infra.spark.code_expected", lambda *_: told)
    with pytest.raises(UserError, match=r"expected the driver's code .*; got other code on "):
        run(cluster.config(), world, (tmp_path / "store").as_uri(), {})
    assert not list((tmp_path / "store").rglob("staged-*"))


def test_a_frozen_worker_is_overtaken_by_a_second_copy_and_wakes_up_to_no_effect(
    cluster: Cluster, world: CurationConfig, s3_server: Any, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Spark starts a slow task once more, on the other host; then the first copy goes on, too."""
    monkeypatch.setenv("ATELIER_HOME", str(tmp_path / "home"))
    environment = dict(s3_server.environment)
    alone = run(ClusterConfig(), world, f"{s3_server.store_uri}/alone-2", environment)

    store = f"{s3_server.store_uri}/speculation"
    monkeypatch.setenv("ATELIER_SPARK_SECRET", cluster.secret)
    build = plan_curation("d", world, store).build
    frozen: list[psutil.Process] = []
    num_staged_meanwhile: list[int] = []
    stopped = threading.Event()

    def freeze_and_wake() -> None:
        while not stopped.wait(0.05):
            staged = [i for i in storage.list_objects(build.folder) if "/staged-" in i.uri]
            if staged and not frozen:
                frozen.extend(python_workers(cluster, "127.0.0.3"))
                for process in frozen:
                    process.suspend()
            elif frozen and len(staged) == build.num_partitions and not num_staged_meanwhile:
                num_staged_meanwhile.append(len(staged))
                wake(frozen)

    thread = threading.Thread(target=freeze_and_wake)
    thread.start()
    config = cluster.config(**{
        "spark.speculation": "true", "spark.speculation.interval": "100ms",
        "spark.speculation.quantile": "0.1", "spark.speculation.multiplier": "1.1",
    })  # fmt: skip
    try:
        version = run(config, world, store, environment)
    finally:
        stopped.set()
        thread.join()
        wake(frozen)
    assert frozen
    assert num_staged_meanwhile == [build.num_partitions], "nobody took over"
    assert version == alone


def python_workers(cluster: Cluster, host: str) -> list[psutil.Process]:
    """The processes in which a host's executor runs Python tasks."""
    found = []
    for pid in cluster.executors(host):
        for child in psutil.Process(pid).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):  # they come and go
                if "pyspark.daemon" in " ".join(child.cmdline()) and not child.children():
                    found.append(child)
    return found


def wake(processes: list[psutil.Process]) -> None:
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.resume()


def test_spark_submit_takes_the_same_command(
    cluster: Cluster, world: CurationConfig, tmp_path: Path
) -> None:
    import yaml

    recipe = tmp_path / "recipe.yaml"
    known = world.model_dump(mode="json", exclude_unset=True)
    recipe.write_text(yaml.safe_dump({"name": "submitted", "datasets": {"d": known}}))
    done = subprocess.run(
        [
            str(SPARK / "bin" / "spark-submit"), "--master", cluster.master,
            "--conf", "spark.driver.host=127.0.0.1", "--conf", "spark.executor.memory=512m",
            "--conf", "spark.driver.bindAddress=127.0.0.1",
            str(ROOT / "app" / "submit.py"), "curate", str(recipe), "--json",
        ],
        env={
            **os.environ, "JAVA_HOME": str(find_java().home), "PYSPARK_PYTHON": sys.executable,
            "ATELIER_HOME": str(tmp_path / "home"), "ATELIER_SPARK_SECRET": cluster.secret,
            "PYTHONPATH": str(ROOT),
        },
        cwd=ROOT, capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    try:
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        assert '"state": "done"' in done.stdout
        log = (cluster.logs / "master.log").read_text(errors="replace")
        assert log.count("Registered app") >= 1
    finally:
        subprocess.run(
            [sys.executable, "-c", "from app.cli import main; main()", "down"],
            env={**os.environ, "ATELIER_HOME": str(tmp_path / "home")}, cwd=ROOT, check=False,
        )  # fmt: skip
