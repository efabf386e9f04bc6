"""LAION's schemas, all of them, into one."""

from __future__ import annotations

import math
from typing import Any

import pyarrow as pa
import pytest

from infra.errors import UserError
from pipelines.columns import CANONICAL_SCHEMA, canonical_rows, layout_of, sample_id
from pipelines.config import CurationConfig

I32, I64, F32, F64, STR = pa.int32(), pa.int64(), pa.float32(), pa.float64(), pa.string()
VALUES: dict[str, Any] = {
    "URL": "http://a.example/1.jpg", "url": "http://a.example/1.jpg", "TEXT": "a fox",
    "caption": "a fox", "text": "a fox", "WIDTH": 640, "HEIGHT": 480, "width": 640, "height": 480,
    "original_width": 640, "original_height": 480, "similarity": 0.3, "LANGUAGE": "en",
    "hash": 1, "pwatermark": 0.25, "punsafe": 0.125, "aesthetic": 7.5, "AESTHETIC_SCORE": 5.5,
    "SAMPLE_ID": 1, "LICENSE": "?", "NSFW": "UNLIKELY", "__index_level_0__": 0, "uid": "0" * 32,
    "clip_l14_similarity_score": 0.3, "watermark_score": 0.25, "sha256": "0" * 64,
    "aesthetic_score_laion_v2": 5.5, "nsfw_score_opennsfw2": 0.125, "id": 1, "key": "0",
    "clip_b32_similarity_score": 0.2,
}  # fmt: skip
# Published schemas: name -> (columns with types, aesthetic scale, sizes swapped).
SCHEMAS: dict[str, tuple[list[tuple[str, pa.DataType]], str | None, bool]] = {
    "laion2B-en raw": (
        [("SAMPLE_ID", I64), ("URL", STR), ("TEXT", STR), ("HEIGHT", I32), ("WIDTH", I32),
         ("LICENSE", STR), ("NSFW", STR), ("similarity", F64)], None, True),
    "laion2B-en-joined": (
        [("URL", STR), ("TEXT", STR), ("WIDTH", I32), ("HEIGHT", I32), ("similarity", F64),
         ("hash", I64), ("punsafe", F32), ("pwatermark", F32)], None, False),
    "laion2B-en-aesthetic": (
        [("URL", STR), ("TEXT", STR), ("WIDTH", I32), ("HEIGHT", I32), ("similarity", F64),
         ("hash", I64), ("punsafe", F32), ("pwatermark", F32), ("aesthetic", F32)], "v1", False),
    "laion-high-resolution": (
        [("URL", STR), ("TEXT", STR), ("WIDTH", I32), ("HEIGHT", I32), ("similarity", F64),
         ("LANGUAGE", STR), ("hash", I64), ("pwatermark", F32), ("punsafe", F32)], None, False),
    "improved_aesthetics": (
        [("URL", STR), ("TEXT", STR), ("WIDTH", F64), ("HEIGHT", F64), ("similarity", F64),
         ("punsafe", F64), ("pwatermark", F64), ("AESTHETIC_SCORE", F64), ("hash", I64),
         ("__index_level_0__", I64)], "v2", False),
    "Re-LAION": (
        [("url", STR), ("caption", STR), ("similarity", F64), ("punsafe", F64),
         ("pwatermark", F64), ("key", STR), ("width", I64), ("height", I64),
         ("original_width", I64), ("original_height", I64)], None, False),
    "DataComp": (
        [("uid", STR), ("url", STR), ("text", STR), ("original_width", I64),
         ("original_height", I64), ("clip_b32_similarity_score", F32),
         ("clip_l14_similarity_score", F32), ("sha256", STR)], None, False),
    "COYO": (
        [("id", I64), ("url", STR), ("text", STR), ("width", I32), ("height", I32),
         ("nsfw_score_opennsfw2", F32), ("watermark_score", F32),
         ("aesthetic_score_laion_v2", F32)], "v2", False),
    "large strings": ([("URL", pa.large_string()), ("TEXT", pa.large_string())], None, False),
}  # fmt: skip


def config(**filters: Any) -> CurationConfig:
    return CurationConfig.model_validate({"metadata": ["x"], "filters": filters})


def table(columns: list[tuple[str, pa.DataType]], **values: Any) -> pa.Table:
    data = {name: pa.array([values.get(name, VALUES[name])], kind) for name, kind in columns}
    return pa.table(data)


@pytest.mark.parametrize("name", SCHEMAS)
def test_every_published_schema_becomes_ours(name: str) -> None:
    columns, scale, swapped = SCHEMAS[name]
    raw = table(columns)
    layout = layout_of(raw.schema, config(), "file")
    rows = canonical_rows(raw, layout, "laion")
    assert rows.columns == CANONICAL_SCHEMA.names
    assert rows.to_arrow().cast(CANONICAL_SCHEMA).num_rows == 1
    row = rows.row(0, named=True)
    assert row["sample_id"] == sample_id("http://a.example/1.jpg", "a fox")
    assert (layout.aesthetic_scale, layout.swapped_sizes) == (scale, swapped)
    has_size = {"WIDTH", "width", "original_width"} & {name for name, _ in columns}
    if has_size:
        expected = (480, 640) if swapped else (640, 480)
        assert (row["width_px"], row["height_px"]) == expected
    if scale is not None:
        assert row["aesthetic_score"] == (7.5 if scale == "v1" else 5.5)
    present = {name for name, _ in columns}
    assert row["watermark_prob"] == (0.25 if {"pwatermark", "watermark_score"} & present else None)
    assert row["unsafe_prob"] == (0.125 if {"punsafe", "nsfw_score_opennsfw2"} & present else None)
    assert row["source"] == "laion"


