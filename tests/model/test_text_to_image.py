"""Painting: prompts of every kind, sizes, seeds, editing, and folders that come back the same."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from model.errors import ModelError
from model.folder import PainterDefaults
from model.pixels import to_pixels
from model.text_to_image import TextToImage
from model.vq import VQConfig, VQTokenizer

FAST = 3


def picture(width: int = 24, height: int = 24, seed: int = 0) -> Image.Image:
    levels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(levels)


def box_mask(width: int, height: int, box: tuple[int, int, int, int]) -> Image.Image:
    mask = Image.new("L", (width, height), 0)
    mask.paste(255, box)
    return mask


def pixels(image: Image.Image) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    return np.asarray(image)


@pytest.mark.parametrize(("height", "width"), [(24, 24), (16, 40), (40, 8)])
def test_any_size_the_parts_divide(painter: TextToImage, height: int, width: int) -> None:
    (image,) = painter.generate(["a red circle"], height, width, steps=FAST)
    assert (image.width, image.height, image.mode) == (width, height, "RGB")


def test_own_resolution_is_the_default(painter: TextToImage) -> None:
    (image,) = painter.generate(["a red circle"], steps=FAST)
    assert image.size == (24, 24)


@pytest.mark.parametrize("size", [(0, 24), (-4, 24), (24, 26), (2, 24), (8196, 24), (24, 1 << 40)])
def test_other_sizes_are_refused(painter: TextToImage, size: tuple[int, int]) -> None:
    with pytest.raises(ModelError, match="expected multiples of 4 px"):
        painter.generate(["a"], *size, steps=FAST)


def test_the_null_text_is_encoded_once(painter: TextToImage) -> None:
    rows: list[int] = []
    hook = painter.text_encoder.register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
    painter.generate(["a", "b", "c", "d", "e"], steps=FAST, guidance_scale=3.0, batch_size=2)
    hook.remove()
    assert sorted(rows) == [1, 1, 2, 2]  # the last prompt is alone, as is the null text
    assert rows.index(1) < 2


@pytest.mark.parametrize(
    "prompt",
    ["", " ", "red " * 2500, "\U0001f98a\U0001f525", "مرحبا", "\ud83d", "<|endoftext|>", "\x00"],
)
def test_prompts_of_every_kind(painter: TextToImage, prompt: str) -> None:
    assert len(painter.generate([prompt], steps=2, negative_prompt=prompt)) == 1


def test_seeds_make_the_picture_whatever_the_batch(painter: TextToImage) -> None:
    prompts = ["a red circle", "a blue square", "a star"]
    together = painter.generate_tokens(prompts, steps=FAST, seed=7)
    one_by_one = painter.generate_tokens(prompts, steps=FAST, seed=7, batch_size=1)
    assert torch.equal(together, one_by_one)
    (alone,) = painter.generate_tokens([prompts[1]], steps=FAST, seeds=[8])
    assert torch.equal(together[1], alone)
    (other,) = painter.generate_tokens([prompts[1]], steps=FAST, seeds=[9])
    assert not torch.equal(together[1], other)


def test_prompt_and_conditions_reach_the_picture(painter: TextToImage) -> None:
    plain = painter.generate_tokens(["a red circle"], steps=FAST)
    assert not torch.equal(plain, painter.generate_tokens(["two blue squares"], steps=FAST))
    for changed in (
        painter.generate_tokens(["a red circle"], steps=FAST, negative_prompt="a star"),
        painter.generate_tokens(["a red circle"], steps=FAST, guidance_scale=2.0),
        painter.generate_tokens(["a red circle"], steps=FAST, preference_score=60.0),
    ):
        assert not torch.equal(plain, changed)


def test_micro_conditions_are_width_height_crop_score(painter: TextToImage) -> None:
    row = painter.micro_conditions(2, height_px=16, width_px=40, score=5.5)
    assert row.tolist() == [[40.0, 16.0, 0.0, 0.0, 5.5]] * 2


def test_progress_counts_all_batches(painter: TextToImage) -> None:
    seen: list[tuple[int, int]] = []

    def report(step: int, steps: int, tokens: Tensor) -> None:
        seen.append((step, steps))

    painter.generate(["a", "b", "c"], steps=2, batch_size=2, progress=report)
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_wrong_requests_are_refused(painter: TextToImage) -> None:
    with pytest.raises(ModelError, match="2 seeds for 1 prompts"):
        painter.generate(["a"], seeds=[1, 2], steps=FAST)
    with pytest.raises(ModelError, match="a seed leaves the range"):
        painter.generate(["a"], seed=-1, steps=FAST)
    with pytest.raises(ModelError, match="there is no prompt"):
        painter.generate([], steps=FAST)
    with pytest.raises(ModelError, match="batch_size is 0"):
        painter.generate(["a"], batch_size=0, steps=FAST)


def test_inpainting_changes_the_masked_pixels_alone(painter: TextToImage) -> None:
    image, mask = picture(), box_mask(24, 24, (5, 6, 15, 17))
    (painted,) = painter.inpaint(["a red circle"], [image], [mask], steps=FAST)
    inside = pixels(mask) > 127
    assert np.array_equal(pixels(painted)[~inside], pixels(image)[~inside])
    assert not np.array_equal(pixels(painted)[inside], pixels(image)[inside])


def test_inpainting_with_an_empty_mask_is_the_image(painter: TextToImage) -> None:
    image = picture()
    (painted,) = painter.inpaint(["a"], [image], [Image.new("L", image.size)], steps=FAST)
    assert np.array_equal(pixels(painted), pixels(image))


def test_each_mask_has_its_own_schedule(painter: TextToImage) -> None:
    images = [picture(seed=1), picture(seed=2)]
    # Half of the second: of a few tokens a wrong schedule would leave the same number masked.
    masks = [box_mask(24, 24, (0, 0, 24, 24)), box_mask(24, 24, (0, 0, 12, 24))]
    together = painter.inpaint(["a", "b"], images, masks, steps=8, seed=3)
    (alone,) = painter.inpaint(["b"], images[1:], masks[1:], steps=8, seed=4)
    assert np.array_equal(pixels(together[1]), pixels(alone))


def test_outpainting_keeps_the_image(painter: TextToImage) -> None:
    image = picture(16, 12)
    (painted,) = painter.outpaint(["a"], [image], left=4, top=8, right=0, bottom=4, steps=FAST)
    assert painted.size == (20, 24)
    assert np.array_equal(pixels(painted)[8:20, 4:20], pixels(image))


def test_editing_strength(painter: TextToImage) -> None:
    image = picture()
    full = painter.edit(["a star"], [image], strength=1.0, steps=6, seed=2)
    fresh = painter.generate(["a star"], steps=6, seed=2)
    assert np.array_equal(pixels(full[0]), pixels(fresh[0]))  # nothing of the image is left
    kept = []
    original = painter.vq.encode(to_pixels([image]))
    for strength in (0.2, 0.6):
        (edited,) = painter.edit(["a star"], [image], strength=strength, steps=10)
        assert edited.size == image.size
        rebuilt = painter.decode(original)[0]
        kept.append(float((pixels(edited) == pixels(rebuilt)).mean()))
    assert kept[0] > kept[1]


def test_edits_that_cannot_work_are_refused(painter: TextToImage) -> None:
    with pytest.raises(ModelError, match="strength is 0"):
        painter.edit(["a"], [picture()], strength=0.0)
    with pytest.raises(ModelError, match="2 images for 1 prompts"):
        painter.edit(["a"], [picture(), picture()])
    with pytest.raises(ModelError, match="a mask has size"):
        painter.inpaint(["a"], [picture()], [Image.new("L", (4, 4))])
    with pytest.raises(ModelError, match="expected one size for all"):
        painter.edit(["a", "b"], [picture(), picture(16, 16)])
    with pytest.raises(ModelError, match="one of them above 0"):
        painter.outpaint(["a"], [picture()])


def test_round_trip_paints_the_same(painter: TextToImage, tmp_path: Path) -> None:
    painter.save_pretrained(tmp_path / "painter")
    loaded = TextToImage.from_pretrained(tmp_path / "painter")
    assert loaded.defaults == painter.defaults
    prompts = ["a red circle", ""]
    assert torch.equal(
        loaded.generate_tokens(prompts, steps=FAST), painter.generate_tokens(prompts, steps=FAST)
    )
    index = json.loads((tmp_path / "painter" / "model_index.json").read_text())
    assert index["transformer"] == ["transformer", "Transformer2DModel"]
    assert index["vqvae"] == ["diffusers", "VQModel"]


def test_half_precision_folder_paints(painter: TextToImage, tmp_path: Path) -> None:
    painter.save_pretrained(tmp_path / "painter")
    half = TextToImage.from_pretrained(tmp_path / "painter", dtype=torch.float16)
    assert half.vq.quant_conv.weight.dtype == torch.float32  # force_upcast
    assert half.transformer.context_embedder.weight.dtype == torch.float16
    assert len(half.generate(["a"], steps=FAST)) == 1


def test_published_index_without_our_keys(painter: TextToImage, tmp_path: Path) -> None:
    painter.save_pretrained(tmp_path / "painter")
    (tmp_path / "painter" / "model_index.json").write_text('{"_class_name": "Pipeline"}')
    loaded = TextToImage.from_pretrained(tmp_path / "painter")
    # 77 tokens are published; this text encoder has room for 16.
    negative = loaded.defaults.negative_prompt
    assert negative.startswith("worst quality, low quality")
    # Without compression it is a network for 512 px.
    assert loaded.defaults == PainterDefaults(16, resolution_px=512, negative_prompt=negative)
    by_itself = loaded.generate_tokens(["a star"], 24, 24, steps=FAST)
    given = loaded.generate_tokens(["a star"], 24, 24, steps=FAST, negative_prompt=negative)
    empty = loaded.generate_tokens(["a star"], 24, 24, steps=FAST, negative_prompt="")
    assert torch.equal(by_itself, given)
    assert not torch.equal(by_itself, empty)


def test_own_folders_keep_their_negative_prompt(painter: TextToImage, tmp_path: Path) -> None:
    for negative in ("", "blurry"):
        painter.defaults = replace(painter.defaults, negative_prompt=negative)
        painter.save_pretrained(tmp_path / "painter")
        loaded = TextToImage.from_pretrained(tmp_path / "painter")
        assert loaded.defaults.negative_prompt == negative


def test_scheduler_of_another_network_is_refused(painter: TextToImage, tmp_path: Path) -> None:
    painter.save_pretrained(tmp_path / "painter")
    config = {"mask_token_id": 8255, "masking_schedule": "cosine"}
    path = tmp_path / "painter" / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(config))
    with pytest.raises(ModelError, match="mask_token_id is 8255: expected 39"):
        TextToImage.from_pretrained(tmp_path / "painter")


def test_parts_that_do_not_fit_are_all_named(painter: TextToImage) -> None:
    vq = VQTokenizer(VQConfig.small((8, 8), 16, 4))
    with pytest.raises(ModelError, match="transformer codebook_size 32, vqvae 16"):
        TextToImage(painter.transformer, vq, painter.text_encoder, painter.tokenizer)
