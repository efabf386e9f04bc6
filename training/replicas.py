"""What workers compare every few steps: whether their weights are still equal, and who is slow.

Workers that each hold all weights make the same step from the same gradients, so their bits stay
equal. A bit that flips in one (Dixit et al. 2021, "Silent Data Corruptions at Scale",
arXiv:2102.11245) is spread by its gradients to all, and nothing ever raises. The sum of all bits,
compared, finds it within ``CHECK_STEPS`` steps; training then begins again from a checkpoint of
before the last time that all were equal.
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed
from torch import Tensor

CHECK_STEPS = 10
SLOW_RATIO = 1.5  # above this times the others' median a worker holds them up
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class ReplicasDiffer(Exception):
    """Workers that should hold equal weights do not; Ray starts the run again."""


@dataclass(frozen=True)
class Comparison:
    """A digest and the seconds of a step up to the wait for others, by worker."""

    digests: tuple[int, ...]
    seconds: tuple[float, ...]

    @property
    def odd_ones(self) -> list[int]:
        """The workers whose weights differ from those that most have; of two that differ, both."""
        (usual, count), *others = Counter(self.digests).most_common()
        if not others:
            return []
        has_majority = count > len(self.digests) / 2
        return [
            rank for rank, digest in enumerate(self.digests) if digest != usual or not has_majority
        ]

    @property
    def slowest(self) -> tuple[int, float]:
        """(worker, its seconds by the median of the others')."""
        return slowest(self.seconds)


def slowest(seconds: Sequence[float]) -> tuple[int, float]:
    """The worker that needs longest, and how many times as long as the others' median."""
    rank = max(range(len(seconds)), key=lambda each: seconds[each])
    others = [value for each, value in enumerate(seconds) if each != rank]
    return rank, seconds[rank] / max(statistics.median(others), 1e-9)


@torch.no_grad()
def digest_of(tensors: Mapping[str, Tensor]) -> Tensor:
    """A number (0-d int64) that any flipped bit of any tensor changes.

    Every tensor's bits are added up as integers and weighed with an odd number of its own; all of
    it modulo 2^64, where a flipped bit adds a power of two and an odd multiple of that is not 0.
    """
    total: Tensor | None = None
    for place, name in enumerate(sorted(tensors)):
        tensor = tensors[name].detach()
        if tensor.ndim == 0:
            continue
        bits = tensor.contiguous().view(-1).view(_INTEGERS[tensor.element_size()])
        part = bits.sum(dtype=torch.int64) * (2 * place + 1)
        total = part if total is None else total + part
    return torch.zeros((), dtype=torch.int64) if total is None else total


def compare(digest: Tensor | None, seconds: float, world_size: int) -> Comparison:
    """What every worker has; all of them call it together. ``digest`` None compares no weights."""
    device = "cuda" if torch.distributed.get_backend() == "nccl" else "cpu"
    mine = torch.tensor([0, round(seconds * 1e6)], dtype=torch.int64, device=device)
    if digest is not None:
        mine[0] = digest
    theirs = [torch.empty_like(mine) for _ in range(world_size)]
    torch.distributed.all_gather(theirs, mine)
    pairs = [(int(pair[0]), int(pair[1]) / 1e6) for pair in theirs]
    return Comparison(tuple(d for d, _ in pairs), tuple(s for _, s in pairs))


def names_of_machines(name: str, world_size: int) -> list[str]:
    """Where every worker runs, by rank; all of them call it together."""
    found: list[str] = [""] * world_size
    torch.distributed.all_gather_object(found, name)
    return found
