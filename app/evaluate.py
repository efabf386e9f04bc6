"""A finished stage's scores: it paints held-out prompts and the oracle reads the images back."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from infra.progress import progress

if TYPE_CHECKING:
    from PIL.Image import Image

    from app.recipe import EvaluationConfig
    from demo.world import WorldConfig
    from model import TextToImage

SHEET_SEED = 1_000_000  # apart from the seeds of the scored images


def evaluate_stage(
    name: str, folder: Path, world: WorldConfig, config: EvaluationConfig
) -> dict[str, float]:
    """Scores in [0, 1] of the model in ``folder``: GenEval's six questions, their mean, and four
    that say where it went wrong. The same folder and configuration give the same scores.
    """
    from demo.questions import geneval_prompts, score
    from model import TextToImage

    painter = TextToImage.from_pretrained(folder)
    questions = geneval_prompts(world, config.num_prompts, config.seed)
    images = paint(
        painter, [q.prompt for q in questions], config, config.seed, f"scoring {name}"
    )  # fmt: skip
    return score(images, questions, world).means


def paint(
    painter: TextToImage,
    prompts: Sequence[str],
    config: EvaluationConfig,
    seed: int,
    description: str,
) -> list[Image]:
    """One image per prompt, as ``config`` says; image i uses ``seed`` + i."""
    import torch

    dtype = torch.bfloat16 if config.precision == "bf16" else None
    with progress(description, len(prompts), "images") as bar:
        return painter.generate(
            prompts,
            steps=config.steps,
            guidance_scale=config.guidance_scale,
            temperature=config.temperature,
            seed=seed,
            dtype=dtype,
            batch_size=config.batch_size,
            progress=lambda done, total, tokens: bar.update(len(prompts) * done // total),
        )
