"""The compiled network paints what the plain one paints, in one graph for each grid."""

import shutil
from collections.abc import Callable

import pytest
import torch

from model.compiled import compile_network
from model.errors import ModelError
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
def test_compiled_sampling_is_the_same(make_transformer: MakeTransformer, backend: str) -> None:
    plain, text = make_transformer(downsample=True, upsample=True), condition()
    compiled = make_transformer(downsample=True, upsample=True)
    torch._dynamo.reset()
    compile_network(compiled, backend)
    compile_network(compiled, backend)
    options = SamplingOptions(4, 3.0)
    for grid in ((4, 6), (6, 4)):
        blank = torch.full((2, *grid), MASK)
        expected = unmask(plain, blank, text, [0, 1], options)
        assert torch.equal(unmask(compiled, blank, text, [0, 1], options), expected)
    assert compiled.state_dict().keys() == plain.state_dict().keys()


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
