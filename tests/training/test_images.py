"""What is decoded is what Pillow would make of it, whoever decodes."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
from PIL import Image

from training.images import decode_image

WAYS: list[tuple[str, str, dict[str, Any]]] = [
    ("RGB", "JPEG", {"quality": 92}),
    ("RGB", "JPEG", {"quality": 40, "subsampling": 2}),
    ("RGB", "JPEG", {"quality": 95, "subsampling": 0, "progressive": True}),
    ("L", "JPEG", {}),
    ("CMYK", "JPEG", {}),
    ("RGB", "JPEG", {"keep_rgb": True}),
    ("RGB", "PNG", {}),
    ("P", "PNG", {}),
    ("RGB", "WEBP", {"quality": 80}),
]


def _encoded(mode: str, kind: str, options: dict[str, Any]) -> bytes:
    rng = np.random.default_rng(3)
    small = Image.fromarray(rng.integers(0, 256, (7, 9, 3), dtype=np.uint8))
    sink = io.BytesIO()
    small.resize((61, 43), Image.Resampling.BICUBIC).convert(mode).save(sink, kind, **options)
    return sink.getvalue()


@pytest.mark.parametrize(("mode", "kind", "options"), WAYS)
def test_pixels_are_pillows(mode: str, kind: str, options: dict[str, Any]) -> None:
    data = _encoded(mode, kind, options)
    with Image.open(io.BytesIO(data)) as image:
        expected = np.asarray(image.convert("RGB"))
    found = decode_image(data)
    assert found.dtype == np.uint8
    assert np.array_equal(found, expected)


def test_an_ordinary_jpeg_does_not_go_through_pillow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "open", lambda *_: pytest.fail("Pillow was asked"))
    assert decode_image(_encoded("RGB", "JPEG", {})).shape == (43, 61, 3)


def test_what_is_broken_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    data = _encoded("RGB", "JPEG", {"quality": 92})
    for cut in range(0, len(data) - 2, 37):
        with pytest.raises((OSError, ValueError)):
            decode_image(data[:cut])
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(Image.DecompressionBombError):
        decode_image(data)
