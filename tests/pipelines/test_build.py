"""A whole build in this process, without Spark: accounting, determinism, and crashes anywhere."""

from __future__ import annotations

import hashlib
import io
import json
import shutil
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from infra import storage
from infra.errors import UserError
from infra.manifest import DatasetManifest, publish_manifest, verify_dataset
from pipelines.build import Build, PartMarker, ReadMarker, StagedMarker
from pipelines.card import card
from pipelines.decoder import Decoder
from pipelines.inputs import Unit
from pipelines.plan import CurationPlan, plan_curation
from pipelines.publish import assemble_manifest, funnel_of
from pipelines.read_rows import Slots, read_rows, seeds
from pipelines.rejected import of_build, publish_rejected
from pipelines.report import write_report
from pipelines.retry_images import retry_images
from pipelines.shards import read_shard
from pipelines.stage_images import stage_images
from pipelines.write_shards import staged_images, write_shards


def run(plan: CurationPlan, backwards: bool = False) -> DatasetManifest:
    """What ``engine`` does with Spark, in one thread; ``backwards`` runs every task list so."""
    build = plan.build
    fetch(plan, backwards)
    direction = -1 if backwards else 1
    if plan.parts:
        found = pl.concat(staged_images(build, n, n) for n in range(build.num_partitions))
        best = found.sort("rank").filter(pl.col("sha256").is_first_distinct())
        copies = found.join(best, on="rank", how="anti").select(
            "slot",
            pl.col("rank").str.split("-").list.last().alias("sample_id"),
            pl.lit("duplicate_image").alias("reason"),
            pl.lit(None, pl.String).alias("detail"),
        )
        for partition in plan.parts[::direction]:
            write_shards(build, partition, copies.filter(pl.col("slot") == partition).drop("slot"))
    manifest = assemble_manifest("traps", plan)
    manifest_uri = publish_manifest(build.dataset_root, manifest)
    publish_rejected(build.dataset_root, manifest, of_build(build))
    write_report(manifest_uri, manifest)
    build.finish(manifest.version)
    return manifest


def fetch(plan: CurationPlan, backwards: bool = False) -> None:
    """The first half: the plan's partitions are fetched and staged."""
    direction = -1 if backwards else 1
    at_slot = spread(plan.build, plan.units[::direction], plan.partitions)
    for slot, partition in list(enumerate(plan.partitions))[::direction]:
        stage_images(plan.build, partition, at_slot[slot][::direction])


def spread(
    build: Build, units: Sequence[Unit], partitions: Sequence[int]
) -> dict[int, list[pa.RecordBatch]]:
    """Place of a partition -> the rows of ``units`` that are its own."""
    slots = Slots(tuple(partitions), build.num_partitions)
    at_slot: dict[int, list[pa.RecordBatch]] = defaultdict(list)
    for unit in units:
        for batch in [seeds(slots), *read_rows(build, unit, slots)]:
            frame = pl.DataFrame(pl.from_arrow(batch))
            for (slot,), rows in frame.group_by("slot"):
                table = rows.to_arrow().cast(batch.schema)
                at_slot[int(str(slot))].extend(table.to_batches())
    return at_slot


def ledger(build: Build, manifest: DatasetManifest) -> pl.DataFrame:
    parts = [
        pl.read_parquet(storage.read_bytes(storage.join(build.dataset_root, entry.path)))
        for entry in manifest.ledger
    ]
    return pl.concat(parts)


def samples(build: Build, manifest: DatasetManifest) -> dict[str, dict[str, bytes]]:
    found: dict[str, dict[str, bytes]] = {}
    for shard in manifest.shards:
        members = list(read_shard(storage.read_bytes(
            storage.join(build.dataset_root, shard.path))))  # fmt: skip
        assert len(members) == shard.num_samples
        assert [key for key, _ in members] == sorted(key for key, _ in members)
        assert not found.keys() & {key for key, _ in members}
        found.update(members)
    return found


