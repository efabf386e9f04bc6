"""Weights of eight bits for small machines: int8, or float8 where torch has it.

Only weights of linear layers are small; they become the input's type, a layer at a time, when they
are used. A quarter of float32's memory, half of bfloat16's, and no speed is gained.
"""

import re
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.errors import ModelError

LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}
KINDS = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}
# The repeated layers of the transformer and of the text encoder hold nearly all weights; embeddings
# and the head stay as they are, since every token depends on each of them.
DEFAULT_TARGETS = r"(single_)?transformer_blocks\..*|text_model\.encoder\.layers\..*"


@dataclass(frozen=True)
class QuantizationReport:
    """What became smaller; `worst_error` is the largest |W - Ŵ| / |W| (Frobenius) of a layer."""

    num_layers: int
    bytes_before: int
    bytes_after: int
    worst_error: float


class QuantizedLinear(nn.Module):
    """`nn.Linear` with weight (out, in) of eight bits and a float32 scale per output channel."""

    weight: Tensor
    weight_scale: Tensor

    def __init__(self, linear: nn.Linear, dtype: torch.dtype) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        wide = linear.weight.detach().float()
        scale = (wide.abs().amax(dim=1) / LARGEST[dtype]).clamp(min=torch.finfo(torch.float32).tiny)
        scaled = wide / scale[:, None]
        self.register_buffer(
            "weight", (scaled.round() if dtype == torch.int8 else scaled).to(dtype)
        )
        self.register_buffer("weight_scale", scale)
        self.bias = linear.bias

    def dequantized(self) -> Tensor:
        """The weight in float32, (out, in)."""
        return self.weight.float() * self.weight_scale[:, None]

    def forward(self, x: Tensor) -> Tensor:
        device_type = x.device.type
        is_autocast = torch.is_autocast_enabled(device_type)
        dtype = torch.get_autocast_dtype(device_type) if is_autocast else x.dtype
        # Scaled before the product: sums of codes of up to 448 would leave float16's range.
        bias = None if self.bias is None else self.bias.to(dtype)
        return F.linear(x.to(dtype), self.dequantized().to(dtype), bias)


@torch.no_grad()
def quantize(module: nn.Module, kind: str, targets: str = DEFAULT_TARGETS) -> QuantizationReport:
    """Replace the linear layers of `module` whose dotted name matches `targets`, in place.

    kind: "int8" or "fp8" (e4m3). Raises ModelError for another kind, or when nothing matches.
    """
    if kind not in KINDS:
        raise ModelError(f"quantisation is {kind!r}: expected one of {', '.join(KINDS)}")
    pattern = re.compile(targets)
    found = [
        name
        for name, part in module.named_modules()
        if isinstance(part, nn.Linear) and pattern.fullmatch(name)
    ]
    if not found:
        raise ModelError(f"no linear layer is called like {targets!r}: nothing was quantised")
    before = after = 0
    worst = 0.0
    for name in found:  # by name: a layer that was replaced is freed before the next one
        linear, small = _replaced(module, name, KINDS[kind])
        before += _bytes(linear.weight)
        after += _bytes(small.weight) + _bytes(small.weight_scale)
        wide = linear.weight.float()
        if norm := float(wide.norm()):
            worst = max(worst, float((wide - small.dequantized()).norm()) / norm)
        del linear, wide
    return QuantizationReport(len(found), before, after, worst)


def _replaced(
    module: nn.Module, name: str, dtype: torch.dtype
) -> tuple[nn.Linear, QuantizedLinear]:
    """Put a small layer in the place called `name`; returns the old layer and the new one.

    Hooks move to the new one with their handles, so adapters stay at work and can be detached.
    """
    parent, _, own = name.rpartition(".")
    linear = module.get_submodule(name)
    assert isinstance(linear, nn.Linear)  # the caller's choice
    small = QuantizedLinear(linear, dtype)
    vars(small).update({key: hooks for key, hooks in vars(linear).items() if "_hooks" in key})
    setattr(module.get_submodule(parent), own, small)
    return linear, small


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def weight_bytes(module: nn.Module) -> int:
    """Bytes of all parameters and buffers."""
    return sum(_bytes(t) for t in (*module.parameters(), *module.buffers()))
