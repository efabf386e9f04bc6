"""The masked image transformer: predicts every masked token of an image from the rest and the text.

Shape suffixes: B batch, H token rows, W token columns, h/w rows and columns inside the transformer,
T text tokens, D text channels, P pooled text channels, C channels, V codebook size, N chosen
tokens, 5 the micro-conditions (original width, original height, crop top, crop left, preference
score).
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from model.blocks import GridBlock, GridResampler, JointBlock, Rotary, SingleBlock
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
from model.layers import (
    SINUSOID_CHANNELS,
    Modulation,
    PointwiseConv,
    RMSNorm,
    TwoLayer,
    init_linear,
    sinusoid,
)
from model.positions import rotary_tables
from model.schedule import STEP_INDEX, TIMESTEP_CONVENTIONS

NUM_MICRO_CONDITIONS = 5
TIMESTEP_SCALE = 1000.0
_MAX_CACHED_GRIDS = 32
_LARGEST = {
    "num_layers": 1000,
    "num_single_layers": 1000,
    "attention_head_dim": 1 << 12,
    "num_attention_heads": 1 << 12,
    "joint_attention_dim": 1 << 16,
    "pooled_projection_dim": 1 << 16,
    "vocab_size": 1 << 24,
    "codebook_size": 1 << 24,
}
_START_GATE = 0.1  # how far a fresh network's residual branches are open


@dataclass(frozen=True)
class TransformerConfig:
    """A published transformer/config.json; `timestep_convention` is this project's one addition."""

    patch_size: int = 1  # published, without effect
    in_channels: int = 64  # published, without effect
    num_layers: int = 19  # two-stream blocks
    num_single_layers: int = 38  # one-stream blocks
    attention_head_dim: int = 128  # channels per head
    num_attention_heads: int = 24
    joint_attention_dim: int = 4096  # channels of the text states
    pooled_projection_dim: int = 768  # channels of the pooled text
    guidance_embeds: bool = False  # published, unused; true is refused
    axes_dims_rope: tuple[int, ...] = (16, 56, 56)  # channels of a head per position axis
    vocab_size: int = 8256  # codebook and special tokens; the last one is the mask
    codebook_size: int = 8192
    downsample: bool = False  # downsample and upsample together: the network compresses
    upsample: bool = False
    timestep_convention: str = STEP_INDEX  # what `timestep` means: "step_index" or "mask_ratio"

    def __post_init__(self) -> None:
        problems = out_of_range(self, _LARGEST)
        if self.guidance_embeds:
            problems.append("guidance_embeds is true: no published weights use it; set it to false")
        if self.downsample != self.upsample:
            problems.append(
                "downsample and upsample differ: a network compresses with both or with neither"
            )
        if len(self.axes_dims_rope) != 3 or any(dim % 2 for dim in self.axes_dims_rope):
            problems.append(f"axes_dims_rope is {self.axes_dims_rope}: expected three even numbers")
        if sum(self.axes_dims_rope) != self.attention_head_dim:
            problems.append(
                f"axes_dims_rope sums to {sum(self.axes_dims_rope)}: "
                f"expected attention_head_dim, {self.attention_head_dim}"
            )
        if self.vocab_size <= self.codebook_size:
            problems.append(
                f"vocab_size is {self.vocab_size}: expected more than codebook_size "
                f"{self.codebook_size}"
            )
        if self.timestep_convention not in TIMESTEP_CONVENTIONS:
            problems.append(
                f"timestep_convention is {self.timestep_convention!r}: expected one of "
                f"{TIMESTEP_CONVENTIONS}"
            )
        if problems:
            raise ModelError("transformer config: " + "; ".join(problems))

    @property
    def num_channels(self) -> int:
        """Channels of the residual stream: heads times channels per head."""
        return self.num_attention_heads * self.attention_head_dim

    @property
    def mask_token_id(self) -> int:
        """The id that stands for a masked token."""
        return self.vocab_size - 1

    @property
    def compresses(self) -> bool:
        """Whether the blocks see a token grid of half the height and width."""
        return self.downsample

    def to_json(self) -> dict[str, Any]:
        """The config.json this was (or will be) read from."""
        return {"_class_name": "Transformer2DModel", **asdict(self)}


