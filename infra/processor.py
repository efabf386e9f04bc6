"""What this machine multiplies fast, asked without importing torch."""

from __future__ import annotations

from pathlib import Path

_NVIDIA = Path("/dev/nvidiactl")
_CPUINFO = Path("/proc/cpuinfo")
_FLAGS = frozenset({"avx512_bf16", "bf16"})  # as Linux calls them on x86 and on ARM


def computes_in_bfloat16() -> bool:
    """Whether a GPU or this processor multiplies bfloat16 itself.

    Without that torch converts: on AVX2 the demo's tokenizer takes three times as long so.
    """
    if _NVIDIA.exists():
        return True
    try:
        return not _FLAGS.isdisjoint(_CPUINFO.read_text(encoding="ascii", errors="replace").split())
    except OSError:
        return False


def resolve_precision(value: object) -> object:
    """``auto`` becomes ``bf16`` or ``fp32``, by this machine; anything else stays what it is."""
    if value != "auto":
        return value
    return "bf16" if computes_in_bfloat16() else "fp32"
