"""Pictures of what did not stay: few, the same whatever the order, and none that is taken down."""

from __future__ import annotations

import io
import json
import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import polars as pl
import pytest
from PIL import Image

from infra import storage
from infra.manifest import DatasetManifest
from pipelines import rejected
from pipelines.derive import LEDGER, SHARDS, Derivation, derive, run_unit
from pipelines.plan import plan_curation
from pipelines.rejected import Tray, forget_taken_down, read_pictures, rejected_pictures
from pipelines.report import write_report
from pipelines.shards import read_shard
from pipelines.thumbnails import SIDE_PX
from pipelines.tombstones import Tombstones, publish_tombstones
from tests.pipelines.test_build import run
from tests.pipelines.test_report import Page

if TYPE_CHECKING:
    from pyspark.sql import SparkSession


def no_spark() -> SparkSession:
    raise AssertionError("Spark was asked for")


def pictures_of(root: str, manifest: DatasetManifest) -> pl.DataFrame:
    return read_pictures([storage.join(root, manifest.version, "rejected.parquet")])


@pytest.mark.parametrize("seed", range(5))
def test_a_tray_keeps_the_smallest_ids_whatever_the_order(seed: int) -> None:
    draw = random.Random(seed)
    ids = [f"{number:032x}" for number in range(60)]
    draw.shuffle(ids)
    made: list[str] = []

    def make(sample_id: str) -> bytes | None:
        made.append(sample_id)
        return None if int(sample_id, 16) % 3 == 0 else b"jpeg"

    tray = Tray()
    for sample_id in ids:
        row = {"sample_id": sample_id, "url": None, "sha256": None, "text": " a\n b "}
        for reason in ("image_too_small", "format", "unsafe"):
            tray.offer(reason, row, partial(make, sample_id))
    frame = tray.frame()
    smallest = [sample_id for sample_id in sorted(ids) if int(sample_id, 16) % 3]
    assert frame["sample_id"].to_list() == smallest[: rejected.PER_PLACE]
    assert set(frame["reason"]) == {"image_too_small"}
    assert set(frame["text"]) == {"a b"}
    assert len(made) < len(ids)


def test_pictures_are_the_same_in_any_order_and_of_what_was_in_hand(
    trap_world: Any, tmp_path: Path, make_picture: Any, encode: Any, http_response: Any
) -> None:
    long = encode(make_picture(5, 640, 130))
    trap_world.web.route("/w/10", http_response(long))  # by its metadata, it fits
    roots = []
    for name, backwards in (("a", False), ("b", True)):
        plan = plan_curation("traps", trap_world.config(), (tmp_path / name).as_uri())
        manifest = run(plan, backwards)
        roots.append((plan.build.dataset_root, manifest))
    first, second = (pictures_of(*each) for each in roots)
    assert first.equals(second)
    found = first.group_by("reason").len().sort("reason").rows()
    assert found == [("duplicate_image", 6), ("image_aspect_ratio", 1), ("image_too_small", 1)]
    for jpeg in first["jpeg"]:
        with Image.open(io.BytesIO(jpeg)) as image:
            assert image.format == "JPEG"
            assert max(image.size) <= SIDE_PX
    small = first.row(by_predicate=pl.col("reason") == "image_too_small", named=True)
    assert small["text"].startswith("64 x 64: picture number")
    root, manifest = roots[0]
    uri = storage.join(root, manifest.version, "report.html")
    page = Page(storage.read_bytes(uri).decode())
    assert "image too small: smaller than asked for, once fetched" in page.text
    assert page.tags["img"] == min(manifest.counts["committed"], 48) + first.height