class TokenEmbedding(nn.Module):
    """Token ids to channels: table, RMSNorm, 1x1 convolution."""

    def __init__(self, vocab_size: int, num_channels: int) -> None:
        super().__init__()
        self.embeddings = nn.Embedding(vocab_size, num_channels)
        self.layer_norm = RMSNorm(num_channels)
        self.conv = PointwiseConv(num_channels, num_channels)

    def forward(self, tokens_BHW: Tensor) -> Tensor:
        out_BHWC: Tensor = self.conv(self.layer_norm(self.embeddings(tokens_BHW)))
        return out_BHWC


class TokenHead(nn.Module):
    """Channels to codebook logits: 1x1 convolution, RMSNorm, 1x1 convolution."""

    def __init__(self, num_channels: int, codebook_size: int) -> None:
        super().__init__()
        self.conv1 = PointwiseConv(num_channels, num_channels)
        self.layer_norm = RMSNorm(num_channels)
        self.conv2 = PointwiseConv(num_channels, codebook_size)

    def forward(self, features: Tensor) -> Tensor:
        logits: Tensor = self.conv2(self.layer_norm(self.conv1(features)))
        return logits


class TimeTextEmbedding(nn.Module):
    """The blocks' condition: timestep plus `given_BC` (pooled text and micro-conditions)."""

    def __init__(self, num_channels: int) -> None:
        super().__init__()
        self.timestep_embedder = TwoLayer(SINUSOID_CHANNELS, num_channels)
        self.text_embedder = TwoLayer(num_channels, num_channels)

    def forward(self, timestep_B: Tensor, given_BC: Tensor) -> Tensor:
        time = self.timestep_embedder(sinusoid(timestep_B).to(given_BC.dtype))
        out: Tensor = time + self.text_embedder(given_BC)
        return out


