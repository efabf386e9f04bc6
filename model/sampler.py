"""Unmasking: from masked tokens to an image's tokens in a few steps.

Shape suffixes: B images, H token rows, W token columns, L = H·W, N masked tokens of all images
(row-major), V codebook size, C channels, T text tokens, D text channels, P pooled channels, 5
micro-conditions.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from model.errors import ModelError
from model.schedule import MASK_RATIO, Schedule, cosine_schedule
from model.text import TextFeatures
from model.transformer import MaskedImageTransformer

# Called after each step with (steps done, steps in all, tokens_BHW with what is still masked).
Progress = Callable[[int, int, Tensor], None]

# Float32 probabilities of this many tokens exist at a time: 128 MB with 8192 codes.
_CHUNK_TOKENS = 4096
_TINY_PROB = 1e-20


@dataclass(frozen=True)
class SamplingOptions:
    """How to unmask. Guided logits are uncond + guidance_scale · (cond - uncond); 1 is off."""

    steps: int = 48
    guidance_scale: float = 9.0
    temperature: tuple[float, float] = (
        2.0,
        0.0,
    )  # noise on the confidences, first and last step; 0 is none
    schedule: Schedule = cosine_schedule
    autocast_dtype: torch.dtype | None = (
        None  # compute type of the network; None is that of its weights
    )

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ModelError(f"steps is {self.steps}: expected at least 1")
        if min(self.temperature) < 0:
            raise ModelError(f"temperature is {self.temperature}: expected values of 0 or more")

    @property
    def is_guided(self) -> bool:
        """Whether the unconditional half is needed."""
        return self.guidance_scale != 1.0


@dataclass(frozen=True)
class Condition:
    """What the images shall show. `null` is needed when guided; one row serves all images."""

    text: TextFeatures
    micro_conditions_B5: Tensor
    null: TextFeatures | None = None


def num_left_masked(
    num_start_B: Tensor, num_masked_B: Tensor, step: int, steps: int, schedule: Schedule
) -> Tensor:
    """How many tokens of each image stay masked after `step` (0 … steps-1).

    floor(tokens masked at the start · schedule(progress)), but at least one fewer than now and,
    before the last step, at least one; zero after the last.
    """
    if step == steps - 1:
        return torch.zeros_like(num_masked_B)
    progress = torch.tensor((step + 1) / steps, dtype=torch.float32, device=num_start_B.device)
    wanted_B = (num_start_B * schedule(progress)).floor().long()
    return torch.minimum(num_masked_B - 1, wanted_B).clamp(min=1)


def first_step_of(strength: float, steps: int) -> int:
    """The step to begin with so that `strength`, in (0, 1], of the steps (or one) are run."""
    if not 0 < strength <= 1:
        raise ModelError(f"strength is {strength}: expected more than 0 and at most 1")
    return steps - max(1, round(strength * steps))


def draw_tokens(logits_NV: Tensor, uniform_N: Tensor) -> tuple[Tensor, Tensor]:
    """A token from each row's softmax by the given uniform number, and its probability."""
    probs_NV = logits_NV.float().softmax(dim=-1)
    cumulative_NV = probs_NV.cumsum(dim=-1)
    threshold_N1 = uniform_N[:, None] * cumulative_NV[:, -1:]
    tokens_N1 = torch.searchsorted(cumulative_NV, threshold_N1, right=True).clamp(
        max=logits_NV.shape[-1] - 1
    )
    return tokens_N1[:, 0], probs_NV.gather(1, tokens_N1)[:, 0]


def remask(
    tokens_BHW: Tensor,
    mask_BHW: Tensor,
    prob_N: Tensor,
    noise_N: Tensor,
    num_left_B: Tensor,
    mask_token_id: int,
) -> Tensor:
    """Mask the least confident new tokens again; tokens outside mask_BHW never change.

    Confidence is log probability plus noise. Each image keeps num_left_B masks (fewer when
    confidences tie at the border, as published; none where num_left_B is 0).
    """
    confidence_BHW = torch.full(mask_BHW.shape, torch.inf, device=mask_BHW.device)
    confidence_BHW[mask_BHW] = prob_N.clamp(min=_TINY_PROB).log() + noise_N
    confidence_BL = confidence_BHW.flatten(1)
    border_B1 = num_left_B[:, None].clamp(max=confidence_BL.shape[1] - 1)
    cutoff_B1 = confidence_BL.sort(dim=1).values.gather(1, border_B1)
    again_BL = (confidence_BL < cutoff_B1) & (num_left_B[:, None] > 0)
    return tokens_BHW.masked_fill(again_BL.view_as(mask_BHW) & mask_BHW, mask_token_id)


class _Noise:
    """A CPU generator per image: its numbers depend neither on the batch nor on the device."""

    def __init__(self, seeds: Sequence[int], device: torch.device) -> None:
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        self.device = device

    def uniform(self, counts: Sequence[int]) -> Tensor:
        """`counts[b]` numbers in [0, 1) from each image b, one after another."""
        parts = [torch.rand(n, generator=g) for n, g in zip(counts, self.generators, strict=True)]
        return torch.cat(parts).to(self.device)

    def gumbel(self, counts: Sequence[int]) -> Tensor:
        """Standard Gumbel noise, laid out like `uniform`."""
        exponential = -self.uniform(counts).clamp(min=_TINY_PROB).log()
        return -exponential.clamp(min=_TINY_PROB).log()


