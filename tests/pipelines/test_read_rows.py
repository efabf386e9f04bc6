"""What a reading task lets travel, and what it accounts for."""

from __future__ import annotations

import math
import random
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
from pipelines.inputs import find_inputs, units_of
from pipelines.plan import plan_curation
from pipelines.read_rows import TRAVEL_SCHEMA, Slots, judged_batches, partitions_of, read_rows
from pipelines.spelling import one_address

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
    expected = {
        url: slot_of.get(zlib.crc32(str(one_address(url)).encode()) % 8, -1) for url in urls
    }
    assert dict(found.select("url", "slot").iter_rows()) == {
        url: slot for url, slot in expected.items() if slot >= 0
    }
    assert 0 < found.height < 200


ODD_NUMBERS = [None, math.nan, math.inf, -1.0, 0.0, 0.25, 0.5, 0.75, 1.0, 4.0, 300.0, 900.0, 2e6]


def odd_rows(num_rows: int) -> dict[str, list[Any]]:
    """Texts and numbers that are there, missing, out of range and on the thresholds."""
    rng = random.Random(num_rows)

    def numbers(*shares: float) -> list[float | None]:
        return rng.choices(
            [*shares, *ODD_NUMBERS], [30] * len(shares) + [1] * len(ODD_NUMBERS), k=num_rows
        )

    return {
        "URL": rng.choices(["", " ", None, *(f"http://ä/{n}" for n in range(97))], k=num_rows),
        "TEXT": rng.choices(["", None, "a fox", "x" * 50, "日本"], k=num_rows),
        "WIDTH": numbers(256.0, 512.0), "HEIGHT": numbers(256.0, 2000.0), "punsafe": numbers(0.1),
        "pwatermark": numbers(0.1), "AESTHETIC_SCORE": numbers(6.0), "similarity": numbers(0.3),
        "LANGUAGE": rng.choices(["en", "EN ", "de", "", None], k=num_rows),
    }  # fmt: skip


@pytest.mark.parametrize(("unknown", "swapped"), [("drop", True), ("keep", False), ("later", True)])
def test_a_unit_read_again_lets_the_same_rows_travel(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, unknown: str, swapped: bool
) -> None:
    monkeypatch.setattr("pipelines.parquet.ROWS_PER_BATCH", 64)
    monkeypatch.setattr("pipelines.inputs.ROWS_PER_UNIT", 200)
    pl.DataFrame(odd_rows(1000)).write_parquet(tmp_path / "m.parquet", row_group_size=90)
    scores = ("size", "aesthetic_score", "watermark_prob", "unsafe_prob", "language")
    filters: dict[str, Any] = {
        "min_width_px": 256, "min_height_px": 256, "max_aspect_ratio": 3.0,
        "min_aesthetic_score": 4.0, "max_watermark_prob": 0.5, "max_unsafe_prob": 0.5,
        "languages": ["en"], "max_caption_chars": 40, "unknown": dict.fromkeys(scores, unknown),
    }  # fmt: skip
    asked: dict[str, Any] = {"filters": filters, "swapped_sizes": swapped}
    build, first = travelled(tmp_path, **asked)
    _, again = travelled(tmp_path, **asked)
    assert again.equals(first)
    assert first.height > 10
    unit = units_of(find_inputs(build.config))[1]
    heights = [
        sum(rows.height for _, _, rows in judged_batches(unit, build.config, without_rejected=left))
        for left in (False, True)
    ]
    assert heights[1] < heights[0] / 2


def test_records_of_two_images_are_read_again_for_either(tmp_path: Path) -> None:
    pairs = {
        "image_0_url": ["http://a/1", "http://a/2", ""], "image_1_url": ["http://b/1", "", ""],
        "caption": ["one", "two", "three"], "label_0": [0.0, 0.5, 1.0], "label_1": [1.0, 0.5, 0.0],
    }  # fmt: skip
    pl.DataFrame(pairs).write_parquet(tmp_path / "pairs.parquet")
    _, first = travelled(tmp_path, filters={})
    _, again = travelled(tmp_path, filters={})
    assert again.equals(first)
    assert sorted(first["url"]) == ["http://a/1", "http://a/2", "http://b/1"]


def test_a_partition_is_the_same_on_every_machine() -> None:
    urls = pl.Series(["", "http://a.example/1.jpg", "http://ü.example/日本"])
    assert partitions_of(urls, 1 << 32).tolist() == [0, 3297752686, 4179333234]


def test_copies_of_an_address_meet_however_they_are_spelled() -> None:
    spelled = [
        "http://a.example/1.jpg",
        "HTTP://A.example:80/x/../1.jpg#top",
        "http://a.example/%31.jpg ",
    ]
    assert len(set(partitions_of(pl.Series(spelled), 1 << 32).tolist())) == 1
