"""A second look at what failed, after whatever happened to the version and its working files."""

from __future__ import annotations

import io
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import polars as pl
import pytest
from PIL import Image

from infra import storage
from infra.digests import sha256_bytes
from infra.manifest import DatasetManifest, load_manifest, verify_dataset
from infra.progress import progress
from infra.sessions import ClusterConfig, spark_session, stop_spark
from pipelines.build import PartMarker
from pipelines.clean import clean
from pipelines.curate import CurationResult, curate
from pipelines.inputs import units_of
from pipelines.plan import CurationPlan, follows, plan_curation
from pipelines.repair import repair
from pipelines.restore import restore_empty, restore_ends, restore_rows
from pipelines.retry_images import retry_images
from pipelines.shards import read_shard
from pipelines.takedown import Takedown, take_down
from pipelines.tombstones import Tombstones
from pipelines.write_shards import staged_images
from tests.pipelines.test_build import Crash, crash_after, heal, ledger, retry, run, samples, spread
from tests.pipelines.test_rejected import no_spark

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

PASSED = {"/w/2", "/w/7", "/w/8"}  # what ``heal`` heals, and what never came


@pytest.fixture(scope="module")
def spark(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[], SparkSession]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ATELIER_HOME", str(tmp_path_factory.mktemp("home")))
        session = spark_session("retry", ClusterConfig(), {})
        yield lambda: session
        stop_spark(session)


class Traps:
    """The trap world, curated once in this process; what failed in passing works since."""

    def __init__(
        self, world: Any, folder: Path, heal_it: Callable[[], None], **changes: Any
    ) -> None:
        self.world, self.store_uri = world, folder.as_uri()
        self.config = world.config(**changes)
        plan = plan_curation("traps", self.config, self.store_uri)
        self.build, self.first = plan.build, run(plan)
        self.root = plan.build.dataset_root
        heal_it()
        world.web.requests.clear()

    @property
    def plan(self) -> CurationPlan:
        return plan_curation("traps", self.config, self.store_uri)

    def uri(self, version: str) -> str:
        return storage.join(self.root, version, "manifest.json")

    @property
    def asked(self) -> set[str]:
        """The images asked for since everything works."""
        paths = {head.split(" ")[1] for head in self.world.web.requests}
        return {path for path in paths if path.endswith(".jpg") or "/w/" in path}

    def retried(self, spark: Callable[[], SparkSession]) -> CurationResult:
        return curate("traps", self.config, self.store_uri, spark, retry_failed=True)

    def ends(self, manifest: DatasetManifest) -> dict[str, str | None]:
        rows = ledger(self.build, manifest)
        return dict(rows.select("url", "reason").iter_rows())


@pytest.fixture
def traps(
    trap_world: Any, tmp_path: Path, http_response: Any, encode: Any, make_picture: Any
) -> Traps:
    def heal_it() -> None:
        heal(trap_world, http_response, encode, make_picture)

    return Traps(trap_world, tmp_path / "store", heal_it)


def restore(plan: CurationPlan, manifest: DatasetManifest) -> None:
    """What ``engine.restore`` does with Spark, in one thread."""
    build, units = plan.build, units_of(plan.inputs)
    build.forget_markers()
    for index in reversed(range(len(manifest.ledger))):
        restore_ends(build, manifest, units, index)
    restore_empty(build, manifest, units)
    every = range(build.num_partitions)
    for partition, batches in spread(build, units, every).items():
        restore_rows(build, partition, batches)


def compared(plan: CurationPlan) -> pl.DataFrame:
    """What images are compared by, of all partitions."""
    every = range(plan.build.num_partitions)
    return pl.concat(staged_images(plan.build, n, n) for n in every).sort("rank")