def test_no_more_than_a_few_partitions_keep_pictures(
    trap_world: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("rejected", "stage_images", "write_shards"):
        monkeypatch.setattr(f"pipelines.{name}.NUM_PLACES", 0)
    plan = plan_curation("traps", trap_world.config(), tmp_path.as_uri())
    manifest = run(plan)
    listed = [info.uri for info in storage.list_objects(plan.build.dataset_root)]
    assert not [uri for uri in listed if "pictures" in uri or "rejected" in uri]
    assert manifest.rejected["duplicate_image"] == 6


@dataclass(frozen=True)
class Drop(Derivation):
    """Rejects every second sample of a shard."""

    kind: ClassVar[str] = "drop"
    dataset_root: str
    manifest: DatasetManifest
    reason: str = "low_aesthetic_score"
    environment: Mapping[str, str] = field(default_factory=dict, repr=False)

    @property
    def key(self) -> str:
        return self.reason.encode().hex().ljust(64, "0")

    def decide(self, index: int, folder: Path) -> pl.DataFrame:
        data = storage.read_bytes(storage.join(self.dataset_root, self.manifest.shards[index].path))
        keys = [key for key, _ in read_shard(data)][::2]
        return pl.DataFrame({"sample_id": keys, "reason": [self.reason] * len(keys)})

    def choices(self) -> dict[str, Any]:
        return {"reason": self.reason}


def derived(job: Derivation) -> DatasetManifest:
    for kind, number in ((SHARDS, len(job.manifest.shards)), (LEDGER, len(job.manifest.ledger))):
        for index in range(number):
            run_unit(job, kind, index)
    return derive(job, no_spark).manifest


def test_a_derived_version_shows_what_left_it_and_what_had_left_before(
    trap_world: Any, tmp_path: Path
) -> None:
    plan = plan_curation("traps", trap_world.config(), tmp_path.as_uri())
    first = run(plan)
    root = plan.build.dataset_root
    second = derived(Drop(root, first))
    found = pictures_of(root, second)
    assert found.filter(pl.col("reason") != "low_aesthetic_score").equals(pictures_of(root, first))
    left = found.filter(pl.col("reason") == "low_aesthetic_score")
    assert left.height == min(second.rejected["low_aesthetic_score"] - 1, rejected.PER_REASON)
    assert left["sha256"].null_count() == 0
    third = derived(Drop(root, second, "takedown"))
    assert "takedown" not in set(pictures_of(root, third)["reason"])


def test_what_is_taken_down_is_not_shown(trap_world: Any, tmp_path: Path) -> None:
    plan = plan_curation("traps", trap_world.config(), tmp_path.as_uri())
    manifest = run(plan)
    root = plan.build.dataset_root
    before = pictures_of(root, manifest)
    small = before.row(by_predicate=pl.col("reason") == "image_too_small", named=True)
    assert len(rejected_pictures(root, manifest.version)) == 2

    unrelated = Tombstones.of(["http://nobody.example/"])
    assert forget_taken_down(root, manifest.version, unrelated)
    assert set(pictures_of(root, manifest)["reason"]) == {"image_too_small"}
    assert not forget_taken_down(root, manifest.version, unrelated)

    # By its digest: the ledger does not know it, for nothing was stored.
    publish_tombstones(root, Tombstones.of(images=[small["sha256"]]))
    assert rejected_pictures(root, manifest.version) == {}
    uri = storage.join(root, manifest.version, "manifest.json")
    assert "Some that did not" not in storage.read_bytes(write_report(uri, manifest)).decode()
    assert forget_taken_down(root, manifest.version, Tombstones.of(images=[small["sha256"]]))
    assert pictures_of(root, manifest).is_empty()

    # A later build of the same rows takes no picture of it.
    again = plan_curation("traps", trap_world.config(), tmp_path.as_uri())
    assert pictures_of(root, run(again)).is_empty()


def test_a_torn_file_of_pictures_costs_pictures_alone(trap_world: Any, tmp_path: Path) -> None:
    plan = plan_curation("traps", trap_world.config(), tmp_path.as_uri())
    manifest = run(plan)
    root = plan.build.dataset_root
    uri = storage.join(root, manifest.version, "rejected.parquet")
    storage.write_bytes(uri, storage.read_bytes(uri)[:100])
    page = storage.read_bytes(
        write_report(storage.join(root, manifest.version, "manifest.json"), manifest)
    )
    assert b"Some that did not" not in page
    assert json.loads(manifest.to_bytes())["name"] == "traps"
