"""`edit` as a person meets it: what is kept, read and refused; and what lineages are for."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms
from PIL.PngImagePlugin import PngInfo

from app.edit import EditWish, open_picture, read_words
from infra.digests import sha256_file
from infra.errors import UserError
from tests.app.conftest import STEPS, atelier, levels, picture, save_style, size_px, text_of

pytestmark = pytest.mark.usefixtures("progress_is_shown")


def test_editing_in_a_box_keeps_the_rest_and_the_lineage(folder: Path, tmp_path: Path) -> None:
    parent, out = picture(tmp_path / "p.png"), tmp_path / "e.png"
    code, answer, _ = atelier(
        "edit", parent, "a star", "--box", "4,6,8,8", "--model", folder, "--out", out, *STEPS,
        "--seed", "9", "--side-by-side", "--json",
    )  # fmt: skip
    assert code == 0
    inside = np.zeros((18, 22), dtype=bool)
    inside[6:14, 4:12] = True
    assert np.array_equal(levels(out)[~inside], levels(parent)[~inside])
    assert not np.array_equal(levels(out)[inside], levels(parent)[inside])
    text = text_of(out)
    assert (text["parent_sha256"], text["seed"], text["prompt"], text["operation"]) == (
        sha256_file(parent), "9", "a star", "inpaint",
    )  # fmt: skip
    assert text["model"] == str(folder.resolve())
    assert len(text["mask_sha256"]) == 64
    sheet = tmp_path / "e-before-after.png"
    assert json.loads(answer)["before_after"] == str(sheet)
    assert size_px(sheet) == (3 * 22 + 2 * 4, 18)
    assert np.array_equal(levels(sheet)[:, -22:], levels(out))


def test_a_mask_file_and_a_box_say_the_same(folder: Path, tmp_path: Path) -> None:
    parent, mask = picture(tmp_path / "p.png"), Image.new("RGBA", (22, 18))
    mask.paste((255, 255, 255, 255), (4, 6, 12, 14))
    mask.save(tmp_path / "m.png")
    how: tuple[str | Path, ...] = ("--model", folder, *STEPS, "--feather", "2")
    places: dict[str, tuple[str | Path, ...]] = {
        "a": ("--mask", tmp_path / "m.png"),
        "b": ("--box", "4,6,8,8"),
    }
    for name, where in places.items():
        assert atelier("edit", parent, "a", *where, *how, "--out", tmp_path / f"{name}.png")[0] == 0
    assert np.array_equal(levels(tmp_path / "a.png"), levels(tmp_path / "b.png"))


def test_a_photograph_s_colours_and_transparency_are_kept(folder: Path, tmp_path: Path) -> None:
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    layers = np.random.default_rng(0).integers(0, 256, (40, 60, 4), dtype=np.uint8)
    parent, out = tmp_path / "p.png", tmp_path / "e.png"
    Image.fromarray(layers).save(parent, icc_profile=profile)
    how = ("--box", "30,20,8,8", "--side-by-side", *STEPS)
    assert atelier("edit", parent, "a star", "--model", folder, "--out", out, *how)[0] == 0
    inside = np.zeros((40, 60), dtype=bool)
    inside[20:28, 30:38] = True
    with Image.open(out) as file:
        assert file.info["icc_profile"] == profile
        assert np.array_equal(np.asarray(file)[~inside], layers[~inside])
    sheet = levels(tmp_path / "e-before-after.png")
    assert np.array_equal(sheet[:, :60][~inside], sheet[:, -60:][~inside])
    grey = profile[:16] + b"GRAY" + profile[20:]
    Image.fromarray(layers).save(parent, icc_profile=grey)
    assert open_picture(parent).icc_profile is None


def test_a_deep_photograph_keeps_its_tones(folder: Path, tmp_path: Path) -> None:
    tones = np.linspace(0, 65535, 18 * 22).reshape(18, 22).astype(np.uint16)
    inside = np.zeros((18, 22), dtype=bool)
    inside[6:14, 4:12] = True
    where = ("--box", "4,6,8,8", *STEPS, "--out", str(tmp_path / "e.png"))
    asked: tuple[str | Path, ...] = ("a star", "--model", folder, *where)
    for name, image in {
        "deep.png": Image.fromarray(tones),
        "deep.tif": Image.fromarray(tones.astype(np.int32)),
        "floats.tif": Image.fromarray((tones >> 8).astype(np.float32) / 255),
    }.items():
        image.save(tmp_path / name)
        assert atelier("edit", tmp_path / name, *asked)[0] == 0
        kept = levels(tmp_path / "e.png")[~inside]
        assert np.array_equal(kept, np.repeat((tones >> 8)[~inside][:, None], 3, axis=1))
        (tmp_path / "e.png").unlink()
    Image.fromarray(tones.astype(np.int32) * 2).save(tmp_path / "odd.tif")
    code, _, lines = atelier("edit", tmp_path / "odd.tif", *asked)
    assert (code, len(lines)) == (1, 1)
    assert "expected 0 to 65535" in lines[0]


def test_nothing_to_paint_is_said(folder: Path, tmp_path: Path) -> None:
    parent, out = picture(tmp_path / "p.png"), tmp_path / "e.png"
    Image.new("L", (22, 18)).save(tmp_path / "black.png")
    how: tuple[str | Path, ...] = ("--model", folder, *STEPS, "--out", out)
    code, _, lines = atelier("edit", parent, "a", "--mask", tmp_path / "black.png", *how)
    assert (code, len(lines), out.exists()) == (1, 1, False)
    assert "one without a light place" in lines[0]
    code, _, lines = atelier("edit", parent, "a star", "--caption", "a star", *how)
    assert (code, out.exists()) == (1, False)
    assert "expected something to paint" in lines[-1]


def test_outpainting_keeps_the_picture(folder: Path, tmp_path: Path) -> None:
    parent, out = picture(tmp_path / "p.png"), tmp_path / "o.png"
    sides = ("--outpaint", "left=3", "--outpaint", "bottom=5")
    assert atelier("edit", parent, "a", *sides, "--model", folder, "--out", out, *STEPS)[0] == 0
    assert levels(out).shape == (23, 25, 3)
    assert np.array_equal(levels(out)[:18, 3:], levels(parent))
    assert text_of(out)["operation"] == "outpaint"


def test_an_image_painted_here_carries_its_caption(folder: Path, tmp_path: Path) -> None:
    red, out = tmp_path / "red.png", tmp_path / "e.png"
    how: tuple[str | Path, ...] = ("--model", folder, *STEPS)
    assert atelier("sample", "a red circle", *how, "--out", red)[0] == 0
    assert atelier("edit", red, "change the circle to blue", *how, "--out", out)[0] == 0
    text = text_of(out)
    assert (text["prompt"], text["parent_caption"], text["operation"]) == (
        "a blue circle", "a red circle", "local",
    )  # fmt: skip
    assert text["instruction"] == "change the circle to blue"


@pytest.mark.parametrize(
    ("words", "arguments", "line"),
    [
        ("remove the dog", [], "a caption of the picture as it is"),
        ("remove the dog", ["--caption", "a cat"], "does not name 'dog'"),
        ("a", ["--operation", "stile"], "did you mean 'style'"),
        ("a", ["--strength", "0"], "strength is 0"),
        ("a", ["--strength", "nan"], "strength is nan"),
        ("a", ["--box", "0,0,30,3"], "a box inside the picture of 22 x 18 px"),
        ("a", ["--box", "0,0,0,3"], "the last two above 0"),
        ("a", ["--mask", "{}/small.png"], "a mask of the picture's size, 22 x 18 px"),
        ("a", ["--mask", "{}/none.png"], "a picture at"),
        ("a", ["--box", "0,0,1,1", "--outpaint", "left=3"], "exclude each other"),
        ("a", ["--outpaint", "up=3"], "left, top, right, bottom"),
        ("a", ["--outpaint", "left=99999"], "1 to 8192 px"),
        ("a", ["--out", "a.gif"], "ending in .png"),
    ],
)
def test_an_edit_that_cannot_be_is_one_line(
    folder: Path, tmp_path: Path, words: str, arguments: list[str], line: str
) -> None:
    parent = picture(tmp_path / "p.png")
    Image.new("L", (4, 4)).save(tmp_path / "small.png")
    out = ["--out", str(tmp_path / "e.png")]
    given = [argument.format(tmp_path) for argument in arguments]
    code, stdout, lines = atelier("edit", parent, words, "--model", folder, *out, *given, *STEPS)
    assert (code, stdout, len(lines)) == (1, "", 1), lines
    assert line in lines[0]
    assert not (tmp_path / "e.png").exists()


def test_pictures_that_are_none(tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("no picture", encoding="utf-8")
    cut = picture(tmp_path / "cut.png")
    cut.write_bytes(cut.read_bytes()[:200])
    Image.new("1", (9000, 2)).save(tmp_path / "wide.png")
    for name in ("text.png", "cut.png", "wide.png", "nowhere.png", "."):
        with pytest.raises(UserError, match="expected a picture"):
            open_picture(tmp_path / name)


def test_photographs_are_turned_upright(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    path = picture(tmp_path / "p.jpg", 20, 10, exif=exif)
    assert open_picture(path)[0].size == (10, 20)


def test_words_are_an_instruction_or_a_caption() -> None:
    wish = EditWish(Path("p.png"), "a blue car", Path("e.png"))
    assert read_words(wish, None) == ("a blue car", None, None)
    assert read_words(wish, "a red car") == ("a blue car", "a red car", None)
    told = EditWish(Path("p.png"), "make the car blue", Path("e.png"), operation="texture")
    assert read_words(told, "a red car") == ("a blue car", "a red car", "texture")


def test_a_prompt_of_another_program_is_no_caption(folder: Path, tmp_path: Path) -> None:
    chunks = PngInfo()
    chunks.add_text("prompt", json.dumps({"3": {"class_type": "KSampler"}}))
    parent = picture(tmp_path / "p.png", pnginfo=chunks)
    assert open_picture(parent)[1] is None
    code, _, lines = atelier("edit", parent, "remove the dog", "--model", folder)
    assert (code, len(lines)) == (1, 1)
    assert "a caption of the picture as it is" in lines[0]


def options_in(text: dict[str, str]) -> list[str]:
    """The command's options, of nothing but what an image carries."""
    named = {
        "steps": "--steps", "guidance_scale": "--guidance", "negative_prompt": "--negative",
        "guidance_schedule": "--guidance-schedule", "guidance_interval": "--guidance-interval",
        "order": "--order", "temperature": "--temperature", "zigzag": "--zigzag",
        "token_temperature": "--token-temperature", "preference_score": "--score",
        "seed": "--seed", "model": "--model", "loras": "--lora", "strength": "--strength",
        "feather_px": "--feather", "outpaint": "--outpaint",
    }  # fmt: skip
    return [part for key, option in named.items() if key in text for part in (option, text[key])]


