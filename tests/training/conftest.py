"""Small networks and hand-made token shards."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch

from model import CLIPTokenizer
from training.config import NetworkConfig, OptimizerConfig, StageConfig, TextEncoderConfig
from training.data import TokenShard
from training.masked_stage import MaskedStage, start_stage
from training.networks import new_text_encoder, new_transformer, transformer_config

CODEBOOK_SIZE = 32
NETWORK = NetworkConfig(
    num_layers=1,
    num_single_layers=1,
    attention_head_dim=8,
    num_attention_heads=2,
    axes_dims_rope=(2, 2, 4),
    num_special_tokens=1,
)
TEXT = TextEncoderConfig(
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_ratio=2,
    projection_dim=12,
    max_position_embeddings=16,
)


def _small_config(**changes: Any) -> StageConfig:
    """A stage that takes milliseconds."""
    values: dict[str, Any] = {
        "dataset": "toy",
        "resolution_px": 16,
        "steps": 6,
        "global_batch_size": 6,
        "optimizer": OptimizerConfig(learning_rate=1e-3, warmup_steps=2, schedule="cosine"),
        "text_tokens": 12,
        "precision": "fp32",
        "caption_mix": {"alt": 0.5, "synthetic": 0.5},
        "shuffle_window_shards": 2,
    }
    return StageConfig(**{**values, **changes})


def _token_shard(num_samples: int, number: int = 0, side: int = 4) -> TokenShard:
    """Random tokens; every third sample has no score."""
    rng = np.random.default_rng(number)
    scores = rng.uniform(3, 9, num_samples).astype(np.float32)
    scores[::3] = np.nan
    ids = [f"{number:02d}-{row:04d}" for row in range(num_samples)]
    return TokenShard(
        sample_ids=ids,
        tokens_NHW=rng.integers(0, CODEBOOK_SIZE, (num_samples, side, side)).astype(np.uint16),
        sizes_and_crops_N4=rng.integers(0, 99, (num_samples, 4)).astype(np.float32),
        preference_score_N=scores,
        aesthetic_score_N=scores,
        captions=[(("alt", f"alt of {i}"), ("synthetic", f"a long text of {i}")) for i in ids],
    )


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Networks this small only lose time, and on a busy machine much of it, to several threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def small_config() -> Callable[..., StageConfig]:
    """A stage of six quick steps; keyword arguments change fields."""
    return _small_config


@pytest.fixture
def token_shard() -> Callable[..., TokenShard]:
    """``token_shard(num_samples, number, side)``: random tokens, two captions each."""
    return _token_shard


@pytest.fixture(scope="session")
def tokenizer() -> CLIPTokenizer:
    """Bytes and two specials."""
    return CLIPTokenizer.train(["a long text of one", "alt of two"], 520)


@pytest.fixture
def new_stage(tokenizer: CLIPTokenizer) -> Callable[[StageConfig], MaskedStage]:
    """Fresh small networks for a stage; equal configurations give equal weights."""

    def build(config: StageConfig) -> MaskedStage:
        text_encoder = new_text_encoder(TEXT, tokenizer, seed=1)
        sizes = transformer_config(NETWORK, text_encoder.config, CODEBOOK_SIZE, config.compress)
        return start_stage(config, new_transformer(sizes, seed=2), text_encoder, tokenizer)

    return build
