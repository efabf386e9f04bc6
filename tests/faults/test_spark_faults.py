"""A5, A6, A7, A8, B36: tasks that fail once or always, a heap and a disk that are too small."""

from __future__ import annotations

import os
import random
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from py4j.protocol import Py4JError, Py4JNetworkError

from infra.config import PROJECT_ROOT
from infra.errors import UserError
from infra.manifest import verify_dataset
from infra.sessions import ClusterConfig, spark_session, stop_spark
from infra.spark import with_attempts
from infra.spark_errors import jvm_starts, trouble_of
from pipelines.config import CurationConfig
from pipelines.curate import CurationResult, curate

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

HERE = Path(__file__).resolve().parent
FAILING = {
    "spark.python.daemon.module": "failing_daemon",
    "spark.executorEnv.PYTHONPATH": os.pathsep.join([str(PROJECT_ROOT), str(HERE)]),
}
ROWS = 6000


@pytest.mark.parametrize(
    ("asked", "given"),
    [
        ("local", "local[1,4]"), ("local[2]", "local[2,4]"), ("local[*]", "local[*,4]"),
        ("local[2,1]", "local[2,1]"), ("local-cluster[2,1,512]", "local-cluster[2,1,512]"),
        ("spark://a:7077", "spark://a:7077"), ("yarn", "yarn"),
    ],
)  # fmt: skip
def test_a_laptop_tries_as_often_as_a_cluster(asked: str, given: str) -> None:
    assert with_attempts(asked) == given
    assert with_attempts(ClusterConfig().spark_master) == ClusterConfig().spark_master


@pytest.mark.parametrize(
    ("said", "remedy"),
    [
        ("java.io.IOException: No space left on device", "spark.local.dir"),
        ("OSError: [Errno 122] Disk quota exceeded", "spark.local.dir"),
        ("java.lang.OutOfMemoryError: Java heap space", "spark_driver_memory_mb"),
        ("io.netty.util.internal.OutOfDirectMemoryError: failed", "spark_driver_memory_mb"),
        ("ExecutorLostFailure (executor 1 exited ... exit code 137)", "memoryOverhead"),
        ("Python worker exited unexpectedly (crashed)", "memoryOverhead"),
    ],
)
def test_what_the_machine_lacks_is_one_line(said: str, remedy: str) -> None:
    try:
        try:
            raise ValueError(f"Job aborted: {said}\n\tat org.apache.spark.Some.thing")
        except ValueError as error:
            raise RuntimeError("wrapped") from error
    except RuntimeError as error:
        told = trouble_of(error)
    assert told is not None
    assert remedy in told.line
    assert "same command goes on" in told.line
    assert trouble_of(RuntimeError("a bug of ours")) is None


def test_a_jvm_that_is_gone_is_told_by_its_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ATELIER_HOME", str(tmp_path))
    told = trouble_of(ConnectionRefusedError(111, "refused"))
    assert told is not None
    assert "killed or died" in told.line
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "spark.log").write_text("java.lang.OutOfMemoryError: Java heap space\n")
    told = trouble_of(ConnectionRefusedError(111, "refused"))
    assert told is not None
    assert "spark_driver_memory_mb" in told.line
    jvm_starts()
    told = trouble_of(ConnectionRefusedError(111, "refused"))
    assert told is not None
    assert "killed or died" in told.line  # what an earlier JVM wrote does not count


def test_ways_in_which_a_lost_jvm_shows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATELIER_HOME", str(tmp_path))
    for error in (
        Py4JNetworkError("Answer from Java side is empty"),
        Py4JError("An error occurred while calling o60.range"),
        RuntimeError("Job 0 cancelled because SparkContext was shut down"),
    ):
        told = trouble_of(error)
        assert told is not None
        assert "killed or died" in told.line
    assert trouble_of(Py4JError("An error occurred while calling o1.x. Trace:\nno such")) is None