@pytest.mark.parametrize("rich", [False, True])
def test_what_an_image_carries_paints_it_again(folder: Path, tmp_path: Path, rich: bool) -> None:
    style = save_style(folder, tmp_path / "style")
    how = [
        "--seed", "5", "--guidance", "3.5", "--guidance-interval", "0.25,0.75", "--zigzag", "0.3",
        "--temperature", "0.7", "--token-temperature", "0.9", "--score", "5.5", "--order", "margin",
        "--guidance-schedule", "linear", "--negative", "blurry", "--lora", f"{style}:0.5",
    ] if rich else []  # fmt: skip
    first, again = tmp_path / "first.png", tmp_path / "again.png"
    asked = ("--model", str(folder), *STEPS, *how)
    assert atelier("sample", "a star", *asked, "--out", first)[0] == 0
    text = text_of(first)
    assert atelier("sample", text["prompt"], *options_in(text), "--out", again)[0] == 0
    assert text_of(again) == text
    assert np.array_equal(levels(again), levels(first))
    parent = picture(tmp_path / "p.png")
    out = ("--outpaint", "left=3,bottom=5", "--feather", "2", "--out", tmp_path / "e.png")
    assert atelier("edit", parent, "a star", *asked, *out)[0] == 0
    text = text_of(tmp_path / "e.png")
    assert (text["outpaint"], text["feather_px"]) == ("left=3,bottom=5", "2")
    assert atelier("edit", parent, text["prompt"], *options_in(text), "--out", again)[0] == 0
    assert text_of(again) == text
    assert np.array_equal(levels(again), levels(tmp_path / "e.png"))
