"""The compiled network paints what the plain one paints, for every shape and after every change."""

import shutil
from collections.abc import Callable

import pytest
import torch
import torch._dynamo.utils
from torch import Tensor

from model import compiled as compiled_module
from model.compiled import compile_network
from model.errors import ModelError
from model.lora import LoRA, LoRAConfig
from model.quantize import quantize
from model.sampler import Condition, SamplingOptions, unmask
from model.text import TextFeatures
from model.transformer import MaskedImageTransformer

MASK = 39
MakeTransformer = Callable[..., MaskedImageTransformer]


def condition() -> Condition:
    generator = torch.Generator().manual_seed(0)
    states, pooled = torch.randn(2, 5, 12, generator=generator), torch.randn(2, 10)
    null = TextFeatures(torch.zeros(1, 5, 12), torch.zeros(1, 10))
    return Condition(TextFeatures(states, pooled), torch.full((2, 5), 6.0), null)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("as_one", [True, False])
def test_compiled_sampling_is_the_same(
    make_transformer: MakeTransformer, backend: str, as_one: bool
) -> None:
    plain, text = make_transformer(downsample=True, upsample=True), condition()
    compiled = make_transformer(downsample=True, upsample=True)
    torch._dynamo.reset()
    compile_network(compiled, backend, as_one=as_one)
    compile_network(compiled, backend, as_one=as_one)
    options = SamplingOptions(4, 3.0)
    for grid in ((4, 6), (6, 4)):
        blank = torch.full((2, *grid), MASK)
        expected = unmask(plain, blank, text, [0, 1], options)
        assert torch.equal(unmask(compiled, blank, text, [0, 1], options), expected)
    assert compiled.state_dict().keys() == plain.state_dict().keys()


def features(transformer: MaskedImageTransformer, batch: int) -> Tensor:
    generator = torch.Generator().manual_seed(batch)
    with torch.no_grad():
        return transformer.features(
            torch.randint(0, 40, (batch, 4, 6), generator=generator),
            torch.randn(batch, 5, 12, generator=generator),
            torch.randn(batch, 10, generator=generator),
            torch.randn(batch, 5, generator=generator),
            torch.rand(batch, generator=generator),
        )


def num_graphs() -> int:
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


@pytest.mark.slow
@pytest.mark.parametrize("as_one", [True, False])
def test_every_shape_runs_and_the_first_ones_compiled(
    make_transformer: MakeTransformer, monkeypatch: pytest.MonkeyPatch, as_one: bool
) -> None:
    """More shapes than torch's own limit of 8 are compiled; those beyond ours run as they are."""
    monkeypatch.setattr(compiled_module, "MAX_SHAPES", 9)
    plain, compiled = (make_transformer(num_layers=2) for _ in range(2))
    torch._dynamo.reset()
    before = num_graphs()
    compile_network(compiled, "eager", as_one=as_one)
    per_shape = 1 if as_one else 2  # a graph for each kind of block, however many there are
    for batch in (*range(1, 11), 1, 10):
        found, expected = features(compiled, batch), features(plain, batch)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
        if batch > 9:  # a compiled graph turns positions in real arithmetic
            assert torch.equal(found, expected)
    assert num_graphs() - before == 9 * per_shape


@pytest.mark.slow
@pytest.mark.parametrize("as_one", [True, False])
def test_what_changes_after_compiling_counts(
    make_transformer: MakeTransformer, as_one: bool
) -> None:
    """Adapters that come and go and weights of eight bits, on shapes that are compiled already."""
    plain, compiled = make_transformer(), make_transformer()
    torch._dynamo.reset()
    compile_network(compiled, "eager", as_one=as_one)
    both = (plain, compiled)
    seen = [features(compiled, 2)]
    adapters = [LoRA.start({"transformer": t}, LoRAConfig(rank=2)) for t in both]
    for lora in adapters:
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in lora.parameters():
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))

    def detach() -> None:
        for lora in adapters:
            lora.detach()

    def weaken() -> None:
        for lora in adapters:
            lora.weight = 0.5

    def shrink() -> None:
        for transformer in both:
            quantize(transformer, "int8")

    for change in (None, weaken, shrink, detach):
        if change is not None:
            change()
        found = features(compiled, 2)
        torch.testing.assert_close(found, features(plain, 2), atol=1e-5, rtol=0)
        assert all((found - other).abs().max() > 1e-3 for other in seen)
        seen.append(found)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
def test_inductor_gives_the_same_features(make_transformer: MakeTransformer) -> None:
    transformer = make_transformer(downsample=True, upsample=True)
    text, tokens = condition(), torch.randint(0, 40, (2, 4, 6))
    inputs = (tokens, *text.text, text.micro_conditions_B5, torch.tensor([0.5, 0.25]))
    with torch.no_grad():
        expected = transformer.features(*inputs)
        torch._dynamo.reset()
        compile_network(transformer)
        found = transformer.features(*inputs)
    assert torch.allclose(found, expected, atol=1e-4)


def test_position_tables_are_there_before_the_graph(make_transformer: MakeTransformer) -> None:
    transformer = make_transformer(downsample=True, upsample=True)
    transformer.prepare(torch.zeros(1, 4, 6, dtype=torch.long), torch.zeros(1, 5, 12))
    assert list(transformer._rotary) == [(5, 2, 3, torch.device("cpu"))]
    with pytest.raises(ModelError, match="token grid is 3 x 4"):
        transformer.prepare(torch.zeros(1, 3, 4, dtype=torch.long), torch.zeros(1, 5, 12))
