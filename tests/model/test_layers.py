from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from model.layers import softmax_attention


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
