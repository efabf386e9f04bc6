"""Exported folders in the published implementation, and what it exports here.

PUBLISHED_MEISSONIC names a folder with the published `src/` package, and with the diffusers and
transformers that it was written for where the installed ones are others. Without it there is
nothing to compare with, and these are skipped.
"""

import importlib
import os
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from model.folder import PainterDefaults
from model.text import CLIPTextConfig, CLIPTextEncoder
from model.text_to_image import TextToImage
from model.text_tokenizer import CLIPTokenizer
from model.transformer import MaskedImageTransformer, TransformerConfig
from model.vq import VQConfig, VQTokenizer

pytestmark = pytest.mark.skipif(
    "PUBLISHED_MEISSONIC" not in os.environ, reason="needs the published implementation"
)
PROMPTS = ["a red circle", "", "\U0001f98a fox, it's 3 o'clock", "مرحبا", "red " * 2500]
CHANNELS, SIDE_PX, STEPS = 64, 256, 12


@pytest.fixture
def published(monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    monkeypatch.setattr(sys, "path", [os.environ["PUBLISHED_MEISSONIC"], *sys.path])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        names = {
            "Transformer2DModel": "src.transformer", "Scheduler": "src.scheduler",
            "Pipeline": "src.pipeline", "VQModel": "diffusers",
            "CLIPTextModelWithProjection": "transformers", "CLIPTokenizer": "transformers",
        }  # fmt: skip
        found = {name: getattr(importlib.import_module(m), name) for name, m in names.items()}
        yield SimpleNamespace(**found, pipeline_module=importlib.import_module("src.pipeline"))


def painter_of(compresses: bool, dtype: torch.dtype) -> TextToImage:
    tokenizer = CLIPTokenizer.train(["a red circle", "a blue star on a green square"] * 3, 560)
    torch.manual_seed(0)
    text = CLIPTextEncoder(
        CLIPTextConfig(
            vocab_size=tokenizer.vocab_size,
            hidden_size=CHANNELS,
            intermediate_size=2 * CHANNELS,
            projection_dim=CHANNELS,
            num_hidden_layers=3,
            num_attention_heads=4,
            hidden_act="gelu",
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )
    vq = VQTokenizer(VQConfig.small((32, 32, 64, 64, 64), 128, 8))
    transformer = MaskedImageTransformer(
        TransformerConfig(
            num_layers=2,
            num_single_layers=3,
            attention_head_dim=16,
            num_attention_heads=4,
            joint_attention_dim=CHANNELS,
            pooled_projection_dim=CHANNELS,
            axes_dims_rope=(4, 6, 6),
            vocab_size=136,
            codebook_size=128,
            downsample=compresses,
            upsample=compresses,
        )
    )
    vq.reset_codebook(torch.randn(128, 8))
    with torch.no_grad():
        for part in (text, transformer):
            for parameter in part.parameters():
                parameter.add_(0.05 * torch.randn(parameter.shape))
    painter = TextToImage(transformer, vq, text, tokenizer, PainterDefaults(resolution_px=SIDE_PX))
    text.eval().to(dtype)
    vq.eval().to(dtype)
    transformer.eval().to(dtype)
    return painter


def load_strictly(cls: Any, folder: Path, dtype: torch.dtype) -> Any:
    """The part, after making sure that no weight was missing or left over."""
    part, told = cls.from_pretrained(folder, torch_dtype=dtype, output_loading_info=True)
    assert not any(told.values()), told
    return part


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("compresses", [True, False])
def test_every_part_loads_there_and_says_the_same(
    published: SimpleNamespace, tmp_path: Path, compresses: bool, dtype: torch.dtype
) -> None:
    ours = painter_of(compresses, dtype)
    ours.save_pretrained(tmp_path / "painter")
    folder = tmp_path / "painter"
    load_strictly(published.Transformer2DModel, folder / "transformer", dtype)
    vq = load_strictly(published.VQModel, folder / "vqvae", dtype)
    text = load_strictly(published.CLIPTextModelWithProjection, folder / "text_encoder", dtype)
    tokenizer = published.CLIPTokenizer.from_pretrained(folder / "tokenizer")
    options = {"padding": "max_length", "truncation": True, "max_length": 77}
    ids = tokenizer(PROMPTS, return_tensors="pt", **options).input_ids
    assert torch.equal(ids, ours.tokenizer(PROMPTS, 77))
    near = {torch.float32: 1e-4, torch.bfloat16: 0.1, torch.float16: 0.02}[dtype]
    tokens = torch.randint(0, 128, (2, 8, 8))
    with torch.no_grad():
        theirs, mine = text(ids, output_hidden_states=True), ours.text_encoder(ids)
        assert float((theirs.hidden_states[-2] - mine.hidden_BTD).abs().max()) < near
        assert float((theirs.text_embeds - mine.pooled_BP).abs().max()) < near
        pixels = vq.decode(tokens, force_not_quantize=True, shape=(2, 8, 8, 8)).sample
        assert float((pixels.clamp(0, 1) - ours.vq.decode(tokens)).abs().max()) < near


@pytest.mark.parametrize("compresses", [True, False])
def test_its_pipeline_paints_the_same_and_its_shards_come_back(
    published: SimpleNamespace,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    compresses: bool,
) -> None:
    ours, folder = painter_of(compresses, torch.float32), tmp_path / "painter"
    ours.save_pretrained(folder)
    parts: dict[str, Any] = {
        "vqvae": published.VQModel.from_pretrained(folder / "vqvae"),
        "tokenizer": published.CLIPTokenizer.from_pretrained(folder / "tokenizer"),
        "text_encoder": published.CLIPTextModelWithProjection.from_pretrained(
            folder / "text_encoder"
        ),
        "transformer": published.Transformer2DModel.from_pretrained(folder / "transformer"),
        "scheduler": published.Scheduler.from_pretrained(folder / "scheduler"),
    }
    pipeline = published.Pipeline(**parts)
    pipeline.set_progress_bar_config(disable=True)
    ids_of = published.pipeline_module._prepare_latent_image_ids
    if compresses:  # it makes ids for a compressing network at 1024 px alone
        monkeypatch.setattr(
            published.pipeline_module,
            "_prepare_latent_image_ids",
            lambda batch, height, width, *rest: ids_of(batch, height // 2, width // 2, *rest),
        )
    monkeypatch.setattr(
        torch, "multinomial", lambda probs, num, generator: probs.argmax(dim=-1, keepdim=True)
    )
    prompts = PROMPTS[:3]
    theirs = pipeline(
        prompt=prompts,
        negative_prompt=["blurry"] * len(prompts),
        height=SIDE_PX,
        width=SIDE_PX,
        num_inference_steps=STEPS,
        temperature=(0, 0),
        output_type="latent",
    ).images
    how: dict[str, Any] = {"steps": STEPS, "negative_prompt": "blurry", "token_temperature": 0.0}
    how["temperature"] = (0.0, 0.0)
    mine = ours.generate_tokens(prompts, SIDE_PX, SIDE_PX, **how)
    assert torch.equal(theirs, mine)

    back = tmp_path / "back"
    for name, part in parts.items():
        shards = {"max_shard_size": "300KB"} if name == "transformer" else {}
        part.save_pretrained(back / name, **shards)
    assert len(list((back / "transformer").glob("*.safetensors"))) > 2
    (back / "model_index.json").write_text('{"_class_name": "Pipeline"}')
    again = TextToImage.from_pretrained(back).generate_tokens(prompts, SIDE_PX, SIDE_PX, **how)
    assert torch.equal(again, mine)
