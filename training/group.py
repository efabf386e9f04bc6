"""The workers of a stage as a torch process group, each on the GPU that Ray gave it.

Ray Train's own does this too, with torch in its controller.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import ray
from ray.train.backend import Backend, BackendConfig

# NCCL's ten minutes would end all who wait for one that stores a checkpoint, and come before
# ``max_step_minutes``, which says where a worker hangs. This is for what that clock does not watch.
COLLECTIVE_PATIENCE = timedelta(hours=2)


class TorchGroupBackend(Backend):
    """A torch process group over the workers, without torch in the controller."""

    share_cuda_visible_devices = True

    def on_start(self, worker_group: Any, backend_config: BackendConfig) -> None:
        """Let every worker join; returns when all have."""
        from ray.train._internal.utils import get_address_and_port

        address, port = worker_group.execute_single(0, get_address_and_port)
        num_gpus = worker_group.get_resources_per_worker().get("GPU", 0)
        backend = "nccl" if num_gpus else "gloo"
        joining = [
            worker_group.execute_single_async(
                rank,
                _join_group,
                getattr(backend_config, "environment", {}),
                address,
                port,
                rank,
                len(worker_group),
                backend,
            )
            for rank in range(len(worker_group))
        ]
        ray.get(joining)

    def on_shutdown(self, worker_group: Any, backend_config: BackendConfig) -> None:
        """Leave the group, when there is more than one worker to leave."""
        if len(worker_group) > 1:
            ray.wait(worker_group.execute_async(_leave_group), timeout=5.0)


@dataclass
class TorchGroupConfig(BackendConfig):
    """Chooses ``TorchGroupBackend``; every worker gets ``environment``, which no log has."""

    environment: Mapping[str, str] = field(default_factory=dict, repr=False)

    @property
    def backend_cls(self) -> type[Backend]:
        """The backend's class."""
        return TorchGroupBackend

    @property
    def train_func_context(self) -> Callable[[], AbstractContextManager[None]]:
        """What training is wrapped in, in its own thread."""
        return on_own_gpu


@contextmanager
def on_own_gpu() -> Iterator[None]:
    """Make the GPU that Ray gave this worker this thread's current one.

    CUDA's current device is each thread's own, and Ray trains on another thread than the one that
    joined the group: there every worker of a machine would begin on the first GPU.
    """
    import torch

    cuda: Any = torch.cuda
    if cuda.is_available():
        import ray.train.torch

        cuda.set_device(ray.train.torch.get_device())
    yield


def _join_group(
    environment: Mapping[str, str],
    address: str,
    port: int,
    rank: int,
    world_size: int,
    backend: str,
) -> None:
    """Runs in a worker."""
    import ray.train
    import torch.distributed

    context = ray.train.get_context()
    os.environ |= {
        **environment,
        "LOCAL_RANK": str(context.get_local_rank()),
        "LOCAL_WORLD_SIZE": str(context.get_local_world_size()),
        "MASTER_ADDR": address,
        "MASTER_PORT": str(port),
        "NODE_RANK": str(context.get_node_rank()),
        "RANK": str(rank),
        "WORLD_SIZE": str(world_size),
    }
    if backend == "nccl":
        os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "1")
    else:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # Ray leaves in sight what it did not give
    with on_own_gpu():
        torch.distributed.init_process_group(
            backend,
            init_method="env://",
            timeout=COLLECTIVE_PATIENCE,
            rank=rank,
            world_size=world_size,
        )


def _leave_group() -> None:
    """Runs in a worker."""
    import torch.distributed

    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
