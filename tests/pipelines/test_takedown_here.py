"""Takedowns in this process: whose bytes go, where they stay out, and what looking costs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from infra import storage
from infra.digests import canonical_json, sha256_bytes
from infra.errors import UserError
from infra.manifest import DatasetManifest, verify_dataset
from infra.progress import progress
from pipelines.duplicates import LIKE, NEAR_DUPLICATE
from pipelines.plan import plan_curation, refuse_new_tombstones
from pipelines.repair import repair
from pipelines.stored import live_versions
from pipelines.takedown import Sample, Takedown, TakedownResult, take_down
from pipelines.tombstones import Tombstones, digest_of
from tests.pipelines.conftest import encoded, picture, response
from tests.pipelines.test_build import ledger, run
from tests.pipelines.test_rejected import Drop, derived

HOST = "http://evil.example"


@pytest.fixture(autouse=True)
def units_run_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """What Spark does with independent units, in one thread."""

    def run_here(_: Any, workspace: Any, num_units: int, work: Callable[[int], None]) -> None:
        for number in range(num_units):
            work(number)

    for name in ("takedown", "derive", "repair", "ledger_counts"):
        monkeypatch.setattr(f"pipelines.{name}.run_units", run_here)


def no_session() -> Any:
    return None


def down(takedown: Takedown) -> tuple[list[TakedownResult], Tombstones]:
    return take_down(takedown, no_session, progress)


class Store:
    """Datasets of one trap world, curated in this process."""

    def __init__(self, world: Any, folder: Path) -> None:
        self.world, self.uri = world, folder.as_uri()

    def root(self, name: str) -> str:
        return f"{self.uri}/datasets/{name}"

    def curate(self, name: str, **changes: Any) -> pl.DataFrame:
        """The ledger of a newly curated dataset."""
        self.world.web.requests.clear()
        plan = plan_curation(name, self.world.config(**changes), self.uri)
        return ledger(plan.build, run(plan))

    def version(self, name: str) -> DatasetManifest:
        (manifest,) = live_versions(self.root(name))
        assert verify_dataset(f"{self.root(name)}/{manifest.version}/manifest.json") == []
        return manifest

    def ends(self, name: str, url: str) -> set[str]:
        plan = plan_curation(name, self.world.config(), self.uri)
        rows = ledger(plan.build, self.version(name))
        gone = f"removed:{digest_of(url)}"
        found = rows.filter(pl.col("url").is_in([url, gone]))
        return {row["reason"] or row["disposition"] for row in found.iter_rows(named=True)}

    @property
    def asked(self) -> set[str]:
        return {request.split(" ")[1] for request in self.world.web.requests}


@pytest.fixture
def store(trap_world: Any, tmp_path: Path) -> Store:
    return Store(trap_world, tmp_path / "store")


def twin(letter: str) -> str:
    return f"{HOST}/twin/{letter}.jpg"


def test_the_bytes_of_what_is_named_go_from_everywhere_and_stay_out(store: Store) -> None:
    # Of seven addresses with the same bytes one is committed, the others are its copies.
    store.curate("one")
    store.curate("two")
    kept = Tombstones.of([f"{HOST}/nothing.jpg"])
    named = Tombstones.of([twin("b")])
    order = Takedown((store.root("one"),), named | kept, store.uri)  # "two" came meanwhile
    done, kept_out = down(order)
    assert [each.dataset for each in done] == ["one", "two"]
    for each in done:
        assert (each.num_samples, each.num_rows, len(each.versions)) == (1, 7, 1)
        assert [sample.url for sample in each.copies] == [twin("a")]
        assert (
            store.ends(each.dataset, twin("a"))
            == store.ends(each.dataset, twin("b"))
            == {"takedown"}
        )
    assert len(kept_out.images) == 1
    assert down(order)[0][0].versions == {}

    # A dataset of later: not asked for, and the bytes stay out, whoever brings them.
    store.world.rows.append(store.world.rows[5] | {"URL": f"{HOST}/late.jpg", "TEXT": "late"})
    store.world.web.route("/late.jpg", response(encoded(picture(10_000))))
    store.world.write()
    store.curate("three")
    assert "/late.jpg" in store.asked
    assert "/twin/b.jpg" not in store.asked
    assert store.ends("three", f"{HOST}/late.jpg") == {"takedown"}
    assert store.ends("three", f"{HOST}/good/4.jpg") == {"committed"}


def test_copies_stay_when_asked_to_and_are_named(store: Store) -> None:
    store.curate("one")
    order = Takedown((store.root("one"),), Tombstones.of([twin("b")]), store.uri, with_copies=False)
    (done,), kept_out = down(order)
    assert (done.num_samples, done.num_rows) == (0, 1)
    assert [sample.url for sample in done.copies] == [twin("a")]
    assert kept_out.images == frozenset()
    assert store.ends("one", twin("a")) == {"committed"}
    assert store.ends("one", twin("b")) == {"takedown"}


def test_a_takedown_of_one_dataset_is_no_other_ones(store: Store) -> None:
    store.curate("one")
    down(Takedown((store.root("one"),), Tombstones.of([f"{HOST}/good/4.jpg"])))
    assert store.ends("one", f"{HOST}/good/4.jpg") == {"takedown"}
    store.curate("two")
    assert store.ends("two", f"{HOST}/good/4.jpg") == {"committed"}


def test_a_takedown_of_an_earlier_version_is_widened_by_the_same_request(store: Store) -> None:
    """Those left the address alone, in the dataset's folder, and a ledger with its digest."""
    store.curate("one")
    old = {"urls": [digest_of(twin("b"))], "domains": [], "images": [], "samples": [],
           "schema_version": 1}  # fmt: skip
    data = canonical_json(old)
    uri = f"{store.root('one')}/tombstones/{sha256_bytes(data)[:32]}.json"
    storage.write_bytes(uri, data)
    down(Takedown((store.root("one"),), Tombstones(), with_copies=False))
    assert store.ends("one", twin("a")) == {"committed"}
    (done,), _ = down(Takedown((store.root("one"),), Tombstones.of([twin("b")]), store.uri))
    assert done.num_samples == 1
    assert store.ends("one", twin("a")) == {"takedown"}


