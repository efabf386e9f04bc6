"""From a recipe's sizes to the networks' own configurations."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import TypeVar

import torch
from torch import nn

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

MIN_GROUP_CHANNELS = 4  # channels that share a norm in the image tokenizer
RESIDUAL_GAIN = 0.3  # of a residual branch's last convolution at the start


def vq_config(config: TokenizerConfig) -> VQConfig:
    """The image tokenizer that stage 0 trains.

    Norm groups stay wide: a group of one or two channels would take a plain image's colour out.
    """
    small = VQConfig.small(config.block_out_channels, config.codebook_size, config.latent_channels)
    num_groups = max(1, math.gcd(*config.block_out_channels) // MIN_GROUP_CHANNELS)
    return replace(small, norm_num_groups=num_groups)


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

    def build() -> VQTokenizer:
        vq = VQTokenizer(vq_config(config))
        init_vq(vq)
        return vq

    return _seeded(build, config.seed, "vq weights")


@torch.no_grad()
def init_vq(vq: VQTokenizer) -> None:
    """Start where images are: convolutions keep their input's variance, residual branches are
    small, pixels count from the middle of [0, 1] and the first output is middle grey."""
    for name, module in vq.named_modules():
        if isinstance(module, nn.Conv2d) and module.bias is not None:
            nn.init.kaiming_normal_(module.weight, nonlinearity="linear")
            nn.init.zeros_(module.bias)
            if name.endswith("conv2"):
                module.weight.mul_(RESIDUAL_GAIN)
    first, last = vq.encoder.conv_in, vq.decoder.conv_out
    first.weight.mul_(2.0)
    if first.bias is not None and last.bias is not None:
        first.bias.copy_(-0.5 * first.weight.sum(dim=(1, 2, 3)))
        last.bias.fill_(0.5)
    last.weight.mul_(RESIDUAL_GAIN)


def new_text_encoder(
    config: TextEncoderConfig, tokenizer: CLIPTokenizer, seed: int
) -> CLIPTextEncoder:
    """A fresh text encoder; the same for the same seed."""
    sizes = text_config(config, tokenizer)
    return _seeded(lambda: CLIPTextEncoder(sizes), seed, "text encoder weights")


def new_transformer(config: TransformerConfig, seed: int) -> MaskedImageTransformer:
    """A fresh transformer; the same for the same seed."""
    return _seeded(lambda: MaskedImageTransformer(config), seed, "transformer weights")
