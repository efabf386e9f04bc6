"""B16, B18, B21, B22: files in disguise, bombs of frames and metadata, and what pixels come to."""

from __future__ import annotations

import hashlib
import io
import resource
import struct
import zipfile
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageCms, PngImagePlugin
from PIL.GifImagePlugin import GifImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.WebPImagePlugin import WebPImageFile

from pipelines.config import ResizeConfig
from pipelines.guard import Rejected
from pipelines.images import Bounds, StoredImage, store_images
from tests.pipelines.conftest import encoded, picture

CANARY = b"PAYLOAD-CANARY-7f3a"
SCRIPT = b"<script>alert('" + CANARY + b"')</script>"
KEEP = ResizeConfig(image_size_px=256, crop="none", encode_format="png", encode_quality=1)
AS_JPEG = ResizeConfig(image_size_px=256)
BOUNDS = Bounds(max_pixels=10_000_000)


def stored(body: bytes, config: ResizeConfig = KEEP) -> StoredImage:
    (found,) = store_images(body, [config], BOUNDS)
    if isinstance(found, Rejected):
        raise found
    return found


def bounded(body: bytes) -> list[StoredImage | Rejected]:
    """What comes of it, whoever refuses it."""
    try:
        return store_images(body, [KEEP], BOUNDS)
    except Rejected as rejection:
        return [rejection]


def pixels(image: StoredImage) -> Any:
    return np.asarray(Image.open(io.BytesIO(image.data)))


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def with_chunk(png: bytes, kind: bytes, data: bytes) -> bytes:
    """A chunk behind the header of a PNG."""
    return png[:33] + png_chunk(kind, data) + png[33:]


def jpeg_segment(marker: int, data: bytes) -> bytes:
    return struct.pack(">BBH", 0xFF, marker, len(data) + 2) + data


def zipped() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("run.js", CANARY)
    return buffer.getvalue()


def no_images() -> dict[str, bytes]:
    """What pretends to be an image by its name or its header alone."""
    return {
        "html": b"<!doctype html><html>" + SCRIPT,
        "html after spaces": b"\n\t <html>" + SCRIPT,
        "svg": b"<svg xmlns='http://www.w3.org/2000/svg'>" + SCRIPT + b"</svg>",
        "svg with a declaration": b"<?xml version='1.0'?><svg>" + SCRIPT + b"</svg>",
        "svgz": b"\x1f\x8b\x08" + CANARY,
        "pdf": b"%PDF-1.7\n" + CANARY,
        "postscript": b"%!PS-Adobe-3.0 EPSF\n" + CANARY,
        "exe": b"MZ\x90\0" + CANARY * 10,
        "elf": b"\x7fELF" + CANARY * 10,
        "shell": b"#!/bin/sh\necho " + CANARY,
        "zip": zipped(),
        "php": b"<?php echo '" + CANARY + b"'; ?>",
        "json": b'{"error": "' + CANARY + b'"}',
        "empty": b"",
        "tiff": b"II*\0" + CANARY * 4,
        "psd": b"8BPS\0\1" + CANARY * 4,
        "ico": b"\0\0\1\0" + CANARY * 4,
        "avif": b"\0\0\0\x20ftypavif" + CANARY * 4,
        "mp4": b"\0\0\0\x20ftypisom" + CANARY * 4,
        "wave": b"RIFF\x24\0\0\0WAVE" + CANARY * 4,
        "fits": b"SIMPLE  =                    T" + CANARY * 4,
        "jpeg header, then html": b"\xff\xd8\xff\xe0" + SCRIPT,
        "gif header, then script": b"GIF89a/*" + SCRIPT + b"*/=1",
        "png header, then pdf": b"\x89PNG\r\n\x1a\n%PDF-1.7" + CANARY,
        "bmp header, then exe": b"BMMZ" + CANARY * 10,
        "webp header, then nothing": b"RIFF\x10\0\0\0WEBPVP8 " + CANARY,
    }


def polyglots() -> dict[str, bytes]:
    """Real images that are something else as well."""
    jpeg, png = encoded(picture(1)), encoded(picture(1), "PNG")
    gif, bmp, webp = (encoded(picture(1), name) for name in ("GIF", "BMP", "WEBP"))
    return {
        "jpeg and zip": jpeg + zipped(),
        "jpeg and html": jpeg + SCRIPT,
        "jpeg with a comment": jpeg[:2] + jpeg_segment(0xFE, SCRIPT) + jpeg[2:],
        "jpeg with php in exif": jpeg[:2] + jpeg_segment(0xE1, b"Exif\0\0" + CANARY) + jpeg[2:],
        "jpeg with xmp": jpeg[:2]
        + jpeg_segment(0xE1, b"http://ns.adobe.com/xap/1.0/\0<x>" + CANARY + b"</x>")
        + jpeg[2:],
        "png with text": with_chunk(png, b"tEXt", b"Comment\0" + SCRIPT),
        "png with a chunk of its own": with_chunk(png, b"evIl", CANARY),
        "png and pdf": png + b"%PDF-1.7" + CANARY,
        "gif and script": gif + b";/*" + SCRIPT,
        "bmp and exe": bmp + b"MZ" + CANARY,
        "webp and zip": webp + zipped(),
        "webp with a chunk of its own": webp[:4]
        + struct.pack("<I", len(webp) - 8 + 8 + 20)
        + webp[8:]
        + b"EVIL"
        + struct.pack("<I", 20)
        + CANARY.ljust(20, b"\0"),
    }


