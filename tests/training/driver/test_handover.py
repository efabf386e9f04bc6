"""From a published checkpoint to `ready`, killed at every write, raced and refused."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from infra import storage
from infra.errors import UserError
from infra.lease import Lease, LeaseHeld
from infra.tracking_server import TrackedRun, TrackingServer
from training import publish, registry, versions
from training.driver import (
    DriverContext,
    GateFailed,
    StageResult,
    run_stage,
)
from training.plan import StagePlan, plan_stage
from training.stage_run import record_skip

pytestmark = pytest.mark.slow

EXPERIMENT = "hand-over tests"
House = Any  # of conftest.py, which tests cannot import


def _plan(house: House, stage: str = "tokenizer", **changes: Any) -> StagePlan:
    spec = next(spec for spec in house.specs(**changes) if spec.stage == stage)
    return plan_stage(spec, house.context())


def _run(house: House, plan: StagePlan, **options: Any) -> StageResult:
    return run_stage(plan, DriverContext(house.context(), house.cluster, EXPERIMENT), **options)


def _runs(house: House, plan: StagePlan) -> list[TrackedRun]:
    experiment_id = house.server.experiment_id(EXPERIMENT)
    identity = {"stage_key": plan.key or "", "recipe": house.recipe}
    found: list[TrackedRun] = house.server.search_runs(experiment_id, identity)
    return found


@pytest.fixture
def trained(exported: Path, finish_training: Callable[..., str]) -> Callable[..., StagePlan]:
    """``trained(house, stage)``: its plan, with the training done and published."""

    def prepare(house: House, stage: str = "tokenizer", **changes: Any) -> StagePlan:
        finish_training(house, _plan(house, stage, **changes), exported)
        return _plan(house, stage, **changes)

    return prepare


def test_a_trained_stage_becomes_ready(house: House, trained: Any) -> None:
    result = _run(house, trained(house))
    name = f"{house.recipe}-tokenizer"
    assert (result.version.name, result.version.version) == (name, 1)
    assert registry.version_by_alias(house.server, name) == result.version
    assert registry.version_by_alias(house.server, name, registry.CANDIDATE) == result.version
    assert result.version.is_handed_over
    assert result.pin.tokenizer_sha256 == result.version.sha256
    run = house.server.get_run(result.run_id)
    assert run.status == "FINISHED"
    assert run.tags["stage_key"] == result.key
    assert run.tags["attempt"] == "1"
    assert run.metrics["final/final_loss"] == 2.0
    assert run.params["tokenizer.codebook_size"] == "32"
    moves = registry.history(house.store_uri, "tokenizer", name)
    assert [(move.alias, move.old, move.new) for move in moves] == [
        ("candidate", None, 1),
        ("ready", None, 1),
    ]
    assert _plan(house).decision == "SKIP"


def test_the_lineage_is_what_mlflows_own_client_reads(local_house: House, trained: Any) -> None:
    house = local_house
    first = _run(house, trained(house))
    scores = {"colours": 0.75}
    second = _run(house, trained(house, "concepts"), evaluate=lambda uri: scores)
    from mlflow import MlflowClient

    client = MlflowClient(house.server.uri, house.server.uri)
    run = client.get_run(second.run_id)
    assert run.info.status == "FINISHED"
    assert run.inputs is not None
    (dataset,) = run.inputs.dataset_inputs
    assert (dataset.dataset.name, dataset.dataset.digest) == ("toy", "d" * 32)
    assert [model.model_id for model in run.inputs.model_inputs] == [first.pin.model_id]
    assert run.outputs is not None
    assert [model.model_id for model in run.outputs.model_outputs] == [second.pin.model_id]
    assert run.data.metrics["score/colours"] == 0.75
    version = client.get_model_version_by_alias(f"{house.recipe}-concepts", "ready")
    assert int(version.version) == second.version.version
    assert version.run_id == second.run_id
    assert version.tags["parent_version"] == "1"
    assert version.tags["ckpt_sha256"] == second.version.sha256
    assert version.tags["dataset_sha256"] == "d" * 64
    assert version.tags["scores"] == '{"colours":0.75}'
    model = client.get_logged_model(second.pin.model_id or "")
    assert model.status == "READY"
    assert model.source_run_id == second.run_id
    assert {metric.key for metric in model.metrics or []} >= {"score/colours"}


@contextmanager
def _dying(before: int) -> Iterator[None]:
    """End this process without goodbye before its n-th write (from 1), of any kind."""
    num_left = before
    send, put = TrackingServer._send, storage.write_bytes

    def count() -> None:
        nonlocal num_left
        num_left -= 1
        if num_left == 0:
            os._exit(9)

    def counted_send(self: TrackingServer, method: str, path: str, *rest: Any) -> bytes:
        if method != "GET" and not path.endswith("search"):
            count()
        return send(self, method, path, *rest)

    def counted_put(uri: str, data: bytes) -> storage.StoredObject:
        count()
        return put(uri, data)

    TrackingServer._send = counted_send  # type: ignore[method-assign,assignment]  # in a child of its own
    storage.write_bytes = counted_put
    yield


def _in_a_child(work: Callable[[], object]) -> int:
    """Run ``work`` in a forked process; its exit code, 0 when it came to its end."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    try:
        work()
    except BaseException:
        os._exit(1)
    os._exit(0)


