"""Pictures to tensors and back, and which tokens a pixel mask touches."""

import numpy as np
import torch
from PIL import Image

from model.pixels import to_images, to_masks, to_pixels, token_masks


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


def test_mask_is_what_is_lighter_than_mid_grey() -> None:
    mask = Image.fromarray(np.array([[0, 127, 128, 255]], dtype=np.uint8))
    assert to_masks([mask], (4, 1)).tolist() == [[[False, False, True, True]]]


def test_one_masked_pixel_masks_its_token() -> None:
    mask = torch.zeros(1, 4, 6, dtype=torch.bool)
    mask[0, 3, 1] = True
    assert token_masks(mask, 2).tolist() == [[[False, False, False], [True, False, False]]]
