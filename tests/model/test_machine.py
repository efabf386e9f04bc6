"""Where to paint and in which type: found by itself, or told in one line what there is."""

import platform
from pathlib import Path

import pytest
import torch

from model.errors import ModelError
from model.machine import computes_in_bfloat16, find_device, find_dtype

CPU = torch.device("cpu")


def test_a_gpu_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    for has_gpu, expected in ((True, "cuda"), (False, "cpu")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda has_gpu=has_gpu: has_gpu)
        assert find_device().type == expected
    assert find_device("cpu") == CPU


@pytest.mark.parametrize("name", ["cuda:99", "gpu", "", "meta", "cpu:x", "hip", "mps"])
def test_devices_that_are_not_here(name: str) -> None:
    with pytest.raises(ModelError, match="expected auto or one of cpu") as error:
        find_device(name)
    assert "\n" not in str(error.value)


@pytest.mark.skipif(
    platform.machine() != "x86_64" or platform.system() != "Linux",
    reason="asks Linux about an x86 processor",
)
def test_bfloat16_on_a_processor_that_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    told = "avx512_bf16" in Path("/proc/cpuinfo").read_text().split()
    assert computes_in_bfloat16(CPU) == told
    for has_it, expected in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda has_it=has_it: has_it)
        assert find_dtype("auto", CPU) == expected


def test_types_by_name() -> None:
    assert find_dtype("bf16", CPU) == torch.bfloat16
    assert find_dtype("fp32", CPU) == torch.float32
    assert find_dtype("auto", torch.device("meta")) == torch.float32
    with pytest.raises(ModelError, match="expected auto or one of fp32, bf16, fp16"):
        find_dtype("int8", CPU)