def test_what_merely_looks_like_it_is_named_and_stays(store: Store) -> None:
    store.curate("one")
    root = store.root("one")
    (first,) = live_versions(root)
    ids = pl.concat(
        pl.read_parquet(storage.read_bytes(f"{root}/{each.path}")) for each in first.ledger
    ).filter(pl.col("disposition") == "committed").sort("sample_id")  # fmt: skip
    survivor, near = ids.row(0, named=True), ids.row(1, named=True)

    class Nearly(Drop):
        def decide(self, index: int, folder: Path) -> pl.DataFrame:
            here = [near["sample_id"]] if first.shards[index].path == near["shard"] else []
            rows = {"sample_id": here, "reason": [NEAR_DUPLICATE] * len(here),
                    "detail": [LIKE + survivor["sample_id"]] * len(here)}  # fmt: skip
            return pl.DataFrame(rows, schema=dict.fromkeys(rows, pl.String))

    second = derived(Nearly(root, first))
    storage.delete_prefix(f"{root}/{first.version}")
    (done,), _ = down(Takedown((root,), Tombstones.of([near["url"]]), store.uri))
    assert (done.num_samples, done.num_rows, list(done.versions)) == (0, 1, [second.version])
    assert done.alike == (Sample(survivor["sample_id"], survivor["url"]),)
    assert done.copies == ()


def test_a_curation_planned_before_a_takedown_is_refused(store: Store) -> None:
    plan = plan_curation("one", store.world.config(), store.uri)
    refuse_new_tombstones(plan.build)
    down(Takedown((), Tombstones.of([twin("b")]), store.uri))
    with pytest.raises(UserError, match="run the same command again"):
        refuse_new_tombstones(plan.build)
    refuse_new_tombstones(plan_curation("one", store.world.config(), store.uri).build)


class Reads:
    """What is read from storage; not leases, which are read by the clock."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.uris: list[str] = []
        read = storage.read_bytes

        def counted(uri: str, sha256: str | None = None) -> bytes:
            self.uris += [] if uri.endswith("lease.json") else [uri]
            return read(uri, sha256)

        monkeypatch.setattr(storage, "read_bytes", counted)


@pytest.mark.parametrize("num_partitions", [6, 30])
def test_a_takedown_reads_ledgers_once_or_twice_and_affected_shards_alone(
    store: Store, monkeypatch: pytest.MonkeyPatch, num_partitions: int
) -> None:
    store.curate("one", partitions=num_partitions, shards={"max_samples": 1})
    manifest = store.version("one")
    num_ledgers, num_shards = len(manifest.ledger), len(manifest.shards)
    assert num_shards > 30
    reads = Reads(monkeypatch)
    (done,), _ = down(Takedown((store.root("one"),), Tombstones.of([twin("b")]), store.uri))
    assert done.num_samples == 1
    # Each ledger file in three passes, and its notes; a report shows samples of up to 48 shards.
    assert len(reads.uris) <= 14 * (num_ledgers + 1) + 100
    shards = [uri for uri in reads.uris if uri.endswith(".tar")]
    assert len(shards) <= 1 + 48
    notes = [uri for uri in reads.uris if "/work/takedown-" in uri]
    assert max(map(notes.count, set(notes))) <= num_ledgers + 6


@pytest.mark.parametrize("num_partitions", [6, 30])
def test_a_repair_reads_each_note_for_all_shards_at_once(
    store: Store, monkeypatch: pytest.MonkeyPatch, num_partitions: int
) -> None:
    config = store.world.config(partitions=num_partitions, shards={"max_samples": 1})
    store.curate("one", partitions=num_partitions, shards={"max_samples": 1})
    manifest = store.version("one")
    root = store.root("one")
    uri = f"{root}/{manifest.version}/manifest.json"
    num_shards = len(manifest.shards)
    damaged = manifest.shards[: num_shards // 2]
    for shard in damaged:
        storage.write_bytes(f"{root}/{shard.path}", b"torn")
    reads = Reads(monkeypatch)
    result = repair(uri, no_session, progress, fetch=config.fetch)
    assert sorted(result.restored) == sorted(shard.path for shard in damaged)
    assert len(reads.uris) <= 4 * (len(manifest.ledger) + num_partitions + num_shards)
    notes = [each for each in reads.uris if "/work/repair-" in each or "/part-" in each]
    assert max(map(notes.count, set(notes))) <= 3
