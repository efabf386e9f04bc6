"""One masked-token training step, as plain functions.

Shape suffixes: B samples, H token rows, W token columns, T text tokens, 5 micro-conditions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from infra.errors import UserError
from model import (
    CLIPTextEncoder,
    CLIPTokenizer,
    LoRA,
    LoRAConfig,
    MaskedImageTransformer,
    Merged,
    WeightAverage,
    masked_token_loss,
)
from training.config import AdaptersConfig, StageConfig
from training.data import Batch
from training.masking import draw_dropped, draw_masks, drop_prompts
from training.optim import (
    build_optimizer,
    clip_gradients,
    learning_rate_scale,
    parameter_groups,
    set_learning_rate,
    trained_parameters,
)
from training.order import Visit
from training.randomness import derive
from training.sharding import whole
from training.suspects import some_of

TRANSFORMER_PREFIX = "transformer."
TEXT_PREFIX = "text_encoder."
LORA_PREFIX = "lora."


class TrainingDiverged(UserError):
    """The loss or a gradient is not finite; the weights are still those of the step before."""


@dataclass
class MaskedStage:
    """Everything that a step reads and changes. ``step`` counts finished optimizer steps."""

    config: StageConfig
    transformer: MaskedImageTransformer
    text_encoder: CLIPTextEncoder
    tokenizer: CLIPTokenizer
    optimizer: torch.optim.AdamW
    ema: WeightAverage | None
    lora: LoRA | None = None
    step: int = 0


@dataclass(frozen=True)
class StepInputs:
    """A worker's part of a step, ready for the networks.

    ``masked_N`` says where the masked tokens lie in ``mask_BHW.flatten()``, and ``row_starts``
    (B + 1) which of them are whose: a GPU would have to be waited for to count them.
    """

    tokens_BHW: Tensor
    mask_BHW: Tensor
    masked_N: Tensor
    row_starts: list[int]
    mask_ratio_B: Tensor
    input_ids_BT: Tensor
    micro_conditions_B5: Tensor
    num_masked_globally: int
    sample_ids: list[str]
    visit: Visit
    number: int

    def to(self, device: torch.device | str) -> StepInputs:
        """The same on ``device``."""
        return replace(
            self,
            tokens_BHW=self.tokens_BHW.to(device),
            mask_BHW=self.mask_BHW.to(device),
            masked_N=self.masked_N.to(device),
            mask_ratio_B=self.mask_ratio_B.to(device),
            input_ids_BT=self.input_ids_BT.to(device),
            micro_conditions_B5=self.micro_conditions_B5.to(device),
        )


@dataclass(frozen=True)
class StepResult:
    """``loss`` in nats per masked token; ``grad_norm`` before clipping."""

    loss: float
    grad_norm: float
    learning_rate: float


def start_stage(
    config: StageConfig,
    transformer: MaskedImageTransformer,
    text_encoder: CLIPTextEncoder,
    tokenizer: CLIPTokenizer,
) -> MaskedStage:
    """Put the networks into training form and give them an optimizer."""
    transformer.train().requires_grad_(True)
    transformer.gradient_checkpointing = config.gradient_checkpointing
    text_encoder.train(config.train_text_encoder).requires_grad_(config.train_text_encoder)
    lora = None if config.lora is None else start_adapters(transformer, config.lora, config.seed)
    rate, decay = config.optimizer.learning_rate, config.optimizer.weight_decay
    groups = parameter_groups(transformer, TRANSFORMER_PREFIX, rate, decay)
    if lora is not None:
        groups += parameter_groups(lora, LORA_PREFIX, rate, decay)
    groups += parameter_groups(text_encoder, TEXT_PREFIX, config.text_encoder_learning_rate, decay)
    optimizer = build_optimizer(groups, config.optimizer)
    ema = None
    if config.ema_decay is not None:
        ema = WeightAverage(dict(named_trained(optimizer)), config.ema_decay)
    return MaskedStage(config, transformer, text_encoder, tokenizer, optimizer, ema, lora)


def start_adapters(transformer: MaskedImageTransformer, config: AdaptersConfig, seed: int) -> LoRA:
    """Adapters that add nothing yet, on a transformer that no longer learns; the same for the same
    seed. Raises ``ModelError`` when no layer is called as ``config.targets`` says."""
    chosen = {} if config.targets is None else {"targets": config.targets}
    how = LoRAConfig(rank=config.rank, alpha=config.alpha, dropout=config.dropout, **chosen)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive(seed, "adapters"))
        return LoRA.start({"transformer": transformer}, how)


def merge_adapters(lora: LoRA) -> None:
    """Put the adapters into the transformer's weights (for export only)."""
    Merged([lora])


def named_trained(optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, nn.Parameter]]:
    """(name, parameter) of everything the optimizer changes."""
    for group in optimizer.param_groups:
        yield from zip(group["names"], group["params"], strict=True)


