"""Real Spark and real Ray: what workers see, who listens, and what is left afterwards."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import psutil
import pyspark
import pytest

from infra import java
from infra.errors import UserError
from infra.sessions import ClusterConfig, ray_session, spark_session, stop_spark

pytestmark = pytest.mark.slow

SECRET = "canary-6f1d8c"
LOOPBACK = ("127.0.0.1", "::1", "::ffff:127.0.0.1")


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ATELIER_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "home"


def listeners(processes: list[psutil.Process]) -> list[str]:
    """The addresses the processes listen on, off loopback; there must be some on loopback."""
    addresses = []
    for process in processes:
        try:
            connections = process.net_connections(kind="inet")
        except psutil.NoSuchProcess:
            continue
        addresses += [c.laddr.ip for c in connections if c.status == psutil.CONN_LISTEN]
    assert addresses
    return [address for address in addresses if address not in LOOPBACK]


def family() -> list[psutil.Process]:
    own = psutil.Process()
    return [own, *own.children(recursive=True)]


def command_lines() -> str:
    lines = []
    for process in family():
        try:
            lines.append(" ".join(process.cmdline()))
        except psutil.NoSuchProcess:
            continue
    return "\n".join(lines)


def session_folder() -> Path:
    """Where the running Ray keeps its logs and sockets."""
    from ray._private import worker

    assert worker._global_node is not None
    return Path(worker._global_node.get_session_dir_path())


def gone(processes: list[psutil.Process]) -> bool:
    deadline = time.monotonic() + 15
    while any(p.is_running() and p.status() != psutil.STATUS_ZOMBIE for p in processes):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def see(name: str) -> Callable[[Iterable[int]], Iterable[str]]:
    def read(rows: Iterable[int]) -> Iterable[str]:
        import infra.digests

        yield os.environ[name] + infra.digests.sha256_bytes(b"")[:4]

    return read


def test_spark_runs_tasks_on_loopback_and_ends_whole(home: Path) -> None:
    before = set(family())
    spark = spark_session("test", ClusterConfig(), {"CANARY": SECRET})
    context = spark.sparkContext
    seen = context.parallelize([1, 2], 2).mapPartitions(see("CANARY")).collect()
    assert seen == [f"{SECRET}e3b0"] * 2
    found = context.parallelize([1], 1).map(lambda _: sys.modules["pyspark"].__file__).collect()
    assert found == [pyspark.__file__]  # not in the zip that Spark would have it read anew
    assert spark.range(1000).repartition(4).selectExpr("sum(id)").collect()[0][0] == 499500
    assert context.getConf().get("spark.authenticate") == "true"
    assert listeners(family()) == []
    assert SECRET not in command_lines()
    started = set(family()) - before
    stop_spark(spark)
    assert gone(list(started))
    assert sorted(path.name for path in Path.cwd().iterdir()) == ["home"]
    assert SECRET not in (home / "logs" / "spark.log").read_text()
    assert not list((home / "tmp" / "spark").glob("blockmgr*"))


def test_spark_tries_a_failing_task_again(home: Path, tmp_path: Path) -> None:
    marker = tmp_path / "home" / "attempts"

    def fail_twice(rows: Iterable[int]) -> Iterable[int]:
        with open(marker, "a") as file:
            file.write("x")
        if marker.stat().st_size < 3:
            raise RuntimeError("lost")
        yield from rows

    spark = spark_session("test", ClusterConfig(), {})
    try:
        assert spark.sparkContext.parallelize([1], 1).mapPartitions(fail_twice).collect() == [1]
        again = spark_session("again", ClusterConfig(), {"CANARY": "second"})
        assert again.sparkContext.appName == "again"
        seen = again.sparkContext.parallelize([1], 1).mapPartitions(see("CANARY")).collect()
        assert seen == ["seconde3b0"]
    finally:
        stop_spark(spark)


def test_spark_without_java_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(java, "_candidates", lambda: iter(()))
    with pytest.raises(UserError, match="make setup"):
        spark_session("test", ClusterConfig(), {})


# pyspark leaves the pipe to a JVM that did not start to the garbage collector.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_jvm_that_will_not_start_shows_its_last_words() -> None:
    cluster = ClusterConfig(spark_driver_memory_mb=1 << 40)
    with pytest.raises(UserError, match=r"JVM did not start: .*; see .*spark\.log"):
        spark_session("test", cluster, {})


def test_ray_runs_tasks_on_loopback_and_ends_whole(home: Path) -> None:
    import ray

    before = set(family())
    with ray_session(ClusterConfig(num_workers=1, cpus_per_worker=2), {"CANARY": SECRET}):

        @ray.remote
        def task() -> tuple[str, str]:
            import infra.digests

            return os.environ["CANARY"], infra.digests.sha256_bytes(b"")[:4]

        assert ray.get([task.remote() for _ in range(3)]) == [(SECRET, "e3b0")] * 3
        resources: Callable[[], dict[str, float]] = ray.cluster_resources
        assert resources()["CPU"] == 3
        assert resources().get("GPU", 0) == 0
        assert os.environ["CANARY"] == SECRET
        assert listeners([*family()]) == []
        assert SECRET not in command_lines()
        assert os.environ["RAY_AUTH_MODE"] == "token"
        session = session_folder()
        assert session.parent.parent.stat().st_mode & 0o077 == 0
        started = set(family()) - before
        with (
            pytest.raises(UserError, match="connected to a Ray already"),
            ray_session(ClusterConfig(), {}),
        ):
            pass
    assert gone(list(started))
    assert "CANARY" not in os.environ
    assert not session.parent.parent.exists()


def test_ray_keeps_its_logs_when_the_work_fails() -> None:
    import ray

    sessions = []

    def work() -> None:
        with ray_session(ClusterConfig(), {}):
            sessions.append(session_folder())
            raise ValueError("boom")

    with pytest.raises(ValueError, match="boom"):
        work()
    assert not ray.is_initialized()
    assert (sessions[0] / "logs").is_dir()
    shutil.rmtree(sessions[0].parent.parent)


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("127.0.0.1:1", r"no Ray answers at 127\.0\.0\.1:1 \(Connection refused\); start that"),
        ("somewhere", "expected ray_address like host:6379; got 'somewhere'"),
    ],
)
def test_a_ray_that_does_not_answer_is_named(address: str, message: str) -> None:
    with (
        pytest.raises(UserError, match=message),
        ray_session(ClusterConfig(ray_address=address), {}),
    ):
        pass


def test_a_running_ray_is_joined(monkeypatch: pytest.MonkeyPatch) -> None:
    code = """
