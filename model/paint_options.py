"""What a caller may ask of every way of painting, checked once."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypedDict

import torch
from torch import Tensor

from model.errors import ModelError
from model.sampler import Progress, SamplingOptions
from model.schedule import mask_schedule

MAX_SEED = 2**64 - 1


class PaintKeywords(TypedDict, total=False):
    """The keywords of `PaintOptions`, for signatures."""

    steps: int
    guidance_scale: float
    seed: int
    seeds: Sequence[int] | None
    guidance_schedule: str
    guidance_interval: tuple[float, float]
    negative_prompt: str | None
    order: str
    token_temperature: float
    zigzag: float
    temperature: float | tuple[float, float]
    preference_score: float | None
    dtype: torch.dtype | None
    batch_size: int | None
    progress: Progress | None


@dataclass(frozen=True)
class PaintOptions:
    """How to paint; raises ModelError for values out of range."""

    steps: int = 48  # network calls per image
    guidance_scale: float = 9.0  # uncond + scale · (cond - uncond); 1 is off
    seed: int = 0  # image i uses seed + i
    seeds: Sequence[int] | None = None  # or its own seed; no image depends on the rest of the batch
    guidance_schedule: str = "constant"  # or "linear", "cosine": rising from 1 to the scale
    guidance_interval: tuple[float, float] = (0.0, 1.0)  # share of the steps that is guided
    negative_prompt: str | None = None  # what "uncond" is told; None is the model's default
    order: str = "confidence"  # which tokens stay: also "margin", "entropy", "random", "halton"
    token_temperature: float = 1.0  # of the tokens' draw; 0 takes the likeliest
    zigzag: float = 0.0  # share of the steps that are taken twice, with a random way back between
    temperature: float | tuple[float, float] = (2.0, 0.0)  # confidence noise, first and last step
    preference_score: float | None = None  # last micro-condition; None is the model's default
    dtype: torch.dtype | None = None  # compute type of the network (autocast); None is its weights'
    batch_size: int | None = None  # images painted at a time; None is all
    progress: Progress | None = None  # called with (steps done, steps in all, tokens_BHW)

    def __post_init__(self) -> None:
        if self.batch_size is not None and self.batch_size < 1:
            raise ModelError(f"batch_size is {self.batch_size}: expected at least 1")

    def sampling(self, masking_schedule: str) -> SamplingOptions:
        """The part that the sampler takes; a single temperature falls to 0."""
        pair = self.temperature
        first, last = pair if isinstance(pair, tuple | list) else (pair, 0.0)
        return SamplingOptions(
            steps=self.steps,
            guidance_scale=self.guidance_scale,
            temperature=(float(first), float(last)),
            schedule=mask_schedule(masking_schedule),
            autocast_dtype=self.dtype,
            guidance_schedule=self.guidance_schedule,
            guidance_interval=self.guidance_interval,
            order=self.order,
            token_temperature=self.token_temperature,
            zigzag=self.zigzag,
        )

    def image_seeds(self, num_images: int) -> list[int]:
        """One seed per image: `seeds`, or seed, seed + 1, …"""
        given = self.seeds
        seeds = (
            range(self.seed, self.seed + num_images) if given is None else [int(s) for s in given]
        )
        if len(seeds) != num_images:
            raise ModelError(f"{len(seeds)} seeds for {num_images} prompts: expected one each")
        if any(not 0 <= seed <= MAX_SEED for seed in seeds):
            raise ModelError(f"a seed leaves the range 0 to {MAX_SEED}")
        return list(seeds)

    def batches(self, num_images: int) -> list[range]:
        """The images of each batch."""
        size = self.batch_size or max(num_images, 1)
        return [range(start, min(start + size, num_images)) for start in range(0, num_images, size)]

    def part(self, seeds: Sequence[int], num_batches: Sequence[int], number: int) -> "PaintOptions":
        """These options for part `number` of a call's images, which have `seeds`.

        num_batches: of every part; `progress` counts the steps of all parts together.
        """
        report, before, total = self.progress, sum(num_batches[:number]), sum(num_batches)

        def counted(step: int, steps: int, tokens_BHW: Tensor) -> None:
            each = steps // num_batches[number]
            assert report is not None
            report(before * each + step, total * each, tokens_BHW)

        return replace(self, seeds=list(seeds), progress=None if report is None else counted)

    def report(self, batch: int, num_batches: int) -> Progress | None:
        """`progress` for one batch, counting the steps of all batches together."""
        report = self.progress
        if report is None:
            return None
        return lambda step, steps, tokens: report(batch * steps + step, num_batches * steps, tokens)
