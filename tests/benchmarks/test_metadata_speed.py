"""Metadata at speed: filter and rewrite LAION-shaped parquet, ours through Spark and two peers.

Two jobs, the same for everyone:
  rewrite  read, filter with the paper's thresholds, write the rows that stay
  account  the same, and to every row its sha256 identity, and the rejected rows with their reason
           and scores written to a ledger of their own: what our task really does

Ours is the code of the reading task inside Spark tasks. Polars streams on the same cores; it has no
sha256, so it maps Python's over its batches. Spark SQL is plain DataFrame code with its own sha2.
A rate is the slope between two sizes, so that starting up costs nobody anything. Rows repeat: files
of 500 000 distinct rows are linked as often as the sizes ask.

ATELIER_BENCH_ROWS sets the sizes, 8000000,40000000 by default.
"""

from __future__ import annotations

import os
import resource
import shutil
import time
from collections.abc import Callable, Iterator
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
ROWS_PER_FILE = 500_000
NUM_DISTINCT_FILES = 4
FILTERS: dict[str, Any] = {
    "min_width_px": 256, "min_height_px": 256, "max_aspect_ratio": 3.0, "min_aesthetic_score": 4.5,
    "max_watermark_prob": 0.5, "max_unsafe_prob": 0.5, "max_caption_chars": None,
}  # fmt: skip
KEPT_SQL = (
    "WIDTH >= 256 and HEIGHT >= 256 and greatest(WIDTH, HEIGHT) / least(WIDTH, HEIGHT) <= 3 "
    "and AESTHETIC_SCORE >= 4.5 and pwatermark <= 0.5 and punsafe <= 0.5"
)
Job = Callable[[Path, Path], int]


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
    """One folder of metadata per size."""
    root = tmp_path_factory.mktemp("laion")
    originals = []
    for index in range(NUM_DISTINCT_FILES):
        path = root / f"original-{index}.parquet"
        laion_rows(ROWS_PER_FILE, index).write_parquet(
            path, compression="snappy", row_group_size=ROWS_PER_FILE // 2
        )
        originals.append(path)
    folders = []
    for size in SIZES:
        folder = root / str(size)
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
        session = spark_session("benchmark", ClusterConfig(), {})
        yield session
        stop_spark(session)


# --- ours ----------------------------------------------------------------------------------------


