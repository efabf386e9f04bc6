"""What a reading task lets travel, and what it accounts for."""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from infra import storage
from pipelines.build import ReadMarker
from pipelines.columns import sample_id
from pipelines.config import CurationConfig
from pipelines.plan import plan_curation
from pipelines.read_rows import TRAVEL_SCHEMA, Slots, partitions_of, read_rows

COCO = pa.table(
    {
        "URL": ["http://a/1", "http://a/2", "http://a/3", None],
        "TEXT": ["one", "two", "three", "four"],
        "WIDTH": [640, 10, None, 640],
        "HEIGHT": [480, 10, 480, 480],
        "pwatermark": [None, None, 0.1, 0.1],
        "top_caption": ["a long one", "a long two", None, "a long four"],
        "all_captions": [["a long one", "x" * 50], [], ["a long three"], None],
    }
)


def travelled(folder: Path, slots: Slots | None = None, **changes: Any) -> tuple[Any, pl.DataFrame]:
    known: dict[str, Any] = {
        "metadata": [str(folder / "*.parquet")],
        "filters": {
            "min_width_px": 256, "max_watermark_prob": 0.5, "max_caption_chars": 40,
            "unknown": {"watermark_prob": "later", "size": "keep"},
        },
    }  # fmt: skip
    config = CurationConfig.model_validate(known | changes)
    plan = plan_curation("x", config, (folder / "store").as_uri())
    slots = slots or Slots(plan.partitions, plan.build.num_partitions)
    batches = [batch for unit in plan.units for batch in read_rows(plan.build, unit, slots)]
    return plan.build, pl.DataFrame(pl.from_arrow(pa.Table.from_batches(batches, TRAVEL_SCHEMA)))


@pytest.mark.parametrize("rows_per_batch", [1, 3, 100])
def test_rows_captions_ledger_and_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows_per_batch: int
) -> None:
    monkeypatch.setattr("pipelines.parquet.ROWS_PER_BATCH", rows_per_batch)
    pq.write_table(COCO, tmp_path / "coco.parquet")
    build, found = travelled(tmp_path)
    rows = found.filter(~pl.col("is_caption")).sort("url")
    assert rows["url"].to_list() == ["http://a/1", "http://a/3"]
    assert rows["sample_id"].to_list() == [
        sample_id("http://a/1", "one"), sample_id("http://a/3", "three"),
    ]  # fmt: skip
    captions = found.filter(pl.col("is_caption")).select("url", "caption").unique()
    assert sorted(captions.rows()) == [("http://a/1", "a long one"), ("http://a/3", "a long three")]
    assert found.filter(pl.col("is_caption"))["model"].null_count() == 0
    expected = [zlib.crc32(url.encode()) % build.num_partitions for url in found["url"]]
    assert found["slot"].to_list() == expected
    marker = build.read(ReadMarker, 0)
    assert marker == ReadMarker(
        num_rows=4, num_kept=2, rejected={"no_url": 1, "too_small": 1}, ledger=marker.ledger,
        unknown={"keep": {"size": 1}, "later": {"watermark_prob": 1}},
    )  # fmt: skip
    ledger = pl.read_parquet(
        storage.read_bytes(storage.join(build.dataset_root, marker.ledger.path))
    )
    assert sorted(ledger.select("sample_id", "reason").rows()) == sorted(
        [(sample_id("", "four"), "no_url"), (sample_id("http://a/2", "two"), "too_small")]
    )


def test_only_the_slots_asked_for_and_a_ledger_once(tmp_path: Path) -> None:
    urls = [f"http://ä.example/{n}" for n in range(200)]
    pq.write_table(pa.table({"URL": urls, "TEXT": ["t"] * 200}), tmp_path / "m.parquet")
    asked = Slots((1, 5), 8)
    _, found = travelled(tmp_path, asked, partitions=8, filters={})
    slot_of = {1: 0, 5: 1}
    expected = {url: slot_of.get(zlib.crc32(url.encode()) % 8, -1) for url in urls}
    assert dict(found.select("url", "slot").iter_rows()) == {
        url: slot for url, slot in expected.items() if slot >= 0
    }
    assert 0 < found.height < 200


def test_a_partition_is_the_same_on_every_machine() -> None:
    urls = pl.Series(["", "http://a.example/1.jpg", "http://ü.example/日本"])
    assert partitions_of(urls, 1 << 32).tolist() == [0, 3297752686, 3540653184]
