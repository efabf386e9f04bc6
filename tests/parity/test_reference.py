"""Logits and gradients against the second writing of the network, in float64.

The reference is itself held to the published outputs, so the two chains close. It reads config.json
and the weights with json and safetensors alone: what `save_pretrained` writes is the published
layout to a reader that knows nothing of this project.
"""

import importlib.util
import json
import math
from pathlib import Path
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from model.loss import masked_token_loss
from model.transformer import MaskedImageTransformer

GOLDEN = Path(__file__).parent.parent / "golden"
WEIGHTS = "diffusion_pytorch_model.safetensors"
TOLERANCE = 1e-4


def load_reference() -> ModuleType:
    path = Path(__file__).with_name("reference.py")
    spec = importlib.util.spec_from_file_location("parity_reference", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


reference = load_reference()


def published(kind: str, dtype: torch.dtype) -> tuple[dict[str, Tensor], dict[str, object]]:
    folder = GOLDEN / f"transformer_{kind}"
    config = json.loads((folder / "config.json").read_text())
    return {k: v.to(dtype) for k, v in load_file(folder / WEIGHTS).items()}, config


def inputs_of(case: dict[str, Tensor], dtype: torch.dtype) -> tuple[Tensor, ...]:
    return (
        case["tokens"],
        case["encoder_hidden_states"].to(dtype),
        case["pooled_projections"].to(dtype),
        case["micro_conds"].to(dtype),
        case["timestep"],
    )


@pytest.mark.parametrize("case", ["int", "frac"])
@pytest.mark.parametrize("kind", ["plain", "compressed"])
def test_the_reference_is_the_published_network(kind: str, case: str) -> None:
    weights, config = published(kind, torch.float64)
    golden = load_file(GOLDEN / f"transformer_{kind}" / f"case_{case}.safetensors")
    logits = reference.logits_of(weights, config, *inputs_of(golden, torch.float64))
    assert float((logits - golden["logits"]).abs().max()) < TOLERANCE


@pytest.mark.parametrize("kind", ["plain", "compressed"])
def test_loss_and_every_gradient(kind: str) -> None:
    weights, config = published(kind, torch.float64)
    leaves = {key: value.requires_grad_() for key, value in weights.items()}
    transformer = MaskedImageTransformer.from_pretrained(GOLDEN / f"transformer_{kind}")
    golden = load_file(GOLDEN / f"transformer_{kind}" / "case_int.safetensors")
    _, text, pooled, micro, _ = inputs_of(golden, torch.float64)
    generator = torch.Generator().manual_seed(0)
    shape = golden["tokens"].shape
    tokens = torch.randint(0, transformer.config.codebook_size, shape, generator=generator)
    mask = torch.rand(shape, generator=generator) < 0.6
    ratio = mask.flatten(1).float().mean(dim=1)

    loss = masked_token_loss(
        transformer, tokens, mask, text.float(), pooled.float(), micro.float(), ratio
    )
    torch.autograd.backward(loss)
    seen = torch.where(mask, transformer.config.mask_token_id, tokens)
    timestep = ((1 - torch.acos(ratio) * (2 / math.pi)) * 64 - 1).clamp(min=0)
    logits = reference.logits_of(leaves, config, seen, text, pooled, micro, timestep)
    expected = F.cross_entropy(logits.permute(0, 2, 3, 1)[mask], tokens[mask])
    torch.autograd.backward(expected)

    assert abs(float(loss.detach()) - float(expected.detach())) < TOLERANCE
    names = set()
    for name, parameter in transformer.named_parameters():
        exact = leaves[name].grad
        assert parameter.grad is not None
        assert exact is not None
        bound = TOLERANCE * float(exact.abs().max())
        assert float((parameter.grad - exact).abs().max()) < min(bound, TOLERANCE), name
        names.add(name)
    assert names == set(leaves)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", ["plain", "compressed"])
def test_an_exported_folder_is_the_published_layout(
    kind: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    source = GOLDEN / f"transformer_{kind}"
    transformer = MaskedImageTransformer.from_pretrained(source, dtype)
    transformer.save_pretrained(tmp_path / "transformer")
    config = json.loads((tmp_path / "transformer" / "config.json").read_text())
    stored = load_file(tmp_path / "transformer" / WEIGHTS)
    before = load_file(source / WEIGHTS)
    assert stored.keys() == before.keys()
    assert all(torch.equal(stored[key], before[key].to(dtype)) for key in before)
    golden = load_file(source / "case_int.safetensors")
    widened = {key: value.double() for key, value in stored.items()}
    logits = reference.logits_of(widened, config, *inputs_of(golden, torch.float64))
    bound = TOLERANCE if dtype == torch.float32 else 0.1 * float(golden["logits"].abs().max())
    assert float((logits - golden["logits"]).abs().max()) < bound
