"""What a person reads when workers fail."""

from __future__ import annotations

import pytest

from training.launch import Launch, explain, is_final
from training.replicas import ReplicasDiffer

pytestmark = pytest.mark.filterwarnings("ignore::Warning:ray.data.context")


@pytest.mark.parametrize(
    "failure",
    [
        MemoryError(),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"),
        type("OutOfMemoryError", (RuntimeError,), {})("CUDA out of memory. Tried to allocate"),
    ],
    ids=["python", "torch", "gpu"],
)  # fmt: skip
def test_out_of_memory_has_a_remedy(failure: Exception) -> None:
    from ray.train.v2.api.exceptions import WorkerGroupError

    found = explain(
        WorkerGroupError("a worker failed", {1: failure}), Launch("concepts-0", "file:///s")
    )
    assert "ran out of memory in worker 1: lower max_microbatch_size" in str(found)
    assert "\n" not in str(found)
    assert not is_final(failure)


def test_unequal_workers_start_again() -> None:
    assert not is_final(ReplicasDiffer("weights are no longer equal"))
