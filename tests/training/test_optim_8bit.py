"""AdamW with moments of a byte each, against AdamW's own."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from training import optim_8bit
from training.checkpoint import optimizer_tensors, restore_optimizer
from training.checkpoint_store import CheckpointDamaged
from training.config import OptimizerConfig, OptimizerName, StageConfig
from training.data import TokenShard, in_memory
from training.masked_stage import MaskedStage, train_step
from training.optim import build_optimizer, parameter_groups
from training.optim_8bit import (
    BLOCK,
    AdamW8bit,
    decode_means,
    decode_squares,
    encode_means,
    encode_squares,
)

SMALL = OptimizerConfig(name="adamw_8bit", learning_rate=3e-3, weight_decay=0.1)


def _values(seed: int, spread: float = 3.0) -> Tensor:
    """Values over many orders of magnitude, as moments are."""
    draws = torch.Generator().manual_seed(seed)
    values = torch.randn(8, BLOCK, generator=draws)
    return values * torch.exp(spread * torch.randn(8, BLOCK, generator=draws))


@pytest.mark.parametrize("kind", ["means", "squares"])
def test_a_code_is_the_next_level_above_or_below_and_right_on_average(kind: str) -> None:
    values_NK = _values(1) if kind == "means" else _values(1).square()
    encode, decode = {
        "means": (encode_means, decode_means),
        "squares": (encode_squares, decode_squares),
    }[kind]
    draws = torch.Generator().manual_seed(2)
    found = torch.stack([decode(*encode(values_NK, draws, values_NK.shape)) for _ in range(2000)])
    assert all(len(set(each)) <= 2 for each in found[:, 0, :64].T.tolist())
    largest_N1 = values_NK.abs().amax(1, keepdim=True)
    error = (found.mean(0) - values_NK).abs() / largest_N1
    assert error.max() < 1.5e-3  # levels lie up to 1.6 % apart
    assert torch.equal(found[0].abs().amax(1, keepdim=True), largest_N1)


def test_a_small_second_moment_is_never_rounded_to_nothing() -> None:
    values_NK = torch.full((1, BLOCK), 1e-30)
    values_NK[0, 0] = 1.0
    draws = torch.Generator().manual_seed(0)
    assert decode_squares(*encode_squares(values_NK, draws, values_NK.shape)).min() > 1e-10
    zeros = torch.zeros(1, BLOCK)
    for encode, decode in ((encode_means, decode_means), (encode_squares, decode_squares)):
        assert not decode(*encode(zeros, draws, zeros.shape)).any()


def _learn(name: OptimizerName, num_steps: int = 200) -> tuple[float, int]:
    """(loss, bytes of moments) after fitting a fixed map with this optimizer."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 96), nn.Tanh(), nn.Linear(96, 64))
    inputs = torch.randn(256, 64)
    targets = torch.tanh(inputs @ torch.randn(64, 64) / 8)
    config = OptimizerConfig(name=name, learning_rate=3e-3)
    optimizer = build_optimizer(parameter_groups(net, "", 3e-3, 0.01), config)
    loss = torch.zeros(())
    for _ in range(num_steps):
        optimizer.zero_grad()
        loss = (net(inputs) - targets).square().mean()
        loss.backward()
        optimizer.step()
    moments = optimizer_tensors(optimizer).values()
    return loss.item(), sum(each.nbytes for each in moments if each.ndim)


def test_it_learns_as_well_in_a_quarter_of_the_memory() -> None:
    loss, num_bytes = _learn("adamw")
    small_loss, small_bytes = _learn("adamw_8bit")
    assert loss < 0.01
    assert small_loss < 1.1 * loss
    assert small_bytes < 0.28 * num_bytes  # rows of 64 and 96, a scale each


def test_a_stage_that_stops_and_goes_on_ends_where_an_unbroken_one_does(
    new_stage: Callable[[StageConfig], MaskedStage],
    small_config: Callable[..., StageConfig],
    carried_over: Callable[[StageConfig], dict[str, Tensor]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(optim_8bit, "MIN_VALUES", 100)  # the network is smaller than a block
    config = small_config(optimizer=SMALL, train_text_encoder=True)
    assert isinstance(new_stage(config).optimizer, AdamW8bit)
    kinds = {name.rpartition("/")[2] for name in carried_over(config)}
    assert kinds >= {"mean_codes", "square_scales", "exp_avg"}


def test_scales_that_do_not_fit_are_refused(
    new_stage: Callable[[StageConfig], MaskedStage],
    small_config: Callable[..., StageConfig],
    token_shard: Callable[..., TokenShard],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(optim_8bit, "MIN_VALUES", 100)
    config = small_config(optimizer=SMALL)
    stage = new_stage(config)
    train_step(stage, in_memory([token_shard(12)], config).batch_at(0))
    carried = optimizer_tensors(stage.optimizer)
    name = next(name for name in carried if name.endswith("/mean_scales"))
    with pytest.raises(CheckpointDamaged, match="no fitting moments"):
        restore_optimizer(stage.optimizer, {**carried, name: torch.zeros(3)})
