"""Every decision a plan can come to, on real storage and a real registry."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from infra import storage
from infra.errors import UserError
from training import publish, registry
from training.expected import expected_time
from training.plan import PUBLISHED_NAME, StagePlan, plan_chain, plan_stage

pytestmark = pytest.mark.slow

House = Any  # of conftest.py, which tests cannot import


def _names(house: House) -> set[str]:
    return {info.uri for info in storage.list_objects(house.store_uri)}


def test_an_empty_house_is_planned_without_writing(house: House) -> None:
    before = _names(house)
    plans = plan_chain(house.specs(), house.context())
    assert [plan.decision for plan in plans] == ["RUN", "INIT", "INIT"]
    assert plans[0].reason == "never trained; starts from fresh weights"
    assert plans[0].run_name == f"tokenizer-{(plans[0].key or '')[:12]}"
    assert [plan.key for plan in plans[1:]] == [None, None]
    assert plans[1].reason == f"starts from the result of {plans[0].run_name}, which comes first"
    assert plans[2].reason == "starts from the result of stage concepts, which comes first"
    assert _names(house) == before


def test_what_is_finished_is_skipped_and_pins_the_next(house: House, finish: Any) -> None:
    skip = finish(house)
    assert skip.decision == "SKIP"
    assert "every digest verified" in skip.reason
    plans = plan_chain(house.specs(), house.context())
    assert [plan.decision for plan in plans] == ["SKIP", "INIT", "INIT"]
    assert plans[1].parent == skip.pin
    assert plans[1].key is not None
    assert plans[1].reason.endswith(f"starts from version 1 of {house.recipe}-tokenizer")
    finish(house, "concepts")
    assert [p.decision for p in plan_chain(house.specs(), house.context())] == [
        "SKIP", "SKIP", "INIT"
    ]  # fmt: skip


def test_a_pin_stays_whatever_happens_to_the_alias(local_house: House, finish: Any) -> None:
    house = local_house
    first = finish(house)
    other = house.tokenizer.model_copy(update={"seed": 5})
    original, house.tokenizer = house.tokenizer, other
    second = finish(house)
    assert second.existing.version == 2
    ready = registry.version_by_alias(house.server, f"{house.recipe}-tokenizer")
    assert ready is not None
    assert ready.version == 2
    house.tokenizer = original
    plans = plan_chain(house.specs(), house.context())
    assert plans[0].decision == "SKIP"
    assert plans[1].parent == first.pin
    alone = plan_stage(house.specs()[1], house.context())  # not in a chain: what is ready now
    assert alone.parent == second.pin


def test_a_stage_without_a_ready_parent_says_so(local_house: House) -> None:
    with pytest.raises(UserError, match="has no ready version; train stage tokenizer first"):
        plan_stage(local_house.specs()[1], local_house.context())


def test_a_checkpoint_of_its_own_is_resumed(local_house: House) -> None:
    house = local_house
    plan = plan_stage(house.specs()[0], house.context())
    folder = storage.join(house.store_uri, "runs", plan.run_name or "", "checkpoints")
    storage.write_json(storage.join(folder, "000-00000099-12345678", "state.json"), {})
    assert plan_stage(house.specs()[0], house.context()).decision == "RUN"  # never completed
    for name in ("000-00000041-12345678", "000-00000042-12345678"):
        storage.write_json(storage.join(folder, name, "CHECKPOINT.json"), {})
    resumed = plan_stage(house.specs()[0], house.context())
    assert (resumed.decision, resumed.step) == ("RESUME", 42)
    assert resumed.reason == "a checkpoint at step 42 of 600"


def test_hours_come_from_the_speed_it_had(local_house: House, finish: Any) -> None:
    house = local_house
    finish(house)
    plan = plan_chain(house.specs(steps=1800), house.context())[1]
    assert expected_time(plan, house.context()) is None  # never trained at any speed
    run_uri = storage.join(house.store_uri, "runs", plan.run_name or "")
    listing = storage.join(run_uri, "checkpoints", "000-00000600-12345678", "CHECKPOINT.json")
    storage.write_json(listing, {})
    for on_workers in (1, 4):  # as they were; the plan has one
        progress = {"step": 610, "images_per_second": 2.0 * on_workers, "num_workers": on_workers}
        storage.write_json(storage.join(run_uri, "progress.json"), progress)
        plan = plan_chain(house.specs(steps=1800), house.context())[1]
        expected = expected_time(plan, house.context())
        assert expected is not None
        assert expected.hours == pytest.approx(1200 * 2 / 2.0 / 3600)
        assert (expected.num_workers, expected.measured_workers) == (1, on_workers)
    del progress["num_workers"]  # of a run that did not say so
    storage.write_json(storage.join(run_uri, "progress.json"), progress)
    assert expected_time(plan, house.context()) is None


def test_more_workers_take_fewer_hours_and_cost_the_same(local_house: House, finish: Any) -> None:
    house = local_house
    finish(house)
    finish(house, "concepts")  # at 8 images a second on two workers
    hours = []
    for num_workers in (1, 8):
        plan = plan_chain(house.specs(steps=1800, num_workers=num_workers), house.context())[1]
        expected = expected_time(plan, house.context())
        assert expected is not None
        assert expected.images_per_second == 4.0 * num_workers
        hours.append(expected.hours * expected.num_workers)
        assert expected.measured_workers == 2
        assert expected.known_from == f"version 1 of {house.recipe}-concepts"
    assert hours == [pytest.approx(1800 * 2 / 4.0 / 3600)] * 2


@pytest.mark.parametrize(
    "change", [{"compress": True}, {"resolution_px": 64}, {"precision": "fp32"}, {"network": 3}]
)
def test_the_speed_of_other_work_is_not_taken(
    local_house: House, finish: Any, change: dict[str, Any]
) -> None:
    house = local_house
    finish(house)
    finish(house, "concepts")
    if "network" in change:
        specs = house.specs(steps=1800)
        network = {**specs[1].configs["network"], "num_layers": change["network"]}
        spec = replace(specs[1], configs={**specs[1].configs, "network": network})
    else:
        spec = house.specs(steps=1800, **change)[1]
    plan = plan_chain([house.specs()[0], spec], house.context())[1]
    assert plan.decision == "INIT"
    assert expected_time(plan, house.context()) is None


def test_a_dataset_that_is_not_there_yet(local_house: House) -> None:
    context = local_house.context()
    plan = plan_stage(local_house.specs()[0], type(context)(context.server, context.store_uri, {}))
    assert (plan.decision, plan.key) == ("RUN", None)
    assert plan.reason == "dataset toy is not curated yet"


def test_a_change_is_named(local_house: House, finish: Any) -> None:
    house = local_house
    finish(house)
    finish(house, "concepts")
    (_, changed, _) = plan_chain(house.specs(steps=4), house.context())
    assert changed.decision == "INIT"
    assert changed.reason.startswith("config.stage.steps changed since version 1; starts from")
    assert plan_chain(house.specs(num_workers=3), house.context())[1].decision == "SKIP"
    house.dataset_version = "e" * 64
    assert plan_chain(house.specs(), house.context())[0].reason.startswith(
        "dataset_sha256s changed"
    )


def test_damage_is_an_error_and_absence_is_not(house: House, finish: Any) -> None:
    skip = finish(house)
    uri = skip.existing.uri
    spec, context = house.specs()[0], house.context()
    whole = storage.read_bytes(storage.join(uri, "model_index.json"))
    storage.write_bytes(storage.join(uri, "model_index.json"), whole[:-1] + b"?")
    with pytest.raises(UserError) as caught:
        plan_stage(spec, context)
    for part in ("model_index.json: expected sha256", "got", "delete the folder to train"):
        assert part in str(caught.value)
    storage.write_bytes(storage.join(uri, "model_index.json"), whole)
    assert plan_stage(spec, context).decision == "SKIP"
    storage.delete(storage.join(uri, "CHECKPOINT.json"))
    with pytest.raises(UserError, match=r"CHECKPOINT\.json: missing"):
        plan_stage(spec, context)
    storage.delete_prefix(uri)
    again = plan_stage(spec, context)
    assert (again.decision, again.needs_training) == ("RUN", True)
    assert again.reason.startswith("the files of version 1 are gone; ")


def test_scores_of_another_evaluation_do_not_count(local_house: House, finish: Any) -> None:
    house = local_house
    finish(house)
    finish(house, "concepts")
    house.evaluation_key = "e2"
    plan = plan_chain(house.specs(), house.context())[1]
    assert (plan.decision, plan.needs_training) == ("RESUME", False)
    assert plan.reason.endswith("is trained; its scores are of another evaluation")
    assert plan_chain(house.specs(), house.context())[0].decision == "SKIP"


def test_a_bound_that_moved_asks_the_gate_again(local_house: House, finish: Any) -> None:
    house = local_house
    finish(house)
    finish(house, "concepts")
    plan = plan_chain(house.specs(max_final_loss=1.0), house.context())[1]
    assert (plan.decision, plan.needs_training) == ("RESUME", False)
    assert "final_loss is 2: expected at most 1" in plan.reason


def test_a_trained_stage_waits_for_its_registration(
    local_house: House, exported: Path, finish_training: Callable[..., str]
) -> None:
    house = local_house
    spec = house.specs()[0]
    finish_training(house, plan_stage(spec, house.context()), exported)
    plan = plan_stage(spec, house.context())
    assert plan.reason == "trained and published, not registered yet"
    storage.delete_prefix(plan.published or "")
    assert plan_stage(spec, house.context()).decision == "RUN"
    storage.write_json(
        storage.join(house.store_uri, "runs", plan.run_name or "", PUBLISHED_NAME), []
    )
    assert plan_stage(spec, house.context()).decision == "RUN"


def test_a_finished_chain_is_planned_in_a_moment(local_house: House, finish: Any) -> None:
    for stage in ("tokenizer", "concepts", "alignment"):
        finish(local_house, stage)
    started_at = time.monotonic()
    plans = plan_chain(local_house.specs(), local_house.context())
    assert time.monotonic() - started_at < 3.0
    assert [plan.decision for plan in plans] == ["SKIP"] * 3


def test_published_weights_are_known_by_their_bytes(
    local_house: House, finish: Any, exported: Path, other_export: Path, tmp_path: Path
) -> None:
    house, folder = local_house, tmp_path / "published"
    finish(house)
    shutil.copytree(exported / "transformer", folder)
    init = {"source": "pretrained", "pretrained": str(folder)}

    def plan(**other: Any) -> StagePlan:
        return plan_chain(house.specs(init={**init, **other}), house.context())[1]

    begun = plan()
    assert begun.reason.endswith(f"starts from {folder} and version 1 of {house.recipe}-tokenizer")
    assert finish(house, "concepts", init=init).decision == "SKIP"
    provenance = publish.read_provenance(plan().published or "")
    assert provenance["key_parts"]["config"]["stage"]["init"]["pretrained"] == begun.parts[0].sha256
    moved = shutil.copytree(folder, tmp_path / "moved")
    assert plan(pretrained=str(moved)).decision == "SKIP"
    shutil.copytree(other_export / "transformer", folder, dirs_exist_ok=True)
    changed = plan()
    assert changed.decision == "INIT"
    assert changed.reason.startswith("config.stage.init.pretrained changed since version 1")
    shutil.rmtree(folder)
    with pytest.raises(UserError, match="a published model in"):
        plan()
