"""Captions within a text encoder's budget: counted as the encoder does, cut at sentences."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from infra.errors import UserError
from model.text_tokenizer import CLIPTokenizer
from pipelines.caption_config import CaptionConfig
from pipelines.caption_tokens import (
    budgeted,
    load_tokenizer,
    sentence_ends,
    tokenizer_sha256,
)

WORDS = st.sampled_from(
    ["fox", "in", "the", "Snow", "unbelievably", "Größe", "1950s", "don't", "🦊", "St.", "red,"]
)
SENTENCES = st.lists(
    st.lists(WORDS, min_size=1, max_size=25).map(lambda words: " ".join(words) + "."),
    min_size=1,
    max_size=8,
).map(" ".join)


@functools.lru_cache
def open_clip_tokenizer():  # type: ignore[no-untyped-def]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from open_clip.tokenizer import SimpleTokenizer
    return SimpleTokenizer()


def fitted(text: str, budget: int) -> tuple[str, str | None]:
    made = budgeted(pl.Series([text]), budget, load_tokenizer(None))
    return made.row(0)


@given(st.text(max_size=80).map(lambda text: " ".join(text.split())))
@settings(max_examples=60, deadline=None)
def test_clips_tokens_are_counted_as_open_clip_counts_them(text: str) -> None:
    if "&" in text or "<|" in text or not text.isprintable() or "İ" in text:
        return  # open_clip decodes entities and mends broken encodings, which cleaning has done
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = open_clip_tokenizer().encode(text)
    import ftfy

    if ftfy.fix_text(text) == text:
        assert load_tokenizer(None).count(text) == len(expected) + 2


@given(SENTENCES, st.integers(12, 60))
@settings(max_examples=150, deadline=None)
def test_what_is_left_fits_and_is_whole_sentences_where_one_fits(text: str, budget: int) -> None:
    left, cut = fitted(text, budget)
    ids = open_clip_tokenizer().encode(left)
    assert len(ids) + 2 <= budget
    assert text.startswith(left)
    assert left
    whole = [text[:end] for end in sentence_ends(text)]
    counts = [load_tokenizer(None).count(each) for each in whole]
    if counts[0] <= budget:
        assert left == [each for each, num in zip(whole, counts, strict=True) if num <= budget][-1]
        assert (cut is None) == (left == text)
    else:
        assert cut in ("clause", "word")
        assert not text[len(left) :][:1].isalnum()


@pytest.mark.parametrize(
    ("text", "budget", "left", "cut"),
    [
        ("A fox. It runs away. It hides.", 10, "A fox. It runs away.", "sentence"),
        ("Mr. Fox lives in St. Ives. He is red.", 12, "Mr. Fox lives in St. Ives.", "sentence"),
        ("A red fox in deep snow, under a tree, at night", 12, "A red fox in deep snow", "clause"),
        ("Yes, a red fox in deep snow under a tree at", 10, "Yes, a red fox in deep snow", "word"),
        ("A fox in the snow. ", 77, "A fox in the snow. ", None),
        ("狐狸在雪地里。它跑了。", 22, "狐狸在雪地里。", "sentence"),
        ("x" * 400, 8, None, "character"),
    ],
)
def test_where_captions_are_cut(text: str, budget: int, left: str | None, cut: str | None) -> None:
    made = fitted(text, budget)
    assert made[1] == cut
    if left is not None:
        assert made[0] == left
    assert made[0]


def test_short_ascii_is_not_counted_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = load_tokenizer(None)
    asked: list[int] = []
    starts = tokenizer.starts

    def counted(texts: Sequence[str]) -> Iterator[list[int]]:
        asked.append(len(texts))
        return starts(texts)

    monkeypatch.setattr(tokenizer, "starts", counted)
    texts = pl.Series(["a fox", "ein Füchslein", "word " * 30])
    made = budgeted(texts, 20, tokenizer)
    assert asked == [2]
    assert made["cut"].to_list() == [None, None, "word"]


def test_a_folder_counts_like_the_network_that_has_it(tmp_path: Path) -> None:
    own = CLIPTokenizer.train(["a red fox in the snow", "a blue fox on the sea"] * 9, 560)
    own.save_pretrained(tmp_path / "bpe")
    tokenizer = load_tokenizer(str(tmp_path / "bpe"))
    for text in ("a red fox in the snow", "Zebra, 12 of them!", "größe 狐"):
        assert tokenizer.count(text) == len(own.encode(text)) + 2
    moved = tmp_path / "moved"
    (tmp_path / "bpe").rename(moved)
    sha256 = tokenizer_sha256(str(moved))
    assert sha256 != tokenizer_sha256(None)
    (moved / "merges.txt").write_text("#version: 0.2\na b\n")
    assert tokenizer_sha256(str(moved)) != sha256


def test_any_tokenizer_json_will_do(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    engine = Tokenizer(models.WordLevel({"[CLS]": 0, "[UNK]": 1}, unk_token="[UNK]"))
    engine.pre_tokenizer = pre_tokenizers.Whitespace()
    engine.post_processor = processors.TemplateProcessing("[CLS] $A", None, [("[CLS]", 0)])
    engine.enable_truncation(3)
    engine.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(str(tmp_path))
    assert tokenizer.num_special == 1
    assert tokenizer.count("one two three four five") == 6


def test_a_users_mistake_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"expected vocab\.json and merges\.txt.*neither"):
        load_tokenizer(str(tmp_path / "nothing"))
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match="expected a tokenizer"):
        load_tokenizer(str(tmp_path))
    with pytest.raises(ValidationError, match="token_budget"):
        CaptionConfig(tokenizer="folder")
