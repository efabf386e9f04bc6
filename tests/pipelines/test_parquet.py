"""Row groups read in pieces: the same rows by either reader, from a folder and from a bucket."""

from __future__ import annotations

from pathlib import Path

import polars as pl
import pyarrow.parquet as pq
import pytest

import pipelines.parquet
from infra import storage
from infra.errors import UserError
from pipelines.parquet import parquet_batches

COLUMNS = ["URL", "all_captions", "similarity"]


@pytest.fixture
def rows() -> pl.DataFrame:
    numbers = pl.Series(range(5000))
    return pl.DataFrame(
        {
            "URL": [f"http://a.example/{'ü' * (n % 40)}{n}" if n % 97 else None for n in numbers],
            "unread": [f"x{n}" * 20 for n in numbers],
            "all_captions": [[f"caption {n}", "b"] if n % 3 else [] for n in numbers],
            "similarity": numbers * 0.25,
        }
    )  # fmt: skip


@pytest.fixture
def uri(store_uri: str, rows: pl.DataFrame, tmp_path: Path) -> str:
    path = tmp_path / "rows.parquet"
    rows.write_parquet(path, row_group_size=700, compression="snappy")
    uri = f"{store_uri}/rows.parquet"
    storage.upload(path, uri)
    return uri


def read(uri: str, groups: list[int]) -> pl.DataFrame:
    return pl.concat(pl.DataFrame(batch) for batch in parquet_batches(uri, groups, COLUMNS))


@pytest.mark.parametrize("giant_bytes", [1 << 29, 0], ids=["polars", "arrow"])
@pytest.mark.parametrize("groups", [[0], [2, 3, 4], [7], list(range(8))])
def test_neighbouring_row_groups_are_read_whole_and_alone(
    uri: str,
    rows: pl.DataFrame,
    groups: list[int],
    giant_bytes: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(pipelines.parquet, "GIANT_GROUP_BYTES", giant_bytes)
    monkeypatch.setattr(pipelines.parquet, "_GAP_BYTES", 100)
    monkeypatch.setattr(pipelines.parquet, "_COPY_BYTES", 1000)
    expected = rows.select(COLUMNS).slice(groups[0] * 700, len(groups) * 700)
    assert read(uri, groups).equals(expected)


def test_only_what_is_asked_for_leaves_the_bucket(
    rows: pl.DataFrame, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "rows.parquet"
    rows.write_parquet(path, row_group_size=700, compression="snappy")
    monkeypatch.setattr(pipelines.parquet, "_GAP_BYTES", 0)
    metadata = pq.read_metadata(path)
    ranges = pipelines.parquet._joined(pipelines.parquet._ranges(metadata, [1, 2], COLUMNS))
    asked = sum(
        metadata.row_group(group).column(column).total_compressed_size
        for group in (1, 2)
        for column in (0, 2, 3)
    )
    assert sum(end - start for start, end in ranges) == asked
    assert asked < path.stat().st_size / 3


def test_damage_within_is_a_line(uri: str) -> None:
    data = bytearray(storage.read_bytes(uri))
    data[4:400] = bytes(396)
    storage.write_bytes(uri, bytes(data))
    with pytest.raises(UserError, match=r"^expected a whole parquet file at .*rows\.parquet; got "):
        read(uri, [0])
