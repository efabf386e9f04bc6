"""A whole build from tars, beside rows of the web that would like to name what lies in them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from infra import storage
from infra.errors import UserError
from infra.manifest import load_manifest, verify_dataset
from infra.progress import progress
from infra.sessions import ClusterConfig, spark_session, stop_spark
from pipelines.bodies import ListedBodies
from pipelines.config import CurationConfig, ResizeConfig
from pipelines.connection import Failed
from pipelines.curate import curate
from pipelines.estimate import estimate_curation
from pipelines.plan import plan_curation, refuse_changed_inputs
from pipelines.publish import assemble_manifest
from pipelines.repair import repair
from pipelines.tombstones import Tombstones
from tests.pipelines.conftest import EvilWeb, encoded, picture, response
from tests.pipelines.test_build import fetch, ledger, retry, run, samples
from tests.pipelines.test_rejected import no_spark
from tests.pipelines.test_tar_samples import Members, rows_of, sample, write_tar
from tests.pipelines.test_tar_samples import samples as tar_samples

NUM_GOOD = 12


@dataclass
class Inputs:
    """Two tars and a parquet file; ``ends``: how the row of a key or address must end."""

    tars: list[tuple[str, bytes]]
    parquet: Path
    ends: dict[str, str]
    web: EvilWeb

    def config(self, folder: str, **changes: Any) -> CurationConfig:
        for name, data in self.tars:
            storage.write_bytes(storage.join(folder, "set", name), data)
        known: dict[str, Any] = {
            "metadata": [storage.join(folder, "set", "*.tar"), str(self.parquet)],
            "partitions": 3,
            "filters": {"min_width_px": 64, "unknown": {"size": "later"}},
            "fetch": self.web.config(max_bytes=60_000),
            "resize": {"image_size_px": 32},
            "shards": {"max_samples": 7},
        }
        return CurationConfig.model_validate(known | changes)


@pytest.fixture
def inputs(evil_web: EvilWeb, tmp_path: Path) -> Inputs:
    good = tar_samples(NUM_GOOD)
    whole = encoded(picture(40))
    odd: Members = [
        *sample("mute")[:1], ("mute.json", b'{"text": "other"}'),
        *sample("torn")[:1], ("torn.json", b'{"prompt": '),
        ("blind.json", b'{"prompt": "an image is missing"}'),
        ("page.jpg", b"<html>"), ("page.json", b'{"prompt": "a page of text"}'),
        ("half.jpg", whole[: len(whole) // 2]), ("half.json", b'{"prompt": "half an image"}'),
        ("giant.png", b"\x89PNG" + bytes(70_000)), ("giant.json", b'{"prompt": "too much"}'),
        ("narrow.jpg", encoded(picture(41, 48, 48))), ("narrow.json", b'{"prompt": "small"}'),
    ]  # fmt: skip
    ends = {
        "mute": "no_caption", "torn": "no_caption", "blind": "url", "page": "format",
        "half": "decode", "giant": "too_big", "narrow": "too_small",
        **{f"{n:09d}": "committed" for n in range(NUM_GOOD)},
    }  # fmt: skip
    tars = [("a.tar", good[:NUM_GOOD]), ("b.tar", [*good[NUM_GOOD:], *odd])]
    written = [write_tar(tmp_path / "made" / "set" / name, each) for name, each in tars]
    inside = rows_of(CurationConfig(metadata=[str(written[0])]))["url"][0]
    evil_web.route("/web.jpg", response(encoded(picture(50))))
    webs = {
        "http://evil.example/web.jpg": "committed", inside: "scheme", f" {inside}": "scheme",
        inside.replace("tar:", "TAR:"): "scheme", written[0].as_uri(): "scheme",
        str(written[0]): "scheme",
    }  # fmt: skip
    table = pa.table({"URL": list(webs), "TEXT": [f"caption {n}" for n in range(len(webs))]})
    pq.write_table(table, tmp_path / "web.parquet")
    data = [(path.name, path.read_bytes()) for path in written]
    return Inputs(data, tmp_path / "web.parquet", ends | webs, evil_web)


@pytest.mark.parametrize("engine", ["atelier", "img2dataset"])
def test_every_row_of_a_tar_ends_where_it_should(
    inputs: Inputs, store_uri: str, engine: str
) -> None:
    changes: dict[str, Any] = {}
    if engine == "img2dataset":
        changes["resize"] = {"image_size_px": 32, "if_smaller": "reject"}
        changes["fetch"] = inputs.web.config(max_bytes=60_000, engine=engine)
    asked = inputs.config(f"{store_uri}/in", **changes)
    plan = plan_curation("mixed", asked, store_uri)
    manifest = run(plan)
    rows = ledger(plan.build, manifest)
    assert rows.height == len(inputs.ends) == manifest.counts["rows_in"]
    ended: dict[str, str] = {}
    for row in rows.iter_rows(named=True):
        is_inside = row["url"].startswith("tar://") and row["width_px"] is not None
        key = row["url"].rpartition("/")[2].partition("?")[0].partition(".")[0]
        name = key if is_inside or key in inputs.ends else row["url"]
        if row["reason"] == "scheme":
            name = row["url"]
        assert name not in ended
        ended[name] = row["reason"] or row["disposition"]
    assert ended == inputs.ends
    assert {head.split(" ")[1] for head in inputs.web.requests} == {"/web.jpg"}
    for members in samples(plan.build, manifest).values():
        known = json.loads(members["json"])
        assert known["original_height_px"] in (48, 256)
        assert known["caption"].startswith(("picture number", "caption 0"))
    again = plan_curation("mixed", asked, store_uri)
    assert again.decision == "SKIP"


def test_moved_and_reordered_tars_make_the_same_version(inputs: Inputs, tmp_path: Path) -> None:
    first = plan_curation("mixed", inputs.config((tmp_path / "1").as_uri()), f"file://{tmp_path}/x")
    inputs.tars.reverse()
    second = plan_curation(
        "mixed", inputs.config((tmp_path / "2").as_uri()), f"file://{tmp_path}/y"
    )
    assert first.build.tars != second.build.tars
    assert run(first).version == run(second, backwards=True).version


def test_what_storage_did_not_give_is_asked_for_again(
    inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = inputs.config((tmp_path / "in").as_uri())
    plan = plan_curation("mixed", asked, (tmp_path / "store").as_uri())
    fetch_inside = ListedBodies._inside

    def refuse(self: ListedBodies, url: str) -> bytes:
        if "/000000003." in url:
            raise Failed("storage", "no answer", retryable=True)
        return fetch_inside(self, url)

    with monkeypatch.context() as patch:
        patch.setattr(ListedBodies, "_inside", refuse)
        before = run(plan)
    assert before.failed == {"storage": 1, "too_big": 1}
    retry(plan.build)
    after = run(plan_curation("mixed", asked, (tmp_path / "store").as_uri()))
    assert after.failed == {"too_big": 1}
    assert after.counts["committed"] == before.counts["committed"] + 1


def test_a_tar_that_changes_while_it_is_fetched_publishes_nothing(
    inputs: Inputs, tmp_path: Path
) -> None:
    asked = inputs.config((tmp_path / "in").as_uri())
    plan = plan_curation("mixed", asked, (tmp_path / "store").as_uri())
    fetch(plan)
    refuse_changed_inputs(plan)
    write_tar(tmp_path / "in" / "set" / "a.tar", tar_samples(2))
    with pytest.raises(UserError, match=r"a\.tar as it was when the build began"):
        refuse_changed_inputs(plan)
    with pytest.raises(KeyError):  # nor are there shards to publish
        assemble_manifest("mixed", plan)


def test_a_lost_shard_is_made_again_from_the_tars(inputs: Inputs, tmp_path: Path) -> None:
    asked = inputs.config((tmp_path / "in").as_uri(), metadata=[f"{tmp_path}/in/set/*.tar"])
    store = (tmp_path / "store").as_uri()
    plan = plan_curation("mixed", asked, store)
    manifest = run(plan)
    uri = storage.join(plan.build.dataset_root, manifest.version, "manifest.json")
    shard = storage.join(plan.build.dataset_root, manifest.shards[0].path)
    data = storage.read_bytes(shard)
    storage.delete(shard)
    result = repair(uri, no_spark, progress)
    assert (result.version, result.lost) == (manifest.version, [])
    assert storage.read_bytes(shard) == data
    (tmp_path / "in").rename(tmp_path / "moved")
    moved = asked.model_copy(update={"metadata": [f"{tmp_path}/moved/set/*.tar"]})
    storage.delete(shard)
    tars = plan_curation("mixed", moved, store).build.tars
    assert repair(uri, no_spark, progress, tars=tars).version == manifest.version
    assert verify_dataset(uri) == []
    storage.delete(shard)
    with pytest.raises(AssertionError, match="Spark was asked for"):  # for a version without them
        repair(uri, no_spark, progress)


def test_an_estimate_of_tars_knows_of_no_rotten_links(inputs: Inputs, tmp_path: Path) -> None:
    asked = inputs.config((tmp_path / "in").as_uri(), metadata=[f"{tmp_path}/in/set/*.tar"])
    found = estimate_curation(asked, f"file://{tmp_path}/store/datasets/x")
    assert found.rows_in == NUM_GOOD + 7
    assert found.funnel["too_small"].rows == 1
    assert found.funnel["no_caption"].rows == 2
    assert any("no link rots" in note for note in found.notes)
    assert not any("link rot is not known" in note for note in found.notes)


def test_an_address_inside_a_tar_can_be_taken_down(inputs: Inputs, tmp_path: Path) -> None:
    asked = inputs.config((tmp_path / "in").as_uri(), metadata=[f"{tmp_path}/in/set/*.tar"])
    rows = rows_of(asked)
    assert Tombstones.of(urls=[rows["url"][1]]).covers(rows).to_list().count(True) == 1
    assert Tombstones.of(domains=["set"]).covers(rows).all()
    (tmp_path / "block.txt").write_text(f"{rows['url'][1]}\n")
    blocked = asked.model_copy(update={"block": [(tmp_path / "block.txt").as_uri()]})
    plan = plan_curation("mixed", blocked, (tmp_path / "store").as_uri())
    assert run(plan).rejected["takedown"] == 1


@pytest.mark.slow
def test_spark_curates_two_sizes_from_one_reading_of_the_tars(
    inputs: Inputs, s3_server: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ATELIER_HOME", str(tmp_path / "home"))
    folder = f"{s3_server.store_uri}/{tmp_path.name}"
    large = inputs.config(folder)
    small = large.model_copy(update={"resize": ResizeConfig(image_size_px=16, if_smaller="reject")})
    session = spark_session("tars", ClusterConfig(), {})
    try:
        made = curate(
            "large", large, folder, lambda: session, s3_server.environment, others={"small": small}
        )
    finally:
        stop_spark(session)
    assert made.counts["rows_in"] == len(inputs.ends)
    assert made.counts["committed"] == NUM_GOOD + 1
    plan = plan_curation("small", small, folder)
    assert plan.partitions == ()  # fetched with the others
    assert run(plan).counts == made.counts
    alone = plan_curation("large", large, f"{folder}/alone")
    assert load_manifest(made.manifest_uri).shards == run(alone).shards
