"""Pictures of a few fixed prompts: while a stage trains, and by the model it ends with.

They are logged as MLflow's own image series, which its page shows with a slider over the steps.
"""

from __future__ import annotations

import io
import logging
import re
import uuid
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed
from PIL import Image

from model import PainterDefaults, TextToImage
from training.config import SampleGridConfig
from training.initial import Networks
from training.masked_stage import MaskedStage

if TYPE_CHECKING:
    from training.journal import Tracker

GRID_COLUMNS = 4
LOGGED_IMAGES_TAG = "mlflow.loggedImages"  # MLflow looks for images where a run has it
_THUMBNAIL_PX = 256
_NAME_CHARS = 40

logger = logging.getLogger(__name__)


def paint_now(
    stage: MaskedStage,
    networks: Networks,
    defaults: PainterDefaults,
    rank: int,
    world_size: int,
    is_sharded: bool,
) -> list[Image.Image]:
    """The grid's prompts painted by the stage as it is, with averaged weights if they are kept.

    All workers call it between two steps; each paints a share, and all get all. Where networks are
    in parts every worker paints everything, for they meet in every block. What training computes
    afterwards is bit for bit what it would have been. Takes one more copy of what learns.
    """
    grid = stage.config.sample_grid
    count = len(grid.prompts)
    share = count if is_sharded else -(-count // world_size)
    first = 0 if is_sharded else rank * share
    mine = [min(first + index, count - 1) for index in range(share)]  # the last one fills up
    try:
        with _as_painter(stage, networks, defaults) as painter:
            images = paint_grid(painter, grid, mine, stage.config.precision == "bf16")
    except torch.OutOfMemoryError:
        if is_sharded:
            raise  # the others stand in a block
        logger.warning("step %d: memory does not suffice to paint; black images", stage.step)
        side_px = defaults.resolution_px
        images = [Image.new("RGB", (side_px, side_px)) for _ in mine]
    if is_sharded or world_size == 1:
        return images
    pixels = np.stack([np.asarray(image) for image in images])
    ours = torch.from_numpy(pixels).to(stage.transformer.context_embedder.weight.device)
    theirs = [torch.empty_like(ours) for _ in range(world_size)]
    torch.distributed.all_gather(theirs, ours)
    everything = torch.cat(theirs)[:count].cpu().numpy()
    return [Image.fromarray(each) for each in everything]


def paint_grid(
    painter: TextToImage, grid: SampleGridConfig, numbers: Sequence[int], in_bf16: bool
) -> list[Image.Image]:
    """One image for each of these of the grid's prompts; the same in whatever company."""
    return painter.generate(
        [grid.prompts[number] for number in numbers],
        steps=grid.steps,
        guidance_scale=grid.guidance_scale,
        temperature=grid.temperature,
        seeds=[grid.seed + number for number in numbers],
        dtype=torch.bfloat16 if in_bf16 else None,
        batch_size=1,  # a GPU in training has little room
    )


@contextmanager
def _as_painter(
    stage: MaskedStage, networks: Networks, defaults: PainterDefaults
) -> Iterator[TextToImage]:
    """A painter of networks in training, which are what they were after the block."""
    learning = [stage.transformer, stage.text_encoder, *([stage.lora] if stage.lora else [])]
    modes = [(module, module.training) for part in learning for module in part.modules()]
    painter = TextToImage(
        stage.transformer, networks.vq, stage.text_encoder, stage.tokenizer, defaults
    )
    lies_on = next(networks.vq.parameters()).device
    cuda: Any = torch.cuda
    gpus = [cuda.current_device()] if cuda.is_available() else []
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=gpus))
        if stage.config.compile:  # other shapes than training's would be compiled for minutes
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        if stage.ema is not None:
            stack.enter_context(stage.ema.as_weights())
        stack.callback(_let_go, learning)  # of averages that are put together
        stack.callback(networks.vq.to, lies_on)
        for part in (*learning, networks.vq.to(painter.device)):
            part.eval()
        try:
            yield painter
        finally:
            for module, mode in modes:
                module.training = mode


def _let_go(parts: Sequence[torch.nn.Module]) -> None:
    """Have workers put their parts together anew when they are needed next."""
    for part in parts:
        for module in part.modules():
            reshard: Any = getattr(module, "reshard", None)
            if reshard is not None:
                reshard()


def log_pictures(
    tracker: Tracker, prompts: Sequence[str], images: Sequence[Image.Image], step: int
) -> None:
    """One series per prompt. A step that is painted again replaces its pictures."""
    for number, (prompt, image) in enumerate(zip(prompts, images, strict=True)):
        words = re.sub(r"[^\w\-. ]+", " ", prompt, flags=re.ASCII)[:_NAME_CHARS].strip()
        series = f"samples~{number:02d} {words}".rstrip()
        name = f"images/{series}+step+{step}+timestamp+{step}+{_id_of(series, step)}"
        tracker.log_artifact(_encoded(image, "PNG"), f"{name}.png")
        small = image.copy()
        small.thumbnail((_THUMBNAIL_PX, _THUMBNAIL_PX))
        tracker.log_artifact(_encoded(small, "WEBP"), f"{name}+compressed.webp")
    tracker.set_tag(LOGGED_IMAGES_TAG, "True")


def _id_of(series: str, step: int) -> uuid.UUID:
    return uuid.uuid5(uuid.NAMESPACE_OID, f"{series} {step}")


def tile(images: Sequence[Image.Image]) -> bytes:
    """The images in rows of four, as a PNG."""
    width, height = images[0].size
    num_rows = -(-len(images) // GRID_COLUMNS)
    sheet = Image.new("RGB", (GRID_COLUMNS * width, num_rows * height), "white")
    for number, image in enumerate(images):
        row, column = divmod(number, GRID_COLUMNS)
        sheet.paste(image, (column * width, row * height))
    return _encoded(sheet, "PNG")


def _encoded(image: Image.Image, format_name: str) -> bytes:
    sink = io.BytesIO()
    image.save(sink, format_name)
    return sink.getvalue()
