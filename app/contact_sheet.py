"""The contact sheet: the same prompts painted by every stage, one PNG with its lineage inside."""

from __future__ import annotations

import io
import json
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from infra.storage import write_bytes

if TYPE_CHECKING:
    from PIL.Image import Image
    from PIL.ImageDraw import ImageDraw
    from PIL.ImageFont import FreeTypeFont, ImageFont

CELL_PX = 168
LABEL_PX = 190
CAPTION_LINES = 3
MARGIN_PX = 14
TITLE_PX, TEXT_PX = 22, 13
INK, FAINT, PAPER = (32, 32, 36), (120, 120, 128), (252, 252, 250)


@dataclass(frozen=True)
class Row:
    """One row of images with what stands to its left; ``note`` is smaller."""

    title: str
    note: str
    images: Sequence[Image]


def draw_sheet(title: str, prompts: Sequence[str], rows: Sequence[Row]) -> Image:
    """Column i is ``prompts[i]``, row by row as given; images are enlarged without smoothing."""
    from PIL import Image, ImageDraw

    text = _font(TEXT_PX)
    caption_px = CAPTION_LINES * (TEXT_PX + 4) + MARGIN_PX
    top_px = 2 * MARGIN_PX + TITLE_PX + caption_px
    size = (
        2 * MARGIN_PX + LABEL_PX + len(prompts) * (CELL_PX + MARGIN_PX),
        top_px + len(rows) * (CELL_PX + MARGIN_PX) + MARGIN_PX,
    )
    sheet = Image.new("RGB", size, PAPER)
    draw = ImageDraw.Draw(sheet)
    draw.text((MARGIN_PX, MARGIN_PX), title, INK, _font(TITLE_PX))
    for column, prompt in enumerate(prompts):
        place = (_left(column), 2 * MARGIN_PX + TITLE_PX)
        draw.multiline_text(place, _wrapped(draw, prompt, text), INK, text, spacing=4)
    for index, row in enumerate(rows):
        top = top_px + index * (CELL_PX + MARGIN_PX)
        draw.text((MARGIN_PX, top), row.title, INK, _font(TITLE_PX - 4))
        draw.multiline_text((MARGIN_PX, top + TITLE_PX + 4), row.note, FAINT, text, spacing=4)
        for column, image in enumerate(row.images):
            sheet.paste(fitted(image), (_left(column), top))
    return sheet


def _left(column: int) -> int:
    return MARGIN_PX + LABEL_PX + column * (CELL_PX + MARGIN_PX)


def fitted(image: Image) -> Image:
    """``image`` in a cell: whole multiples keep its pixels, larger images are averaged down."""
    from PIL.Image import Resampling

    larger = max(image.size) <= CELL_PX
    return image.convert("RGB").resize(
        (CELL_PX, CELL_PX), Resampling.NEAREST if larger else Resampling.LANCZOS
    )


def _wrapped(draw: ImageDraw, text: str, font: FreeTypeFont | ImageFont) -> str:
    """At most ``CAPTION_LINES`` lines that fit a cell; what is cut ends in an ellipsis."""
    per_character = draw.textlength("abcdefghij klmnopqrst", font) / 21
    lines = textwrap.wrap(
        text, max(8, int(CELL_PX / per_character)), max_lines=CAPTION_LINES, placeholder=" …"
    )
    return "\n".join(lines)


@cache
def _font(size_px: int) -> FreeTypeFont | ImageFont:
    from PIL import ImageFont

    return ImageFont.load_default(size_px)


def png_bytes(image: Image, lineage: Mapping[str, str], icc_profile: bytes | None = None) -> bytes:
    """``image`` as PNG with ``lineage`` in text chunks (``file.text`` in Pillow, or `exiftool`)."""
    from PIL.PngImagePlugin import PngInfo

    chunks = PngInfo()
    for key, value in lineage.items():
        chunks.add_itxt(key, value)
    buffer = io.BytesIO()
    image.save(buffer, "PNG", pnginfo=chunks, icc_profile=icc_profile)
    return buffer.getvalue()


def save_png(
    image: Image, path: Path, lineage: Mapping[str, str], icc_profile: bytes | None = None
) -> None:
    """Write the PNG whole: a reader never sees half of one."""
    write_bytes(path.absolute().as_uri(), png_bytes(image, lineage, icc_profile))


def lineage_in(path: Path, size_px: tuple[int, int] | None = None) -> dict[str, str] | None:
    """What a PNG or a GIF of ours carries; None where there is no sound one (of this size)."""
    from PIL import Image

    try:
        with Image.open(path) as file:
            file.load()
            if size_px is not None and file.size != size_px:
                return None
            if "comment" in file.info:
                return {
                    str(key): str(value) for key, value in json.loads(file.info["comment"]).items()
                }
            return dict(getattr(file, "text", {}))
    except (OSError, SyntaxError, ValueError, TypeError, Image.DecompressionBombError):
        return None
