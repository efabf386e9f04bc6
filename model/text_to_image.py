"""From prompts to images: the folder that holds all parts, and the calls that paint.

Shape suffixes: B images, H token rows, W token columns, T text tokens, 5 micro-conditions.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Unpack

import torch
from PIL import Image
from torch import Tensor

from model import edit
from model.checkpoint import write_whole
from model.errors import ModelError
from model.folder import PainterDefaults, read_defaults, write_index
from model.hub import model_folder
from model.lora import LoRA
from model.memory import at_work_on, decode_in_tiles, encode_in_tiles, tile_tokens
from model.paint_options import PaintKeywords, PaintOptions
from model.pixels import MAX_SIDE_PX, Picture, to_images
from model.quantize import quantize
from model.sampler import Condition, unmask
from model.text import CLIPTextEncoder, TextFeatures
from model.text_tokenizer import CLIPTokenizer
from model.transformer import MaskedImageTransformer
from model.vq import VQTokenizer


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
        self.loras: list[LoRA] = []
        self.tile_px: int | None = None
        self.is_offloaded = False
        self._check_parts()

    def _check_parts(self) -> None:
        config, text = self.transformer.config, self.text_encoder.config
        num_codes, num_ids = self.vq.config.num_vq_embeddings, self.tokenizer.vocab_size
        problems = []
        if config.codebook_size != num_codes:
            problems.append(f"transformer codebook_size {config.codebook_size}, vqvae {num_codes}")
        widths = {"joint_attention_dim": "hidden_size", "pooled_projection_dim": "projection_dim"}
        for own, other in widths.items():
            if getattr(config, own) != getattr(text, other):
                known = f"transformer {own} {getattr(config, own)}"
                problems.append(f"{known}, text encoder {other} {getattr(text, other)}")
        if num_ids > text.vocab_size:
            problems.append(f"tokenizer has {num_ids} ids, text encoder {text.vocab_size}")
        if problems:
            raise ModelError("the parts of this model do not fit: " + "; ".join(problems))

    @property
    def device(self) -> torch.device:
        """Where the transformer is."""
        return self.transformer.context_embedder.weight.device

    def to(self, device: torch.device | str) -> "TextToImage":
        """Move all parts (of an offloaded painter those that stay there); returns self."""
        parts = [self.transformer, *self.loras]
        for part in parts if self.is_offloaded else (*parts, self.text_encoder, self.vq):
            part.to(device)
        return self

    def save_memory(
        self, quantize_to: str | None = None, offload: bool = False, tile_px: int | None = None
    ) -> "TextToImage":
        """Paint in less memory, before or after `to`; returns self.

        quantize_to: "int8" or "fp8", the type of most weights of the transformer and the text
        encoder. offload: text encoder and tokenizer lie in CPU memory, and are where the
        transformer is only while they work. tile_px: images of a larger side are encoded and
        decoded in tiles of this side.
        """
        if tile_px is not None:
            tile_tokens(tile_px, self.vq.downsample_factor)
            self.tile_px = tile_px
        if quantize_to is not None:
            quantize(self.transformer, quantize_to)
            quantize(self.text_encoder, quantize_to)
        if offload:
            self.is_offloaded = True
            for part in (self.text_encoder, self.vq):
                part.to("cpu")
        return self

    def load_lora(self, folder: str | Path, weight: float = 1.0) -> LoRA:
        """Put a folder's adapters on top of what is there; several add up. See `model.lora`."""
        parts = {"transformer": self.transformer, "text_encoder": self.text_encoder}
        self.loras.append(LoRA.from_pretrained(folder, parts, weight).to(self.device))
        return self.loras[-1]

    def remove_loras(self) -> None:
        """Take all adapters out."""
        while self.loras:
            self.loras.pop().detach()

    @property
    def size_multiple_px(self) -> int:
        """Height and width must be multiples of this."""
        return self.vq.downsample_factor * self.transformer.grid_multiple

    def encode_prompts(self, prompts: Sequence[str]) -> TextFeatures:
        """Text features of each prompt, cut or padded to `defaults.text_tokens`."""
        input_ids_BT = self.tokenizer(prompts, self.defaults.text_tokens)
        with at_work_on(self.device, self.text_encoder):
            features: TextFeatures = self.text_encoder(input_ids_BT.to(self.device))
        return features

    def generate(
        self,
        prompts: Sequence[str],
        height: int | None = None,
        width: int | None = None,
        **keywords: Unpack[PaintKeywords],
    ) -> list[Image.Image]:
        """One RGB image per prompt.

        height, width: pixels, multiples of `size_multiple_px`; None is the model's own resolution.
        The other keywords (steps, guidance_scale, seed, …) are those of `PaintOptions`.
        """
        tokens_BHW = self.generate_tokens(prompts, height, width, **keywords)
        return self.decode(tokens_BHW, keywords.get("batch_size"))

    def generate_tokens(
        self,
        prompts: Sequence[str],
        height: int | None = None,
        width: int | None = None,
        **keywords: Unpack[PaintKeywords],
    ) -> Tensor:
        """tokens_BHW of the images that `generate` would paint."""
        prompts = as_prompts(prompts)
        height_px, width_px = self.check_size(height, width)
        factor = self.vq.downsample_factor
        grid = (len(prompts), height_px // factor, width_px // factor)
        blank_BHW = torch.full(grid, self.transformer.config.mask_token_id, device=self.device)
        return self.fill(prompts, blank_BHW, PaintOptions(**keywords))

    def inpaint(
        self,
        prompts: Sequence[str],
        images: Sequence[Picture],
        masks: Sequence[Picture],
        strength: float = 1.0,
        feather_px: int = 0,
        **keywords: Unpack[PaintKeywords],
    ) -> list[Image.Image]:
        """Each image with the light part of its mask repainted; every other pixel is as it was.

        Images of any size and of every kind that `layers_of` reads, RGBA where some of it stays
        transparent, else RGB; masks of the image's size, as `to_masks` reads them. An image of more
        pixels than the model's resolution has is painted in a window around its mask, as
        `window_of` chooses it. feather_px: width inside the mask over which the painted part fades
        in. strength as in `edit`.
        """
        prompts = as_prompts(prompts)
        check_counts(len(prompts), images=len(images), masks=len(masks))
        options = PaintOptions(**keywords)
        return edit.inpaint(self, prompts, images, masks, strength, feather_px, options)

    def outpaint(
        self,
        prompts: Sequence[str],
        images: Sequence[Picture],
        left: int = 0,
        top: int = 0,
        right: int = 0,
        bottom: int = 0,
        feather_px: int = 0,
        **keywords: Unpack[PaintKeywords],
    ) -> list[Image.Image]:
        """Each image continued by these many pixels; its own pixels are as they were."""
        prompts = as_prompts(prompts)
        check_counts(len(prompts), images=len(images))
        sides = (left, top, right, bottom)
        return edit.outpaint(self, prompts, images, sides, feather_px, PaintOptions(**keywords))

    def edit(
        self,
        prompts: Sequence[str],
        images: Sequence[Picture],
        strength: float | None = None,
        sources: Sequence[str] | None = None,
        masks: Sequence[Picture] | None = None,
        operation: str | None = None,
        feather_px: int = 0,
        **keywords: Unpack[PaintKeywords],
    ) -> list[Image.Image]:
        """Each image as its prompt says; pixels that need not change are as they were.

        sources: what the images show now. With it (or an operation that works in one place) only
        tokens that both texts predict differently are painted; `operation` is a name of
        `OPERATIONS` and gives the defaults. masks: paint there instead. With none of them the whole
        image is painted anew, at its own size. strength in (0, 1]: the share of the steps that is
        run; below 1 a random part of the old tokens stays, as many as the mask schedule leaves at
        that point.
        """
        prompts = as_prompts(prompts)
        check_counts(len(prompts), images=len(images))
        if sources is not None:
            sources = as_prompts(sources)
            check_counts(len(prompts), sources=len(sources))
        if masks is not None:
            check_counts(len(prompts), masks=len(masks))
        return edit.edit(
            self,
            prompts,
            images,
            sources,
            masks,
            operation,
            strength,
            feather_px,
            PaintOptions(**keywords),
        )

    def find_change(
        self,
        prompts: Sequence[str],
        images: Sequence[Picture],
        sources: Sequence[str] | None = None,
        operation: str | None = None,
        **keywords: Unpack[PaintKeywords],
    ) -> list[Image.Image]:
        """A mask per image (white is to paint) of where `edit` would paint by itself."""
        prompts = as_prompts(prompts)
        check_counts(len(prompts), images=len(images))
        if sources is not None:
            sources = as_prompts(sources)
            check_counts(len(prompts), sources=len(sources))
        options = PaintOptions(**keywords)
        return edit.find_change(self, prompts, images, sources, operation, options)

    @torch.no_grad()
    def fill(
        self, prompts: list[str], tokens_BHW: Tensor, options: PaintOptions, first_step: int = 0
    ) -> Tensor:
        """tokens_BHW with its masked places filled, batch by batch; `first_step` as in `unmask`."""
        seeds, sampling = (
            options.image_seeds(len(prompts)),
            options.sampling(self.defaults.masking_schedule),
        )
        factor = self.vq.downsample_factor
        height_px, width_px = tokens_BHW.shape[1] * factor, tokens_BHW.shape[2] * factor
        batches = options.batches(len(prompts))
        painted, null = [], None
        for number, batch in enumerate(batches):
            told = prompts[batch.start : batch.stop]
            condition = self.condition(told, height_px, width_px, options, null)
            null = condition.null
            painted.append(
                unmask(
                    self.transformer,
                    tokens_BHW[batch.start : batch.stop],
                    condition,
                    seeds[batch.start : batch.stop],
                    sampling,
                    options.report(number, len(batches)),
                    first_step,
                )
            )
        return torch.cat(painted)

    @torch.no_grad()
    def condition(
        self,
        prompts: Sequence[str],
        height_px: int,
        width_px: int,
        options: PaintOptions,
        null: TextFeatures | None = None,
    ) -> Condition:
        """What the network is told about these images; `null`: what an earlier call had in it."""
        if null is None and options.sampling(self.defaults.masking_schedule).is_guided:
            negative = options.negative_prompt
            negative = self.defaults.negative_prompt if negative is None else negative
            null = self.encode_prompts([negative])
        score = options.preference_score
        score = self.defaults.preference_score if score is None else score
        micro_B5 = self.micro_conditions(len(prompts), height_px, width_px, score)
        return Condition(self.encode_prompts(prompts), micro_B5, null)

    @torch.no_grad()
    def decode(self, tokens_BHW: Tensor, batch_size: int | None = None) -> list[Image.Image]:
        """The RGB images of tokens_BHW, `batch_size` at a time (None is all)."""
        batches = torch.split(tokens_BHW, batch_size or len(tokens_BHW))
        return [image for tokens in batches for image in to_images(self.decode_pixels(tokens))]

    @torch.no_grad()
    def decode_pixels(self, tokens_BHW: Tensor) -> Tensor:
        """pixels_B3HW in [0, 1] of tokens_BHW."""
        with at_work_on(self.device, self.vq):
            if self.tile_px is None:
                return self.vq.decode(tokens_BHW)
            factor = self.vq.downsample_factor
            tile = tile_tokens(self.tile_px, factor)
            return decode_in_tiles(self.vq.decode, tokens_BHW, tile, factor)

    @torch.no_grad()
    def encode_pixels(self, pixels_B3HW: Tensor) -> Tensor:
        """tokens_BHW, on this painter's device, of pixels_B3HW in [0, 1]."""
        with at_work_on(self.device, self.vq):
            if self.tile_px is None:
                return self.vq.encode(pixels_B3HW.to(self.device))
            factor = self.vq.downsample_factor
            latents_BCHW = encode_in_tiles(
                lambda part_B3HW: self.vq.encode_latents(part_B3HW.to(self.device)),
                pixels_B3HW,
                tile_tokens(self.tile_px, factor),
                factor,
            )
            return self.vq.quantize.nearest(latents_BCHW)

    def micro_conditions(self, batch: int, height_px: int, width_px: int, score: float) -> Tensor:
        """micro_conditions_B5 of uncropped images of this size: width, height, 0, 0, score."""
        row = [float(width_px), float(height_px), 0.0, 0.0, float(score)]
        return torch.tensor(row, device=self.device).expand(batch, -1)

    def check_size(self, height: int | None, width: int | None) -> tuple[int, int]:
        """(height, width) with the defaults filled in; ModelError unless both are multiples."""
        height = self.defaults.resolution_px if height is None else height
        width = self.defaults.resolution_px if width is None else width
        step = self.size_multiple_px
        if any(not step <= size <= MAX_SIDE_PX or size % step for size in (height, width)):
            raise ModelError(
                f"image size is {height} x {width} px (height x width): "
                f"expected multiples of {step} px, from {step} to {MAX_SIDE_PX}"
            )
        return height, width

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> "TextToImage":
        """Read a published Meissonic folder or ours; ModelError names what does not fit.

        `folder` may also be the name of a model on a hub, as `model_folder` says.
        """
        folder = model_folder(folder)
        transformer = MaskedImageTransformer.from_pretrained(folder / "transformer", dtype)
        painter = cls(
            transformer,
            VQTokenizer.from_pretrained(folder / "vqvae", dtype),
            CLIPTextEncoder.from_pretrained(folder / "text_encoder", dtype),
            CLIPTokenizer.from_pretrained(folder / "tokenizer"),
            read_defaults(folder, transformer.config),
        )
        return painter.to(device)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write all parts whole: a reader sees the old folder or the new."""
        write_whole(folder, self._write)

    def _write(self, folder: Path) -> None:
        self.transformer.save_pretrained(folder / "transformer")
        self.vq.save_pretrained(folder / "vqvae")
        self.text_encoder.save_pretrained(folder / "text_encoder")
        self.tokenizer.save_pretrained(folder / "tokenizer")
        write_index(folder, self.defaults, self.transformer.config.mask_token_id)


def as_prompts(prompts: Sequence[str]) -> list[str]:
    """A list of at least one prompt; a single string is one prompt."""
    result = [prompts] if isinstance(prompts, str) else list(prompts)
    if not result:
        raise ModelError("there is no prompt: expected at least one")
    return result


def check_counts(num_prompts: int, **counts: int) -> None:
    """ModelError unless there are as many of each as there are prompts."""
    for name, count in counts.items():
        if count != num_prompts:
            raise ModelError(f"{count} {name} for {num_prompts} prompts: expected one each")
