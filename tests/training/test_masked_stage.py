from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from model import CLIPTokenizer
from training.config import OptimizerConfig, StageConfig
from training.data import Batch, TokenDataset, TokenShard, in_memory
from training.masked_stage import (
    MaskedStage,
    StepInputs,
    TrainingDiverged,
    backward,
    gradient_norm,
    step_inputs,
    train_step,
    use_averaged_weights,
)
from training.order import rank_slice

NewStage = Callable[[StageConfig], MaskedStage]
SmallConfig = Callable[..., StageConfig]
NewShard = Callable[..., TokenShard]


def _dataset(config: StageConfig, token_shard: NewShard) -> TokenDataset:
    return in_memory([token_shard(5, 0), token_shard(6, 1), token_shard(4, 2)], config)


def _inputs(batch: Batch, stage: MaskedStage, rows: slice = slice(None)) -> StepInputs:
    return step_inputs(batch, stage.config, stage.tokenizer, stage.step, rows)


def _gradients(stage: MaskedStage) -> list[torch.Tensor]:
    return [
        parameter.grad.clone()
        for parameter in stage.transformer.parameters()
        if parameter.grad is not None
    ]


def test_the_first_loss_is_near_that_of_a_uniform_guess(
    new_stage: NewStage, small_config: SmallConfig, token_shard: NewShard
) -> None:
    config = small_config()
    result = train_step(new_stage(config), _dataset(config, token_shard).batch_at(0))
    assert math.log(32) - 0.1 < result.loss < math.log(32) + 0.7
    assert result.learning_rate == pytest.approx(5e-4)
    assert result.grad_norm > 0


def test_training_learns_one_sample_by_heart(
    new_stage: NewStage, small_config: SmallConfig, token_shard: NewShard
) -> None:
    optimizer = OptimizerConfig(learning_rate=1e-2)
    config = small_config(steps=80, global_batch_size=4, optimizer=optimizer)
    dataset = in_memory([token_shard(1)], config)
    stage = new_stage(config)
    losses = [train_step(stage, dataset.batch_at(step)).loss for step in range(80)]
    assert sum(losses[-10:]) / 10 < 0.5 * losses[0]


def test_workers_and_microbatches_change_neither_loss_nor_gradients(
    new_stage: NewStage, small_config: SmallConfig, token_shard: NewShard
) -> None:
    alone_config = small_config(prompt_dropout_prob=0.5)
    dataset = _dataset(alone_config, token_shard)

    def loss_and_gradients(
        world_size: int, microbatch: int | None
    ) -> tuple[float, list[torch.Tensor]]:
        config = small_config(prompt_dropout_prob=0.5, max_microbatch_size=microbatch)
        stage = new_stage(config)
        torch.nn.init.normal_(stage.transformer.mlm_layer.conv2.weight, generator=_generator())
        losses = []
        for rank in range(world_size):
            rows = rank_slice(config.global_batch_size, rank, world_size)
            inputs = _inputs(dataset.batch_at(0, rows), stage, rows)
            losses.append(float(backward(stage, inputs, world_size)))
        return sum(losses) / world_size, [g / world_size for g in _gradients(stage)]

    loss, gradients = loss_and_gradients(1, None)
    for world_size, microbatch in ((2, None), (3, None), (1, 1), (1, 4), (4, 1)):
        other_loss, others = loss_and_gradients(world_size, microbatch)
        assert other_loss == pytest.approx(loss, rel=1e-5)
        torch.testing.assert_close(others, gradients, rtol=1e-4, atol=1e-6)