def step_inputs(
    batch: Batch, config: StageConfig, tokenizer: CLIPTokenizer, number: int, rows: slice
) -> StepInputs:
    """Draw masks and dropped prompts; ``batch`` holds ``rows`` of global batch ``number``."""
    height, width = batch.tokens_BHW.shape[1:]
    size = config.global_batch_size
    mask_BHW, ratio_B = draw_masks(size, height, width, config.seed, number)
    dropped_B = draw_dropped(size, config.prompt_dropout_prob, config.seed, number)
    prompts = drop_prompts(batch.captions, dropped_B[rows])
    ours_BHW = mask_BHW[rows]
    return StepInputs(
        tokens_BHW=batch.tokens_BHW,
        mask_BHW=ours_BHW,
        masked_N=ours_BHW.flatten().nonzero()[:, 0],
        row_starts=[0, *ours_BHW.sum(dim=(1, 2)).cumsum(0).tolist()],
        mask_ratio_B=ratio_B[rows],
        input_ids_BT=tokenizer(prompts, config.text_tokens),
        micro_conditions_B5=batch.micro_conditions_B5,
        num_masked_globally=int(mask_BHW.sum()),
        sample_ids=batch.sample_ids,
        visit=batch.visit,
        number=number,
    )


def loss_of_rows(stage: MaskedStage, inputs: StepInputs, rows: slice) -> Tensor:
    """Mean loss over the masked tokens of these rows of ``inputs`` (0-d float32)."""
    config = stage.config
    device = inputs.tokens_BHW.device
    first, last, _ = rows.indices(len(inputs.tokens_BHW))
    ours = slice(inputs.row_starts[first], inputs.row_starts[last])
    if config.lora is not None and config.lora.dropout:  # torch draws it, wherever it stands
        sample = int(inputs.visit.indices[first])
        torch.manual_seed(derive(config.seed, "adapters' dropout", inputs.number, sample))
    with torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bf16"):
        with torch.set_grad_enabled(config.train_text_encoder and torch.is_grad_enabled()):
            text = stage.text_encoder(inputs.input_ids_BT[rows])
        return masked_token_loss(
            stage.transformer,
            inputs.tokens_BHW[rows],
            inputs.mask_BHW[rows],
            text.hidden_BTD,
            text.pooled_BP,
            inputs.micro_conditions_B5[rows],
            inputs.mask_ratio_B[rows],
            inputs.masked_N[ours] - first * inputs.mask_BHW[0].numel(),
        )


def _backward(loss: Tensor) -> None:
    loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped


def backward(
    stage: MaskedStage,
    inputs: StepInputs,
    world_size: int = 1,
    run_backward: Callable[[Tensor], None] = _backward,
    without_sync: Callable[[], AbstractContextManager[object]] = nullcontext,
) -> Tensor:
    """Add this worker's gradients, microbatch by microbatch; returns its part of the loss.

    Every masked token of the global batch weighs the same, however samples are split over workers
    and microbatches: the mean of the workers' returned values (and of their gradients) is the mean
    over all masked tokens. ``without_sync`` holds back communication before the last microbatch.
    """
    num_rows = len(inputs.tokens_BHW)
    size = stage.config.max_microbatch_size or num_rows
    starts = range(0, num_rows, size)
    total = torch.zeros((), device=inputs.tokens_BHW.device)
    for start in starts:
        rows = slice(start, min(start + size, num_rows))
        num_masked = inputs.row_starts[rows.stop] - inputs.row_starts[start]
        weight = num_masked * world_size / inputs.num_masked_globally
        with nullcontext() if start == starts[-1] else without_sync():
            loss = loss_of_rows(stage, inputs, rows) * weight
            run_backward(loss)
        total += loss.detach()
    return total


def gradient_norm(stage: MaskedStage) -> Tensor:
    """The length of all gradients (0-d), which are shortened to ``max_grad_norm``."""
    limit = stage.config.optimizer.max_grad_norm
    return whole(clip_gradients(trained_parameters(stage.optimizer), limit))


def apply_update(stage: MaskedStage, loss: float, grad_norm: float) -> StepResult:
    """Step and average, with gradients that ``gradient_norm`` has shortened."""
    config = stage.config
    scale = learning_rate_scale(
        stage.step, config.steps, config.optimizer.warmup_steps, config.optimizer.schedule
    )
    set_learning_rate(stage.optimizer, scale)
    stage.optimizer.step()
    stage.optimizer.zero_grad(set_to_none=True)
    stage.step += 1
    if stage.ema is not None:
        stage.ema.update(stage.step)
    return StepResult(loss, grad_norm, config.optimizer.learning_rate * scale)


def diverged(step: int, loss: float, grad_norm: float, sample_ids: list[str]) -> TrainingDiverged:
    """The error for a step that cannot be taken, naming its first samples."""
    return TrainingDiverged(
        f"step {step} has loss {loss} and gradient norm {grad_norm}; the last "
        f"finite weights are kept; lower optimizer.learning_rate, or look at the samples "
        f"{some_of(sample_ids)}"
    )


def train_step(stage: MaskedStage, batch: Batch, device: torch.device | str = "cpu") -> StepResult:
    """One optimizer step of a single worker, on a whole global batch."""
    inputs = step_inputs(batch, stage.config, stage.tokenizer, stage.step, slice(None))
    loss = backward(stage, inputs.to(device)).item()
    norm = gradient_norm(stage).item()
    if not (math.isfinite(loss) and math.isfinite(norm)):
        raise diverged(stage.step, loss, norm, batch.sample_ids)
    return apply_update(stage, loss, norm)


def use_averaged_weights(stage: MaskedStage) -> None:
    """Replace the trained weights by their average, if one is kept (for export only)."""
    if stage.ema is not None:
        stage.ema.copy_to_weights()
