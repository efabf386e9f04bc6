"""How an image came about: its tokens after every step, as a GIF or a strip of pictures."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from app.contact_sheet import save_png
from infra.digests import canonical_json
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
    """Keeps a batch's tokens after each step (four bytes each) until frames are asked for."""

    def __init__(self, painter: TextToImage, batch_size: int) -> None:
        self.painter = painter
        self.batch_size = batch_size  # frames decoded at a time
        self._steps: list[Tensor] = []

    def add(self, tokens_BHW: Tensor) -> None:
        """The batch's tokens after one more step."""
        self._steps.append(tokens_BHW.int().cpu())

    def frames(self, row: int) -> list[Image]:
        """Image ``row`` of the batch after some of its steps; masked places are grey."""
        import torch

        from model.pixels import to_images

        count = min(len(self._steps), MAX_FRAMES)
        shown = [
            self._steps[len(self._steps) * (n + 1) // count - 1][row].long() for n in range(count)
        ]
        factor = self.painter.vq.downsample_factor
        frames = []
        for tokens_NHW in torch.split(torch.stack(shown), self.batch_size):
            tokens_NHW = tokens_NHW.to(self.painter.device)
            masked_NHW = tokens_NHW == self.painter.transformer.config.mask_token_id
            pixels_N3HW = self.painter.decode_pixels(tokens_NHW.masked_fill(masked_NHW, 0))
            veiled_NHW = masked_NHW.repeat_interleave(factor, 1).repeat_interleave(factor, 2)
            frames += to_images(pixels_N3HW.masked_fill(veiled_NHW[:, None], VEIL))
        return frames

    def save(self, row: int, path: Path, kind: str, lineage: Mapping[str, str]) -> Path:
        """Write the frames beside the image at ``path``, with what it carries."""
        frames, target = self.frames(row), preview_path(path, kind)
        if kind == "gif":
            write_bytes(target.absolute().as_uri(), _gif(frames, lineage))
        else:
            save_png(side_by_side(frames), target, lineage)
        return target


def preview_path(path: Path, kind: str) -> Path:
    """NAME-steps.gif or NAME-steps.png beside the image at ``path``."""
    return path.with_name(f"{path.stem}-steps.{'gif' if kind == 'gif' else 'png'}")


def _gif(frames: list[Image], lineage: Mapping[str, str]) -> bytes:
    buffer = io.BytesIO()
    durations = [FRAME_MS] * (len(frames) - 1) + [LAST_FRAME_MS]
    frames[0].save(
        buffer,
        "GIF",
        save_all=True,
        append_images=frames[1:],
        duration=durations,
        loop=0,
        comment=canonical_json(lineage),
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
