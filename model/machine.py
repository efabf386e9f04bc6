"""What the machine at hand has: where to paint, and in which type."""

import platform

import torch

from model.errors import ModelError

AUTO = "auto"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def find_device(name: str | torch.device = AUTO) -> torch.device:
    """The device called `name`; "auto" is the first GPU, and the CPU where there is none.

    Raises ModelError for one that torch cannot use here.
    """
    if name == AUTO:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    # Without CUDA, torch's own answer to a CUDA device is an AssertionError.
    except (RuntimeError, AssertionError, NotImplementedError):
        usable = False
    else:
        usable = device.type != "meta"
    if not usable:
        known = ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
        raise ModelError(
            f"device is {str(name)!r}, which torch cannot use here: expected auto or one of "
            f"{', '.join(known)}"
        )
    return device


def find_dtype(name: str, device: torch.device) -> torch.dtype:
    """The type called `name`; "auto" is bfloat16 where `device` computes in it, else float32."""
    if name == AUTO:
        return torch.bfloat16 if computes_in_bfloat16(device) else torch.float32
    if name not in DTYPES:
        raise ModelError(f"precision is {name!r}: expected auto or one of {', '.join(DTYPES)}")
    return DTYPES[name]


def computes_in_bfloat16(device: torch.device) -> bool:
    """Whether `device` multiplies bfloat16 matrices itself; elsewhere they are slower than float32.

    On x86 that takes AVX512-BF16: torch also runs on AVX2 and plain AVX512, by conversion.
    """
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if device.type != "cpu":
        return False
    if platform.machine().lower() in ("x86_64", "amd64"):
        return bool(torch.cpu._is_avx512_bf16_supported())
    return bool(torch._C._has_mkldnn and torch.ops.mkldnn._is_mkldnn_bf16_supported())
