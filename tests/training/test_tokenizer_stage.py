from __future__ import annotations

from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from training.config import TokenizerConfig, TokenizerTrainingConfig
from training.images import Pixels
from training.tokenizer_stage import (
    code_statistics,
    context_share,
    kmeans,
    move_codes,
    rearranged,
    reconstruction_error,
    run_step,
    start_tokenizer,
    tokenizer_batch,
    train_bpe,
)


def _painted(num_images: int, size_px: int = 48) -> list[Pixels]:
    """Squares and discs of plain colours."""
    rng = np.random.default_rng(0)
    images = []
    for _ in range(num_images):
        back, front = (tuple(255 * int(c) for c in rng.integers(0, 2, 3)) for _ in range(2))
        image = Image.new("RGB", (size_px, size_px + 8), back)
        left, top = rng.integers(0, size_px // 2, 2)
        draw = ImageDraw.Draw(image)
        shape = draw.ellipse if rng.random() < 0.5 else draw.rectangle
        shape([int(left), int(top), int(left) + 18, int(top) + 18], fill=front)
        images.append(np.asarray(image))
    return images


def _config(steps: int, **training: Any) -> TokenizerConfig:
    settings: dict[str, Any] = {
        "resolutions_px": (16, 32),
        "batch_pixels": 8192,
        "warmup_steps": 5,
        **training,
    }
    return TokenizerConfig(
        dataset="toy",
        block_out_channels=(8, 16, 16),
        latent_channels=8,
        codebook_size=64,
        precision="fp32",
        training=TokenizerTrainingConfig(steps=steps, **settings),
    )


def test_it_learns_to_reconstruct_through_the_codebook() -> None:
    config = _config(120, edge_weight=0.25, learning_rate=5e-3, warmup_share=0.5)
    images = _painted(40)
    stage = start_tokenizer(config)
    results = [run_step(stage, partial(tokenizer_batch, images[:32], config)) for _ in range(120)]
    assert results[-1].code_share > 0.5
    held_out = tokenizer_batch(images[32:], config, 1)
    one_colour = float((held_out - held_out.mean()).abs().mean())
    assert reconstruction_error(stage.vq.eval(), held_out) < 0.6 * one_colour


def test_the_codebook_is_made_at_its_step_and_trained_from_then_on() -> None:
    config = _config(8, warmup_share=0.5)
    stage = start_tokenizer(config)
    batch_at = partial(tokenizer_batch, _painted(8), config)
    codes = []
    for _ in range(6):
        run_step(stage, batch_at)
        codes.append(stage.vq.quantize.embedding.weight.detach().clone())
    changed = [not torch.equal(a, b) for a, b in pairwise(codes)]
    assert changed == [False, False, False, True, True]


def test_the_same_seed_gives_the_same_tokenizer() -> None:
    config = _config(6)
    images = _painted(8)
    weights = []
    for _ in range(2):
        stage = start_tokenizer(config)
        for _ in range(6):
            run_step(stage, partial(tokenizer_batch, images, config))
        weights.append(stage.vq.state_dict())
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_patches_are_rearranged_as_said() -> None:
    images = torch.arange(2 * 3 * 4 * 6, dtype=torch.float32).view(2, 3, 4, 6)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0))
    moved = rearranged(images, order, 2)

    def patch(batch: torch.Tensor, number: int) -> torch.Tensor:
        image, row, column = number // 6, number % 6 // 3 * 2, number % 3 * 2
        return batch[image, :, row : row + 2, column : column + 2]

    for place, number in enumerate(order.tolist()):
        assert torch.equal(patch(moved, place), patch(images, number))
    assert torch.equal(rearranged(moved, order.argsort(), 2), images)


def test_only_an_encoder_that_looks_around_owes_something_to_the_context() -> None:
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(3, 3, 16, 8, generator=generator)
    order = torch.randperm(24, generator=generator)
    alone = torch.nn.Conv2d(3, 5, 4, stride=4)
    around = torch.nn.Conv2d(3, 5, 12, stride=4, padding=4)
    shares = [
        float(context_share(net(images), net(rearranged(images, order, 4)), order).detach())
        for net in (alone, around)
    ]
    assert shares[0] < 1e-10
    assert 0.5 < shares[1] < 3.0


