from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from model.layers import gelu_linear, softmax_attention


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("length", [1, 7, 96, 513])
def test_attention_is_that_of_torch(length: int, is_causal: bool) -> None:
    """In bfloat16 and, as the reference, in float32 on the same rounded inputs."""
    generator = torch.Generator().manual_seed(length)
    query, key, value = (
        torch.randn(2, 3, length, 8, generator=generator).bfloat16() for _ in range(3)
    )
    expected = F.scaled_dot_product_attention(
        query.float(), key.float(), value.float(), is_causal=is_causal
    )
    found = softmax_attention(query, key, value, is_causal)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), expected, rtol=0.02, atol=0.02)
    exact = softmax_attention(query.float(), key.float(), value.float(), is_causal)
    torch.testing.assert_close(exact, expected, rtol=1e-5, atol=1e-5)


def test_causal_attention_never_sees_what_comes_later() -> None:
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, 2, 12, 4, generator=generator).bfloat16() for _ in range(3))
    before = softmax_attention(query, key, value, is_causal=True)
    key[:, :, 8:], value[:, :, 8:] = 3.0, -5.0
    after = softmax_attention(query, key, value, is_causal=True)
    assert torch.equal(before[:, :, :8], after[:, :, :8])
    assert not torch.equal(before[:, :, 8:], after[:, :, 8:])


@pytest.mark.parametrize("length", [96, 1101])
def test_half_precision_attention_is_near_the_exact_one(length: int) -> None:
    generator = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(2, 2, length, 32, generator=generator).bfloat16() for _ in range(3)
    )
    exact = F.scaled_dot_product_attention(query.double(), key.double(), value.double())
    with torch.no_grad():
        got = softmax_attention(query, key, value)
    assert got.shape == exact.shape
    assert float((got - exact).abs().max()) < 0.02


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fused_gelu_is_the_plain_one(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(32, 48).to(dtype)
    x = torch.randn(2, 7, 32).to(dtype)
    plain = gelu_linear(x, linear)
    assert plain.requires_grad
    with torch.no_grad():
        fused = gelu_linear(x, linear)
        exact = F.gelu(linear.double()(x.double()), approximate="tanh")
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    assert float((fused - exact).abs().max()) < tolerance
    assert float((plain.detach() - exact).abs().max()) < tolerance
