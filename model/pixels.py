"""Pictures and tensors: PIL images to [0, 1] tensors and back, and pixel masks to token masks.

Shape suffixes: B images, 3 colours, H/W pixels or token rows and columns.
"""

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from model.errors import ModelError


def to_images(pixels_B3HW: Tensor) -> list[Image.Image]:
    """RGB images of values in [0, 1]."""
    levels = (pixels_B3HW.clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu()
    return [Image.fromarray(image.numpy()) for image in levels]


def to_pixels(images: Sequence[Image.Image]) -> Tensor:
    """pixels_B3HW in [0, 1] of images of one size; raises ModelError when sizes differ."""
    sizes = sorted({image.size for image in images})
    if len(sizes) != 1:
        raise ModelError(
            f"images have the sizes {sizes} (width, height): expected one size for all"
        )
    levels = np.stack([np.asarray(image.convert("RGB")) for image in images])
    return torch.from_numpy(levels).permute(0, 3, 1, 2).float() / 255


def to_masks(masks: Sequence[Image.Image], size: tuple[int, int]) -> Tensor:
    """mask_BHW (bool) of grey images of `size` (width, height): true above mid-grey."""
    if bad := [mask.size for mask in masks if mask.size != size]:
        raise ModelError(f"a mask has size {bad[0]} (width, height): expected the image's, {size}")
    return torch.from_numpy(np.stack([np.asarray(mask.convert("L")) for mask in masks]) > 127)


def token_masks(mask_BHW: Tensor, factor: int) -> Tensor:
    """The tokens of which any of the factor x factor pixels is in mask_BHW."""
    return F.max_pool2d(mask_BHW.float()[:, None], factor)[:, 0] > 0
