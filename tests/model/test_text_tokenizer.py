"""Byte-pair encoding against merges done by hand, and prompts of every kind."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from model.errors import ModelError
from model.text_tokenizer import BOS_TOKEN, EOS_TOKEN, CLIPTokenizer

# By hand: "hug" and "pug" and "hugs". Merges are applied in this order, most wanted first.
MERGES = [("u", "g</w>"), ("h", "ug</w>"), ("u", "g"), ("ug", "s</w>")]
LETTERS = ["h", "u", "g", "p", "s", "h</w>", "u</w>", "g</w>", "p</w>", "s</w>"]
VOCAB = {
    token: index
    for index, token in enumerate(
        [*LETTERS, "ug</w>", "hug</w>", "ug", "ugs</w>", BOS_TOKEN, EOS_TOKEN]
    )
}


@pytest.fixture
def by_hand() -> CLIPTokenizer:
    return CLIPTokenizer(VOCAB, MERGES)


@pytest.mark.parametrize(
    ("word", "pieces"),
    [
        ("hug", ["hug</w>"]),  # h u g</w> -> h ug</w> -> hug</w>
        ("pug", ["p", "ug</w>"]),  # p u g</w> -> p ug</w>
        ("hugs", ["h", "ugs</w>"]),  # h u g s</w> -> h ug s</w> -> h ugs</w>
        ("Hug PUG", ["hug</w>", "p", "ug</w>"]),
        ("hu", ["h", "u</w>"]),
        ("", []),
    ],
)
def test_merges_done_by_hand(by_hand: CLIPTokenizer, word: str, pieces: list[str]) -> None:
    assert by_hand.encode(word) == [VOCAB[piece] for piece in pieces]


def test_rows_begin_end_and_are_padded(by_hand: CLIPTokenizer) -> None:
    bos, eos, hug = VOCAB[BOS_TOKEN], VOCAB[EOS_TOKEN], VOCAB["hug</w>"]
    rows = by_hand(["hug", "", "hug hug hug hug"], 5)
    assert rows.tolist() == [
        [bos, hug, eos, eos, eos],
        [bos, eos, eos, eos, eos],
        [bos, hug, hug, hug, eos],
    ]


def test_padding_token_is_the_configured_one(tmp_path: Path, by_hand: CLIPTokenizer) -> None:
    by_hand.save_pretrained(tmp_path / "t")
    for pad in ("p", {"content": "p", "lstrip": False}):
        (tmp_path / "t" / "special_tokens_map.json").write_text(json.dumps({"pad_token": pad}))
        loaded = CLIPTokenizer.from_pretrained(tmp_path / "t")
        assert loaded([""], 4).tolist() == [[14, 15, VOCAB["p"], VOCAB["p"]]]


def test_trained_layout_is_the_published_one(tokenizer: CLIPTokenizer) -> None:
    tokens = list(tokenizer.vocab)
    assert tokenizer.vocab_size == 560 == len(tokens)
    assert tokens[:3] == ["!", '"', "#"]
    assert tokens[255] == "\u0143"
    assert tokens[256:258] == ["!</w>", '"</w>']
    assert tokens[-2:] == [BOS_TOKEN, EOS_TOKEN]
    assert tokens[512:-2] == ["".join(pair) for pair in tokenizer.merges]


def test_training_learns_the_words(tokenizer: CLIPTokenizer) -> None:
    learned = CLIPTokenizer.train(["a red circle"] * 5, 600)
    assert len(learned.encode("red circle")) == 2
    assert len(tokenizer.encode("a red circle")) <= 5


def test_training_is_repeatable() -> None:
    captions = ["pear tree apple ape", "grape peer tree", "reap tape"] * 2
    trained = [CLIPTokenizer.train(captions, 530) for _ in range(5)]
    assert all(other.vocab == trained[0].vocab for other in trained)


def test_training_on_nothing_leaves_the_bytes() -> None:
    trained = CLIPTokenizer.train([], 1000)
    assert trained.vocab_size == 514
    assert len(trained.encode("ab")) == 2


def test_vocabulary_without_room_is_refused() -> None:
    with pytest.raises(ModelError, match="vocab_size is 513: expected at least 514"):
        CLIPTokenizer.train(["a"], 513)


@given(st.text())
def test_any_text_makes_a_row(tokenizer: CLIPTokenizer, text: str) -> None:
    (row,) = tokenizer([text], 12).tolist()
    assert row[0] == tokenizer.bos_token_id
    assert tokenizer.eos_token_id in row[1:]
    assert max(row) < tokenizer.vocab_size


@pytest.mark.parametrize(
    "text", ["red circle", "\U0001f98a fox", "مرحبا بالعالم", "日本", "naïve café", "3 x 4 !"]
)
def test_decoding_gives_the_words_back(tokenizer: CLIPTokenizer, text: str) -> None:
    row = tokenizer([text], 64)[0].tolist()
    expected = " ".join("".join(text.split()))
    assert tokenizer.decode(row).replace(" ", "") == expected.replace(" ", "")


def test_end_token_in_a_prompt_is_plain_text(tokenizer: CLIPTokenizer) -> None:
    ids = tokenizer.encode("red <|endoftext|> circle")
    assert tokenizer.eos_token_id not in ids
    assert tokenizer.bos_token_id not in tokenizer.encode(BOS_TOKEN)


def test_very_long_and_broken_text(tokenizer: CLIPTokenizer) -> None:
    rows = tokenizer(["circle " * 1500, "a\ud83db", "\x00"], 16)
    assert rows.shape == (3, 16)
    assert rows[0, -1] == tokenizer.eos_token_id


@pytest.mark.parametrize("prompts", ["one string", [b"bytes"], [None]])
def test_anything_but_strings_is_refused(tokenizer: CLIPTokenizer, prompts: list[str]) -> None:
    with pytest.raises(ModelError, match="prompts must be a list of strings"):
        tokenizer(prompts, 8)


def test_row_without_room_is_refused(tokenizer: CLIPTokenizer) -> None:
    with pytest.raises(ModelError, match="no place for begin and end"):
        tokenizer(["a"], 1)


def test_round_trip(tokenizer: CLIPTokenizer, tmp_path: Path) -> None:
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    assert sorted(p.name for p in (tmp_path / "tokenizer").iterdir()) == [
        "merges.txt",
        "special_tokens_map.json",
        "tokenizer_config.json",
        "vocab.json",
    ]
    loaded = CLIPTokenizer.from_pretrained(tmp_path / "tokenizer")
    assert (loaded.vocab, loaded.merges) == (tokenizer.vocab, tokenizer.merges)
    assert loaded.pad_token_id == tokenizer.pad_token_id


@pytest.mark.parametrize("joined", [True, False])
def test_tokenizer_json_is_read_too(by_hand: CLIPTokenizer, tmp_path: Path, joined: bool) -> None:
    merges = [" ".join(pair) if joined else list(pair) for pair in MERGES]
    model = {"model": {"type": "BPE", "vocab": VOCAB, "merges": merges}}
    (tmp_path / "tokenizer.json").write_text(json.dumps(model))
    assert CLIPTokenizer.from_pretrained(tmp_path).encode("hugs pug") == by_hand.encode("hugs pug")


def test_merge_of_characters_that_look_like_a_comment(tmp_path: Path) -> None:
    trained = CLIPTokenizer.train(["#v #v #v #version #version"], 600)
    trained.save_pretrained(tmp_path / "t")
    assert CLIPTokenizer.from_pretrained(tmp_path / "t").merges == trained.merges


def test_folder_without_a_tokenizer_is_told(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"expected vocab.json and merges.txt, or tokenizer.json"):
        CLIPTokenizer.from_pretrained(tmp_path)


def test_vocabulary_without_end_is_refused() -> None:
    with pytest.raises(ModelError, match=r"lacks .*endoftext"):
        CLIPTokenizer({BOS_TOKEN: 0}, [])
