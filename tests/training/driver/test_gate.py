"""The gate refuses what would not load or makes no sense, and says what is wrong."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from training.config import InitConfig, NetworkConfig, StageConfig
from training.gate import gate
from training.stages import NextStage

NETWORK = NetworkConfig(
    num_layers=1,
    num_single_layers=2,
    attention_head_dim=8,
    num_attention_heads=2,
    axes_dims_rope=(2, 2, 4),
    num_special_tokens=1,
)
COMPRESSION = ("down_block.downsample.", "up_block.upsample.")


def _next(compress: bool = False, network: NetworkConfig = NETWORK, **init: Any) -> NextStage:
    config = StageConfig(
        dataset="toy",
        resolution_px=32,
        steps=1,
        global_batch_size=1,
        compress=compress,
        init=InitConfig(**init),
    )
    return NextStage("alignment", network, config)


@pytest.fixture
def copy(exported: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(exported, tmp_path / "export"))


def _change(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    path = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    change(weights)
    save_file(weights, path)


def test_a_good_checkpoint_passes(exported: Path) -> None:
    assert gate(exported).problems == ()
    assert gate(exported, next_stage=_next()).passed
    assert gate(exported, next_stage=_next(compress=True, new_parameters=COMPRESSION)).passed
    wider = NETWORK.model_copy(update={"num_layers": 2})
    assert gate(exported, next_stage=_next(network=wider, source="fresh")).passed


def test_a_tokenizer_needs_no_transformer(copy: Path) -> None:
    shutil.rmtree(copy / "transformer")
    assert gate(copy, next_stage=_next(source="fresh"), has_transformer=False).passed
    assert not gate(copy).passed


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_values_that_are_not_finite(copy: Path, value: float) -> None:
    def poison(weights: dict[str, torch.Tensor]) -> None:
        name = sorted(weights)[3]
        weights[name].view(-1)[-1] = value

    _change(copy, poison)
    (problem,) = gate(copy).problems
    assert problem.startswith("transformer: 1 weights hold NaN or infinity")


def test_a_missing_weight(copy: Path) -> None:
    _change(copy, lambda weights: weights.__delitem__(sorted(weights)[0]))
    assert "1 weights are missing" in gate(copy).problems[0]


def test_an_unknown_weight(copy: Path) -> None:
    _change(copy, lambda weights: weights.update(extra=torch.zeros(1)))
    assert gate(copy).problems == ("transformer: 1 weights are unknown: extra",)


def test_a_wrong_shape(copy: Path) -> None:
    def widen(weights: dict[str, torch.Tensor]) -> None:
        name = sorted(weights)[0]
        weights[name] = torch.zeros(*weights[name].shape, 2)

    _change(copy, widen)
    assert "1 weights have another shape" in gate(copy).problems[0]


def test_a_truncated_file(copy: Path) -> None:
    path = copy / "vqvae" / "diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    assert "vqvae: diffusion_pytorch_model.safetensors is damaged" in gate(copy).problems[0]


def test_missing_parts_are_all_named(copy: Path) -> None:
    shutil.rmtree(copy / "text_encoder")
    shutil.rmtree(copy / "tokenizer")
    found = gate(copy).problems
    assert [problem.split(":")[0] for problem in found] == ["text_encoder", "tokenizer"]


def test_a_pickle_is_refused(copy: Path) -> None:
    (copy / "optimizer.pt").write_bytes(b"\x80\x04.")
    assert gate(copy).problems[0].startswith("pickled files")


def test_new_layers_must_be_named_by_the_next_stage(exported: Path) -> None:
    (problem,) = gate(exported, next_stage=_next(compress=True)).problems
    assert "stage alignment cannot start from it: 4 weights are neither in it nor named" in problem
    assert not gate(
        exported, next_stage=_next(compress=True, new_parameters=COMPRESSION[:1])
    ).passed


def test_another_network_cannot_start_from_it(exported: Path) -> None:
    deeper = NETWORK.model_copy(update={"num_layers": 2})
    assert "neither in it" in gate(exported, next_stage=_next(network=deeper)).problems[0]
    shallower = NETWORK.model_copy(update={"num_single_layers": 1})
    assert "have no place" in gate(exported, next_stage=_next(network=shallower)).problems[0]
    more_ids = NETWORK.model_copy(update={"num_special_tokens": 3})
    assert "another shape" in gate(exported, next_stage=_next(network=more_ids)).problems[0]


def test_no_memory_is_spent_on_weights(exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("training.gate.READ_VALUES", 64)
    assert gate(exported, next_stage=_next()).passed
