"""Cleaning: nothing that is needed goes, whoever is killed when, and nobody is disturbed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from app.cleaning import with_parents
from infra import storage
from infra.lease import Lease, LeaseHeld
from infra.manifest import DatasetManifest, load_manifest, verify_dataset
from pipelines.build import Build
from pipelines.clean import clean, take_stock
from pipelines.curate import curate
from pipelines.exclusive import exclusive_lease_uri, nobody_else
from pipelines.plan import plan_curation
from tests.infra.test_lease import _end, _holder, _line
from tests.pipelines.test_build import Crash, crash_after, run
from tests.pipelines.test_rejected import Drop, derived, no_spark


def listing(root: str) -> dict[str, int]:
    return {
        info.uri.removeprefix(root + "/"): info.num_bytes
        for info in storage.list_objects(root)
        if not info.uri.endswith("lease.json")
    }


def litter(root: str, build: Build) -> set[str]:
    """Leave what killed attempts, and versions that are gone, leave."""
    gone = "ab" * 32
    paths = {
        f"shards/{'0123' * 8}.tar",
        f"ledger/{'0123' * 8}.parquet",
        f"{build.folder.removeprefix(root + '/')}/rows/4567",
        f"{gone}/report.html",
        "report/0123.json",
        "embeddings/0123456789ab/units/ffff.json",
        "embeddings/0123456789ab/images/ffff.npy",
        f"work/verified/{gone}.json",
        "work/probe-0123456789abcdef",
    }
    for path in paths:
        storage.write_bytes(storage.join(root, path), b"{}")
    return paths


def test_a_finished_version_loses_nothing_but_litter(trap_world: Any, store_uri: str) -> None:
    plan = plan_curation("traps", trap_world.config(), store_uri)
    manifest = run(plan)
    root = plan.build.dataset_root
    whole = listing(root)
    assert take_stock(root).removable == {}
    for path in (
        "notes.txt",
        "shards/holiday.tar",
        "ab" * 32 + "/withdrawn.json",
        "tombstones/x.json",
    ):
        storage.write_bytes(storage.join(root, path), b'{"successor": "x"}')
        whole[path] = 18
    left = litter(root, plan.build)
    stock = take_stock(root)
    assert set(stock.removable) == left
    assert stock.removable_bytes == 2 * len(left)
    assert set(stock.kept) >= set(whole)
    assert stock.by_kind(stock.kept)["shards"][0] == len(manifest.shards)
    assert clean(root).removable == stock.removable
    assert listing(root) == whole
    assert verify_dataset(storage.join(root, manifest.version, "manifest.json")) == []


@pytest.mark.slow
def test_a_build_that_was_killed_anywhere_goes_on_after_a_cleaning(
    trap_world: Any, tmp_path: Path
) -> None:
    config = trap_world.config(fetch=trap_world.web.config(max_bytes=200_000, retries=0))
    with pytest.MonkeyPatch.context() as patch:
        count = crash_after(patch, 10**9)
        expected = run(plan_curation("traps", config, (tmp_path / "whole").as_uri()))
        num_writes = count()
    for number in range(2, num_writes, 7):
        store_uri = (tmp_path / f"crash-{number}").as_uri()
        with pytest.MonkeyPatch.context() as patch:
            crash_after(patch, number)
            with pytest.raises(Crash):
                run(plan_curation("traps", config, store_uri))
        before = plan_curation("traps", config, store_uri)
        clean(before.build.dataset_root)
        after = plan_curation("traps", config, store_uri)
        assert (after.partitions, after.parts) == (before.partitions, before.parts)
        assert run(after).to_bytes() == expected.to_bytes(), number
        assert take_stock(after.build.dataset_root).removable_bytes == 0


def test_without_working_files_a_finished_build_is_still_skipped(
    trap_world: Any, tmp_path: Path
) -> None:
    config, store = trap_world.config(), tmp_path.as_uri()
    plan = plan_curation("traps", config, store)
    manifest = run(plan)
    root = plan.build.dataset_root
    assert "work, finished" in clean(root, with_work=True).removable.values()
    left = [path for path in listing(root) if path.startswith("work/")]
    assert left == [f"{plan.build.folder.removeprefix(root + '/')}/result.json"]
    result = curate("traps", config, store, no_spark)
    assert (result.decision, result.version) == ("SKIP", manifest.version)


def test_without_working_files_a_build_under_way_begins_again(
    trap_world: Any, tmp_path: Path
) -> None:
    config, store = trap_world.config(), tmp_path.as_uri()
    with pytest.MonkeyPatch.context() as patch:
        crash_after(patch, 12)
        with pytest.raises(Crash):
            run(plan_curation("traps", config, store))
    plan = plan_curation("traps", config, store)
    root = plan.build.dataset_root
    assert set(clean(root).removable.values()) == {"parts of killed attempts"}
    assert take_stock(root).removable_bytes == 0
    clean(root, with_work=True)
    assert listing(root) == {}
    again = plan_curation("traps", config, store)
    assert (again.decision, len(again.partitions)) == ("RUN", 3)
    run(again)


@pytest.mark.parametrize("deletes", range(0, 9, 2))
def test_a_cleaning_killed_anywhere_is_ended_by_the_next(
    trap_world: Any, tmp_path: Path, deletes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plan_curation("traps", trap_world.config(), tmp_path.as_uri())
    first = run(plan)
    root = plan.build.dataset_root
    second = derived(Drop(root, first))
    litter(root, plan.build)
    delete, left = storage.delete, [deletes]

    def dying(uri: str) -> None:
        if left[0] == 0:
            raise Crash
        left[0] -= 1
        delete(uri)

    with monkeypatch.context() as patch:
        patch.setattr(storage, "delete", dying)
        patch.setattr("pipelines.clean._DELETE_THREADS", 1)
        with pytest.raises(Crash):
            clean(root, needed={second.version})
    assert verify_dataset(storage.join(root, second.version, "manifest.json")) == []
    clean(root, needed={second.version})
    assert take_stock(root, needed={second.version}).removable == {}
    assert first.version not in {path.split("/")[0] for path in listing(root)}
    assert verify_dataset(storage.join(root, second.version, "manifest.json")) == []


def test_a_version_that_nobody_refers_to_goes_with_what_it_alone_lists(
    trap_world: Any, tmp_path: Path
) -> None:
    config, store = trap_world.config(), tmp_path.as_uri()
    plan = plan_curation("traps", config, store)
    first = run(plan)
    root = plan.build.dataset_root
    second = derived(Drop(root, first))
    stock = clean(root, needed={second.version})
    assert stock.going == [first.version]
    assert {shard.path for shard in first.shards} <= set(stock.removable)
    assert verify_dataset(storage.join(root, second.version, "manifest.json")) == []
    again = plan_curation("traps", config, store)
    assert (again.decision, again.version) == ("RUN", None)
    clean(root, needed=set())
    assert listing(root) == {}


def test_what_a_version_was_made_from_is_needed_too() -> None:
    def made(*parents: tuple[str, str]) -> DatasetManifest:
        listed = [{"dataset": name, "version": version} for name, version in parents]
        return DatasetManifest("x", "", [], [], {}, parents=[*listed, {"sha256": "no version"}])

    manifests = {
        ("a", "1"): made(), ("a", "2"): made(("a", "1")), ("a", "3"): made(("a", "1")),
        ("b", "4"): made(("a", "2"), ("gone", "9")), ("b", "5"): made(),
    }  # fmt: skip
    assert with_parents([("b", "4"), ("b", "unknown")], manifests) == {
        "a": {"1", "2"}, "b": {"4"}
    }  # fmt: skip


def test_nothing_is_removed_while_a_driver_is_at_work(trap_world: Any, tmp_path: Path) -> None:
    plan = plan_curation("traps", trap_world.config(), tmp_path.as_uri())
    manifest = run(plan)
    root = plan.build.dataset_root
    litter(root, plan.build)
    before = listing(root)
    holder = _holder(plan.build.lease_uri)
    assert _line(holder) == "attempt 1"
    with pytest.raises(LeaseHeld, match="child"):
        clean(root)
    assert listing(root) == before
    assert _end(holder) == "held"
    assert clean(root).removable_bytes > 0
    assert load_manifest(storage.join(root, manifest.version, "manifest.json"))


def test_a_driver_does_not_begin_while_files_are_removed(trap_world: Any, tmp_path: Path) -> None:
    config, store = trap_world.config(), tmp_path.as_uri()
    plan = plan_curation("traps", config, store)
    holder = _holder(exclusive_lease_uri(plan.build.dataset_root))
    assert _line(holder) == "attempt 1"
    with pytest.raises(LeaseHeld, match="child"):
        curate("traps", config, store, no_spark)
    with pytest.raises(LeaseHeld, match="child"):
        clean(plan.build.dataset_root)
    _end(holder)
    # One and the same process may do both: a takedown derives.
    with nobody_else(plan.build.dataset_root, "here"), pytest.raises(AssertionError, match="Spark"):
        curate("traps", config, store, no_spark)


def test_a_lease_that_the_dead_left_is_taken(trap_world: Any, tmp_path: Path) -> None:
    plan = plan_curation("traps", trap_world.config(), tmp_path.as_uri())
    run(plan)
    own = storage.join(plan.build.dataset_root, "work", "takedown-0123", "lease.json")
    for uri in (plan.build.lease_uri, own):
        holder = _holder(uri)
        assert _line(holder) == "attempt 1"
        holder.kill()
        holder.communicate()
    with nobody_else(plan.build.dataset_root, "cleaning"), Lease(own, "takedown"):
        frozen = storage.read_json(plan.build.lease_uri)
        assert (frozen["owner"], frozen["attempt"]) == ("cleaning", 2)
    with Lease(plan.build.lease_uri, "next") as lease:
        assert lease.attempt == 3
