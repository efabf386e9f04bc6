"""Weights that were cut, flipped or forged: one line, or tensors that fit; never anything else."""

import json
import struct
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from model.errors import ModelError
from model.transformer import MaskedImageTransformer

WEIGHTS = "diffusion_pytorch_model.safetensors"
MakeTransformer = Callable[..., MaskedImageTransformer]
many = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@pytest.fixture
def folder(tmp_path: Path, make_transformer: MakeTransformer) -> Path:
    make_transformer().save_pretrained(tmp_path / "transformer")
    (tmp_path / "kept").write_bytes((tmp_path / "transformer" / WEIGHTS).read_bytes())
    return tmp_path / "transformer"


def load_or_one_line(folder: Path) -> bool:
    """True when the folder loads; a ModelError of one line is the only other outcome."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            MaskedImageTransformer.from_pretrained(folder)
        except ModelError as error:
            message = str(error)
        else:
            return True
    assert "\n" not in message
    assert len(message) > 20
    return False


@many
@given(data=st.data())
def test_flipped_bits(folder: Path, data: st.DataObject) -> None:
    content = bytearray((folder.parent / "kept").read_bytes())
    header = 8 + struct.unpack("<Q", content[:8])[0]
    places = st.one_of(st.integers(0, header - 1), st.integers(0, len(content) - 1))
    for place in data.draw(st.lists(places, min_size=1, max_size=4)):
        content[place] ^= 1 << data.draw(st.integers(0, 7))
    (folder / WEIGHTS).write_bytes(bytes(content))
    load_or_one_line(folder)


@many
@given(share=st.floats(0, 1, exclude_max=True))
def test_cut_files_never_load(folder: Path, share: float) -> None:
    content = (folder.parent / "kept").read_bytes()
    (folder / WEIGHTS).write_bytes(content[: int(share * len(content))])
    assert not load_or_one_line(folder)


def test_bytes_beyond_the_last_tensor_are_refused(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes((folder.parent / "kept").read_bytes() + b"PK\x03\x04")
    assert not load_or_one_line(folder)


@pytest.mark.parametrize("length", [0, 1 << 30, 1 << 62, (1 << 64) - 1])
def test_a_header_that_lies_about_its_length_is_refused(folder: Path, length: int) -> None:
    content = (folder.parent / "kept").read_bytes()
    (folder / WEIGHTS).write_bytes(struct.pack("<Q", length) + content[8:])
    assert not load_or_one_line(folder)


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": "F32", "shape": [1 << 40, 1 << 40], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]},
        {"dtype": "OBJECT", "shape": [1], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [1], "data_offsets": [0, 1 << 50]},
    ],
)
def test_forged_entries_are_refused(folder: Path, entry: dict[str, object]) -> None:
    header = json.dumps({"context_embedder.bias": entry}).encode()
    (folder / WEIGHTS).write_bytes(struct.pack("<Q", len(header)) + header + bytes(4))
    assert not load_or_one_line(folder)


@many
@given(data=st.binary(max_size=200))
def test_any_bytes_as_an_index_are_refused(folder: Path, data: bytes) -> None:
    (folder / WEIGHTS).unlink(missing_ok=True)
    (folder / f"{WEIGHTS}.index.json").write_bytes(data)
    assert not load_or_one_line(folder)


@pytest.mark.parametrize(
    "index",
    [
        {"weight_map": []},
        {"weight_map": "x"},
        {"weight_map": {"a": 1}},
        {"weight_map": {"a": None, "b": "c"}},
        {"weight_map": {"a": ""}},
        {"weight_map": {"a": ".."}},
        {"weight_map": {"a": "/etc/passwd"}},
        {"weight_map": {"a": "x\x00.safetensors"}},
        {},
    ],
)
def test_odd_indexes_are_refused(folder: Path, index: dict[str, object]) -> None:
    (folder / WEIGHTS).unlink()
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps(index))
    assert not load_or_one_line(folder)


@pytest.mark.parametrize(
    "key", ["num_layers", "attention_head_dim", "vocab_size", "axes_dims_rope"]
)
@pytest.mark.parametrize("value", ["8", None, -1, 0, 1.5, [1], {}, True, 1 << 60])
def test_config_values_of_the_wrong_kind_are_refused(folder: Path, key: str, value: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, key: value}))
    assert not load_or_one_line(folder) or value is True
