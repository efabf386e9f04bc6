"""Measures of pixels against closed forms and a real portrait; plug-ins; blurred faces."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import matplotlib.cbook
import numpy as np
import polars as pl
import pytest
from PIL import Image, ImageDraw, ImageFilter, ImageFont
from pydantic import ValidationError

from infra.errors import UserError
from pipelines.config import ResizeConfig
from pipelines.decoder import Decoder
from pipelines.guard import Rejected
from pipelines.image_checks import (
    at_most,
    checks_part,
    faces,
    measure_of,
    measured,
    num_faces,
    sharpness,
    text_area,
    without_faces,
)
from pipelines.image_config import FaceBlurConfig, ImageCheckConfig
from pipelines.images import Bounds, Looks, StoredImage, store_images
from pipelines.plan import plan_curation
from tests.pipelines.test_build import ledger, run, samples

BOUNDS = Bounds(10_000_000)
PLUGIN = """
def redness(pixels, scale=1.0):
    return float(pixels[..., 0].mean()) * scale

def nothing():
    return 0.0

def broken(pixels):
    return float("nan")

NUMBER = 3
"""


@pytest.fixture(scope="module")
def portrait() -> Any:
    """A real portrait, of the public domain, that comes with matplotlib: one face."""
    path = matplotlib.cbook.get_sample_data("grace_hopper.jpg", asfileobj=False)
    with Image.open(str(path)) as image:
        return np.asarray(image.convert("RGB"))


@pytest.fixture
def plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "our_measures.py"
    path.write_text(PLUGIN)
    monkeypatch.syspath_prepend(str(tmp_path))
    measure_of.cache_clear()
    return path


def check(measure: str, **known: Any) -> ImageCheckConfig:
    return ImageCheckConfig.model_validate({"measure": measure} | known)


def test_sharpness_is_the_variance_of_the_laplacian(portrait: Any) -> None:
    rng = np.random.default_rng(0)
    grey = rng.integers(0, 256, (40, 50), dtype=np.uint8)
    padded = np.pad(grey.astype(float), 1, mode="reflect")
    laplacian = (
        padded[:-2, 1:-1] + padded[2:, 1:-1] + padded[1:-1, :-2] + padded[1:-1, 2:] - 4.0 * grey
    )
    assert sharpness(np.stack([grey] * 3, axis=-1)) == pytest.approx(laplacian.var(), rel=1e-4)
    soft = np.asarray(Image.fromarray(portrait).filter(ImageFilter.GaussianBlur(4)))
    assert sharpness(soft) < sharpness(portrait) / 50


def test_text_covers_what_it_covers_and_photographs_have_none(portrait: Any) -> None:
    ground = Image.new("RGB", (512, 512), (240, 240, 230))
    assert text_area(np.asarray(ground)) == 0
    draw, font = ImageDraw.Draw(ground), ImageFont.load_default(28)
    covered = 0
    for line in range(8):
        place = (20, 20 + line * 44)
        draw.text(place, "Limited offer: 20% off all prints", fill=(20, 20, 20), font=font)
        left, top, right, bottom = draw.textbbox(place, "Limited offer: 20% off all prints", font)
        covered += int((right - left) * (bottom - top))
    assert text_area(np.asarray(ground)) == pytest.approx(covered / 512**2, rel=0.3)
    assert text_area(at_most(portrait, 512)) < 0.03
    noise = np.random.default_rng(0).integers(0, 256, (512, 512, 3), dtype=np.uint8)
    assert text_area(noise) < 0.05


def test_a_portrait_has_a_face_where_it_is_and_tiles_have_none(
    portrait: Any, make_picture: Any
) -> None:
    ((left, top, width, height),) = faces(portrait, 0.08)
    assert 140 < left + width / 2 < 370
    assert 60 < top + height / 2 < 260
    assert num_faces(np.asarray(make_picture(1))) == 0


def test_a_blurred_face_is_none_any_more_and_the_rest_is_as_it_was(portrait: Any) -> None:
    ((left, top, width, height),) = faces(portrait, 0.08)
    hidden, number = without_faces(portrait, FaceBlurConfig())
    assert number == 1
    assert not faces(hidden, 0.08)
    changed = (hidden != portrait).any(axis=-1)
    around = np.zeros_like(changed)
    around[max(0, top - height // 4) : top + height * 5 // 4 + 1,
           max(0, left - width // 4) : left + width * 5 // 4 + 1] = True  # fmt: skip
    assert changed[around].mean() > 0.4
    assert not changed[~around].any()
    eyes = (slice(top + height // 4, top + height // 2), slice(left, left + width))
    assert sharpness(hidden[eyes]) < sharpness(portrait[eyes]) / 20


def test_a_face_is_found_and_blurred_at_any_size(portrait: Any, encode: Any) -> None:
    """A large image, which would be decoded at a fraction of its size for a small one."""
    large = encode(Image.fromarray(portrait).resize((2048, 2400)), "JPEG", quality=95)
    looks = Looks(checks=(check("num_faces", min=1),), blur_faces=FaceBlurConfig())
    (stored,) = store_images(large, [ResizeConfig(image_size_px=256, crop="none")], BOUNDS, looks)
    assert isinstance(stored, StoredImage)
    assert stored.measures == {"num_faces": 1, "blurred_faces": 1}
    assert not faces(np.asarray(Image.open(io.BytesIO(stored.data))), 0.08)


def test_values_out_of_range_reject_and_all_are_kept(portrait: Any) -> None:
    found = measured(portrait, [check("sharpness"), check("num_faces", max=1)])
    assert found["num_faces"] == 1
    assert found["sharpness"] > 100
    for asked, told in (
        (check("num_faces", max=0), "num_faces 1 is above 0"),
        (check("sharpness", min=1e6), "is below 1e"),
    ):
        with pytest.raises(Rejected, match=told) as caught:
            measured(portrait, [asked])
        assert caught.value.reason == "image_check"


def test_a_plug_in_measures_in_the_child(plugin: Path, make_picture: Any, encode: Any) -> None:
    red = check("our_measures:redness", options={"scale": 2.0}, max=300)
    decoder = Decoder([ResizeConfig()], BOUNDS, Looks(checks=(red,)))
    try:
        (stored,) = decoder.store(encode(Image.new("RGB", (64, 64), (100, 0, 0)), "PNG"))
        assert isinstance(stored, StoredImage)
        assert stored.measures == {"our_measures:redness": 200.0}
        (refused,) = decoder.store(encode(Image.new("RGB", (64, 64), (200, 0, 0)), "PNG"))
        assert isinstance(refused, Rejected)
        assert refused.reason == "image_check"
    finally:
        decoder.close()


def test_a_plug_in_is_known_by_its_code(plugin: Path) -> None:
    part = checks_part([check("our_measures:redness"), check("sharpness")])
    assert list(part["image_check_plugins"]) == ["our_measures:redness"]
    before = part["image_check_plugins"]["our_measures:redness"]
    plugin.write_text(PLUGIN + "\n# another way\n")
    after = checks_part([check("our_measures:redness")])["image_check_plugins"]
    assert after["our_measures:redness"] != before
    assert checks_part([check("sharpness")]) == {}


@pytest.mark.usefixtures("plugin")
def test_what_is_no_measure_is_one_line() -> None:
    for name, got in (
        ("no_such_module:measure", "No module named"),
        ("our_measures:absent", "absent"),
        ("our_measures:NUMBER", "int"),
        ("os:getcwd", "builtin_function"),
        ("our_measures:nothing", "too many positional arguments"),
    ):
        with pytest.raises(UserError, match="image_checks") as caught:
            checks_part([check(name)])
        assert got in str(caught.value)
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match=r"its options \(scael\); got .*scael"):
        checks_part([check("our_measures:redness", options={"scael": 2.0})])
    with pytest.raises(Rejected, match="is nan"):
        measured(np.zeros((8, 8, 3), np.uint8), [check("our_measures:broken")])
    for wrong in ({"measure": "beauty"}, {"measure": "a b:c"}, {"measure": "sharpness",
                  "min": 2, "max": 1}, {"measure": "sharpness", "options": {"a": 1}}):  # fmt: skip
        with pytest.raises(ValidationError):
            ImageCheckConfig.model_validate(wrong)


def test_a_curation_measures_rejects_and_stores(
    trap_world: Any, http_response: Any, tmp_path: Path
) -> None:
    asked: dict[str, Any] = {
        "image_checks": [{"measure": "sharpness"}, {"measure": "num_faces", "max": 0}],
        "blur_faces": {},
    }
    path = matplotlib.cbook.get_sample_data("grace_hopper.jpg", asfileobj=False)
    trap_world.web.route("/good/0.jpg", http_response(Path(str(path)).read_bytes()))
    plan = plan_curation("traps", trap_world.config(**asked), (tmp_path / "store").as_uri())
    manifest = run(plan)
    rows = ledger(plan.build, manifest).filter(pl.col("url").str.ends_with("/good/0.jpg"))
    assert "image_check" in rows["reason"].to_list()
    assert "num_faces 1 is above 0" in rows["detail"].to_list()
    assert manifest.rejected["image_check"] == 1
    for members in samples(plan.build, manifest).values():
        known = json.loads(members["json"])["measures"]
        assert known["num_faces"] == known["blurred_faces"] == 0
        assert known["sharpness"] > 0
