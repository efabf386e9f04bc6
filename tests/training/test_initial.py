from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from infra.errors import UserError
from model import MaskedImageTransformer, ModelError, VQTokenizer
from training.config import InitConfig, NetworkConfig, StageConfig
from training.initial import fit_parent, initial_networks
from training.masked_stage import MaskedStage
from training.networks import transformer_config

NEW = ("down_block.", "up_block.")


@pytest.fixture
def parent(
    new_stage: Callable[[StageConfig], MaskedStage], small_config: Callable[..., StageConfig]
) -> MaskedStage:
    return new_stage(small_config())


@pytest.fixture
def parent_folder(parent: MaskedStage, vq_folder: Path) -> Path:
    """Its folder, with a tokenizer of 4 px a token."""
    parent.transformer.save_pretrained(vq_folder / "transformer")
    parent.text_encoder.save_pretrained(vq_folder / "text_encoder")
    parent.tokenizer.save_pretrained(vq_folder / "tokenizer")
    return vq_folder


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


@pytest.mark.parametrize("compress", [False, True])
def test_every_part_starts_with_the_parents_values(
    parent: MaskedStage,
    network_config: NetworkConfig,
    small_config: Callable[..., StageConfig],
    parent_folder: Path,
    compress: bool,
) -> None:
    init = InitConfig(new_parameters=NEW if compress else ())
    config = small_config(compress=compress, init=init, seed=99)
    found = initial_networks(parent_folder, network_config, config)
    assert found.source == "parent"
    for name, value in parent.transformer.state_dict().items():
        assert torch.equal(found.transformer.state_dict()[name], value)
    for name, value in parent.text_encoder.state_dict().items():
        assert torch.equal(found.text_encoder.state_dict()[name], value)
    vq = VQTokenizer.from_pretrained(parent_folder / "vqvae")
    assert all(
        torch.equal(vq.state_dict()[name], value) for name, value in found.vq.state_dict().items()
    )
    assert found.tokenizer(["a fox"], 12).tolist() == parent.tokenizer(["a fox"], 12).tolist()


@pytest.mark.parametrize("part", ["vqvae", "text_encoder", "tokenizer"])
def test_a_parent_without_a_part_is_refused(
    network_config: NetworkConfig,
    small_config: Callable[..., StageConfig],
    parent_folder: Path,
    part: str,
) -> None:
    shutil.rmtree(parent_folder / part)
    with pytest.raises(ModelError, match=part) as caught:
        initial_networks(parent_folder, network_config, small_config())
    assert "\n" not in str(caught.value)


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
