"""The image tokenizer: a convolutional auto-encoder whose latents are codebook entries (`VQModel`).

Shape suffixes: B batch, 3 colour channels in [0, 1], H/W pixels or token rows/columns, C latent
channels, N positions, K codebook entries.
"""

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.checkpoint import (
    DIFFUSERS_STEM,
    load_module,
    out_of_range,
    parse_config,
    read_json,
    write_module,
    write_whole,
)
from model.errors import ModelError
from model.vq_layers import Decoder, Encoder, init_convolutions

# Distances are made for this many positions at a time: 128 MB with 8192 codes.
_NEAREST_CHUNK = 4096
_MOST_LEVELS = 8
_LARGEST = {
    "in_channels": 64,
    "out_channels": 64,
    "block_out_channels": 1 << 14,
    "layers_per_block": 100,
    "latent_channels": 1 << 14,
    "num_vq_embeddings": 1 << 24,
    "norm_num_groups": 1 << 14,
}


class Quantized(NamedTuple):
    """What quantising latents_BCHW gives.

    `quantized_BCHW` has the codebook's values and passes gradients straight to the latents.
    `codebook_loss` pulls entries to latents, `commitment_loss` latents to entries; both are mean
    squares.
    """

    quantized_BCHW: Tensor
    tokens_BHW: Tensor
    codebook_loss: Tensor
    commitment_loss: Tensor


@dataclass(frozen=True)
class VQConfig:
    """A published vqvae/config.json (`VQModel`)."""

    in_channels: int = 3
    out_channels: int = 3
    down_block_types: tuple[str, ...] = ("DownEncoderBlock2D",)
    up_block_types: tuple[str, ...] = ("UpDecoderBlock2D",)
    block_out_channels: tuple[int, ...] = (
        64,
    )  # channels per level; each level after the first halves the image
    layers_per_block: int = 1
    act_fn: str = "silu"
    latent_channels: int = 3
    sample_size: int = 32  # published, without effect
    num_vq_embeddings: int = 256  # codebook entries
    norm_num_groups: int = 32
    vq_embed_dim: int | None = None  # channels of a codebook entry; None is latent_channels
    scaling_factor: float = 0.18215  # published, without effect on tokens
    norm_type: str = "group"
    mid_block_add_attention: bool = True
    lookup_from_codebook: bool = False  # published; decoding tokens always looks up
    force_upcast: bool = False  # run in float32 even when float16 weights are asked for

    def __post_init__(self) -> None:
        problems = out_of_range(self, _LARGEST)
        num_levels = len(self.block_out_channels)
        if (
            set(self.down_block_types) != {"DownEncoderBlock2D"}
            or len(self.down_block_types) != num_levels
        ):
            problems.append(f"down_block_types must be {num_levels} times 'DownEncoderBlock2D'")
        if (
            set(self.up_block_types) != {"UpDecoderBlock2D"}
            or len(self.up_block_types) != num_levels
        ):
            problems.append(f"up_block_types must be {num_levels} times 'UpDecoderBlock2D'")
        if self.act_fn not in ("silu", "swish"):
            problems.append(f"act_fn is {self.act_fn!r}: expected 'silu'")
        if self.norm_type != "group":
            problems.append(f"norm_type is {self.norm_type!r}: expected 'group'")
        if not 1 <= num_levels <= _MOST_LEVELS:
            problems.append(f"block_out_channels has {num_levels}: expected 1 to {_MOST_LEVELS}")
        if not 1 <= self.codebook_dim <= _LARGEST["latent_channels"]:
            problems.append(f"vq_embed_dim is {self.vq_embed_dim}: expected at least 1")
        groups = max(1, self.norm_num_groups)
        if bad := [c for c in self.block_out_channels if c % groups]:
            problems.append(
                f"block_out_channels {bad} are no multiples of norm_num_groups "
                f"{self.norm_num_groups}"
            )
        if problems:
            raise ModelError("vqvae config: " + "; ".join(problems))

    @classmethod
    def small(
        cls, block_out_channels: tuple[int, ...], num_vq_embeddings: int, latent_channels: int
    ) -> "VQConfig":
        """A tokenizer without mid-block attention; each level after the first halves the image."""
        return cls(
            down_block_types=("DownEncoderBlock2D",) * len(block_out_channels),
            up_block_types=("UpDecoderBlock2D",) * len(block_out_channels),
            block_out_channels=block_out_channels,
            latent_channels=latent_channels,
            num_vq_embeddings=num_vq_embeddings,
            norm_num_groups=_few_groups(block_out_channels),
            mid_block_add_attention=False,
            lookup_from_codebook=True,
            force_upcast=True,
        )

    @property
    def codebook_dim(self) -> int:
        """Channels of a codebook entry."""
        return self.latent_channels if self.vq_embed_dim is None else self.vq_embed_dim

    @property
    def downsample_factor(self) -> int:
        """Pixels per token along each side."""
        return int(2 ** (len(self.block_out_channels) - 1))

    def to_json(self) -> dict[str, Any]:
        """The config.json this was (or will be) read from."""
        return {"_class_name": "VQModel", **asdict(self)}


