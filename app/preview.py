"""How an image came about: its tokens after every step, as a GIF or a strip of pictures."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from infra.storage import write_bytes

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

    from model import TextToImage

KINDS = ("gif", "strip")
MAX_FRAMES = 16  # of many steps these are shown, evenly spaced, the last among them
FRAME_MS, LAST_FRAME_MS = 120, 1500
VEIL = 0.72  # grey of what is still masked, in [0, 1]
GAP_PX = 4


class Recorder:
    """Keeps the tokens after each step (two bytes each, in memory) until frames are asked for."""

    def __init__(self, painter: TextToImage, batch_size: int) -> None:
        self.painter = painter
        self.batch_size = batch_size
        self._steps: dict[int, list[Tensor]] = {}
        self._open: list[Tensor] = []
        self._finished = 0

    def add(self, tokens_BHW: Tensor) -> None:
        """The tokens of one batch after one more step."""
        self._open.append(tokens_BHW.int().cpu())
        if not (tokens_BHW == self.painter.transformer.config.mask_token_id).any():
            self._steps[self._finished] = self._open
            self._open, self._finished = [], self._finished + 1

    def frames(self, index: int) -> list[Image]:
        """Image ``index`` after some of its steps; masked places are grey."""
        import torch

        from model.pixels import to_images

        batch, row = divmod(index, self.batch_size)
        steps = self._steps[batch]
        count = min(len(steps), MAX_FRAMES)
        shown = [steps[len(steps) * (n + 1) // count - 1][row] for n in range(count)]
        tokens_NHW = torch.stack(shown).long().to(self.painter.device)
        masked_NHW = tokens_NHW == self.painter.transformer.config.mask_token_id
        pixels_N3HW = self.painter.decode_pixels(tokens_NHW.masked_fill(masked_NHW, 0))
        factor = self.painter.vq.downsample_factor
        veiled_NHW = masked_NHW.repeat_interleave(factor, 1).repeat_interleave(factor, 2)
        return to_images(pixels_N3HW.masked_fill(veiled_NHW[:, None], VEIL))

    def save(self, index: int, path: Path, kind: str, lineage: Mapping[str, str]) -> Path:
        """Write the frames beside the image at ``path``: NAME-steps.gif or NAME-steps.png."""
        frames = self.frames(index)
        if kind == "gif":
            target = path.with_name(f"{path.stem}-steps.gif")
            write_bytes(target.absolute().as_uri(), _gif(frames))
        else:
            from app.contact_sheet import save_png

            target = path.with_name(f"{path.stem}-steps.png")
            save_png(side_by_side(frames), target, lineage)
        return target


def _gif(frames: list[Image]) -> bytes:
    buffer = io.BytesIO()
    durations = [FRAME_MS] * (len(frames) - 1) + [LAST_FRAME_MS]
    frames[0].save(
        buffer, "GIF", save_all=True, append_images=frames[1:], duration=durations, loop=0
    )
    return buffer.getvalue()


def side_by_side(images: list[Image]) -> Image:
    """The images in a row, pixel by pixel, with a little white between them."""
    from PIL import Image

    width = sum(image.width for image in images) + GAP_PX * (len(images) - 1)
    sheet = Image.new("RGB", (width, max(image.height for image in images)), "white")
    left = 0
    for image in images:
        sheet.paste(image, (left, 0))
        left += image.width + GAP_PX
    return sheet
