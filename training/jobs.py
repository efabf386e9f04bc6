"""What a worker trains, behind one face: the tokenizer (stage 0) or a masked stage.

A job knows how to make its next step, which tensors a checkpoint needs, and how to export itself.
``training.loop`` drives it, ``training.worker`` builds it.
"""

from __future__ import annotations

import io
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as distributed
from PIL import Image
from torch import Tensor, nn

from infra.errors import UserError
from model import CLIPTextEncoder, CLIPTokenizer, TextToImage, VQTokenizer
from model.text_to_image import PainterDefaults
from training import masked_stage, tokenizer_stage
from training.checkpoint import Checkpoint, restore_optimizer
from training.config import SampleGridConfig
from training.data import TokenDataset
from training.masked_stage import MaskedStage
from training.order import rank_slice
from training.tokenizer_stage import StoredImage, TokenizerStage

SHOWN_RECONSTRUCTIONS = 8
HELD_OUT_IMAGES = 64  # for the reconstruction error; never trained on


@dataclass(frozen=True)
class StepMetrics:
    """One optimizer step: numbers for MLflow, and how many images it saw over all workers."""

    values: Mapping[str, float]
    num_images: int

    @property
    def loss(self) -> float:
        """The step's loss."""
        return self.values["loss"]


class Job(ABC):
    """Something that is trained step by step."""

    steps: int
    log_interval_steps: int
    checkpoint_interval_seconds: float

    @property
    @abstractmethod
    def step(self) -> int:
        """Finished optimizer steps."""

    @property
    @abstractmethod
    def networks(self) -> dict[str, nn.Module]:
        """The modules that a device holds."""

    @property
    @abstractmethod
    def optimizer(self) -> torch.optim.Optimizer:
        """Its parameter groups carry ``names``."""

    @abstractmethod
    def run_step(self, device: torch.device) -> StepMetrics:
        """Make the next step."""

    @abstractmethod
    def weights(self) -> dict[str, Tensor]:
        """What a checkpoint keeps besides the optimizer."""

    @abstractmethod
    def restore(self, checkpoint: Checkpoint) -> None:
        """Go on from a checkpoint."""

    @abstractmethod
    def export(self, folder: Path) -> dict[str, float]:
        """Write the published layout; returns metrics that only the finished model has."""

    @abstractmethod
    def picture(self) -> Image.Image | None:
        """What the finished model can do, for people."""


