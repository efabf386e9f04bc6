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
_FAR = np.int32(1 << 30)  # deeper than any picture
_MID_GREY = {np.dtype(np.uint8): 127, np.dtype(np.uint16): 32767, np.dtype(np.int32): 32767}


def check_sides(height_px: int, width_px: int) -> None:
    """ModelError for a picture with a side beyond MAX_SIDE_PX."""
    if max(height_px, width_px) > MAX_SIDE_PX:
        raise ModelError(
            f"a picture of {width_px} x {height_px} px: expected at most {MAX_SIDE_PX} px a side"
        )


def to_images(pixels_BCHW: Tensor) -> list[Image.Image]:
    """RGB images of values in [0, 1]; RGBA ones of four channels."""
    levels = (pixels_BCHW.clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu()
    return [Image.fromarray(image.numpy()) for image in levels]


def to_pixels(images: Sequence[Picture]) -> Tensor:
    """pixels_B3HW in [0, 1] of images of one size; what is transparent becomes white."""
    return on_white(layers_of(images))


def layers_of(images: Sequence[Picture]) -> Tensor:
    """layers_B4HW in [0, 1] of images of one size: three colours and how opaque they are.

    Images are PIL's, or arrays (H, W) or (H, W, 1 | 3 | 4) of uint8. Of 16 bits the upper 8 are
    taken; "I" holds 0 to 65535 and "F" 0 to 1. Raises ModelError for other values, or when sizes
    differ.
    """
    pictures = [_as_colours(image) for image in images]
    sizes = sorted({picture.size for picture in pictures})
    if len(sizes) != 1:
        raise ModelError(
            f"images have the sizes {sizes} (width, height): expected one size for all"
        )
    levels = np.stack([np.asarray(picture.convert("RGBA")) for picture in pictures])
    return torch.from_numpy(levels).permute(0, 3, 1, 2).float() / 255


def on_white(layers_B4HW: Tensor) -> Tensor:
    """pixels_B3HW: what is seen of the layers on white paper; opaque pixels to the bit."""
    colours_B3HW, opacity_B1HW = layers_B4HW[:, :3], layers_B4HW[:, 3:]
    return torch.lerp(torch.ones_like(colours_B3HW), colours_B3HW, opacity_B1HW)


def laid_over(layers_B4HW: Tensor, paint_B3HW: Tensor, alpha_B1HW: Tensor) -> list[Image.Image]:
    """Opaque paint with alpha_B1HW over the layers; where that is 0 they are as they were.

    RGBA where anything is transparent in the end, else RGB.
    """
    colours_B3HW, opacity_B1HW = layers_B4HW[:, :3], layers_B4HW[:, 3:]
    covered_B1HW = alpha_B1HW + opacity_B1HW * (1 - alpha_B1HW)
    share_B1HW = alpha_B1HW / covered_B1HW.clamp(min=1e-6)
    mixed_B4HW = torch.cat([torch.lerp(colours_B3HW, paint_B3HW, share_B1HW), covered_B1HW], dim=1)
    images = to_images(torch.where(alpha_B1HW > 0, mixed_B4HW, layers_B4HW))
    is_opaque = [bool((np.asarray(image)[:, :, 3] == 255).all()) for image in images]
    return [
        image.convert("RGB") if opaque else image
        for image, opaque in zip(images, is_opaque, strict=True)
    ]


def _as_colours(image: Picture) -> Image.Image:
    """RGB, or RGBA where the image says that something may be transparent."""
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
    if _is_deep(image):
        return _from_deep(image)
    return image.convert("RGBA" if image.has_transparency_data else "RGB")


def _is_deep(image: Image.Image) -> bool:
    """Of more than 8 bits, which Pillow's own conversions cut off at white."""
    return image.mode == "F" or image.mode.startswith("I")


def _from_deep(image: Image.Image) -> Image.Image:
    levels = np.asarray(image)
    low, high = levels.min(), levels.max()
    if image.mode == "F":
        if not (low >= 0 and high <= 1):
            raise ModelError(f"an image of floats has {low} to {high}: expected values in [0, 1]")
        grey = (levels * 255).round()
    else:
        # 8-bit levels in so wide a type would be black, and so would a very dark image be white.
        if image.mode == "I" and (low < 0 or high > 65535 or 0 < high <= 255):
            raise ModelError(
                f"an image of 32 bits has {low} to {high}: expected 0 to 65535, and some above 255"
            )
        grey = levels >> 8
    out = Image.fromarray(grey.astype(np.uint8)).convert("RGB")
    if "transparency" in image.info:
        seen = levels != image.info["transparency"]
        out.putalpha(Image.fromarray((seen * 255).astype(np.uint8)))
    return out


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
        if _is_deep(mask):
            levels = np.asarray(mask)
            if "transparency" in mask.info:
                levels = np.where(levels == mask.info["transparency"], 0, levels)
        elif mask.has_transparency_data:
            paper = Image.new("RGBA", mask.size, "black")
            levels = np.asarray(Image.alpha_composite(paper, mask.convert("RGBA")).convert("L"))
        else:
            levels = np.asarray(mask if mask.mode == "1" else mask.convert("L"))
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
    depth_BHW = _depth(mask_BHW.cpu().numpy()).clip(max=feather_px + 1)
    return torch.from_numpy(depth_BHW).float() / (feather_px + 1)


def _depth(inside_BHW: NDArray[np.bool_]) -> NDArray[np.int32]:
    """Steps to the nearest place outside, along rows, columns and diagonals; 0 is outside.

    Two passes, down and up: each row is a step further than the nearest of the three places in the
    row before, or than its own neighbours, which the running minimum of depth - column finds.
    """
    depth_BHW = np.where(inside_BHW, _FAR, np.int32(0))
    columns_W = np.arange(depth_BHW.shape[2], dtype=np.int32)
    for rows_HBW in (depth_BHW.swapaxes(0, 1), depth_BHW.swapaxes(0, 1)[::-1]):
        before_BW = np.full_like(rows_HBW[0], _FAR)
        for row_BW in rows_HBW:
            near_BW = before_BW + 1
            np.minimum(near_BW[:, 1:], before_BW[:, :-1] + 1, out=near_BW[:, 1:])
            np.minimum(near_BW[:, :-1], before_BW[:, 1:] + 1, out=near_BW[:, :-1])
            np.minimum(row_BW, near_BW, out=row_BW)
            for way in (1, -1):
                shifted_BW = (row_BW - way * columns_W)[:, ::way]
                row_BW[:] = np.minimum.accumulate(shifted_BW, axis=1)[:, ::way] + way * columns_W
            before_BW = row_BW
    return depth_BHW


def padded(x: Tensor, multiple: int) -> Tensor:
    """x (B, C, H, W) with its last rows and columns repeated until `multiple` divides H and W."""
    height, width = x.shape[2:]
    padding = (0, -width % multiple, 0, -height % multiple)
    return F.pad(x.float(), padding, mode="replicate")
