from __future__ import annotations

import math

import torch

from training.masking import draw_dropped, draw_masks, drop_prompts


def test_mask_ratios_follow_the_closed_form() -> None:
    """For r = cos(pi/2 u), P(r <= x) = (2/pi) asin(x) and the mean is 2/pi."""
    mask_BHW, ratio_B = draw_masks(20_000, 16, 16, seed=1, step=0)
    assert abs(float(ratio_B.mean()) - 2 / math.pi) < 0.005
    for x in (0.1, 0.3, 0.5, 0.7, 0.9):
        share = float((ratio_B <= x).float().mean())
        assert abs(share - 2 / math.pi * math.asin(x)) < 0.01
    assert torch.equal(mask_BHW.flatten(1).float().mean(1), ratio_B)


def test_every_sample_has_a_masked_token_and_every_place_is_masked_alike() -> None:
    mask_BHW, _ = draw_masks(20_000, 4, 4, seed=2, step=3)
    assert bool(mask_BHW.flatten(1).any(dim=1).all())
    by_place_HW = mask_BHW.float().mean(dim=0)
    assert float((by_place_HW - by_place_HW.mean()).abs().max()) < 0.015


def test_masks_depend_on_seed_and_step_alone() -> None:
    first, _ = draw_masks(8, 4, 4, seed=1, step=5)
    again, _ = draw_masks(8, 4, 4, seed=1, step=5)
    assert torch.equal(first, again)
    assert not torch.equal(first, draw_masks(8, 4, 4, seed=1, step=6)[0])
    assert not torch.equal(first, draw_masks(8, 4, 4, seed=2, step=5)[0])


def test_dropout_probability_is_that_of_dropping() -> None:
    dropped_B = draw_dropped(20_000, 0.1, seed=0, step=0)
    assert abs(float(dropped_B.float().mean()) - 0.1) < 0.01
    prompts = drop_prompts([f"prompt {i}" for i in range(20_000)], dropped_B)
    num_empty = sum(prompt == "" for prompt in prompts)
    assert num_empty == int(dropped_B.sum())
    assert all(prompt == f"prompt {i}" for i, prompt in enumerate(prompts) if prompt)


def test_dropout_of_zero_keeps_all_and_of_one_drops_all() -> None:
    assert not bool(draw_dropped(1000, 0.0, seed=0, step=0).any())
    assert bool(draw_dropped(1000, 1.0, seed=0, step=0).all())