class MaskedJob(Job):
    """A masked stage on cached tokens."""

    def __init__(
        self,
        stage: MaskedStage,
        dataset: TokenDataset,
        vq: VQTokenizer,
        defaults: PainterDefaults,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.stage, self.dataset, self.vq, self.defaults = stage, dataset, vq, defaults
        config = stage.config
        self.steps = config.steps
        self.log_interval_steps = config.log_interval_steps
        self.checkpoint_interval_seconds = config.checkpoint_interval_seconds
        self._world_size = world_size
        self._rows = rank_slice(config.global_batch_size, rank, world_size)

    @property
    def step(self) -> int:
        return self.stage.step

    @property
    def networks(self) -> dict[str, nn.Module]:
        return {"transformer": self.stage.transformer, "text_encoder": self.stage.text_encoder}

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        return self.stage.optimizer

    def run_step(self, device: torch.device) -> StepMetrics:
        stage = self.stage
        batch = self.dataset.batch_at(stage.step, self._rows)
        inputs = masked_stage.step_inputs(
            batch, stage.config, stage.tokenizer, stage.step, self._rows
        )
        loss = masked_stage.backward(stage, inputs.to(device), self._world_size)
        if self._world_size > 1:
            loss = average_over_workers(stage.optimizer, loss, self._world_size)
        result = masked_stage.apply_update(stage, loss, batch.sample_ids)
        values = {
            "loss": result.loss,
            "grad_norm": result.grad_norm,
            "learning_rate": result.learning_rate,
        }
        return StepMetrics(values, stage.config.global_batch_size)

    def weights(self) -> dict[str, Tensor]:
        tensors = {name: p.detach() for name, p in masked_stage.named_trained(self.optimizer)}
        for name, average in (self.stage.ema or {}).items():
            tensors[f"ema.{name}"] = average
        return tensors

    def restore(self, checkpoint: Checkpoint) -> None:
        with torch.no_grad():
            for name, parameter in masked_stage.named_trained(self.optimizer):
                parameter.copy_(checkpoint.weights[name])
            for name, average in (self.stage.ema or {}).items():
                average.copy_(checkpoint.weights[f"ema.{name}"])
        restore_optimizer(self.optimizer, checkpoint.optimizer)
        self.stage.step = checkpoint.state.step

    def painter(self) -> TextToImage:
        """The stage's networks, ready to paint."""
        parts = self.stage
        return TextToImage(
            parts.transformer.eval(),
            self.vq,
            parts.text_encoder.eval(),
            parts.tokenizer,
            self.defaults,
        )

    def export(self, folder: Path) -> dict[str, float]:
        masked_stage.use_averaged_weights(self.stage)
        self.painter().save_pretrained(folder)
        return {}

    def picture(self) -> Image.Image | None:
        grid = self.stage.config.sample_grid
        return sample_grid(self.painter(), grid, len(grid.prompts)) if grid.prompts else None


def average_over_workers(optimizer: torch.optim.Optimizer, loss: Tensor, world_size: int) -> Tensor:
    """Replace every gradient by its mean over the workers; returns the mean of ``loss``."""
    gradients = [
        parameter.grad
        for group in optimizer.param_groups
        for parameter in group["params"]
        if parameter.grad is not None
    ]
    flat = torch.cat([loss.reshape(1), *(gradient.flatten() for gradient in gradients)])
    distributed.all_reduce(flat)
    flat /= world_size
    taken = 1
    for gradient in gradients:
        gradient.copy_(flat[taken : taken + gradient.numel()].view_as(gradient))
        taken += gradient.numel()
    return flat[0]


def sample_grid(painter: TextToImage, grid: SampleGridConfig, columns: int) -> Image.Image:
    """The grid's prompts side by side."""
    images = painter.generate(
        list(grid.prompts),
        steps=grid.steps,
        guidance_scale=grid.guidance_scale,
        temperature=grid.temperature,
        seed=grid.seed,
    )
    return tile(images, columns)


def tile(images: Sequence[Image.Image], columns: int) -> Image.Image:
    """Images of one size in rows of ``columns``."""
    width, height = images[0].size
    rows = -(-len(images) // columns)
    sheet = Image.new("RGB", (width * columns, height * rows), "white")
    for number, image in enumerate(images):
        sheet.paste(image, (width * (number % columns), height * (number // columns)))
    return sheet


class TokenizerJob(Job):
    """Stage 0: the image tokenizer learns, beside a vocabulary and a text encoder that are made.

    ``stage`` is None when the image tokenizer is pretrained: then there is nothing to step.
    """

    def __init__(
        self,
        stage: TokenizerStage | None,
        vq: VQTokenizer,
        images: Sequence[StoredImage],
        tokenizer: CLIPTokenizer,
        text_encoder: CLIPTextEncoder,
    ) -> None:
        self.stage, self.vq = stage, vq
        self.tokenizer, self.text_encoder = tokenizer, text_encoder
        self._held_out, self._images = images[:HELD_OUT_IMAGES], images[HELD_OUT_IMAGES:]
        if stage is not None and not self._images:
            raise UserError(
                expected=f"more than {HELD_OUT_IMAGES} images to train the tokenizer on",
                got=str(len(images)),
                remedy="curate more, or give tokenizer.pretrained",
            )
        config = stage.config if stage else None
        self.steps = config.training.steps if config else 0
        self.log_interval_steps = config.log_interval_steps if config else 1
        self.checkpoint_interval_seconds = config.checkpoint_interval_seconds if config else 60.0

    @property
    def _trained(self) -> TokenizerStage:
        if self.stage is None:
            raise RuntimeError("a pretrained tokenizer has no training steps")
        return self.stage

    @property
    def step(self) -> int:
        return self.stage.step if self.stage else 0

    @property
    def networks(self) -> dict[str, nn.Module]:
        return {"vq": self.vq}

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        return self._trained.optimizer

    def run_step(self, device: torch.device) -> StepMetrics:
        stage = self._trained
        num_images = 0

        def batch_at(step: int) -> Tensor:
            nonlocal num_images
            batch = tokenizer_stage.tokenizer_batch(self._images, stage.config, step)
            num_images = len(batch)
            return batch.to(device)

        result = tokenizer_stage.run_step(stage, batch_at)
        values = {
            "loss": result.loss,
            "reconstruction_error": result.error,
            "code_share": result.code_share,
            "grad_norm": result.grad_norm,
            "learning_rate": result.learning_rate,
        }
        return StepMetrics(values, num_images)

    def weights(self) -> dict[str, Tensor]:
        stage = self._trained
        tensors = {f"vq.{name}": tensor for name, tensor in self.vq.state_dict().items()}
        tensors["code_uses_K"], tensors["code_sums_KC"] = stage.code_uses_K, stage.code_sums_KC
        return tensors

    def restore(self, checkpoint: Checkpoint) -> None:
        stage, saved = self._trained, checkpoint.weights
        prefix = "vq."
        self.vq.load_state_dict(
            {n.removeprefix(prefix): t for n, t in saved.items() if n.startswith(prefix)}
        )
        stage.code_uses_K, stage.code_sums_KC = saved["code_uses_K"], saved["code_sums_KC"]
        restore_optimizer(stage.optimizer, checkpoint.optimizer)
        stage.step = checkpoint.state.step

    def export(self, folder: Path) -> dict[str, float]:
        self.vq.eval().save_pretrained(folder / "vqvae")
        self.tokenizer.save_pretrained(folder / "tokenizer")
        self.text_encoder.save_pretrained(folder / "text_encoder")
        if not self._held_out:
            return {}
        pairs = self._reconstructions(self._held_out)
        errors = [np.abs(a.astype(np.float32) - b).mean() / 255 for a, b in pairs]
        return {"reconstruction_error": float(np.mean(errors))}

    def picture(self) -> Image.Image | None:
        if not self._held_out:
            return None
        pairs = self._reconstructions(self._held_out[:SHOWN_RECONSTRUCTIONS])
        rows = [*(a for a, _ in pairs), *(b for _, b in pairs)]
        side = min(min(pixels.shape[:2]) for pixels in rows)
        return tile([Image.fromarray(p[:side, :side]) for p in rows], len(pairs))

    @torch.no_grad()
    def _reconstructions(self, images: Sequence[StoredImage]) -> list[tuple[Any, Any]]:
        """(image, its reconstruction), uint8, cut to what the tokenizer divides."""
        factor = self.vq.downsample_factor
        device = next(self.vq.parameters()).device
        pairs = []
        for image in images:
            height, width = (side // factor * factor for side in image.shape[:2])
            cut = image[:height, :width]
            pixels = torch.from_numpy(cut.copy()).to(device).permute(2, 0, 1)[None].float() / 255
            back = self.vq.decode(self.vq.encode(pixels))[0].permute(1, 2, 0).cpu().numpy()
            pairs.append((cut, (back * 255).round().astype(np.uint8)))
        return pairs


def png_bytes(image: Image.Image) -> bytes:
    """The image as PNG."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()