def test_every_row_ends_where_it_should(trap_world: Any, store_uri: str) -> None:
    plan = plan_curation("traps", trap_world.config(), store_uri)
    assert plan.decision == "RUN"
    manifest = run(plan)
    rows = ledger(plan.build, manifest)
    assert rows.height == len(trap_world.rows) == manifest.counts["rows_in"]
    for row in rows.iter_rows(named=True):
        ended = row["reason"] or row["disposition"]
        expected = trap_world.expected[row["url"] or "http://evil.example"]
        if ended not in ("duplicate_row", "duplicate_url"):
            assert ended == expected, row
        assert (row["shard"] is None) == (row["disposition"] != "committed")
        assert (row["retryable"] is True) <= (row["disposition"] == "failed")
    retryable = set(rows.filter(pl.col("retryable"))["reason"])
    assert retryable == {"http_500", "timeout", "short_body"}
    counts = Counter(rows["disposition"])
    assert manifest.counts == {"rows_in": rows.height, **counts}
    funnel = funnel_of(manifest)
    assert funnel["rows_in"] == sum(list(funnel.values())[1:])
    assert list(funnel)[:3] == ["rows_in", "no_url", "unknown_size"]
    assert list(funnel)[-1] == "committed"
    assert (funnel["duplicate_row"], funnel["duplicate_url"], funnel["duplicate_image"]) == (
        1,
        1,
        6,
    )


def test_img2dataset_as_the_engine_ends_the_same_rows_the_same_way(
    trap_world: Any, tmp_path: Path
) -> None:
    config = trap_world.config()
    asked = config.model_copy(
        update={
            "fetch": config.fetch.model_copy(update={"engine": "img2dataset"}),
            "resize": config.resize.model_copy(update={"if_smaller": "reject"}),
        }
    )
    plan = plan_curation("traps", asked, (tmp_path / "store").as_uri())
    rows = ledger(plan.build, run(plan))
    for row in rows.iter_rows(named=True):
        ended = row["reason"] or row["disposition"]
        if ended not in ("duplicate_row", "duplicate_url"):
            assert ended == trap_world.expected[row["url"] or "http://evil.example"], row


def test_samples_carry_everything_the_training_needs(trap_world: Any, tmp_path: Path) -> None:
    plan = plan_curation("traps", trap_world.config(), (tmp_path / "store").as_uri())
    manifest = run(plan)
    kept = ledger(plan.build, manifest).filter(pl.col("disposition") == "committed")
    rows = {row["sample_id"]: row for row in kept.iter_rows(named=True)}
    found = samples(plan.build, manifest)
    assert len(found) == manifest.counts["committed"]
    num_long = 0
    for key, members in found.items():
        known = json.loads(members["json"])
        assert set(members) == {"jpg", "json", "txt"}
        assert known["sample_id"] == key
        assert Image.open(io.BytesIO(members["jpg"])).size == (64, 64)
        assert (known["width_px"], known["height_px"]) == (64, 64)
        assert (known["original_width_px"], known["original_height_px"]) == (320, 256)
        assert (known["crop_left_px"], known["crop_top_px"]) == (32, 0)
        assert known["caption"] == members["txt"].decode()
        assert known["captions"][0]["origin"] == "alt"
        assert known["captions"][0]["model"] is None
        if len(known["captions"]) == 2:
            num_long += 1
            assert known["captions"][1]["model"] == "captioner-1"
            assert known["caption"] == known["captions"][1]["text"]
            assert len(known["caption"].split()) > 50
        assert known["preference_score"] == known["aesthetic_score"] >= 4.5
        assert known["aesthetic_scale"] == "v2"
        assert known["watermark_prob"] == pytest.approx(0.2)
        assert known["source"] == "laion"
        assert rows[key]["shard"] in {shard.path for shard in manifest.shards}
        assert rows[key]["sha256"] == known["sha256"]
    assert num_long == 15


