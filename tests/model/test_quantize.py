"""Weights of eight bits: how far they are off, what they weigh, and that they are not saved."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from model.errors import ModelError
from model.lora import LoRA, LoRAConfig
from model.quantize import KINDS, QuantizedLinear, quantize, weight_bytes
from model.text_to_image import TextToImage
from model.transformer import MaskedImageTransformer

MakeTransformer = Callable[..., MaskedImageTransformer]


def wide_linear() -> nn.Linear:
    torch.manual_seed(0)
    linear = nn.Linear(256, 96)
    with torch.no_grad():
        linear.weight.mul_(torch.logspace(-3, 3, 96)[:, None])  # rows of very different sizes
        linear.weight[5] = 0.0
    return linear


def test_int8_is_off_by_half_a_step_of_its_row() -> None:
    linear = wide_linear()
    small = QuantizedLinear(linear, torch.int8)
    step = linear.weight.detach().abs().amax(dim=1, keepdim=True) / 127
    off = (small.dequantized() - linear.weight.detach()).abs()
    assert bool((off <= 0.5001 * step).all())
    assert bool((small.dequantized()[5] == 0).all())


def test_fp8_is_off_by_a_sixteenth_of_each_weight() -> None:
    linear = wide_linear()
    wide = linear.weight.detach()
    off = (QuantizedLinear(linear, torch.float8_e4m3fn).dequantized() - wide).abs()
    # Below 2^-6 of 448 the type is spaced evenly, 2^-9 apart.
    least = wide.abs().amax(dim=1, keepdim=True) / 448 * 2**-10
    assert bool((off <= torch.maximum(wide.abs() / 16, 1.01 * least)).all())


@pytest.mark.parametrize("kind", ["int8", "fp8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_network_is_smaller_and_says_nearly_the_same(
    make_transformer: MakeTransformer, kind: str, dtype: torch.dtype
) -> None:
    big = {"attention_head_dim": 64, "axes_dims_rope": (16, 24, 24)}
    transformer, small = (make_transformer(**big).to(dtype) for _ in range(2))
    report = quantize(small, kind)
    # Each output channel's scale is a float32 beside 128 and more weights.
    assert report.bytes_after < report.bytes_before * (1 / dtype.itemsize + 0.04)
    assert weight_bytes(small) < weight_bytes(transformer)
    assert 0 < report.worst_error < (0.02 if kind == "int8" else 0.04)
    assert report.num_layers == sum(isinstance(m, QuantizedLinear) for m in small.modules())
    generator = torch.Generator().manual_seed(0)
    text, pooled = (torch.randn(1, *shape, generator=generator) for shape in ((5, 12), (10,)))
    inputs = (torch.randint(0, 32, (1, 4, 4), generator=generator), text.to(dtype), pooled)
    rest = (torch.zeros(1, 5), torch.tensor([0.5]))
    with torch.no_grad():
        exact, near = (net(*inputs, *rest).float() for net in (transformer, small))
    assert float((near - exact).norm() / exact.norm()) < 0.25
    assert float((near - exact).abs().max()) > 0


def test_a_painter_paints_with_them_and_adapters(painter: TextToImage, tmp_path: Path) -> None:
    lora = LoRA.start({"transformer": painter.transformer}, LoRAConfig(rank=2))
    lora.save_pretrained(tmp_path / "style")
    lora.detach()
    before = painter.generate_tokens(["a star"], steps=3)
    painter.save_memory(quantize_to="int8")
    painter.load_lora(tmp_path / "style")
    after = painter.generate_tokens(["a star"], steps=3)
    assert before.shape == after.shape
    assert any(isinstance(part, QuantizedLinear) for part in painter.text_encoder.modules())


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_half_precision_does_not_overflow(kind: str) -> None:
    """Sums of codes of up to 448 leave float16's range; sums of the weights do not."""
    torch.manual_seed(0)
    linear = nn.Linear(5120, 64)
    with torch.no_grad():
        linear.weight.normal_(std=0.02)
        x = 8 * torch.randn(16, 5120)
        exact, near = linear(x), QuantizedLinear(linear, KINDS[kind])(x.half())
    assert near.dtype == torch.float16
    assert float((near.float() - exact).norm() / exact.norm()) < 0.04


def test_a_scale_that_float16_hardly_knows_is_exact() -> None:
    """Weights of 4e-5 are float16's with three digits; a 127th of them is a multiple of 6e-8."""
    torch.manual_seed(0)
    linear = nn.Linear(256, 8, bias=False)
    with torch.no_grad():
        linear.weight.uniform_(-4e-5, 4e-5)
        x = 100 * torch.randn(64, 256)
        exact, near = linear(x), QuantizedLinear(linear, torch.int8)(x.half())
    assert float((near.float() - exact).norm() / exact.norm()) < 0.02


def test_they_are_not_saved(painter: TextToImage, tmp_path: Path) -> None:
    painter.save_memory(quantize_to="fp8")
    with pytest.raises(ModelError, match="save the network before quantising it"):
        painter.save_pretrained(tmp_path / "painter")
    assert not list(tmp_path.iterdir())


def test_kinds_and_targets_that_are_none(make_transformer: MakeTransformer) -> None:
    with pytest.raises(ModelError, match="expected one of int8, fp8"):
        quantize(make_transformer(), "int4")
    with pytest.raises(ModelError, match="nothing was quantised"):
        quantize(make_transformer(), "int8", targets="nothing")
