"""Metadata at speed: filter and rewrite LAION-shaped parquet, ours through Spark and two peers.

Three jobs, the same for everyone:
  rewrite  read, filter with the thresholds of 256 px, write the rows that stay, two in five
  select   the same with those of later stages, 512 px and a score of 6: one row in a hundred
  account  the same, and to every row its sha256 identity, and the rejected rows with their reason
           and scores written to a ledger of their own: what our task does with a unit it is new to

Ours is the code of the reading task inside Spark tasks: for *rewrite* and *select* the way it reads
a unit whose ledger is written already, for *account* the whole task, with its slots, its own ledger
and markers. Polars streams on the same two cores, with the same sha256 from polars-hash, and pushes
its filters into the scan. Spark SQL is plain DataFrame code with its own sha2, in the same session:
two tasks at once, its vectorised reader, a heap of 4 GiB, the JVM's own compiler settings; it reads
once for the kept rows and once for the ledger. Everyone writes the same columns of the same types,
snappy for what stays and zstd for the ledger, and what they wrote is compared. Give pytest a
`--basetemp` in memory where disks are slow: all three write gigabytes.

A rate is the slope between two sizes, so that starting up costs nobody anything; planning, which
digests the inputs once, is not part of ours. The three take turns at each size, and a ratio of CPU
seconds, over all processes, is given beside that of rates: other work on the machine disturbs it
less. Rows repeat: files of 500 000 distinct rows are linked as often as the sizes ask.

ATELIER_BENCH_ROWS sets the sizes, 8000000,40000000 by default, ATELIER_BENCH_JOBS the jobs, and
ATELIER_BENCH_PEERS the peers. Polars runs in the driver's process: only without it are the driver's
megabytes ours.
"""

from __future__ import annotations

import os
import resource
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from infra.sessions import ClusterConfig, spark_session, stop_spark

if TYPE_CHECKING:
    import polars as pl
    import pyarrow as pa
    from pyspark.sql import DataFrame, SparkSession

pytestmark = pytest.mark.bench

SIZES = [int(size) for size in os.environ.get("ATELIER_BENCH_ROWS", "8000000,40000000").split(",")]
JOBS = os.environ.get("ATELIER_BENCH_JOBS", "rewrite,select,account").split(",")
PEERS = os.environ.get("ATELIER_BENCH_PEERS", "polars,sql").split(",")
WARM_UP_ROWS = 2_000_000
HEAP_MB = 4096
ROWS_PER_FILE = 500_000
NUM_DISTINCT_FILES = 4
MAX_RATIO, MAX_PROB = 3.0, 0.5


@dataclass(frozen=True)
class Bounds:
    """What rows must have to stay, beside an aspect ratio and probabilities alike for all jobs."""

    min_side_px: int = 256
    min_score: float = 4.5

    def filters(self) -> dict[str, Any]:
        """As a recipe has them."""
        return {
            "min_width_px": self.min_side_px, "min_height_px": self.min_side_px,
            "max_aspect_ratio": MAX_RATIO, "min_aesthetic_score": self.min_score,
            "max_watermark_prob": MAX_PROB, "max_unsafe_prob": MAX_PROB, "max_caption_chars": None,
        }  # fmt: skip

    def sql(self) -> str:
        """As Spark SQL has them."""
        return (
            f"WIDTH >= {self.min_side_px} and HEIGHT >= {self.min_side_px} and "
            f"greatest(WIDTH, HEIGHT) / least(WIDTH, HEIGHT) <= {MAX_RATIO} and "
            f"AESTHETIC_SCORE >= {self.min_score} and "
            f"pwatermark <= {MAX_PROB} and punsafe <= {MAX_PROB}"
        )


BOUNDS = {"rewrite": Bounds(), "select": Bounds(512, 6.0), "account": Bounds()}
# What everyone writes of a kept row, numbers as int32 and double; the file's name of each.
COLUMNS = {
    "url": "URL", "caption": "TEXT", "width_px": "WIDTH", "height_px": "HEIGHT",
    "clip_similarity": "similarity", "unsafe_prob": "punsafe", "watermark_prob": "pwatermark",
    "aesthetic_score": "AESTHETIC_SCORE",
}  # fmt: skip
NUMBERS = list(COLUMNS)[2:]
Job = Callable[[Path, Path], "Cost"]


@dataclass(frozen=True)
class Cost:
    """What one run of a job took: wall clock, and CPU over this process and all below it."""

    seconds: float
    cpu_seconds: float


