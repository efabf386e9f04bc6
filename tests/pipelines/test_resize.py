"""Resizing: byte for byte what img2dataset's own resizer makes of the same pixels."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import sys
import types
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipelines.config import ResizeConfig
from pipelines.resize import cropped, encoded, shrunk

SIZES = [(512, 512), (560, 512), (300, 771), (256, 256), (257, 256), (255, 900), (1001, 333),
         (3, 5), (1, 700), (640, 9)]  # fmt: skip
FORMATS = [("jpg", 95), ("jpg", 60), ("webp", 90), ("webp", 100), ("png", 6)]


@pytest.fixture(scope="module")
def theirs() -> Any:
    """img2dataset's module ``resizer`` alone: its package imports torch, ray and wandb."""
    package = importlib.util.find_spec("img2dataset")
    assert package is not None
    assert package.submodule_search_locations
    path = Path(package.submodule_search_locations[0], "resizer.py")
    spec = importlib.util.spec_from_file_location("resizer_of_img2dataset", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with warnings.catch_warnings(), pytest.MonkeyPatch.context() as patch:
        warnings.simplefilter("ignore")
        patch.setenv("NO_ALBUMENTATIONS_UPDATE", "1")
        if sys.version_info >= (3, 13):
            patch.setitem(sys.modules, "imghdr", types.ModuleType("imghdr"))
        spec.loader.exec_module(module)
    # It swaps file descriptors 1 and 2, which pytest has taken.
    vars(module)["SuppressStdoutStderr"] = contextlib.nullcontext
    return module.Resizer


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("encode_format", "quality"), FORMATS)
@pytest.mark.parametrize("crop", ["square", "none"])
def test_bytes_are_those_of_img2dataset(
    size: tuple[int, int], encode_format: str, quality: int, crop: str, theirs: Any
) -> None:
    rng = np.random.default_rng(sum(size))
    pixels = rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    config = ResizeConfig.model_validate(
        {"crop": crop, "encode_format": encode_format, "encode_quality": quality}
    )
    part = cropped(pixels, config)
    pixmap = b"P6\n%d %d\n255\n" % (part.shape[1], part.shape[0]) + part.tobytes()
    resizer = theirs(256, "keep_ratio", True, encode_format=encode_format, encode_quality=quality)
    data, width_px, height_px, _, _, error = resizer(io.BytesIO(pixmap))
    assert error is None
    small = shrunk(part, config)
    assert (small.shape[1], small.shape[0]) == (width_px, height_px)
    assert encoded(small, config) == data


def test_nothing_heavy_is_imported() -> None:
    """A Spark worker that stores images needs neither img2dataset nor albumentations."""
    import subprocess

    code = (
        "import sys, numpy as np; from pipelines.config import ResizeConfig;"
        "from pipelines.resize import encoded;"
        "encoded(np.zeros((8, 8, 3), np.uint8), ResizeConfig());"
        "print([m for m in ('albumentations', 'img2dataset', 'torch') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.strip() == "[]"
