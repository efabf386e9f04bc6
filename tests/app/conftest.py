"""`sample` and `edit` as a person types them, and a small model with random weights for both."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from app.cli import app
from model import CLIPTokenizer, LoRA, LoRAConfig, TextToImage
from tests.model.conftest import CAPTIONS, small_painter

STEPS = ["--steps", "3"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "small"
    small_painter(CLIPTokenizer.train(CAPTIONS, 560)).save_pretrained(path)
    return path


@pytest.fixture
def progress_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    """`--json` silences progress for the rest of the process, and with it lines too many."""
    monkeypatch.setenv("ATELIER_QUIET", "")


def atelier(*arguments: str | Path) -> tuple[int, str, list[str]]:
    """(exit code, stdout, lines on stderr)."""
    done = CliRunner().invoke(app, [str(a) for a in arguments])
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done.exit_code, done.stdout, done.stderr.splitlines()


def text_of(path: Path) -> dict[str, str]:
    with Image.open(path) as file:
        return dict(file.text)  # type: ignore[attr-defined]  # PNG files have it


def levels(path: Path) -> np.ndarray[tuple[int, ...], np.dtype[Any]]:
    with Image.open(path) as file:
        return np.asarray(file.convert("RGB"))


def size_px(path: Path) -> tuple[int, int]:
    with Image.open(path) as file:
        return file.size


def picture(path: Path, width: int = 22, height: int = 18, **options: Any) -> Path:
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path, **options)
    return path


def save_style(folder: Path, style: Path) -> Path:
    """Adapters that change what the model paints."""
    painter = TextToImage.from_pretrained(folder)
    lora = LoRA.start({"transformer": painter.transformer}, LoRAConfig(rank=2))
    with torch.no_grad():
        for seed, parameter in enumerate(lora.parameters()):
            parameter.normal_(std=0.5, generator=torch.Generator().manual_seed(seed))
    lora.save_pretrained(style)
    return style