import sys
import ray
from infra.sessions import ClusterConfig, ray_session
hidden = {"AWS_SECRET_ACCESS_KEY": sys.argv[2]}
with ray_session(ClusterConfig(ray_address=sys.argv[1]), {"CANARY": "joined", **hidden}):
    import os
    from infra.ray_task import call_in_ray
    def task():
        return os.environ["CANARY"], os.environ.get("AWS_SECRET_ACCESS_KEY")
    print(ray.get(ray.remote(task).remote()))
    print(call_in_ray(task, environment=hidden, num_gpus=0) == ("joined", sys.argv[2]))
"""
    import ray

    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY", raising=False)

    with ray_session(ClusterConfig(), {}):
        address = ray.get_runtime_context().gcs_address
        done = subprocess.run(
            [sys.executable, "-c", code, address, SECRET],
            capture_output=True, text=True, timeout=120,
        )  # fmt: skip
        logs = [path.read_bytes() for path in (session_folder() / "logs").glob("*")
                if path.is_file()]  # fmt: skip
    assert done.stdout == "('joined', None)\nTrue\n", done.stderr
    assert any(b"CANARY" in log for log in logs)
    assert not any(SECRET.encode() in log for log in logs)


def test_a_stranger_without_the_token_is_refused() -> None:
    import ray

    with ray_session(ClusterConfig(), {}):
        address = ray.get_runtime_context().gcs_address
        code = f"import ray; ray.init(address={address!r}, logging_level=50); print('inside')"
        stranger = {
            **os.environ,
            "RAY_AUTH_TOKEN": "0" * 64,
            "RAY_NUM_REDIS_GET_RETRIES": "2",
        }
        done = subprocess.run(
            [sys.executable, "-c", code], env=stranger, capture_output=True, text=True, timeout=120
        )
    assert done.returncode != 0
    assert "inside" not in done.stdout