def test_there_are_thirty_disguises() -> None:
    assert len(no_images()) + len(polyglots()) >= 30


@pytest.mark.parametrize("name", no_images())
def test_what_is_no_image_is_refused(name: str) -> None:
    with pytest.raises(Rejected) as caught:
        stored(no_images()[name])
    assert caught.value.reason in ("format", "decode")


@pytest.mark.parametrize("name", polyglots())
def test_a_polyglot_is_drawn_again_and_leaves_its_other_half(name: str) -> None:
    body = polyglots()[name]
    assert CANARY in body or b"PK" in body
    plain = stored(encoded(picture(1), "PNG"))
    for config in (KEEP, AS_JPEG, ResizeConfig(encode_format="webp")):
        image = stored(body, config)
        assert image.data not in (body, b"")
        for other in (CANARY, b"<script", b"PK\3\4", b"%PDF"):
            assert other not in image.data
        assert (image.width_px, image.height_px) != (0, 0)
    far = np.abs(pixels(stored(body)).astype(int) - pixels(plain)).mean()
    assert far < 8  # it is the picture, as well as its format keeps it


def frames(format_name: str, number: int, side_px: int = 64) -> bytes:
    """An animation: a red frame, then others, each another one."""
    first = Image.new("RGB", (side_px, side_px), "red")
    rng = np.random.default_rng(0)
    others = [
        Image.new("RGB", (side_px, side_px), tuple(rng.integers(0, 256, 3).tolist()))
        for _ in range(number - 1)
    ]
    buffer = io.BytesIO()
    options: dict[str, Any] = {"lossless": True} if format_name == "WEBP" else {}
    first.save(buffer, format_name, save_all=True, append_images=others, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("format_name", ["GIF", "PNG", "WEBP"])
def test_a_thousand_frames_cost_one(format_name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    body = frames(format_name, 1000)
    with Image.open(io.BytesIO(body)) as image:
        assert image.n_frames == 1000  # type: ignore[attr-defined]
    sought: list[int] = []

    def noting(seek: Any) -> Any:
        def sought_frame(image: Any, frame: int) -> None:
            sought.append(frame)
            seek(image, frame)

        return sought_frame

    for plugin in (GifImageFile, PngImageFile, WebPImageFile):
        monkeypatch.setattr(plugin, "seek", noting(plugin.seek))
    assert (pixels(stored(body)) == (255, 0, 0)).all()
    assert max(sought, default=0) == 0


def apng_that_claims(num_frames: int) -> bytes:
    return with_chunk(encoded(picture(1), "PNG"), b"acTL", struct.pack(">II", num_frames, 0))


BOMBS: dict[str, Callable[[], bytes]] = {
    "text of a PNG": lambda: with_chunk(
        encoded(picture(1), "PNG"), b"zTXt", b"x\0\0" + zlib.compress(bytes(80_000_000), 9)
    ),
    "international text of a PNG": lambda: with_chunk(
        encoded(picture(1), "PNG"),
        b"iTXt",
        b"x\0\1\0\0\0" + zlib.compress(bytes(80_000_000), 9),
    ),
    "colour profile of a PNG": lambda: with_chunk(
        encoded(picture(1), "PNG"), b"iCCP", b"x\0\0" + zlib.compress(bytes(80_000_000), 9)
    ),
    "many texts of a PNG": lambda: with_chunk(
        encoded(picture(1), "PNG"),
        b"tEXt",
        b"a\0" + b"x" * 1000,
    )[:33]
    + png_chunk(b"zTXt", b"x\0\0" + zlib.compress(bytes(900_000), 9)) * 200
    + encoded(picture(1), "PNG")[33:],
    "profile of a JPEG": lambda: encoded(picture(1))[:2]
    + b"".join(
        jpeg_segment(0xE2, b"ICC_PROFILE\0" + bytes([part + 1, 255]) + bytes(65_000))
        for part in range(255)
    )
    + encoded(picture(1))[2:],
    "frames of an APNG": lambda: apng_that_claims(2**31 - 1),
    "pixels of a WebP": lambda: encoded(picture(1), "WEBP")[:12]
    + b"VP8X\x0a\0\0\0\x02\0\0\0" + b"\xff\xff\xff" * 2,
}  # fmt: skip


@pytest.mark.parametrize("name", BOMBS)
def test_a_bomb_is_refused_or_costs_no_more_than_its_picture(name: str) -> None:
    body = BOMBS[name]()
    assert len(body) < 20_000_000
    stored(encoded(picture(1), "PNG"))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    (found,) = bounded(body)
    if isinstance(found, Rejected):
        assert found.reason in ("decode", "pixels")
    else:
        assert len(found.data) < 1_000_000
    grown_mb = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    assert grown_mb < 100


def test_where_and_by_whom_is_not_stored() -> None:
    """EXIF, XMP, IPTC and comments: not in the bytes that are stored, in any format."""
    exif = Image.Exif()
    exif[0x010F], exif[0x013B] = "CanaryCamera", "Canary Jane"
    exif.get_ifd(0x8825).update({1: "N", 2: (48.0, 8.0, 0.0)})
    info = PngImagePlugin.PngInfo()
    info.add_text("Author", "Canary Jane")
    jpeg = encoded(picture(1), exif=exif, comment=b"Canary Jane")
    jpeg = jpeg[:2] + jpeg_segment(0xED, b"Photoshop 3.0\0" + b"Canary Jane") + jpeg[2:]
    for body in (
        jpeg, encoded(picture(1), "PNG", pnginfo=info, exif=exif),
        encoded(picture(1), "WEBP", exif=exif, xmp=b"<x>Canary Jane</x>"),
    ):  # fmt: skip
        assert b"Canary" in body
        for format_name in ("jpg", "png", "webp"):
            config = ResizeConfig.model_validate(
                {"encode_format": format_name, "encode_quality": 9}
            )
            image = stored(body, config)
            assert b"Canary" not in image.data
            assert b"GPS" not in image.data
            with Image.open(io.BytesIO(image.data)) as read:
                assert not read.getexif()
                assert not {"exif", "xmp", "comment", "Author", "photoshop"} & set(read.info)


def ramp(mode: str) -> Image.Image:
    """A small picture of every level; the same on every machine."""
    y, x = np.mgrid[0:64, 0:64]
    channels = [(x * 4) % 256, (y * 4) % 256, (x * 2 + y * 2) % 256, 255 - (x * y) % 256]
    arrays = np.stack(channels, axis=-1).astype(np.uint8)
    if mode == "I;16":
        return Image.fromarray((y * 1024 + x * 16).astype(np.uint16))
    if mode == "P":
        colours = [[level, 255 - level, level // 2] for level in range(256)]
        image = Image.fromarray(((x + y * 4) % 256).astype(np.uint8), "L").convert("P")
        image.putpalette([value for colour in colours for value in colour])
        return image
    if mode in ("L", "1"):
        return Image.fromarray(arrays[..., 0]).convert(mode)
    return Image.fromarray(arrays[..., : len(mode)].copy(), mode)


def rotated(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encoded(ramp("RGB").crop((0, 0, 64, 48)), "PNG", exif=exif)


def profiled() -> bytes:
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    return encoded(ramp("RGB"), "PNG", icc_profile=profile)


def laid_on_white() -> Any:
    values = np.asarray(ramp("RGBA")).astype(np.float64)
    alpha = values[..., 3:] / 255
    return values[..., :3] * alpha + 255 * (1 - alpha)


def inverse_of_cmyk() -> Any:
    values = np.asarray(ramp("CMYK")).astype(np.float64)
    return (255 - values[..., :3]) * (255 - values[..., 3:]) / 255


RGB = np.asarray(ramp("RGB")).astype(np.float64)
# Name -> file, the upright sRGB pixels that it must come to, and how far each may be off.
GOLDEN: dict[str, tuple[bytes, Any, float]] = {
    "RGB": (encoded(ramp("RGB"), "PNG"), RGB, 0),
    "BMP": (encoded(ramp("RGB"), "BMP"), RGB, 0),
    "grey": (encoded(ramp("L"), "PNG"), np.repeat(RGB[..., :1], 3, axis=-1), 0),
    "16 bit": (
        encoded(ramp("I;16"), "PNG"),
        np.repeat(np.round(np.asarray(ramp("I;16"))[..., None] / 257), 3, axis=-1), 0,
    ),
    "palette": (encoded(ramp("P"), "PNG"), np.asarray(ramp("P").convert("RGB")), 0),
    "alpha": (encoded(ramp("RGBA"), "PNG"), laid_on_white(), 1),
    "sRGB profile": (profiled(), RGB, 2),
    "CMYK": (encoded(ramp("CMYK"), quality=100, subsampling=0), inverse_of_cmyk(), 8),
    "turned by 90": (rotated(6), np.rot90(RGB[:48, :], -1), 0),
    "turned by 180": (rotated(3), np.rot90(RGB[:48, :], 2), 0),
    "mirrored and turned": (rotated(5), RGB[:48, :].transpose(1, 0, 2), 0),
}  # fmt: skip


@pytest.mark.parametrize("name", GOLDEN)
def test_pixels_come_to_what_the_formats_say(name: str) -> None:
    body, expected, tolerance = GOLDEN[name]
    found = pixels(stored(body)).astype(np.float64)
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() <= tolerance


def test_the_same_pixels_give_the_same_bytes_twice() -> None:
    for body, _, _ in GOLDEN.values():
        one, other = stored(body, AS_JPEG), stored(body, AS_JPEG)
        assert hashlib.sha256(one.data).digest() == hashlib.sha256(other.data).digest()
