"""`sample` and `edit` as a person meets them, on a small model with random weights."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from app.cli import app
from app.edit import EditWish, open_picture, read_words
from app.painting_options import box_of, printable, prompts_of, seeds_of, sides_of, size_of
from app.sample import within_memory
from infra.digests import sha256_file
from infra.errors import UserError
from model import CLIPTokenizer, LoRA, LoRAConfig, TextToImage
from tests.model.conftest import CAPTIONS, small_painter
from tests.model.test_hub import COMMIT, Hub

STEPS = ["--steps", "3"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "small"
    small_painter(CLIPTokenizer.train(CAPTIONS, 560)).save_pretrained(path)
    return path


@pytest.fixture(autouse=True)
def _progress_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    """`--json` silences progress for the rest of the process, and with it lines too many."""
    monkeypatch.setenv("ATELIER_QUIET", "")


def atelier(*arguments: str | Path) -> tuple[int, str, list[str]]:
    """(exit code, stdout, lines on stderr)."""
    done = CliRunner().invoke(app, [str(a) for a in arguments])
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done.exit_code, done.stdout, done.stderr.splitlines()


def text_of(path: Path) -> dict[str, str]:
    with Image.open(path) as file:
        return dict(file.text)  # type: ignore[attr-defined]  # PNG files have it


def levels(path: Path) -> np.ndarray[tuple[int, ...], np.dtype[Any]]:
    with Image.open(path) as file:
        return np.asarray(file.convert("RGB"))


def size_px(path: Path) -> tuple[int, int]:
    with Image.open(path) as file:
        return file.size


def test_prompts_times_seeds_with_grid_and_preview(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a star\n\n  two \U0001f98a \n", encoding="utf-8")
    code, out, _ = atelier(
        "sample", "a red circle", "--prompts", tmp_path / "prompts.txt", "--seeds", "3,5-6",
        "--model", folder, "--out", tmp_path / "s.png", "--grid", tmp_path / "grid.png",
        "--steps-preview", "strip", "--size", "16x32", "--negative", "blurry", "--batch-size", "4",
        *STEPS, "--json",
    )  # fmt: skip
    assert code == 0
    images = json.loads(out)["images"]
    assert [(i["prompt"], i["seed"]) for i in images[::3]] == [
        ("a red circle", 3), ("a star", 3), ("two \U0001f98a", 3),
    ]  # fmt: skip
    assert size_px(Path(images[8]["path"])) == (16, 32)
    text = text_of(Path(images[8]["path"]))
    assert (text["prompt"], text["seed"], text["negative_prompt"]) == (
        "two \U0001f98a", "6", "blurry",
    )  # fmt: skip
    assert size_px(tmp_path / "grid.png")[0] > 3 * 168
    for index in range(9):  # the last of the frames is the image itself
        strip, image = (
            levels(tmp_path / f"s-{index + 1}-steps.png"),
            levels(tmp_path / f"s-{index + 1}.png"),
        )
        assert strip.shape[1] == 3 * 16 + 2 * 4
        assert np.array_equal(strip[:, -16:], image)
        assert not np.array_equal(strip[:, :16], image)
    alone = ["sample", "two \U0001f98a", "--seed", "6", "--size", "16x32", "--negative", "blurry"]
    assert atelier(*alone, "--model", folder, "--out", tmp_path / "a.png", *STEPS)[0] == 0
    assert np.array_equal(levels(tmp_path / "a.png"), levels(Path(images[8]["path"])))


def test_a_gif_of_the_steps(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "a.png"
    done = atelier(
        "sample", "a", "--model", folder, "--out", out, "--steps-preview", "gif", "--steps", "20"
    )
    assert done[0] == 0
    with Image.open(tmp_path / "a-steps.gif") as gif:
        assert (gif.format, gif.size) == ("GIF", (24, 24))
        assert 2 <= getattr(gif, "n_frames", 1) <= 16


@pytest.mark.parametrize("prompt", ["", "x" * 10_000, "\U0001f98a", "مرحبا", "a\udcffb"])
def test_prompts_of_every_kind(folder: Path, tmp_path: Path, prompt: str) -> None:
    out = tmp_path / "a.png"
    assert atelier("sample", prompt, "--model", folder, "--out", out, *STEPS)[0] == 0
    assert text_of(out)["prompt"] == printable(prompt)


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--size", "0"], "each 1 to 8192"),
        (["--size", "-8"], "each 1 to 8192"),
        (["--size", "99999"], "each 1 to 8192"),
        (["--size", "8x8x8"], "each 1 to 8192"),
        (["--size", "26"], "expected multiples of 4 px"),
        (["--order", "sideways"], "confidence, margin, entropy, random, halton"),
        (["--guidance-schedule", "step"], "constant, linear, cosine"),
        (["--seed", "99999999999999999999"], "a seed leaves the range"),
        (["--seeds", "5-2"], "numbers and ranges"),
        (["--seeds", "0-99999"], "at most 1000"),
        (["--steps-preview", "mp4"], "gif or strip"),
        (["--out", "a.jpg"], "ending in .png"),
        (["--grid", "a.jpg"], "ending in .png"),
        (["--seeds", "0-200", "--grid", "g.png"], "at most 100 images"),
        (["--prompts", "nowhere.txt"], "nowhere.txt"),
        (["--out", "/proc/version/a.png"], "/proc/version is a file"),
        (["--out", "."], "ending in .png"),
        (["--device", "cuda:99"], "expected auto or one of cpu"),
        (["--precision", "fp8"], "expected auto or one of fp32, bf16, fp16"),
        (["--quantize", "int4"], "expected one of int8, fp8"),
        (["--tile", "3"], "expected at least 16 px"),
    ],
)
def test_a_wish_that_cannot_be_is_one_line(
    folder: Path, tmp_path: Path, arguments: list[str], line: str
) -> None:
    out = ["--out", str(tmp_path / "a.png")]
    code, stdout, lines = atelier("sample", "a", "--model", folder, *out, *arguments, *STEPS)
    assert (code, stdout, len(lines)) == (1, "", 1)
    assert line in lines[0]
    assert list(tmp_path.iterdir()) == []


def put_nan(folder: Path) -> None:
    file = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    tensors["context_embedder.bias"][0] = torch.nan
    save_file(tensors, file)


def put_pickle(folder: Path) -> None:
    (folder / "vqvae" / "diffusion_pytorch_model.safetensors").unlink()
    torch.save({"a": torch.zeros(1)}, folder / "vqvae" / "diffusion_pytorch_model.bin")


def cut_weights(folder: Path) -> None:
    file = folder / "text_encoder" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])


def misspell_config(folder: Path) -> None:
    file = folder / "transformer" / "config.json"
    file.write_text(file.read_text().replace("num_layers", "num_layer"))


def change_widths(folder: Path) -> None:
    file = folder / "transformer" / "config.json"
    file.write_text(file.read_text().replace('"vocab_size": 40', '"vocab_size": 41'))


@pytest.mark.parametrize(
    ("damage", "line"),
    [
        (put_nan, "NaN or infinite values in 1 tensors (context_embedder.bias)"),
        (put_pickle, "holds pickled weights (diffusion_pytorch_model.bin)"),
        (cut_weights, "model.safetensors is damaged"),
        (misspell_config, "unknown key 'num_layer' (did you mean 'num_layers'?)"),
        (change_widths, "1 misshapen: embed.embeddings.weight is (40, 16), expected (41, 16)"),
        (lambda folder: (folder / "tokenizer" / "merges.txt").unlink(), "has no tokenizer"),
        (lambda folder: (folder / "tokenizer" / "merges.txt").write_bytes(b"\xff"), "not UTF-8"),
        (lambda folder: (folder / "model_index.json").write_text("{"), "is not valid JSON"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_a_damaged_model_is_one_line(
    folder: Path, tmp_path: Path, damage: Callable[[Path], object], line: str
) -> None:
    model = Path(shutil.copytree(folder, tmp_path / "model"))
    damage(model)
    code, stdout, lines = atelier("sample", "a", "--model", model, "--out", tmp_path / "a.png")
    assert (code, stdout, len(lines)) == (1, "", 1), lines
    assert line in lines[0]
    assert not (tmp_path / "a.png").exists()


def test_a_model_by_its_name_on_a_hub(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    constants = pytest.importorskip("huggingface_hub.constants")
    server = Hub(folder)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_PROGRESS_BARS", True)
    asked: list[str | Path] = ["sample", "a star", *STEPS, "--out"]
    named = atelier(*asked, tmp_path / "named.png", "--model", "someone/painter@main")
    server.shutdown()
    server.server_close()
    assert named[0] == 0, named
    assert atelier(*asked, tmp_path / "path.png", "--model", folder)[0] == 0
    assert text_of(tmp_path / "named.png")["model"] == f"someone/painter@{COMMIT}"
    assert np.array_equal(levels(tmp_path / "named.png"), levels(tmp_path / "path.png"))


def test_small_machines_paint_and_say_how(folder: Path, tmp_path: Path) -> None:
    small = ["--quantize", "int8", "--offload", "--tile", "16", "--precision", "bf16"]
    asked: list[str | Path] = ["--model", folder, *STEPS, "--device", "cpu", "--out"]
    assert atelier("sample", "a star", *asked, tmp_path / "s.png", *small)[0] == 0
    text = text_of(tmp_path / "s.png")
    assert (text["precision"], text["quantize"], text["tile_px"]) == ("bfloat16", "int8", "16")
    edited = ("edit", tmp_path / "s.png", "a circle", *asked, tmp_path / "e.png", *small)
    assert atelier(*edited, "--box", "4,4,8,8")[0] == 0
    assert np.array_equal(levels(tmp_path / "e.png")[12:], levels(tmp_path / "s.png")[12:])
    assert atelier("sample", "a star", *asked, tmp_path / "p.png", "--precision", "fp32")[0] == 0
    text = text_of(tmp_path / "p.png")
    assert text["precision"] == "float32"
    assert "quantize" not in text
    assert not np.array_equal(levels(tmp_path / "p.png"), levels(tmp_path / "s.png"))


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9.00 GiB.\nMore of it."),
        RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory"),
        MemoryError(),
    ],
)
def test_memory_that_runs_out_is_one_line(error: Exception) -> None:
    with pytest.raises(UserError, match="--quantize int8") as told, within_memory():
        raise error
    assert "\n" not in str(told.value)
    with pytest.raises(RuntimeError, match="a bug"), within_memory():
        raise RuntimeError("a bug")


def picture(path: Path, width: int = 22, height: int = 18, **options: Any) -> Path:
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path, **options)
    return path


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


def test_what_is_typed_is_read() -> None:
    assert (size_of("512"), size_of("768X512")) == ((512, 512), (768, 512))
    assert seeds_of("1, 5,10-12") == [1, 5, 10, 11, 12]
    assert box_of("0, 1,2,3") == (0, 1, 2, 3)
    assert sides_of(["left=1,top=2", "right=3"]) == {"left": 1, "top": 2, "right": 3}
    with pytest.raises(UserError, match="at least one prompt"):
        prompts_of([], None)
    for text in ("²", "1e3", "٣", "0x10", "1" * 30):
        with pytest.raises(UserError):
            size_of(text)


def test_order_draw_and_guidance_can_be_chosen(folder: Path, tmp_path: Path) -> None:
    plain: list[str | Path] = ["sample", "a star", "--model", folder, *STEPS, "--out"]
    assert atelier(*plain, tmp_path / "plain.png")[0] == 0
    other = ["--order", "halton", "--guidance-schedule", "cosine", "--token-temperature", "0"]
    other += ["--zigzag", "0.5"]
    code, _, _ = atelier(*plain, tmp_path / "other.png", *other)
    assert code == 0
    text = text_of(tmp_path / "other.png")
    assert (text["order"], text["guidance_schedule"]) == ("halton", "cosine")
    assert (text["token_temperature"], text["zigzag"]) == ("0.0", "0.5")
    assert not np.array_equal(levels(tmp_path / "plain.png"), levels(tmp_path / "other.png"))
    code, _, lines = atelier(*plain, tmp_path / "odd.png", "--order", "sideways")
    assert code == 1
    assert "halton" in lines[-1]


def test_adapters_are_put_on_top(folder: Path, tmp_path: Path) -> None:
    painter = TextToImage.from_pretrained(folder)
    lora = LoRA.start({"transformer": painter.transformer}, LoRAConfig(rank=2))
    with torch.no_grad():
        for parameter in lora.parameters():
            parameter.normal_(std=0.5)
    lora.save_pretrained(tmp_path / "style")
    asked: list[str | Path] = ["sample", "a star", "--model", folder, *STEPS, "--out"]
    assert atelier(*asked, tmp_path / "plain.png")[0] == 0
    assert atelier(*asked, tmp_path / "styled.png", "--lora", tmp_path / "style")[0] == 0
    assert not np.array_equal(levels(tmp_path / "plain.png"), levels(tmp_path / "styled.png"))
    assert text_of(tmp_path / "styled.png")["loras"] == str(tmp_path / "style")
    code, _, lines = atelier(*asked, tmp_path / "none.png", "--lora", tmp_path / "nothing")
    assert code == 1
    assert len([line for line in lines if line.startswith("atelier: ")]) == 1
