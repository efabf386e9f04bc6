"""Models small enough to build in every test."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import settings

from model.folder import PainterDefaults
from model.schedule import MASK_RATIO
from model.text import CLIPTextConfig, CLIPTextEncoder
from model.text_to_image import TextToImage
from model.text_tokenizer import CLIPTokenizer
from model.transformer import MaskedImageTransformer, TransformerConfig
from model.vq import VQConfig, VQTokenizer

# A busy machine is no failure.
settings.register_profile("patient", deadline=None)
settings.load_profile("patient")

CAPTIONS = [
    "a red circle on a blue background",
    "two green squares left of a yellow star",
    "a large blue triangle below a small red square",
] * 3

MakeTransformer = Callable[..., MaskedImageTransformer]


def small_config(**changes: object) -> TransformerConfig:
    values: dict[str, object] = {
        "num_layers": 1,
        "num_single_layers": 1,
        "attention_head_dim": 8,
        "num_attention_heads": 2,
        "joint_attention_dim": 12,
        "pooled_projection_dim": 10,
        "axes_dims_rope": (4, 2, 2),
        "vocab_size": 40,
        "codebook_size": 32,
        "timestep_convention": MASK_RATIO,
    }
    return TransformerConfig(**{**values, **changes})  # type: ignore[arg-type]  # values by name


def randomise(module: torch.nn.Module, seed: int = 0) -> None:
    """Give every parameter random values, so that no zero start hides a wrong path."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))


@pytest.fixture
def make_transformer() -> MakeTransformer:
    """Build a small transformer with random weights; keywords change its configuration."""

    def make(**changes: object) -> MaskedImageTransformer:
        transformer = MaskedImageTransformer(small_config(**changes)).eval()
        randomise(transformer)
        return transformer

    return make


@pytest.fixture(scope="session")
def tokenizer() -> CLIPTokenizer:
    return CLIPTokenizer.train(CAPTIONS, 560)


@pytest.fixture
def painter(tokenizer: CLIPTokenizer) -> TextToImage:
    """All parts at toy size, with random weights: 4 px per token, 24 px by default."""
    return small_painter(tokenizer)


@pytest.fixture(scope="session")
def shared_painter(tokenizer: CLIPTokenizer) -> TextToImage:
    """A painter for tests that change nothing of it."""
    return small_painter(tokenizer)


def small_painter(tokenizer: CLIPTokenizer) -> TextToImage:
    text = CLIPTextEncoder(
        CLIPTextConfig(
            vocab_size=tokenizer.vocab_size,
            hidden_size=12,
            intermediate_size=24,
            projection_dim=10,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=16,
            hidden_act="gelu",
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )
    torch.manual_seed(0)
    vq = VQTokenizer(VQConfig.small((8, 8, 8), num_vq_embeddings=32, latent_channels=4))
    transformer = MaskedImageTransformer(small_config())
    for seed, part in enumerate((text, transformer)):
        randomise(part, seed)
    vq.reset_codebook(torch.randn(32, 4))
    defaults = PainterDefaults(text_tokens=16, resolution_px=24)
    return TextToImage(transformer, vq, text, tokenizer, defaults)
