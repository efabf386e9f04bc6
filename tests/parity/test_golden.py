"""The published implementation's outputs on small random weights, reproduced to 1e-4."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from model.checkpoint import parse_config
from model.drawing import draw_tokens
from model.positions import rotary_tables
from model.sampler import num_left_masked, remask
from model.schedule import mask_schedule
from model.text import CLIPTextEncoder
from model.transformer import MaskedImageTransformer, TransformerConfig
from model.vq import VQTokenizer

GOLDEN = Path(__file__).parent.parent / "golden"
TOLERANCE = 1e-4
NUM_STEPS = 12


def largest_difference(got: Tensor, expected: Tensor) -> float:
    assert got.shape == expected.shape
    return float((got - expected).abs().max())


@pytest.mark.parametrize("case", ["int", "frac"])
@pytest.mark.parametrize("kind", ["plain", "compressed"])
def test_transformer_logits(kind: str, case: str) -> None:
    folder = GOLDEN / f"transformer_{kind}"
    transformer = MaskedImageTransformer.from_pretrained(folder)
    golden = load_file(folder / f"case_{case}.safetensors")
    with torch.no_grad():
        logits = transformer(
            golden["tokens"],
            golden["encoder_hidden_states"],
            golden["pooled_projections"],
            golden["micro_conds"],
            golden["timestep"],
        )
    assert largest_difference(logits, golden["logits"]) < TOLERANCE


@pytest.mark.parametrize("kind", ["plain", "compressed"])
def test_position_ids_are_those_of_the_inner_grid(kind: str) -> None:
    golden = load_file(GOLDEN / f"transformer_{kind}" / "case_int.safetensors")
    side = 4 if kind == "compressed" else 8
    # One channel pair per axis turns by exactly the position id: frequency 1.
    cos_SF, sin_SF = rotary_tables(9, side, side, (2, 2, 2), torch.device("cpu"))
    ids = torch.cat((golden["txt_ids"], golden["img_ids"])).double()
    assert largest_difference(cos_SF, ids.cos().float()) < 1e-6
    assert largest_difference(sin_SF, ids.sin().float()) < 1e-6


def test_vq_tokens_latents_and_reconstruction() -> None:
    vq = VQTokenizer.from_pretrained(GOLDEN / "vqvae")
    golden = load_file(GOLDEN / "vqvae" / "case.safetensors")
    with torch.no_grad():
        latents = vq.encode_latents(golden["image"])
        rebuilt = vq.decode_latents(vq.quantize.lookup(golden["tokens"]))
    assert largest_difference(latents, golden["latents"]) < TOLERANCE
    assert torch.equal(vq.encode(golden["image"]), golden["tokens"])
    assert largest_difference(rebuilt, golden["reconstruction"]) < TOLERANCE
    clipped = golden["reconstruction"].clamp(0, 1)
    assert largest_difference(vq.decode(golden["tokens"]), clipped) < TOLERANCE


def test_text_features() -> None:
    encoder = CLIPTextEncoder.from_pretrained(GOLDEN / "text_encoder")
    golden = load_file(GOLDEN / "text_encoder" / "case.safetensors")
    with torch.no_grad():
        features = encoder(golden["input_ids"])
    assert largest_difference(features.hidden_BTD, golden["penultimate"]) < TOLERANCE
    assert largest_difference(features.pooled_BP, golden["text_embeds"]) < TOLERANCE


@pytest.mark.parametrize("timestep", [0, 1, 6, 11])
@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_unmasking_step(schedule: str, timestep: int) -> None:
    config = json.loads((GOLDEN / "scheduler" / "scheduler_config.json").read_text())
    mask_token_id = config["mask_token_id"]
    golden = load_file(GOLDEN / "scheduler.safetensors")
    tensors = {
        name: golden[f"{schedule}.{timestep}.{name}"]
        for name in ("logits", "sample", "prev_sample", "pred_original_sample")
    }
    mask = tensors["sample"] == mask_token_id
    logits_NV = tensors["logits"].permute(0, 2, 3, 1)[mask]
    uniform_N = torch.rand(len(logits_NV), generator=torch.Generator().manual_seed(0))
    drawn_N, prob_N = draw_tokens(logits_NV, uniform_N)
    predicted = tensors["sample"].masked_scatter(mask, drawn_N)
    assert torch.equal(predicted, tensors["pred_original_sample"])

    num_tokens = torch.full((len(mask),), mask[0].numel())
    num_left = num_left_masked(
        num_tokens,
        mask.flatten(1).sum(dim=1),
        NUM_STEPS - 1 - timestep,
        NUM_STEPS,
        mask_schedule(schedule),
    )
    noise_N = torch.zeros(len(prob_N))
    remasked = remask(predicted, mask, prob_N, noise_N, num_left, mask_token_id)
    assert torch.equal(remasked, tensors["prev_sample"])


def test_released_model_has_the_published_names_and_shapes() -> None:
    golden = json.loads((GOLDEN / "meissonic_1b_state_dict.json").read_text())
    config = parse_config(TransformerConfig, golden["config"], "golden")
    with torch.device("meta"):
        transformer = MaskedImageTransformer(config)
    shapes = {key: list(value.shape) for key, value in transformer.state_dict().items()}
    assert shapes == golden["state_dict"]
    assert sum(p.numel() for p in transformer.parameters()) == golden["parameters"] == 1_006_946_304