def test_swapping_can_be_said() -> None:
    raw = table(SCHEMAS["laion2B-en-joined"][0])
    said = CurationConfig(metadata=["x"], swapped_sizes=True)
    row = canonical_rows(raw, layout_of(raw.schema, said, "f"), "s").row(0, named=True)
    assert (row["width_px"], row["height_px"]) == (480, 640)


@pytest.mark.parametrize(
    ("columns", "filters", "expected"),
    [
        ([("TEXT", STR)], {}, r"expected url \(url or URL or image_url\)"),
        ([("URL", STR)], {}, r"expected caption \(caption or TEXT"),
        ([("URL", I64), ("TEXT", STR)], {}, "URL as text"),
        ([("URL", STR), ("TEXT", F64)], {}, "TEXT as text"),
        ([("URL", STR), ("TEXT", STR), ("pwatermark", STR)], {}, "pwatermark as a number"),
        ([("URL", STR), ("TEXT", STR)], {"min_width_px": 1}, r"width_px \(original_width or"),
        ([("URL", STR), ("TEXT", STR)], {"max_unsafe_prob": 0.5}, r"unsafe_prob \(punsafe or"),
        ([("URL", STR), ("TEXT", STR)], {"max_watermark_prob": 0.5}, r"watermark_prob \("),
        ([("URL", STR), ("TEXT", STR)], {"min_clip_similarity": 0.2}, r"clip_similarity \("),
        ([("URL", STR), ("TEXT", STR), ("aesthetic", F32)], {"min_aesthetic_score": 4.5},
         r"aesthetic_score \(AESTHETIC_SCORE or"),
        ([("URL", STR), ("TEXT", STR), ("AESTHETIC_SCORE", F32)],
         {"min_aesthetic_score": 7, "aesthetic_scale": "v1"}, r"aesthetic_score \(aesthetic\)"),
    ],
)  # fmt: skip
def test_a_schema_that_does_not_fit_is_one_line(
    columns: list[tuple[str, pa.DataType]], filters: dict[str, Any], expected: str
) -> None:
    values = {"URL": 1, "TEXT": 1.0, "pwatermark": "x"}
    fitting = {name: values[name] for name, kind in columns
               if name in values and (kind == STR) == (name == "pwatermark")}  # fmt: skip
    raw = table(columns, **fitting)
    with pytest.raises(UserError, match=expected) as caught:
        layout_of(raw.schema, config(**filters), "part-7.parquet")
    assert "part-7.parquet" in str(caught.value)
    assert columns[0][0] in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_column_may_be_all_null() -> None:
    raw = pa.table({"URL": ["u"], "TEXT": pa.nulls(1), "pwatermark": pa.nulls(1)})
    row = canonical_rows(raw, layout_of(raw.schema, config(), "f"), "s").row(0, named=True)
    assert (row["caption"], row["watermark_prob"]) == ("", None)


@pytest.mark.parametrize(
    ("column", "canonical", "unknown"),
    [
        ("pwatermark", "watermark_prob", [None, math.nan, -1.0, 2.0, math.inf, -math.inf]),
        ("punsafe", "unsafe_prob", [None, math.nan, -0.001, 1.001]),
        ("AESTHETIC_SCORE", "aesthetic_score", [None, math.nan, -1.0, 10.5]),
        ("similarity", "clip_similarity", [None, math.nan, -1.5, 1.5]),
        ("WIDTH", "width_px", [None, math.nan, 0.0, -5.0, 0.5, math.inf, 1e9]),
        ("HEIGHT", "height_px", [None, math.nan, 0.0, -5.0, math.inf, 1e9]),
    ],
)
def test_values_that_say_nothing_are_null(
    column: str, canonical: str, unknown: list[float | None]
) -> None:
    raw = pa.table(
        {
            "URL": ["u"] * len(unknown),
            "TEXT": ["t"] * len(unknown),
            column: pa.array(unknown, F64),
        }
    )
    rows = canonical_rows(raw, layout_of(raw.schema, config(), "f"), "s")
    assert rows[canonical].to_list() == [None] * len(unknown)


def test_the_ends_of_a_range_are_known() -> None:
    raw = pa.table({"URL": ["u"] * 2, "TEXT": ["t"] * 2, "pwatermark": [0.0, 1.0]})
    rows = canonical_rows(raw, layout_of(raw.schema, config(), "f"), "s")
    assert rows["watermark_prob"].to_list() == [0.0, 1.0]


def test_identity_is_content_and_tells_url_from_caption() -> None:
    assert sample_id("u", "t") == "d5f8d50c29883bfe847cfc51ccaa1ab2"
    assert sample_id("ab", "c") != sample_id("a", "bc")
    assert sample_id("u", "t") != sample_id("u", "t2")