def test_the_same_rows_give_the_same_bytes(trap_world: Any, tmp_path: Path) -> None:
    first = run(plan_curation("traps", trap_world.config(), (tmp_path / "a").as_uri()))
    trap_world.write(order=[2, 0, 1])
    renamed = plan_curation("traps", trap_world.config(), (tmp_path / "b").as_uri())
    assert run(renamed, backwards=True).to_bytes() == first.to_bytes()
    trap_world.rows.reverse()
    trap_world.write(num_files=5)
    spread = run(plan_curation("traps", trap_world.config(), (tmp_path / "c").as_uri()))
    assert spread.shards == first.shards
    assert spread.counts == first.counts


def test_a_finished_dataset_is_skipped_and_a_damaged_one_repaired(
    trap_world: Any, store_uri: str
) -> None:
    config = trap_world.config()
    manifest = run(plan_curation("traps", config, store_uri))
    plan = plan_curation("traps", config, store_uri)
    assert (plan.decision, plan.version) == ("SKIP", manifest.version)
    assert "is there and verified" in plan.reason
    root = plan.build.dataset_root
    work = {info.uri.rsplit("/", 2)[-2] for info in storage.list_objects(plan.build.folder)}
    assert "images" not in work

    shard = storage.join(root, manifest.shards[0].path)
    whole = storage.read_bytes(shard)
    damaged = whole[:5000] + bytes([whole[5000] ^ 1]) + whole[5001:]
    for break_it in (lambda: storage.write_bytes(shard, damaged), lambda: storage.delete(shard)):
        break_it()
        plan = plan_curation("traps", config, store_uri)
        assert plan.decision == "RESUME"
        assert manifest.shards[0].path in plan.reason
        assert len(plan.partitions) == len(plan.parts) == 1
        num_requests = len(trap_world.web.requests)
        assert run(plan).version == manifest.version
        assert len(trap_world.web.requests) - num_requests < num_requests
        assert storage.read_bytes(shard) == whole
    manifest_uri = storage.join(root, manifest.version, "manifest.json")
    assert verify_dataset(manifest_uri) == []
    storage.delete(manifest_uri)
    plan = plan_curation("traps", config, store_uri)
    assert (plan.decision, plan.units, plan.partitions, plan.parts) == ("RESUME", (), (), ())
    assert run(plan).version == manifest.version


class Crash(BaseException):
    """Stands for ``kill -9``: no handler runs that would not also run after one."""


def crash_after(monkeypatch: pytest.MonkeyPatch, num_writes: int) -> Callable[[], int]:
    """Let ``num_writes`` objects be written whole, then die; returns how many were."""
    written = [0]

    def dying(write: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*arguments: Any, **options: Any) -> Any:
            if written[0] >= num_writes:
                raise Crash
            written[0] += 1
            return write(*arguments, **options)

        return wrapped

    for name in ("write_bytes", "upload", "delete"):
        monkeypatch.setattr(storage, name, dying(getattr(storage, name)))
    return lambda: written[0]


@pytest.mark.slow
def test_a_crash_between_any_two_writes_changes_nothing(trap_world: Any, tmp_path: Path) -> None:
    """Die before the n-th write, for every n; resume; the manifest is the uninterrupted one."""
    config = trap_world.config(fetch=trap_world.web.config(max_bytes=200_000, retries=0))
    with pytest.MonkeyPatch.context() as patch:
        count = crash_after(patch, 10**9)
        expected = run(plan_curation("traps", config, (tmp_path / "whole").as_uri()))
        num_writes = count()
    assert num_writes > 20
    for number in range(0, num_writes, 3):
        store_uri = (tmp_path / f"crash-{number}").as_uri()
        with pytest.MonkeyPatch.context() as patch:
            crash_after(patch, number)
            with pytest.raises(Crash):
                run(plan_curation("traps", config, store_uri))
        plan = plan_curation("traps", config, store_uri)
        fetched = build_markers(plan.build, StagedMarker)
        assert not set(plan.partitions) & fetched
        assert run(plan).to_bytes() == expected.to_bytes(), number


def build_markers(build: Build, kind: type[Any]) -> set[int]:
    return set(build.read_all(kind, build.num_partitions))