class MaskedImageTransformer(nn.Module):
    """The published network, `Transformer2DModel`, with position ids made inside."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        self.gradient_checkpointing = False
        num_channels, num_heads = config.num_channels, config.num_attention_heads
        self.time_text_embed = TimeTextEmbedding(num_channels)
        self.context_embedder = nn.Linear(config.joint_attention_dim, num_channels)
        self.transformer_blocks = nn.ModuleList(
            JointBlock(num_channels, num_heads) for _ in range(config.num_layers)
        )
        self.single_transformer_blocks = nn.ModuleList(
            SingleBlock(num_channels, num_heads) for _ in range(config.num_single_layers)
        )
        self.embed = TokenEmbedding(config.vocab_size, num_channels)
        self.mlm_layer = TokenHead(num_channels, config.codebook_size)
        num_conditions = config.pooled_projection_dim + NUM_MICRO_CONDITIONS * SINUSOID_CHANNELS
        self.cond_embed = TwoLayer(num_conditions, num_channels, bias=False)
        self.encoder_proj_layer_norm = RMSNorm(num_channels)
        self.project_to_hidden_norm = RMSNorm(num_channels)
        self.project_to_hidden = nn.Linear(num_channels, num_channels, bias=False)
        self.project_from_hidden_norm = RMSNorm(num_channels)
        self.project_from_hidden = nn.Linear(num_channels, num_channels, bias=False)
        self.down_block = GridBlock(num_channels, downsample=config.downsample)
        self.up_block = GridBlock(num_channels, upsample=config.upsample)
        self._rotary: dict[tuple[int, int, int, torch.device], Rotary] = {}
        if self.context_embedder.weight.device.type != "meta":
            init_weights(self)

    @property
    def grid_multiple(self) -> int:
        """The token grid's height and width must be multiples of this."""
        return 2 if self.config.compresses else 1

    def forward(
        self,
        tokens_BHW: Tensor,
        text_states_BTD: Tensor,
        pooled_BP: Tensor,
        micro_conditions_B5: Tensor,
        timestep_B: Tensor,
    ) -> Tensor:
        """logits_BVHW for every position of tokens_BHW (int64; masked ones hold mask_token_id).

        `timestep_B` (or one value for all) is what `config.timestep_convention` says: a step index,
        or a mask ratio in [0, 1]; it is multiplied by 1000 inside. Raises ModelError for a grid
        that the compression does not divide.
        """
        features_BHWC = self.features(
            tokens_BHW, text_states_BTD, pooled_BP, micro_conditions_B5, timestep_B
        )
        logits_BHWV: Tensor = self.mlm_layer(features_BHWC)
        return logits_BHWV.permute(0, 3, 1, 2)

    def forward_masked(
        self,
        tokens_BHW: Tensor,
        text_states_BTD: Tensor,
        pooled_BP: Tensor,
        micro_conditions_B5: Tensor,
        timestep_B: Tensor,
        mask_BHW: Tensor,
    ) -> Tensor:
        """logits_NV at the positions where mask_BHW (bool) is true, in row-major order."""
        features_BHWC = self.features(
            tokens_BHW, text_states_BTD, pooled_BP, micro_conditions_B5, timestep_B
        )
        logits_NV: Tensor = self.mlm_layer(features_BHWC[mask_BHW])
        return logits_NV

    def features(
        self,
        tokens_BHW: Tensor,
        text_states_BTD: Tensor,
        pooled_BP: Tensor,
        micro_conditions_B5: Tensor,
        timestep_B: Tensor,
    ) -> Tensor:
        """features_BHWC, the head's input: `mlm_layer(features_BHWC)` is logits_BHWV."""
        self._check_grid(tokens_BHW)
        condition_BC = self._condition(pooled_BP, micro_conditions_B5, timestep_B)
        text_BTC = self.encoder_proj_layer_norm(self.context_embedder(text_states_BTD))
        grid_BhwC = self.down_block(self.embed(tokens_BHW))
        image_BLC = self.project_to_hidden(self.project_to_hidden_norm(grid_BhwC.flatten(1, 2)))
        height, width = grid_BhwC.shape[1:3]
        rotary = self._rotary_tables(text_BTC.shape[1], height, width, image_BLC.device)

        for block in self.transformer_blocks:
            text_BTC, image_BLC = self._run(block, text_BTC, image_BLC, condition_BC, rotary)
        joint_BSC = torch.cat((text_BTC, image_BLC), dim=1)
        for block in self.single_transformer_blocks:
            joint_BSC = self._run(block, joint_BSC, condition_BC, rotary)

        image_BLC = joint_BSC[:, text_BTC.shape[1] :]
        image_BLC = self.project_from_hidden(self.project_from_hidden_norm(image_BLC))
        features_BHWC: Tensor = self.up_block(image_BLC.view(len(image_BLC), height, width, -1))
        return features_BHWC

    def prepare(self, tokens_BHW: Tensor, text_states_BTD: Tensor) -> None:
        """Make what depends on the shapes alone, so that no compiled graph has to."""
        self._check_grid(tokens_BHW)
        height, width = (size // self.grid_multiple for size in tokens_BHW.shape[1:])
        self._rotary_tables(text_states_BTD.shape[1], height, width, tokens_BHW.device)

    def _run(self, block: nn.Module, *arguments: Any) -> Any:
        if self.gradient_checkpointing and self.training:
            return checkpoint(block, *arguments, use_reentrant=False)
        return block(*arguments)

    def _condition(
        self, pooled_BP: Tensor, micro_conditions_B5: Tensor, timestep_B: Tensor
    ) -> Tensor:
        """condition_BC from pooled text, micro-conditions and timestep; angles in float32."""
        dtype = self.context_embedder.weight.dtype
        micro = sinusoid(micro_conditions_B5.flatten()).view(len(pooled_BP), -1)
        given_BC = self.cond_embed(torch.cat((pooled_BP.to(dtype), micro.to(dtype)), dim=1))
        condition_BC: Tensor = self.time_text_embed(
            timestep_B.float().reshape(-1) * TIMESTEP_SCALE, given_BC
        )
        return condition_BC

    def _rotary_tables(
        self, num_text: int, height: int, width: int, device: torch.device
    ) -> Rotary:
        """Tables for this grid, computed once for each shape and device."""
        key = (num_text, height, width, device)
        if key not in self._rotary:
            if len(self._rotary) >= _MAX_CACHED_GRIDS:
                self._rotary.clear()
            with torch.inference_mode(False):  # what is kept must serve training as well
                self._rotary[key] = rotary_tables(
                    num_text, height, width, self.config.axes_dims_rope, device
                )
        return self._rotary[key]

    def _check_grid(self, tokens_BHW: Tensor) -> None:
        if tokens_BHW.ndim != 3:
            raise ModelError(
                f"tokens have shape {tuple(tokens_BHW.shape)}: expected (batch, rows, columns)"
            )
        if any(size % self.grid_multiple for size in tokens_BHW.shape[1:]):
            raise ModelError(
                f"token grid is {tokens_BHW.shape[1]} x {tokens_BHW.shape[2]}: a compressing "
                f"network needs "
                f"multiples of {self.grid_multiple}; choose an image size that is a multiple of "
                f"{self.grid_multiple} times the tokenizer's"
            )

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, dtype: torch.dtype = torch.float32
    ) -> "MaskedImageTransformer":
        """Read the folder strictly; raises ModelError with all that does not fit."""
        folder = Path(folder)
        config = parse_config(
            TransformerConfig, read_json(folder / "config.json"), str(folder / "config.json")
        )
        return load_module(lambda: cls(config), folder, DIFFUSERS_STEM, dtype)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the published layout whole: a reader sees the old folder or the new."""
        write_whole(
            folder,
            lambda staging: write_module(staging, self, self.config.to_json(), DIFFUSERS_STEM),
        )


def init_weights(transformer: MaskedImageTransformer) -> None:
    """Start for training from scratch: every block nearly an identity.

    Weights are truncated normals of gain one, biases zero. Modulations begin without shift and
    scale and with their gates a tenth open, whatever the condition. On small drawings the loss
    after 50 steps was 2.0 from this start, against 3.7 with a zero head and shut gates.
    """
    for module in transformer.modules():
        if isinstance(module, nn.Linear):
            init_linear(module.weight, module.in_features)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            nn.init.trunc_normal_(module.weight, std=0.02, a=-0.04, b=0.04)
        elif isinstance(module, PointwiseConv):
            init_linear(module.weight, module.weight.shape[1])
    for module in transformer.modules():
        if isinstance(module, Modulation):
            nn.init.zeros_(module.linear.weight)
            module.open_gates(_START_GATE)
    if transformer.config.compresses:
        init_compression(transformer)


def init_compression(transformer: MaskedImageTransformer) -> list[str]:
    """Start the compression layers as a 2x2 mean and a 2x2 copy; returns their names."""
    eye = torch.eye(transformer.config.num_channels)[:, :, None, None].expand(-1, -1, 2, 2)
    down, up = transformer.down_block.downsample, transformer.up_block.upsample
    if not isinstance(down, GridResampler) or not isinstance(up, GridResampler):
        raise ModelError("this network has no compression layers: use insert_compression")
    with torch.no_grad():
        down.conv.weight.copy_(eye / 4)
        up.conv.weight.copy_(eye)
        down.norm.weight.fill_(1.0)
        up.norm.weight.fill_(1.0)
    return [
        f"{prefix}.{name}"
        for prefix, layer in (("down_block.downsample", down), ("up_block.upsample", up))
        for name, _ in layer.named_parameters()
    ]
