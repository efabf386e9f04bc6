"""The image tokenizer beyond parity: nearest codes, straight-through gradients, sizes."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from model import vq as vq_module
from model.errors import ModelError
from model.vq import Codebook, VQConfig, VQTokenizer


def make_tokenizer() -> VQTokenizer:
    torch.manual_seed(0)
    vq = VQTokenizer(VQConfig.small((8, 8, 16), num_vq_embeddings=20, latent_channels=4))
    vq.reset_codebook(torch.randn(20, 4))
    return vq


@given(seed=st.integers(0, 10_000), num_entries=st.integers(1, 30))
def test_nearest_is_the_least_distance(seed: int, num_entries: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    codebook = Codebook(num_entries, 3)
    with torch.no_grad():
        codebook.embedding.weight.copy_(torch.randn(num_entries, 3, generator=generator))
    latents = torch.randn(2, 3, 2, 4, generator=generator)
    tokens = codebook.nearest(latents)
    distances = (latents[:, None] - codebook.embedding.weight[None, :, :, None, None]).norm(dim=2)
    chosen = distances.gather(1, tokens[:, None])[:, 0]
    assert torch.allclose(chosen, distances.min(dim=1).values, atol=1e-5)


def test_search_in_chunks_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    vq, latents = make_tokenizer(), torch.randn(2, 4, 3, 5)
    whole = vq.quantize.nearest(latents)
    monkeypatch.setattr(vq_module, "_NEAREST_CHUNK", 7)
    assert torch.equal(vq.quantize.nearest(latents), whole)


def test_tokens_of_codebook_entries_are_themselves() -> None:
    vq, tokens = make_tokenizer(), torch.randint(0, 20, (2, 3, 5))
    assert torch.equal(vq.quantize.nearest(vq.quantize.lookup(tokens)), tokens)


def test_search_is_in_float32_under_autocast() -> None:
    vq, latents = make_tokenizer(), torch.randn(2, 4, 3, 5)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(vq.quantize.nearest(latents), make_tokenizer().quantize.nearest(latents))
        assert vq.quantize(latents).quantized_BCHW.dtype == torch.float32


def test_gradients_pass_straight_through() -> None:
    vq = make_tokenizer()
    latents = torch.randn(2, 4, 3, 5, requires_grad=True)
    quantized = vq.quantize(latents)
    assert torch.allclose(quantized.quantized_BCHW, vq.quantize.lookup(quantized.tokens_BHW))
    weights = torch.randn(2, 4, 3, 5)
    torch.autograd.backward((quantized.quantized_BCHW * weights).sum())
    assert latents.grad is not None
    assert torch.equal(latents.grad, weights)
    assert vq.quantize.embedding.weight.grad is None


def test_each_loss_moves_one_side() -> None:
    vq = make_tokenizer()
    latents = torch.randn(2, 4, 3, 5, requires_grad=True)
    quantized = vq.quantize(latents)
    torch.autograd.backward(quantized.codebook_loss)
    assert latents.grad is None
    assert bool(vq.quantize.embedding.weight.grad is not None)
    vq.zero_grad()
    torch.autograd.backward(vq.quantize(latents).commitment_loss)
    assert latents.grad is not None
    assert vq.quantize.embedding.weight.grad is None


def test_one_training_pass_reaches_every_parameter() -> None:
    vq, images = make_tokenizer(), torch.rand(2, 3, 16, 8)
    with torch.no_grad():  # a fresh tokenizer's residual branches end in zeros
        for parameter in vq.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    rebuilt, quantized = vq(images)
    assert rebuilt.shape == images.shape
    losses = quantized.codebook_loss + 0.25 * quantized.commitment_loss
    torch.autograd.backward((rebuilt - images).square().mean() + losses)
    assert all(p.grad is not None and bool(p.grad.any()) for p in vq.parameters())


@pytest.mark.parametrize("channels", [(8, 8, 16), (32, 64, 64, 96), (128, 256, 768), (6,), (4, 8)])
def test_norm_groups_are_wide(channels: tuple[int, ...]) -> None:
    num_groups = VQConfig.small(channels, 16, 4).norm_num_groups
    assert all(width % num_groups == 0 for width in channels)
    assert num_groups == 1 or min(channels) // num_groups >= 8


@pytest.mark.parametrize(("height", "width"), [(4, 4), (8, 20), (16, 4)])
def test_any_size_the_factor_divides(height: int, width: int) -> None:
    vq, images = make_tokenizer(), torch.rand(2, 3, height, width)
    tokens = vq.encode(images)
    assert tokens.shape == (2, height // 4, width // 4)
    assert tokens.dtype == torch.int64
    decoded = vq.decode(tokens)
    assert decoded.shape == images.shape
    assert 0 <= float(decoded.min()) <= float(decoded.max()) <= 1


@pytest.mark.parametrize("shape", [(1, 3, 6, 8), (1, 3, 8, 9), (3, 8, 8), (1, 3, 0, 8)])
def test_other_sizes_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ModelError, match="both sizes multiples of 4 px"):
        make_tokenizer().encode(torch.rand(shape))


@pytest.mark.parametrize("token", [-1, 20])
def test_tokens_outside_the_codebook_are_refused(token: int) -> None:
    with pytest.raises(ModelError, match="were masked tokens left"):
        make_tokenizer().decode(torch.tensor([[[0, token]]]))


def test_codebook_is_replaced_only_by_its_own_shape() -> None:
    vq, vectors = make_tokenizer(), torch.arange(80.0).view(20, 4)
    vq.reset_codebook(vectors)
    assert torch.equal(vq.quantize.embedding.weight, vectors)
    with pytest.raises(ModelError, match=r"\(4, 20\): expected \(20, 4\)"):
        vq.reset_codebook(vectors.T)


def test_attention_in_the_middle() -> None:
    config = VQConfig(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        norm_num_groups=4,
        vq_embed_dim=2,
    )
    vq = VQTokenizer(config)
    assert "encoder.mid_block.attentions.0.to_out.0.weight" in vq.state_dict()
    assert vq.decode(vq.encode(torch.rand(1, 3, 8, 4))).shape == (1, 3, 8, 4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"norm_type": "spatial"}, "norm_type is 'spatial'"),
        ({"act_fn": "relu"}, "act_fn is 'relu'"),
        ({"norm_num_groups": 5}, "no multiples of norm_num_groups 5"),
        ({"down_block_types": ("AttnDownEncoderBlock2D",)}, "1 times 'DownEncoderBlock2D'"),
        ({"up_block_types": ()}, "1 times 'UpDecoderBlock2D'"),
    ],
)
def test_configs_that_cannot_work_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        VQConfig(**changes)  # type: ignore[arg-type]  # wrong on purpose
