"""From prompts to images: the folder that holds all parts, and the call that paints.

Shape suffixes: B images, H token rows, W token columns, T text tokens, 5 micro-conditions.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from model.checkpoint import read_json, write_json, write_whole
from model.errors import ModelError
from model.sampler import Condition, Progress, SamplingOptions, unmask
from model.schedule import mask_schedule
from model.text import CLIPTextEncoder, TextFeatures
from model.text_tokenizer import CLIPTokenizer
from model.transformer import MaskedImageTransformer
from model.vq import VQTokenizer

_PARTS = {
    "scheduler": ["scheduler", "Scheduler"],
    "text_encoder": ["transformers", "CLIPTextModelWithProjection"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "transformer": ["transformer", "Transformer2DModel"],
    "vqvae": ["diffusers", "VQModel"],
}
MAX_SEED = 2**64 - 1


@dataclass(frozen=True)
class PainterDefaults:
    """What model_index.json says beyond the published keys, and what is used when it says nothing."""

    text_tokens: int = 77  # length that prompts are cut or padded to
    preference_score: float = 6.0  # the last micro-condition
    resolution_px: int = 1024  # height and width when none is given
    masking_schedule: str = "cosine"


class TextToImage:
    """All parts of a text-to-image model, ready to paint."""

    def __init__(
        self,
        transformer: MaskedImageTransformer,
        vq: VQTokenizer,
        text_encoder: CLIPTextEncoder,
        tokenizer: CLIPTokenizer,
        defaults: PainterDefaults | None = None,
    ) -> None:
        """Raises ModelError, naming every disagreement, when the parts do not fit each other."""
        self.transformer, self.vq = transformer, vq
        self.text_encoder, self.tokenizer = text_encoder, tokenizer
        defaults = defaults or PainterDefaults()
        longest = text_encoder.config.max_position_embeddings
        self.defaults = replace(defaults, text_tokens=min(defaults.text_tokens, longest))
        self._check_parts()

    def _check_parts(self) -> None:
        config, text = self.transformer.config, self.text_encoder.config
        pairs = [
            (
                "codebook_size",
                config.codebook_size,
                "the tokenizer's num_vq_embeddings",
                self.vq.config.num_vq_embeddings,
            ),
            (
                "joint_attention_dim",
                config.joint_attention_dim,
                "the text encoder's hidden_size",
                text.hidden_size,
            ),
            (
                "pooled_projection_dim",
                config.pooled_projection_dim,
                "its projection_dim",
                text.projection_dim,
            ),
        ]
        problems = [
            f"{name} {mine} is not {other} {theirs}"
            for name, mine, other, theirs in pairs
            if mine != theirs
        ]
        if self.tokenizer.vocab_size > text.vocab_size:
            problems.append(
                f"the tokenizer has {self.tokenizer.vocab_size} ids, the text encoder {text.vocab_size}"
            )
        if problems:
            raise ModelError(
                "the parts of this model do not fit: transformer " + "; ".join(problems)
            )

    @property
    def device(self) -> torch.device:
        """Where the transformer is."""
        return self.transformer.context_embedder.weight.device

    def to(self, device: torch.device | str) -> "TextToImage":
        """Move all parts; returns self."""
        for part in (self.transformer, self.vq, self.text_encoder):
            part.to(device)
        return self

    @property
    def size_multiple_px(self) -> int:
        """Height and width must be multiples of this."""
        return self.vq.downsample_factor * self.transformer.grid_multiple

    def encode_prompts(self, prompts: Sequence[str]) -> TextFeatures:
        """Text features of each prompt, padded to `defaults.text_tokens`."""
        input_ids_BT = self.tokenizer(prompts, self.defaults.text_tokens)
        features: TextFeatures = self.text_encoder(input_ids_BT.to(self.device))
        return features

    @torch.no_grad()
    def generate(
        self,
        prompts: Sequence[str],
        height: int | None = None,
        width: int | None = None,
        steps: int = 48,
        guidance_scale: float = 9.0,
        seed: int = 0,
        seeds: Sequence[int] | None = None,
        negative_prompt: str = "",
        temperature: float | tuple[float, float] = (2.0, 0.0),
        preference_score: float | None = None,
        dtype: torch.dtype | None = None,
        batch_size: int | None = None,
        progress: Progress | None = None,
    ) -> list[Image.Image]:
        """One RGB image per prompt.

        height, width: pixels, multiples of `size_multiple_px`; None is the model's own resolution.
        guidance_scale: uncond + scale · (cond - uncond), uncond being `negative_prompt`; 1 is off.
        seed: image i uses seed + i, or seeds[i]; its picture does not depend on the rest of the batch.
        temperature: noise on the confidences, falling from the first value to the second (a single
        number falls to 0). dtype: compute type of the network (autocast), None is that of its weights.
        batch_size: images painted at a time, None is all. progress(steps done, steps in all, tokens_BHW).
        """
        tokens_BHW = self.generate_tokens(
            prompts, height, width, steps, guidance_scale, seed, seeds, negative_prompt, temperature,
            preference_score, dtype, batch_size, progress,
        )  # fmt: skip
        return [
            image
            for tokens in torch.split(tokens_BHW, batch_size or len(tokens_BHW))
            for image in self.decode(tokens)
        ]

    @torch.no_grad()
    def generate_tokens(
        self,
        prompts: Sequence[str],
        height: int | None = None,
        width: int | None = None,
        steps: int = 48,
        guidance_scale: float = 9.0,
        seed: int = 0,
        seeds: Sequence[int] | None = None,
        negative_prompt: str = "",
        temperature: float | tuple[float, float] = (2.0, 0.0),
        preference_score: float | None = None,
        dtype: torch.dtype | None = None,
        batch_size: int | None = None,
        progress: Progress | None = None,
    ) -> Tensor:
        """tokens_BHW of the images that `generate` would paint; same arguments."""
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        height_px, width_px = self.check_size(height, width)
        seeds = check_seeds(seed, seeds, len(prompts))
        options = SamplingOptions(
            steps,
            guidance_scale,
            as_range(temperature),
            mask_schedule(self.defaults.masking_schedule),
            dtype,
        )
        null = self.encode_prompts([negative_prompt]) if options.is_guided else None
        score = self.defaults.preference_score if preference_score is None else preference_score
        grid = (height_px // self.vq.downsample_factor, width_px // self.vq.downsample_factor)
        size = batch_size or len(prompts)
        batches = [
            range(len(prompts))[start : start + size] for start in range(0, len(prompts), size)
        ]
        painted = []
        for number, batch in enumerate(batches):
            text = self.encode_prompts([prompts[i] for i in batch])
            micro_B5 = self.micro_conditions(len(batch), height_px, width_px, score)
            blank_BHW = torch.full(
                (len(batch), *grid), self.transformer.config.mask_token_id, device=self.device
            )
            report = None if progress is None else _overall(progress, number, len(batches))
            condition = Condition(text, micro_B5, null)
            painted.append(
                unmask(
                    self.transformer,
                    blank_BHW,
                    condition,
                    [seeds[i] for i in batch],
                    options,
                    report,
                )
            )
        return torch.cat(painted)

    @torch.no_grad()
    def decode(self, tokens_BHW: Tensor) -> list[Image.Image]:
        """The RGB images of tokens_BHW."""
        pixels = (self.vq.decode(tokens_BHW) * 255).round().to(torch.uint8)
        return [Image.fromarray(np.asarray(image)) for image in pixels.permute(0, 2, 3, 1).cpu()]

    def micro_conditions(self, batch: int, height_px: int, width_px: int, score: float) -> Tensor:
        """micro_conditions_B5 of uncropped images of this size: width, height, 0, 0, preference score."""
        row = torch.tensor(
            [width_px, height_px, 0, 0, score], dtype=torch.float32, device=self.device
        )
        return row.expand(batch, -1)

    def check_size(self, height: int | None, width: int | None) -> tuple[int, int]:
        """(height, width) in pixels with the defaults filled in; ModelError unless both are multiples."""
        sizes = tuple(
            self.defaults.resolution_px if size is None else size for size in (height, width)
        )
        step = self.size_multiple_px
        if any(size < step or size % step for size in sizes):
            raise ModelError(
                f"image size is {sizes[0]} x {sizes[1]} px (height x width): expected multiples of {step} px"
            )
        return sizes[0], sizes[1]

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> "TextToImage":
        """Read a published Meissonic folder or one of ours. Raises ModelError, one line, for what does not fit."""
        folder = Path(folder)
        index = read_json(folder / "model_index.json")
        scheduler = read_json(folder / "scheduler" / "scheduler_config.json")
        transformer = MaskedImageTransformer.from_pretrained(folder / "transformer", dtype)
        if scheduler.get("mask_token_id") != transformer.config.mask_token_id:
            raise ModelError(
                f"{folder}: the scheduler's mask_token_id is {scheduler.get('mask_token_id')}: "
                f"expected {transformer.config.mask_token_id}, the transformer's last token"
            )
        known = {
            key: index[key]
            for key in ("text_tokens", "preference_score", "resolution_px")
            if key in index
        }
        defaults = PainterDefaults(
            **known, masking_schedule=scheduler.get("masking_schedule", "cosine")
        )
        mask_schedule(defaults.masking_schedule)
        painter = cls(
            transformer,
            VQTokenizer.from_pretrained(folder / "vqvae", dtype),
            CLIPTextEncoder.from_pretrained(folder / "text_encoder", dtype),
            CLIPTokenizer.from_pretrained(folder / "tokenizer"),
            defaults,
        )
        return painter.to(device)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write all parts in the published layout, whole: a reader sees the old folder or the new one."""
        write_whole(folder, self._write)

    def _write(self, folder: Path) -> None:
        self.transformer.save_pretrained(folder / "transformer")
        self.vq.save_pretrained(folder / "vqvae")
        self.text_encoder.save_pretrained(folder / "text_encoder")
        self.tokenizer.save_pretrained(folder / "tokenizer")
        (folder / "scheduler").mkdir()
        schedule = {
            "_class_name": "Scheduler",
            "mask_token_id": self.transformer.config.mask_token_id,
            "masking_schedule": self.defaults.masking_schedule,
        }
        write_json(folder / "scheduler" / "scheduler_config.json", schedule)
        ours = {
            "text_tokens": self.defaults.text_tokens,
            "preference_score": self.defaults.preference_score,
            "resolution_px": self.defaults.resolution_px,
        }
        write_json(folder / "model_index.json", {"_class_name": "Pipeline", **_PARTS, **ours})


def as_range(temperature: float | tuple[float, float]) -> tuple[float, float]:
    """(first, last) temperature; a single number falls to 0."""
    if isinstance(temperature, tuple | list):
        first, last = temperature
        return float(first), float(last)
    return float(temperature), 0.0


def check_seeds(seed: int, seeds: Sequence[int] | None, num_images: int) -> list[int]:
    """One seed per image: `seeds`, or seed, seed + 1, …; ModelError when they are too few or out of range."""
    result = list(range(seed, seed + num_images)) if seeds is None else [int(s) for s in seeds]
    if len(result) != num_images:
        raise ModelError(f"{len(result)} seeds for {num_images} prompts: expected one each")
    if any(not 0 <= s <= MAX_SEED for s in result):
        raise ModelError(f"seeds {result[0]} … {result[-1]} leave the range 0 to {MAX_SEED}")
    return result


def _overall(progress: Progress, batch: int, num_batches: int) -> Progress:
    """Count the steps of all batches together."""
    return lambda step, steps, tokens: progress(batch * steps + step, num_batches * steps, tokens)
