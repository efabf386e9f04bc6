"""Independent units of work as Spark tasks, and how far they are, seen from their markers."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

from infra import storage
from infra.errors import UserError
from infra.spark_daemon import before_workers
from pipelines.workspace import Workspace, one_line_errors

if TYPE_CHECKING:
    import pyarrow as pa
    from pyspark.sql import SparkSession

ProgressCallback = Callable[[int, int], None]
POLL_SECONDS = 0.5

logger = logging.getLogger(__name__)


def run_units(
    spark: SparkSession,
    workspace: Workspace,
    num_units: int,
    run: Callable[[int], None],
    before: str | None = None,
) -> None:
    """Call ``run(0) … run(num_units - 1)``, each in a Spark task of its own; results are files.

    ``before`` names what workers share, as ``module:function`` (``infra.spark_daemon``).
    """

    def work(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        for batch in batches:
            for index in batch.column(0).to_pylist():
                run(index)
            yield batch

    with one_line_errors(workspace), before_workers(spark, before):
        numbers = spark.range(0, num_units, 1, numPartitions=num_units)
        numbers.mapInArrow(work, "id long").write.format("noop").mode("overwrite").save()


@contextmanager
def watching(
    sizes: Mapping[str, int], total: int, progress: ProgressCallback | None
) -> Iterator[None]:
    """Call ``progress(done, total)`` now and then, and once more when all went well.

    ``sizes`` has, for each marker's address that is still to be written, what it stands for; the
    rest of ``total`` is done already. The markers lie in one folder.
    """
    if progress is None or not sizes:
        yield
        return
    stopped = threading.Event()
    arguments = (sizes, total, progress, stopped)
    thread = threading.Thread(target=_watch, args=arguments, name="watch", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stopped.set()
        thread.join()
    progress(total, total)


def _watch(
    sizes: Mapping[str, int], total: int, progress: ProgressCallback, stopped: threading.Event
) -> None:
    folder = next(iter(sizes)).rpartition("/")[0]
    before = total - sum(sizes.values())
    while not stopped.wait(POLL_SECONDS):
        try:
            done = sum(sizes.get(info.uri, 0) for info in storage.list_objects(folder))
        except UserError as error:  # the job itself reports what is wrong with storage
            logger.debug("progress: %s", error)
            continue
        progress(before + done, total)
