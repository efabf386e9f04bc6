"""The network against the published implementation: same weights, a quarter of the released width.

PUBLISHED_MEISSONIC names a folder that holds the published `src/` package (and its dependencies,
where they are not installed). Without it the baseline is `tests/parity/reference.py`: the same
arithmetic, plainly written, which stands for no implementation's speed.

Times are processor seconds of one thread, the least of the repetitions: on a shared machine wall
time says more about the neighbours. Each repetition runs both, one after the other.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from torch import Tensor

from model.drawing import draw_tokens
from model.sampler import (
    Condition,
    SamplingOptions,
    num_left_masked,
    remask,
    unmask,
)
from model.schedule import cosine_schedule
from model.text import TextFeatures
from model.transformer import MaskedImageTransformer, TransformerConfig

pytestmark = pytest.mark.bench

CONFIG = TransformerConfig(
    num_layers=14,
    num_single_layers=28,
    attention_head_dim=32,
    num_attention_heads=8,
    joint_attention_dim=256,
    pooled_projection_dim=256,
    axes_dims_rope=(4, 14, 14),
    downsample=True,
    upsample=True,
)
NUM_TEXT = 77
GUIDANCE = 9.0
REPETITIONS = 3
STEP, STEPS = 4, 16  # the step that is measured alone, of so many
Forward = Callable[..., Tensor]
baseline_seconds: dict[tuple[str, int], float] = {}


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def network(dtype: torch.dtype) -> MaskedImageTransformer:
    torch.manual_seed(0)
    transformer = MaskedImageTransformer(CONFIG).eval()
    with torch.no_grad():
        for parameter in transformer.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.5 * parameter[0].numel() ** -0.5)
    return transformer.to(dtype)


def published_forward(transformer: MaskedImageTransformer) -> tuple[str, Forward]:
    """The baseline's name, and its forward with the arguments of ours."""
    dtype = transformer.context_embedder.weight.dtype
    folder = os.environ.get("PUBLISHED_MEISSONIC")
    if folder is None:
        path = Path(__file__).parent.parent / "parity" / "reference.py"
        spec = importlib.util.spec_from_file_location("plain_network", path)
        assert spec is not None
        assert spec.loader is not None
        plain = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(plain)
        weights, config = transformer.state_dict(), asdict(CONFIG)
        return "plain", lambda *inputs: plain.logits_of(weights, config, *inputs)
    sys.path.insert(0, folder)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module = importlib.import_module("src.transformer")
        config = {k: v for k, v in asdict(CONFIG).items() if k != "timestep_convention"}
        theirs = module.Transformer2DModel(**config).eval().to(dtype)
    theirs.load_state_dict(transformer.state_dict())

    def run(tokens: Tensor, text: Tensor, pooled: Tensor, micro: Tensor, step: Tensor) -> Tensor:
        rows, columns = (size // 2 for size in tokens.shape[1:])
        ids = torch.zeros(rows, columns, 3)
        ids[..., 1] += torch.arange(rows)[:, None]
        ids[..., 2] += torch.arange(columns)
        out: Tensor = theirs(
            hidden_states=tokens,
            encoder_hidden_states=text,
            pooled_projections=pooled,
            micro_conds=micro,
            timestep=step,
            img_ids=ids.flatten(0, 1),
            txt_ids=torch.zeros(NUM_TEXT, 3),
        )
        return out

    return "published", run


def inputs_of(side_px: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """A guidance batch of two, at the measured step of a sample."""
    side, generator = side_px // 16, torch.Generator().manual_seed(0)
    tokens = torch.randint(0, CONFIG.codebook_size, (1, side, side), generator=generator)
    hidden = torch.rand(tokens.shape, generator=generator) < math.cos(STEP / STEPS * math.pi / 2)
    tokens = tokens.masked_fill(hidden, CONFIG.mask_token_id).repeat(2, 1, 1)
    text = torch.randn(2, NUM_TEXT, 256, generator=generator).to(dtype)
    pooled = torch.randn(2, 256, generator=generator).to(dtype)
    micro = torch.tensor([[side_px, side_px, 0.0, 0.0, 6.0]] * 2)
    return tokens, text, pooled, micro.to(dtype), torch.tensor([10])


def least_seconds(
    runs: list[Callable[[], object]], repetitions: int = REPETITIONS + 1
) -> list[float]:
    """Each run's least time; the first repetition warms up, unless it is the only one."""
    taken: list[list[float]] = [[] for _ in runs]
    for repetition in range(repetitions):
        for run, times in zip(runs, taken, strict=True):
            started = time.process_time()
            run()
            if repetition or repetitions == 1:
                times.append(time.process_time() - started)
    return [min(times) for times in taken]


def published_step(
    logits_BVHW: Tensor, tokens_BHW: Tensor, generator: torch.Generator, step: int = STEP
) -> Tensor:
    """The published scheduler's arithmetic: every code of every position, known ones too."""
    batch, codes, rows, columns = logits_BVHW.shape
    sample = tokens_BHW.reshape(batch, -1)
    unknown = sample == CONFIG.mask_token_id
    probs = logits_BVHW.reshape(batch, codes, -1).permute(0, 2, 1).softmax(dim=-1)
    drawn = torch.multinomial(probs.reshape(-1, codes).float(), 1, generator=generator)
    drawn = torch.where(unknown, drawn[:, 0].view(batch, -1), sample)
    if step == STEPS - 1:
        return drawn.view(batch, rows, columns)
    wanted = torch.floor(torch.tensor(rows * columns * math.cos((step + 1) / STEPS * math.pi / 2)))
    num_left = torch.minimum(unknown.sum(dim=-1, keepdim=True) - 1, wanted).clamp(min=1)
    chosen = torch.gather(probs, -1, drawn[:, :, None])[:, :, 0]
    chosen = torch.where(unknown, chosen, torch.finfo(chosen.dtype).max)
    noise = -torch.log(-torch.log(torch.rand(chosen.shape, generator=generator).clamp(1e-20)))
    confidence = torch.log(chosen.clamp(1e-20)) + 2 * (1 - step / (STEPS - 1)) * noise
    cutoff = torch.gather(confidence.sort(dim=-1).values, 1, num_left.long())
    masked = torch.where(confidence < cutoff, CONFIG.mask_token_id, drawn)
    return masked.view(batch, rows, columns)


def our_step(logits_NV: Tensor, tokens_BHW: Tensor, generator: torch.Generator) -> Tensor:
    mask_BHW = tokens_BHW == CONFIG.mask_token_id
    drawn_N, prob_N = draw_tokens(logits_NV, torch.rand(len(logits_NV), generator=generator))
    num_masked_B = mask_BHW.flatten(1).sum(dim=1)
    num_start_B = torch.full_like(num_masked_B, mask_BHW[0].numel())
    num_left_B = num_left_masked(num_start_B, num_masked_B, STEP, STEPS, cosine_schedule)
    noise_N = -(-torch.rand(len(prob_N), generator=generator).clamp(min=1e-20).log()).log()
    filled = tokens_BHW.masked_scatter(mask_BHW, drawn_N)
    return remask(filled, mask_BHW, prob_N, noise_N, num_left_B, CONFIG.mask_token_id)


def against_float32(what: str, side_px: int, dtype: torch.dtype, mine: float, other: float) -> str:
    """The ratio to the baseline in float32, its own choice, once that was measured in this run."""
    if dtype == torch.float32:
        baseline_seconds[what, side_px] = other
        return ""
    seconds = baseline_seconds.get((what, side_px))
    return "" if seconds is None else f", to {seconds:.3f} s in float32 {seconds / mine:.2f}"


@pytest.mark.parametrize("side_px", [256, 512, 1024])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_forward(dtype: torch.dtype, side_px: int) -> None:
    transformer, inputs = network(dtype), inputs_of(side_px, dtype)
    name, theirs = published_forward(transformer)
    tokens, text, pooled, micro, step = inputs
    hidden = tokens == CONFIG.mask_token_id
    with torch.no_grad():
        if dtype == torch.float32:
            assert float((transformer(*inputs) - theirs(*inputs)).abs().max()) < 1e-4
        whole, masked, other = least_seconds(
            [
                lambda: transformer(*inputs),
                lambda: transformer.forward_masked(tokens, text, pooled, micro, step, hidden),
                lambda: theirs(*inputs),
            ]
        )
    print(
        f"\nbench  forward {side_px} px {str(dtype)[6:]:<9} {whole:.3f} s, {name} {other:.3f} s, "
        f"ratio {other / whole:.2f}; head on masked tokens alone {masked:.3f} s, "
        f"ratio {other / masked:.2f}{against_float32('forward', side_px, dtype, whole, other)}"
    )


@pytest.mark.parametrize("side_px", [256, 512, 1024])
def test_unmasking_step(side_px: int) -> None:
    tokens_BHW = inputs_of(side_px, torch.float32)[0][:1]
    mask_BHW = tokens_BHW == CONFIG.mask_token_id
    generator = torch.Generator().manual_seed(0)
    shape = (1, CONFIG.codebook_size, *tokens_BHW.shape[1:])
    logits_BVHW = 3 * torch.randn(shape, generator=generator)
    logits_NV = logits_BVHW.permute(0, 2, 3, 1)[mask_BHW]
    mine, other = least_seconds(
        [
            lambda: our_step(logits_NV, tokens_BHW, generator),
            lambda: published_step(logits_BVHW, tokens_BHW, generator),
        ]
    )
    print(
        f"\nbench  unmasking step {side_px} px {mine:.3f} s, published arithmetic {other:.3f} s, "
        f"ratio {other / mine:.2f}"
    )


def published_sample(theirs: Forward, inputs: tuple[Tensor, ...], temperature: float) -> Tensor:
    """The published pipeline's loop: guidance over all logits, then the scheduler's step."""
    tokens, text, pooled, micro, _ = inputs
    tokens = torch.full_like(tokens[:1], CONFIG.mask_token_id)
    generator = torch.Generator().manual_seed(0)
    scheduler = None
    if "PUBLISHED_MEISSONIC" in os.environ:
        scheduler = importlib.import_module("src.scheduler").Scheduler(CONFIG.mask_token_id)
        scheduler.set_timesteps(STEPS, (temperature, 0))
    for step in range(STEPS):
        at = torch.tensor([STEPS - 1 - step])
        uncond, cond = theirs(torch.cat([tokens] * 2), text, pooled, micro, at).chunk(2)
        logits = uncond + GUIDANCE * (cond - uncond)
        if scheduler is None:
            tokens = published_step(logits, tokens, generator, step)
        else:
            tokens = scheduler.step(logits, at[0], tokens, generator=generator).prev_sample
    return tokens


def our_sample(
    transformer: MaskedImageTransformer, inputs: tuple[Tensor, ...], temperature: float, cold: bool
) -> Tensor:
    tokens, text, pooled, micro, _ = inputs
    options = SamplingOptions(
        STEPS, GUIDANCE, (temperature, 0.0), token_temperature=0.0 if cold else 1.0
    )
    condition = Condition(
        TextFeatures(text[1:], pooled[1:]), micro[1:], TextFeatures(text[:1], pooled[:1])
    )
    blank = torch.full_like(tokens[:1], CONFIG.mask_token_id)
    return unmask(transformer, blank, condition, [0], options)


@pytest.mark.parametrize("side_px", [256, 512, 1024])
def test_sample_without_chance_is_the_same(side_px: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Float32, no noise, the likeliest tokens: both give the same image."""
    if "PUBLISHED_MEISSONIC" not in os.environ:
        pytest.skip("needs the published scheduler")
    transformer, inputs = network(torch.float32), inputs_of(side_px, torch.float32)
    _, theirs = published_forward(transformer)
    monkeypatch.setattr(
        torch, "multinomial", lambda probs, num, generator: probs.argmax(dim=-1, keepdim=True)
    )
    with torch.no_grad():
        mine = our_sample(transformer, inputs, 0.0, cold=True)
        other = published_sample(theirs, inputs, 0.0)
    assert len(set(mine.flatten().tolist())) > 20
    assert torch.equal(mine, other)
    print(f"\nbench  sample {side_px} px {STEPS} steps without chance: {mine.numel()} tokens equal")


@pytest.mark.parametrize("side_px", [256, 512, 1024])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sample(dtype: torch.dtype, side_px: int) -> None:
    """A whole sample, tokens in and tokens out; at 1024 px each runs once."""
    transformer, inputs = network(dtype), inputs_of(side_px, dtype)
    name, theirs = published_forward(transformer)
    with torch.no_grad():
        mine, other = least_seconds(
            [
                lambda: our_sample(transformer, inputs, 2.0, cold=False),
                lambda: published_sample(theirs, inputs, 2.0),
            ],
            1 if side_px == 1024 else 2,
        )
    print(
        f"\nbench  sample {side_px} px {STEPS} steps {str(dtype)[6:]:<9} {mine:.2f} s, "
        f"{name} {other:.2f} s, ratio {other / mine:.2f}"
        f"{against_float32('sample', side_px, dtype, mine, other)}"
    )