class Job:
    """A curation of rows that are all refused for their address; what it takes is Spark's work."""

    def __init__(self, folder: Path, num_rows: int = ROWS) -> None:
        rng = random.Random(0)
        self.store = (folder / "store").as_uri()
        table = {
            "URL": [f"http://127.0.0.1/{number}" for number in range(num_rows)],
            "TEXT": [rng.randbytes(950).hex() for _ in range(num_rows)],
        }
        pq.write_table(pa.table(table), folder / "rows.parquet")
        known = {
            "metadata": [str(folder / "rows.parquet")], "partitions": 4,
            "captions": {"personal_data": "off", "clean": {"markup": False}},
        }  # fmt: skip
        self.config = CurationConfig.model_validate(known)

    def run(self, cluster: ClusterConfig, **environment: str) -> CurationResult:
        sessions: list[SparkSession] = []

        def spark() -> SparkSession:
            sessions.append(spark_session("faults", cluster, environment))
            return sessions[-1]

        try:
            return curate("d", self.config, self.store, spark, environment)
        finally:
            for session in sessions:
                stop_spark(session)


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Job:
    monkeypatch.setenv("ATELIER_HOME", str(tmp_path / "home"))
    return Job(tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("master", ["local[2,4]", "local[2]"])
def test_every_task_fails_once_and_counts_are_exact(job: Job, tmp_path: Path, master: str) -> None:
    once = tmp_path / "once"
    once.mkdir()
    cluster = ClusterConfig(spark_master=master, spark_properties=FAILING)
    result = job.run(cluster, FAIL_ONCE=str(once))
    failed = {path.name for path in once.iterdir()}
    assert {f"staged-{number:05d}" for number in range(4)} <= failed
    assert len(failed) >= 9  # and those that read and write
    assert result.counts == {"rows_in": ROWS, "committed": 0, "rejected": ROWS, "failed": 0}
    assert verify_dataset(result.manifest_uri) == []


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_partition_that_always_fails_ends_the_run_and_is_named(job: Job) -> None:
    with pytest.raises(Exception, match="in task staged-00002 of") as caught:
        job.run(ClusterConfig(spark_properties=FAILING), FAIL_ALWAYS="staged-00002")
    assert "ZeroDivisionError" in str(caught.value)
    result = job.run(ClusterConfig())  # what was done is kept, and the rest follows
    assert result.decision == "RESUME"
    assert result.counts["rejected"] == ROWS


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "tiny"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=3m", "atelier-test", str(folder)]
    if subprocess.run(command, capture_output=True, check=False).returncode != 0:
        pytest.skip("mounting a file system needs root")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_spill_disk_that_is_full_is_one_line_and_a_rerun_goes_on(
    job: Job, tiny_disk: Path
) -> None:
    with pytest.raises(UserError, match=r"No space left on device; .*spark\.local\.dir"):
        job.run(ClusterConfig(spark_properties={"spark.local.dir": str(tiny_disk)}))
    assert job.run(ClusterConfig()).counts["rejected"] == ROWS


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_jvm_that_is_killed_is_one_line_and_a_rerun_goes_on(
    job: Job, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """In the very process that had the JVM, another one does the rest."""
    from pipelines import engine

    one_thread = engine.one_thread_per_task

    def killing(spark: Any) -> None:
        one_thread(spark)
        for child in psutil.Process().children(recursive=True):
            if "java" in child.name():
                child.kill()

    with monkeypatch.context() as patch:
        patch.setattr(engine, "one_thread_per_task", killing)
        with pytest.raises(UserError, match="Spark's JVM to run until the work is done"):
            job.run(ClusterConfig())
    assert "Traceback" not in "".join(capfd.readouterr())
    assert job.run(ClusterConfig()).counts["rejected"] == ROWS


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_heap_that_is_too_small_is_one_line_with_the_setting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Far below what a recipe may ask for, which Spark only starts with when told that it tests."""
    monkeypatch.setenv("ATELIER_HOME", str(tmp_path / "home"))
    job = Job(tmp_path, num_rows=40_000)
    small = ClusterConfig(spark_properties={"spark.testing.memory": "500000000"})
    with pytest.raises(UserError, match=r"OutOf\w*Memory.*spark_driver_memory_mb"):
        job.run(small.model_copy(update={"spark_driver_memory_mb": 64}))
    assert job.run(ClusterConfig()).counts["rejected"] == 40_000
