"""`atelier sample`: prompts to PNG files, by a trained stage or any published model folder."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from app.place import place_of
from app.status import RunStatus, StepStatus, read_made
from infra.config import atelier_home
from infra.errors import UserError

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

    from model import TextToImage
    from model.paint_options import PaintKeywords

MAX_GRID_IMAGES = 100
DEFAULT_STEPS, DEFAULT_GUIDANCE = 48, 9.0  # the paper's


@dataclass(frozen=True)
class Machine:
    """What the model runs on, in which type, and how it is fitted into less memory."""

    device: str = "auto"
    precision: str = "auto"
    quantize: str | None = None
    offload: bool = False
    tile_px: int | None = None
    compile: bool = False

    def lineage(self, precision: str) -> dict[str, str]:
        """What of this changes pixels; ``precision`` is the type that was found."""
        return {
            "precision": precision,
            **({} if self.quantize is None else {"quantize": self.quantize}),
            **({} if self.tile_px is None else {"tile_px": str(self.tile_px)}),
        }


@dataclass(frozen=True)
class Brush:
    """Which model paints, and how; ``None`` leaves it to the recipe, or to the model."""

    stage: str | None = None
    model: str | None = None
    steps: int | None = None
    guidance_scale: float | None = None
    negative_prompt: str = ""
    order: str | None = None
    guidance_schedule: str | None = None
    token_temperature: float | None = None
    loras: tuple[str, ...] = ()
    machine: Machine = Machine()
    zigzag: float = 0.0


@dataclass(frozen=True)
class Wish:
    """What was asked for: an image for every prompt and seed."""

    prompts: tuple[str, ...]
    out: Path
    seeds: tuple[int, ...] | None = None  # None gives image i seed + i
    seed: int = 0
    size_px: tuple[int, int] | None = None  # width, height
    batch_size: int = 16
    grid: Path | None = None
    preview: str | None = None  # "gif" or "strip"

    def jobs(self) -> list[tuple[str, int]]:
        """(prompt, seed) of every image."""
        if self.seeds is None:
            return [(prompt, self.seed + index) for index, prompt in enumerate(self.prompts)]
        return [(prompt, seed) for prompt in self.prompts for seed in self.seeds]


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


@dataclass(frozen=True)
class Easel:
    """A painter that is ready, the keywords of how it paints, and what its images carry."""

    painter: TextToImage
    keywords: PaintKeywords
    lineage: dict[str, str]


def set_up(brush: Brush) -> Easel:
    """Fetch and load the model meant."""
    source = find_source(brush.stage, brush.model)
    painter, precision = _load(source.folder, brush.machine)
    for folder in brush.loras:
        painter.load_lora(folder)
    scale = source.guidance_scale if brush.guidance_scale is None else brush.guidance_scale
    keywords: PaintKeywords = {
        "steps": brush.steps or source.steps,
        "guidance_scale": scale,
        "temperature": source.temperature,
        "negative_prompt": brush.negative_prompt or None,  # the model's own when none is given
    }
    lineage = {
        "steps": str(keywords["steps"]), "guidance_scale": str(scale),
        **brush.machine.lineage(precision), **source.lineage,
    }  # fmt: skip
    if brush.order is not None:
        keywords["order"] = lineage["order"] = brush.order
    if brush.guidance_schedule is not None:
        keywords["guidance_schedule"] = lineage["guidance_schedule"] = brush.guidance_schedule
    if brush.token_temperature is not None:
        keywords["token_temperature"] = brush.token_temperature
        lineage["token_temperature"] = str(brush.token_temperature)
    if brush.zigzag:
        keywords["zigzag"] = brush.zigzag
        lineage["zigzag"] = str(brush.zigzag)
    if brush.loras:
        lineage["loras"] = ", ".join(brush.loras)
    if negative := brush.negative_prompt or painter.defaults.negative_prompt:
        lineage["negative_prompt"] = negative
    return Easel(painter, keywords, lineage)


def _load(folder: Path, machine: Machine) -> tuple[TextToImage, str]:
    """The model where and as it shall run, and the name of its type."""
    from model import TextToImage, compile_network, find_device, find_dtype

    device = find_device(machine.device)
    dtype = find_dtype(machine.precision, device)
    painter = TextToImage.from_pretrained(folder, dtype)
    painter.save_memory(machine.quantize, machine.offload, machine.tile_px).to(device)
    if machine.compile:
        compile_network(painter.transformer)
    return painter, str(dtype).removeprefix("torch.")


def check_keywords(keywords: PaintKeywords, num_images: int) -> None:
    """One line for what no painter can do, before any progress is shown."""
    from model import PaintOptions

    options = PaintOptions(**keywords)
    options.sampling("cosine")
    options.image_seeds(num_images)


@contextmanager
def within_memory() -> Iterator[None]:
    """One line with what helps, where torch says that memory ran out."""
    import torch

    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        if type(error) is RuntimeError and "can't allocate memory" not in str(error):
            raise
        raise UserError(
            expected="to paint in the memory that is there",
            got=str(error).partition("\n")[0][:160] or "none was left",
            remedy="try --quantize int8, --offload, --tile 512 or a smaller batch or picture",
        ) from None


def paint(wish: Wish, brush: Brush) -> list[Painted]:
    """Paint every prompt with every seed and write the PNGs, prompt by prompt."""
    for path in (wish.out, wish.grid):
        check_png(path)
    jobs = wish.jobs()
    if wish.grid is not None and len(jobs) > MAX_GRID_IMAGES:
        raise UserError(
            expected=f"at most {MAX_GRID_IMAGES} images in a grid",
            got=f"{len(jobs)}",
        )
    with within_memory():
        easel = set_up(brush)

    from app.contact_sheet import save_png
    from app.preview import Recorder
    from infra.progress import progress

    width_px, height_px = wish.size_px or (None, None)
    easel.painter.check_size(height_px, width_px)
    asked: PaintKeywords = {
        **easel.keywords,
        "seeds": [seed for _, seed in jobs],
        "batch_size": wish.batch_size,
    }
    check_keywords(asked, len(jobs))
    recorder = Recorder(easel.painter, wish.batch_size)
    with progress("painting", len(jobs), "images") as bar:

        def report(done: int, total: int, tokens: Tensor) -> None:
            bar.update(len(jobs) * done // total)
            if wish.preview is not None:
                recorder.add(tokens)

        prompts = [prompt for prompt, _ in jobs]
        with within_memory():
            asked["progress"] = report
            images = easel.painter.generate(prompts, height_px, width_px, **asked)
    painted = []
    for index, ((prompt, seed), image) in enumerate(zip(jobs, images, strict=True)):
        lineage = {"prompt": prompt, "seed": str(seed), **easel.lineage}
        path = _numbered(wish.out, index, len(images))
        save_png(image, path, lineage)
        if wish.preview is not None:
            recorder.save(index, path, wish.preview, lineage)
        painted.append(Painted(str(path), prompt, seed, lineage))
    if wish.grid is not None:
        _write_grid(wish, wish.grid, images, easel.lineage)
    return painted


def check_png(path: Path | None) -> None:
    """One line unless the name ends in .png and such a file can be written."""
    if path is None:
        return
    if path.suffix.lower() != ".png":
        raise UserError(expected="a name ending in .png for an image to write", got=str(path))
    if path.is_dir():
        raise UserError(expected=f"a file to write at {path}", got="a folder")
    there = next(parent for parent in path.absolute().parents if parent.exists())
    if not there.is_dir():
        raise UserError(
            expected=f"a folder for {path.name} at {path.parent}", got=f"{there} is a file"
        )
    if not os.access(there, os.W_OK):
        raise UserError(expected=f"to write {path}", got=f"no permission in {there}")


def _write_grid(wish: Wish, path: Path, images: list[Image], lineage: dict[str, str]) -> None:
    """A column per prompt and a row per seed."""
    from app.contact_sheet import Row, draw_sheet, save_png

    seeds = wish.seeds or (None,)
    rows = [
        Row("" if seed is None else f"seed {seed}", "", images[row :: len(seeds)])
        for row, seed in enumerate(seeds)
    ]
    title = lineage.get("stage") or Path(lineage["model"]).name
    sheet = draw_sheet(title, wish.prompts, rows)
    save_png(sheet, path, {"prompts": json.dumps(wish.prompts), **lineage})


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

        place_of(model)
        return Source(fetch_checkpoint(model), {"model": model})
    from model import model_folder

    folder = model_folder(model)
    if not (folder / "model_index.json").is_file():
        raise UserError(
            expected=f"a model folder with model_index.json at {folder}",
            got="a folder without it" if folder.is_dir() else "no such folder",
            remedy="give the folder of a published model, or leave --model out",
        )
    if folder == Path(model):
        return Source(folder, {"model": str(folder.resolve())})
    # The hub's copy lies under the commit it came from.
    return Source(folder, {"model": f"{model.partition('@')[0]}@{folder.name}"})


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

    place_of(None)
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