@torch.no_grad()
def unmask(
    transformer: MaskedImageTransformer,
    tokens_BHW: Tensor,
    condition: Condition,
    seeds: Sequence[int],
    options: SamplingOptions,
    progress: Progress | None = None,
    first_step: int = 0,
) -> Tensor:
    """Fill every mask token of tokens_BHW; tokens that are not masked at the start are kept.

    Image b depends on seeds[b] and its own inputs only. Returns tokens_BHW without mask tokens.
    Steps before `first_step` are skipped: the share masked counts as the schedule's at that point.
    Raises ModelError when guidance is asked for without a null text.
    """
    if options.is_guided and condition.null is None:
        raise ModelError(
            "guidance needs a null text: give Condition.null or set guidance_scale to 1"
        )
    mask_token_id = transformer.config.mask_token_id
    inputs = _network_inputs(condition, len(tokens_BHW), options.is_guided)
    noise = _Noise(seeds, tokens_BHW.device)
    begun = options.schedule(torch.tensor(first_step / options.steps, device=tokens_BHW.device))
    num_start_B = (tokens_BHW == mask_token_id).flatten(1).sum(dim=1) / begun
    temperatures = torch.linspace(*options.temperature, options.steps).tolist()
    for step in range(first_step, options.steps):
        mask_BHW = tokens_BHW == mask_token_id
        num_masked_B = mask_BHW.flatten(1).sum(dim=1)
        counts = num_masked_B.tolist()
        if any(counts):
            timestep_B = _timestep(
                transformer, num_masked_B / mask_BHW[0].numel(), step, options.steps
            )
            drawn_N, prob_N = _predict(
                transformer,
                tokens_BHW,
                mask_BHW,
                inputs,
                timestep_B,
                noise.uniform(counts),
                options,
            )
            tokens_BHW = tokens_BHW.masked_scatter(mask_BHW, drawn_N)
            num_left_B = num_left_masked(
                num_start_B, num_masked_B, step, options.steps, options.schedule
            )
            tokens_BHW = remask(
                tokens_BHW,
                mask_BHW,
                prob_N,
                temperatures[step] * noise.gumbel(counts),
                num_left_B,
                mask_token_id,
            )
        if progress is not None:
            progress(step + 1 - first_step, options.steps - first_step, tokens_BHW)
    return tokens_BHW


def _network_inputs(
    condition: Condition, batch: int, is_guided: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Text states, pooled text, micro-conditions; when guided, null rows first, as one batch."""
    states_BTD, pooled_BP = condition.text
    micro_B5 = condition.micro_conditions_B5
    if not is_guided or condition.null is None:
        return states_BTD, pooled_BP, micro_B5
    null_states, null_pooled = condition.null
    return (
        torch.cat((null_states.expand(batch, -1, -1), states_BTD)),
        torch.cat((null_pooled.expand(batch, -1), pooled_BP)),
        torch.cat((micro_B5, micro_B5)),
    )


def _timestep(
    transformer: MaskedImageTransformer, masked_ratio_B: Tensor, step: int, steps: int
) -> Tensor:
    """This step in the network's convention: the share masked, or the index counting down."""
    if transformer.config.timestep_convention == MASK_RATIO:
        return masked_ratio_B.float()
    return torch.full_like(masked_ratio_B, steps - 1 - step, dtype=torch.float32)


def _predict(
    transformer: MaskedImageTransformer,
    tokens_BHW: Tensor,
    mask_BHW: Tensor,
    inputs: tuple[Tensor, Tensor, Tensor],
    timestep_B: Tensor,
    uniform_N: Tensor,
    options: SamplingOptions,
) -> tuple[Tensor, Tensor]:
    """A token and its probability for every masked place; the head runs there only."""
    device_type = tokens_BHW.device.type
    autocast = (
        torch.autocast(device_type, options.autocast_dtype)
        if options.autocast_dtype is not None
        else nullcontext()
    )
    copies = 2 if options.is_guided else 1
    with autocast:
        features = transformer.features(
            tokens_BHW.repeat(copies, 1, 1), *inputs, timestep_B.repeat(copies)
        )
        rows = [torch.split(half[mask_BHW], _CHUNK_TOKENS) for half in features.chunk(copies)]
        drawn = []
        for *parts, uniform in zip(*rows, torch.split(uniform_N, _CHUNK_TOKENS), strict=True):
            logits = [transformer.mlm_layer(part).float() for part in parts]
            guided = (
                logits[0]
                if copies == 1
                else torch.lerp(logits[0], logits[1], options.guidance_scale)
            )
            drawn.append(draw_tokens(guided, uniform))
    return torch.cat([tokens for tokens, _ in drawn]), torch.cat([probs for _, probs in drawn])