def test_working_files_made_again_are_what_a_retry_needs(
    trap_world: Any, tmp_path: Path, http_response: Any, encode: Any, make_picture: Any
) -> None:
    """Without them a retry comes to the version that it comes to with them."""
    config = trap_world.config(duplicates={"perceptual": {}})
    store_uri = (tmp_path / "store").as_uri()
    plan = plan_curation("traps", config, store_uri)
    first = run(plan)
    units = units_of(plan.inputs)
    assert follows(plan.build, first, units)
    before = compared(plan)
    assert before["signature"].null_count() == 0
    heal(trap_world, http_response, encode, make_picture)
    shutil.copytree(tmp_path / "store", tmp_path / "pristine")
    retry(plan.build)
    expected = run(plan_curation("traps", config, store_uri))
    assert expected.counts["committed"] == first.counts["committed"] + 1

    shutil.rmtree(tmp_path / "store")
    shutil.copytree(tmp_path / "pristine", tmp_path / "store")
    clean(plan.build.dataset_root, with_work=True)
    assert not follows(plan.build, first, units)
    trap_world.web.requests.clear()
    with pytest.MonkeyPatch.context() as patch:
        count = crash_after(patch, 10**9)
        restore(plan, first)
        num_writes = count()
    for number in range(0, num_writes, 4):  # killed, it is begun again
        with pytest.MonkeyPatch.context() as patch:
            crash_after(patch, number)
            with pytest.raises(Crash):
                restore(plan, first)
        assert number == 0 or not follows(plan.build, first, units)
    restore(plan, first)
    assert follows(plan.build, first, units)
    after = compared(plan)
    assert after.drop("signature").equals(before.drop("signature"))
    # Of a copy that stayed out nothing is stored; the one that stayed has the signature.
    signed = after.filter(pl.col("signature").is_not_null())
    assert signed.equals(before.filter(pl.col("rank").is_in(signed["rank"].implode())))
    assert signed.height == first.counts["committed"]
    assert not trap_world.web.requests
    retry(plan.build)
    assert run(plan_curation("traps", config, store_uri)).to_bytes() == expected.to_bytes()


def test_sizes_that_wait_for_other_rows_still_ask_once(
    trap_world: Any, http_response: Any, encode: Any, make_picture: Any, tmp_path: Path
) -> None:
    """One size was retried alone before, when one image had come back: two rows wait in it."""

    def heal_it() -> None:
        heal(trap_world, http_response, encode, make_picture)

    traps = Traps(trap_world, tmp_path / "store", heal_it, partitions=1)
    resize = traps.config.resize.model_copy(update={"image_size_px": 48})
    other = traps.config.model_copy(update={"resize": resize})
    healed = dict(traps.world.web.routes)
    for path in PASSED:
        traps.world.web.route(path, http_response(b"", status="503 x"))
    plan = plan_curation("small", other, traps.store_uri)
    run(plan)
    traps.world.web.routes["/w/2"] = healed["/w/2"]
    retry(traps.build)
    run(traps.plan)
    traps.world.web.routes |= healed
    traps.world.web.requests.clear()

    number, their = traps.build.begin_round(), plan.build.begin_round()
    for _ in range(2):  # the second time there is nothing to do
        retry_images(traps.build, 0, number, [(plan.build, their)])
    asked = [head.split(" ")[1] for head in traps.world.web.requests]
    assert {path: asked.count(path) for path in asked} == dict.fromkeys(PASSED, 1)
    ends = traps.ends(run(traps.plan))
    small = run(plan_curation("small", other, traps.store_uri))
    assert dict(ledger(plan.build, small).select("url", "reason").iter_rows()) == ends
    assert ends["http://evil.example/w/2"] is None
    assert {Image.open(io.BytesIO(members["jpg"])).size
            for members in samples(plan.build, small).values()} == {(48, 48)}  # fmt: skip


@pytest.mark.slow
def test_after_a_cleaning_what_failed_is_asked_for_and_nothing_else(
    traps: Traps, spark: Callable[[], SparkSession]
) -> None:
    clean(traps.root, with_work=True)
    result = traps.retried(spark)
    assert traps.asked == PASSED
    assert verify_dataset(result.manifest_uri) == []
    assert result.counts["committed"] == traps.first.counts["committed"] + 1
    again = traps.retried(no_spark)  # what fails now fails for good
    assert (again.decision, again.version) == ("SKIP", result.version)


