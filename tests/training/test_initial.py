from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from infra.errors import UserError
from model import MaskedImageTransformer
from training.config import NetworkConfig, StageConfig
from training.initial import fit_parent
from training.masked_stage import MaskedStage
from training.networks import transformer_config

NEW = ("down_block.", "up_block.")


@pytest.fixture
def parent(
    new_stage: Callable[[StageConfig], MaskedStage], small_config: Callable[..., StageConfig]
) -> MaskedStage:
    return new_stage(small_config())


def _wanted(parent: MaskedStage, network: NetworkConfig, compress: bool) -> Any:
    return transformer_config(network, parent.text_encoder.config, 32, compress)


def test_a_fitting_parent_is_taken_whole(
    parent: MaskedStage, network_config: NetworkConfig
) -> None:
    transformer, new_keys = fit_parent(
        parent.transformer, _wanted(parent, network_config, False), ()
    )
    assert transformer is parent.transformer
    assert new_keys == []


def test_compression_adds_the_named_parameters_and_inherits_the_rest(
    parent: MaskedStage, network_config: NetworkConfig
) -> None:
    transformer, new_keys = fit_parent(
        parent.transformer, _wanted(parent, network_config, True), NEW
    )
    inherited = set(transformer.state_dict()) - set(new_keys)
    assert inherited == set(parent.transformer.state_dict())
    before, after = parent.transformer.state_dict(), transformer.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in inherited)


@pytest.mark.parametrize("named", [(), ("down_block.",)])
def test_parameters_that_nobody_named_are_refused(
    parent: MaskedStage, network_config: NetworkConfig, named: tuple[str, ...]
) -> None:
    with pytest.raises(UserError, match=r"up_block\..*add their prefixes"):
        fit_parent(parent.transformer, _wanted(parent, network_config, True), named)


def test_a_compressing_parent_does_not_become_plain(
    parent: MaskedStage, network_config: NetworkConfig
) -> None:
    compressed, _ = fit_parent(parent.transformer, _wanted(parent, network_config, True), NEW)
    with pytest.raises(UserError, match="downsample is True, expected False"):
        fit_parent(compressed, _wanted(parent, network_config, False), ())


def test_all_differences_are_told_together(
    parent: MaskedStage, network_config: NetworkConfig
) -> None:
    other = network_config.model_copy(update={"num_layers": 3, "num_special_tokens": 7})
    with pytest.raises(UserError) as caught:
        fit_parent(parent.transformer, _wanted(parent, other, False), ())
    assert "num_layers is 1, expected 3" in str(caught.value)
    assert "vocab_size is 33, expected 39" in str(caught.value)


def test_published_keys_without_effect_do_not_matter(
    parent: MaskedStage, network_config: NetworkConfig
) -> None:
    from dataclasses import replace

    published = MaskedImageTransformer(replace(parent.transformer.config, in_channels=64))
    fit_parent(published, _wanted(parent, network_config, False), ())