def test_killed_at_every_write_the_same_call_converges(local_house: House, trained: Any) -> None:
    house = local_house
    survived = False
    number = 0
    while not survived:
        number += 1
        house.tokenizer = house.tokenizer.model_copy(update={"seed": number})
        plan = trained(house)

        def doomed(plan: StagePlan = plan, number: int = number) -> None:
            with _dying(before=number):
                _run(house, plan)

        exit_code = _in_a_child(doomed)
        assert exit_code in (0, 9)
        survived = exit_code == 0
        if survived:
            continue
        result = _run(house, _plan(house)) if _plan(house).decision != "SKIP" else None
        _assert_converged(house, number, result)
    assert number > 25


def _assert_converged(house: House, number: int, result: StageResult | None) -> None:
    plan = _plan(house)
    assert plan.decision == "SKIP", f"killed before write {number}: {plan.reason}"
    name = f"{house.recipe}-tokenizer"
    found = versions.find_versions(house.server, name, plan.key or "")
    assert len(found) == 1
    assert registry.version_by_alias(house.server, name) == found[0]
    assert found[0].is_handed_over
    runs = _runs(house, plan)
    assert [run.status for run in runs] == ["FINISHED"]
    body = {
        "experiment_ids": [runs[0].experiment_id],
        "filter": f"source_run_id = '{runs[0].run_id}'",
    }
    models = house.server.call("POST", "mlflow/logged-models/search", body)["models"]
    assert [model["info"]["status"] for model in models] == ["LOGGED_MODEL_READY"]
    moves = registry.history(house.store_uri, "tokenizer", name)
    mine = [move.alias for move in moves if move.new == found[0].version]
    assert sorted(mine) == ["candidate", "ready"]
    assert result is None or result.version == found[0]


def test_two_drivers_of_one_stage(house: House, trained: Any) -> None:
    plan = trained(house)
    lease_uri = storage.join(house.store_uri, "runs", plan.run_name or "", "lease.json")
    refused = pytest.raises(LeaseHeld, match="ann@desk")
    with Lease(lease_uri, "ann@desk"), refused:
        _run(house, plan)
    assert _run(house, plan).version.version == 1


def test_a_driver_that_lost_its_lease_publishes_nothing(local_house: House, trained: Any) -> None:
    house = local_house
    _run(house, trained(house))
    plan = trained(house, "concepts")
    uri = storage.join(house.store_uri, "runs", plan.run_name or "", "lease.json")

    def steal(_: str) -> Mapping[str, float]:
        storage.write_json(uri, {**storage.read_json(uri), "token": "stolen", "owner": "bob"})
        return {}

    with pytest.raises(UserError, match=r"attempt 1 lost .* to bob"):
        _run(house, plan, evaluate=steal)
    assert versions.all_versions(house.server, f"{house.recipe}-concepts") == []


def test_scores_decide_and_a_lower_bound_lets_it_pass(local_house: House, trained: Any) -> None:
    house = local_house
    _run(house, trained(house))
    seen: list[bool] = []

    def evaluate(uri: str) -> Mapping[str, float]:
        folder = publish.fetch_checkpoint(uri)
        seen.append((folder / "transformer" / "config.json").is_file())
        return {"colours": 0.4}

    house.min_scores = {"colours": 0.5}
    plan = trained(house, "concepts")
    with pytest.raises(GateFailed, match=r"colours is 0\.4: expected at least 0\.5"):
        _run(house, plan, evaluate=evaluate)
    name = f"{house.recipe}-concepts"
    assert registry.version_by_alias(house.server, name) is None
    assert registry.version_by_alias(house.server, name, registry.CANDIDATE) is not None
    (run,) = _runs(house, plan)
    assert run.status == "FAILED"
    assert "colours" in run.tags["failure"]
    refused = _plan(house, "concepts")
    assert (refused.decision, refused.needs_training) == ("RESUME", False)
    assert "the gate holds it back: colours is 0.4" in refused.reason
    house.min_scores = {"colours": 0.3}
    passed = _run(house, _plan(house, "concepts"), evaluate=evaluate)
    assert passed.version.version == 1
    assert registry.version_by_alias(house.server, name) == passed.version
    assert house.server.get_run(run.run_id).status == "FINISHED"
    assert seen == [True, True]


