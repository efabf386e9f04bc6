"""The mask schedule's closed forms, and that training and sampling mean the same by a timestep."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from model.errors import ModelError
from model.schedule import (
    MASK_RATIO,
    PUBLISHED_NUM_STEPS,
    STEP_INDEX,
    cosine_schedule,
    linear_schedule,
    mask_schedule,
    sample_mask,
    training_timestep,
)

PROGRESS = st.floats(0.0, 1.0)


@given(PROGRESS)
def test_cosine_is_the_quarter_wave(progress: float) -> None:
    ratio = cosine_schedule(progress)
    assert 0.0 <= ratio <= 1.0
    assert math.isclose(ratio**2 + cosine_schedule(1 - progress) ** 2, 1.0, abs_tol=1e-12)


@given(PROGRESS)
def test_linear_falls_with_progress(progress: float) -> None:
    assert math.isclose(linear_schedule(progress) + progress, 1.0, abs_tol=1e-12)


@given(PROGRESS)
def test_tensors_and_numbers_agree(progress: float) -> None:
    tensor = torch.tensor(progress, dtype=torch.float64)
    assert math.isclose(cosine_schedule(tensor).item(), cosine_schedule(progress), abs_tol=1e-12)
    assert math.isclose(linear_schedule(tensor).item(), linear_schedule(progress), abs_tol=1e-12)


@pytest.mark.parametrize("name", ["cosine", "linear"])
def test_from_all_masked_to_none(name: str) -> None:
    ratios = mask_schedule(name)(torch.linspace(0, 1, 11))
    assert ratios[0] == 1.0
    assert ratios[-1] < 1e-6
    assert bool((ratios.diff() < 0).all())


def test_unknown_schedule_is_refused() -> None:
    with pytest.raises(ModelError, match="'quadratic': expected 'cosine' or 'linear'"):
        mask_schedule("quadratic")


@given(height=st.integers(1, 9), width=st.integers(1, 9), seed=st.integers(0, 1000))
def test_mask_has_the_ratio_it_says(height: int, width: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    mask, ratio = sample_mask(3, height, width, generator=generator)
    assert mask.shape == (3, height, width)
    counts = mask.flatten(1).sum(dim=1)
    assert bool((counts >= 1).all())
    assert torch.equal(counts / (height * width), ratio)


def test_mean_mask_ratio_is_two_over_pi() -> None:
    mask, ratio = sample_mask(20_000, 4, 4, generator=torch.Generator().manual_seed(0))
    assert abs(float(ratio.mean()) - 2 / math.pi) < 0.01
    places = mask.float().mean(dim=0)
    assert float(places.max() - places.min()) < 0.03


def test_mask_ratio_convention_passes_the_ratio() -> None:
    ratio = torch.tensor([0.0, 0.25, 1.0])
    assert torch.equal(training_timestep(ratio, MASK_RATIO), ratio)


def test_step_index_convention_gives_the_published_samplers_index() -> None:
    steps = torch.arange(PUBLISHED_NUM_STEPS)
    ratio_before_step = cosine_schedule(steps.double() / PUBLISHED_NUM_STEPS)
    index = training_timestep(ratio_before_step, STEP_INDEX)
    assert torch.allclose(index, PUBLISHED_NUM_STEPS - 1 - steps.float(), atol=0.02)
