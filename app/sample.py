"""`atelier sample`: prompts to PNG files, by a trained stage or any published model folder."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from app.status import RunStatus, StepStatus, read_made
from infra.config import atelier_home
from infra.errors import UserError

DEFAULT_STEPS, DEFAULT_GUIDANCE = 48, 9.0  # the paper's


@dataclass(frozen=True)
class Wish:
    """What was asked for; ``None`` leaves it to the recipe, or to the model."""

    prompts: tuple[str, ...]
    out: Path
    stage: str | None = None
    model: str | None = None
    seed: int = 0
    steps: int | None = None
    guidance_scale: float | None = None
    size_px: int | None = None


@dataclass(frozen=True)
class Painted:
    """A written image."""

    path: str
    prompt: str
    seed: int
    lineage: dict[str, str]

    def to_json(self) -> dict[str, Any]:
        """For a program."""
        return asdict(self)


@dataclass(frozen=True)
class Source:
    """A model on this machine, how it is sampled by default, and where it comes from."""

    folder: Path
    lineage: dict[str, str]
    steps: int = DEFAULT_STEPS
    guidance_scale: float = DEFAULT_GUIDANCE
    temperature: float = 2.0


def paint(wish: Wish) -> list[Painted]:
    """Paint each prompt and write it; image i uses seed + i."""
    if wish.out.suffix.lower() != ".png":
        raise UserError(expected="a name ending in .png after --out", got=str(wish.out))
    source = find_source(wish.stage, wish.model)

    from app.contact_sheet import save_png
    from infra.progress import progress
    from model import TextToImage

    painter = TextToImage.from_pretrained(source.folder)
    steps = wish.steps or source.steps
    scale = source.guidance_scale if wish.guidance_scale is None else wish.guidance_scale
    with progress("painting", steps, "steps") as bar:
        images = painter.generate(
            wish.prompts,
            height=wish.size_px,
            width=wish.size_px,
            steps=steps,
            guidance_scale=scale,
            seed=wish.seed,
            temperature=source.temperature,
            progress=lambda done, total, tokens: bar.update(done, total),
        )
    painted = []
    for index, (prompt, image) in enumerate(zip(wish.prompts, images, strict=True)):
        seed = wish.seed + index
        lineage = {
            "prompt": prompt, "seed": str(seed), "steps": str(steps),
            "guidance_scale": str(scale), **source.lineage,
        }  # fmt: skip
        path = _numbered(wish.out, index, len(images))
        save_png(image, path, lineage)
        painted.append(Painted(str(path), prompt, seed, lineage))
    return painted


def _numbered(out: Path, index: int, count: int) -> Path:
    return out if count == 1 else out.with_name(f"{out.stem}-{index + 1}{out.suffix}")


def find_source(stage: str | None, model: str | None) -> Source:
    """The model meant by ``--stage`` or ``--model``, fetched and with its digests checked."""
    if stage is not None and model is not None:
        raise UserError("--stage and --model exclude each other; give one")
    if model is None:
        return _of_stage(stage)
    if "://" in model:
        from training.publish import fetch_checkpoint

        with_services()
        return Source(fetch_checkpoint(model), {"model": model})
    folder = Path(model)
    if not (folder / "model_index.json").is_file():
        raise UserError(
            expected=f"a model folder with model_index.json at {folder}",
            got="a folder without it" if folder.is_dir() else "no such folder",
            remedy="give the folder of a published model, or leave --model out",
        )
    return Source(folder, {"model": str(folder.resolve())})


def _of_stage(stage: str | None) -> Source:
    home = atelier_home()
    run = read_made(home)
    trained = (
        [] if run is None else [s for s in run.steps if s.kind == "stage" and s.checkpoint_uri]
    )
    if run is None or not trained:
        raise UserError("no stage is trained here yet; try `atelier run recipes/demo.yaml`")
    step = trained[-1] if stage is None else _named(stage, trained)

    from training.publish import fetch_checkpoint

    with_services()
    folder = fetch_checkpoint(str(step.checkpoint_uri))
    recipe = json.loads((home / "runs" / run.run_id / "recipe.json").read_text(encoding="utf-8"))
    how = recipe.get("evaluation") or {}
    return Source(
        folder,
        lineage_of(run, step),
        how.get("steps", DEFAULT_STEPS),
        how.get("guidance_scale", DEFAULT_GUIDANCE),
        how.get("temperature", 2.0),
    )


def _named(stage: str, trained: list[StepStatus]) -> StepStatus:
    from app.recipe_problems import did_you_mean

    for step in trained:
        if step.name == stage:
            return step
    hint = did_you_mean(stage, [step.name for step in trained])
    raise UserError(f"no trained stage {stage!r} in this recipe's runs; {hint}")


def lineage_of(run: RunStatus, step: StepStatus) -> dict[str, str]:
    """What an image of ``step`` carries: the run, the checkpoint, and what it was made from."""
    stages = [s for s in run.steps if s.checkpoint_sha256]
    until = stages[: stages.index(step) + 1] if step in stages else [step]
    datasets = {s.label: str(s.dataset_version) for s in run.steps if s.kind == "dataset"}
    return {
        "software": "atelier",
        "recipe": run.recipe_name,
        "recipe_fingerprint": run.recipe_fingerprint,
        "run": run.run_id,
        "stage": step.name,
        "checkpoint": str(step.checkpoint_uri),
        "checkpoints": json.dumps({s.name: s.checkpoint_sha256 for s in until}),
        "datasets": json.dumps(datasets),
    }


def with_services() -> None:
    """Have the local store up, with its address and keys in this process's environment."""
    import os

    from infra.local.services import up

    os.environ.update(up(atelier_home()).environment())
