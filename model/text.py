"""CLIP's text encoder: token ids to one state per token and one pooled vector.

Shape suffixes: B batch, T text tokens, D channels, P channels of the pooled vector.
"""

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.checkpoint import (
    TRANSFORMERS_STEM,
    load_module,
    out_of_range,
    parse_config,
    read_json,
    write_module,
    write_whole,
)
from model.errors import ModelError
from model.layers import softmax_attention

LEGACY_EOS_TOKEN_ID = 2
_LARGEST = {
    "vocab_size": 1 << 24,
    "hidden_size": 1 << 16,
    "intermediate_size": 1 << 20,
    "projection_dim": 1 << 16,
    "num_hidden_layers": 1000,
    "num_attention_heads": 1 << 12,
    "max_position_embeddings": 1 << 16,
}
# Older exports store this buffer; it only counts 0, 1, 2, …
_IGNORED_WEIGHTS = ("text_model.embeddings.position_ids",)


class TextFeatures(NamedTuple):
    """`hidden_BTD`: states before the last layer. `pooled_BP`: the end token's, projected."""

    hidden_BTD: Tensor
    pooled_BP: Tensor


@dataclass(frozen=True)
class CLIPTextConfig:
    """A published text_encoder/config.json (`CLIPTextModelWithProjection`)."""

    vocab_size: int = 49408
    hidden_size: int = 512
    intermediate_size: int = 2048
    projection_dim: int = 512
    num_hidden_layers: int = 12
    num_attention_heads: int = 8
    max_position_embeddings: int = 77  # longest sequence, tokens
    hidden_act: str = "quick_gelu"  # or "gelu"
    layer_norm_eps: float = 1e-5
    bos_token_id: int = 49406
    eos_token_id: int = 49407  # 2 stands for "the largest id", as older exports have it
    pad_token_id: int = 1

    def __post_init__(self) -> None:
        problems = out_of_range(self, _LARGEST)
        if self.hidden_act not in ("gelu", "quick_gelu"):
            problems.append(f"hidden_act is {self.hidden_act!r}: expected 'gelu' or 'quick_gelu'")
        if self.num_attention_heads > 0 and self.hidden_size % self.num_attention_heads:
            problems.append(
                f"hidden_size {self.hidden_size} is no multiple of {self.num_attention_heads} heads"
            )
        if self.layer_norm_eps < 0:
            problems.append(f"layer_norm_eps is {self.layer_norm_eps}: expected 0 or more")
        if problems:
            raise ModelError("text encoder config: " + "; ".join(problems))

    def to_json(self) -> dict[str, Any]:
        """The config.json this was (or will be) read from."""
        return {
            "architectures": ["CLIPTextModelWithProjection"],
            "model_type": "clip_text_model",
            "torch_dtype": "float32",
            **asdict(self),
        }


class TextAttention(nn.Module):
    """Causal self-attention: a token sees itself and those before it."""

    def __init__(self, num_channels: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q_proj = nn.Linear(num_channels, num_channels)
        self.k_proj = nn.Linear(num_channels, num_channels)
        self.v_proj = nn.Linear(num_channels, num_channels)
        self.out_proj = nn.Linear(num_channels, num_channels)

    def forward(self, x_BTD: Tensor) -> Tensor:
        query, key, value = (
            projection(x_BTD).view(*x_BTD.shape[:2], self.num_heads, -1).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        mixed = softmax_attention(query, key, value, is_causal=True)
        out: Tensor = self.out_proj(mixed.transpose(1, 2).flatten(2))
        return out


class TextFeedForward(nn.Module):
    """Linear, GELU (exact, or CLIP's x · sigmoid(1.702 x)), linear."""

    def __init__(self, config: CLIPTextConfig) -> None:
        super().__init__()
        self.is_quick = config.hidden_act == "quick_gelu"
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x_BTD: Tensor) -> Tensor:
        wide = self.fc1(x_BTD)
        out: Tensor = self.fc2(
            wide * torch.sigmoid(1.702 * wide) if self.is_quick else F.gelu(wide)
        )
        return out


class TextLayer(nn.Module):
    """Pre-norm attention and feed-forward, each added to its input."""

    def __init__(self, config: CLIPTextConfig) -> None:
        super().__init__()
        self.self_attn = TextAttention(config.hidden_size, config.num_attention_heads)
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = TextFeedForward(config)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, x_BTD: Tensor) -> Tensor:
        x_BTD = x_BTD + self.self_attn(self.layer_norm1(x_BTD))
        x_BTD = x_BTD + self.mlp(self.layer_norm2(x_BTD))
        return x_BTD