class Waits(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch has no types here
    """Notes operations whose result a processor must know before it can give out more work."""

    KINDS = ("nonzero", "_local_scalar_dense", "masked_select", "unique", "is_nonzero")

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # nor here
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        by_mask = name in ("index", "index_put", "index_put_") and any(
            each is not None and each.dtype == torch.bool for each in args[1]
        )
        if name in self.KINDS or by_mask:
            self.found.append(name)
        return func(*args, **(kwargs or {}))


def test_a_gpu_is_not_waited_for_within_a_step(
    new_stage: NewStage, small_config: SmallConfig, token_shard: NewShard
) -> None:
    config = small_config(max_microbatch_size=2, gradient_checkpointing=True)
    stage = new_stage(config)
    inputs = _inputs(_dataset(config, token_shard).batch_at(0), stage)
    with Waits() as waits:
        loss = backward(stage, inputs)
        gradient_norm(stage)
        assert waits.found == []
        loss.item()
    assert waits.found == ["_local_scalar_dense"]


@pytest.mark.parametrize("recomputes", [False, True])
def test_blocks_are_recomputed_when_asked(
    new_stage: NewStage, small_config: SmallConfig, token_shard: NewShard, recomputes: bool
) -> None:
    config = small_config(gradient_checkpointing=recomputes)
    stage = new_stage(config)
    calls = []
    blocks = [
        *stage.transformer.transformer_blocks, *stage.transformer.single_transformer_blocks
    ]  # fmt: skip
    for block in blocks:
        block.register_forward_pre_hook(lambda *_: calls.append(1))
    backward(stage, _inputs(_dataset(config, token_shard).batch_at(0), stage))
    assert len(calls) == len(blocks) * (2 if recomputes else 1)


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def test_a_dropped_prompt_is_the_empty_prompt(
    new_stage: NewStage,
    small_config: SmallConfig,
    token_shard: NewShard,
    tokenizer: CLIPTokenizer,
) -> None:
    empty_T = tokenizer([""], 12)[0]
    for probability, num_empty in ((0.0, 0), (1.0, 6)):
        config = small_config(prompt_dropout_prob=probability)
        batch = _dataset(config, token_shard).batch_at(0)
        inputs = _inputs(batch, new_stage(config))
        empty_rows = (inputs.input_ids_BT == empty_T).all(dim=1)
        assert int(empty_rows.sum()) == num_empty


def test_a_frozen_text_encoder_stays_and_a_trained_one_moves(
    new_stage: NewStage, small_config: SmallConfig, token_shard: NewShard
) -> None:
    for is_trained in (False, True):
        config = small_config(train_text_encoder=is_trained, prompt_dropout_prob=0.0)
        stage = new_stage(config)
        before = [p.detach().clone() for p in stage.text_encoder.parameters()]
        dataset = _dataset(config, token_shard)
        for step in range(3):
            train_step(stage, dataset.batch_at(step))
        after = stage.text_encoder.parameters()
        moved = [not torch.equal(a, b) for a, b in zip(before, after, strict=True)]
        assert any(moved) == is_trained


def test_a_loss_that_is_not_finite_stops_before_the_weights_change(
    new_stage: NewStage, small_config: SmallConfig, token_shard: NewShard
) -> None:
    config = small_config()
    stage = new_stage(config)
    batch = _dataset(config, token_shard).batch_at(0)
    before = [p.detach().clone() for p in stage.transformer.parameters()]
    for bad in (float("nan"), float("inf")):
        batch.micro_conditions_B5[0, 0] = bad
        with pytest.raises(TrainingDiverged) as caught:
            train_step(stage, batch)
        assert all(name in str(caught.value) for name in batch.sample_ids)
        assert "step 0" in str(caught.value)
    assert stage.step == 0
    after = stage.transformer.parameters()
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_the_average_follows_and_replaces_the_weights(
    new_stage: NewStage, small_config: SmallConfig, token_shard: NewShard
) -> None:
    config = small_config(ema_decay=0.5)
    stage = new_stage(config)
    dataset = _dataset(config, token_shard)
    name = "transformer.mlm_layer.conv2.weight"
    parameter = stage.transformer.mlm_layer.conv2.weight
    expected = parameter.detach().clone()
    for step in range(4):
        train_step(stage, dataset.batch_at(step))
        decay = min(0.5, (2 + step) / (11 + step))
        expected = decay * expected + (1 - decay) * parameter.detach()
    assert stage.ema is not None
    torch.testing.assert_close(stage.ema[name], expected)
    assert not torch.equal(parameter, expected)
    use_averaged_weights(stage)
    torch.testing.assert_close(parameter.detach(), expected)


def test_bf16_trains_float32_weights(
    new_stage: NewStage, small_config: SmallConfig, token_shard: NewShard
) -> None:
    config = small_config(precision="bf16")
    stage = new_stage(config)
    result = train_step(stage, _dataset(config, token_shard).batch_at(0))
    exact = train_step(new_stage(small_config()), _dataset(config, token_shard).batch_at(0))
    assert result.loss == pytest.approx(exact.loss, rel=1e-2)
    assert {p.dtype for p in stage.transformer.parameters()} == {torch.float32}