@pytest.mark.slow
@pytest.mark.parametrize("covers", ["nothing", "a committed row", "a row that failed"])
def test_after_a_takedown_what_failed_is_asked_for_and_nothing_else(
    covers: str, traps: Traps, spark: Callable[[], SparkSession]
) -> None:
    url = {
        "nothing": "http://nobody.example/",
        "a committed row": "http://evil.example/good/3.jpg",
        "a row that failed": "http://evil.example/w/2",
    }[covers]
    wanted = Takedown((traps.root,), Tombstones.of([url]))
    (done,), _ = take_down(wanted, spark, progress)
    assert bool(done.versions) == (covers != "nothing")
    before = load_manifest(traps.uri(str(traps.plan.version)))
    result = traps.retried(spark)
    assert traps.asked == PASSED - {url.removeprefix("http://evil.example")}
    assert verify_dataset(result.manifest_uri) == []
    manifest = load_manifest(result.manifest_uri)
    came = 0 if covers == "a row that failed" else 1
    assert manifest.counts["committed"] == before.counts["committed"] + came
    assert manifest.counts["rows_in"] == before.counts["rows_in"]
    assert manifest.attributes.get("derivations") == before.attributes.get("derivations")
    assert {shard.path for shard in before.shards} <= {shard.path for shard in manifest.shards}
    ends = traps.ends(manifest)
    assert url not in ends
    assert ends["http://evil.example/w/7"] == "duplicate_image"
    assert ends["http://evil.example/w/8"] == "http_404"
    assert traps.plan.version == result.version


@pytest.mark.slow
@pytest.mark.parametrize("is_under_way", [False, True])
def test_after_a_repair_a_retry_goes_on_from_what_was_repaired(
    is_under_way: bool, traps: Traps, spark: Callable[[], SparkSession], http_response: Any
) -> None:
    """An image lost a pixel and is not on the web any more: the damaged shard stays out."""
    shard = max(traps.first.shards, key=lambda each: each.num_samples)
    shard_uri = storage.join(traps.root, shard.path)
    data = bytearray(storage.read_bytes(shard_uri))
    key, members = next(iter(read_shard(bytes(data))))
    place = bytes(data).index(members["jpg"]) + len(members["jpg"]) // 2
    data[place] ^= 1
    url = dict(ledger(traps.build, traps.first).select("sample_id", "url").iter_rows())[key]
    traps.world.web.route(url.removeprefix("http://evil.example"), http_response(b"", status="404"))
    if is_under_way:  # the retry was killed after its fetch
        retry(traps.build)
        traps.world.web.requests.clear()
    storage.write_bytes(shard_uri, bytes(data))
    fetch = traps.config.fetch
    repaired = repair(traps.uri(traps.first.version), spark, progress, fetch=fetch)
    assert repaired.version != traps.first.version
    before = load_manifest(repaired.manifest_uri)
    assert shard.path not in {each.path for each in before.shards}

    # Where that has to be made again, what was damaged before does not count as made.
    ledger_uri = storage.join(traps.root, before.ledger[0].path)
    whole = storage.read_bytes(ledger_uri)
    storage.write_bytes(ledger_uri, b"no ledger")
    plan = traps.plan
    assert plan.retried is None
    stale = [n for n in range(3) if shard in _part(plan, n).shards]
    assert stale
    assert set(stale) <= set(plan.partitions)
    storage.write_bytes(ledger_uri, whole)

    traps.world.web.requests.clear()
    if is_under_way:
        result = curate("traps", traps.config, traps.store_uri, spark)
    else:
        result = traps.retried(spark)
    assert traps.asked == PASSED
    assert verify_dataset(result.manifest_uri) == []
    manifest = load_manifest(result.manifest_uri)
    assert manifest.counts["committed"] == before.counts["committed"] + 1
    assert manifest.attributes["derivations"] == before.attributes["derivations"]
    assert {each.path for each in before.shards} < {each.path for each in manifest.shards}
    assert sha256_bytes(storage.read_bytes(shard_uri)) != shard.sha256
    after = curate("traps", traps.config, traps.store_uri, no_spark)
    assert (after.decision, after.version) == ("SKIP", result.version)


def _part(plan: CurationPlan, partition: int) -> PartMarker:
    found = plan.build.read(PartMarker, partition)
    assert found is not None
    return found
