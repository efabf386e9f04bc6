"""The training loss: cross-entropy on the masked tokens, and only there.

Shape suffixes: B batch, H token rows, W token columns, T text tokens, D text channels, P pooled
channels, 5 micro-conditions, C channels, N masked tokens.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from model.layers import widen
from model.schedule import training_timestep
from model.transformer import MaskedImageTransformer, TokenHead

# Float32 logits of this size exist at a time: 2048 tokens with 8192 codes.
_CHUNK_BYTES = 64 << 20


def masked_token_loss(
    transformer: MaskedImageTransformer,
    tokens_BHW: Tensor,
    mask_BHW: Tensor,
    text_states_BTD: Tensor,
    pooled_BP: Tensor,
    micro_conditions_B5: Tensor,
    mask_ratio_B: Tensor,
    masked_N: Tensor | None = None,
) -> Tensor:
    """Mean cross-entropy in nats (a scalar) over the tokens where mask_BHW (bool) is true.

    `tokens_BHW` are the true tokens; the network sees the mask token in the masked places and
    `mask_ratio_B` in [0, 1] in the form its `timestep_convention` asks for. The head runs on masked
    tokens only, in chunks whose logits are recomputed on the way back. No masked token gives a loss
    of zero. `masked_N`, where the masked tokens lie in mask_BHW.flatten(), spares a GPU's caller
    the wait for their number.
    """
    if masked_N is None:
        masked_N = mask_BHW.flatten().nonzero()[:, 0]
    inputs_BHW = torch.where(mask_BHW, transformer.config.mask_token_id, tokens_BHW)
    timestep_B = training_timestep(mask_ratio_B, transformer.config.timestep_convention)
    features_BHWC = transformer.features(
        inputs_BHW, text_states_BTD, pooled_BP, micro_conditions_B5, timestep_B
    )
    features_NC = features_BHWC.flatten(0, 2).index_select(0, masked_N)
    targets_N = tokens_BHW.flatten().index_select(0, masked_N)
    chunk_tokens = max(1, _CHUNK_BYTES // (4 * transformer.config.codebook_size))
    if len(targets_N) <= chunk_tokens:
        total = _sum_of_losses(transformer.mlm_layer, features_NC, targets_N)
    else:
        chunks = zip(
            torch.split(features_NC, chunk_tokens),
            torch.split(targets_N, chunk_tokens),
            strict=True,
        )
        losses = [
            checkpoint(
                _sum_of_losses, transformer.mlm_layer, features, targets, use_reentrant=False
            )
            for features, targets in chunks
        ]
        total = torch.stack(losses).sum()
    return total / max(len(targets_N), 1)


def _sum_of_losses(head: TokenHead, features_NC: Tensor, targets_N: Tensor) -> Tensor:
    return F.cross_entropy(widen(head(features_NC)), targets_N, reduction="sum")
