"""From a stranger's bytes to a stored image: checks first, one strict decode, then the resize.

Nothing is decoded before its format (by magic) and its size (by header) are known. Pillow decodes
strictly: a truncated file is refused, never filled with grey. Pixels become upright sRGB; of an
animation, the first frame. No metadata of the original (EXIF, XMP, text) reaches the stored bytes.
"""

from __future__ import annotations

import functools
import hashlib
import io
import math
import struct
import threading
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import simplejpeg
from PIL import Image, ImageCms

from pipelines.config import ResizeConfig
from pipelines.guard import Rejected
from pipelines.image_checks import BLURRED_FACES, MEASURED_SIDE_PX, measured, without_faces
from pipelines.image_config import FaceBlurConfig, ImageCheckConfig
from pipelines.perceptual import signature
from pipelines.resize import (
    Pixels,
    bucket_for,
    crop_of,
    cropped,
    encoded,
    is_large_enough,
    shrunk,
    spare_detail,
)

# Pillow's names of what we decode, with what such files begin with.
_MAGIC = (
    ("JPEG", b"\xff\xd8\xff"),
    ("PNG", b"\x89PNG\r\n\x1a\n"),
    ("GIF", b"GIF8"),
    ("BMP", b"BM"),
)
_JPEGS = ("JPEG", "MPO")
_EXIF_ORIENTATION = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_SWAPPING_ORIENTATIONS = frozenset({5, 6, 7, 8})
_BROKEN_EXIF = (
    OSError,
    ValueError,
    TypeError,
    KeyError,
    SyntaxError,
    EOFError,
    OverflowError,
    struct.error,
)
# One decode at a time per process: its pixels are the largest thing a worker holds, and
# ``warnings`` can only be silenced for a whole process.
_ONE_AT_A_TIME = threading.Lock()
# Blocks of 16 MB that Pillow keeps for the next image, instead of having the kernel clear new ones.
Image.core.set_blocks_max(4)  # type: ignore[attr-defined]
# A JPEG may be decoded at 1/2, 1/4 or 1/8 size as long as this much detail is left to the resize.
_DRAFT_FACTOR = 2


@dataclass(frozen=True)
class StoredImage:
    """An encoded image with where it came from. Original sizes are upright, before any resize.

    ``sha256`` and, where the metadata recorded one, ``md5`` are those of the body.
    """

    data: bytes
    width_px: int
    height_px: int
    original_width_px: int
    original_height_px: int
    crop_left_px: int
    crop_top_px: int
    sha256: str
    signature: bytes | None = None
    measures: dict[str, float] = field(default_factory=dict)
    md5: str | None = None


def sniff_format(body: bytes) -> str:
    """Pillow's name of the format, from the magic bytes; ``Rejected("format")`` when not ours."""
    for name, magic in _MAGIC:
        if body.startswith(magic):
            return name
    if body[:4] == b"RIFF" and body[8:12] == b"WEBP":
        return "WEBP"
    raise Rejected("format", "not JPEG, PNG, WebP, GIF or BMP")


@dataclass(frozen=True)
class Bounds:
    """What the metadata filters asked, to be asked again of the real image; None is off."""

    max_pixels: int
    min_width_px: int | None = None
    min_height_px: int | None = None
    max_aspect_ratio: float | None = None

    def upright_size(self, image: Image.Image) -> tuple[int, int]:
        """Width and height, px, of an image that is wanted; raises ``Rejected`` for another."""
        if image.width * image.height > self.max_pixels:
            raise Rejected("pixels", f"{image.width} x {image.height}")
        width_px, height_px = _upright_size(image)
        if width_px < (self.min_width_px or 0) or height_px < (self.min_height_px or 0):
            raise Rejected("image_too_small", f"{width_px} x {height_px}")
        ratio = max(width_px, height_px) / min(width_px, height_px)
        if self.max_aspect_ratio is not None and ratio > self.max_aspect_ratio:
            raise Rejected("image_aspect_ratio", f"{width_px} x {height_px}")
        return width_px, height_px


def check_body(body: bytes, bounds: Bounds) -> None:
    """Raise ``Rejected`` for what is refused before anything is decoded."""
    with _ONE_AT_A_TIME:
        bounds.upright_size(_opened(body))


@dataclass(frozen=True)
class Looks:
    """What is asked of the pixels and done to them, once they are decoded."""

    signs: bool = False
    checks: tuple[ImageCheckConfig, ...] = ()
    blur_faces: FaceBlurConfig | None = None

    @property
    def min_side_px(self) -> int:
        """What the shorter side of a decode must have where the image has it."""
        return MEASURED_SIDE_PX if self.checks or self.blur_faces else 0


NO_LOOKS = Looks()


def store_images(
    body: bytes, configs: Sequence[ResizeConfig], bounds: Bounds, looks: Looks = NO_LOOKS
) -> list[StoredImage | Rejected]:
    """Check and decode one body, and store it as each of ``configs`` says.

    What a configuration gets does not depend on the others: ``Rejected`` is returned where one
    refuses the image (``image_too_small``, ``decode``, ``image_check``), and raised for what
    ``bounds`` or the header refuse (``format``, ``pixels``, ``image_too_small``,
    ``image_aspect_ratio``, ``decode``).
    """
    found: dict[int, StoredImage | Rejected] = {}
    with _ONE_AT_A_TIME:
        sha256 = hashlib.sha256(body).hexdigest()
        image = _opened(body)
        size = bounds.upright_size(image)
        groups: dict[int, list[int]] = {}
        for number, config in enumerate(configs):
            if is_large_enough(*size, config):
                groups.setdefault(_reduction(image, size, config, looks), []).append(number)
            else:
                found[number] = Rejected("image_too_small", f"{size[0]} x {size[1]}")
        for turn, (reduction, numbers) in enumerate(groups.items()):
            if turn:
                image = _opened(body)  # a decoder takes its scale once
            try:
                pixels = _decoded(body, image, reduction)
                measures = measured(pixels, looks.checks)
            except Rejected as rejection:
                found.update(dict.fromkeys(numbers, rejection))
                continue
            mark = signature(pixels) if looks.signs else None
            if looks.blur_faces is not None:
                pixels, measures[BLURRED_FACES] = without_faces(pixels, looks.blur_faces)
            for number in numbers:
                stored = _stored(pixels, configs[number], size, sha256)
                found[number] = replace(stored, signature=mark, measures=measures)
    return [found[number] for number in range(len(configs))]