def test_a_failing_evaluation_fails_the_run_and_is_taken_up_again(
    local_house: House, trained: Any
) -> None:
    house = local_house
    _run(house, trained(house))
    plan = trained(house, "concepts")

    def broken(_: str) -> Mapping[str, float]:
        raise UserError("the oracle is blind")

    with pytest.raises(UserError, match="blind"):
        _run(house, plan, evaluate=broken)
    (run,) = _runs(house, plan)
    assert (run.status, run.tags["failure"]) == ("FAILED", "the oracle is blind")
    assert _run(house, plan, evaluate=lambda uri: {}).run_id == run.run_id
    assert house.server.get_run(run.run_id).tags["attempt"] == "2"


def test_damage_between_plan_and_run_stops_it(local_house: House, trained: Any) -> None:
    plan = trained(local_house)
    storage.write_bytes(storage.join(plan.published or "", "model_index.json"), b"{}")
    with pytest.raises(UserError, match=r"is damaged: model_index\.json"):
        _run(local_house, plan)
    assert versions.all_versions(local_house.server, f"{local_house.recipe}-tokenizer") == []


def test_stages_are_children_of_the_pipelines_run(local_house: House, trained: Any) -> None:
    house = local_house
    experiment_id = house.server.experiment_id(EXPERIMENT)
    parent = house.server.create_run(experiment_id, "a run", {"recipe": house.recipe})
    context = DriverContext(house.context(), house.cluster, EXPERIMENT, parent.run_id)
    result = run_stage(trained(house), context)
    assert house.server.get_run(result.run_id).tags["mlflow.parentRunId"] == parent.run_id
    record_skip(house.server, parent.run_id, _plan(house))
    assert result.run_id in house.server.get_run(parent.run_id).tags["skipped.tokenizer"]


def test_what_another_recipe_trained_is_only_registered(local_house: House, trained: Any) -> None:
    """The same holds for a registry that was lost: what is published heals it."""
    house = local_house
    first = _run(house, trained(house))
    house.recipe = f"{house.recipe}-b"
    plan = _plan(house)
    assert (plan.decision, plan.needs_training) == ("RESUME", False)
    second = _run(house, plan)
    assert second.version.uri == first.version.uri
    assert second.version.name == f"{house.recipe}-tokenizer"
    assert _plan(house).decision == "SKIP"


def test_a_plan_without_inputs_cannot_run(local_house: House) -> None:
    context = local_house.context()
    plan = plan_stage(local_house.specs()[0], type(context)(context.server, context.store_uri, {}))
    with pytest.raises(ValueError, match="planned without its inputs"):
        _run(local_house, plan)


def test_a_lost_database_is_made_again_without_training(
    local_house: House, trained: Any, empty_server: TrackingServer
) -> None:
    """What the store holds is enough: same key, bytes and alias; MLflow's points are gone."""
    house = local_house
    before = [_run(house, trained(house, stage)) for stage in ("tokenizer", "concepts")]
    house.server = empty_server
    after = []
    for stage in ("tokenizer", "concepts"):
        plan = _plan(house, stage)
        assert plan.reason == "trained and published, not registered yet"
        assert not plan.needs_training
        after.append(_run(house, plan))
        assert _plan(house, stage).decision == "SKIP"
    assert [(r.key, r.version.sha256) for r in after] == [(r.key, r.version.sha256) for r in before]
    for result in after:
        ready = registry.version_by_alias(empty_server, result.version.name)
        assert ready == result.version


def test_a_version_with_this_key_that_lies_elsewhere_is_no_reason_to_skip(
    local_house: House, trained: Any
) -> None:
    house = local_house
    result = _run(house, trained(house))
    house.server.call(
        "POST",
        "mlflow/model-versions/create",
        {
            "name": result.version.name,
            "source": "s3://somebody/else",
            "run_id": result.run_id,
            "tags": [{"key": key, "value": value} for key, value in result.version.tags.items()],
        },
    )
    with pytest.raises(UserError, match=r"to lie at .*; got s3://somebody/else"):
        _plan(house)
