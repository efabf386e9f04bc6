"""A finished stage's scores: it paints prompts, and an oracle or CLIPs look at the images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from infra.progress import progress

if TYPE_CHECKING:
    from pathlib import Path

    from PIL.Image import Image

    from app.recipe import EvaluationConfig
    from demo.world import WorldConfig
    from model import TextToImage

SHEET_SEED = 1_000_000  # apart from the seeds of the scored images


def evaluate_stage(
    name: str, uri: str, world: WorldConfig | None, config: EvaluationConfig
) -> dict[str, float]:
    """Scores of the published model at ``uri``. The same bytes and configuration give the same.

    Of the painted ``world``, where the prompts are not the recipe's own: in [0, 1], GenEval's six
    questions, their mean, and four that say where it went wrong. Of each judge: the mean over the
    prompts of its scale x cosine.
    """
    from training.publish import fetch_checkpoint

    painter = painter_of(fetch_checkpoint(uri))
    if world is None or config.prompts is not None:
        prompts = prompts_of(config)
        images = paint(painter, prompts, config, config.seed, f"scoring {name}")
        scores = {}
    else:
        from demo.questions import geneval_prompts, score

        questions = geneval_prompts(world, config.num_prompts, config.seed)
        prompts = [question.prompt for question in questions]
        images = paint(painter, prompts, config, config.seed, f"scoring {name}")
        scores = score(images, questions, world).means
    del painter  # a judge wants its memory
    for judge, how in sorted(config.judges.items()):
        from pipelines.judges import cosines_of

        scores[judge] = how.scale * float(cosines_of(images, prompts, how.clip).mean())
    return scores


def prompts_of(config: EvaluationConfig) -> list[str]:
    """The first ``num_prompts`` of the recipe's own prompts."""
    from pipelines.decontaminate import read_prompts

    if config.prompts is None:
        raise ValueError("this evaluation asks the painted world")
    return read_prompts(config.prompts)[: config.num_prompts]


def painter_of(folder: Path) -> TextToImage:
    """The model in ``folder``, on a GPU where this machine has one."""
    import torch

    from model import TextToImage

    device = "cuda" if torch.cuda.is_available() else "cpu"
    return TextToImage.from_pretrained(folder, device=device)


def paint_stage(
    name: str, uri: str, prompts: Sequence[str], config: EvaluationConfig
) -> tuple[int, list[Image]]:
    """(its resolution, px; its images) of the published model at ``uri``; seeds are its own."""
    from training.publish import fetch_checkpoint

    painter = painter_of(fetch_checkpoint(uri))
    images = paint(painter, prompts, config, SHEET_SEED, f"painting with {name}")
    return painter.defaults.resolution_px, images


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
