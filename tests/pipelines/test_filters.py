"""Filters against a brute force that asks row by row."""

from __future__ import annotations

from typing import Any

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.config import FilterConfig
from pipelines.filters import caption_filters, first_reason, metadata_filters, unknown_kept
from pipelines.ledger import REASONS

SCHEMA = {
    "url": pl.String, "caption": pl.String, "width_px": pl.Int32, "height_px": pl.Int32,
    "aesthetic_score": pl.Float64, "watermark_prob": pl.Float64, "unsafe_prob": pl.Float64,
    "clip_similarity": pl.Float64, "language": pl.String,
}  # fmt: skip
POLICIES = st.sampled_from(["keep", "drop", "later"])
UNKNOWN = (
    "size",
    "aesthetic_score",
    "watermark_prob",
    "unsafe_prob",
    "clip_similarity",
    "language",
)


def maybe(values: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.none() | values


# Few values, so that thresholds are met exactly.
PROBS = st.sampled_from([0.0, 0.25, 0.5, 0.75, 1.0])
SCORES = st.sampled_from([0.0, 4.5, 5.0, 10.0])
SIDES = st.sampled_from([1, 255, 256, 512, 1024])

ROWS = st.lists(
    st.fixed_dictionaries(
        {
            "url": st.sampled_from(["", " ", "http://a.example/"]),
            "caption": st.sampled_from(["", "a", "a b", "a b c d"]),
            "width_px": maybe(SIDES),
            "height_px": maybe(SIDES),
            "aesthetic_score": maybe(SCORES),
            "watermark_prob": maybe(PROBS),
            "unsafe_prob": maybe(PROBS),
            "clip_similarity": maybe(PROBS),
            "language": maybe(st.sampled_from(["en", "de", "zh-cn"])),
        }
    ),
    min_size=1,
    max_size=20,
)
CONFIGS = st.builds(
    FilterConfig,
    min_width_px=maybe(SIDES),
    min_height_px=maybe(SIDES),
    max_aspect_ratio=maybe(st.sampled_from([1.0, 2.0, 4.0])),
    min_aesthetic_score=maybe(SCORES),
    max_watermark_prob=maybe(PROBS),
    max_unsafe_prob=maybe(PROBS),
    min_clip_similarity=maybe(PROBS),
    languages=maybe(st.sampled_from([["EN"], [" en", "de"], ["fr"]])),
    max_caption_chars=maybe(st.sampled_from([1, 3])),
    min_caption_words=maybe(st.sampled_from([1, 2, 3])),
    unknown=st.fixed_dictionaries({name: POLICIES for name in UNKNOWN}),
)


def brute_force(row: dict[str, Any], config: FilterConfig) -> str | None:
    if not row["url"].strip():
        return "no_url"
    width, height = row["width_px"], row["height_px"]
    asks = [config.min_width_px, config.min_height_px, config.max_aspect_ratio]
    if asks != [None] * 3 and config.unknown.size == "drop" and None in (width, height):
        return "unknown_size"
    for side, shortest in ((width, config.min_width_px), (height, config.min_height_px)):
        if shortest is not None and side is not None and side < shortest:
            return "too_small"
    ratio: Any = None if None in (width, height) else max(width, height) / min(width, height)
    if None not in (config.max_aspect_ratio, ratio) and ratio > config.max_aspect_ratio:
        return "aspect_ratio"
    for column, minimum, maximum, reason in (
        ("aesthetic_score", config.min_aesthetic_score, None, "low_aesthetic_score"),
        ("watermark_prob", None, config.max_watermark_prob, "watermarked"),
        ("unsafe_prob", None, config.max_unsafe_prob, "unsafe"),
        ("clip_similarity", config.min_clip_similarity, None, "low_clip_similarity"),
    ):
        value = row[column]
        if minimum is None and maximum is None:
            continue
        if value is None:
            if getattr(config.unknown, column) == "drop":
                return f"unknown_{column}"
            continue
        if (minimum is not None and value < minimum) or (maximum is not None and value > maximum):
            return reason
    if config.languages is not None:
        if row["language"] is None and config.unknown.language == "drop":
            return "unknown_language"
        wanted = [code.strip().lower() for code in config.languages]
        if row["language"] is not None and row["language"] not in wanted:
            return "other_language"
    if config.max_caption_chars is not None and len(row["caption"]) > config.max_caption_chars:
        return "caption_too_long"
    return None


@settings(max_examples=300, deadline=None)
@given(ROWS, CONFIGS)
def test_metadata_filters_agree_with_brute_force(
    rows: list[dict[str, Any]], config: FilterConfig
) -> None:
    frame = pl.DataFrame(rows, schema=SCHEMA)
    reasons = frame.select(first_reason(metadata_filters(config)))["reason"].to_list()
    assert reasons == [brute_force(row, config) for row in rows]


@given(ROWS, CONFIGS)
def test_what_goes_on_unknown_is_counted(rows: list[dict[str, Any]], config: FilterConfig) -> None:
    frame = pl.DataFrame(rows, schema=SCHEMA)
    kept = [row for row in rows if brute_force(row, config) is None]
    frame = frame.filter(frame.select(first_reason(metadata_filters(config)))["reason"].is_null())
    bounds: dict[str, list[Any]] = {
        "size": [config.min_width_px, config.min_height_px, config.max_aspect_ratio],
        "aesthetic_score": [config.min_aesthetic_score],
        "watermark_prob": [config.max_watermark_prob],
        "unsafe_prob": [config.max_unsafe_prob],
        "clip_similarity": [config.min_clip_similarity],
        "language": [config.languages],
    }
    expected: dict[tuple[str, str], int] = {}
    for name, asked in bounds.items():
        policy = getattr(config.unknown, name)
        if asked != [None] * len(asked) and policy != "drop":
            columns = ["width_px", "height_px"] if name == "size" else [name]
            expected[policy, name] = sum(None in [row[c] for c in columns] for row in kept)
    counted = {
        (policy, name): frame.select(is_unknown.sum()).item()
        for policy, values in unknown_kept(config).items()
        for name, is_unknown in values.items()
    }
    assert counted == expected


@given(ROWS, CONFIGS)
def test_caption_filters_agree_with_brute_force(
    rows: list[dict[str, Any]], config: FilterConfig
) -> None:
    frame = pl.DataFrame(rows, schema=SCHEMA).rename({"caption": "train_caption"})
    reasons = frame.select(first_reason(caption_filters(config)))["reason"].to_list()
    minimum = config.min_caption_words or 0
    assert reasons == [
        "no_caption"
        if not row["caption"]
        else ("short_caption" if len(row["caption"].split(" ")) < minimum else None)
        for row in rows
    ]


def test_every_reason_has_its_place_in_the_report() -> None:
    config = FilterConfig(
        min_width_px=1, min_height_px=1, max_aspect_ratio=1, min_aesthetic_score=1,
        max_watermark_prob=1, max_unsafe_prob=1, min_clip_similarity=0, min_caption_words=1,
        languages=["en"],
    )  # fmt: skip
    asked = [found.reason for found in metadata_filters(config) + caption_filters(config)]
    assert asked == [reason for reason in REASONS if reason in asked]
    assert len(asked) == len(set(asked))


def test_nothing_but_the_url_is_asked_when_all_is_off() -> None:
    config = FilterConfig(max_caption_chars=None)
    assert [found.reason for found in metadata_filters(config)] == ["no_url"]


@pytest.mark.parametrize("score", [None, 4.4999])
def test_no_unknown_score_passes_a_filter_that_is_on(score: float | None) -> None:
    frame = pl.DataFrame([{"url": "u", "aesthetic_score": score}], schema=SCHEMA)
    config = FilterConfig(min_aesthetic_score=4.5)
    assert frame.select(first_reason(metadata_filters(config)))["reason"][0] is not None