class TextEmbeddings(nn.Module):
    """Sum of a token's and a position's vector."""

    def __init__(self, config: CLIPTextConfig) -> None:
        super().__init__()
        self.token_embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.position_embedding = nn.Embedding(config.max_position_embeddings, config.hidden_size)

    def forward(self, input_ids_BT: Tensor) -> Tensor:
        out: Tensor = (
            self.token_embedding(input_ids_BT)
            + self.position_embedding.weight[: input_ids_BT.shape[1]]
        )
        return out


class TextEncoderLayers(nn.Module):
    """The stack of layers."""

    def __init__(self, config: CLIPTextConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(TextLayer(config) for _ in range(config.num_hidden_layers))


class TextModel(nn.Module):
    """Embeddings, layers and final norm under the published prefix `text_model`."""

    def __init__(self, config: CLIPTextConfig) -> None:
        super().__init__()
        self.embeddings = TextEmbeddings(config)
        self.encoder = TextEncoderLayers(config)
        self.final_layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)


class CLIPTextEncoder(nn.Module):
    """CLIP's text tower with its projection (published as `CLIPTextModelWithProjection`)."""

    def __init__(self, config: CLIPTextConfig) -> None:
        super().__init__()
        self.config = config
        self.text_model = TextModel(config)
        self.text_projection = nn.Linear(config.hidden_size, config.projection_dim, bias=False)
        if self.text_projection.weight.device.type != "meta":
            init_weights(self)

    def forward(self, input_ids_BT: Tensor) -> TextFeatures:
        """Features of input_ids_BT (int64). Raises ModelError when T exceeds the position table."""
        longest = self.config.max_position_embeddings
        if input_ids_BT.ndim != 2 or input_ids_BT.shape[1] > longest:
            raise ModelError(
                f"input_ids have shape {tuple(input_ids_BT.shape)}: expected (batch, at most "
                f"{longest} tokens)"
            )
        x_BTD = self.text_model.embeddings(input_ids_BT)
        *layers, last = self.text_model.encoder.layers
        for layer in layers:
            x_BTD = layer(x_BTD)
        rows = torch.arange(len(input_ids_BT), device=input_ids_BT.device)
        # Only the end token's state leaves the last layer, so the norm runs on that row alone.
        end_BD = self.text_model.final_layer_norm(
            last(x_BTD)[rows, self._end_positions(input_ids_BT)]
        )
        return TextFeatures(x_BTD, self.text_projection(end_BD))

    def _end_positions(self, input_ids_BT: Tensor) -> Tensor:
        """Where each sequence ends: its first end token, or with the legacy id 2 its largest id."""
        if self.config.eos_token_id == LEGACY_EOS_TOKEN_ID:
            return input_ids_BT.argmax(dim=1)
        return (input_ids_BT == self.config.eos_token_id).int().argmax(dim=1)

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, dtype: torch.dtype = torch.float32
    ) -> "CLIPTextEncoder":
        """Read the folder strictly; raises ModelError with all that does not fit."""
        folder = Path(folder)
        source = folder / "config.json"
        config = parse_config(CLIPTextConfig, read_json(source), str(source), ignore_unknown=True)
        return load_module(
            lambda: cls(config), folder, TRANSFORMERS_STEM, dtype, ignore=_IGNORED_WEIGHTS
        )

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the published layout whole: a reader sees the old folder or the new."""
        dtype = str(self.text_projection.weight.dtype).removeprefix("torch.")
        config = {**self.config.to_json(), "torch_dtype": dtype}
        write_whole(folder, lambda staging: write_module(staging, self, config, TRANSFORMERS_STEM))


def init_weights(encoder: CLIPTextEncoder) -> None:
    """CLIP's own start: residual branches shrink with the depth."""
    width, depth = encoder.config.hidden_size, encoder.config.num_hidden_layers
    branch_std = width**-0.5 * (2 * depth) ** -0.5
    for module in encoder.modules():
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)
        if isinstance(module, TextAttention):
            for projection in (module.q_proj, module.k_proj, module.v_proj):
                nn.init.normal_(projection.weight, std=width**-0.5)
            nn.init.normal_(module.out_proj.weight, std=branch_std)
        elif isinstance(module, TextFeedForward):
            nn.init.normal_(module.fc1.weight, std=math.sqrt(1 / (2 * width)))
            nn.init.normal_(module.fc2.weight, std=branch_std)
        elif isinstance(module, TextEmbeddings):
            nn.init.normal_(module.token_embedding.weight, std=0.02)
            nn.init.normal_(module.position_embedding.weight, std=0.01)
    nn.init.normal_(encoder.text_projection.weight, std=width**-0.5)
