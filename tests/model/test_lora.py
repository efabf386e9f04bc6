"""Adapters: nothing at the start, gradients in them alone, merged as stacked, every spelling."""

import weakref
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from model.errors import ModelError
from model.lora import Adapter, LoRA, LoRAConfig, Merged
from model.lora_files import WEIGHTS_NAME
from model.quantize import QuantizedLinear, quantize
from model.text_to_image import TextToImage
from model.transformer import MaskedImageTransformer
from tests.model.conftest import MakeTransformer


def given() -> tuple[Tensor, ...]:
    torch.manual_seed(3)
    tokens = torch.randint(0, 32, (2, 4, 6))
    return tokens, torch.randn(2, 5, 12), torch.randn(2, 10), torch.randn(2, 5), torch.rand(2)


def run(transformer: MaskedImageTransformer) -> Tensor:
    with torch.no_grad():
        out: Tensor = transformer(*given())
    return out


def trained(transformer: MaskedImageTransformer, seed: int = 0, **options: object) -> LoRA:
    """Adapters with random values in both halves."""
    lora = LoRA.start({"transformer": transformer}, LoRAConfig(rank=2, alpha=3.0, **options))  # type: ignore[arg-type]  # options by name
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in lora.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return lora.eval()


def test_fresh_adapters_add_nothing(make_transformer: MakeTransformer) -> None:
    transformer = make_transformer()
    before = run(transformer)
    lora = LoRA.start({"transformer": transformer}, LoRAConfig(rank=2, dropout=0.5))
    # An adapted layer is no longer fused with its activation: the last bits differ.
    torch.testing.assert_close(run(transformer), before, atol=1e-6, rtol=0)
    assert len(lora.adapters) == 17  # 12 in the joint block (8 of attention, 4 of two MLPs), 5


def test_gradients_are_in_the_adapters_alone(make_transformer: MakeTransformer) -> None:
    transformer = make_transformer()
    lora = LoRA.start({"transformer": transformer}, LoRAConfig(rank=2))
    transformer.gradient_checkpointing = True
    transformer.train()
    transformer(*given()).square().mean().backward()
    assert all(p.grad is None and not p.requires_grad for p in transformer.parameters())
    ups = [p for name, p in lora.named_parameters() if name.endswith("lora_B")]
    assert sum(bool(p.grad is not None and p.grad.abs().sum() > 0) for p in ups) == len(ups)
    optimizer = torch.optim.AdamW(lora.parameters(), lr=1e-2)
    first = run(transformer)
    optimizer.step()
    assert not torch.equal(run(transformer), first)


def test_one_layer_is_the_formula_in_double_precision() -> None:
    torch.manual_seed(0)
    part = nn.Sequential(nn.Linear(6, 4))
    lora = LoRA.start({"m": part}, LoRAConfig(rank=3, alpha=6.0, targets=r"\d+"))
    with torch.no_grad():
        for parameter in lora.parameters():
            parameter.normal_()
    lora.weight, x = 0.7, torch.randn(5, 6)
    a, b = (p.detach().double() for p in lora.parameters())
    layer = part[0]
    assert isinstance(layer, nn.Linear)
    weight = layer.weight.detach().double() + 0.7 * 2.0 * (b @ a)
    want = x.double() @ weight.T + layer.bias.detach().double()
    torch.testing.assert_close(part(x).double(), want, rtol=1e-5, atol=1e-5)


def test_merged_is_the_same_and_undone_to_the_bit(make_transformer: MakeTransformer) -> None:
    transformer = make_transformer()
    before = {name: value.clone() for name, value in transformer.state_dict().items()}
    plain = run(transformer)
    loras = [trained(transformer, seed) for seed in (0, 1)]
    loras[0].weight, loras[1].weight = 0.8, -0.5
    stacked = run(transformer)
    assert (stacked - plain).abs().max() > 0.01
    merged = Merged(loras)
    torch.testing.assert_close(run(transformer), stacked, rtol=1e-5, atol=1e-5)
    merged.undo()
    assert all(torch.equal(v, before[name]) for name, v in transformer.state_dict().items())
    assert torch.equal(run(transformer), stacked)
    for lora in loras:
        lora.detach()
    assert torch.equal(run(transformer), plain)
    assert set(before) == set(transformer.state_dict())


def test_folders_in_the_published_spelling_come_back(
    make_transformer: MakeTransformer, tmp_path: Path
) -> None:
    transformer = make_transformer()
    lora = trained(transformer)
    want = run(transformer)
    lora.save_pretrained(tmp_path / "style")
    lora.detach()
    keys = set(load_file(tmp_path / "style" / WEIGHTS_NAME))
    assert "transformer.transformer_blocks.0.attn.to_out.0.lora_A.weight" in keys
    assert "transformer.single_transformer_blocks.0.proj_mlp.lora_B.weight" in keys
    again = LoRA.from_pretrained(tmp_path / "style", {"transformer": transformer})
    torch.testing.assert_close(run(transformer), want, atol=1e-6, rtol=0)
    assert not any(p.requires_grad for p in again.parameters())


