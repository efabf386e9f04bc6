"""Which tokens stay: the fixed orders, the ways to be certain, and guidance that varies."""

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from model.drawing import draw_tokens
from model.errors import ModelError
from model.order import ENTROPY, MARGIN, ORDERS, certainty, halton_ranks
from model.sampler import Condition, SamplingOptions, unmask, unmask_steps
from model.text import TextFeatures
from model.transformer import MaskedImageTransformer

MASK = 39
MakeTransformer = Callable[..., MaskedImageTransformer]


def condition(batch: int) -> Condition:
    generator = torch.Generator().manual_seed(0)
    states, pooled = (torch.randn(shape, generator=generator) for shape in ((1, 5, 12), (1, 10)))
    text = TextFeatures(states.expand(batch, -1, -1), pooled.expand(batch, -1))
    null = TextFeatures(-states, -pooled)
    return Condition(text, torch.full((batch, 5), 6.0), null)


@given(height=st.integers(1, 24), width=st.integers(1, 24))
def test_halton_ranks_are_a_permutation(height: int, width: int) -> None:
    ranks = halton_ranks(height, width)
    assert ranks.flatten().sort().values.tolist() == list(range(height * width))


def test_halton_follows_the_sequence() -> None:
    # Points 1 … 6: rows 1/2 1/4 3/4 1/8 5/8 3/8, columns 1/3 2/3 1/9 4/9 7/9 2/9.
    ranks = halton_ranks(4, 3)
    cells = [(2, 1), (1, 2), (3, 0), (0, 1), (2, 2), (1, 0)]
    assert [int(ranks[cell]) for cell in cells] == list(range(6))


@pytest.mark.parametrize("share", [0.1, 0.25, 0.5])
def test_halton_covers_the_image_evenly(share: float) -> None:
    first = (halton_ranks(32, 32) < share * 1024).float()
    quarters = torch.nn.functional.avg_pool2d(first[None, None], 8).flatten()
    chance = math.sqrt(share * (1 - share) / 64)  # deviation were they drawn at random
    assert float(quarters.std()) < 0.5 * chance


def test_certainty_of_a_row() -> None:
    probs = torch.tensor([[0.5, 0.25, 0.25], [1.0, 0.0, 0.0], [1 / 3, 1 / 3, 1 / 3]])
    drawn = torch.tensor([0.25, 1.0, 1 / 3])
    assert certainty(probs, drawn, "confidence") is drawn
    assert torch.allclose(certainty(probs, drawn, MARGIN), torch.tensor([0.25, 1.0, 0.0]))
    expected = torch.tensor([2**-1.5, 1.0, 1 / 3])
    assert torch.allclose(certainty(probs, drawn, ENTROPY), expected)


def test_cold_draws_take_the_likeliest_token() -> None:
    logits = torch.randn(50, 9, generator=torch.Generator().manual_seed(0))
    uniform = torch.rand(50, generator=torch.Generator().manual_seed(1))
    tokens, prob = draw_tokens(logits, uniform, token_temperature=0.0)
    assert torch.equal(tokens, logits.argmax(dim=1))
    assert torch.allclose(prob, logits.softmax(dim=1).amax(dim=1))
    nearly, _ = draw_tokens(logits, uniform, token_temperature=1e-3)
    assert torch.equal(tokens, nearly)


def test_warm_draws_spread_more() -> None:
    logits = torch.tensor([0.8, 0.1, 0.1]).log().expand(20_000, 3)
    uniform = torch.rand(20_000, generator=torch.Generator().manual_seed(0))
    shares = []
    for temperature in (0.5, 1.0, 2.0):
        tokens, _ = draw_tokens(logits, uniform, temperature)
        expected = float((logits[0] / temperature).softmax(dim=0)[0])
        shares.append(float((tokens == 0).float().mean()))
        assert abs(shares[-1] - expected) < 0.01
    assert shares == sorted(shares, reverse=True)


