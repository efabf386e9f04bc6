"""Randomness by counter: every draw is a function of (seed, what it is for, where we are).

No generator lives on between steps, so a resumed run needs no saved state to draw the same.
The bits come from parts of numpy and torch whose streams are promised not to change.
"""

from __future__ import annotations

import zlib

import numpy as np
import torch
from numpy.typing import NDArray

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)


def derive(seed: int, purpose: str, *counters: int) -> int:
    """A 64-bit seed for one purpose at one place; all numbers are 0 or more."""
    words = [seed, zlib.crc32(purpose.encode()), *counters]
    return int(np.random.SeedSequence(words).generate_state(1, np.uint64)[0])


def torch_generator(seed: int, purpose: str, *counters: int) -> torch.Generator:
    """A CPU generator that starts at this place."""
    return torch.Generator().manual_seed(derive(seed, purpose, *counters))


def permutation(num_items: int, seed: int, purpose: str, *counters: int) -> NDArray[np.int64]:
    """A random order of 0 … num_items - 1."""
    bits = np.random.Philox(key=derive(seed, purpose, *counters)).random_raw(num_items)
    return np.argsort(bits, kind="stable").astype(np.int64)


def uniforms(
    items: NDArray[np.int64], seed: int, purpose: str, *counters: int
) -> NDArray[np.float64]:
    """One number in [0, 1) for each item, which depends on that item alone."""
    return (hashes(items, seed, purpose, *counters) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def hashes(items: NDArray[np.int64], seed: int, purpose: str, *counters: int) -> NDArray[np.uint64]:
    """64 bits for each item, which depend on that item alone (splitmix64)."""
    start = np.uint64(derive(seed, purpose, *counters))
    with np.errstate(over="ignore"):
        state = start + (items.astype(np.uint64) + np.uint64(1)) * _GOLDEN
        state = (state ^ (state >> np.uint64(30))) * _MIX_1
        state = (state ^ (state >> np.uint64(27))) * _MIX_2
        state ^= state >> np.uint64(31)
    return state
