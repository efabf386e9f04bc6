"""What a person reads when workers fail."""

from __future__ import annotations

from pathlib import Path

import pytest

from infra import storage
from infra.cluster import ClusterConfig
from infra.errors import UserError
from infra.sessions import ray_session
from training.launch import (
    MAX_FAILURES,
    Launch,
    RetryWhileItAdvances,
    explain,
    is_final,
    train,
)
from training.replicas import ReplicasDiffer
from training.room import Room, why_none_came

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


def _machine(cpus: float, gpus: float = 0.0, is_alive: bool = True) -> dict[str, object]:
    return {"Alive": is_alive, "Resources": {"CPU": cpus, "GPU": gpus}}


@pytest.mark.parametrize(
    ("machines", "use_gpu", "num_workers"),
    [
        ([_machine(5)], False, 2),
        ([_machine(3), _machine(3)], False, 2),  # 6 CPUs, and no third worker fits on a machine
        ([_machine(8), _machine(8, is_alive=False)], False, 4),
        ([_machine(8, 1), _machine(2, 8)], True, 2),
        ([_machine(8)], True, 0),
        ([{"Alive": True}], False, 0),
    ],
)
def test_workers_fit_on_whole_machines(
    machines: list[dict[str, object]], use_gpu: bool, num_workers: int
) -> None:
    launch = Launch("concepts-0", "file:///s", 3, cpus_per_worker=2, use_gpu=use_gpu)
    room = Room.of(machines, launch)
    assert room.num_workers == num_workers
    problem = room.problem(launch)
    assert (problem is None) == (num_workers >= 3)
    if problem is not None:
        assert f"room for 3 workers of 2 CPUs{' and a GPU' if use_gpu else ''}, got" in problem
        assert ("cluster.use_gpu: false" in problem) == use_gpu


@pytest.mark.slow
def test_workers_that_can_never_come_are_not_waited_for(tmp_path: Path) -> None:
    from ray.train.v2._internal.exceptions import WorkerGroupStartupTimeoutError
    from ray.train.v2.api.exceptions import ControllerError

    def never(job: dict[str, object]) -> None:
        raise AssertionError("it began")

    cluster = ClusterConfig(cpus_per_worker=1, use_gpu=False)
    launch = Launch("concepts-0", tmp_path.as_uri(), 1, cpus_per_worker=1, use_gpu=True)
    many = Launch("concepts-0", tmp_path.as_uri(), 5, cpus_per_worker=1)
    with ray_session(cluster, {}):
        # Ray itself gives up after four minutes, with "could not begin".
        with pytest.raises(
            UserError, match=r"cannot begin: .* room for 0: 2 CPUs and 0 GPUs on 1 m"
        ):
            train({}, launch, never)
        with pytest.raises(
            UserError,
            match="cannot begin: expected room for 5 workers of 1",
        ):
            train({}, many, never)
        late = ControllerError(WorkerGroupStartupTimeoutError(num_workers=5))
        assert "could not begin: expected room for 5 workers" in str(explain(late, many))
        assert "\n" not in str(explain(late, many))
        assert "though there is room" in why_none_came(Launch("c", "file:///s", cpus_per_worker=1))


def test_shards_that_are_encoded_renew_the_tries(tmp_path: Path) -> None:
    """Hours of them come before the first checkpoint, and each stays."""
    from ray.train.v2._internal.execution.failure_handling import FailureDecision
    from ray.train.v2.api.config import FailureConfig
    from ray.train.v2.api.exceptions import WorkerGroupError

    run_uri = tmp_path.as_uri()
    policy = RetryWhileItAdvances(FailureConfig(max_failures=MAX_FAILURES), run_uri, {})

    def decision(shards_encoded: int) -> FailureDecision:
        progress = {"step": 0, "steps": 9, "shards_encoded": shards_encoded, "shards": 99}
        storage.write_json(storage.join(run_uri, "progress.json"), progress)
        return policy.make_decision(WorkerGroupError("lost", {0: RuntimeError("lost")}))

    assert {decision(number) for number in range(1, 9)} == {FailureDecision.RETRY}
    assert [decision(8) for _ in range(MAX_FAILURES)][-1] == FailureDecision.RAISE
