"""Unmasking: what every run must keep, whatever the network says."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from model.drawing import draw_tokens
from model.errors import ModelError
from model.order import ORDERS
from model.sampler import (
    Condition,
    SamplingOptions,
    first_step_of,
    num_left_masked,
    remask,
    unmask,
    unmask_steps,
)
from model.schedule import cosine_schedule, linear_schedule
from model.text import TextFeatures
from model.transformer import MaskedImageTransformer

MASK = 39
MakeTransformer = Callable[..., MaskedImageTransformer]


def condition(batch: int, null: bool = True, seed: int = 0) -> Condition:
    generator = torch.Generator().manual_seed(seed)

    def features(rows: int) -> TextFeatures:
        states = torch.randn(rows, 5, 12, generator=generator)
        return TextFeatures(states, torch.randn(rows, 10, generator=generator))

    text = features(batch)
    return Condition(text, torch.full((batch, 5), 6.0), features(1) if null else None)


def part(whole: Condition, rows: slice) -> Condition:
    text = TextFeatures(whole.text.hidden_BTD[rows], whole.text.pooled_BP[rows])
    return Condition(text, whole.micro_conditions_B5[rows], whole.null)


def blank(batch: int, height: int = 4, width: int = 6) -> Tensor:
    return torch.full((batch, height, width), MASK)


class Recorder(MaskedImageTransformer):
    """Remembers what the sampler asked the network."""

    calls: list[tuple[Tensor, Tensor]]

    def features(
        self,
        tokens_BHW: Tensor,
        text_states_BTD: Tensor,
        pooled_BP: Tensor,
        micro_conditions_B5: Tensor,
        timestep_B: Tensor,
    ) -> Tensor:
        self.calls.append((tokens_BHW, timestep_B))
        return super().features(
            tokens_BHW, text_states_BTD, pooled_BP, micro_conditions_B5, timestep_B
        )


def recorder(transformer: MaskedImageTransformer) -> Recorder:
    copy = Recorder(transformer.config)
    copy.load_state_dict(transformer.state_dict())
    copy.calls = []
    return copy


@pytest.fixture
def transformer(make_transformer: MakeTransformer) -> MaskedImageTransformer:
    return make_transformer()


@given(
    probs=st.lists(st.floats(0.01, 1.0), min_size=2, max_size=12),
    uniform=st.floats(0.0, 1.0, exclude_max=True, width=32),
)
def test_a_draw_inverts_the_distribution(probs: list[float], uniform: float) -> None:
    weights = torch.tensor(probs)
    token, prob = draw_tokens(weights.log()[None], torch.tensor([uniform]))
    shares = weights.double() / weights.double().sum()
    below = float(shares[: int(token)].sum())
    assert below - 1e-5 <= uniform <= below + float(shares[token]) + 1e-5
    assert abs(float(prob) - float(shares[token])) < 1e-5


def test_draws_follow_the_probabilities() -> None:
    logits = torch.tensor([0.1, 0.2, 0.3, 0.4]).log().expand(40_000, 4)
    tokens, _ = draw_tokens(logits, torch.rand(40_000, generator=torch.Generator().manual_seed(0)))
    shares = tokens.bincount(minlength=4) / 40_000
    assert torch.allclose(shares, torch.tensor([0.1, 0.2, 0.3, 0.4]), atol=0.01)


def test_impossible_tokens_are_never_drawn() -> None:
    logits = torch.tensor([[-torch.inf, 0.0, -torch.inf, 0.0, -torch.inf]]).expand(3, 5)
    tokens, _ = draw_tokens(logits, torch.tensor([0.0, 0.5, 1 - 2**-24]))
    assert tokens.tolist() == [1, 3, 3]


@given(
    num_codes=st.sampled_from([5, 128, 384, 1024, 1000]),
    share=st.floats(0.001, 1.0),
    seed=st.integers(0, 2**32),
)
def test_draws_from_many_codes_invert_the_distribution(
    num_codes: int, share: float, seed: int
) -> None:
    """In blocks, some of them empty; against sums in float64."""
    generator = torch.Generator().manual_seed(seed)
    logits_NV = 4 * torch.randn(20, num_codes, generator=generator)
    logits_NV[torch.rand(logits_NV.shape, generator=generator) > share] = -torch.inf
    logits_NV[:, seed % num_codes] = 0.0
    uniform_N = torch.rand(20, generator=generator)
    uniform_N[:3] = torch.tensor([0.0, 1 - 2**-24, 0.5])
    tokens_N, probs_N = draw_tokens(logits_NV, uniform_N)
    shares_NV = logits_NV.double().softmax(dim=-1)
    own_N = shares_NV.gather(1, tokens_N[:, None])[:, 0]
    upper_N = shares_NV.cumsum(dim=-1).gather(1, tokens_N[:, None])[:, 0]
    assert (own_N > 0).all()
    assert (uniform_N <= upper_N + 1e-5).all()
    assert (uniform_N >= upper_N - own_N - 1e-5).all()
    assert torch.allclose(probs_N.double(), own_N, atol=1e-5)


@given(
    steps=st.integers(1, 70), num_tokens=st.integers(1, 4096), name=st.sampled_from(["cos", "lin"])
)
def test_every_step_unmasks_until_none_is_left(steps: int, num_tokens: int, name: str) -> None:
    schedule = cosine_schedule if name == "cos" else linear_schedule
    start = masked = torch.tensor([num_tokens])
    for step in range(steps):
        left = num_left_masked(start, masked, step, steps, schedule)
        if step < steps - 1:
            assert 1 <= int(left) <= max(int(masked) - 1, 1)
        masked = left
    assert int(masked) == 0


def test_the_least_confident_are_masked_again() -> None:
    tokens = torch.arange(8).view(1, 2, 4)
    mask = torch.tensor([[[True, True, False, True], [True, False, True, True]]])
    prob = torch.tensor([0.9, 0.1, 0.8, 0.2, 0.7, 0.3])
    after = remask(tokens, mask, prob, torch.zeros(6), torch.tensor([3]), MASK)
    assert after.tolist() == [[[0, MASK, 2, 3], [MASK, 5, 6, MASK]]]


def test_noise_on_the_confidence_changes_the_choice() -> None:
    tokens, mask = torch.arange(4).view(1, 1, 4), torch.ones(1, 1, 4, dtype=torch.bool)
    prob, noise = torch.tensor([0.9, 0.8, 0.7, 0.6]), torch.tensor([-9.0, 0.0, 0.0, 0.0])
    after = remask(tokens, mask, prob, noise, torch.tensor([1]), MASK)
    assert after.tolist() == [[[MASK, 1, 2, 3]]]


@pytest.mark.parametrize("steps", [1, 2, 7])
@pytest.mark.parametrize("guidance_scale", [1.0, 4.0])
def test_all_masks_are_filled(
    transformer: MaskedImageTransformer, steps: int, guidance_scale: float
) -> None:
    options = SamplingOptions(steps=steps, guidance_scale=guidance_scale)
    tokens = unmask(transformer, blank(2), condition(2), [0, 1], options)
    assert tokens.shape == (2, 4, 6)
    assert 0 <= int(tokens.min()) <= int(tokens.max()) < transformer.config.codebook_size


def test_given_tokens_are_kept(transformer: MaskedImageTransformer) -> None:
    tokens = torch.randint(0, 32, (3, 4, 6), generator=torch.Generator().manual_seed(0))
    hidden = torch.rand(3, 4, 6, generator=torch.Generator().manual_seed(1)) < 0.5
    hidden[2] = False
    options = SamplingOptions(steps=6, guidance_scale=3.0)
    seen: list[Tensor] = []
    filled = unmask(
        transformer,
        tokens.masked_fill(hidden, MASK),
        condition(3),
        [1, 2, 3],
        options,
        lambda step, steps, now: seen.append(now.clone()),
    )
    assert torch.equal(filled[~hidden], tokens[~hidden])
    assert all(torch.equal(now[~hidden], tokens[~hidden]) for now in seen)
    assert int(filled.max()) < 32


def test_nothing_masked_asks_nothing(transformer: MaskedImageTransformer) -> None:
    network = recorder(transformer)
    tokens = torch.zeros(1, 4, 6, dtype=torch.long)
    options = SamplingOptions(steps=3, guidance_scale=1.0)
    assert torch.equal(unmask(network, tokens, condition(1), [0], options), tokens)
    assert network.calls == []


def test_a_picture_does_not_depend_on_its_batch(transformer: MaskedImageTransformer) -> None:
    options, whole = SamplingOptions(steps=8, guidance_scale=3.0), condition(4)
    together = unmask(transformer, blank(4), whole, [5, 6, 7, 8], options)
    for row in range(4):
        alone = unmask(transformer, blank(1), part(whole, slice(row, row + 1)), [5 + row], options)
        assert torch.equal(together[row], alone[0])


def test_the_same_seed_is_the_same_picture(transformer: MaskedImageTransformer) -> None:
    options = SamplingOptions(steps=6, guidance_scale=2.0, temperature=(0.0, 0.0))
    first, again = (unmask(transformer, blank(1), condition(1), [3], options) for _ in range(2))
    other = unmask(transformer, blank(1), condition(1), [4], options)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_without_guidance_no_null_half_is_run(transformer: MaskedImageTransformer) -> None:
    network = recorder(transformer)
    unmask(network, blank(2), condition(2, null=False), [0, 1], SamplingOptions(3, 1.0))
    assert [len(tokens) for tokens, _ in network.calls] == [2, 2, 2]
    network.calls.clear()
    unmask(network, blank(2), condition(2), [0, 1], SamplingOptions(3, 2.0))
    assert [len(tokens) for tokens, _ in network.calls] == [4, 4, 4]


def test_the_head_runs_on_masked_tokens_alone(transformer: MaskedImageTransformer) -> None:
    rows, left = [], [48]
    hook = transformer.mlm_layer.register_forward_pre_hook(
        lambda _, args: rows.append(len(args[0]))
    )
    unmask(
        transformer, blank(2), condition(2), [0, 1], SamplingOptions(4, 2.0),
        lambda _step, _steps, tokens_BHW: left.append(int((tokens_BHW == MASK).sum())),
    )  # fmt: skip
    hook.remove()
    assert rows == [masked for masked in left[:-1] for _ in range(2)]
    assert left[-1] == 0


def test_guidance_without_null_text_is_refused(transformer: MaskedImageTransformer) -> None:
    with pytest.raises(ModelError, match="guidance needs a null text"):
        unmask(transformer, blank(1), condition(1, null=False), [0], SamplingOptions(2, 3.0))


def test_scale_zero_is_the_null_text_alone(transformer: MaskedImageTransformer) -> None:
    prompt = condition(1)
    assert prompt.null is not None
    null_alone = Condition(prompt.null, prompt.micro_conditions_B5)
    unguided = unmask(transformer, blank(1), null_alone, [9], SamplingOptions(5, 1.0))
    scale_zero = unmask(transformer, blank(1), prompt, [9], SamplingOptions(5, 0.0))
    assert torch.equal(unguided, scale_zero)


def test_mask_ratio_convention_passes_what_is_masked(transformer: MaskedImageTransformer) -> None:
    network = recorder(transformer)
    tokens = blank(2)
    tokens[1, 0] = 0
    unmask(network, tokens, condition(2), [0, 1], SamplingOptions(4, 1.0))
    for seen, timestep in network.calls:
        assert torch.allclose(timestep, (seen == MASK).flatten(1).float().mean(dim=1))
    assert network.calls[0][1].tolist() == [1.0, 0.75]


def test_step_index_convention_counts_down(make_transformer: MakeTransformer) -> None:
    network = recorder(make_transformer(timestep_convention="step_index"))
    unmask(network, blank(1), condition(1), [0], SamplingOptions(4, 1.0))
    assert [timestep.tolist() for _, timestep in network.calls] == [[3.0], [2.0], [1.0], [0.0]]


def test_masked_counts_follow_the_schedule(transformer: MaskedImageTransformer) -> None:
    network = recorder(transformer)
    unmask(network, blank(1, 8, 8), condition(1), [0], SamplingOptions(8, 1.0))
    counts = [int((tokens == MASK).sum()) for tokens, _ in network.calls]
    expected = [int(64 * cosine_schedule(torch.tensor(step / 8))) for step in range(8)]
    assert counts == expected


def test_a_late_start_follows_the_schedule_from_there(transformer: MaskedImageTransformer) -> None:
    network = recorder(transformer)
    tokens = torch.zeros(1, 8, 8, dtype=torch.long)
    masked_at_half = int(64 * cosine_schedule(torch.tensor(0.5)))
    tokens.view(-1)[:masked_at_half] = MASK
    unmask(network, tokens, condition(1), [0], SamplingOptions(8, 1.0), first_step=4)
    counts = [int((seen == MASK).sum()) for seen, _ in network.calls]
    expected = [int(64 * cosine_schedule(torch.tensor(step / 8))) for step in range(4, 8)]
    assert all(abs(a - b) <= 1 for a, b in zip(counts, expected, strict=True))


def test_progress_counts_every_step(transformer: MaskedImageTransformer) -> None:
    seen: list[tuple[int, int, int]] = []

    def report(step: int, steps: int, tokens: Tensor) -> None:
        seen.append((step, steps, int((tokens == MASK).sum())))

    unmask(transformer, blank(1), condition(1), [0], SamplingOptions(3, 1.0), report)
    assert [entry[:2] for entry in seen] == [(1, 3), (2, 3), (3, 3)]
    left = [entry[2] for entry in seen]
    assert left == sorted(left, reverse=True)
    assert left[-1] == 0


def test_bf16_compute_fills_all(transformer: MaskedImageTransformer) -> None:
    options = SamplingOptions(4, 2.0, autocast_dtype=torch.bfloat16)
    assert int(unmask(transformer, blank(2), condition(2), [0, 1], options).max()) < 32


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("when", ["first", "last"])
def test_predictions_that_are_no_numbers_are_one_line(
    transformer: MaskedImageTransformer, order: str, when: str
) -> None:
    """A token drawn from NaN looks like any other, so every step is checked, the last as well."""

    seen = []

    def overflow(done: int, steps: int, tokens_BHW: Tensor) -> None:
        seen.append(done)
        if when == "last" and done == steps - 1:
            transformer.mlm_layer.conv2.weight.data[3] = torch.nan

    if when == "first":
        transformer.mlm_layer.conv2.weight.data[3] = torch.inf
    options = SamplingOptions(4, 3.0, order=order)
    with pytest.raises(ModelError, match=r"predicted NaN for \d+ tokens in float32") as caught:
        unmask(transformer, blank(2), condition(2), [0, 1], options, overflow)
    assert "\n" not in str(caught.value)
    assert len(seen) == (1 if when == "first" else 3)  # found when the next step begins, or ends


def test_no_preview_of_what_is_no_number(transformer: MaskedImageTransformer) -> None:
    transformer.mlm_layer.conv2.weight.data[3] = torch.nan
    steps = unmask_steps(transformer, blank(1), condition(1), [0], SamplingOptions(1, 3.0))
    with pytest.raises(ModelError, match="paint in bfloat16 or float32"):
        next(steps)


def test_strength_is_a_share_of_the_steps() -> None:
    assert [first_step_of(strength, 10) for strength in (1.0, 0.5, 0.01)] == [0, 5, 9]
    for strength in (0.0, 1.1, float("nan")):
        with pytest.raises(ModelError, match="expected more than 0 and at most 1"):
            first_step_of(strength, 10)


def test_impossible_options_are_refused() -> None:
    with pytest.raises(ModelError, match="steps is 0"):
        SamplingOptions(steps=0)
    with pytest.raises(ModelError, match="temperature is"):
        SamplingOptions(temperature=(-1.0, 0.0))