def test_kohyas_spelling_is_read(make_transformer: MakeTransformer, tmp_path: Path) -> None:
    transformer = make_transformer()
    lora = trained(transformer)
    want = run(transformer)
    lora.detach()
    tensors = {}
    for adapter in lora.adapters:
        name = "lora_transformer_" + str(adapter.name).partition(".")[2].replace(".", "_")
        tensors[f"{name}.lora_down.weight"] = adapter.lora_A.detach()  # type: ignore[operator]  # an Adapter
        tensors[f"{name}.lora_up.weight"] = adapter.lora_B.detach()  # type: ignore[operator]  # an Adapter
        tensors[f"{name}.alpha"] = torch.tensor(3.0)
    save_file(tensors, tmp_path / "kohya.safetensors")
    LoRA.from_pretrained(tmp_path / "kohya.safetensors", {"transformer": transformer})
    torch.testing.assert_close(run(transformer), want, atol=1e-6, rtol=0)


def test_adapters_lie_on_quantised_layers_but_do_not_merge(
    make_transformer: MakeTransformer,
) -> None:
    transformer = make_transformer()
    quantize(transformer, "int8")
    before = run(transformer)
    lora = trained(transformer)
    assert (run(transformer) - before).abs().max() > 0.01
    with pytest.raises(ModelError, match="is quantised"):
        Merged([lora])


def test_adapters_stay_when_their_layers_are_quantised(make_transformer: MakeTransformer) -> None:
    first, last = make_transformer(), make_transformer()
    plain = run(first)
    adapters = trained(first)
    wide = [weakref.ref(adapters.layer_of(a)) for a in adapters.adapters if isinstance(a, Adapter)]
    quantize(first, "int8")
    assert all(isinstance(adapters.layer_of(a), QuantizedLinear) for a in adapters._each())
    assert not any(layer() for layer in wide)  # no handle holds the memory that was to be saved
    quantize(last, "int8")
    small = run(last)
    trained(last)
    assert torch.equal(run(first), run(last))
    assert (run(first) - small).abs().max() > 0.01
    adapters.detach()
    assert torch.equal(run(first), small)
    assert not torch.equal(small, plain)


def test_what_was_merged_before_quantising_is_not_taken_out(
    make_transformer: MakeTransformer,
) -> None:
    transformer = make_transformer()
    merged = Merged([trained(transformer)])
    quantize(transformer, "int8")
    before = run(transformer)
    with pytest.raises(ModelError, match="was replaced after merging"):
        merged.undo()
    assert torch.equal(run(transformer), before)


def test_a_painter_paints_with_adapters(painter: TextToImage, tmp_path: Path) -> None:
    plain = painter.generate_tokens(["a"], steps=3)
    parts = {"transformer": painter.transformer, "text_encoder": painter.text_encoder}
    lora = LoRA.start(parts, LoRAConfig(rank=2, targets=r".*(to_q|to_v|q_proj|v_proj)"))
    assert {str(a.name).partition(".")[0] for a in lora.adapters} == set(parts)
    with torch.no_grad():
        for parameter in lora.parameters():
            parameter.normal_()
    want = painter.generate_tokens(["a"], steps=3)
    lora.save_pretrained(tmp_path / "l")
    lora.detach()
    painter.load_lora(tmp_path / "l", 0.5)
    half = painter.generate_tokens(["a"], steps=3)
    painter.load_lora(tmp_path / "l", 0.5)
    assert torch.equal(painter.generate_tokens(["a"], steps=3), want)
    painter.remove_loras()
    assert torch.equal(painter.generate_tokens(["a"], steps=3), plain)
    assert not torch.equal(half, plain)


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (lambda t: {}, "it holds none"),
        (lambda t: {**t, "x.lora_A.weight": torch.zeros(1)}, "x.lora_A.weight is of no linear"),
        (lambda t: dict(list(t.items())[1:]), "has one half only"),
        (lambda t: {k: v[:, :3] for k, v in t.items()}, r"expected \(rank, 16\)"),
        (lambda t: {k: v[:0] for k, v in t.items()}, "expected"),
        (lambda t: {k: v * torch.nan for k, v in t.items()}, "NaN or infinite"),
    ],
)
def test_files_that_do_not_fit_are_one_line(  # type: ignore[no-untyped-def]  # change is a lambda
    make_transformer: MakeTransformer, tmp_path: Path, change, line: str
) -> None:
    transformer = make_transformer()
    trained(transformer).save_pretrained(tmp_path / "l")
    path = tmp_path / "l" / WEIGHTS_NAME
    tensors = {key: value.clone() for key, value in load_file(path).items()}
    save_file({k: v.contiguous() for k, v in change(tensors).items()}, path)
    with pytest.raises(ModelError, match=line) as caught:
        LoRA.from_pretrained(tmp_path / "l", {"transformer": transformer})
    assert "\n" not in str(caught.value)


def test_requests_that_cannot_be(make_transformer: MakeTransformer, tmp_path: Path) -> None:
    parts = {"transformer": make_transformer()}
    for options, line in (
        ({"rank": 0}, "the rank"),
        ({"dropout": 1.0}, "dropout is"),
        ({"targets": "("}, "no regular expression"),
        ({"targets": "nothing"}, "no linear layer is called"),
    ):
        with pytest.raises(ModelError, match=line):
            LoRA.start(parts, LoRAConfig(**options))
    with pytest.raises(ModelError, match="has no adapters: expected pytorch_lora_weights"):
        LoRA.from_pretrained(tmp_path, parts)
    (tmp_path / WEIGHTS_NAME).write_bytes(b"{}")
    with pytest.raises(ModelError, match="does not read as adapters"):
        LoRA.from_pretrained(tmp_path, parts)
