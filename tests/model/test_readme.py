"""The README of `model/`: its blocks run as they stand, on a small model."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from PIL import Image

import model
from model.paint_options import PaintOptions
from model.text_to_image import TextToImage

FOLDER = Path(__file__).resolve().parents[2] / "model"
README = (FOLDER / "README.md").read_text(encoding="utf-8")
NOTEBOOK, SMALL, TRAINING = re.findall(r"```python\n(.*?)```", README, re.S)


@pytest.fixture
def saved(
    painter: TextToImage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[TextToImage]:
    painter.save_pretrained(tmp_path / "models" / "meissonic")
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # on layers this small a second thread only waits
    yield painter
    torch.set_num_threads(threads)


def test_the_notebook_has_ten_lines_and_runs(saved: TextToImage, tmp_path: Path) -> None:
    shown: list[Image.Image] = []
    names: dict[str, object] = {"display": shown.append}
    exec(NOTEBOOK, names)
    assert len(NOTEBOOK.splitlines()) - NOTEBOOK.count("\n\n") <= 10
    fox, blue, wide = (names[name] for name in ("fox", "blue", "wide"))
    assert isinstance(fox, Image.Image)
    assert isinstance(blue, Image.Image)
    assert isinstance(wide, Image.Image)
    assert (fox.size, blue.size, wide.size) == ((24, 24), (24, 24), (24 + 512, 24))
    assert wide.crop((256, 0, 280, 24)).tobytes() == fox.tobytes()
    assert len(shown) == 6
    assert shown[-1].tobytes() == fox.tobytes()
    with Image.open(tmp_path / "fox.png") as file:
        assert file.tobytes() == fox.tobytes()


def test_the_block_for_small_machines_runs(saved: TextToImage) -> None:
    names: dict[str, object] = {"torch": torch, "TextToImage": TextToImage}
    exec(SMALL.replace('"cuda"', '"cpu"'), names)
    small = names["painter"]
    assert isinstance(small, TextToImage)
    assert small.generate(["a star"], steps=2)[0].size == (24, 24)


def test_the_block_for_training_runs(painter: TextToImage) -> None:
    names: dict[str, object] = {name: getattr(model, name) for name in model.__all__}
    names |= {"transformer": painter.transformer, "text_encoder": painter.text_encoder}
    names["tokens_BHW"] = torch.zeros(2, 4, 4, dtype=torch.int64)
    names["input_ids_BT"] = painter.tokenizer(["a star", ""], 16)
    names["micro_conditions_B5"] = torch.zeros(2, 5)
    exec(TRAINING, names)
    loss = names["loss"]
    assert isinstance(loss, torch.Tensor)
    torch.autograd.backward(loss)
    assert painter.transformer.context_embedder.weight.grad is not None


def test_its_links_and_names_are_there() -> None:
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", README):
        assert (FOLDER / target).exists()
    table = re.search(r"\| call .*?\n\n", README, re.S)
    assert table is not None
    for cell in re.findall(r"^\| (`.*?`) \|", table[0], re.M):
        for name in re.findall(r"`(\w+)`", cell):
            assert hasattr(model, name) or hasattr(TextToImage, name), name
    options = re.search(r"`PaintOptions`' keywords: (.*?)\. Image", README, re.S)
    assert options is not None
    for name in re.findall(r"`(\w+)`", options[1]):
        assert name in PaintOptions.__dataclass_fields__
