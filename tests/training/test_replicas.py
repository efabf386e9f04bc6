"""Sums of bits that any flip changes, and who is slow."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from training.replicas import Comparison, digest_of, slowest

KINDS = (torch.float32, torch.bfloat16, torch.uint8, torch.float64)


def _tensors() -> dict[str, Tensor]:
    draws = torch.Generator().manual_seed(0)
    named = {
        f"part {number}": torch.randn(7, 5, generator=draws).abs().mul(50).to(kind)
        for number, kind in enumerate(KINDS)
    }
    return {**named, "step": torch.tensor(3.0)}


def test_every_single_flipped_bit_changes_the_digest() -> None:
    whole = digest_of(_tensors()).item()
    assert digest_of(dict(reversed(_tensors().items()))).item() == whole
    draws = torch.Generator().manual_seed(1)
    for number, kind in enumerate(KINDS):
        for bit in range(8 * torch.empty((), dtype=kind).element_size()):
            tensors = _tensors()
            raw = tensors[f"part {number}"].view(-1).view(torch.uint8)
            size = raw.numel() // 35
            place = int(torch.randint(35, (), generator=draws)) * size + bit // 8
            raw[place] ^= 1 << (bit % 8)
            assert digest_of(tensors).item() != whole, (kind, bit)


def test_the_same_bits_in_another_tensor_are_not_the_same() -> None:
    one, other = torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0])
    assert digest_of({"a": one, "b": other}) != digest_of({"a": other, "b": one})


@pytest.mark.parametrize(
    ("digests", "odd"),
    [
        ((5, 5), []),
        ((5, 6), [0, 1]),
        ((5, 5, 6), [2]),
        ((6, 5, 5, 5), [0]),
        ((1, 1, 2, 2), [0, 1, 2, 3]),
    ],
)
def test_the_odd_ones_are_those_without_the_majority(
    digests: tuple[int, ...], odd: list[int]
) -> None:
    assert Comparison(digests, tuple(0.0 for _ in digests)).odd_ones == odd


def test_the_slowest_is_measured_by_the_others() -> None:
    rank, ratio = slowest([1.0, 1.0, 4.0, 1.2])
    assert (rank, ratio) == (2, 4.0)
    assert slowest([1.0, 1.0]) == (0, 1.0)
