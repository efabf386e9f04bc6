"""`sample` as a person meets it, on a small model with random weights."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from app.easel import Adapters, on_this_machine
from app.painting_options import (
    adapters_of,
    box_of,
    interval_of,
    printable,
    prompts_of,
    seeds_of,
    sides_of,
    size_of,
)
from infra.errors import UserError
from model import TextToImage
from tests.app.conftest import STEPS, atelier, levels, save_style, size_px, text_of
from tests.model.test_hub import COMMIT, Hub

pytestmark = pytest.mark.usefixtures("progress_is_shown")


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
    with pytest.raises(UserError, match="--quantize int8") as told, on_this_machine():
        raise error
    assert "\n" not in str(told.value)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("a bug"),
        NotImplementedError("a bug"),
        RecursionError("a bug"),
        torch.AcceleratorError("CUDA error: device-side assert triggered, a bug", 59),
    ],
)
def test_a_bug_is_no_lack_of_memory(error: Exception) -> None:
    with pytest.raises(type(error), match="a bug"), on_this_machine():
        raise error


@pytest.mark.slow
def test_compiling_without_a_compiler_is_one_line(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr("torch._inductor.config.cpp.cxx", (str(tmp_path / "no-compiler"),))
    torch.compiler.reset()
    out = tmp_path / "a.png"
    asked: tuple[str | Path, ...] = (
        "sample",
        "a",
        "--model",
        folder,
        "--out",
        out,
        "--device",
        "cpu",
        *STEPS,
    )
    code, _, lines = atelier(*asked, "--compile")
    torch.compiler.reset()
    assert (code, out.exists()) == (1, False)
    assert "No working C++ compiler" in lines[-1]
    assert "leave --compile out" in lines[-1]


def test_frames_are_decoded_a_batch_at_a_time(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes, decode = [], TextToImage.decode_pixels

    def counting(painter: TextToImage, tokens_BHW: torch.Tensor) -> torch.Tensor:
        sizes.append(len(tokens_BHW))
        if len(sizes) == 5:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return decode(painter, tokens_BHW)

    monkeypatch.setattr(TextToImage, "decode_pixels", counting)
    asked = ("sample", "a", "--model", folder, "--out", tmp_path / "a.png", "--steps", "8")
    code, _, lines = atelier(*asked, "--steps-preview", "strip", "--batch-size", "2")
    assert sizes == [1, 2, 2, 2, 2]  # the image, then its frames
    assert code == 1
    assert "--quantize int8" in lines[-1]


def test_a_stop_keeps_what_is_painted_and_the_same_call_goes_on(
    folder: Path, tmp_path: Path
) -> None:
    number = 400
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(f"a star {n}" for n in range(number)), encoding="utf-8")
    asked: tuple[str | Path, ...] = (
        "sample", "--prompts", prompts, "--model", folder, "--out", tmp_path / "s.png", *STEPS,
        "--batch-size", "2",
    )  # fmt: skip

    ended = threading.Event()

    def stop_after_a_while() -> None:
        while not (tmp_path / "s-6.png").exists():
            if ended.wait(0.01):
                return
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=stop_after_a_while)
    thread.start()
    try:
        code, _, lines = atelier(*asked)
    finally:
        ended.set()
        thread.join()
    written = {path: path.stat().st_mtime_ns for path in tmp_path.glob("s-*.png")}
    assert code == 143
    assert 6 <= len(written) < number
    said = re.search(r"at least (\d+) of 400 images are written; the same command goes", lines[-1])
    assert said is not None
    assert 0 <= len(written) - int(said[1]) <= 2
    prompts.write_text("\n".join(f"a star {n}" for n in range(len(written) + 3)), encoding="utf-8")
    code, out, _ = atelier(*asked)
    assert code == 0
    assert f"{len(written)} of {len(written) + 3} were there already" in out
    assert {path: path.stat().st_mtime_ns for path in written} == written
    last = tmp_path / f"s-{len(written) + 3}.png"
    alone = ("sample", text_of(last)["prompt"], "--seed", text_of(last)["seed"], *STEPS)
    assert atelier(*alone, "--model", folder, "--out", tmp_path / "alone.png")[0] == 0
    assert np.array_equal(levels(last), levels(tmp_path / "alone.png"))


def test_an_image_is_painted_again_where_anything_differs(folder: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(folder, tmp_path / "model"))
    out, other = tmp_path / "a.png", ["--steps", "4"]
    asked: tuple[str | Path, ...] = ("sample", "a", "--model", model, "--out", out)

    def is_painted(*options: str) -> bool:
        code, said, _ = atelier(*asked, *options)
        assert code == 0
        return "were there already" not in said

    assert is_painted(*STEPS)
    assert not is_painted(*STEPS)
    assert is_painted(*other)
    assert is_painted(*other, "--size", "16")
    assert is_painted(*other, "--size", "16", "--steps-preview", "gif")
    assert not is_painted(*other, "--size", "16", "--steps-preview", "gif")
    out.write_bytes(out.read_bytes()[:-40])
    assert is_painted(*other, "--size", "16", "--steps-preview", "gif")
    (tmp_path / "a-steps.gif").unlink()
    assert is_painted(*other, "--size", "16", "--steps-preview", "gif")
    assert not is_painted(*other, "--size", "16")
    (model / "notes.txt").write_text("of no effect", encoding="utf-8")
    assert not is_painted(*other, "--size", "16")
    file = model / "transformer" / "diffusion_pytorch_model.safetensors"
    save_file({name: 2 * tensor for name, tensor in load_file(file).items()}, file)
    assert is_painted(*other, "--size", "16")


def test_what_is_typed_is_read() -> None:
    assert (size_of("512"), size_of("768X512")) == ((512, 512), (768, 512))
    assert seeds_of("1, 5,10-12") == [1, 5, 10, 11, 12]
    assert box_of("0, 1,2,3") == (0, 1, 2, 3)
    assert sides_of(["left=1,top=2", "right=3"]) == {"left": 1, "top": 2, "right": 3}
    assert interval_of("0.1, 1") == (0.1, 1.0)
    assert adapters_of(["a/b", "a:0.5", "a:b", ":1"]) == (
        Adapters("a/b"), Adapters("a", 0.5), Adapters("a:b"), Adapters(":1"),
    )  # fmt: skip
    for texts in ("0.1", "0,2", "nan,1", "a,b"):
        with pytest.raises(UserError, match="two shares of the steps"):
            interval_of(texts)
    with pytest.raises(UserError, match="a number after the colon"):
        adapters_of(["a:nan"])
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


@pytest.mark.parametrize(
    "option",
    [
        "--temperature=0",
        "--score=1",
        "--guidance-interval=0,0.2",
        "--negative=a star",
        "--zigzag=1",
    ],
)
def test_every_knob_turns_pixels(folder: Path, tmp_path: Path, option: str) -> None:
    asked: tuple[str | Path, ...] = ("sample", "two", "--model", folder, "--steps", "6", "--out")
    assert atelier(*asked, tmp_path / "a.png")[0] == 0
    assert atelier(*asked, tmp_path / "b.png", option)[0] == 0
    assert not np.array_equal(levels(tmp_path / "a.png"), levels(tmp_path / "b.png"))


def test_an_empty_negative_prompt_is_one(folder: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(folder, tmp_path / "model"))
    index = json.loads((model / "model_index.json").read_text(encoding="utf-8"))
    index["negative_prompt"] = "two green squares"
    (model / "model_index.json").write_text(json.dumps(index), encoding="utf-8")
    asked: tuple[str | Path, ...] = ("sample", "two", "--model", model, *STEPS, "--out")
    assert atelier(*asked, tmp_path / "own.png")[0] == 0
    assert atelier(*asked, tmp_path / "empty.png", "--negative", "")[0] == 0
    assert text_of(tmp_path / "own.png")["negative_prompt"] == "two green squares"
    assert text_of(tmp_path / "empty.png")["negative_prompt"] == ""
    assert not np.array_equal(levels(tmp_path / "own.png"), levels(tmp_path / "empty.png"))


def test_adapters_are_put_on_top(folder: Path, tmp_path: Path) -> None:
    style = save_style(folder, tmp_path / "style")
    asked: list[str | Path] = ["sample", "a star", "--model", folder, *STEPS, "--out"]
    assert atelier(*asked, tmp_path / "plain.png")[0] == 0
    assert atelier(*asked, tmp_path / "styled.png", "--lora", tmp_path / "style")[0] == 0
    assert not np.array_equal(levels(tmp_path / "plain.png"), levels(tmp_path / "styled.png"))
    assert text_of(tmp_path / "styled.png")["loras"] == str(tmp_path / "style")
    assert atelier(*asked, tmp_path / "half.png", "--lora", f"{style}:0.5")[0] == 0
    assert not np.array_equal(levels(tmp_path / "half.png"), levels(tmp_path / "styled.png"))
    text = text_of(tmp_path / "half.png")
    assert (text["loras"], len(text["loras_sha256"])) == (f"{style}:0.5", 64)
    code, _, lines = atelier(*asked, tmp_path / "none.png", "--lora", tmp_path / "nothing")
    assert code == 1
    assert len([line for line in lines if line.startswith("atelier: ")]) == 1
