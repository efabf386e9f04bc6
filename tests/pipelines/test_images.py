"""Images on the spot: what is refused, what is stored, and that nothing else comes along."""

from __future__ import annotations

import contextlib
import hashlib
import io
import resource
import struct
import threading
import time
import warnings
import zlib
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageCms, PngImagePlugin

from pipelines import images
from pipelines.config import ResizeConfig
from pipelines.guard import Rejected
from pipelines.images import Bounds, StoredImage, sniff_format, store_images

MAX_PIXELS = 10_000_000
KEEP = ResizeConfig(image_size_px=256, crop="none", encode_format="png", encode_quality=1)


def stored(body: bytes, config: ResizeConfig = KEEP, **bounds: Any) -> StoredImage:
    (found,) = store_images(body, [config], Bounds(**({"max_pixels": MAX_PIXELS} | bounds)))
    if isinstance(found, Rejected):
        raise found
    return found


def pixels(image: StoredImage) -> np.ndarray[Any, Any]:
    return np.asarray(Image.open(io.BytesIO(image.data)))


def refused(body: bytes, config: ResizeConfig = KEEP, **bounds: Any) -> str:
    with pytest.raises(Rejected) as caught:
        stored(body, config, **bounds)
    return caught.value.reason


def png_header(width_px: int, height_px: int) -> bytes:
    """A PNG that says how large it is and holds a few bytes of nothing."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", width_px, height_px, 8, 2, 0, 0, 0)
    body = chunk(b"IDAT", zlib.compress(b"\0" * 1000))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + body + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"\xff\xd8",
        b"<!doctype html><html>not found</html>",
        b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        b"%PDF-1.7",
        b"MZ\x90\x00",
        b"II*\x00",
        b"\x00\x00\x00\x20ftypavif",
        b"GIF",
        b"RIFF0000WAVE",
        b"#!/bin/sh",
        b"\x1f\x8b\x08",
        b"PK\x03\x04",
        b"8BPS\x00\x01",
        b"SIMPLE  =  T",
        b" \xff\xd8\xff",
    ],
)
def test_only_image_formats_we_decode_get_past_their_magic(body: bytes) -> None:
    assert refused(body) == "format"


@pytest.mark.parametrize("format_name", ["JPEG", "PNG", "WEBP", "GIF", "BMP"])
def test_formats_are_known_by_magic(format_name: str, make_picture: Any, encode: Any) -> None:
    body = encode(make_picture(), format_name)
    assert sniff_format(body) == format_name
    image = stored(body)
    assert (image.width_px, image.height_px) == (320, 256)
    assert image.sha256 == hashlib.sha256(body).hexdigest()


@pytest.mark.parametrize("format_name", ["JPEG", "PNG", "WEBP", "GIF", "BMP"])
def test_a_cut_file_is_refused_wherever_it_is_cut(
    format_name: str, make_picture: Any, encode: Any
) -> None:
    body = encode(make_picture(3), format_name)
    for cut in np.linspace(20, len(body) - 40, 20).astype(int):
        assert refused(body[:cut]) in ("decode", "format"), (format_name, cut)
    whole = pixels(stored(body))
    for cut in range(len(body) - 40, len(body)):
        with contextlib.suppress(Rejected):  # only what follows the last pixel may be missing
            assert (pixels(stored(body[:cut])) == whole).all()


def test_noise_is_refused_or_decoded_and_nothing_else(make_picture: Any, encode: Any) -> None:
    rng = np.random.default_rng(0)
    for format_name in ("JPEG", "PNG", "WEBP", "GIF", "BMP"):
        body = bytearray(encode(make_picture(1), format_name))
        for _ in range(60):
            damaged = bytearray(body)
            for position in rng.integers(0, len(body), 5):
                damaged[position] = rng.integers(0, 256)
            with contextlib.suppress(Rejected):
                stored(bytes(damaged))


def test_a_pixel_bomb_is_refused_by_its_header() -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert refused(png_header(50_000, 50_000)) == "pixels"
    assert refused(png_header(9_000, 9_000)) == "pixels"
    gif = b"GIF89a" + struct.pack("<HH", 65535, 65535) + b"\x00\x00\x00"
    assert refused(gif + b"\x2c" + b"\0" * 20) in ("pixels", "decode")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 30_000  # KiB


def test_a_whole_pixel_bomb_is_never_unpacked() -> None:
    """81 megapixels in 80 KB, nothing wrong with them but their number."""
    buffer = io.BytesIO()
    Image.new("L", (9_000, 9_000)).save(buffer, "PNG")
    body = buffer.getvalue()
    del buffer
    began_at = time.process_time()
    assert refused(body) == "pixels"
    assert time.process_time() - began_at < 0.1


def test_a_metadata_bomb_is_refused() -> None:
    info = PngImagePlugin.PngInfo()
    info.add_text("bomb", "0" * 80_000_000, zip=True)
    buffer = io.BytesIO()
    Image.new("RGB", (300, 300)).save(buffer, "PNG", pnginfo=info)
    assert buffer.tell() < 200_000
    assert refused(buffer.getvalue()) == "decode"


def test_real_sizes_are_asked_again(make_picture: Any, encode: Any) -> None:
    body = encode(make_picture(0, 400, 100))
    assert refused(body, min_width_px=401) == "image_too_small"
    assert refused(body, min_height_px=101) == "image_too_small"
    assert refused(body, max_aspect_ratio=3.9) == "image_aspect_ratio"
    image = stored(body, min_width_px=400, min_height_px=100, max_aspect_ratio=4)
    assert (image.original_width_px, image.original_height_px) == (400, 100)


@pytest.mark.parametrize(
    ("size", "crop", "expected", "offset"),
    [
        ((1024, 512), "none", (512, 256), (0, 0)),
        ((512, 1024), "none", (256, 512), (0, 0)),
        ((1024, 512), "square", (256, 256), (256, 0)),
        ((512, 1025), "square", (256, 256), (0, 256)),
        ((300, 200), "none", (300, 200), (0, 0)),
        ((300, 200), "square", (200, 200), (50, 0)),
        ((400, 256), "square", (256, 256), (72, 0)),
        ((256, 256), "square", (256, 256), (0, 0)),
    ],
)
def test_images_shrink_to_size_and_never_grow(
    size: tuple[int, int], crop: str, expected: tuple[int, int], offset: tuple[int, int],
    make_picture: Any, encode: Any,
) -> None:  # fmt: skip
    config = ResizeConfig.model_validate({"image_size_px": 256, "crop": crop})
    image = stored(encode(make_picture(1, *size)), config)
    assert (image.width_px, image.height_px) == expected
    assert Image.open(io.BytesIO(image.data)).size == expected
    assert (image.original_width_px, image.original_height_px) == size
    assert (image.crop_left_px, image.crop_top_px) == offset


def test_a_crop_is_from_the_centre() -> None:
    wide = Image.new("RGB", (600, 200), "red")
    wide.paste("blue", (200, 0, 400, 200))
    buffer = io.BytesIO()
    wide.save(buffer, "PNG")
    config = ResizeConfig(image_size_px=100, encode_format="png", encode_quality=1)
    assert (pixels(stored(buffer.getvalue(), config)) == (0, 0, 255)).all()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_are_turned_upright(orientation: int, make_picture: Any, encode: Any) -> None:
    upright = make_picture(5, 320, 200)
    undo = {
        2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM, 5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90, 7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }  # fmt: skip
    lying = upright.transpose(undo[orientation]) if orientation in undo else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = stored(encode(lying, "PNG", exif=exif))
    assert (image.original_width_px, image.original_height_px) == (320, 200)
    assert (pixels(image) == np.asarray(upright)).all()


def test_where_it_was_taken_is_not_stored(make_picture: Any, encode: Any) -> None:
    exif = Image.Exif()
    exif[0x010F] = "CanaryCamera"
    exif.get_ifd(0x8825)[1] = "N"
    body = encode(make_picture(), "JPEG", exif=exif, comment=b"canary-comment")
    assert b"CanaryCamera" in body
    for format_name in ("jpg", "webp", "png"):
        config = ResizeConfig.model_validate({"encode_format": format_name, "encode_quality": 9})
        data = stored(body, config).data
        assert b"CanaryCamera" not in data
        assert b"canary-comment" not in data
        assert not Image.open(io.BytesIO(data)).getexif()


def test_all_modes_become_rgb() -> None:
    grey = Image.new("L", (8, 8), 100)
    clear = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    half = Image.new("LA", (8, 8), (0, 0))
    indexed = Image.new("RGB", (8, 8), (10, 20, 30)).convert("P", palette=Image.Palette.ADAPTIVE)
    deep = Image.fromarray(np.full((8, 8), 257 * 77, dtype=np.uint16))
    bits = Image.new("1", (8, 8), 1)
    for image, expected in (
        (grey, (100, 100, 100)), (clear, (255, 255, 255)), (half, (255, 255, 255)),
        (indexed, (10, 20, 30)), (deep, (77, 77, 77)), (bits, (255, 255, 255)),
    ):  # fmt: skip
        buffer = io.BytesIO()
        image.save(buffer, "PNG")
        found = pixels(stored(buffer.getvalue()))
        assert found.shape == (8, 8, 3)
        assert (found == expected).all(), image.mode


def test_print_colours_become_screen_colours(encode: Any) -> None:
    ink = Image.new("CMYK", (64, 64), (255, 0, 0, 0))
    red, green, blue = pixels(stored(encode(ink, "JPEG", quality=100)))[0, 0]
    assert red < 10
    assert min(green, blue) > 240


def test_a_colour_profile_is_applied_and_a_broken_one_ignored(make_picture: Any) -> None:
    linear = ImageCms.ImageCmsProfile(ImageCms.createProfile("XYZ")).tobytes()
    image = make_picture(2)
    bodies = []
    for profile in (None, linear, b"not a profile", ImageCms.ImageCmsProfile(
        ImageCms.createProfile("sRGB")).tobytes()):  # fmt: skip
        buffer = io.BytesIO()
        image.save(buffer, "PNG", icc_profile=profile)
        bodies.append(pixels(stored(buffer.getvalue())))
    assert (bodies[0] == bodies[2]).all()
    assert np.abs(bodies[0].astype(int) - bodies[3]).max() <= 2


def test_the_first_frame_of_an_animation_counts(make_picture: Any) -> None:
    frames = [Image.new("RGB", (300, 300), colour) for colour in ("red", "green", "blue")]
    for format_name, options in (("GIF", {}), ("WEBP", {"lossless": True}), ("PNG", {})):
        buffer = io.BytesIO()
        frames[0].save(buffer, format_name, save_all=True, append_images=frames[1:], **options)
        assert (pixels(stored(buffer.getvalue()))[0, 0] == (255, 0, 0)).all()


def test_stored_bytes_depend_on_the_input_alone(make_picture: Any, encode: Any) -> None:
    body = encode(make_picture(9, 700, 500))
    config = ResizeConfig(image_size_px=128)
    expected = stored(body, config)
    found: list[StoredImage] = []
    threads = [threading.Thread(target=lambda: found.append(stored(body, config)))
               for _ in range(4)]  # fmt: skip
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [expected] * 4


def test_large_photographs_look_the_same_when_decoded_small(encode: Any) -> None:
    gradient = np.linspace(0, 255, 2048)
    field = np.stack(np.broadcast_arrays(gradient[None], gradient[:, None], 128), axis=-1)
    body = encode(Image.fromarray(field.astype(np.uint8)), "JPEG", quality=95)
    small = pixels(stored(body)).astype(int)
    exact = np.asarray(Image.open(io.BytesIO(body)).resize((256, 256), Image.Resampling.BOX))
    assert np.abs(small - exact).max() <= 3


def by_pillow(body: bytes, config: ResizeConfig, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What Pillow alone makes of it, and whether the shorter way would have been gone."""
    took = images._plain_jpeg(body, Image.open(io.BytesIO(body)), 1) is not None
    with monkeypatch.context() as patch:
        patch.setattr(images, "_plain_jpeg", lambda *_: None)
        return [store_images(body, [config], Bounds(MAX_PIXELS)), took]


