"""What the hardware does: model FLOP/s, their share of the device's peak, memory and cores."""

from __future__ import annotations

import resource
import sys
import time
from contextlib import suppress

import torch
from torch import nn

from model import MaskedImageTransformer

# Dense bf16 peaks of the makers' data sheets, in TFLOP/s.
PEAK_TERAFLOPS = {
    "A100": 312.0,
    "A10G": 70.0,
    "B200": 2250.0,
    "GH200": 989.0,
    "H100 PCIe": 756.0,
    "H100": 989.0,
    "H200": 989.0,
    "L40S": 362.0,
    "L4": 121.0,
    "V100": 125.0,
}


def training_flops_per_image(
    transformer: MaskedImageTransformer,
    num_image_tokens: int,
    num_text_tokens: int,
    learns: bool = True,
) -> float:
    """Forward and backward of the blocks: 6 N T + 12 L D T², with N their parameters, L layers of
    width D and T tokens (Chowdhery et al. 2022, "PaLM", appendix B); 4 N T when the weights get no
    gradients (``learns`` is false). Recomputing is no work done, and convolutions around the
    blocks, adapters and the text encoder are left out."""
    config = transformer.config
    num_tokens = num_text_tokens + num_image_tokens // (4 if config.compresses else 1)
    blocks = [part for part in transformer.children() if isinstance(part, nn.ModuleList)]
    num_parameters = sum(p.numel() for part in blocks for p in part.parameters())
    width = config.num_attention_heads * config.attention_head_dim
    num_layers = config.num_layers + config.num_single_layers
    per_weight = 6.0 if learns else 4.0
    return per_weight * num_parameters * num_tokens + 12.0 * num_layers * width * num_tokens**2


def peak_teraflops() -> float | None:
    """The peak of one device of this worker; None on a CPU or when it is not known."""
    if not torch.cuda.is_available():
        return None
    name = torch.cuda.get_device_name()
    known = [peak for part, peak in PEAK_TERAFLOPS.items() if part in name]
    return known[0] if known else None


class HostUse:
    """Memory and cores of this process since it was last asked."""

    def __init__(self) -> None:
        self._cpu_seconds, self._at = time.process_time(), time.monotonic()

    def measure(self) -> dict[str, float]:
        """This process: ``host/memory_mb`` (most so far), ``host/cores`` (used on average). Its
        machine: ``host/cpu_share``, ``host/memory_share``. Its GPU: ``host/gpu_memory_mb`` (most
        so far) and, where the driver's library answers, ``host/gpu_share``."""
        cpu_seconds, at = time.process_time(), time.monotonic()
        used = (cpu_seconds - self._cpu_seconds) / max(at - self._at, 1e-9)
        self._cpu_seconds, self._at = cpu_seconds, at
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        found = {"host/cores": used, "host/memory_mb": peak / (2**20 if _IN_BYTES else 2**10)}
        if torch.cuda.is_available():
            found["host/gpu_memory_mb"] = torch.cuda.max_memory_allocated() / 2**20
            with suppress(Exception):  # its own errors belong to a module that may be missing
                found["host/gpu_share"] = torch.cuda.utilization() / 100.0
        return {**found, **_machine_use()}


def _machine_use() -> dict[str, float]:
    """Since the last call: all processes together, in [0, 1]."""
    try:
        import psutil  # comes with Ray
    except ModuleNotFoundError:
        return {}
    return {
        "host/cpu_share": psutil.cpu_percent() / 100.0,
        "host/memory_share": psutil.virtual_memory().percent / 100.0,
    }


_IN_BYTES = sys.platform == "darwin"  # elsewhere ru_maxrss is in KiB
