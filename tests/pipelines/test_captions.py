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
    caption_counts,
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


MANY = pl.DataFrame(
    {
        "url": [f"u{n}" for n in range(2000) for _ in range(3)],
        "caption": [f"{'long ' * k}number {n}" for n in range(2000) for k in (3, 1, 2)],
        "model": ["z", "b", "a"] * 2000,
    }
)
MANY_ROWS = pl.DataFrame(
    {"url": [f"u{n}" for n in range(2000)], "caption": [f"alt number {n}" for n in range(2000)]}
)


def chosen(config: CaptionConfig, rows: pl.DataFrame = MANY_ROWS) -> pl.DataFrame:
    return with_captions(rows, MANY, config).sort("url")


@pytest.mark.parametrize("ratio", [0.0, 0.3, 1.0])
def test_a_mix_takes_synthetic_captions_in_the_ratio_asked_for(ratio: float) -> None:
    made = chosen(CaptionConfig(train_on="mix", synthetic_ratio=ratio))
    counts = caption_counts(made)
    assert counts.get("train_on_synthetic", 0) / 2000 == pytest.approx(ratio, abs=0.03)
    starts = made["train_caption"].str.starts_with("alt")
    assert (starts == (made["caption_origin"] == "alt")).all()
    assert made["captions"].list.len().unique().to_list() == [4]


def test_a_mix_does_not_depend_on_order_and_does_on_the_seed() -> None:
    config = CaptionConfig(train_on="mix")
    made = chosen(config)
    assert made.equals(chosen(config, MANY_ROWS.reverse()))
    few = chosen(config, MANY_ROWS.head(100))
    assert few.equals(made.join(few.select("url"), on="url", how="semi"))
    assert not made.equals(chosen(CaptionConfig(train_on="mix", mix_seed=1)))


def test_a_mix_takes_what_there_is() -> None:
    made = with_captions(ROWS, LONG, CaptionConfig(train_on="mix", synthetic_ratio=0.0))
    assert made["train_caption"].to_list() == ["alt a", "alt b", "", "long d"]
    assert made["caption_origin"].to_list() == ["alt", "alt", None, "synthetic"]


def test_which_of_several_synthetic_captions_is_chosen() -> None:
    longest = chosen(CaptionConfig())["train_caption"]
    first = chosen(CaptionConfig(synthetic_choice="first"))["train_caption"]
    hashed = chosen(CaptionConfig(synthetic_choice="hash"))["train_caption"]
    words = [series.str.split(" ").list.len() for series in (longest, first, hashed)]
    assert words[0].unique().to_list() == [5]
    assert words[1].unique().to_list() == [4]  # of model a
    assert min(words[2].value_counts()["count"].to_list()) > 500
    assert hashed.equals(chosen(CaptionConfig(synthetic_choice="hash"))["train_caption"])


def test_short_synthetic_captions_do_not_count_and_are_counted() -> None:
    made = with_captions(MANY_ROWS.head(3), MANY, CaptionConfig(min_synthetic_words=5))
    assert [len(each) for each in made["captions"]] == [2, 2, 2]
    assert caption_counts(made) == {"short_synthetic": 3, "train_on_synthetic": 3}
    none = with_captions(MANY_ROWS.head(3), MANY, CaptionConfig(min_synthetic_words=9))
    assert caption_counts(none) == {"short_synthetic": 3, "train_on_alt": 3}


def test_the_text_to_train_on_is_cut_to_the_budget_and_the_whole_one_stays() -> None:
    long = pl.DataFrame({"url": ["a"], "caption": ["A red fox. " * 30], "model": ["m"]})
    made = with_captions(ROWS.head(1), long, CaptionConfig(token_budget=16)).row(0, named=True)
    assert made["train_caption"] == "A red fox. A red fox. A red fox."
    assert made["captions"][1]["text"] == ("A red fox. " * 30).strip()
    assert made["caption_notes"] == ["cut_at_sentence"]


def test_personal_data_is_told_by_row_and_left_nowhere() -> None:
    rows = pl.DataFrame({"url": ["a", "b"], "caption": ["fox 212-555-0123", "a fox"]})
    long = pl.DataFrame({"url": ["b"], "caption": ["mail j@example.com"], "model": ["m"]})
    made = with_captions(rows, long, CaptionConfig())
    assert made["has_personal_data"].to_list() == [True, True]
    assert made["caption_notes"].to_list() == [["phone"], ["email"]]
    assert "212-555" not in str(made.to_dicts())
    assert "j@example" not in str(made.to_dicts())
