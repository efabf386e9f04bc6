"""Captions lose what no picture shows, and nothing else."""

from __future__ import annotations

import unicodedata

import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from pipelines.caption_clean import CHANGES, cleaned
from pipelines.caption_config import CaptionConfig


def changes_of(text: str, *, is_alt: bool = True, **config: object) -> tuple[str, list[str]]:
    """The clean text and what changed."""
    chosen = CaptionConfig.model_validate(config)
    row = cleaned(pl.Series([text]), chosen, is_alt=is_alt).row(0, named=True)
    return row["text"], [name for name in CHANGES if row[name]]


@pytest.mark.parametrize(
    ("text", "left", "step"),
    [
        ("A <b>red</b> fox &amp; its cub", "A red fox & its cub", "markup"),
        ("&amp;lt;script&amp;gt;alert(1)&amp;lt;/script&amp;gt;fox", "fox", "markup"),
        ("<script>steal()</script>fox<img src=x onerror=a()", "fox", "markup"),
        ("fox <|endoftext|> hen <|startoftext|>", "fox hen", "markup"),
        ("=cmd|'/C calc'!A0", "cmd|'/C calc'!A0", "markup"),
        ('"=HYPERLINK(x)', "HYPERLINK(x)", "markup"),
        ("@SUM(A1) fox", "SUM(A1) fox", "markup"),
        ("javascript:alert(1) fox", "fox", "markup"),
        ("[INST] fox [/INST]", "fox", "markup"),
        ("&#60;a href=x&#62;fox", "fox", "markup"),
        ("fox, see https://x.example/a?b=c", "fox, see", "web_address"),
        ("www.example.com/fox.jpg", "", "web_address"),
        ("IMG_1234.jpg", "", "file_name"),
        ("20190304_121314.JPEG", "", "file_name"),
        ("DSC01234", "", "file_name"),
        ("red-fox-in-snow.jpg", "red fox in snow", "file_name"),
        ("a fox in snow fox_0123.png", "a fox in snow", "file_name"),
        ("Red fox - click to enlarge", "Red fox", "boilerplate"),
        ("Click here to view larger image", "", "boilerplate"),
        ("Red fox, royalty free stock photo", "Red fox", "boilerplate"),
        ("Red fox | Online Shop", "Red fox", "boilerplate"),
        ("Red fox - example.com", "Red fox", "boilerplate"),
        ("Image 3: a fox", "a fox", "boilerplate"),
        ("null", "", "boilerplate"),
        ("fox © 2019-2021 all rights reserved", "fox", "boilerplate"),
        ("fox, jane@example.com", "fox", "email"),
    ],
)
def test_what_no_picture_shows_is_cut_and_named(text: str, left: str, step: str) -> None:
    assert changes_of(text) == (left, [step])


@pytest.mark.parametrize(
    "text",
    [
        "a <3 b, and x < y > z",
        "+1 bedroom flat, 2=1 offer",
        "Blue sky | Green field",
        "Woman in a shop | Fine Art Print",
        "Amazon.com logo",
        "AT&T and R&D; M&Ms",
        "Photo of the store front, image quality 5",
        "Stock car race, free range hens, photo album",
        "The picture of Dorian Gray",
        "Click beetle, zoom lens and share holders",
        "null island, 100% wool",
        "狐狸 🦊 в снегу",
    ],
)
def test_what_a_picture_may_show_stays(text: str) -> None:
    assert changes_of(text) == (text, [])


def test_each_step_can_be_switched_off_and_phrases_added() -> None:
    text = "<b>fox</b> https://x.example/a | Online Shop, a@example.com"
    off = {"markup": False, "urls": False, "file_names": False, "boilerplate": False}
    assert changes_of(text, clean=off, personal_data="off") == (text, [])
    assert changes_of("A fox - Ad by ACME", clean={"phrases": ["ad by acme"]}) == (
        "A fox",
        ["boilerplate"],
    )
    with pytest.raises(ValidationError, match="empty phrase"):
        CaptionConfig.model_validate({"clean": {"phrases": [" "]}})


def test_synthetic_captions_lose_markup_and_personal_data_alone() -> None:
    text = "<i>A sign</i> reads 212-555-0123, click to enlarge"
    assert changes_of(text, is_alt=False) == (
        "A sign reads, click to enlarge",
        ["markup", "phone"],
    )
    assert changes_of(text, is_alt=False, personal_data_word="[number]") == (
        "A sign reads [number], click to enlarge",
        ["markup", "phone"],
    )


def test_what_is_cut_does_not_join_to_personal_data() -> None:
    text, changed = changes_of("call 212 click to enlarge 555 0123")
    assert "555 0123" not in text or "212" not in text
    assert "boilerplate" in changed


@given(st.lists(st.text(max_size=40), max_size=5))
def test_captions_are_one_visible_line_whatever_they_were(texts: list[str]) -> None:
    made = cleaned(pl.Series(texts, dtype=pl.String), CaptionConfig(), is_alt=True)
    assert made.height == len(texts)
    for text in made["text"]:
        assert text == text.strip()
        assert not [c for c in text if unicodedata.category(c) in ("Cc", "Cf", "Co", "Zl", "Zp")]
