"""The contact sheet: every image in its place, readable words, lineage inside."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from app.contact_sheet import CELL_PX, PAPER, Row, draw_sheet, save_png
from app.sources import lineage_of
from app.status import DONE, RunStatus, StepStatus

RED, BLUE = (200, 0, 0), (0, 0, 200)
PROMPTS = ["a red thing", "a prompt of very many words " * 9]


def sheet() -> Image.Image:
    rows = [
        Row("first", "16 px\noverall 0.50", [Image.new("RGB", (16, 16), RED)] * 2),
        Row("second", "512 px", [Image.new("RGB", (512, 512), BLUE)] * 2),
    ]
    return draw_sheet("a title", PROMPTS, rows)


def test_every_image_is_there_in_full_size() -> None:
    pixels = np.asarray(sheet())
    for color in (RED, BLUE):
        assert int((pixels == color).all(axis=2).sum()) == 2 * CELL_PX**2


def test_there_are_words_and_they_stay_above_the_images() -> None:
    pixels = np.asarray(sheet())
    top = int(np.argmax((pixels == RED).all(axis=2).any(axis=1)))
    words = ~(pixels[:top] == PAPER).all(axis=2)
    assert words.mean() > 0.005
    assert not words[top - 3 :].any()


def test_the_lineage_is_in_the_file(tmp_path: Path) -> None:
    path = tmp_path / "sheet.png"
    save_png(sheet(), path, {"prompt": "ein Fuchs, müde", "checkpoint": "s3://a/b"})
    with Image.open(path) as image:
        assert image.info["prompt"] == "ein Fuchs, müde"
        assert image.info["checkpoint"] == "s3://a/b"


def test_an_images_lineage_ends_at_its_own_stage() -> None:
    steps = [
        StepStatus("curate:a", "dataset", DONE, dataset_version="d" * 64),
        StepStatus("tokenizer", "tokenizer", DONE, checkpoint_sha256="0" * 64),
        StepStatus("one", "stage", DONE, checkpoint_sha256="1" * 64, checkpoint_uri="s3://a/1"),
        StepStatus("two", "stage", DONE, checkpoint_sha256="2" * 64, checkpoint_uri="s3://a/2"),
    ]
    run = RunStatus("r", "demo", "p", "f" * 64, "c", 1, "t", "t", steps=steps)
    lineage = lineage_of(run, steps[2])
    assert "1111" in lineage["checkpoints"]
    assert "0000" in lineage["checkpoints"]
    assert "2222" not in lineage["checkpoints"]
    assert "dddd" in lineage["datasets"]
