"""The text encoder beyond parity: causality, both activations, both ways to find the end."""

import pytest
import torch

from model.errors import ModelError
from model.text import CLIPTextConfig, CLIPTextEncoder


def make_encoder(hidden_act: str = "gelu", eos_token_id: int = 19) -> CLIPTextEncoder:
    torch.manual_seed(0)
    config = CLIPTextConfig(
        vocab_size=20,
        hidden_size=8,
        intermediate_size=16,
        projection_dim=6,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=7,
        hidden_act=hidden_act,
        eos_token_id=eos_token_id,
    )
    return CLIPTextEncoder(config)


IDS = torch.tensor([[18, 3, 4, 19, 19, 19], [18, 5, 6, 7, 8, 19]])


@torch.no_grad()
def test_shapes() -> None:
    features = make_encoder()(IDS)
    assert features.hidden_BTD.shape == (2, 6, 8)
    assert features.pooled_BP.shape == (2, 6)


@torch.no_grad()
def test_a_token_sees_only_those_before_it() -> None:
    encoder = make_encoder()
    changed = IDS.clone()
    changed[:, 4] = 9
    before, after = encoder(IDS).hidden_BTD, encoder(changed).hidden_BTD
    assert torch.equal(before[:, :4], after[:, :4])
    assert not torch.equal(before[:, 4:], after[:, 4:])


@torch.no_grad()
def test_padding_after_the_end_does_not_reach_the_pooled_vector() -> None:
    encoder = make_encoder()
    padded = IDS.clone()
    padded[0, 4:] = 1
    assert torch.equal(encoder(IDS).pooled_BP[0], encoder(padded).pooled_BP[0])


@torch.no_grad()
def test_legacy_end_is_the_largest_id() -> None:
    legacy, plain = make_encoder(eos_token_id=2), make_encoder(eos_token_id=19)
    assert torch.equal(legacy(IDS).pooled_BP, plain(IDS).pooled_BP)
    with_two = IDS.clone()
    with_two[:, 1] = 2
    assert torch.equal(legacy(with_two).pooled_BP, plain(with_two).pooled_BP)


@torch.no_grad()
def test_quick_gelu_is_another_function() -> None:
    quick, exact = (make_encoder(act)(IDS).hidden_BTD for act in ("quick_gelu", "gelu"))
    assert 0 < float((quick - exact).abs().max()) < 0.1


def test_every_parameter_learns_through_both_outputs() -> None:
    encoder = make_encoder()
    features = encoder(IDS)
    torch.autograd.backward(features.hidden_BTD.square().sum() + features.pooled_BP.square().sum())
    assert all(p.grad is not None and bool(p.grad.any()) for p in encoder.parameters())


def test_too_many_tokens_are_refused() -> None:
    with pytest.raises(ModelError, match=r"shape \(1, 8\): expected \(batch, at most 7 tokens\)"):
        make_encoder()(torch.zeros(1, 8, dtype=torch.long))


def test_configs_that_cannot_work_are_refused() -> None:
    with pytest.raises(ModelError, match="hidden_act is 'relu'"):
        CLIPTextConfig(hidden_act="relu")
    with pytest.raises(ModelError, match="no multiple of 7 heads"):
        CLIPTextConfig(num_attention_heads=7)
