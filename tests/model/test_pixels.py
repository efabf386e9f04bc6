"""Pictures to tensors and back, and which tokens a pixel mask touches."""

import io
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from model.errors import ModelError
from model.pixels import (
    feathered,
    laid_over,
    layers_of,
    to_images,
    to_masks,
    to_pixels,
    token_masks,
)


def test_every_level_comes_back() -> None:
    levels = np.arange(256, dtype=np.uint8).reshape(16, 16, 1).repeat(3, axis=2)
    image = Image.fromarray(levels)
    pixels = to_pixels([image])
    assert pixels.shape == (1, 3, 16, 16)
    assert (float(pixels.min()), float(pixels.max())) == (0.0, 1.0)
    assert np.array_equal(np.asarray(to_images(pixels)[0]), levels)


def test_values_outside_are_clipped() -> None:
    (image,) = to_images(torch.tensor([-0.5, 0.5, 1.5]).view(1, 3, 1, 1))
    assert image.getpixel((0, 0)) == (0, 128, 255)


def test_grey_and_transparent_images_become_rgb() -> None:
    for mode in ("L", "RGBA", "P", "1"):
        assert to_pixels([Image.new(mode, (4, 2))]).shape == (1, 3, 2, 4)


def deep_image(levels: np.ndarray[tuple[int, ...], np.dtype[Any]], clear: int) -> Image.Image:
    """A 16-bit PNG in which one level is transparent, as a reader finds it."""
    buffer = io.BytesIO()
    Image.fromarray(levels.astype(np.uint16)).save(buffer, "PNG", transparency=clear)
    return Image.open(buffer)


def test_deep_images_keep_their_tones() -> None:
    levels = np.linspace(0, 65535, 64).reshape(8, 8).astype(np.uint16)
    want = torch.from_numpy((levels >> 8).astype(np.float32)) / 255
    for image in (
        Image.fromarray(levels),
        Image.fromarray(levels.astype(np.int32)),
        Image.fromarray(((levels >> 8) / 255).astype(np.float32)),
    ):
        assert torch.allclose(to_pixels([image])[0], want.expand(3, 8, 8), atol=1e-6)
    image = deep_image(levels, int(levels[0, 5]))
    assert image.has_transparency_data
    want[0, 5] = 1.0  # white
    assert torch.equal(to_pixels([image])[0], want.expand(3, 8, 8))
    opacity = layers_of([image])[0, 3]
    assert opacity.flatten().tolist() == [0.0 if n == 5 else 1.0 for n in range(64)]
    mask = to_masks([deep_image(levels, 65535)], (8, 8))[0]
    assert torch.equal(mask, torch.from_numpy((levels > 32767) & (levels < 65535)))


@pytest.mark.parametrize(
    ("levels", "line"),
    [
        (np.array([[0, 70000]], np.int32), "has 0 to 70000: expected 0 to 65535"),
        (np.array([[-1, 700]], np.int32), "has -1 to 700: expected 0 to 65535"),
        (np.array([[0, 255]], np.int32), "and some above 255"),
        (np.array([[0, 255]], np.float32), r"has 0.0 to 255.0: expected values in \[0, 1\]"),
        (np.array([[0, np.nan]], np.float32), "expected values in"),
    ],
)
def test_deep_images_whose_tones_nobody_knows_are_refused(
    levels: np.ndarray[tuple[int, ...], np.dtype[Any]], line: str
) -> None:
    with pytest.raises(ModelError, match=line):
        to_pixels([Image.fromarray(levels)])


def test_paint_over_what_is_transparent() -> None:
    layers = layers_of([Image.fromarray(np.full((1, 3, 4), (200, 100, 0, 128), np.uint8))])
    paint = torch.zeros(1, 3, 1, 3)
    (image,) = laid_over(layers, paint, torch.tensor([0.0, 0.5, 1.0]).view(1, 1, 1, 3))
    assert image.mode == "RGBA"
    assert image.getpixel((0, 0)) == (200, 100, 0, 128)
    # Half covered: 0.5 of paint and 0.5 x 128 / 255 of what was there.
    assert image.getpixel((1, 0)) == (67, 33, 0, 192)
    assert image.getpixel((2, 0)) == (0, 0, 0, 255)
    (image,) = laid_over(layers, paint, torch.ones(1, 1, 1, 3))
    assert image.mode == "RGB"


@given(
    st.integers(1, 12), st.integers(1, 12), st.integers(0, 2**32 - 1), st.floats(0.5, 1),
    st.integers(0, 15),
)  # fmt: skip
def test_feathering_counts_steps_to_the_edge(
    height: int, width: int, seed: int, share: float, feather_px: int
) -> None:
    """Against the definition: the nearest pixel outside, along rows, columns and diagonals."""
    mask = np.random.default_rng(seed).random((2, height, width)) < share
    places = np.argwhere(np.ones((height, width), bool))
    for inside, alpha in zip(mask, feathered(torch.from_numpy(mask), feather_px), strict=True):
        outside = np.argwhere(~inside)
        steps = (
            np.abs(places[:, None] - outside[None]).max(axis=2).min(axis=1)
            if len(outside)
            else np.full(len(places), 1000)
        )
        want = steps.clip(max=feather_px + 1) / (feather_px + 1)
        assert np.allclose(alpha.numpy().flatten(), want)


def test_mask_is_what_is_lighter_than_mid_grey() -> None:
    mask = Image.fromarray(np.array([[0, 127, 128, 255]], dtype=np.uint8))
    assert to_masks([mask], (4, 1)).tolist() == [[[False, False, True, True]]]


def test_one_masked_pixel_masks_its_token() -> None:
    mask = torch.zeros(1, 4, 6, dtype=torch.bool)
    mask[0, 3, 1] = True
    assert token_masks(mask, 2).tolist() == [[[False, False, False], [True, False, False]]]
