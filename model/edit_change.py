"""Where a picture must change for other words: the tokens whose prediction the words move.

Shape suffixes: B images, H token rows, W token columns, N masked tokens, V codebook size, C
channels.
"""

from collections.abc import Sequence
from contextlib import nullcontext

import torch
from torch import Tensor

from model.sampler import Condition
from model.schedule import training_timestep
from model.transformer import MaskedImageTransformer

CHANGE_ROUNDS = 3  # each masks every token once, in two halves
_CHUNK_TOKENS = 2048  # float32 probabilities of this many tokens exist at a time, twice


@torch.no_grad()
def change_of_words(
    transformer: MaskedImageTransformer,
    tokens_BHW: Tensor,
    target: Condition,
    source: Condition,
    seeds: Sequence[int],
    autocast_dtype: torch.dtype | None = None,
) -> Tensor:
    """change_BHW in [0, 1]: total variation between what `source` and `target` predict per token.

    Half of the tokens are masked at random and predicted from the others under both texts, then the
    other half; the mean of `CHANGE_ROUNDS` such rounds, in 4 x rounds network calls. Image b
    depends on seeds[b] and its own inputs only.
    """
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    change_BHW = torch.zeros(tokens_BHW.shape, device=tokens_BHW.device)
    for _ in range(CHANGE_ROUNDS):
        half_BHW = torch.stack(
            [_random_half(tokens_BHW.shape[1:], generator) for generator in generators]
        ).to(tokens_BHW.device)
        for mask_BHW in (half_BHW, ~half_BHW):
            variation_N = _variation(
                transformer, tokens_BHW, mask_BHW, target, source, autocast_dtype
            )
            change_BHW[mask_BHW] += variation_N
    return change_BHW / CHANGE_ROUNDS


def _random_half(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    num_tokens = int(torch.Size(shape).numel())
    half_L = torch.zeros(num_tokens, dtype=torch.bool)
    half_L[torch.randperm(num_tokens, generator=generator)[: num_tokens // 2]] = True
    return half_L.view(*shape)


def _variation(
    transformer: MaskedImageTransformer,
    tokens_BHW: Tensor,
    mask_BHW: Tensor,
    target: Condition,
    source: Condition,
    autocast_dtype: torch.dtype | None,
) -> Tensor:
    """Half the L1 distance between both predictions at every masked token."""
    inputs_BHW = tokens_BHW.masked_fill(mask_BHW, transformer.config.mask_token_id)
    ratio_B = mask_BHW.flatten(1).float().mean(dim=1)
    timestep_B = training_timestep(ratio_B, transformer.config.timestep_convention)
    device_type = tokens_BHW.device.type
    with nullcontext() if autocast_dtype is None else torch.autocast(device_type, autocast_dtype):
        rows = []
        for condition in (source, target):
            features_BHWC = transformer.features(
                inputs_BHW, *condition.text, condition.micro_conditions_B5, timestep_B
            )
            rows.append(torch.split(features_BHWC[mask_BHW], _CHUNK_TOKENS))
        parts = []
        for chunks in zip(*rows, strict=True):
            probs_NV = [transformer.mlm_layer(chunk).float().softmax(dim=-1) for chunk in chunks]
            parts.append((probs_NV[0] - probs_NV[1]).abs().sum(dim=-1) / 2)
    return torch.cat(parts) if parts else torch.zeros(0, device=tokens_BHW.device)
