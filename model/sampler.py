"""Unmasking: from masked tokens to an image's tokens in a few steps.

Shape suffixes: B images, H token rows, W token columns, L = H·W, N masked tokens of all images
(row-major), V codebook size, C channels, T text tokens, D text channels, P pooled channels, 5
micro-conditions.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from model.drawing import draw_tokens
from model.errors import ModelError
from model.noise import TINY_PROB, ImageNoise
from model.order import CONFIDENCE, FIXED_ORDERS, HALTON, check_order, halton_ranks
from model.schedule import MASK_RATIO, Schedule, cosine_schedule
from model.text import TextFeatures
from model.transformer import MaskedImageTransformer

# Called after each step with (steps done, steps in all, tokens_BHW with what is still masked).
Progress = Callable[[int, int, Tensor], None]

# Float32 probabilities of this many tokens exist at a time: 128 MB with 8192 codes.
_CHUNK_TOKENS = 4096

GUIDANCE_SCHEDULES = ("constant", "linear", "cosine")


@dataclass(frozen=True)
class SamplingOptions:
    """How to unmask. Guided logits are uncond + guidance_scale · (cond - uncond); 1 is off."""

    steps: int = 48
    guidance_scale: float = 9.0
    # Noise on the confidences, first and last step; 0 is none.
    temperature: tuple[float, float] = (2.0, 0.0)
    schedule: Schedule = cosine_schedule
    autocast_dtype: torch.dtype | None = None  # compute type; None is that of the weights
    guidance_schedule: str = "constant"  # or "linear", "cosine": rising from 1 to guidance_scale
    guidance_interval: tuple[float, float] = (0.0, 1.0)  # progress that is guided; the rest is not
    order: str = CONFIDENCE  # which new tokens stay, one of `model.order.ORDERS`
    token_temperature: float = 1.0  # logits are divided by it; 0 takes the likeliest token
    zigzag: float = 0.0  # share of the steps, from the first, that are taken twice

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ModelError(f"steps is {self.steps}: expected at least 1")
        if not min(self.temperature) >= 0:
            raise ModelError(f"temperature is {self.temperature}: expected values of 0 or more")
        if not self.token_temperature >= 0:
            raise ModelError(f"token_temperature is {self.token_temperature}: expected 0 or more")
        if not math.isfinite(self.guidance_scale):
            raise ModelError(f"guidance_scale is {self.guidance_scale}: expected a finite number")
        if self.guidance_schedule not in GUIDANCE_SCHEDULES:
            raise ModelError(
                f"guidance_schedule is {self.guidance_schedule!r}: expected one of "
                f"{', '.join(GUIDANCE_SCHEDULES)}"
            )
        first, last = self.guidance_interval
        if not 0 <= first < last <= 1:
            raise ModelError(
                f"guidance_interval is {self.guidance_interval}: expected two rising numbers in "
                "[0, 1]"
            )
        if not 0 <= self.zigzag <= 1:
            raise ModelError(f"zigzag is {self.zigzag}: expected 0 to 1, a share of the steps")
        check_order(self.order)

    @property
    def is_guided(self) -> bool:
        """Whether any step needs the unconditional half."""
        return any(scale != 1.0 for scale in self.guidance_scales())

    def guidance_scales(self) -> list[float]:
        """The scale of each step; a step of scale 1 runs without the unconditional half."""
        first, last = self.guidance_interval
        scales = []
        for step in range(self.steps):
            rising = step / (self.steps - 1) if self.steps > 1 else 1.0
            share = {
                "constant": 1.0,
                "linear": rising,
                "cosine": (1 - math.cos(math.pi * rising)) / 2,
            }[self.guidance_schedule]
            inside = first <= step / self.steps < last
            scales.append(1.0 + (self.guidance_scale - 1.0) * share if inside else 1.0)
        return scales


@dataclass(frozen=True)
class Condition:
    """What the images shall show. `null` is needed when guided; one row serves all images."""

    text: TextFeatures
    micro_conditions_B5: Tensor
    null: TextFeatures | None = None


@dataclass(frozen=True)
class Unmasked:
    """The state after a step."""

    step: int  # steps done, 1 …
    steps: int  # steps in all
    tokens_BHW: Tensor  # what is decided; the rest holds the mask token
    guess_BHW: Tensor  # the same with every other place as the network guessed it: no mask token


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
    confidence_N = prob_N.clamp(min=TINY_PROB).log() + noise_N
    return mask_least(tokens_BHW, mask_BHW, confidence_N, num_left_B, mask_token_id)


def mask_least(
    tokens_BHW: Tensor,
    mask_BHW: Tensor,
    confidence_N: Tensor,
    num_left_B: Tensor,
    mask_token_id: int,
) -> Tensor:
    """Mask the num_left_B places of mask_BHW with the least confidence_N, as `remask` says."""
    confidence_BHW = torch.full(mask_BHW.shape, torch.inf, device=mask_BHW.device)
    confidence_BHW[mask_BHW] = confidence_N
    confidence_BL = confidence_BHW.flatten(1)
    border_B1 = num_left_B[:, None].clamp(max=confidence_BL.shape[1] - 1)
    cutoff_B1 = confidence_BL.sort(dim=1).values.gather(1, border_B1)
    again_BL = (confidence_BL < cutoff_B1) & (num_left_B[:, None] > 0)
    return tokens_BHW.masked_fill(again_BL.view_as(mask_BHW) & mask_BHW, mask_token_id)


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

    Image b depends on seeds[b] and its own inputs only. On a CPU its bits do too as long as matrix
    products of other sizes round alike; where they do not, a tie may fall otherwise. Returns
    tokens_BHW without mask tokens. Steps before `first_step` are skipped: the share masked counts
    as the schedule's at that point. Raises ModelError when guidance is asked for without a null
    text, and when the network's predictions are not finite.
    """
    for state in unmask_steps(transformer, tokens_BHW, condition, seeds, options, first_step):
        tokens_BHW = state.tokens_BHW
        if progress is not None:
            progress(state.step, state.steps, tokens_BHW)
    return tokens_BHW


