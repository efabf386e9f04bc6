"""Inserting the compression layers: what is inherited, what is new, and how near it starts."""

from collections.abc import Callable

import pytest
import torch

from model.compression import insert_compression
from model.errors import ModelError
from model.transformer import MaskedImageTransformer

NEW_KEYS = [
    "down_block.downsample.conv.weight",
    "down_block.downsample.norm.weight",
    "up_block.upsample.conv.weight",
    "up_block.upsample.norm.weight",
]


def test_everything_but_the_new_layers_is_inherited(
    make_transformer: Callable[..., MaskedImageTransformer],
) -> None:
    plain = make_transformer()
    compressed, new_keys = insert_compression(plain)
    assert new_keys == NEW_KEYS
    assert compressed.config.compresses
    after, before = compressed.state_dict(), plain.state_dict()
    assert set(after) - set(before) == set(NEW_KEYS)
    assert all(torch.equal(after[key], value) for key, value in before.items())
    after["context_embedder.weight"].zero_()
    assert bool(before["context_embedder.weight"].any())  # a copy, not a view


def test_doubled_tokens_give_doubled_logits(
    make_transformer: Callable[..., MaskedImageTransformer],
) -> None:
    plain = make_transformer()
    compressed, _ = insert_compression(plain)
    tokens_BHW = torch.randint(0, 40, (2, 3, 4))
    doubled_BHW = tokens_BHW.repeat_interleave(2, 1).repeat_interleave(2, 2)
    rest = (torch.randn(2, 5, 12), torch.randn(2, 10), torch.rand(2, 5), torch.rand(2))
    with torch.no_grad():
        expected = plain(tokens_BHW, *rest).repeat_interleave(2, 2).repeat_interleave(2, 3)
        logits = compressed(doubled_BHW, *rest)
    assert torch.allclose(logits, expected, atol=1e-3)


def test_type_and_mode_are_kept(make_transformer: Callable[..., MaskedImageTransformer]) -> None:
    compressed, _ = insert_compression(make_transformer().train().to(torch.bfloat16))
    assert {p.dtype for p in compressed.parameters()} == {torch.bfloat16}
    assert all(p.requires_grad for p in compressed.parameters())
    assert compressed.training


def test_a_network_that_compresses_is_refused(
    make_transformer: Callable[..., MaskedImageTransformer],
) -> None:
    with pytest.raises(ModelError, match="already compresses"):
        insert_compression(make_transformer(downsample=True, upsample=True))
