"""Small layers shared by the transformer's blocks, with the published parameter names.

Shape suffixes: B batch, S sequence, C channels. `...` stands for any leading axes.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NORM_EPS = 1e-6
SINUSOID_CHANNELS = 256
FLOAT16_MAX = 65504.0

# On a CPU in bfloat16 two matrix products beat the fused kernel. Up to this sequence length they
# are made for all heads at once (1.4 times as fast at 333 tokens with 32 channels a head); beyond
# it a head at a time, whose scores stay in the cache (1.4 times at 1101 tokens, 2 times with 128
# channels a head). When training, the fused kernel wins there, as it keeps no scores.
_MAX_PRODUCT_LENGTH = 512

_HAS_ONEDNN: bool = torch._C._has_mkldnn and hasattr(torch.ops.mkldnn, "_linear_pointwise")
_ONEDNN_TYPES = {
    torch.float32: _HAS_ONEDNN,
    torch.bfloat16: _HAS_ONEDNN and torch.ops.mkldnn._is_mkldnn_bf16_supported(),
}


def init_linear(weight: Tensor, num_inputs: int) -> None:
    """Fill `weight` from a normal cut at two deviations of 1 / sqrt(num_inputs): gain near one."""
    std = 1 / math.sqrt(num_inputs)
    nn.init.trunc_normal_(weight, std=std, a=-2 * std, b=2 * std)


def widen(x: Tensor) -> Tensor:
    """float32, or float64 where it already is: the types that norms and losses are computed in."""
    return x if x.dtype == torch.float64 else x.float()


def sinusoid(values_N: Tensor, num_channels: int = SINUSOID_CHANNELS) -> Tensor:
    """(N, num_channels) float32: cosines, then sines, at geometric frequencies 1 … 1e-4."""
    half = num_channels // 2
    exponent = torch.arange(half, dtype=torch.float32, device=values_N.device) / half
    angles = values_N.float()[:, None] * torch.exp(-math.log(10000.0) * exponent)[None, :]
    return torch.cat((angles.cos(), angles.sin()), dim=-1)


def softmax_attention(
    query_BNSA: Tensor, key_BNSA: Tensor, value_BNSA: Tensor, is_causal: bool = False
) -> Tensor:
    """Attention over S of N heads with A channels each; causal: none looks at what comes later."""
    length = query_BNSA.shape[-2]
    is_cpu_bf16 = value_BNSA.device.type == "cpu" and value_BNSA.dtype == torch.bfloat16
    is_long = length > _MAX_PRODUCT_LENGTH
    if not is_cpu_bf16 or (is_long and (is_causal or _is_traced_or_learning())):
        return F.scaled_dot_product_attention(query_BNSA, key_BNSA, value_BNSA, is_causal=is_causal)
    if is_long:
        heads = zip(*(x.flatten(0, 1) for x in (query_BNSA, key_BNSA, value_BNSA)), strict=True)
        mixed = [_product_attention(*parts) for parts in heads]
        return torch.stack(mixed).view_as(value_BNSA)
    return _product_attention(query_BNSA, key_BNSA, value_BNSA, is_causal)


def _product_attention(
    query: Tensor, key: Tensor, value: Tensor, is_causal: bool = False
) -> Tensor:
    """Attention as two matrix products over (..., S, A), with the scores in the inputs' type."""
    scores: Tensor = (query * query.shape[-1] ** -0.5) @ key.transpose(-1, -2)
    if is_causal:
        later_SS = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
        scores = scores.masked_fill(later_SS, -torch.inf)
    mixed: Tensor = scores.softmax(dim=-1) @ value
    return mixed


def _is_traced_or_learning() -> bool:
    return torch.compiler.is_compiling() or torch.is_grad_enabled()


def gelu_linear(x: Tensor, linear: nn.Module) -> Tensor:
    """GELU (tanh form) of `linear(x)`.

    On a CPU without gradients oneDNN applies it while it still holds the product: with 256 channels
    in and 1024 out that takes 0.74 of the time.
    """
    if _can_fuse_gelu(x, linear):
        fused: Tensor = torch.ops.mkldnn._linear_pointwise(
            x, linear.weight, linear.bias, "gelu", [], "tanh"
        )
        return fused
    return F.gelu(linear(x), approximate="tanh")