def test_finished_partitions_are_not_fetched_again(trap_world: Any, tmp_path: Path) -> None:
    config = trap_world.config()
    store_uri = (tmp_path / "store").as_uri()
    plan = plan_curation("traps", config, store_uri)
    slots = Slots((1,), plan.build.num_partitions)
    batches = [b for unit in plan.units for b in read_rows(plan.build, unit, slots)]
    stage_images(plan.build, 1, batches)
    seen = [head.split(" ")[1] for head in trap_world.web.requests]
    resumed = plan_curation("traps", config, store_uri)
    assert (resumed.decision, resumed.partitions) == ("RESUME", (0, 2))
    trap_world.web.requests.clear()
    run(resumed)
    again = {head.split(" ")[1] for head in trap_world.web.requests}
    assert seen
    assert not again & set(seen)


@pytest.mark.parametrize("damage", [b"", b"{", b'{"rows": 1}', b"[]", b"null"])
def test_a_marker_that_is_not_whole_counts_as_not_written(
    trap_world: Any, tmp_path: Path, damage: bytes
) -> None:
    config = trap_world.config()
    store_uri = (tmp_path / "store").as_uri()
    plan = plan_curation("traps", config, store_uri)
    expected = run(plan)
    storage.delete(plan.build.result_uri)
    for kind in (ReadMarker, StagedMarker, PartMarker):
        storage.write_bytes(plan.build.marker_uri(kind, 2 if kind is ReadMarker else 0), damage)
    plan = plan_curation("traps", config, store_uri)
    assert plan.decision == "RESUME"
    assert 0 in plan.partitions
    assert 0 in plan.parts
    assert run(plan).version == expected.version


def test_changed_recipes_inputs_and_names_are_other_builds(trap_world: Any, tmp_path: Path) -> None:
    store_uri = (tmp_path / "store").as_uri()
    config = trap_world.config()
    key = plan_curation("traps", config, store_uri).build_key
    same = trap_world.config(
        fetch=trap_world.web.config(max_bytes=200_000, num_threads=1, opt_outs={})
    )
    assert plan_curation("traps", same, store_uri).build_key == key
    other = trap_world.config(resize={"image_size_px": 65})
    assert plan_curation("traps", other, store_uri).build_key != key
    trap_world.rows[0]["TEXT"] = "changed"
    trap_world.write()
    assert plan_curation("traps", config, store_uri).build_key != key


def test_a_row_that_is_lost_stops_the_publication(trap_world: Any, tmp_path: Path) -> None:
    plan = plan_curation("traps", trap_world.config(), tmp_path.as_uri())
    run(plan)
    marker = plan.build.read(PartMarker, 1)
    assert marker is not None
    for wrong in (
        replace(marker, committed=marker.committed - 1),
        replace(marker, rejected=marker.rejected | {"address": 7}),
        replace(marker, ledger=None),
    ):
        plan.build.write(wrong, 1)
        with pytest.raises(RuntimeError, match="rows went in"):
            assemble_manifest("traps", plan)
    plan.build.write(marker, 1)
    assemble_manifest("traps", plan)


@pytest.mark.parametrize("name", ["", "Upper", "a/b", "..", "-x", "a" * 65])
def test_odd_dataset_names_are_refused(trap_world: Any, tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match="dataset name"):
        plan_curation(name, trap_world.config(), tmp_path.as_uri())


def test_a_dead_network_commits_nothing(trap_world: Any, tmp_path: Path) -> None:
    dead = trap_world.web.config(connect_to={"evil.example:80": "127.0.0.1:1"})
    plan = plan_curation("traps", trap_world.config(fetch=dead, partitions=1), tmp_path.as_uri())
    with pytest.raises(UserError, match=r"at most 50% .* got \d+ of \d+ \(connect \d+") as caught:
        run(plan)
    assert plan.build.failures() == [str(caught.value)]
    assert build_markers(plan.build, StagedMarker) == set()


