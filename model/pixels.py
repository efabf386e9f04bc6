"""Pictures and tensors: images to [0, 1] tensors and back, pixel masks of every kind.

Shape suffixes: B images, 3 colours, H/W pixels or token rows and columns.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from model.errors import ModelError

MAX_SIDE_PX = 8192
Picture = Image.Image | NDArray[Any] | Tensor
_MID_GREY = {np.dtype(np.uint8): 127, np.dtype(np.uint16): 32767, np.dtype(np.int32): 32767}


def check_sides(height_px: int, width_px: int) -> None:
    """ModelError for a picture with a side beyond MAX_SIDE_PX."""
    if max(height_px, width_px) > MAX_SIDE_PX:
        raise ModelError(
            f"a picture of {width_px} x {height_px} px: expected at most {MAX_SIDE_PX} px a side"
        )


def to_images(pixels_B3HW: Tensor) -> list[Image.Image]:
    """RGB images of values in [0, 1]."""
    levels = (pixels_B3HW.clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu()
    return [Image.fromarray(image.numpy()) for image in levels]


def to_pixels(images: Sequence[Picture]) -> Tensor:
    """pixels_B3HW in [0, 1] of images of one size; what is transparent becomes white.

    Images are PIL's in any mode, or arrays (H, W) or (H, W, 1 | 3 | 4) of uint8. Raises ModelError
    when sizes differ.
    """
    pictures = [_as_rgb(image) for image in images]
    sizes = sorted({picture.size for picture in pictures})
    if len(sizes) != 1:
        raise ModelError(
            f"images have the sizes {sizes} (width, height): expected one size for all"
        )
    levels = np.stack([np.asarray(picture) for picture in pictures])
    return torch.from_numpy(levels).permute(0, 3, 1, 2).float() / 255


def _as_rgb(image: Picture) -> Image.Image:
    if not isinstance(image, Image.Image):
        levels = np.asarray(image)
        if levels.dtype != np.uint8 or levels.ndim not in (2, 3) or 0 in levels.shape:
            raise ModelError(
                f"an image is an array {levels.shape} of {levels.dtype}: expected (height, width, "
                "3) of uint8"
            )
        image = _from_levels(levels, "an image")
    if min(image.size) < 1:
        raise ModelError(f"an image has size {image.size}: expected at least 1 x 1 px")
    if image.has_transparency_data:
        paper = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(paper, image.convert("RGBA")).convert("RGB")
    if image.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    return image.convert("RGB")


def _from_levels(levels: NDArray[Any], what: str) -> Image.Image:
    if levels.ndim == 3 and levels.shape[2] == 1:
        levels = levels[:, :, 0]
    if levels.ndim == 3 and levels.shape[2] not in (3, 4):
        raise ModelError(f"{what} has {levels.shape[2]} channels: expected 1, 3 or 4")
    return Image.fromarray(np.ascontiguousarray(levels))


def to_masks(masks: Sequence[Picture], size: tuple[int, int]) -> Tensor:
    """mask_BHW (bool) of masks of `size` (width, height): true is what shall be painted.

    PIL images in any mode are true where they are lighter than mid-grey and not transparent.
    Arrays (H, W) or (H, W, 1 | 3 | 4) are bool, uint8 or uint16 (above the middle), or floats in
    [0, 1] (above 0.5).
    """
    arrays = [_as_mask(mask) for mask in masks]
    for array in arrays:
        if array.shape[::-1] != size:
            raise ModelError(
                f"a mask has size {array.shape[::-1]} (width, height): expected the image's, {size}"
            )
    return torch.from_numpy(np.stack(arrays))


def _as_mask(mask: Picture) -> NDArray[np.bool_]:
    if isinstance(mask, Image.Image):
        if mask.has_transparency_data:
            paper = Image.new("RGBA", mask.size, "black")
            mask = Image.alpha_composite(paper, mask.convert("RGBA"))
        deep = mask.mode == "F" or mask.mode.startswith("I")
        levels = np.asarray(mask if deep or mask.mode == "1" else mask.convert("L"))
    else:
        levels = np.asarray(mask)
    if levels.ndim == 3 and levels.shape[2] == 1:
        levels = levels[:, :, 0]
    if levels.ndim == 3 and levels.dtype == np.uint8:
        return _as_mask(_from_levels(levels, "a mask"))
    if levels.ndim != 2:
        raise ModelError(f"a mask has shape {levels.shape}: expected (height, width)")
    if levels.dtype == np.bool_:
        return levels
    if np.issubdtype(levels.dtype, np.floating):
        if levels.size and not (levels.min() >= 0 and levels.max() <= 1):
            raise ModelError("a mask of floats leaves [0, 1]: expected 1 where to paint, else 0")
        out: NDArray[np.bool_] = levels > 0.5
        return out
    middle = _MID_GREY.get(levels.dtype.newbyteorder("="))
    if middle is None:
        raise ModelError(
            f"a mask is of {levels.dtype}: expected bool, uint8, uint16 or floats in [0, 1]"
        )
    if levels.size and levels.max() == 1:
        raise ModelError(
            f"a mask of {levels.dtype} holds 0 and 1 only, where {middle + 1} and more is painted: "
            "give it as bool, or times 255"
        )
    above: NDArray[np.bool_] = levels > middle
    return above


def token_masks(mask_BHW: Tensor, factor: int) -> Tensor:
    """The tokens of which any of the factor x factor pixels is in mask_BHW."""
    return F.max_pool2d(mask_BHW.float()[:, None], factor)[:, 0] > 0


def grown(mask_BHW: Tensor, steps: int) -> Tensor:
    """mask_BHW with `steps` more places on all sides, diagonals included."""
    for _ in range(steps):
        mask_BHW = F.max_pool2d(mask_BHW.float()[:, None], 3, stride=1, padding=1)[:, 0] > 0
    return mask_BHW


def feathered(mask_BHW: Tensor, feather_px: int) -> Tensor:
    """Opacities in [0, 1] of what is painted: 0 outside mask_BHW, rising to 1 inside it.

    A pixel k px inside (measured along rows, columns and diagonals) has k / (feather_px + 1), so
    every pixel outside stays as it is. The image's own border is no edge.
    """
    if feather_px < 0:
        raise ModelError(f"feather_px is {feather_px}: expected 0 or more")
    alpha_BHW = torch.zeros(mask_BHW.shape, device=mask_BHW.device)
    inside_BHW = mask_BHW
    for _ in range(feather_px + 1):
        alpha_BHW += inside_BHW
        if not inside_BHW.any():
            break
        inside_BHW = ~grown(~inside_BHW, 1)
    return alpha_BHW / (feather_px + 1)


def padded(x: Tensor, multiple: int) -> Tensor:
    """x (B, C, H, W) with its last rows and columns repeated until `multiple` divides H and W."""
    height, width = x.shape[2:]
    padding = (0, -width % multiple, 0, -height % multiple)
    return F.pad(x.float(), padding, mode="replicate")