@torch.no_grad()
def unmask_steps(
    transformer: MaskedImageTransformer,
    tokens_BHW: Tensor,
    condition: Condition,
    seeds: Sequence[int],
    options: SamplingOptions,
    first_step: int = 0,
) -> Iterator[Unmasked]:
    """`unmask`, one step at a time."""
    is_guided = any(scale != 1.0 for scale in options.guidance_scales()[first_step:])
    if is_guided and condition.null is None:
        raise ModelError(
            "guidance needs a null text: give Condition.null or set guidance_scale to 1"
        )
    walk = _Walk(transformer, tokens_BHW, condition, seeds, options, first_step)
    for step in range(first_step, options.steps):
        mask_BHW = tokens_BHW == walk.mask_token_id
        guess_BHW, tokens_BHW = walk.step(tokens_BHW, mask_BHW, step)
        if step - first_step < options.zigzag * (options.steps - first_step):
            guess_BHW, tokens_BHW = walk.step(*walk.back(guess_BHW, mask_BHW), step)
        if step == options.steps - 1:
            walk.check(int(walk.num_odd))
        yield Unmasked(step + 1 - first_step, options.steps - first_step, tokens_BHW, guess_BHW)


class _Walk:
    """What the steps of one `unmask` share, made once."""

    def __init__(
        self,
        transformer: MaskedImageTransformer,
        tokens_BHW: Tensor,
        condition: Condition,
        seeds: Sequence[int],
        options: SamplingOptions,
        first_step: int,
    ) -> None:
        self.transformer, self.options = transformer, options
        self.mask_token_id = transformer.config.mask_token_id
        self.scales = options.guidance_scales()
        is_guided = any(scale != 1.0 for scale in self.scales[first_step:])
        self.guided_inputs = _network_inputs(condition, len(tokens_BHW), is_guided)
        self.plain_inputs = _network_inputs(condition, len(tokens_BHW), False)
        self.noise = ImageNoise(seeds, tokens_BHW.device)
        self.order = _FixedOrder(options.order, tokens_BHW, self.noise)
        begun = options.schedule(torch.tensor(first_step / options.steps, device=tokens_BHW.device))
        self.free_BHW = tokens_BHW == self.mask_token_id
        self.num_start_B = self.free_BHW.flatten(1).sum(dim=1) / begun
        self.temperatures = torch.linspace(*options.temperature, options.steps).tolist()
        # Tokens that were drawn from what is no distribution, so far.
        self.num_odd = torch.zeros((), dtype=torch.long, device=tokens_BHW.device)

    def step(self, tokens_BHW: Tensor, mask_BHW: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """(guess_BHW, tokens_BHW) after predicting what mask_BHW says is masked."""
        num_masked_B = mask_BHW.flatten(1).sum(dim=1)
        # One wait for the device tells how many are masked and whether the last step went wrong.
        *counts, num_odd = torch.cat((num_masked_B, self.num_odd[None])).tolist()
        self.check(num_odd)
        if not any(counts):
            return tokens_BHW, tokens_BHW
        steps, is_plain = self.options.steps, self.scales[step] == 1.0
        drawn_N, certainty_N = _predict(
            self.transformer,
            tokens_BHW,
            mask_BHW,
            self.plain_inputs if is_plain else self.guided_inputs,
            _timestep(self.transformer, num_masked_B / mask_BHW[0].numel(), step, steps),
            self.noise.uniform(counts),
            self.scales[step],
            self.options,
        )
        self.num_odd = self.num_odd + certainty_N.isfinite().logical_not().sum()
        guess_BHW = tokens_BHW.masked_scatter(mask_BHW, drawn_N)
        confidence_N = self.order.confidence(mask_BHW)
        if confidence_N is None:
            gumbel_N = self.temperatures[step] * self.noise.gumbel(counts)
            confidence_N = certainty_N.clamp(min=TINY_PROB).log() + gumbel_N
        num_left_B = num_left_masked(
            self.num_start_B, num_masked_B, step, steps, self.options.schedule
        )
        return guess_BHW, mask_least(
            guess_BHW, mask_BHW, confidence_N, num_left_B, self.mask_token_id
        )

    def check(self, num_odd: int) -> None:
        """ModelError when `num_odd` tokens, more than none, were drawn from what is no number."""
        if num_odd:
            dtype = self.options.autocast_dtype or self.transformer.context_embedder.weight.dtype
            raise ModelError(
                f"the network predicted NaN for {num_odd} tokens in "
                f"{str(dtype).removeprefix('torch.')}: expected finite numbers; paint in bfloat16 "
                "or float32, or with weaker adapters"
            )

    def back(self, guess_BHW: Tensor, mask_BHW: Tensor) -> tuple[Tensor, Tensor]:
        """(tokens_BHW, mask_BHW): the guess with as many masks as before it, at random places.

        The way back of a zigzag (Bag of Design Choices, arXiv:2411.10781). What was given at the
        start is never masked; where everything was, one token of the guess stays.
        """
        num_masked_B = mask_BHW.flatten(1).sum(dim=1)
        chance_N = self.noise.uniform(self.free_BHW.flatten(1).sum(dim=1).tolist())
        tokens_BHW = mask_least(
            guess_BHW, self.free_BHW, chance_N, num_masked_B, self.mask_token_id
        )
        return tokens_BHW, tokens_BHW == self.mask_token_id


class _FixedOrder:
    """The orders that are known before the first step; each image has its own, from its seed."""

    def __init__(self, order: str, tokens_BHW: Tensor, noise: ImageNoise) -> None:
        self.confidence_BHW: Tensor | None = None
        if order not in FIXED_ORDERS:
            return
        batch, height, width = tokens_BHW.shape
        num_tokens = height * width
        if order == HALTON:
            start_B1 = (noise.uniform([1] * batch) * num_tokens).long()[:, None]
            ranks_BL = (halton_ranks(height, width).flatten().to(start_B1) + start_B1) % num_tokens
            # Float32 holds every rank of a grid below 2^24 tokens.
            self.confidence_BHW = -ranks_BL.float().view_as(tokens_BHW)
        else:
            self.confidence_BHW = noise.uniform([num_tokens] * batch).view_as(tokens_BHW)

    def confidence(self, mask_BHW: Tensor) -> Tensor | None:
        """confidence_N, or None where the network is asked."""
        return None if self.confidence_BHW is None else self.confidence_BHW[mask_BHW]


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
    guidance_scale: float,
    options: SamplingOptions,
) -> tuple[Tensor, Tensor]:
    """A token and its certainty for every masked place; the head runs there only."""
    device_type = tokens_BHW.device.type
    autocast = (
        torch.autocast(device_type, options.autocast_dtype)
        if options.autocast_dtype is not None
        else nullcontext()
    )
    copies = 2 if guidance_scale != 1.0 else 1
    with autocast:
        features = transformer.features(
            tokens_BHW.repeat(copies, 1, 1), *inputs, timestep_B.repeat(copies)
        )
        rows = [torch.split(half[mask_BHW], _CHUNK_TOKENS) for half in features.chunk(copies)]
        drawn = []
        for *parts, uniform in zip(*rows, torch.split(uniform_N, _CHUNK_TOKENS), strict=True):
            logits = [transformer.mlm_layer(part).float() for part in parts]
            guided = logits[0] if copies == 1 else torch.lerp(logits[0], logits[1], guidance_scale)
            drawn.append(draw_tokens(guided, uniform, options.token_temperature, options.order))
    return torch.cat([tokens for tokens, _ in drawn]), torch.cat([probs for _, probs in drawn])
