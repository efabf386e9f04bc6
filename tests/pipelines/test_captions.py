"""Captions: clean, joined by URL, one chosen."""

from __future__ import annotations

import unicodedata

import polars as pl
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from infra.errors import UserError
from pipelines.caption_clean import clean_text
from pipelines.caption_config import CaptionConfig
from pipelines.captions import (
    canonical_captions,
    check_caption_schema,
    with_captions,
)

ROWS = pl.DataFrame({"url": ["a", "b", "c", "d"], "caption": ["alt a", "alt b", " \u200b", ""]})
LONG = pl.DataFrame(
    {
        "url": ["a", "b", "b", "d", "elsewhere", "a"],
        "caption": ["long a", "long b", "longer b", "long d", "nobody's", "long a"],
        "model": ["m1", "m1", None, "m1", "m1", "m0"],
    }
)

SYNTHETIC, ALT = CaptionConfig(), CaptionConfig(train_on="alt")


def cleaned(text: str) -> str:
    return str(pl.DataFrame({"t": [text]}).select(clean_text(pl.col("t")))["t"][0])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a\r\n\tb", "a b"),
        ("  a  b ", "a b"),
        ("a\x00b\x1b[31mc", "ab[31mc"),
        ("safe\u202egnp.exe", "safegnp.exe"),
        ("zero\u200bwidth\ufeff", "zerowidth"),
        ("e\u0301", "\u00e9"),
        ("\u00a0a\u2003b\u00a0", "a b"),
        ("<script>=cmd()", "<script>=cmd()"),
        ("\u72d0\u72f8 \U0001f98a", "\u72d0\u72f8 \U0001f98a"),
        ("\u200b \u200b", ""),
    ],
)
def test_captions_are_one_visible_line(text: str, expected: str) -> None:
    assert cleaned(text) == expected


@given(st.text(max_size=60))
def test_cleaning_leaves_nothing_invisible_and_is_settled(text: str) -> None:
    once = cleaned(text)
    assert cleaned(once) == once
    assert once == once.strip()
    assert not [c for c in once if unicodedata.category(c) in ("Cc", "Cf", "Co", "Zl", "Zp")]


def test_all_captions_are_kept_with_origin_and_model() -> None:
    joined = with_captions(ROWS, LONG, SYNTHETIC)
    assert joined["url"].to_list() == ["a", "b", "c", "d"]
    assert joined["captions"].to_list() == [
        [
            {"origin": "alt", "text": "alt a", "model": None},
            {"origin": "synthetic", "text": "long a", "model": "m0"},
        ],
        [
            {"origin": "alt", "text": "alt b", "model": None},
            {"origin": "synthetic", "text": "longer b", "model": None},
            {"origin": "synthetic", "text": "long b", "model": "m1"},
        ],
        [],
        [{"origin": "synthetic", "text": "long d", "model": "m1"}],
    ]


def test_the_longest_synthetic_caption_is_trained_on_unless_told_otherwise() -> None:
    synthetic = with_captions(ROWS, LONG, SYNTHETIC)["train_caption"].to_list()
    assert synthetic == ["long a", "longer b", "", "long d"]
    alt = with_captions(ROWS, LONG, ALT)["train_caption"].to_list()
    assert alt == ["alt a", "alt b", "", "long d"]


def test_the_order_of_the_caption_file_does_not_matter() -> None:
    shuffled = LONG.sample(fraction=1, shuffle=True, seed=3)
    assert with_captions(ROWS, shuffled, ALT).equals(with_captions(ROWS, LONG, ALT))


def test_without_long_captions_alt_text_is_all_there_is() -> None:
    joined = with_captions(ROWS, LONG.clear(), SYNTHETIC)
    assert joined["train_caption"].to_list() == ["alt a", "alt b", "", ""]


def test_caption_files_are_checked() -> None:
    check_caption_schema(pa.schema([("url", pa.string()), ("caption", pa.string())]), "f")
    for fields in (
        [("url", pa.string())],
        [("url", pa.string()), ("caption", pa.int64())],
        [("url", pa.string()), ("caption", pa.string()), ("model", pa.int64())],
    ):
        with pytest.raises(UserError, match=r"expected text columns url, caption .* in f\.parquet"):
            check_caption_schema(pa.schema(fields), "f.parquet")


def test_overlong_and_null_captions_are_left_out() -> None:
    raw = pa.table({"url": ["a", "b", None], "caption": ["x" * 11, "fine", "y"]})
    assert canonical_captions(raw, 10).rows() == [("b", "fine", None)]
    assert canonical_captions(raw, None).height == 2
