from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch

from training.config import OptimizerConfig, StageConfig
from training.masked_stage import MaskedStage
from training.optim import clip_gradients, learning_rate_scale, set_learning_rate


@pytest.mark.parametrize(
    ("schedule", "step", "expected"),
    [
        ("constant", 10, 1.0),
        ("constant", 99, 1.0),
        ("linear", 10, 1.0),
        ("linear", 55, 0.5),
        ("linear", 100, 0.0),
        ("cosine", 10, 1.0),
        ("cosine", 55, 0.5),
        ("cosine", 32, 0.5 * (1 + math.cos(math.pi * 22 / 90))),
        ("cosine", 100, 0.0),
    ],
)
def test_schedules_after_the_warmup(schedule: str, step: int, expected: float) -> None:
    assert learning_rate_scale(step, 100, 10, schedule) == pytest.approx(expected)  # type: ignore[arg-type]  # parametrized literal


def test_the_warmup_rises_in_a_line_and_never_starts_at_zero() -> None:
    scales = [learning_rate_scale(step, 100, 4, "cosine") for step in range(4)]
    assert scales == [0.25, 0.5, 0.75, 1.0]
    assert learning_rate_scale(0, 100, 0, "cosine") == 1.0


def test_groups_hold_each_trained_parameter_once(
    new_stage: Callable[[StageConfig], MaskedStage], small_config: Callable[..., StageConfig]
) -> None:
    config = small_config(
        train_text_encoder=True,
        text_encoder_learning_rate=1e-5,
        optimizer=OptimizerConfig(learning_rate=1e-3, weight_decay=0.1),
    )
    stage = new_stage(config)
    rows = {
        name: (group["peak"], group["weight_decay"])
        for group in stage.optimizer.param_groups
        for name in group["names"]
    }
    trained = {f"transformer.{name}" for name, _ in stage.transformer.named_parameters()}
    trained |= {f"text_encoder.{name}" for name, _ in stage.text_encoder.named_parameters()}
    assert set(rows) == trained
    assert sum(len(group["names"]) for group in stage.optimizer.param_groups) == len(trained)
    assert rows["transformer.transformer_blocks.0.attn.to_q.weight"] == (1e-3, 0.1)
    assert rows["transformer.transformer_blocks.0.attn.to_q.bias"] == (1e-3, 0.0)
    assert rows["transformer.transformer_blocks.0.attn.norm_q.weight"] == (1e-3, 0.0)
    assert rows["transformer.embed.embeddings.weight"] == (1e-3, 0.0)
    assert rows["transformer.mlm_layer.conv2.weight"] == (1e-3, 0.1)
    assert rows["text_encoder.text_projection.weight"] == (1e-5, 0.1)
    assert rows["text_encoder.text_model.embeddings.token_embedding.weight"] == (1e-5, 0.0)
    set_learning_rate(stage.optimizer, 0.5)
    assert {group["lr"] for group in stage.optimizer.param_groups} == {5e-4, 5e-6}


def test_a_frozen_text_encoder_has_no_group(
    new_stage: Callable[[StageConfig], MaskedStage], small_config: Callable[..., StageConfig]
) -> None:
    stage = new_stage(small_config())
    names = [name for group in stage.optimizer.param_groups for name in group["names"]]
    assert names
    assert all(name.startswith("transformer.") for name in names)
    assert not any(parameter.requires_grad for parameter in stage.text_encoder.parameters())


def test_clipping_shortens_long_gradients_only() -> None:
    parameter = torch.nn.Parameter(torch.zeros(2))
    parameter.grad = torch.tensor([3.0, 4.0])
    assert float(clip_gradients([parameter], None)) == pytest.approx(5.0)
    assert parameter.grad.tolist() == [3.0, 4.0]
    assert float(clip_gradients([parameter], 1.0)) == pytest.approx(5.0)
    assert parameter.grad.norm().item() == pytest.approx(1.0, abs=1e-4)
