"""Spark: spreads the tasks, retries them, and shuffles rows to where their copies are.

Two jobs. The first reads units and sends each row to its partition's task, which fetches. The
second compares the images of all partitions and writes the shards. Results are files behind
markers; what comes back through Spark is only that a task ended. Tasks are idempotent, so a retry
or a second attempt elsewhere changes nothing.
"""

from __future__ import annotations

import functools
import gc
import math
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from pipelines.build import Build, StagedMarker
from pipelines.inputs import Unit
from pipelines.units import run_units
from pipelines.workspace import one_line_errors

if TYPE_CHECKING:
    import pyarrow as pa
    from pyspark.sql import DataFrame, SparkSession

    from infra.manifest import DatasetManifest
    from pipelines.read_rows import Slots
    from pipelines.retry_images import Rounds

Batches = Iterator["pa.RecordBatch"]

_INDEXED_PER_TASK = 4
_DONE_SCHEMA = "partition int"
_KEEP_FREED_PAGES = "dirty_decay_ms:10000,muzzy_decay_ms:-1"


def fetch_images(
    spark: SparkSession,
    build: Build,
    units: Sequence[Unit],
    partitions: Sequence[int],
    companions: Sequence[Build] = (),
) -> None:
    """Read ``units`` and fetch ``partitions``; each leaves its marker, here and in companions."""
    from pipelines import read_rows as task
    from pipelines.stage_images import stage_images

    slots = task.Slots(tuple(partitions), build.num_partitions)

    def fetch(partition: int, batches: Batches) -> None:
        stage_images(build, partition, batches, companions)

    _spread(spark, build, units, slots, fetch, companions)


def _spread(
    spark: SparkSession,
    build: Build,
    units: Sequence[Unit],
    slots: Slots,
    run: Callable[[int, Batches], None],
    companions: Sequence[Build] = (),
) -> None:
    """Read ``units`` and ``run`` each of the partitions of ``slots`` with its rows."""
    from pipelines import read_rows as task

    pending = list(units)
    partitions = slots.partitions
    one_thread_per_task(spark)

    def read(batches: Batches) -> Batches:
        for batch in batches:
            for index in batch.column(0).to_pylist():
                if index == 0:
                    yield task.seeds(slots)
                yield from task.read_rows(build, pending[index], slots, companions)
        keep_imports_out_of_gc()

    def at_slot(slot: int, batches: Batches) -> int:
        run(partitions[slot], batches)
        return partitions[slot]

    with one_line_errors(build):
        numbers = spark.range(0, len(pending), 1, numPartitions=len(pending))
        rows = numbers.mapInArrow(read, _ddl(task.TRAVEL_SCHEMA))
        if partitions:
            run_by_slot(rows, len(partitions), at_slot)
        else:
            rows.write.format("noop").mode("overwrite").save()


def restore(
    spark: SparkSession, build: Build, units: Sequence[Unit], manifest: DatasetManifest
) -> None:
    """Make the working files of a finished build again, those of its version ``manifest``."""
    from pipelines import restore as task
    from pipelines.read_rows import Slots

    build.forget_markers()
    every = list(units)

    def ends(index: int) -> None:
        task.restore_ends(build, manifest, every, index)

    run_units(spark, build, len(manifest.ledger), ends)
    task.restore_empty(build, manifest, every)
    slots = Slots(tuple(range(build.num_partitions)), build.num_partitions)

    def rows(partition: int, batches: Batches) -> None:
        task.restore_rows(build, partition, batches)

    _spread(spark, build, every, slots, rows)


def retry_images(
    spark: SparkSession,
    build: Build,
    partitions: Sequence[int],
    round: int,
    companions: Rounds = (),
) -> None:
    """Fetch again what failed in passing in ``partitions``, each in a task of its own."""
    from pipelines.retry_images import retry_images as retry

    pending = list(partitions)
    run_units(spark, build, len(pending), lambda n: retry(build, pending[n], round, companions))