def signature_of(body: bytes) -> bytes:
    """The signature of an encoded image; ``Rejected`` when it cannot be decoded."""
    with _ONE_AT_A_TIME:
        return signature(_decoded(body, _opened(body), 1))


def _stored(
    pixels: Pixels, config: ResizeConfig, size: tuple[int, int], sha256: str
) -> StoredImage:
    bucket = bucket_for(*size, config)
    small = shrunk(cropped(pixels, config, bucket), config, bucket)
    crop = crop_of(*size, config, bucket)
    return StoredImage(
        encoded(small, config),
        width_px=small.shape[1],
        height_px=small.shape[0],
        original_width_px=size[0],
        original_height_px=size[1],
        crop_left_px=crop.left_px,
        crop_top_px=crop.top_px,
        sha256=sha256,
    )


def _opened(body: bytes) -> Image.Image:
    name = sniff_format(body)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # our own pixel bound follows; EXIF may be odd
            return Image.open(io.BytesIO(body), formats=[name])
    except Image.DecompressionBombError as error:
        raise Rejected("pixels", "header") from error
    except Exception as error:  # Pillow's parsers raise nearly anything on hostile bytes
        raise Rejected("decode", f"{name} header: {type(error).__name__}") from error


def _orientation(image: Image.Image) -> int:
    """From EXIF. A PNG's may come after its pixels, so asking for it decodes them."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return int(image.getexif().get(_EXIF_ORIENTATION, 1))
    except _BROKEN_EXIF:  # no reason to lose the image
        return 1


def _upright_size(image: Image.Image) -> tuple[int, int]:
    width_px, height_px = image.size
    return (height_px, width_px) if _orientation(image) in _SWAPPING_ORIENTATIONS else image.size


def _reduction(
    image: Image.Image, size: tuple[int, int], config: ResizeConfig, looks: Looks
) -> int:
    """How many times smaller, per side, a JPEG is decoded: 1, 2, 4 or 8."""
    if image.format not in _JPEGS:
        return 1
    spare = spare_detail(*size, config) / _DRAFT_FACTOR
    if looks.min_side_px:
        spare = min(spare, min(size) / looks.min_side_px)
    return next((by for by in (8, 4, 2) if spare >= by), 1)


def _decoded(body: bytes, image: Image.Image, reduction: int) -> Pixels:
    """Upright sRGB of ``image``, which ``body`` was opened as."""
    plain = _plain_jpeg(body, image, reduction)
    if plain is not None:
        return plain
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if reduction > 1:
                image.draft(None, (image.width // reduction, image.height // reduction))
            image.load()
            converted = _to_rgb(image)
            transpose = _UPRIGHT.get(_orientation(image))
            upright = converted if transpose is None else converted.transpose(transpose)
            return np.asarray(upright)
    except Exception as error:
        raise Rejected("decode", type(error).__name__) from error


def _plain_jpeg(body: bytes, image: Image.Image, reduction: int) -> Pixels | None:
    """What Pillow would make of an ordinary JPEG, without its two copies of the pixels.

    Both have libjpeg-turbo do it. None for one that has to be turned or has a colour profile, and
    for one that libjpeg has anything to say about: of those, Pillow decides.
    """
    is_ordinary = image.mode in ("RGB", "L") and "icc_profile" not in image.info
    if image.format not in _JPEGS or not is_ordinary or _orientation(image) in _UPRIGHT:
        return None
    height_px, width_px = (math.ceil(side / reduction) for side in (image.height, image.width))
    try:
        pixels = simplejpeg.decode_jpeg(body, "RGB", min_height=height_px, min_width=width_px)
    except ValueError:
        return None
    return pixels if pixels.shape == (height_px, width_px, 3) else None


def _to_rgb(image: Image.Image) -> Image.Image:
    """8-bit sRGB: colour profiles applied, 16 bits scaled, transparency laid on white."""
    profile = image.info.get("icc_profile")
    if image.mode.startswith("I;16") or image.mode == "I":
        scaled = np.asarray(image).astype(np.float64) / 257
        return Image.fromarray(scaled.round().clip(0, 255).astype(np.uint8)).convert("RGB")
    if image.mode in ("LA", "PA", "RGBA", "La", "RGBa") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, rgba).convert("RGB")
    if profile and image.mode in ("RGB", "CMYK", "L"):
        try:
            source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
            applied = ImageCms.profileToProfile(image, source, _srgb_profile(), outputMode="RGB")
        except (ImageCms.PyCMSError, OSError):
            applied = None  # a profile that does not fit the pixels says nothing about them
        if applied is not None:
            return applied
    return image if image.mode == "RGB" else image.convert("RGB")


@functools.cache
def _srgb_profile() -> ImageCms.ImageCmsProfile:
    return ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB"))
