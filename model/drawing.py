"""Tokens from logits: one draw a masked place, and how certain it is.

Shape suffixes: N masked tokens of all images, V codebook size, K blocks of it.
"""

import torch
from torch import Tensor, nn

from model.order import CONFIDENCE, certainty

_DRAW_BLOCK = 128  # codes whose probabilities are added up before one of them is looked for


def draw_tokens(
    logits_NV: Tensor,
    uniform_N: Tensor,
    token_temperature: float = 1.0,
    order: str = CONFIDENCE,
) -> tuple[Tensor, Tensor]:
    """A token from each row's softmax by the given uniform number, and how certain it is.

    The certainty, in [0, 1], is the token's probability (or what `order` says instead) at a
    temperature of 1, whatever the token was drawn at.
    """
    probs_NV = logits_NV.float().softmax(dim=-1)
    if token_temperature == 0:
        tokens_N1 = logits_NV.argmax(dim=-1, keepdim=True)
    else:
        drawn_NV = probs_NV
        if token_temperature != 1:
            drawn_NV = (logits_NV.float() / token_temperature).softmax(dim=-1)
        tokens_N1 = _drawn(drawn_NV, uniform_N)[:, None]
    return tokens_N1[:, 0], certainty(probs_NV, probs_NV.gather(1, tokens_N1)[:, 0], order)


def _drawn(probs_NV: Tensor, uniform_N: Tensor) -> Tensor:
    """The token at which each row's running total passes its share of the whole; one of
    probability 0 is never drawn.

    The total runs over blocks of tokens, then within one: a sum over all for each token would take
    twice as long as the softmax.
    """
    size = _DRAW_BLOCK if probs_NV.shape[-1] % _DRAW_BLOCK == 0 else probs_NV.shape[-1]
    probs_NKV = probs_NV.reshape(len(probs_NV), -1, size)
    totals_NK = probs_NKV.sum(dim=-1).cumsum(dim=-1)
    threshold_N1 = uniform_N[:, None] * totals_NK[:, -1:]
    block_N1 = _passing(totals_NK, threshold_N1)
    before_N1 = nn.functional.pad(totals_NK, (1, 0)).gather(1, block_N1)
    probs_NV = probs_NKV.gather(1, block_N1[:, :, None].expand(-1, 1, size))[:, 0]
    totals_NV = probs_NV.cumsum(dim=-1).add_(before_N1)
    return (block_N1 * size + _passing(totals_NV, threshold_N1))[:, 0]


def _passing(totals_NV: Tensor, threshold_N1: Tensor) -> Tensor:
    """The first place of each row whose total is more than the threshold, which rounding might
    have put beyond the last one."""
    last_N1 = totals_NV[:, -1:]
    threshold_N1 = threshold_N1.minimum(torch.nextafter(last_N1, torch.zeros_like(last_N1)))
    found_N1 = torch.searchsorted(totals_NV, threshold_N1, right=True)
    return found_N1.clamp(max=totals_NV.shape[-1] - 1)  # not-a-number passes nothing