def test_an_unforeseen_error_costs_one_row(
    trap_world: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Decoder.store

    def failing(decoder: Decoder, body: bytes) -> Any:
        if b"Location" not in body and len(body) % 7 == 0:
            raise ZeroDivisionError
        return store(decoder, body)

    monkeypatch.setattr(Decoder, "store", failing)
    manifest = run(plan_curation("traps", trap_world.config(), tmp_path.as_uri()))
    assert manifest.failed["internal_error"] > 0
    assert manifest.counts["rows_in"] == len(trap_world.rows)


def test_the_report_shows_the_funnel_and_runs_nothing(trap_world: Any, tmp_path: Path) -> None:
    trap_world.rows[2]["TEXT"] = "<script>alert('x')</script>"
    trap_world.captions.clear()
    trap_world.captions.append({"url": "u", "caption": "c", "model": "m"})
    trap_world.write()
    config = trap_world.config(captions={"clean": {"markup": False}})
    plan = plan_curation("traps", config, tmp_path.as_uri())
    manifest = run(plan)
    uri = storage.join(plan.build.dataset_root, manifest.version, "report.html")
    page = storage.read_bytes(uri).decode()
    assert "<script>" not in page
    assert "&lt;script&gt;" in page
    kept = page.partition("Some that did not")[0]
    assert kept.count("<img ") == min(manifest.counts["committed"], 48)
    for reason in funnel_of(manifest):
        assert reason.replace("_", " ") in page


def retry(build: Build, backwards: bool = False) -> None:
    """What ``curate(retry_failed=True)`` does before it plans again, in one thread."""
    number = build.begin_round()
    for partition in sorted(range(build.num_partitions), reverse=backwards):
        retry_images(build, partition, number)


def heal(trap_world: Any, http_response: Any, encode: Any, make_picture: Any) -> None:
    """What failed in passing works now: one new image, one that is known already."""
    trap_world.web.route("/w/2", http_response(encode(make_picture(70_000))))
    trap_world.web.route("/w/7", http_response(encode(make_picture(10_000))))
    trap_world.web.route("/w/8", http_response(b"", status="404 x"))
    trap_world.web.route("/good/1.jpg", http_response(b"changed", status="404 x"))


def test_a_retry_fetches_what_failed_in_passing_and_nothing_else(
    trap_world: Any, store_uri: str, http_response: Any, encode: Any, make_picture: Any
) -> None:
    config = trap_world.config()
    first = run(plan_curation("traps", config, store_uri))
    heal(trap_world, http_response, encode, make_picture)
    trap_world.web.requests.clear()
    build = plan_curation("traps", config, store_uri).build
    retry(build)
    asked = {request.split(" ")[1] for request in trap_world.web.requests}
    assert asked - {"/robots.txt", "/.well-known/tdmrep.json"} == {"/w/2", "/w/7", "/w/8"}
    plan = plan_curation("traps", config, store_uri)
    assert (plan.decision, plan.units, plan.partitions) == ("RESUME", (), ())
    second = run(plan)
    assert second.version != first.version
    assert second.counts["rows_in"] == first.counts["rows_in"]
    assert second.counts["committed"] == first.counts["committed"] + 1
    assert {shard.path for shard in first.shards} < {shard.path for shard in second.shards}
    ends = dict(ledger(build, second).select("url", "reason").iter_rows())
    assert ends["http://evil.example/w/2"] is None
    assert ends["http://evil.example/w/7"] == "duplicate_image"  # the twin committed before stays
    assert ends["http://evil.example/w/8"] == "http_404"
    assert len(samples(build, second)) == second.counts["committed"]
    assert plan_curation("traps", config, store_uri).decision == "SKIP"
    retry(build)
    assert run(plan_curation("traps", config, store_uri)).version == second.version


def test_a_retry_that_is_killed_anywhere_converges(
    trap_world: Any, tmp_path: Path, http_response: Any, encode: Any, make_picture: Any
) -> None:
    config, store_uri = trap_world.config(), (tmp_path / "store").as_uri()
    run(plan_curation("traps", config, store_uri))
    heal(trap_world, http_response, encode, make_picture)
    pristine = tmp_path / "pristine"
    shutil.copytree(tmp_path / "store", pristine)
    build = plan_curation("traps", config, store_uri).build
    retry(build)
    expected = run(plan_curation("traps", config, store_uri)).version
    for step in range(4):
        shutil.rmtree(tmp_path / "store")
        shutil.copytree(pristine, tmp_path / "store")
        number = build.begin_round()
        for partition in range(step):
            retry_images(build, partition, number)
        assert plan_curation("traps", config, store_uri).decision == "RESUME"
        retry(build, backwards=True)
        assert build.open_round() == number == 1
        assert run(plan_curation("traps", config, store_uri)).version == expected


@pytest.mark.parametrize("policy", ["keep", "reject"])
@pytest.mark.parametrize("digest", ["sha256", "md5"])
def test_bytes_are_compared_with_the_recorded_digest(
    digest: str, policy: str, trap_world: Any, make_picture: Any, encode: Any, http_response: Any,
    tmp_path: Path,
) -> None:  # fmt: skip
    """As DataComp and LAION have them: some rows with the right one, some with another, some
    without; and a row that comes with a retry."""

    def digest_of(number: int) -> str:
        return hashlib.new(digest, encode(make_picture(number))).hexdigest()

    known_of = {number: digest_of(number if number < 8 else 999) for number in range(16)}
    known_of[20] = digest_of(20)
    trap_world.web.route("/good/20.jpg", http_response(b"", status="503 x"))
    shape = {
        "sha256": {"uid": "0" * 32, "url": "{url}", "text": "{text}", "original_width": 320,
                   "original_height": 256, "clip_b32_similarity_score": 0.3},
        "md5": {"URL": "{url}", "TEXT": "{text}", "WIDTH": 320, "HEIGHT": 256, "hash": 1},
    }[digest]  # fmt: skip
    filled = {"{url}": "http://evil.example/good/{}.jpg", "{text}": "picture number {}"}
    rows = [
        {name: filled[value].format(number) if value in filled else value
         for name, value in shape.items()} | {digest: known_of.get(number, "")}
        for number in range(21)
    ]  # fmt: skip
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    config = trap_world.config(
        metadata=[str(tmp_path / "rows.parquet")], captions={}, filters={},
        fetch=trap_world.web.config(on_hash_mismatch=policy),
    )  # fmt: skip

    def look(num_same: int) -> DatasetManifest:
        plan = plan_curation("digests", config, tmp_path.as_uri())
        manifest = run(plan)
        ended = Counter(row["reason"] for row in ledger(plan.build, manifest).to_dicts())
        del ended["http_503"]
        if policy == "keep":
            assert ended == {None: num_same + 12}
            assert manifest.attributes[f"recorded_{digest}"] == {"same": num_same, "different": 8}
        else:
            assert ended == {None: num_same + 4, "hash_mismatch": 8}
            assert manifest.attributes[f"recorded_{digest}"] == {"same": num_same}
        told = f"{num_same} images had, when they were fetched, the {digest} that the metadata"
        assert told in card(manifest)
        return manifest

    build = plan_curation("digests", config, tmp_path.as_uri()).build
    look(8)
    trap_world.web.route("/good/20.jpg", http_response(encode(make_picture(20))))
    retry(build)
    manifest = look(9)
    for row in ledger(build, manifest).iter_rows(named=True):
        number = int(row["url"].rsplit("/", 1)[1].removesuffix(".jpg"))
        assert row[f"recorded_{digest}"] == known_of.get(number)
        if row["reason"] == "hash_mismatch":
            assert row["detail"] == f"{digest} {digest_of(number)}"
        elif digest == "sha256" or number in known_of:
            assert row[digest] == digest_of(number)
        else:
            assert row["md5"] is None
    for members in samples(build, manifest).values():
        known = json.loads(members["json"])
        number = int(known["url"].rsplit("/", 1)[1].removesuffix(".jpg"))
        assert known.get(f"recorded_{digest}") == known_of.get(number)
        assert "human_preference" not in known