@pytest.mark.parametrize("zigzag", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("order", ORDERS)
def test_every_order_fills_all_and_keeps_what_is_given(
    make_transformer: MakeTransformer, order: str, zigzag: float
) -> None:
    tokens = torch.randint(0, 32, (3, 4, 6), generator=torch.Generator().manual_seed(0))
    hidden = torch.rand(3, 4, 6, generator=torch.Generator().manual_seed(1)) < 0.7
    options = SamplingOptions(steps=5, guidance_scale=2.0, order=order, zigzag=zigzag)
    blank, text = tokens.masked_fill(hidden, MASK), condition(3)
    filled = unmask(make_transformer(), blank, text, [1, 2, 3], options)
    assert torch.equal(filled[~hidden], tokens[~hidden])
    assert int(filled.max()) < 32
    for row in range(3):
        one = Condition(
            TextFeatures(text.text.hidden_BTD[:1], text.text.pooled_BP[:1]),
            text.micro_conditions_B5[:1],
            text.null,
        )
        alone = unmask(make_transformer(), blank[row : row + 1], one, [row + 1], options)
        assert torch.equal(alone[0], filled[row])


def test_orders_differ(make_transformer: MakeTransformer) -> None:
    blank = torch.full((1, 8, 8), MASK)
    seen = set()
    for order in ORDERS:
        options = SamplingOptions(4, 1.0, (0.0, 0.0), order=order)
        first = next(unmask_steps(make_transformer(), blank, condition(1), [0], options))
        seen.add(tuple((first.tokens_BHW == MASK).flatten().tolist()))
    assert len(seen) == len(ORDERS)


def test_halton_steps_go_along_the_sequence(make_transformer: MakeTransformer) -> None:
    blank, options = torch.full((1, 8, 8), MASK), SamplingOptions(6, 1.0, order="halton")
    ranks, known = halton_ranks(8, 8), []
    for state in unmask_steps(make_transformer(), blank, condition(1), [4], options):
        known.append(set(ranks[state.tokens_BHW[0] != MASK].tolist()))
    for ranks_known in known[:-1]:
        gaps = sum((rank + 1) % 64 not in ranks_known for rank in ranks_known)
        assert gaps == 1  # one run of the sequence, which may pass its end
    assert len(known[-1]) == 64


def test_a_zigzag_goes_back_to_as_many_masks(
    make_transformer: MakeTransformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    transformer, asked = make_transformer(), []
    features = transformer.features

    def count(tokens_BHW: Tensor, *rest: Tensor) -> Tensor:
        asked.append((tokens_BHW[0] == MASK).clone())
        return features(tokens_BHW, *rest)

    monkeypatch.setattr(transformer, "features", count)
    given, options = torch.full((1, 8, 8), MASK), SamplingOptions(4, 1.0, zigzag=0.5)
    given[0, 0] = 7
    unmask(transformer, given, condition(1), [0], options)
    # Two of four steps are taken twice; the way back hides other places, but none that was given.
    # The first guess has no place left that was not masked before it.
    assert [int(mask.sum()) for mask in asked] == [56, 56, 51, 51, 39, 21]
    assert not torch.equal(asked[2], asked[3])
    assert not any(bool(mask[0].any()) for mask in asked)


def test_a_guess_is_whole_and_agrees_with_what_is_decided(
    make_transformer: MakeTransformer,
) -> None:
    blank, options = torch.full((2, 4, 6), MASK), SamplingOptions(5, 2.0)
    states = list(unmask_steps(make_transformer(), blank, condition(2), [0, 1], options))
    assert [state.step for state in states] == [1, 2, 3, 4, 5]
    for state in states:
        decided = state.tokens_BHW != MASK
        assert int(state.guess_BHW.max()) < 32
        assert torch.equal(state.guess_BHW[decided], state.tokens_BHW[decided])
    assert torch.equal(states[-1].guess_BHW, states[-1].tokens_BHW)


def test_scales_of_the_steps() -> None:
    def scales(steps: int, **keywords: object) -> list[float]:
        return SamplingOptions(steps, 9.0, **keywords).guidance_scales()  # type: ignore[arg-type]  # by name

    assert scales(3) == [9.0, 9.0, 9.0]
    assert scales(5, guidance_schedule="linear") == [1.0, 3.0, 5.0, 7.0, 9.0]
    assert scales(3, guidance_schedule="cosine") == pytest.approx([1.0, 5.0, 9.0])
    assert scales(4, guidance_interval=(0.25, 0.75)) == [1.0, 9.0, 9.0, 1.0]
    assert scales(1, guidance_schedule="linear") == [9.0]
    assert scales(2, guidance_interval=(0.0, 1.0)) == [9.0, 9.0]


def test_steps_outside_the_interval_cost_half(make_transformer: MakeTransformer) -> None:
    sizes: list[int] = []

    class Counting(MaskedImageTransformer):
        def features(self, tokens_BHW: Tensor, *rest: Tensor) -> Tensor:
            sizes.append(len(tokens_BHW))
            return super().features(tokens_BHW, *rest)

    network = Counting(make_transformer().config)
    options = SamplingOptions(4, 3.0, guidance_interval=(0.5, 1.0))
    unmask(network, torch.full((2, 4, 4), MASK), condition(2), [0, 1], options)
    assert sizes == [2, 2, 4, 4]


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"zigzag": 1.5}, "zigzag is 1.5"),
        ({"zigzag": math.nan}, "zigzag is nan"),
        ({"order": "best"}, "order is 'best': expected one of confidence, margin"),
        ({"guidance_schedule": "step"}, "guidance_schedule is 'step'"),
        ({"guidance_interval": (0.5, 0.5)}, "expected two rising numbers"),
        ({"guidance_interval": (0.0, 1.5)}, "expected two rising numbers"),
        ({"guidance_scale": math.nan}, "guidance_scale is nan"),
        ({"token_temperature": -1.0}, "token_temperature is -1.0"),
        ({"temperature": (math.nan, 0.0)}, "temperature is"),
    ],
)
def test_what_cannot_work_is_refused(keywords: dict[str, object], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        SamplingOptions(**keywords)  # type: ignore[arg-type]  # by name