def test_with_locality_a_patch_keeps_its_token_wherever_it_stands() -> None:
    images = _painted(32)
    kept = []
    for weight in (0.0, 1.0):
        config = _config(60, learning_rate=5e-3, warmup_share=0.5, locality_weight=weight)
        stage = start_tokenizer(config)
        for _ in range(60):
            run_step(stage, partial(tokenizer_batch, images, config))
        batch = tokenizer_batch(images, config, 1)
        order = torch.randperm(batch.numel() // 48, generator=torch.Generator().manual_seed(1))
        tokens = stage.vq.encode(batch)
        moved = stage.vq.encode(rearranged(batch, order, 4))
        kept.append(float((rearranged(tokens[:, None], order, 1)[:, 0] == moved).float().mean()))
    assert kept[1] > kept[0] + 0.2


def test_steps_take_turns_at_the_resolutions_and_never_enlarge() -> None:
    config = _config(6)
    images = [*_painted(3, 48), np.zeros((24, 24, 3), np.uint8)]
    small, large = tokenizer_batch(images, config, 0), tokenizer_batch(images, config, 1)
    assert small.shape == (32, 3, 16, 16)
    assert large.shape == (8, 3, 32, 32)
    assert not any(torch.equal(image, torch.zeros_like(image)) for image in large)
    assert 0.0 <= float(large.min()) <= float(large.max()) <= 1.0
    with pytest.raises(ValueError, match="at least 32 px"):
        tokenizer_batch(images[-1:], config, 1)


def test_kmeans_finds_separate_clusters() -> None:
    generator = torch.Generator().manual_seed(0)
    centres = torch.tensor([[0.0, 0.0], [10.0, 0.0], [0.0, 10.0]])
    latents = centres.repeat_interleave(50, 0) + 0.1 * torch.randn(150, 2, generator=generator)
    codes = kmeans(latents, 3, 20, seed=1)
    assert float(torch.cdist(centres, codes).min(dim=1).values.max()) < 0.1


def test_kmeans_with_fewer_latents_than_codes() -> None:
    codes = kmeans(torch.tensor([[0.0, 1.0], [2.0, 3.0]]), 5, 2, seed=0)
    assert codes.shape == (5, 2)
    assert bool(torch.isfinite(codes).all())


def test_code_statistics_count_and_sum() -> None:
    uses, sums = code_statistics(torch.tensor([[1.0], [2.0], [4.0]]), torch.tensor([2, 0, 2]), 3)
    assert uses.tolist() == [1, 0, 2]
    assert sums.tolist() == [[2], [0], [5]]


def test_codes_follow_their_latents_and_dead_ones_are_moved() -> None:
    stage = start_tokenizer(_config(100, codebook_decay=0.5, min_code_share=0.5))
    codes = torch.zeros(64, 8)
    codes[1:] = 100.0
    stage.vq.reset_codebook(codes)
    stage.code_uses_K, stage.code_sums_KC = torch.ones(64), codes.clone()
    latents = torch.ones(200, 8)
    stage.step = 1
    move_codes(stage, latents, torch.zeros(200, dtype=torch.int64))
    weight = stage.vq.quantize.embedding.weight
    torch.testing.assert_close(weight[0], torch.full((8,), 200 / 201))
    torch.testing.assert_close(weight[1], torch.full((8,), 100.0))
    stage.step = 5
    move_codes(stage, latents, torch.zeros(200, dtype=torch.int64))
    torch.testing.assert_close(weight[1], torch.ones(8))


def test_the_vocabulary_does_not_depend_on_the_order_of_captions() -> None:
    captions = ["a red square", "a red disc", "two blue discs and a red square"]
    config = _config(1)
    forward = train_bpe(captions, config)
    assert forward.vocab == train_bpe(captions[::-1], config).vocab
    assert len(forward.encode("a red square")) == 3
