"""Small pictures for a page: never larger than ``SIDE_PX``, whatever they come from."""

from __future__ import annotations

import io
import warnings

from PIL import Image

SIDE_PX = 160
QUALITY = 70


def thumbnail(data: bytes) -> bytes | None:
    """A JPEG of at most ``SIDE_PX`` a side of an encoded image; None of what does not decode."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(data)) as image:
                image.draft("RGB", (SIDE_PX, SIDE_PX))
                small = image.convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return None
    small.thumbnail((SIDE_PX, SIDE_PX))
    made = io.BytesIO()
    small.save(made, "JPEG", quality=QUALITY)
    return made.getvalue()
