"""The part of a large picture that an edit is painted in, and at which size.

Shape suffixes: B images, 3 colours, H/W pixels.
"""

import math
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

# Of the mask's larger side: what is shown to the network around it, on each side.
CONTEXT_SHARE = 0.25


@dataclass(frozen=True)
class Window:
    """A box of a picture in pixels, and the size that the network sees it in."""

    top: int
    left: int
    height: int
    width: int
    seen_px: tuple[int, int]  # height, width

    def of(self, pixels_3HW: Tensor) -> Tensor:
        """The pixels in the window, as the network sees them."""
        return resized(self._cut(pixels_3HW)[None], self.seen_px)[0]

    def of_mask(self, mask_HW: Tensor) -> Tensor:
        """The same of a mask: true wherever a true pixel is seen."""
        inside_1HW = self._cut(mask_HW).float()[None]
        return F.adaptive_max_pool2d(inside_1HW, self.seen_px)[0] > 0

    def put(self, pixels_3HW: Tensor, painted_3HW: Tensor) -> None:
        """Write what was painted of the window into the picture."""
        self._cut(pixels_3HW).copy_(resized(painted_3HW[None], (self.height, self.width))[0])

    def _cut(self, x: Tensor) -> Tensor:
        return x[..., self.top : self.top + self.height, self.left : self.left + self.width]


def window_of(mask_HW: Tensor, resolution_px: int) -> Window | None:
    """Where to paint mask_HW with a network made for `resolution_px` squared; None: nowhere.

    A picture of no more pixels than that, or one that is painted everywhere, is its own window. Of
    a larger one it is the mask's box with a quarter of its larger side on all sides, or
    `resolution_px` where that is more, moved into the picture. A window of more pixels than the
    network was made for is seen smaller.
    """
    height, width = mask_HW.shape
    rows, columns = mask_HW.any(dim=1).nonzero()[:, 0], mask_HW.any(dim=0).nonzero()[:, 0]
    if not len(rows):
        return None
    if height * width <= resolution_px**2 or bool(mask_HW.all()):
        return Window(0, 0, height, width, (height, width))
    down, across = (int(rows[0]), int(rows[-1]) + 1), (int(columns[0]), int(columns[-1]) + 1)
    context_px = math.ceil(CONTEXT_SHARE * max(down[1] - down[0], across[1] - across[0]))
    top, tall = _span(*down, context_px, resolution_px, height)
    left, wide = _span(*across, context_px, resolution_px, width)
    return Window(top, left, tall, wide, seen_size(tall, wide, resolution_px))


def _span(first: int, end: int, context_px: int, least_px: int, size_px: int) -> tuple[int, int]:
    """(start, length) along one axis of a picture that is `size_px` long."""
    length = min(size_px, max(least_px, end - first + 2 * context_px))
    start = (first + end - length) // 2
    return min(max(start, 0), size_px - length), length


def seen_size(height: int, width: int, resolution_px: int) -> tuple[int, int]:
    """(height, width) with at most as many pixels as `resolution_px` squared, of the same shape."""
    scale = resolution_px / math.sqrt(height * width)
    if scale >= 1:
        return height, width
    return max(1, int(height * scale)), max(1, int(width * scale))


def resized(pixels_B3HW: Tensor, size_px: tuple[int, int]) -> Tensor:
    """The pixels in another size (height, width), in [0, 1]; in their own they are as they were."""
    if pixels_B3HW.shape[2:] == size_px:
        return pixels_B3HW
    return F.interpolate(pixels_B3HW, size_px, mode="bicubic", antialias=True).clamp(0, 1)
