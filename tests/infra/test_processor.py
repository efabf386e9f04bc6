"""The compute type that ``auto`` becomes, asked without torch and held to what torch says."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from pydantic import ValidationError

from infra import processor
from model.machine import computes_in_bfloat16 as torch_says
from training.config import TokenizerConfig


def test_the_processor_is_known_as_torch_knows_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processor, "_NVIDIA", Path("/none"))
    assert processor.computes_in_bfloat16() == torch_says(torch.device("cpu"))


@pytest.mark.parametrize(
    ("flags", "precision"),
    [
        ("flags : avx512f avx512_bf16 amx_tile", "bf16"),
        ("Features : fp asimd bf16 i8mm", "bf16"),
        ("flags : avx2 avx512f", "fp32"),
    ],
)
def test_auto_is_decided_when_a_recipe_is_read(
    flags: str, precision: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cpuinfo").write_text(flags)
    monkeypatch.setattr(processor, "_CPUINFO", tmp_path / "cpuinfo")
    monkeypatch.setattr(processor, "_NVIDIA", tmp_path / "none")
    config = TokenizerConfig.model_validate({"dataset": "d", "precision": "auto"})
    assert config.model_dump()["precision"] == precision
    monkeypatch.setattr(processor, "_NVIDIA", tmp_path / "cpuinfo")
    assert processor.resolve_precision("auto") == "bf16"
    assert processor.resolve_precision("fp32") == "fp32"
    with pytest.raises(ValidationError, match="precision"):
        TokenizerConfig.model_validate({"dataset": "d", "precision": "fp8"})


def test_where_nothing_is_known_it_is_float32(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processor, "_CPUINFO", tmp_path / "none")
    monkeypatch.setattr(processor, "_NVIDIA", tmp_path / "none")
    assert processor.resolve_precision("auto") == "fp32"
