"""What `rollback` and `promote` change: what counts as done, what is started from, what paints."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from app.sources import find_source
from app.status import DONE, RunStatus, StatusFile, StepStatus, now
from app.verb import Output
from infra import storage
from infra.errors import UserError
from infra.tracking_server import TrackingServer
from training import registry, versions
from training.driver import DriverContext, run_stage
from training.plan import StagePlan, plan_chain, plan_stage
from training.registry import AliasMove
from training.versions import RegisteredVersion

House = Any  # of conftest.py, which tests cannot import


def _version(number: int, key: str = "k", sha256: str = "s") -> RegisteredVersion:
    tags = {
        versions.TAG_STAGE: "concepts",
        versions.TAG_STAGE_KEY: key,
        versions.TAG_SHA256: sha256,
    }
    return RegisteredVersion("toy-concepts", number, "", "", tags)


def _move(kind: Any, old: int | None, new: int, was: str = "", becomes: str = "") -> AliasMove:
    return AliasMove(
        "toy-concepts", "ready", old, new, kind, "ann", "bad\nhands", "now", was, becomes
    )


def test_a_rollback_takes_back_what_it_moved_from_until_that_is_promoted() -> None:
    moves = [_move("promote", None, 1), _move("promote", 1, 2), _move("promote", 2, 3)]
    assert [registry.withdrawn(moves, _version(n)) for n in (1, 2, 3)] == [None] * 3
    moves += [_move("rollback", 3, 2), _move("rollback", 2, 1)]
    assert [registry.withdrawn(moves, _version(n)) for n in (1, 2, 3)] == [None, *moves[:2:-1]]
    moves.append(_move("promote", 1, 3))
    assert registry.withdrawn(moves, _version(3)) is None
    assert registry.withdrawn(moves, _version(2)) == moves[4]


def test_what_was_taken_back_is_known_under_any_number() -> None:
    moves = [_move("promote", 1, 2, "a/x", "b/y"), _move("rollback", 2, 1, "b/y", "a/x")]
    assert registry.withdrawn(moves, _version(7, "b", "y")) == moves[1]
    assert registry.withdrawn(moves, _version(2, "c", "z")) is None
    assert registry.withdrawn(moves, _version(2, "b", "z")) is None  # trained again, other bytes


def test_of_one_key_the_newest_that_was_not_taken_back_counts(tmp_path: Path) -> None:
    older, newer = _version(1, "k", "x"), _version(2, "k", "y")
    log = storage.join(tmp_path.as_uri(), "models", "concepts", "alias_log.json")
    assert registry.newest_in_use(tmp_path.as_uri(), [older, newer]) == newer
    assert registry.newest_in_use(tmp_path.as_uri(), []) is None
    written = vars(_move("rollback", 2, 1, "k/y", "k/x"))
    storage.write_json(log, [written])
    assert registry.newest_in_use(tmp_path.as_uri(), [older, newer]) == older
    # A history from before identities were kept.
    storage.write_json(log, [{k: v for k, v in written.items() if "identity" not in k}])
    with pytest.raises(UserError, match="version 2 of toy-concepts") as told:
        registry.newest_in_use(tmp_path.as_uri(), [newer])
    assert "was rolled back by ann: bad hands; promote it" in str(told.value)


@pytest.fixture
def two_versions(local_house: House, finish: Any, other_export: Path) -> tuple[House, StagePlan]:
    """Concepts twice, with seeds 0 and 5; the second is ready. Returns its plan too."""
    finish(local_house)
    finish(local_house, "concepts")
    second = finish(local_house, "concepts", other_export, seed=5)
    assert second.existing.version == 2
    return local_house, second


def _roll_back(house: House) -> AliasMove:
    return registry.rollback(
        house.server, house.store_uri, f"{house.recipe}-concepts", "concepts", why="bad hands"
    )


@pytest.mark.slow
def test_what_was_rolled_back_neither_counts_nor_feeds(
    two_versions: tuple[House, StagePlan],
) -> None:
    house, second = two_versions
    assert plan_chain(house.specs(seed=5), house.context())[2].parent == second.pin
    _roll_back(house)
    for evaluation_key in ("", "another"):  # nothing left to do, and something
        house.evaluation_key = evaluation_key
        with pytest.raises(UserError) as told:
            plan_chain(house.specs(seed=5), house.context())
        for part in ("version 2", "bad hands", f"promote {house.recipe}-concepts 2", "the recipe"):
            assert part in str(told.value)
        assert "\n" not in str(told.value)
    house.evaluation_key = ""
    plans = plan_chain(house.specs(), house.context())
    assert [plan.decision for plan in plans] == ["SKIP", "SKIP", "INIT"]
    assert plans[2].parent is not None
    assert plans[2].parent.version == 1
    assert plans[1].reason.endswith("verified")
    assert second.existing is not None
    registry.promote_verified(house.server, house.store_uri, second.existing, why="not so bad")
    assert plan_chain(house.specs(seed=5), house.context())[2].parent == second.pin


@pytest.mark.slow
def test_a_hand_over_does_not_undo_a_rollback(two_versions: tuple[House, StagePlan]) -> None:
    house, _ = two_versions
    house.evaluation_key = "another"
    plan = plan_chain(house.specs(seed=5), house.context())[0]
    run_stage(plan, DriverContext(house.context(), house.cluster, "rollback tests"))
    plan = plan_stage(house.specs(seed=5)[1], house.context())
    assert (plan.decision, plan.needs_training) == ("RESUME", False)
    _roll_back(house)  # between the plan and the work
    with pytest.raises(UserError, match=r"version 2 .* was rolled back by .*: bad hands"):
        run_stage(plan, DriverContext(house.context(), house.cluster, "rollback tests"))
    ready = registry.version_by_alias(house.server, f"{house.recipe}-concepts")
    assert ready is not None
    assert ready.version == 1


@pytest.mark.slow
def test_a_rollback_outlives_mlflows_database(
    two_versions: tuple[House, StagePlan], finish: Any, empty_server: TrackingServer
) -> None:
    house, _ = two_versions
    _roll_back(house)
    anew = replace(house, server=empty_server)
    tokenizer = plan_chain(anew.specs(), anew.context())[0]
    run_stage(tokenizer, DriverContext(anew.context(), anew.cluster, "rollback tests"))
    plan = plan_stage(anew.specs(seed=5)[1], anew.context())
    with pytest.raises(UserError, match=r"version 1 .* was rolled back"):
        run_stage(plan, DriverContext(anew.context(), anew.cluster, "rollback tests"))
    first = plan_stage(anew.specs()[1], anew.context())
    run_stage(first, DriverContext(anew.context(), anew.cluster, "rollback tests"))
    first = plan_stage(anew.specs()[1], anew.context())
    assert first.decision == "SKIP"  # number 2 by now, and not what was rolled back
    assert first.existing is not None
    assert first.existing.version == 2


@pytest.mark.slow
def test_an_older_version_that_was_promoted_is_said(
    two_versions: tuple[House, StagePlan],
) -> None:
    house, _ = two_versions
    name = f"{house.recipe}-concepts"
    first = versions.get_version(house.server, name, 1)
    registry.promote(house.server, house.store_uri, first, why="calmer\ncolours", who="ann")
    skip = plan_chain(house.specs(seed=5), house.context())[1]
    assert skip.decision == "SKIP"
    assert skip.reason.endswith("but ready is version 1 (promote by ann: calmer colours)")


@pytest.fixture
def home_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[House, StagePlan], None]:
    """Leave the record of a run whose last stage this plan describes."""

    def make(house: House, made: StagePlan) -> None:
        monkeypatch.setenv("ATELIER_HOME", str(tmp_path / "home"))
        assert made.existing is not None
        step = StepStatus("concepts", "stage", DONE, key=made.key)
        step.model_version = f"{made.existing.name}/{made.existing.version}"
        step.checkpoint_uri, step.checkpoint_sha256 = made.existing.uri, made.existing.sha256
        status = RunStatus(
            "r1", house.recipe, "x.yaml", "0" * 64, "atelier run", os.getpid(), now(), now(),
            DONE, steps=[step],
        )  # fmt: skip
        services = {"store_uri": house.store_uri, "tracking_uri": house.server.uri}
        StatusFile.create(tmp_path / "home", status, {"services": services})

    return make


@pytest.mark.slow
def test_what_is_ready_paints_and_says_so(
    two_versions: tuple[House, StagePlan],
    home_of: Callable[[House, StagePlan], None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    house, second = two_versions
    home_of(house, second)
    name = f"{house.recipe}-concepts"
    found = find_source(None, None, Output())
    assert found.folder.name == second.existing.sha256  # type: ignore[union-attr]
    assert (found.lineage["version"], found.lineage["run"]) == (f"{name}/2", "r1")
    assert f"painting with version 2 of {name}, which is ready\n" in capsys.readouterr().out
    _roll_back(house)
    found = find_source("concepts", None, Output())
    ready = versions.get_version(house.server, name, 1)
    assert found.folder.name == ready.sha256
    assert found.lineage["version"] == f"{name}/1"
    assert list(json.loads(found.lineage["checkpoints"])) == ["tokenizer", "concepts"]
    assert "run" not in found.lineage
    said = capsys.readouterr().out
    assert f"version 1 of {name}, which is ready; the newest run has version 2" in said
