"""Which device a worker's networks lie on, from before their optimizer is made to the run's end.

AdamW's kernels for GPUs count steps beside the weights, and what FSDP2 has cut can only be put
together where it was cut. So nothing is moved once it has been built: a checkpoint is loaded to
where its networks are, and they are there still when the last one is written.
"""

from __future__ import annotations

from typing import Any

import torch


def own_device() -> torch.device:
    """This worker's GPU; the CPU where it was given none.

    CUDA's current device is each thread's own: ask in the thread that trains.
    """
    cuda: Any = torch.cuda
    if not cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", cuda.current_device())