def write_shards(spark: SparkSession, build: Build, partitions: Sequence[int]) -> None:
    """Find images that several partitions have, and write the shards of ``partitions``."""
    import polars as pl
    from pyspark.sql import functions as sf

    from pipelines import write_shards as task
    from pipelines.duplicates import IMAGES, duplicates_among
    from pipelines.references import find_references, reference_images

    pending = list(partitions)
    one_thread_per_task(spark)
    slot_of = {partition: slot for slot, partition in enumerate(pending)}

    def index(batches: Batches) -> Batches:
        for batch in batches:
            for partition in batch.column(0).to_pylist():
                images = task.staged_images(build, partition, slot_of.get(partition, -1))
                yield from images.to_arrow().to_batches()
        keep_imports_out_of_gc()

    def write(slot: int, batches: Batches) -> int:
        named = pl.concat([pl.DataFrame(batch) for batch in batches])
        task.write_shards(build, pending[slot], named.drop("slot").drop_nulls("sample_id"))
        return pending[slot]

    with one_line_errors(build):
        # One row per slot that names no duplicate: every partition's task gets to run.
        slots = spark.range(len(pending)).select(sf.col("id").cast("int").alias("slot"))
        no_duplicate = [f"cast(null as string) as {n}" for n in ("sample_id", "reason", "detail")]
        seeds = slots.selectExpr("slot", *no_duplicate)
        asked = build.config.duplicates
        references = find_references(build.config)
        if references or asked.compares_images:
            num_tasks = math.ceil(build.num_partitions / _INDEXED_PER_TASK)
            every = spark.range(0, build.num_partitions, 1, numPartitions=num_tasks)
            images = every.mapInArrow(index, IMAGES)
            staged = build.read_all(StagedMarker, build.num_partitions).values()
            num_images = sum(each.rows.num_rows for each in staged)
            if references:
                images = images.union(reference_images(spark, build, references))
                num_images += sum(each.num_images for each in references)
            found = duplicates_among(images, build.config, num_images)
            seeds = seeds.union(found.where("slot >= 0"))
        run_by_slot(seeds, len(pending), write)


def one_thread_per_task(spark: SparkSession) -> None:
    """Spark runs a task per core; threads of Polars' own would only wait for one another.

    Polars' allocator keeps what it freed for some seconds, not half of one: the next batch takes it
    over, where new pages would cost a fault each.
    """
    environment = spark.sparkContext.environment
    environment.setdefault("POLARS_MAX_THREADS", "1")
    environment.setdefault("_RJEM_MALLOC_CONF", _KEEP_FREED_PAGES)


def run_by_slot(rows: DataFrame, num_slots: int, run: Callable[[int, Batches], int]) -> None:
    """Send each row to the task of its ``slot`` and wait until all have run."""

    def at_slot(batches: Batches) -> Batches:
        import pyarrow as pa
        from pyspark import TaskContext

        context = TaskContext.get()
        if context is None:
            raise RuntimeError("not inside a Spark task")
        partition = run(context.partitionId(), batches)
        keep_imports_out_of_gc()
        yield pa.RecordBatch.from_pydict({"partition": pa.array([partition], pa.int32())})

    done = rows.repartitionById(num_slots, "slot").mapInArrow(at_slot, _DONE_SCHEMA).collect()
    if len(done) != num_slots:
        raise RuntimeError(f"{len(done)} tasks ran for {num_slots} partitions")


@functools.cache
def keep_imports_out_of_gc() -> None:
    """Spark's Python workers collect garbage after every task, 0.1 s with all we import.

    What is alive after the first task stays alive; collections need not look at it again.
    """
    gc.collect()
    gc.freeze()


def _ddl(schema: pa.Schema) -> str:
    names = {"int32": "int", "bool": "boolean"}
    return ", ".join(
        f"`{field.name}` {names.get(str(field.type), str(field.type))}" for field in schema
    )
