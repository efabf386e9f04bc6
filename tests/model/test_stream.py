"""Previews: as many as asked for, whole pictures from the first on, the last the result."""

import numpy as np
import pytest
import torch
from torch import Tensor

from model.errors import ModelError
from model.stream import stream
from model.text_to_image import TextToImage

PROMPTS = ["a red circle", "a star"]


def test_the_last_preview_is_the_result(painter: TextToImage) -> None:
    previews = list(stream(painter, PROMPTS, 16, 40, every=2, steps=5, seed=3))
    assert [preview.step for preview in previews] == [2, 4, 5]
    assert all(preview.steps == 5 for preview in previews)
    ratios = [preview.masked_ratio for preview in previews]
    assert ratios == sorted(ratios, reverse=True)
    assert ratios[0] > ratios[-1] == 0.0
    for preview in previews:
        assert [image.size for image in preview.images] == [(40, 16)] * 2
    expected = painter.generate(PROMPTS, 16, 40, steps=5, seed=3)
    for image, same in zip(previews[-1].images, expected, strict=True):
        assert np.array_equal(np.asarray(image), np.asarray(same))


def test_a_preview_shows_what_is_decided(painter: TextToImage) -> None:
    first, *_, last = list(stream(painter, PROMPTS[:1], steps=4))
    decided = first.tokens_BHW != painter.transformer.config.mask_token_id
    assert 0 < int(decided.sum()) < decided.numel()
    assert torch.equal(first.tokens_BHW[decided], last.tokens_BHW[decided])


def test_one_may_stop_early(painter: TextToImage) -> None:
    seen: list[int] = []

    def report(step: int, steps: int, tokens: Tensor) -> None:
        seen.append(step)

    previews = stream(painter, PROMPTS, steps=6, progress=report)
    assert next(previews).step == 1
    assert seen == [1]
    assert not torch.is_inference_mode_enabled()
    assert torch.is_grad_enabled()


def test_wrong_requests_are_refused_at_once(painter: TextToImage) -> None:
    with pytest.raises(ModelError, match="every is 0"):
        stream(painter, PROMPTS, every=0)
    with pytest.raises(ModelError, match="expected multiples of 4 px"):
        stream(painter, PROMPTS, 17, 16)
    with pytest.raises(ModelError, match="stream paints one batch"):
        stream(painter, PROMPTS, batch_size=1)
    with pytest.raises(ModelError, match="steps is 0"):
        stream(painter, PROMPTS, steps=0)