def _can_fuse_gelu(x: Tensor, linear: nn.Module) -> bool:
    """Whether `linear` is a plain layer of x's type, on a CPU, with nothing around it."""
    return (
        x.device.type == "cpu"
        and type(linear) is nn.Linear
        and not (linear._forward_hooks or linear._forward_pre_hooks)
        and x.dtype == linear.weight.dtype
        and _ONEDNN_TYPES.get(x.dtype, False)
        and not _is_traced_or_learning()
        and not torch.is_autocast_enabled("cpu")
    )


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last axis, computed in float32.

    Returns half precision only where the weight is half precision (so float32 under autocast).
    """

    def __init__(self, num_channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(num_channels))

    def forward(self, x: Tensor) -> Tensor:
        normed = F.rms_norm(widen(x), self.weight.shape, None, NORM_EPS)
        return normed.to(self.weight.dtype) * self.weight


class PointwiseConv(nn.Module):
    """A 1x1 convolution (weight (out, in, 1, 1), no bias) applied to channels-last input."""

    def __init__(self, num_inputs: int, num_outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_outputs, num_inputs, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.flatten(1))


class TwoLayer(nn.Module):
    """linear_1, SiLU, linear_2: the published embedder of timesteps, pooled text and conditions."""

    def __init__(self, num_inputs: int, num_channels: int, bias: bool = True) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(num_inputs, num_channels, bias=bias)
        self.linear_2 = nn.Linear(num_channels, num_channels, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.linear_2(F.silu(self.linear_1(x)))
        return out


class Modulation(nn.Module):
    """adaLN: LayerNorm without weights, scaled and shifted by the condition; also gives the gates.

    `num_chunks` is 3 (shift, scale, gate) or 6 (the same again for the feed-forward part).
    """

    def __init__(self, num_channels: int, num_chunks: int) -> None:
        super().__init__()
        self.num_chunks = num_chunks
        self.linear = nn.Linear(num_channels, num_chunks * num_channels)

    def forward(self, x_BSC: Tensor, condition_BC: Tensor) -> tuple[Tensor, ...]:
        """Modulated x_BSC, gate_B1C and, with six chunks, the second shift, scale and gate."""
        chunks = self.linear(F.silu(condition_BC))[:, None].chunk(self.num_chunks, dim=-1)
        return modulate(x_BSC, chunks[0], chunks[1]), *chunks[2:]

    def open_gates(self, gate: float) -> None:
        """Set the gates' biases: what they are as long as the weights are zero."""
        with torch.no_grad():
            self.linear.bias.view(self.num_chunks, -1)[2::3] = gate


def modulate(x_BSC: Tensor, shift_B1C: Tensor, scale_B1C: Tensor) -> Tensor:
    """LayerNorm (float32, no weights), then (1 + scale) and shift."""
    normed = F.layer_norm(widen(x_BSC), x_BSC.shape[-1:], eps=NORM_EPS)
    return torch.addcmul(shift_B1C, normed.to(shift_B1C.dtype), 1 + scale_B1C)


class GeluProjection(nn.Module):
    """Linear, then GELU in its tanh form."""

    def __init__(self, num_inputs: int, num_outputs: int) -> None:
        super().__init__()
        self.proj = nn.Linear(num_inputs, num_outputs)

    def forward(self, x: Tensor) -> Tensor:
        return gelu_linear(x, self.proj)


class FeedForward(nn.Module):
    """Channels times 4, GELU, back. The middle entry is the published layout's dropout place."""

    def __init__(self, num_channels: int) -> None:
        super().__init__()
        self.net = nn.Sequential(
            GeluProjection(num_channels, 4 * num_channels),
            nn.Identity(),
            nn.Linear(4 * num_channels, num_channels),
        )

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.net(x)
        return out


def clip_half(x: Tensor) -> Tensor:
    """Keep float16 residuals finite; other types pass untouched."""
    return x.clamp(-FLOAT16_MAX, FLOAT16_MAX) if x.dtype == torch.float16 else x
