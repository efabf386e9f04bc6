"""What a report costs: a ledger's counts in one bounded pass, beside a pass that holds it whole."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from infra import storage
from infra.digests import sha256_file
from infra.manifest import FileEntry, ledger_path
from pipelines.ledger import LEDGER_SCHEMA, LedgerFile

pytestmark = [pytest.mark.bench, pytest.mark.timeout(1200)]

NUM_ROWS = 4_000_000
_OURS = """
import sys, time, resource
from pipelines.ledger_counts import CountingJob
from infra.manifest import FileEntry
root, path, num_bytes, sha256, num_rows = sys.argv[1:]
job = CountingJob(root, (FileEntry(path, int(num_bytes), sha256, int(num_rows)),))
started = time.monotonic()
job.count(0)
print(time.monotonic() - started, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""
_WHOLE = """
import sys, time, resource
import polars as pl
from pipelines.ledger_counts import _COLUMNS, counts_of_rows
from infra.manifest import FileEntry
root, path, num_bytes, sha256, num_rows = sys.argv[1:]
started = time.monotonic()
counts_of_rows(pl.read_parquet(root.removeprefix("file://") + "/" + path, columns=_COLUMNS))
print(time.monotonic() - started, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def ledger_of(folder: Path, num_rows: int) -> tuple[str, FileEntry]:
    """A ledger file like that of metadata alone: many hosts, most rows rejected."""
    rng = np.random.default_rng(0)
    folder.mkdir()
    root = storage.file_uri(folder / "d")
    with LedgerFile(folder, "bench") as file:
        for first in range(0, num_rows, 500_000):
            size = min(500_000, num_rows - first)
            hosts = (rng.pareto(0.8, size) * 3).astype(np.int64) % 300_000
            kind = rng.integers(0, 10, size)
            numbers = np.arange(first, first + size)
            rows = pl.DataFrame(
                {
                    "number": numbers,
                    "host": hosts,
                    "kind": kind,
                    "width_px": rng.integers(50, 3000, size, dtype=np.int32),
                    "height_px": rng.integers(50, 3000, size, dtype=np.int32),
                    "clip_similarity": rng.uniform(0.1, 0.45, size),
                    "unsafe_prob": rng.uniform(0, 1, size),
                    "watermark_prob": rng.uniform(0, 1, size),
                    "aesthetic_score": rng.normal(5, 1, size),
                }
            ).with_columns(
                pl.format("{}", pl.col("number").cast(pl.String).str.zfill(32)).alias("sample_id"),
                pl.format("http://h{}.example/images/{}.jpg", "host", "number").alias("url"),
                pl.lit("en").alias("language"),
                pl.lit("laion").alias("source"),
                pl.when(pl.col("kind") < 3)
                .then(pl.lit("committed"))
                .otherwise(pl.lit("rejected"))
                .alias("disposition"),
                pl.when(pl.col("kind") >= 3)
                .then(pl.lit("too_small"))
                .otherwise(pl.lit(None, pl.String))
                .alias("reason"),
            )
            empty = pl.DataFrame(pl.from_arrow(LEDGER_SCHEMA.empty_table()))
            file.add(pl.concat([empty, rows.drop("number", "host", "kind")], how="diagonal"))
        entry = file.publish(root)
    assert entry is not None
    assert entry.path == ledger_path(sha256_file(folder / "d" / entry.path))
    return root, entry


def measured(code: str, root: str, entry: FileEntry) -> tuple[float, float]:
    """Seconds, and MB at the most."""
    arguments = [root, entry.path, str(entry.num_bytes), entry.sha256, str(entry.num_rows)]
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True
    )
    seconds, peak_kb = done.stdout.split()
    return float(seconds), int(peak_kb) / 1000


def test_counting_a_ledger(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = []
    for num_rows in (NUM_ROWS // 4, NUM_ROWS):
        root, entry = ledger_of(tmp_path / str(num_rows), num_rows)
        ours, whole = (measured(code, root, entry) for code in (_OURS, _WHOLE))
        lines.append(
            f"{num_rows:,} rows, {entry.num_bytes / 1e6:.0f} MB: in batches "
            f"{num_rows / ours[0]:,.0f} rows/s and {ours[1]:,.0f} MB; whole in memory "
            f"{num_rows / whole[0]:,.0f} rows/s and {whole[1]:,.0f} MB; "
            f"ratio {ours[0] / whole[0]:.2f} of the time, {ours[1] / whole[1]:.2f} of the memory"
        )
    with capsys.disabled():
        print("\n" + "\n".join(lines))
