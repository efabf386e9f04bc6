"""Codecs in a child: what comes back is what this process would make, and a crash costs a row."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from pipelines import decoder as module
from pipelines.config import ResizeConfig
from pipelines.connection import Failed
from pipelines.decoder import Decoder
from pipelines.guard import Rejected
from pipelines.images import Bounds, Looks, StoredImage, store_images
from pipelines.outcomes import NotStored
from pipelines.stage_images import decoder_for, images_of

CONFIGS = [ResizeConfig(), ResizeConfig(image_size_px=512, if_smaller="reject")]
BOUNDS = Bounds(1_000_000, min_width_px=50)

# A child whose codec does with some images what a corrupted heap would.
STUB = """
import os, signal, sys, time
from pipelines import decoder
real = decoder.store_images

def store(body, configs, bounds, looks):
    if b"SEGV" in body[-20:]:
        os.kill(os.getpid(), signal.SIGSEGV)
    if b"EXIT" in body[-20:]:
        os._exit(3)
    if b"HANG" in body[-20:]:
        time.sleep(1000)
    if b"HOG" in body[-20:]:
        bytearray(1 << 36)
    if b"FILE" in body[-20:]:
        with open(sys.argv[0] + ".out", "w") as file:
            file.write("x")
    if b"KEYS" in body[-20:]:
        raise decoder.Rejected("format", " ".join(sorted(os.environ)))
    return real(body, configs, bounds, looks)

decoder.store_images = store
decoder.serve()
"""


@pytest.fixture
def stub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "stub.py"
    script.write_text(STUB)
    monkeypatch.setattr(module, "COMMAND", [sys.executable, str(script)])


@pytest.fixture
def decoder() -> Any:
    found = Decoder(CONFIGS, BOUNDS, Looks(signs=True))
    yield found
    found.close()


def test_what_comes_back_is_what_this_process_would_make(
    decoder: Decoder, make_picture: Any, encode: Any
) -> None:
    for body in (
        encode(make_picture(1)), encode(make_picture(2, 900, 700), "PNG"),
        encode(make_picture(3))[:4000],
    ):  # fmt: skip
        here, there = store_images(body, CONFIGS, BOUNDS, Looks(signs=True)), decoder.store(body)
        assert list(map(str, here)) == list(map(str, there))
        assert [each.data for each in here if isinstance(each, StoredImage)] == [
            each.data for each in there if isinstance(each, StoredImage)
        ]
    for body, reason in (
        (b"<html>", "format"),
        (encode(make_picture(1, 40, 40)), "image_too_small"),
    ):
        with pytest.raises(Rejected) as caught:
            decoder.store(body)
        assert caught.value.reason == reason


@pytest.mark.usefixtures("stub")
@pytest.mark.parametrize(
    ("mark", "detail"),
    [(b"SEGV", "signal 11"), (b"EXIT", "exit status 3"), (b"HANG", "no answer in 1 s")],
)
def test_a_lost_child_costs_one_image(
    mark: bytes, detail: str, decoder: Decoder, make_picture: Any, encode: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(module, "IMAGE_SECONDS", 1.0)
    good = encode(make_picture(1))
    (expected, _) = decoder.store(good)
    with pytest.raises(Failed) as caught:
        decoder.store(good + mark)
    assert (caught.value.cause, caught.value.detail) == ("decoder_crash", detail)
    assert not caught.value.retryable
    assert decoder.store(good)[0] == expected


@pytest.mark.usefixtures("stub")
def test_the_child_has_no_room_no_files_and_no_keys(
    decoder: Decoder, make_picture: Any, encode: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    good = encode(make_picture(1))
    for mark, error in ((b"HOG", "MemoryError"), (b"FILE", "OSError")):
        with pytest.raises(RuntimeError, match=error):
            decoder.store(good + mark)
    with pytest.raises(Rejected) as caught:
        decoder.store(good + b"KEYS")
    assert "AWS" not in caught.value.detail
    assert isinstance(decoder.store(good)[0], StoredImage)


@pytest.mark.usefixtures("stub")
def test_a_row_ends_as_failed_and_is_not_tried_again(make_picture: Any, encode: Any) -> None:
    from pipelines.config import CurationConfig

    config = CurationConfig.model_validate({"metadata": ["x"]})
    decoder = decoder_for([config])
    (found,) = images_of(encode(make_picture(1)) + b"SEGV", decoder, [config])
    assert found == NotStored("failed", "decoder_crash", False, "signal 11")
    (found,) = images_of(b"", decoder, [config])
    assert isinstance(found, NotStored)
    assert found.reason == "format"


def test_the_largest_image_that_is_let_in_fits(encode: Any) -> None:
    """The memory allowance is enough for 16 bits per channel, the costliest way in."""
    import io

    import numpy as np
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(np.full((4000, 4000), 257 * 9, dtype=np.uint16)).save(buffer, "PNG")
    large = Decoder([ResizeConfig()], Bounds(16_000_000))
    try:
        (found,) = large.store(buffer.getvalue())
    finally:
        large.close()
    assert isinstance(found, StoredImage)
