"""What workers share is loaded once, before they are forked, and never in Spark's way."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from infra.sessions import ClusterConfig, spark_session, stop_spark
from infra.spark_daemon import before_workers, without_archives

if TYPE_CHECKING:
    import pyarrow as pa


def loaded(module: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """A process in which ``shared:load`` is called as the daemon calls it."""
    (folder / "shared.py").write_text(module)
    code = "from infra.spark_daemon import load_shared; load_shared('shared:load'); print('port')"
    command = [sys.executable, "-c", code]
    return subprocess.run(
        command, capture_output=True, text=True, check=True, env={"PYTHONPATH": str(folder)}
    )


def test_what_is_loaded_does_not_speak_to_spark(tmp_path: Path) -> None:
    module = "import os\ndef load():\n    print('hello')\n    os.system('echo from a child')"
    done = loaded(module, tmp_path)
    assert done.stdout == "port\n"
    assert "hello" in done.stderr
    assert "from a child" in done.stderr


def test_what_cannot_be_loaded_is_left_to_the_tasks(tmp_path: Path) -> None:
    done = loaded("def load():\n    raise ImportError('no such library')", tmp_path)
    assert done.stdout == "port\n"
    assert "no such library" in done.stderr


def test_archives_stay_where_nothing_else_has_pyspark() -> None:
    folder, zipped = "/spark/python", "/spark/python/lib/pyspark.zip"
    assert without_archives([folder, zipped]) == [folder, zipped]
    archives = [zipped, "/spark/python/lib/py4j-0.10.9.9-src.zip", "/spark/jars/spark-core.jar"]
    assert without_archives([folder, *archives, *sys.path]) == [folder, *sys.path]


@pytest.mark.slow
def test_workers_are_forked_after_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATELIER_HOME", str(tmp_path / "home"))

    def is_tracing(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        import tracemalloc

        import pyarrow

        for batch in batches:
            traced = [int(tracemalloc.is_tracing())] * batch.num_rows
            yield pyarrow.RecordBatch.from_pydict({"id": pyarrow.array(traced, pyarrow.int64())})

    spark = spark_session("daemon", ClusterConfig(), {})
    try:

        def seen() -> list[int]:
            numbers = spark.range(0, 4, 1, numPartitions=4)
            return [row.id for row in numbers.mapInArrow(is_tracing, "id long").collect()]

        assert seen() == [0] * 4
        with before_workers(spark, "tracemalloc:start"):
            assert seen() == [1] * 4
        assert seen() == [0] * 4
    finally:
        stop_spark(spark)