def ours(spark: SparkSession, *, account: bool) -> Job:
    from pipelines.config import CurationConfig
    from pipelines.engine import keep_imports_out_of_gc, one_thread_per_task
    from pipelines.plan import plan_curation
    from pipelines.read_rows import Slots, judged_batches, read_rows

    def run(folder: Path, out: Path) -> int:
        config = CurationConfig.model_validate({"metadata": [str(folder)], "filters": FILTERS})
        plan = plan_curation("bench", config, out.as_uri())
        build, units = plan.build, list(plan.units)
        slots = Slots(plan.partitions, build.num_partitions)
        started_at = time.perf_counter()
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
                        kept = (pa.table(rows) for rows in read_rows(build, unit, slots))
                    else:
                        judged = judged_batches(unit, config)
                        kept = (
                            rows.filter(pl.col("reason").is_null()).drop("reason").to_arrow()
                            for _, _, rows in judged
                        )
                    for table in kept:
                        writer = writer or pq.ParquetWriter(
                            path, table.schema, use_dictionary=["source", "aesthetic_scale"]
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
        seconds[run_name(account, "ours")].append(time.perf_counter() - started_at)
        worker = max(row["peak"] for row in done) / 1e3
        driver = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
        print(f"\nbench  {plan.rows_in:>12,} rows: worker {worker:.0f} MB, driver {driver:.0f} MB")
        return kept_rows(out / "kept-*.parquet")

    return run


# --- peers ---------------------------------------------------------------------------------------


def polars_alone(*, account: bool) -> Job:
    import hashlib

    import polars as pl

    width, height = pl.col("WIDTH"), pl.col("HEIGHT")
    ratio = pl.max_horizontal(width, height) / pl.min_horizontal(width, height)
    reason = pl.coalesce(
        pl.when((width < 256) | (height < 256)).then(pl.lit("too_small")),
        pl.when(ratio > 3.0).then(pl.lit("aspect_ratio")),
        pl.when(pl.col("AESTHETIC_SCORE") < 4.5).then(pl.lit("low_aesthetic_score")),
        pl.when(pl.col("pwatermark") > 0.5).then(pl.lit("watermarked")),
        pl.when(pl.col("punsafe") > 0.5).then(pl.lit("unsafe")),
    ).alias("reason")

    def identities(texts: pl.Series) -> pl.Series:
        sha256 = hashlib.sha256
        return pl.Series([sha256(text).hexdigest()[:32] for text in texts.to_list()])

    def run(folder: Path, out: Path) -> int:
        started_at = time.perf_counter()
        rows = pl.scan_parquet(folder / "*.parquet")
        kept = rows.filter(is_kept())
        if account:
            rows = rows.with_columns(reason)
            text = pl.concat_str("URL", pl.lit("\n"), "TEXT").cast(pl.Binary)
            rows = rows.with_columns(
                text.map_batches(identities, return_dtype=pl.String, is_elementwise=True).alias(
                    "sample_id"
                )
            )
            kept = rows.filter(pl.col("reason").is_null())
            rejected = rows.filter(pl.col("reason").is_not_null()).drop("TEXT")
            ledger = rejected.sink_parquet(
                out / "ledger.parquet", compression="zstd", compression_level=1, lazy=True
            )
        kept_sink = kept.sink_parquet(out / "kept.parquet", compression="snappy", lazy=True)
        pl.collect_all([kept_sink, ledger] if account else [kept_sink], engine="streaming")
        seconds[run_name(account, "polars")].append(time.perf_counter() - started_at)
        return kept_rows(out / "kept.parquet")

    return run


def spark_sql(spark: SparkSession, *, account: bool) -> Job:
    from pyspark.sql import functions as sf

    def judged(folder: Path) -> DataFrame:
        rows = spark.read.parquet(str(folder))
        width, height = sf.col("WIDTH"), sf.col("HEIGHT")
        ratio = sf.greatest(width, height) / sf.least(width, height)
        reason = sf.coalesce(
            sf.when((width < 256) | (height < 256), "too_small"),
            sf.when(ratio > 3.0, "aspect_ratio"),
            sf.when(sf.col("AESTHETIC_SCORE") < 4.5, "low_aesthetic_score"),
            sf.when(sf.col("pwatermark") > 0.5, "watermarked"),
            sf.when(sf.col("punsafe") > 0.5, "unsafe"),
        )
        return rows.withColumn("reason", reason)

    def run(folder: Path, out: Path) -> int:
        started_at = time.perf_counter()
        rows = judged(folder) if account else spark.read.parquet(str(folder)).where(KEPT_SQL)
        if account:
            text = sf.concat(sf.col("URL"), sf.lit("\n"), sf.col("TEXT"))
            rows = rows.withColumn("sample_id", sf.substring(sf.sha2(text, 256), 1, 32))
            rejected = rows.where("reason is not null").drop("TEXT")
            rejected.write.option("compression", "zstd").parquet(str(out / "ledger"))
            rows = rows.where("reason is null")
        rows.write.parquet(str(out / "kept"))
        seconds[run_name(account, "sql")].append(time.perf_counter() - started_at)
        return kept_rows(out / "kept" / "*.parquet")

    return run


seconds: dict[str, list[float]] = {}


def run_name(account: bool, who: str) -> str:
    return f"{'account' if account else 'rewrite'} {who}"


def kept_rows(pattern: Path) -> int:
    import polars as pl

    return int(pl.scan_parquet(pattern).select(pl.len()).collect().item())


def test_filter_and_rewrite(folders: list[Path], spark: SparkSession, tmp_path: Path) -> None:
    """Kept rows agree to the row; the ratios are printed."""
    for account in (False, True):
        jobs = {
            "ours": ours(spark, account=account),
            "polars": polars_alone(account=account),
            "sql": spark_sql(spark, account=account),
        }
        rates = {}
        for who, job in jobs.items():
            name = run_name(account, who)
            seconds[name] = []
            kept = []
            for attempt, folder in enumerate([folders[0], *folders]):  # the first one warms up
                out = tmp_path / f"{name}-{attempt}".replace(" ", "-")
                out.mkdir()
                kept.append(job(folder, out))
                shutil.rmtree(out)
            jobs_kept = kept[1:]
            _, small, large = seconds[name]
            rates[who] = (SIZES[1] - SIZES[0]) / (large - small)
            print(
                f"\nbench  {name:<20} {rates[who] / 1e6:6.2f} M rows/s  {small:.1f} {large:.1f} s"
            )
            assert jobs_kept == expected(folders), who
        title = "rewrite" if not account else "account"
        print(f"bench  {title}: ours / Polars alone {rates['ours'] / rates['polars']:.2f}")
        print(f"bench  {title}: ours / plain Spark SQL {rates['ours'] / rates['sql']:.2f}")


def is_kept() -> pl.Expr:
    """The filters as one condition, for the peers; no value here is unknown."""
    import polars as pl

    width, height = pl.col("WIDTH"), pl.col("HEIGHT")
    ratio = pl.max_horizontal(width, height) / pl.min_horizontal(width, height)
    large = (width >= 256) & (height >= 256) & (ratio <= 3.0)
    sound = (pl.col("pwatermark") <= 0.5) & (pl.col("punsafe") <= 0.5)
    return large & sound & (pl.col("AESTHETIC_SCORE") >= 4.5)


def expected(folders: list[Path]) -> list[int]:
    import polars as pl

    found = []
    for folder in folders:
        rows = pl.scan_parquet(folder / "*.parquet").filter(is_kept())
        found.append(int(rows.select(pl.len()).collect(engine="streaming").item()))
    return found