@pytest.mark.parametrize("size", [(320, 256), (333, 257), (1031, 777), (2050, 1543)])
@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("options", [
    {"subsampling": 0}, {"subsampling": 2, "progressive": True}, {"quality": 20, "subsampling": 1},
    {"keep_rgb": True},
])  # fmt: skip
def test_ordinary_jpegs_come_out_as_pillow_decodes_them(
    size: tuple[int, int], mode: str, options: dict[str, Any], make_picture: Any, encode: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    body = encode(make_picture(5, *size).convert(mode), "JPEG", **options)
    expected, took = by_pillow(body, KEEP, monkeypatch)
    assert took
    assert store_images(body, [KEEP], Bounds(MAX_PIXELS)) == expected


def test_of_any_other_jpeg_pillow_decides(
    make_picture: Any, encode: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those to be turned, with a profile, in four colours, cut, or with bytes between markers."""
    picture = make_picture(6, 400, 300)
    turned, plain = Image.Exif(), encode(picture)
    turned[0x0112] = 6
    scan = plain.index(b"\xff\xda")
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for body in (
        encode(picture, exif=turned), encode(picture, icc_profile=profile),
        encode(picture.convert("CMYK")), plain[:-400], plain[:scan] + b"\0\0\0" + plain[scan:],
        plain[:-300] + b"\xff\xd9",
    ):  # fmt: skip
        expected, took = by_pillow(body, KEEP, monkeypatch)
        assert not took
        found = store_images(body, [KEEP], Bounds(MAX_PIXELS))
        assert list(map(str, found)) == list(map(str, expected))


def test_warnings_do_not_decide(make_picture: Any, encode: Any) -> None:
    exif = b"Exif\x00\x00MM\x00*\x00\x00\x00\x08\xff\xff"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        image = stored(encode(make_picture(), "JPEG", exif=exif))
    assert image.width_px == 320


def test_sizes_stored_together_are_those_stored_alone(make_picture: Any, encode: Any) -> None:
    bounds = Bounds(MAX_PIXELS)
    configs = [
        ResizeConfig.model_validate({"image_size_px": size, "crop": crop, "if_smaller": "reject"})
        for size in (32, 64, 256, 900)
        for crop in ("square", "none")
    ]
    lying = Image.Exif()
    lying[0x0112] = 6
    photo = make_picture(4, 1100, 1000)
    for body in (
        encode(photo), encode(photo, exif=lying), encode(photo, "PNG"),
        encode(make_picture(4)), encode(photo)[:9000],
    ):  # fmt: skip
        together = store_images(body, configs, bounds)
        for config, found in zip(configs, together, strict=True):
            (alone,) = store_images(body, [config], bounds)
            assert found == alone or str(found) == str(alone)
    assert [isinstance(each, Rejected) for each in store_images(
        encode(make_picture(4)), configs, bounds)] == [False] * 6 + [True] * 2  # fmt: skip
