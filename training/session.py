"""What a training function has around it: its rank, and how it talks to the other workers."""

from __future__ import annotations

import os
from collections import Counter
from typing import Any, Protocol


class Session(Protocol):
    """Ray Train's worker, or this process alone."""

    rank: int
    world_size: int
    in_ray: bool

    def from_first(self, value: Any) -> Any:
        """What the first worker passed in; all call it together. Small plain values only."""

    def add(self, name: str, amount: int) -> int:
        """Add to a number that all workers of this start share, 0 at first; what it is then."""

    def barrier(self) -> None:
        """Wait for all workers."""

    def is_preempted(self) -> bool:
        """Whether a machine under this run is about to go; all workers ask together."""


class RaySession:
    """This process is a worker of Ray Train."""

    in_ray = True

    def __init__(self) -> None:
        import ray.train

        context = ray.train.get_context()
        self.rank = int(context.get_world_rank())
        self.world_size = int(context.get_world_size())
        self._numbers: Counter[str] = Counter()
        self._watches = os.environ.get("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "1") != "0"

    def from_first(self, value: Any) -> Any:
        import ray.train.collective

        if self.world_size == 1:
            return value
        return ray.train.collective.broadcast_from_rank_zero(value)

    def add(self, name: str, amount: int) -> int:
        if self.world_size == 1:
            self._numbers[name] += amount
            return self._numbers[name]
        from torch.distributed import distributed_c10d

        group: Any = distributed_c10d
        return int(group._get_default_store().add(name, amount))

    def barrier(self) -> None:
        import ray.train.collective

        if self.world_size > 1:
            ray.train.collective.barrier()

    def is_preempted(self) -> bool:
        import ray.train

        return self._watches and ray.train.get_preemption_info() is not None


class LocalSession:
    """A single worker without Ray."""

    in_ray = False
    rank = 0
    world_size = 1

    def __init__(self) -> None:
        self._numbers: Counter[str] = Counter()

    def from_first(self, value: Any) -> Any:
        return value

    def add(self, name: str, amount: int) -> int:
        self._numbers[name] += amount
        return self._numbers[name]

    def barrier(self) -> None:
        return

    def is_preempted(self) -> bool:
        return False