def _few_groups(block_out_channels: tuple[int, ...]) -> int:
    """Norm groups of at least eight channels, as many as divide every width.

    A group of one or two channels would take the absolute colour out of the features.
    """
    most = max(1, min(32, min(block_out_channels) // 8))
    return math.gcd(1 << (most.bit_length() - 1), *block_out_channels)


class Codebook(nn.Module):
    """The table of entries and the search for the nearest one."""

    def __init__(self, num_entries: int, num_channels: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(num_entries, num_channels)
        if self.embedding.weight.device.type != "meta":
            nn.init.uniform_(self.embedding.weight, -1.0 / num_entries, 1.0 / num_entries)

    @torch.no_grad()
    def nearest(self, latents_BCHW: Tensor) -> Tensor:
        """tokens_BHW: the entry with the least Euclidean distance, searched in float32."""
        batch, num_channels, height, width = latents_BCHW.shape
        with torch.autocast(latents_BCHW.device.type, enabled=False):
            rows_NC = latents_BCHW.float().permute(0, 2, 3, 1).reshape(-1, num_channels)
            entries_KC = self.embedding.weight.float()
            squares_K = entries_KC.square().sum(dim=1)
            tokens_N = torch.cat(
                [
                    torch.addmm(squares_K, chunk_NC, entries_KC.T, alpha=-2).argmin(dim=1)
                    for chunk_NC in torch.split(rows_NC, _NEAREST_CHUNK)
                ]
            )
        return tokens_N.view(batch, height, width)

    def lookup(self, tokens_BHW: Tensor) -> Tensor:
        """The entries of tokens_BHW as latents_BCHW."""
        out: Tensor = self.embedding(tokens_BHW).permute(0, 3, 1, 2)
        return out

    def forward(self, latents_BCHW: Tensor) -> Quantized:
        tokens_BHW = self.nearest(latents_BCHW)
        entries_BCHW = self.lookup(tokens_BHW).float()
        latents_BCHW = latents_BCHW.float()
        return Quantized(
            quantized_BCHW=latents_BCHW + (entries_BCHW - latents_BCHW).detach(),
            tokens_BHW=tokens_BHW,
            codebook_loss=F.mse_loss(entries_BCHW, latents_BCHW.detach()),
            commitment_loss=F.mse_loss(latents_BCHW, entries_BCHW.detach()),
        )


class VQTokenizer(nn.Module):
    """Images in [0, 1] to tokens and back. `quantize(latents_BCHW)` gives the training terms."""

    def __init__(self, config: VQConfig) -> None:
        super().__init__()
        self.config = config
        shape = (
            config.block_out_channels,
            config.layers_per_block,
            config.norm_num_groups,
            config.mid_block_add_attention,
        )
        self.encoder = Encoder(config.in_channels, config.latent_channels, *shape)
        self.quant_conv = nn.Conv2d(config.latent_channels, config.codebook_dim, 1)
        self.quantize = Codebook(config.num_vq_embeddings, config.codebook_dim)
        self.post_quant_conv = nn.Conv2d(config.codebook_dim, config.latent_channels, 1)
        self.decoder = Decoder(config.latent_channels, config.out_channels, *shape)
        if self.quant_conv.weight.device.type != "meta":
            init_convolutions(self)

    @property
    def downsample_factor(self) -> int:
        """Pixels per token along each side."""
        return self.config.downsample_factor

    def encode_latents(self, images_B3HW: Tensor) -> Tensor:
        """latents_BCHW before quantising. Raises ModelError unless the factor divides H and W."""
        factor = self.downsample_factor
        height, width = images_B3HW.shape[-2:]
        if images_B3HW.ndim != 4 or height % factor or width % factor or not height or not width:
            raise ModelError(
                f"images have shape {tuple(images_B3HW.shape)}: expected (batch, "
                f"{self.config.in_channels}, "
                f"height, width) with both sizes multiples of {factor} px"
            )
        out_BCHW: Tensor = self.quant_conv(
            self.encoder(images_B3HW.to(self.quant_conv.weight.dtype))
        )
        return out_BCHW

    def decode_latents(self, latents_BCHW: Tensor) -> Tensor:
        """images_B3HW, not clipped, from quantised latents."""
        out_B3HW: Tensor = self.decoder(
            self.post_quant_conv(latents_BCHW.to(self.quant_conv.weight.dtype))
        )
        return out_B3HW

    @torch.no_grad()
    def encode(self, images_B3HW: Tensor) -> Tensor:
        """tokens_BHW (int64) of images in [0, 1]."""
        return self.quantize.nearest(self.encode_latents(images_B3HW))

    @torch.no_grad()
    def decode(self, tokens_BHW: Tensor) -> Tensor:
        """images_B3HW in [0, 1] (float32) of tokens_BHW; ModelError for ids not in the codebook."""
        if (
            tokens_BHW.numel()
            and not 0
            <= int(tokens_BHW.min())
            <= int(tokens_BHW.max())
            < self.config.num_vq_embeddings
        ):
            raise ModelError(
                f"tokens run from {int(tokens_BHW.min())} to {int(tokens_BHW.max())}: expected "
                f"codebook entries "
                f"0 to {self.config.num_vq_embeddings - 1}; were masked tokens left?"
            )
        return self.decode_latents(self.quantize.lookup(tokens_BHW)).float().clamp(0, 1)

    def forward(self, images_B3HW: Tensor) -> tuple[Tensor, Quantized]:
        """(reconstruction_B3HW not clipped, Quantized): one training pass."""
        quantized = self.quantize(self.encode_latents(images_B3HW))
        return self.decode_latents(quantized.quantized_BCHW), quantized

    @torch.no_grad()
    def reset_codebook(self, vectors_KC: Tensor) -> None:
        """Replace all entries, for instance by a sample or the k-means of a batch's latents."""
        weight = self.quantize.embedding.weight
        if vectors_KC.shape != weight.shape:
            raise ModelError(
                f"codebook vectors have shape {tuple(vectors_KC.shape)}: expected "
                f"{tuple(weight.shape)}"
            )
        weight.copy_(vectors_KC)

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, dtype: torch.dtype = torch.float32
    ) -> "VQTokenizer":
        """Read the folder strictly. float16 becomes float32 where `force_upcast` says so."""
        folder = Path(folder)
        source = folder / "config.json"
        config = parse_config(VQConfig, read_json(source), str(source))
        if config.force_upcast and dtype == torch.float16:
            dtype = torch.float32
        return load_module(lambda: cls(config), folder, DIFFUSERS_STEM, dtype)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the published layout whole: a reader sees the old folder or the new."""
        write_whole(
            folder,
            lambda staging: write_module(staging, self, self.config.to_json(), DIFFUSERS_STEM),
        )
