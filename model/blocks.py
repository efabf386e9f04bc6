"""The two kinds of transformer block, and the layers that halve and double the token grid.

Shape suffixes: B batch, T text tokens, L image tokens, S = T + L, C channels, H rows, W columns.
`rotary` is the pair (cos_SF, sin_SF) of `model.positions`.
"""

import torch
from torch import Tensor, nn

from model.layers import (
    FeedForward,
    Modulation,
    RMSNorm,
    clip_half,
    gelu_linear,
    modulate,
    softmax_attention,
)
from model.positions import rotate

Rotary = tuple[Tensor, Tensor]


def attend(query: Tensor, key: Tensor, value: Tensor, rotary: Rotary) -> Tensor:
    """Softmax attention over (B, heads, S, A) with rotary positions; returns (B, S, heads · A)."""
    query = rotate(query, *rotary).to(value.dtype)
    key = rotate(key, *rotary).to(value.dtype)
    out: Tensor = softmax_attention(query, key, value).transpose(1, 2).flatten(2)
    return out


class SingleAttention(nn.Module):
    """Self-attention over one sequence; its output projection is the block's `proj_out`."""

    def __init__(self, num_channels: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.to_q = nn.Linear(num_channels, num_channels)
        self.to_k = nn.Linear(num_channels, num_channels)
        self.to_v = nn.Linear(num_channels, num_channels)
        self.norm_q = RMSNorm(num_channels // num_heads)
        self.norm_k = RMSNorm(num_channels // num_heads)

    def heads(self, x_BSC: Tensor) -> Tensor:
        """(B, S, C) seen as (B, heads, S, C / heads)."""
        return x_BSC.view(*x_BSC.shape[:2], self.num_heads, -1).transpose(1, 2)

    def forward(self, x_BSC: Tensor, rotary: Rotary) -> Tensor:
        query = self.norm_q(self.heads(self.to_q(x_BSC)))
        key = self.norm_k(self.heads(self.to_k(x_BSC)))
        return attend(query, key, self.heads(self.to_v(x_BSC)), rotary)


class JointAttention(SingleAttention):
    """Attention over text and image together; each has its own projections."""

    def __init__(self, num_channels: int, num_heads: int) -> None:
        super().__init__(num_channels, num_heads)
        self.to_out = nn.ModuleList([nn.Linear(num_channels, num_channels)])
        self.add_q_proj = nn.Linear(num_channels, num_channels)
        self.add_k_proj = nn.Linear(num_channels, num_channels)
        self.add_v_proj = nn.Linear(num_channels, num_channels)
        self.to_add_out = nn.Linear(num_channels, num_channels)
        self.norm_added_q = RMSNorm(num_channels // num_heads)
        self.norm_added_k = RMSNorm(num_channels // num_heads)

    def joint(self, text_BTC: Tensor, image_BLC: Tensor, rotary: Rotary) -> tuple[Tensor, Tensor]:
        """Outputs for text_BTC and image_BLC, each through its own output projection."""
        text_query = self.norm_added_q(self.heads(self.add_q_proj(text_BTC)))
        text_key = self.norm_added_k(self.heads(self.add_k_proj(text_BTC)))
        query = self.norm_q(self.heads(self.to_q(image_BLC)))
        key = self.norm_k(self.heads(self.to_k(image_BLC)))
        text_value = self.heads(self.add_v_proj(text_BTC))
        out_BSC = attend(
            torch.cat((text_query, query), dim=2),
            torch.cat((text_key, key), dim=2),
            torch.cat((text_value, self.heads(self.to_v(image_BLC))), dim=2),
            rotary,
        )
        num_text = text_BTC.shape[1]
        return self.to_add_out(out_BSC[:, :num_text]), self.to_out[0](out_BSC[:, num_text:])


class JointBlock(nn.Module):
    """Text and image as two streams with separate weights that meet in the attention."""

    def __init__(self, num_channels: int, num_heads: int) -> None:
        super().__init__()
        self.norm1 = Modulation(num_channels, 6)
        self.norm1_context = Modulation(num_channels, 6)
        self.attn = JointAttention(num_channels, num_heads)
        self.ff = FeedForward(num_channels)
        self.ff_context = FeedForward(num_channels)

    def forward(
        self, text_BTC: Tensor, image_BLC: Tensor, condition_BC: Tensor, rotary: Rotary
    ) -> tuple[Tensor, Tensor]:
        image_in, gate, shift_ff, scale_ff, gate_ff = self.norm1(image_BLC, condition_BC)
        text_in, text_gate, text_shift_ff, text_scale_ff, text_gate_ff = self.norm1_context(
            text_BTC, condition_BC
        )
        text_out, image_out = self.attn.joint(text_in, image_in, rotary)
        image_BLC = image_BLC + gate * image_out
        image_BLC = image_BLC + gate_ff * self.ff(modulate(image_BLC, shift_ff, scale_ff))
        text_BTC = text_BTC + text_gate * text_out
        text_BTC = text_BTC + text_gate_ff * self.ff_context(
            modulate(text_BTC, text_shift_ff, text_scale_ff)
        )
        return clip_half(text_BTC), image_BLC


class SingleBlock(nn.Module):
    """Text and image as one sequence; attention and feed-forward run side by side."""

    def __init__(self, num_channels: int, num_heads: int) -> None:
        super().__init__()
        self.norm = Modulation(num_channels, 3)
        self.attn = SingleAttention(num_channels, num_heads)
        self.proj_mlp = nn.Linear(num_channels, 4 * num_channels)
        self.proj_out = nn.Linear(5 * num_channels, num_channels)

    def forward(self, x_BSC: Tensor, condition_BC: Tensor, rotary: Rotary) -> Tensor:
        normed_BSC, gate_B1C = self.norm(x_BSC, condition_BC)
        mlp = gelu_linear(normed_BSC, self.proj_mlp)
        both = torch.cat((self.attn(normed_BSC, rotary), mlp), dim=2)
        return clip_half(x_BSC + gate_B1C * self.proj_out(both))


class GridResampler(nn.Module):
    """RMSNorm, then a 2x2 convolution of stride 2 that halves or (transposed) doubles the grid."""

    def __init__(self, num_channels: int, doubles: bool) -> None:
        super().__init__()
        kind = nn.ConvTranspose2d if doubles else nn.Conv2d
        self.norm = RMSNorm(num_channels)
        self.conv = kind(num_channels, num_channels, kernel_size=2, stride=2, bias=False)

    def forward(self, x_BHWC: Tensor) -> Tensor:
        out_BCHW: Tensor = self.conv(self.norm(x_BHWC).permute(0, 3, 1, 2))
        return out_BCHW.permute(0, 2, 3, 1)


class GridBlock(nn.Module):
    """Holds the resampler under its published name; without one it passes the grid through."""

    def __init__(self, num_channels: int, downsample: bool = False, upsample: bool = False) -> None:
        super().__init__()
        self.downsample = GridResampler(num_channels, doubles=False) if downsample else None
        self.upsample = GridResampler(num_channels, doubles=True) if upsample else None

    def forward(self, x_BHWC: Tensor) -> Tensor:
        for layer in (self.downsample, self.upsample):
            if layer is not None:
                x_BHWC = layer(x_BHWC)
        return x_BHWC
