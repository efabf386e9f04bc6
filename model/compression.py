"""Inserting the feature-compression layers into a trained plain network (stage `compression`)."""

from dataclasses import replace

import torch

from model.errors import ModelError
from model.transformer import MaskedImageTransformer, init_compression


def insert_compression(plain: MaskedImageTransformer) -> tuple[MaskedImageTransformer, list[str]]:
    """A compressing copy of `plain` and its new parameters' names; all others are inherited.

    The new layers start neutral: the down-sampling averages the normalised embeddings of each 2x2
    block of tokens, and the up-sampling copies what the blocks made of it to the four tokens (the
    norms around both ignore scale). So on a grid of 2H x 2W the inherited blocks see what they saw
    at H x W, at the positions they know, and training only has to tell the four tokens of a block
    apart.
    """
    if plain.config.compresses:
        raise ModelError("this network already compresses: insert_compression expects a plain one")
    weight = plain.context_embedder.weight
    with torch.device("meta"):
        compressed = MaskedImageTransformer(replace(plain.config, downsample=True, upsample=True))
    compressed.to_empty(device=weight.device)
    compressed.to(weight.dtype)
    inherited = plain.state_dict()
    left = compressed.load_state_dict(inherited, strict=False)
    new_keys = init_compression(compressed)
    if set(left.missing_keys) != set(new_keys) or left.unexpected_keys:
        raise ModelError(f"the two layouts differ in more than compression: {left.missing_keys}")
    compressed.train(plain.training)
    return compressed, sorted(new_keys)
