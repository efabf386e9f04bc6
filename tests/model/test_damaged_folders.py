"""A model folder's small files with anything in them: each part loads, or one line says why not."""

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from model.errors import ModelError
from model.folder import read_defaults
from model.text import CLIPTextEncoder
from model.text_to_image import TextToImage
from model.text_tokenizer import BOS_TOKEN, EOS_TOKEN, CLIPTokenizer
from model.transformer import MaskedImageTransformer
from model.vq import VQTokenizer
from tests.model.conftest import small_config

READERS: dict[str, Callable[[Path], object]] = {
    "model_index.json": lambda folder: read_defaults(folder, small_config()),
    "scheduler/scheduler_config.json": lambda folder: read_defaults(folder, small_config()),
    "transformer/config.json": lambda f: MaskedImageTransformer.from_pretrained(f / "transformer"),
    "vqvae/config.json": lambda folder: VQTokenizer.from_pretrained(folder / "vqvae"),
    "text_encoder/config.json": lambda f: CLIPTextEncoder.from_pretrained(f / "text_encoder"),
    "tokenizer/vocab.json": lambda folder: CLIPTokenizer.from_pretrained(folder / "tokenizer"),
    "tokenizer/merges.txt": lambda folder: CLIPTokenizer.from_pretrained(folder / "tokenizer"),
    "tokenizer/special_tokens_map.json": lambda f: CLIPTokenizer.from_pretrained(f / "tokenizer"),
}
TABLES = [name for name in READERS if name.endswith(".json")]
ODD = st.one_of(
    st.sampled_from([None, True, 0, -1, 1, 7, 1.5, 1 << 31, 1 << 70, float("nan"), float("inf")]),
    st.sampled_from(["", "x", "\x00", "\ud83d", [], [1], ["a"], [[]], {}, {"a": 1}, [0, -8, 1]]),
    st.lists(st.integers(-3, 70000), max_size=9),
    st.text(max_size=5),
)
WORDS = {token: index for index, token in enumerate([BOS_TOKEN, EOS_TOKEN, "a", "b"])}
many = settings(
    max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@pytest.fixture(scope="module")
def whole(tokenizer: CLIPTokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.model.conftest import small_painter

    folder = tmp_path_factory.mktemp("whole") / "painter"
    small_painter(tokenizer).save_pretrained(folder)
    return folder


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "painter"))


def read_or_one_line(folder: Path, name: str) -> str | None:
    """None when the part loads; else the line. Any other exception fails the test."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            READERS[name](folder)
        except ModelError as error:
            line = str(error)
        else:
            return None
    assert "\n" not in line
    assert len(line) > 20
    return line


@pytest.mark.parametrize("name", TABLES)
@many
@given(data=st.data())
def test_any_value_under_any_key(folder: Path, whole: Path, name: str, data: st.DataObject) -> None:
    table = json.loads((whole / name).read_text(encoding="utf-8"))
    for key in data.draw(st.lists(st.sampled_from(sorted(table)), min_size=1, max_size=2)):
        table[key] = data.draw(ODD)
    (folder / name).write_text(json.dumps(table), encoding="utf-8")
    read_or_one_line(folder, name)


@pytest.mark.parametrize("name", READERS)
@many
@given(data=st.data())
def test_bytes_cut_and_changed(folder: Path, whole: Path, name: str, data: st.DataObject) -> None:
    content = bytearray((whole / name).read_bytes())
    for place in data.draw(st.lists(st.integers(0, len(content) - 1), max_size=3)):
        content[place] = data.draw(st.integers(0, 255))
    kept = data.draw(st.one_of(st.just(len(content)), st.integers(0, len(content))))
    (folder / name).write_bytes(bytes(content[:kept]))
    read_or_one_line(folder, name)


@pytest.mark.parametrize("name", TABLES)
@pytest.mark.parametrize("text", ["", "[]", "null", "7", "[" * 100_000, '{"a":' * 100_000, "\x00"])
def test_tables_that_are_none(folder: Path, name: str, text: str) -> None:
    (folder / name).write_text(text, encoding="utf-8")
    assert read_or_one_line(folder, name) is not None


@pytest.mark.parametrize("name", [n for n in READERS if n != "tokenizer/special_tokens_map.json"])
def test_a_folder_in_a_file_s_place(folder: Path, name: str) -> None:
    (folder / name).unlink()
    assert read_or_one_line(folder, name) is not None
    (folder / name).mkdir()
    assert read_or_one_line(folder, name) is not None


@pytest.mark.parametrize(
    ("key", "value", "line"),
    [
        ("text_tokens", "77", "text_tokens is '77': expected int"),
        ("text_tokens", 1, "text_tokens is 1: expected at least 2"),
        ("resolution_px", 0, "resolution_px is 0: expected at least 1"),
        ("preference_score", "high", "preference_score is 'high': expected float"),
        ("negative_prompt", None, "negative_prompt is None: expected str"),
    ],
)
def test_defaults_that_cannot_be(folder: Path, key: str, value: object, line: str) -> None:
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, key: value}))
    with pytest.raises(ModelError) as error:
        TextToImage.from_pretrained(folder)
    assert line in str(error.value)


@pytest.mark.parametrize(
    ("vocab", "merges", "line"),
    [
        ({"a": "1"}, [], "gives 'a' the id '1'"),
        ({"a": -1}, [], "gives 'a' the id -1"),
        (WORDS, ["a b"], "merges into or from 'ab'"),
        ({}, ["a"], "has the merge 'a': expected a pair"),
        ({}, [["a", 1]], "expected a pair"),
        ({}, "a b", "merges are no list"),
    ],
)
def test_tokenizers_that_cannot_be(
    tmp_path: Path, vocab: dict[str, object], merges: object, line: str
) -> None:
    table = {"model": {"vocab": vocab, "merges": merges}}
    (tmp_path / "tokenizer.json").write_text(json.dumps(table))
    with pytest.raises(ModelError) as error:
        CLIPTokenizer.from_pretrained(tmp_path)
    assert line in str(error.value)
    assert "tokenizer.json" in str(error.value)
