"""`atelier sample`: prompts to PNG files, by a trained stage or any published model folder."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from app.contact_sheet import Row, draw_sheet, fitted, lineage_in, save_png
from app.easel import Brush, Easel, check_keywords, on_this_machine, set_up
from app.preview import Recorder, preview_path
from app.verb import Output
from infra.errors import UserError

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

    from infra.progress import Progress
    from model.paint_options import PaintKeywords

MAX_GRID_IMAGES = 100


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
    """A written image; ``was_there`` if an earlier call wrote it, with the same lineage."""

    path: str
    prompt: str
    seed: int
    lineage: dict[str, str]
    was_there: bool = False

    def to_json(self) -> dict[str, Any]:
        """For a program."""
        return asdict(self)


def paint(wish: Wish, brush: Brush, out: Output) -> list[Painted]:
    """Paint every prompt with every seed and write the PNGs, batch by batch.

    An image that is there already with its very lineage is not painted again, so that a call that
    was stopped goes on after the last batch that it wrote.
    """
    for path in (wish.out, wish.grid):
        check_png(path)
    jobs = wish.jobs()
    if wish.grid is not None and len(jobs) > MAX_GRID_IMAGES:
        raise UserError(
            expected=f"at most {MAX_GRID_IMAGES} images in a grid",
            got=f"{len(jobs)}",
        )
    with on_this_machine():
        easel = set_up(brush, out)

    width_px, height_px = wish.size_px or (None, None)
    height_px, width_px = easel.painter.check_size(height_px, width_px)
    seeds = [seed for _, seed in jobs]
    check_keywords({**easel.keywords, "seeds": seeds, "batch_size": wish.batch_size}, len(jobs))
    images = []
    for index, (prompt, seed) in enumerate(jobs):
        lineage = {"prompt": prompt, "seed": str(seed), **easel.lineage}
        image = Painted(str(_numbered(wish.out, index, len(jobs))), prompt, seed, lineage)
        images.append(replace(image, was_there=_is_there(image, wish, (width_px, height_px))))
    _paint_missing(wish, easel, images, (width_px, height_px))
    if wish.grid is not None:
        _write_grid(wish, wish.grid, images, easel.lineage)
    return images


def _is_there(image: Painted, wish: Wish, size_px: tuple[int, int]) -> bool:
    path = Path(image.path)
    if lineage_in(path, size_px) != image.lineage:
        return False
    return wish.preview is None or lineage_in(preview_path(path, wish.preview)) == image.lineage


def _paint_missing(
    wish: Wish, easel: Easel, images: Sequence[Painted], size_px: tuple[int, int]
) -> None:
    """Paint and write what is not there, a batch at a time; a stop says how far it came."""
    from infra.progress import progress

    due = [image for image in images if not image.was_there]
    written = len(images) - len(due)
    with progress("painting", len(images), "images") as bar:
        try:
            for start in range(0, len(due), wish.batch_size):
                bar.update(written)
                batch = due[start : start + wish.batch_size]
                _paint_batch(wish, easel, batch, size_px, bar, written)
                written += len(batch)
            bar.update(written)
        except KeyboardInterrupt as stop:
            stop.add_note(f"at least {written} of {len(images)} images are written")
            raise


def _paint_batch(
    wish: Wish,
    easel: Easel,
    batch: Sequence[Painted],
    size_px: tuple[int, int],
    bar: Progress,
    written: int,
) -> None:
    """Each image is written after its preview, so what is there with its lineage is complete."""
    recorder = Recorder(easel.painter, wish.batch_size)

    def report(done: int, total: int, tokens: Tensor) -> None:
        bar.update(written + len(batch) * done // total)
        if wish.preview is not None:
            recorder.add(tokens)

    asked: PaintKeywords = {
        **easel.keywords,
        "seeds": [image.seed for image in batch],
        "progress": report,
    }
    prompts = [image.prompt for image in batch]
    width_px, height_px = size_px
    with on_this_machine():
        pixels = easel.painter.generate(prompts, height_px, width_px, **asked)
    for row, (image, picture) in enumerate(zip(batch, pixels, strict=True)):
        path = Path(image.path)
        if wish.preview is not None:
            with on_this_machine():
                recorder.save(row, path, wish.preview, image.lineage)
        save_png(picture, path, image.lineage)


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


def _write_grid(wish: Wish, path: Path, images: Sequence[Painted], lineage: dict[str, str]) -> None:
    """A column per prompt and a row per seed."""
    cells = [_cell(Path(image.path)) for image in images]
    seeds = wish.seeds or (None,)
    rows = [
        Row("" if seed is None else f"seed {seed}", "", cells[row :: len(seeds)])
        for row, seed in enumerate(seeds)
    ]
    title = lineage.get("stage") or Path(lineage["model"]).name
    sheet = draw_sheet(title, wish.prompts, rows)
    save_png(sheet, path, {"prompts": json.dumps(wish.prompts), **lineage})


def _numbered(out: Path, index: int, count: int) -> Path:
    return out if count == 1 else out.with_name(f"{out.stem}-{index + 1}{out.suffix}")


def _cell(path: Path) -> Image:
    """The image as the grid shows it: of many large ones none is kept whole."""
    from PIL import Image as Images

    with Images.open(path) as image:
        return fitted(image)
