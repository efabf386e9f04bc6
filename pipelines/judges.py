"""How well images fit their prompts, by a CLIP: CLIP score, HPS v2, PickScore."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from pipelines.clip_model import encoder_of, identify
from pipelines.scoring_config import ClipConfig

if TYPE_CHECKING:
    from PIL.Image import Image


def cosines_of(
    images: Sequence[Image], prompts: Sequence[str], config: ClipConfig
) -> npt.NDArray[np.float64]:
    """The cosine of each image with its prompt, in [-1, 1], (N,).

    Raises ``UserError`` for a model that cannot be used.
    """
    import torch

    identity, weights = identify(config)
    encoder = encoder_of(identity, weights, config.num_threads)
    found = [np.zeros(0)]
    for start in range(0, len(images), config.batch_size):
        some = slice(start, start + config.batch_size)
        shown = encoder.encode_image(torch.stack([encoder.prepare(each) for each in images[some]]))
        told = encoder.encode_text(encoder.tokenize(list(prompts[some])))
        found.append((shown.double() * told.double()).sum(dim=1).cpu().numpy())
    return np.concatenate(found)