class Meter:
    """Runs from when it is made."""

    def __init__(self) -> None:
        self._cpu_before = cpu_seconds()
        self._started_at = time.perf_counter()

    def cost(self) -> Cost:
        seconds = time.perf_counter() - self._started_at
        cpu = {pid: now - self._cpu_before.get(pid, 0.0) for pid, now in cpu_seconds().items()}
        return Cost(seconds, sum(cpu.values()))


def cpu_seconds() -> dict[int, float]:
    """CPU time so far of this process and of each below it."""
    import psutil

    process = psutil.Process()
    times = {each.pid: each.cpu_times() for each in (process, *process.children(recursive=True))}
    return {pid: spent.user + spent.system for pid, spent in times.items()}


def laion_rows(num_rows: int, seed: int) -> pl.DataFrame:
    """Rows in the schema of LAION's v2 aesthetics, with texts as long as LAION's are."""
    import numpy as np
    import polars as pl

    rng = np.random.default_rng(seed)
    letters = np.frombuffer(b"abcdefghijklmnopqrstuvwxyz", np.uint8)
    words = pl.Series([bytes(rng.choice(letters, n)).decode() for n in rng.integers(3, 9, 5000)])
    picked = {f"w{i}": words.gather(rng.integers(0, 5000, num_rows)) for i in range(12)}
    number = pl.Series(rng.integers(0, 1 << 62, num_rows)).cast(pl.String)
    url = ["https://i.", pl.col("w0"), ".example/", pl.col("w1"), "/", number, ".jpg"]
    return pl.DataFrame(picked).select(
        pl.concat_str([pl.lit(p) if isinstance(p, str) else p for p in url]).alias("URL"),
        pl.concat_str([pl.col(f"w{i}") for i in range(2, 12)], separator=" ").alias("TEXT"),
        WIDTH=pl.Series(rng.lognormal(6.2, 0.6, num_rows).astype(np.int32)),
        HEIGHT=pl.Series(rng.lognormal(6.1, 0.6, num_rows).astype(np.int32)),
        similarity=pl.Series(rng.normal(0.32, 0.03, num_rows)),
        hash=pl.Series(rng.integers(-(2**62), 2**62, num_rows)),
        punsafe=pl.Series(rng.beta(0.3, 6, num_rows).astype(np.float32)),
        pwatermark=pl.Series(rng.beta(0.5, 2, num_rows).astype(np.float32)),
        AESTHETIC_SCORE=pl.Series(rng.normal(4.9, 0.7, num_rows).astype(np.float32)),
    )


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Path]]:
    """A folder of metadata to warm up with, and one per size."""
    root = tmp_path_factory.mktemp("laion")
    originals = []
    for index in range(NUM_DISTINCT_FILES):
        path = root / f"original-{index}.parquet"
        laion_rows(ROWS_PER_FILE, index).write_parquet(
            path, compression="snappy", row_group_size=ROWS_PER_FILE // 2
        )
        originals.append(path)
    folders: list[Path] = []
    for size in (WARM_UP_ROWS, *SIZES):
        folder = root / str(len(folders))
        folder.mkdir()
        for index in range(size // ROWS_PER_FILE):
            os.link(originals[index % NUM_DISTINCT_FILES], folder / f"part-{index:05d}.parquet")
        folders.append(folder)
    yield folders
    shutil.rmtree(root)


@pytest.fixture(scope="module")
def spark(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SparkSession]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ATELIER_HOME", str(tmp_path_factory.mktemp("home")))
        # Our default options start fast and compile little; Spark SQL gets the JVM's own.
        cluster = ClusterConfig(spark_driver_memory_mb=HEAP_MB, spark_java_options="")
        session = spark_session("benchmark", cluster, {})
        yield session
        stop_spark(session)


# --- ours ----------------------------------------------------------------------------------------


def ours(spark: SparkSession, bounds: Bounds, *, account: bool) -> Job:
    from pipelines.config import CurationConfig
    from pipelines.engine import keep_imports_out_of_gc, one_thread_per_task
    from pipelines.plan import plan_curation
    from pipelines.read_rows import Slots, judged_batches, read_rows

    def run(folder: Path, out: Path) -> Cost:
        known = {"metadata": [str(folder)], "filters": bounds.filters()}
        config = CurationConfig.model_validate(known)
        plan = plan_curation("bench", config, out.as_uri())
        build, units = plan.build, list(plan.units)
        slots = Slots(plan.partitions, build.num_partitions)
        meter = Meter()
        one_thread_per_task(spark)

        def write(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
            import resource

            import polars as pl
            import pyarrow as pa
            import pyarrow.parquet as pq

            for batch in batches:
                for index in batch.column(0).to_pylist():
                    path, unit, writer = out / f"kept-{index:05d}.parquet", units[index], None
                    if account:
                        names = ["sample_id", *COLUMNS]
                        kept = (pa.table(r).select(names) for r in read_rows(build, unit, slots))
                    else:
                        judged = judged_batches(unit, config, without_rejected=True)
                        stays = pl.col("reason").is_null()
                        kept = (
                            rows.filter(stays).select(list(COLUMNS)).to_arrow()
                            for _, _, rows in judged
                        )
                    for table in kept:
                        writer = writer or pq.ParquetWriter(
                            path, table.schema, compression="snappy", use_dictionary=False
                        )
                        writer.write_table(table)
                    if writer is not None:
                        writer.close()
                    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
                    columns = {"unit": pa.array([index], pa.int32()), "peak": pa.array([peak])}
                    yield pa.RecordBatch.from_pydict(columns)
            keep_imports_out_of_gc()

        numbers = spark.range(0, len(units), 1, numPartitions=len(units))
        done = numbers.mapInArrow(write, "unit int, peak bigint").collect()
        assert len(done) == len(units)
        cost = meter.cost()
        worker = max(row["peak"] for row in done) / 1e3
        driver = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
        print(f"\nbench  {plan.rows_in:>12,} rows: worker {worker:.0f} MB, driver {driver:.0f} MB")
        return cost

    return run


# --- peers ---------------------------------------------------------------------------------------


def polars_alone(bounds: Bounds, *, account: bool) -> Job:
    import polars as pl
    import polars_hash

    width, height = pl.col("WIDTH"), pl.col("HEIGHT")
    ratio = pl.max_horizontal(width, height) / pl.min_horizontal(width, height)
    is_small = (width < bounds.min_side_px) | (height < bounds.min_side_px)
    reason = pl.coalesce(
        pl.when(is_small).then(pl.lit("too_small")),
        pl.when(ratio > MAX_RATIO).then(pl.lit("aspect_ratio")),
        pl.when(pl.col("AESTHETIC_SCORE") < bounds.min_score).then(pl.lit("low_aesthetic_score")),
        pl.when(pl.col("pwatermark") > MAX_PROB).then(pl.lit("watermarked")),
        pl.when(pl.col("punsafe") > MAX_PROB).then(pl.lit("unsafe")),
    ).alias("reason")
    text = polars_hash.concat_str("URL", pl.lit("\n"), "TEXT")
    sample_id = text.chash.sha2_256().str.head(32).alias("sample_id")
    columns = [pl.col(theirs).alias(name) for name, theirs in COLUMNS.items()]
    columns = columns[:4] + [column.cast(pl.Float64) for column in columns[4:]]

    def run(folder: Path, out: Path) -> Cost:
        meter = Meter()
        rows = pl.scan_parquet(folder / "*.parquet")
        if account:
            rows = rows.select(*columns, reason, sample_id)
            kept = rows.filter(pl.col("reason").is_null()).drop("reason")
            rejected = rows.filter(pl.col("reason").is_not_null()).drop("caption")
            ledger = rejected.sink_parquet(
                out / "ledger.parquet", compression="zstd", compression_level=1, lazy=True
            )
        else:
            kept = rows.filter(is_kept(bounds)).select(columns)
        kept_sink = kept.sink_parquet(out / "kept.parquet", compression="snappy", lazy=True)
        pl.collect_all([kept_sink, ledger] if account else [kept_sink], engine="streaming")
        return meter.cost()

    return run


def spark_sql(spark: SparkSession, bounds: Bounds, *, account: bool) -> Job:
    from pyspark.sql import functions as sf

    def judged(folder: Path) -> DataFrame:
        rows = spark.read.parquet(str(folder))
        width, height = sf.col("WIDTH"), sf.col("HEIGHT")
        ratio = sf.greatest(width, height) / sf.least(width, height)
        is_small = (width < bounds.min_side_px) | (height < bounds.min_side_px)
        reason = sf.coalesce(
            sf.when(is_small, "too_small"),
            sf.when(ratio > MAX_RATIO, "aspect_ratio"),
            sf.when(sf.col("AESTHETIC_SCORE") < bounds.min_score, "low_aesthetic_score"),
            sf.when(sf.col("pwatermark") > MAX_PROB, "watermarked"),
            sf.when(sf.col("punsafe") > MAX_PROB, "unsafe"),
        )
        return rows.withColumn("reason", reason) if account else rows.where(bounds.sql())

    columns = [sf.col(theirs).alias(name) for name, theirs in COLUMNS.items()]
    columns = columns[:4] + [sf.col(COLUMNS[n]).cast("double").alias(n) for n in NUMBERS[2:]]

    def run(folder: Path, out: Path) -> Cost:
        meter = Meter()
        rows = judged(folder)
        if account:
            text = sf.concat(sf.col("URL"), sf.lit("\n"), sf.col("TEXT"))
            sample_id = sf.substring(sf.sha2(text, 256), 1, 32).alias("sample_id")
            rejected = rows.where("reason is not null").select(*columns, "reason", sample_id)
            rejected = rejected.drop("caption")
            rejected.write.option("compression", "zstd").parquet(str(out / "ledger"))
            kept = rows.where("reason is null").select(*columns, sample_id)
        else:
            kept = rows.select(*columns)
        kept.write.option("compression", "snappy").parquet(str(out / "kept"))
        return meter.cost()

    return run


def written(pattern: str) -> tuple[float, ...]:
    """Rows, bytes of text and sums of the numbers of a job's kept rows."""
    import polars as pl

    texts = [pl.col(name).str.len_bytes().sum().cast(pl.Float64) for name in ("url", "caption")]
    numbers = [pl.col(name).cast(pl.Float64).sum() for name in NUMBERS]
    rows = pl.scan_parquet(pattern).select(pl.len().cast(pl.Float64), *texts, *numbers)
    return rows.collect(engine="streaming").row(0)


@pytest.mark.parametrize("job", JOBS)
@pytest.mark.timeout(7200)
def test_filter_and_rewrite(
    job: str, folders: list[Path], spark: SparkSession, tmp_path: Path
) -> None:
    """What was written agrees; the ratios are printed."""
    account, bounds = job == "account", BOUNDS[job]
    jobs = {
        "ours": ours(spark, bounds, account=account),
        "polars": polars_alone(bounds, account=account),
        "sql": spark_sql(spark, bounds, account=account),
    }
    jobs = {who: run for who, run in jobs.items() if who == "ours" or who in PEERS}
    costs: dict[str, list[Cost]] = {who: [] for who in jobs}
    for folder in folders:  # the first one warms up
        for who, run in jobs.items():
            out = tmp_path / who
            out.mkdir()
            costs[who].append(run(folder, out))
            print(f"\nbench  {job} {who:<8} {costs[who][-1]}")
            kept = f"{out}/kept*" + "/*.parquet" * (who == "sql")
            assert written(kept) == expected(folder, bounds), who
            shutil.rmtree(out)
    show(job, costs)


def show(job: str, costs: dict[str, list[Cost]]) -> None:
    """Rates from slopes, and ours beside each peer's."""
    wall, cpu = {}, {}
    for who, (_, small, large) in costs.items():
        num_rows = SIZES[1] - SIZES[0]
        wall[who] = (large.seconds - small.seconds) / num_rows
        cpu[who] = (large.cpu_seconds - small.cpu_seconds) / num_rows
        rate = f"{1e-6 / wall[who]:6.2f} M rows/s"
        print(f"bench  {job:<8} {who:<8} {rate}, {cpu[who] * 1e6:.2f} us of CPU a row")
    for peer in [who for who in costs if who != "ours"]:
        by_cpu = cpu[peer] / cpu["ours"]
        print(f"bench  {job}: ours / {peer} {wall[peer] / wall['ours']:.2f}, by CPU {by_cpu:.2f}")


def is_kept(bounds: Bounds) -> pl.Expr:
    """The filters as one condition, for the peers; no value here is unknown."""
    import polars as pl

    width, height = pl.col("WIDTH"), pl.col("HEIGHT")
    ratio = pl.max_horizontal(width, height) / pl.min_horizontal(width, height)
    large = (width >= bounds.min_side_px) & (height >= bounds.min_side_px) & (ratio <= MAX_RATIO)
    sound = (pl.col("pwatermark") <= MAX_PROB) & (pl.col("punsafe") <= MAX_PROB)
    return large & sound & (pl.col("AESTHETIC_SCORE") >= bounds.min_score)


def expected(folder: Path, bounds: Bounds) -> Any:
    """What ``written`` finds when the filters are asked of the files themselves."""
    import polars as pl

    kept = pl.scan_parquet(folder / "*.parquet").filter(is_kept(bounds))
    texts = [pl.col(COLUMNS[n]).str.len_bytes().sum().cast(pl.Float64) for n in ("url", "caption")]
    numbers = [pl.col(COLUMNS[name]).cast(pl.Float64).sum() for name in NUMBERS]
    rows = kept.select(pl.len().cast(pl.Float64), *texts, *numbers).collect(engine="streaming")
    return pytest.approx(rows.row(0))
