"""Whether Ray has room for a stage's workers, asked before they are waited for.

Ray Train waits for machines in silence: minutes for one of its own that will never grow, more than
half an hour for a cluster that may.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from infra.errors import UserError

if TYPE_CHECKING:
    from training.launch import Launch

# What Ray Train ends with when its workers do not come.
NO_ROOM_ERRORS = ("InsufficientClusterResourcesError", "WorkerGroupStartupTimeoutError")

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Room:
    """What a Ray has: machines that answer, and how many of the workers fit on them."""

    num_machines: int
    num_cpus: int
    num_gpus: int
    num_workers: int

    @classmethod
    def of(cls, nodes: Sequence[Mapping[str, Any]], launch: Launch) -> Room:
        """The room in what ``ray.nodes()`` tells; a worker lies on one machine as a whole."""
        has = [node.get("Resources", {}) for node in nodes if node.get("Alive")]
        fit = 0
        for resources in has:
            of_node = int(resources.get("CPU", 0) // launch.cpus_per_worker)
            if launch.use_gpu:
                of_node = min(of_node, int(resources.get("GPU", 0)))
            fit += of_node
        return cls(
            num_machines=len(has),
            num_cpus=int(sum(resources.get("CPU", 0) for resources in has)),
            num_gpus=int(sum(resources.get("GPU", 0) for resources in has)),
            num_workers=fit,
        )

    def problem(self, launch: Launch) -> str | None:
        """What is wanted, what is there and what to change; None when all workers fit."""
        if self.num_workers >= launch.num_workers:
            return None
        no_gpu = ", or set cluster.use_gpu: false" if launch.use_gpu else ""
        return (
            f"expected room for {launch.num_workers} workers of {launch.cpus_per_worker} CPUs"
            f"{' and a GPU' if launch.use_gpu else ''}, got a Ray with room for "
            f"{self.num_workers}: {self.num_cpus} CPUs and {self.num_gpus} GPUs on "
            f"{self.num_machines} machine{'s' * (self.num_machines != 1)}; lower the stage's "
            f"num_workers or cluster.cpus_per_worker, add machines{no_gpu}"
        )


def check_room(launch: Launch) -> None:
    """Raise ``UserError`` when the Ray of this machine has too little room for the workers; say so
    where it is a cluster's, which may grow."""
    problem = Room.of(_machines(), launch).problem(launch)
    if problem is None:
        return
    if launch.is_local:
        raise UserError(f"training {launch.name} cannot begin: {problem}")
    logger.warning("training %s waits for machines: %s", launch.name, problem)


def why_none_came(launch: Launch) -> str:
    """The line for workers that did not come, from what Ray has now."""
    import ray

    with suppress(ray.exceptions.RayError, ConnectionError, RuntimeError):
        problem = Room.of(_machines(), launch).problem(launch)
        if problem is not None:
            return problem
    return (
        f"its {launch.num_workers} workers did not start in time, though there is room for them; "
        "end what else keeps the machines busy, then run the same command again to continue"
    )


def _machines() -> list[dict[str, Any]]:
    import ray

    found: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]  # Ray's
    return found
