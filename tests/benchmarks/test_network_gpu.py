"""The released shape on a GPU: seconds and memory of a sample, and how busy a training step is.

The two GPU tests have not been run yet: they were written on a machine without one.
GPU_FLOPS_PER_SECOND is the dense bfloat16 rate of the card (989e12 is that of an H100 SXM);
utilisation is stated against it.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from model.compiled import compile_network
from model.loss import masked_token_loss
from model.sampler import Condition, SamplingOptions, unmask
from model.schedule import sample_mask
from model.text import TextFeatures
from model.transformer import MaskedImageTransformer, TransformerConfig

pytestmark = pytest.mark.bench
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

CARD_FLOPS_PER_SECOND = float(os.environ.get("GPU_FLOPS_PER_SECOND", "989e12"))
NUM_TEXT, CHANNELS = 77, 1024
STEPS, GUIDANCE = 48, 9.0
# Side in px, images per step, whether gradients are checkpointed.
TRAINING = [(256, 64, False), (512, 32, False), (512, 64, True), (1024, 32, True)]


def released_network(
    compresses: bool, dtype: torch.dtype, device: str = "cuda"
) -> MaskedImageTransformer:
    """The released shape with random weights (its speed does not depend on them)."""
    config = TransformerConfig(
        num_layers=14,
        num_single_layers=28,
        num_attention_heads=8,
        joint_attention_dim=CHANNELS,
        pooled_projection_dim=CHANNELS,
        downsample=compresses,
        upsample=compresses,
    )
    torch.manual_seed(0)
    with torch.device(device):
        transformer = MaskedImageTransformer(config)
    return transformer.to(dtype)


def conditions(batch: int, side_px: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Text states, pooled text and micro-conditions."""
    states = torch.randn(batch, NUM_TEXT, CHANNELS, device="cuda", dtype=dtype)
    pooled = torch.randn(batch, CHANNELS, device="cuda", dtype=dtype)
    row = torch.tensor([side_px, side_px, 0.0, 0.0, 6.0], device="cuda")
    return states, pooled, row.expand(batch, -1)


def forward_flops(config: TransformerConfig, side_px: int, masked_ratio: float) -> float:
    """Multiplications and additions of one image's forward, from the shapes alone.

    Both kinds of block: projections, feed-forward and the two attention products, for text and
    image together. Modulations and embeddings, below 1 %, are left out.
    """
    num_tokens = (side_px // 16) ** 2
    inner = num_tokens // (4 if config.compresses else 1)
    length, width = inner + NUM_TEXT, config.num_channels
    blocks = config.num_layers + config.num_single_layers
    per_block = 24 * length * width**2 + 4 * length**2 * width
    head = 2 * num_tokens * masked_ratio * width * (width + config.codebook_size)
    grids = 8 * num_tokens * width**2 if config.compresses else 2 * num_tokens * width**2
    return blocks * per_block + head + grids


def least_seconds(run: Callable[[], object], repetitions: int = 5) -> float:
    """The least wall time of `run` with the GPU done; two runs warm up."""
    taken = []
    for repetition in range(repetitions + 2):
        torch.cuda.synchronize()
        started_at = time.perf_counter()
        run()
        torch.cuda.synchronize()
        if repetition >= 2:
            taken.append(time.perf_counter() - started_at)
    return min(taken)


@needs_gpu
@pytest.mark.parametrize("side_px", [512, 1024])
@pytest.mark.parametrize("is_compiled", [False, True])
def test_sample(is_compiled: bool, side_px: int) -> None:
    """Batch 1, 48 steps, guidance 9, bfloat16: tokens in, tokens out."""
    transformer = released_network(side_px == 1024, torch.bfloat16).eval()
    if is_compiled:
        compile_network(transformer)
    states, pooled, micro = conditions(1, side_px, torch.bfloat16)
    null = TextFeatures(torch.zeros_like(states), torch.zeros_like(pooled))
    condition = Condition(TextFeatures(states, pooled), micro, null)
    side = side_px // 16
    blank = torch.full((1, side, side), transformer.config.mask_token_id, device="cuda")
    options = SamplingOptions(STEPS, GUIDANCE)
    torch.cuda.reset_peak_memory_stats()
    seconds = least_seconds(lambda: unmask(transformer, blank, condition, [0], options), 3)
    flops = 2 * STEPS * forward_flops(transformer.config, side_px, 0.637)
    share = flops / seconds / CARD_FLOPS_PER_SECOND
    print(
        f"\nbench  sample {side_px} px, {STEPS} steps, guidance {GUIDANCE:g}, bfloat16, "
        f"{'compiled' if is_compiled else 'plain'}: {seconds:.3f} s, "
        f"{torch.cuda.max_memory_allocated() / 1e9:.2f} GB, {share:.1%} of the card"
    )


@needs_gpu
@pytest.mark.parametrize(("side_px", "batch", "checkpoints"), TRAINING)
def test_training_step(side_px: int, batch: int, checkpoints: bool) -> None:
    """Forward, backward and AdamW: float32 weights, bfloat16 autocast, blocks compiled."""
    transformer = released_network(side_px == 1024, torch.float32).train()
    transformer.gradient_checkpointing = checkpoints
    for block in (*transformer.transformer_blocks, *transformer.single_transformer_blocks):
        block.compile()
    optimizer = torch.optim.AdamW(transformer.parameters(), lr=1e-4, fused=True)
    states, pooled, micro = conditions(batch, side_px, torch.float32)
    side, generator = side_px // 16, torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 8192, (batch, side, side), generator=generator).cuda()
    mask, ratio = (part.cuda() for part in sample_mask(batch, side, side, generator=generator))
    places = mask.flatten().nonzero()[:, 0]
    inputs = (tokens, mask, states, pooled, micro, ratio, places)

    def step() -> None:
        with torch.autocast("cuda", torch.bfloat16):
            loss = masked_token_loss(transformer, *inputs)
        torch.autograd.backward(loss)
        optimizer.step()
        optimizer.zero_grad()

    torch.cuda.reset_peak_memory_stats()
    seconds = least_seconds(step)
    share = float(mask.float().mean())
    # Recomputed forwards are work, but not the model's: they do not count as use of the card.
    flops = 3 * batch * forward_flops(transformer.config, side_px, share)
    print(
        f"\nbench  training {side_px} px, batch {batch}, checkpoints {checkpoints}: "
        f"{seconds:.3f} s, {batch / seconds:.1f} images/s, "
        f"{torch.cuda.max_memory_allocated() / 1e9:.1f} GB, "
        f"utilisation {flops / seconds / CARD_FLOPS_PER_SECOND:.1%}"
    )


@pytest.mark.parametrize("side_px", [256, 512, 1024])
def test_flops_are_those_that_are_counted(side_px: int) -> None:
    """The formula against torch's own counter, on the meta device: within 1 %."""
    from torch.utils.flop_counter import FlopCounterMode

    transformer = released_network(side_px == 1024, torch.float32, "meta").eval()
    side = side_px // 16
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        transformer(
            torch.zeros(1, side, side, dtype=torch.long),
            torch.zeros(1, NUM_TEXT, CHANNELS),
            torch.zeros(1, CHANNELS),
            torch.zeros(1, 5),
            torch.zeros(1),
        )
    counted, expected = counter.get_total_flops(), forward_flops(transformer.config, side_px, 1.0)
    assert abs(counted - expected) < 0.01 * expected
    print(f"\nbench  one forward at {side_px} px: {counted / 1e12:.3f} TFLOP")
