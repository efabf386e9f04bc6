"""Small networks and hand-made token shards."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from infra import storage
from infra.digests import sha256_bytes
from infra.manifest import (
    SHARD_SIZES,
    DatasetManifest,
    ShardEntry,
    publish_manifest,
    shard_path,
)
from model import CLIPTokenizer
from training.checkpoint import optimizer_tensors, restore_optimizer
from training.config import (
    NetworkConfig,
    OptimizerConfig,
    StageConfig,
    TextEncoderConfig,
    TokenizerConfig,
)
from training.data import TokenShard, in_memory
from training.masked_stage import MaskedStage, named_trained, start_stage, train_step
from training.networks import new_text_encoder, new_transformer, new_vq, transformer_config
from training.publish import publish_folder

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
def network_config() -> NetworkConfig:
    """Two blocks of 16 channels."""
    return NETWORK


@pytest.fixture
def text_encoder_config() -> TextEncoderConfig:
    """Two layers of 16 channels."""
    return TEXT


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


@pytest.fixture
def carried_over(
    new_stage: Callable[[StageConfig], MaskedStage], token_shard: Callable[..., TokenShard]
) -> Callable[[StageConfig], dict[str, Tensor]]:
    """Hold a stage that stops after two steps and goes on for two to one that never stopped.

    Returns the optimizer's tensors as they were carried from the one process to the next.
    """

    def check(config: StageConfig) -> dict[str, Tensor]:
        dataset = in_memory([token_shard(12)], config)
        unbroken, first, second = (new_stage(config) for _ in range(3))
        for step in range(4):
            train_step(unbroken, dataset.batch_at(step))
        for step in range(2):
            train_step(first, dataset.batch_at(step))
        carried = optimizer_tensors(first.optimizer)
        for name, parameter in named_trained(second.optimizer):
            parameter.data.copy_(dict(named_trained(first.optimizer))[name])
        restore_optimizer(second.optimizer, carried)
        second.step = first.step
        for step in range(2, 4):
            train_step(second, dataset.batch_at(step))
        expected = {name: p.detach() for name, p in named_trained(unbroken.optimizer)}
        found = {name: p.detach() for name, p in named_trained(second.optimizer)}
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
        return carried

    return check


def _painted(rng: np.random.Generator, width: int, height: int) -> Image.Image:
    """A plain background with one plain rectangle."""
    back, front = (tuple(255 * int(c) for c in rng.integers(0, 2, 3)) for _ in range(2))
    image = Image.new("RGB", (width, height), back)
    left, top = (int(v) for v in rng.integers(0, min(width, height) // 2, 2))
    ImageDraw.Draw(image).rectangle([left, top, left + 14, top + 14], fill=front)
    return image


def _curated_sample(number: int, size: tuple[int, int]) -> dict[str, bytes]:
    rng = np.random.default_rng(number)
    image = io.BytesIO()
    _painted(rng, *size).save(image, "PNG")
    sample_id = f"{number:016x}"
    known = {
        "sample_id": sample_id,
        "caption": f"a rectangle number {number}",
        "captions": [
            {"origin": "alt", "text": f"a rectangle number {number}", "model": None},
            {"origin": "synthetic", "text": f"a long text about rectangle {number}", "model": "m"},
        ][: 1 + number % 2],
        "original_width_px": 2 * size[0] + 16,
        "original_height_px": 2 * size[1],
        "crop_left_px": 8,
        "crop_top_px": 0,
        "preference_score": None if number % 5 == 0 else 4.0 + number % 3,
        "aesthetic_score": 5.0 + 0.1 * number,
    }
    return {
        f"{sample_id}.json": json.dumps(known).encode(),
        f"{sample_id}.png": image.getvalue(),
        f"{sample_id}.txt": str(known["caption"]).encode(),
    }


def _tar(members: dict[str, bytes]) -> bytes:
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return sink.getvalue()


@pytest.fixture
def curated(tmp_path: Path) -> Callable[..., str]:
    """``curated(sizes_per_shard)``: a published dataset of small images, one list of (width,
    height) per shard; returns its manifest's address. ``in_buckets`` says of shards whose images
    have one size which it is."""

    def build(
        sizes_per_shard: list[list[tuple[int, int]]], name: str = "toy", in_buckets: bool = False
    ) -> str:
        root = storage.join((tmp_path / "store").as_uri(), "datasets", name)
        entries, number = [], 0
        for sizes in sizes_per_shard:
            members: dict[str, bytes] = {}
            for size in sizes:
                members |= _curated_sample(number, size)
                number += 1
            data = _tar(members)
            path = shard_path(sha256_bytes(data))
            storage.write_bytes(storage.join(root, path), data)
            entries.append(ShardEntry(path, len(data), sha256_bytes(data), len(sizes)))
        counts = {"rows_in": number, "committed": number, "rejected": 0, "failed": 0}
        manifest = DatasetManifest(name, "0" * 64, entries, [], counts)
        if in_buckets:
            pairs = zip(entries, sizes_per_shard, strict=True)
            manifest.attributes[SHARD_SIZES] = {e.path: list(sizes[0]) for e, sizes in pairs}
        return publish_manifest(root, manifest)

    return build


@pytest.fixture
def vq_folder(tmp_path: Path) -> Path:
    """A model folder with an untrained tokenizer of 4 px per token in ``vqvae/``."""
    config = TokenizerConfig(
        block_out_channels=(8, 8, 8), latent_channels=4, codebook_size=CODEBOOK_SIZE
    )
    folder = tmp_path / "tokenizer-model"
    new_vq(config).save_pretrained(folder / "vqvae")
    return folder


@pytest.fixture
def raw_job(
    tmp_path: Path,
    curated: Callable[..., str],
    vq_folder: Path,
    tokenizer: Any,
    text_encoder_config: Any,
    network_config: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> Callable[[StageConfig], dict[str, Any]]:
    """What the driver would send for a stage that starts from a published tokenizer."""
    monkeypatch.setenv("ATELIER_HOME", str(tmp_path / "home"))
    tokenizer.save_pretrained(vq_folder / "tokenizer")
    encoder = new_text_encoder(text_encoder_config, tokenizer, seed=1)
    encoder.save_pretrained(vq_folder / "text_encoder")
    store_uri = (tmp_path / "store").as_uri()
    init_uri = publish_folder(vq_folder, store_uri, "tokenizer", {}).uri
    manifest_uri = curated([[(32, 32)] * 9, [(40, 32)] * 7], in_buckets=True)

    def build(config: StageConfig) -> dict[str, Any]:
        return {
            "kind": "masked",
            "stage": "concepts",
            "stage_key": "k" * 64,
            "run_uri": "file:///chosen/below",
            "recipe": "toy",
            "attempt": 1,
            "configs": {
                "stage": config.model_dump(mode="json"),
                "network": network_config.model_dump(mode="json"),
            },
            "manifest_uri": manifest_uri,
            "init_uri": init_uri,
            "progress_uri": storage.file_uri(tmp_path / "progress.json"),
        }

    return build
