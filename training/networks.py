"""From a recipe's sizes to the networks' own configurations."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch

from model import (
    CLIPTextConfig,
    CLIPTextEncoder,
    CLIPTokenizer,
    MaskedImageTransformer,
    TransformerConfig,
    VQConfig,
    VQTokenizer,
)
from training.config import NetworkConfig, TextEncoderConfig, TokenizerConfig
from training.randomness import derive

Built = TypeVar("Built")


def vq_config(config: TokenizerConfig) -> VQConfig:
    """The image tokenizer that stage 0 trains."""
    return VQConfig.small(config.block_out_channels, config.codebook_size, config.latent_channels)


def text_config(config: TextEncoderConfig, tokenizer: CLIPTokenizer) -> CLIPTextConfig:
    """A text encoder of this size for this vocabulary."""
    return CLIPTextConfig(
        vocab_size=tokenizer.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.hidden_size * config.intermediate_ratio,
        projection_dim=config.projection_dim,
        num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=config.num_attention_heads,
        max_position_embeddings=config.max_position_embeddings,
        hidden_act=config.hidden_act,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def transformer_config(
    network: NetworkConfig, text: CLIPTextConfig, codebook_size: int, compress: bool
) -> TransformerConfig:
    """The transformer that fits this text encoder and codebook."""
    num_channels = network.num_attention_heads * network.attention_head_dim
    return TransformerConfig(
        in_channels=num_channels,
        num_layers=network.num_layers,
        num_single_layers=network.num_single_layers,
        attention_head_dim=network.attention_head_dim,
        num_attention_heads=network.num_attention_heads,
        joint_attention_dim=text.hidden_size,
        pooled_projection_dim=text.projection_dim,
        axes_dims_rope=network.axes_dims_rope,
        vocab_size=codebook_size + network.num_special_tokens,
        codebook_size=codebook_size,
        downsample=compress,
        upsample=compress,
        timestep_convention=network.timestep_convention,
    )


def _seeded(build: Callable[[], Built], seed: int, purpose: str) -> Built:
    """Run ``build`` with torch's generator at a place of its own, and put it back."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive(seed, purpose))
        return build()


def new_vq(config: TokenizerConfig) -> VQTokenizer:
    """A fresh image tokenizer; the same for the same seed."""
    return _seeded(lambda: VQTokenizer(vq_config(config)), config.seed, "vq weights")


def new_text_encoder(
    config: TextEncoderConfig, tokenizer: CLIPTokenizer, seed: int
) -> CLIPTextEncoder:
    """A fresh text encoder; the same for the same seed."""
    sizes = text_config(config, tokenizer)
    return _seeded(lambda: CLIPTextEncoder(sizes), seed, "text encoder weights")


def new_transformer(config: TransformerConfig, seed: int) -> MaskedImageTransformer:
    """A fresh transformer; the same for the same seed."""
    return _seeded(lambda: MaskedImageTransformer(config), seed, "transformer weights")
