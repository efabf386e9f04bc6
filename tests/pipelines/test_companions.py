"""Several sizes from one fetch: each dataset as if it were alone, and every URL asked for once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from infra import storage
from infra.manifest import DatasetManifest, load_manifest
from infra.sessions import ClusterConfig, spark_session, stop_spark
from pipelines.clean import clean
from pipelines.companions import companions_of
from pipelines.config import CurationConfig
from pipelines.curate import curate, plan_curation
from tests.pipelines.test_build import heal

if TYPE_CHECKING:
    from pyspark.sql import SparkSession


# How other images of the small size end where it is wanted.
_ALSO_SMALL = ("image_too_small", "duplicate_image", "decode")


def sized(config: CurationConfig, image_size_px: int) -> CurationConfig:
    resize = config.resize.model_copy(
        update={"image_size_px": image_size_px, "if_smaller": "reject"}
    )
    return config.model_copy(update={"resize": resize})


@pytest.fixture
def spark() -> Iterator[Callable[[], SparkSession]]:
    sessions: list[SparkSession] = []

    def start() -> SparkSession:
        if not sessions:
            sessions.append(spark_session("companions", ClusterConfig(), {}))
        return sessions[0]

    yield start
    for session in sessions:
        stop_spark(session)


def no_spark() -> SparkSession:
    raise AssertionError("Spark was started for a finished dataset")


def gets(trap_world: Any) -> Counter[str]:
    """Requests per path, without those for a site's rules; then forgotten."""
    paths = [head.split(" ")[1] for head in trap_world.web.requests]
    trap_world.web.requests.clear()
    return Counter(path for path in paths if "robots" not in path and "tdmrep" not in path)


def contents(manifest: DatasetManifest) -> tuple[Any, ...]:
    """All but the name."""
    return (manifest.shards, manifest.ledger, manifest.counts, manifest.rejected, manifest.failed,
            manifest.attributes, manifest.parents)  # fmt: skip


def test_only_what_is_stored_may_differ(trap_world: Any) -> None:
    config = trap_world.config()
    datasets = {
        "a": config,
        "larger": sized(config, 128),
        "webp": config.model_copy(update={"shards": config.shards.model_copy(
            update={"max_samples": 3})}),
        "filtered": trap_world.config(filters={"min_width_px": 1}),
        "elsewhere": config.model_copy(update={"metadata": ["other"]}),
    }  # fmt: skip
    assert set(companions_of("a", datasets)) == {"larger", "webp"}


@pytest.mark.slow
def test_each_size_is_what_it_would_be_alone(
    trap_world: Any, spark: Callable[[], SparkSession], tmp_path: Path
) -> None:
    config = trap_world.config()
    datasets = {"photos": config}
    datasets |= {f"photos-{size_px}": sized(config, size_px) for size_px in (128, 256, 300)}
    alone = {}
    for name, each in datasets.items():
        uri = curate(name, each, (tmp_path / "alone").as_uri(), spark).manifest_uri
        alone[name] = load_manifest(uri)
        once = gets(trap_world)
    store = (tmp_path / "together").as_uri()
    first = curate("photos", config, store, spark, others=datasets)
    together = gets(trap_world)
    assert together == once
    for name, each in datasets.items():
        if name != "photos":
            plan = plan_curation(name, each, store)
            assert (plan.decision, plan.units, plan.partitions) == ("RESUME", (), ())
            assert "3 of 3 partitions are fetched" in plan.reason
        uri = curate(name, each, store, spark, others=datasets).manifest_uri
        assert load_manifest(uri) == alone[name]
        assert not gets(trap_world)
    assert curate("photos", config, store, no_spark).version == first.version
    small = alone["photos-300"]
    assert small.counts["committed"] == 0
    assert small.rejected["image_too_small"] > 30
    assert small.rejected["image_too_small"] == (
        alone["photos"].counts["committed"]
        + sum(alone["photos"].rejected[each] for each in _ALSO_SMALL)
    )
    assert alone["photos-256"].counts == alone["photos"].counts


@pytest.mark.slow
def test_killed_between_two_sizes_all_converge(
    trap_world: Any, spark: Callable[[], SparkSession], tmp_path: Path
) -> None:
    """One partition is staged for one size and not for the other, and another for neither."""
    config = trap_world.config()
    datasets = {"photos": config, "photos-128": sized(config, 128)}
    store = tmp_path.as_uri()
    whole = {
        name: load_manifest(uri)
        for name, each in datasets.items()
        for uri in [curate(name, each, f"{store}/whole", spark, others=datasets).manifest_uri]
    }
    broken = f"{store}/broken"
    for name, each in datasets.items():
        curate(name, each, broken, spark, others=datasets)
        build = plan_curation(name, each, broken).build
        lost = ["staged-00001", "part-00001", "staged-00002", "part-00002"]
        lost = lost[:2] if name == "photos" else lost
        for marker in [*lost, "result"]:
            storage.delete(storage.join(build.folder, f"{marker}.json"))
    gets(trap_world)
    for name, each in datasets.items():
        assert plan_curation(name, each, broken).decision == "RESUME"
        uri = curate(name, each, broken, spark, others=datasets).manifest_uri
        assert load_manifest(uri) == whole[name]


@pytest.mark.slow
def test_a_retry_asks_once_for_all_sizes(
    trap_world: Any,
    spark: Callable[[], SparkSession],
    tmp_path: Path,
    http_response: Any,
    encode: Any,
    make_picture: Any,
) -> None:
    config = trap_world.config()
    datasets = {"photos": config, "photos-128": sized(config, 128)}
    alone, store = (tmp_path / "alone").as_uri(), (tmp_path / "together").as_uri()
    for name, each in datasets.items():
        curate(name, each, alone, spark)
        curate(name, each, store, spark, others=datasets)
    # One size has lost its working files.
    clean(plan_curation("photos-128", datasets["photos-128"], store).build.dataset_root,
          with_work=True)  # fmt: skip
    heal(trap_world, http_response, encode, make_picture)
    expected = {
        name: curate(name, each, alone, spark, retry_failed=True).version
        for name, each in datasets.items()
    }
    gets(trap_world)
    first = curate("photos", config, store, spark, retry_failed=True, others=datasets)
    assert gets(trap_world) == {"/w/2": 1, "/w/7": 1, "/w/8": 1}
    assert first.version == expected["photos"]
    second = curate("photos-128", datasets["photos-128"], store, spark, retry_failed=True)
    assert not gets(trap_world)
    assert second.version == expected["photos-128"]
    for name, each in datasets.items():
        again = curate(name, each, store, no_spark, retry_failed=True)
        assert (again.decision, again.version) == ("SKIP", expected[name])
