"""The funnel before anything is fetched: unbiased, honest about its interval, near the truth."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import pipelines.clusters
import pipelines.metadata_sample
from demo.metadata import build_world
from demo.world import WorldConfig
from infra import storage
from infra.manifest import DatasetManifest, ShardEntry, publish_manifest, shard_path
from pipelines.build import PartMarker, StagedMarker
from pipelines.columns import canonical_rows
from pipelines.config import CurationConfig
from pipelines.estimate import Estimate, estimate_curation
from pipelines.filters import first_reason, metadata_filters
from pipelines.foreseen import ROW_COPIES, _work_in
from pipelines.inputs import find_inputs, metadata_batches, units_of
from pipelines.plan import plan_curation
from pipelines.publish import funnel_of
from pipelines.tombstones import Tombstones, publish_tombstones
from tests.pipelines.test_build import fetch, run

NUM_FILES, GROUPS_PER_FILE = 12, 10
FILTERS: dict[str, Any] = {
    "min_width_px": 256, "min_height_px": 256, "max_aspect_ratio": 3.0, "min_aesthetic_score": 4.5,
    "max_watermark_prob": 0.5, "max_unsafe_prob": 0.5,
    "unknown": {"watermark_prob": "later"},
}  # fmt: skip


def laion_file(path: Path, rng: np.random.Generator, index: int) -> None:
    """Files differ, and row groups differ in size and in score, as sorted files do."""
    groups = []
    for group in range(GROUPS_PER_FILE):
        n = int(rng.integers(100, 3000)) * (10 if group == 0 else 1)
        score = 4.6 + 0.1 * index / NUM_FILES + 0.02 * group
        columns = {
            "URL": [f"http://a.example/{index}/{group}/{i}" for i in range(n)],
            "TEXT": ["some words about a picture"] * n,
            "WIDTH": rng.lognormal(6.2, 0.6, n),
            "HEIGHT": rng.lognormal(6.1, 0.6, n),
            "punsafe": rng.beta(0.3, 6, n),
            "pwatermark": np.where(rng.random(n) < 0.1, np.nan, rng.beta(0.5, 2, n)),
            "AESTHETIC_SCORE": rng.normal(score, 0.7, n),
        }
        groups.append(pa.table(columns))
    with pq.ParquetWriter(path, groups[0].schema) as writer:
        for table in groups:
            writer.write_table(table)


@pytest.fixture(scope="module")
def laion(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("laion")
    rng = np.random.default_rng(7)
    for index in range(NUM_FILES):
        laion_file(folder / f"part-{index:05d}.parquet", rng, index)
    return folder


def config_of(folder: Path, **estimate: Any) -> CurationConfig:
    return CurationConfig.model_validate(
        {"metadata": [str(folder)], "filters": FILTERS, "estimate": estimate}
    )


def true_reasons(config: CurationConfig) -> tuple[int, Counter[str | None], int]:
    """Rows, what each reason takes of all of them, and how many go on with no watermark known."""
    frames = [
        canonical_rows(table, layout, "s").with_columns(
            first_reason(metadata_filters(config.filters))
        )
        for unit in units_of(find_inputs(config))
        for table, layout in metadata_batches(unit, config)
    ]
    rows = pl.concat(frames)
    later = rows.filter(pl.col("reason").is_null() & pl.col("watermark_prob").is_null()).height
    return rows.height, Counter(rows["reason"].to_list()), later


def test_a_sample_is_within_ten_percent_and_its_interval_holds(
    laion: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipelines.metadata_sample, "MAX_RECORDS_PER_GROUP", 500)
    rows_in, truth, later = true_reasons(config_of(laion))
    found = [
        estimate_curation(config_of(laion, seed=seed), tmp_path.as_uri()) for seed in range(12)
    ]
    kept = truth[None]
    held = 0
    for one in found:
        assert (one.rows_in, one.groups_sampled) == (rows_in, 24)
        assert one.rows_sampled <= 24 * 500 < rows_in / 10
        assert abs(one.to_fetch.rows - kept) < 0.1 * kept
        held += abs(one.to_fetch.ratio - kept / rows_in) <= one.to_fetch.margin
        for name, share in one.funnel.items():
            if truth[name] > rows_in / 20:
                assert abs(share.rows - truth[name]) < 0.1 * truth[name], name
        total = one.to_fetch.ratio + sum(share.ratio for share in one.funnel.values())
        assert total == pytest.approx(1)
    assert held >= 10
    mean = sum(one.to_fetch.ratio for one in found) / len(found)
    assert mean == pytest.approx(kept / rows_in, rel=0.02)
    unknown = sum(one.unknown["later:watermark_prob"].rows for one in found) / len(found)
    assert unknown == pytest.approx(later, rel=0.1)


def test_the_same_draw_twice(laion: Path, tmp_path: Path) -> None:
    one = estimate_curation(config_of(laion, row_groups=5), tmp_path.as_uri())
    assert estimate_curation(config_of(laion, row_groups=5), tmp_path.as_uri()) == one
    other = estimate_curation(config_of(laion, row_groups=5, seed=1), tmp_path.as_uri())
    assert other.to_fetch != one.to_fetch


def test_few_row_groups_are_all_read(laion: Path, tmp_path: Path) -> None:
    config = config_of(laion, row_groups=200)
    rows_in, truth, later = true_reasons(config)
    found = estimate_curation(config, tmp_path.as_uri())
    assert 0.9 * rows_in < found.rows_sampled < rows_in  # only the largest groups are thinned
    assert found.groups_sampled == NUM_FILES * GROUPS_PER_FILE
    assert found.rows_in == rows_in
    for name, share in found.funnel.items():
        assert abs(share.ratio - truth[name] / rows_in) <= 2 * share.margin, name
    assert found.unknown["later:watermark_prob"].rows == pytest.approx(later, rel=0.02)


def test_no_bias_towards_small_or_large_row_groups(tmp_path: Path) -> None:
    """A group of 900 good rows among 30 groups of 10 bad ones."""
    folder = tmp_path / "in"
    folder.mkdir()
    for index in range(31):
        n = 900 if index == 0 else 10
        side = 500.0 if index == 0 else 100.0
        frame = {
            "URL": [f"u{i}" for i in range(n)], "TEXT": ["a b"] * n, "WIDTH": [side] * n,
            "HEIGHT": [side] * n,
        }  # fmt: skip
        pl.DataFrame(frame).write_parquet(folder / f"{index}.parquet")
    ratios = []
    for seed in range(16):
        config = CurationConfig.model_validate(
            {"metadata": [str(folder)], "filters": {"min_width_px": 256},
             "estimate": {"row_groups": 10, "seed": seed}}
        )  # fmt: skip
        ratios.append(estimate_curation(config, tmp_path.as_uri()).to_fetch.ratio)
    assert np.mean(ratios) == pytest.approx(0.75, abs=0.05)


def published(root: str, **changes: Any) -> None:
    known: dict[str, Any] = {
        "name": "d",
        "recipe_fingerprint": "0" * 64,
        "shards": [],
        "ledger": [],
        "counts": {"rows_in": 0, "committed": 0, "rejected": 0, "failed": 0},
        "rejected": {},
        "failed": {},
        "parents": [],
        "attributes": {},
    }
    publish_manifest(root, DatasetManifest(**(known | changes)))


def test_what_is_stated_and_what_was_measured(laion: Path, tmp_path: Path) -> None:
    plain = estimate_curation(config_of(laion), tmp_path.as_uri())
    assert (plain.known_from, plain.fetch_success_ratio) == ("nothing", None)
    assert plain.samples == plain.fetches == plain.to_fetch.rows
    assert (plain.web, plain.copies_known_from) == ({}, "nothing")
    assert len(plain.notes) == 2
    stated = estimate_curation(
        config_of(
            laion, fetch_success_ratio=0.5, duplicate_ratio=0.2, num_cores=4,
            price_per_core_hour=0.04, fetches_per_core_second=10.0, rows_per_core_second=1e5,
        ),
        tmp_path.as_uri(),
    )  # fmt: skip
    assert stated.fetches == pytest.approx(0.8 * plain.to_fetch.rows, abs=1)
    assert stated.samples == pytest.approx(0.4 * plain.to_fetch.rows, abs=1)
    assert stated.core_hours == pytest.approx(
        (stated.rows_in / 1e5 + stated.fetches / 10) / 3600, rel=1e-3
    )
    assert stated.hours == pytest.approx(stated.core_hours / 4)
    assert (stated.fetches_per_core_second, stated.pace_known_from) == (10.0, "recipe")
    assert (plain.fetches_per_core_second, plain.pace_known_from) == (60.0, "nothing")
    assert stated.cost == pytest.approx(0.04 * stated.core_hours)
    assert (stated.known_from, stated.copies_known_from) == ("recipe", "recipe")
    assert stated.notes == ()
    json.dumps(stated.to_json())


def test_an_earlier_version_tells_link_rot_copies_and_bytes(laion: Path, tmp_path: Path) -> None:
    root = tmp_path.as_uri()
    shard = ShardEntry(shard_path("0" * 64), 6000, "0" * 64, 60)
    storage.write_bytes(storage.join(root, shard.path), bytes(6000))
    published(
        root,
        shards=[shard],
        counts={"rows_in": 400, "committed": 60, "rejected": 320, "failed": 20},
        rejected={"too_small": 300, "duplicate_url": 20},
        failed={"http_404": 20},
    )
    found = estimate_curation(config_of(laion), root)
    assert found.duplicate_ratio == 0.2
    assert found.fetch_success_ratio == 0.75
    assert found.known_from.startswith("version ")
    assert found.stored_bytes == pytest.approx(100 * found.samples, rel=1e-3)
    assert sum(found.web.values()) + found.samples == pytest.approx(found.fetches, abs=2)
    assert set(found.web) == {"failed:http_404"}
    overruled = estimate_curation(config_of(laion, fetch_success_ratio=0.5), root)
    assert (overruled.fetch_success_ratio, overruled.known_from) == (0.5, "recipe")


def test_another_dataset_tells_of_links_and_not_of_sizes(laion: Path, tmp_path: Path) -> None:
    other = storage.join(tmp_path.as_uri(), "datasets", "other")
    published(
        other,
        counts={"rows_in": 400, "committed": 0, "rejected": 320, "failed": 80},
        rejected={"too_small": 300, "duplicate_url": 20},
        failed={"http_404": 80},
    )
    root = storage.join(tmp_path.as_uri(), "datasets", "mine")
    assert estimate_curation(config_of(laion), root).known_from == "nothing"
    found = estimate_curation(config_of(laion), root, tmp_path.as_uri())
    assert found.known_from.startswith("dataset d, version ")
    assert (found.samples, found.copies_known_from) == (0, "nothing")
    assert any("another dataset" in note for note in found.notes)


def test_copies_are_counted_where_every_row_is_read(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    for index in range(3):
        frame = {
            "URL": [f"http://a.example/{i}" for i in range(index * 50, index * 50 + 100)],
            "TEXT": [f"words {index}"] * 100, "WIDTH": [300.0] * 100, "HEIGHT": [300.0] * 100,
        }  # fmt: skip
        pl.DataFrame(frame).write_parquet(folder / f"{index}.parquet")
    known: dict[str, Any] = {"metadata": [str(folder)]}
    for same_url, distinct in ((True, 200), (False, 300)):
        config = CurationConfig.model_validate(known | {"duplicates": {"same_url": same_url}})
        found = estimate_curation(config, (tmp_path / "none").as_uri())
        assert (found.fetches, found.copies_known_from) == (distinct, "all rows")
    sampled = CurationConfig.model_validate(known | {"estimate": {"row_groups": 2}})
    found = estimate_curation(sampled, (tmp_path / "none").as_uri())
    assert (found.duplicate_ratio, found.copies_known_from) == (None, "nothing")


def test_what_is_blocked_or_repeats_a_prompt_is_foreseen(tmp_path: Path) -> None:
    frame = {
        "URL": ["http://a.example/1", "http://b.example/2", "http://c.example/3", "http://c.example/4"],
        "TEXT": ["a red fox", "a red fox", "Two green dogs on a purple sofa!", "a blue owl"],
    }  # fmt: skip
    pl.DataFrame(frame).write_parquet(tmp_path / "m.parquet")
    (tmp_path / "block.txt").write_text("domain:b.example\n")
    (tmp_path / "prompts.txt").write_text("two green dogs on a purple sofa\n")
    root = (tmp_path / "none").as_uri()
    publish_tombstones(root, Tombstones.of(urls=["http://c.example/4"]))
    known: dict[str, Any] = {
        "metadata": [str(tmp_path / "m.parquet")],
        "block": [str(tmp_path / "block.txt")],
        "decontaminate": {"prompts": [str(tmp_path / "prompts.txt")]},
    }
    found = estimate_curation(CurationConfig.model_validate(known), root)
    assert {name: share.rows for name, share in found.funnel.items()} == {
        "takedown": 2,
        "contaminated": 1,
    }
    assert found.to_fetch.rows == 1


def test_of_two_builds_the_one_that_asked_for_more_tells_the_pace(tmp_path: Path) -> None:
    root = tmp_path.as_uri()
    for key, seconds, asked in (("aa", 9.0, 3), ("bb", 10.0, 100), ("cc", 4.0, 2)):
        name = storage.join(root, "work", key, "staged-00000.json")
        storage.write_json(name, {"seconds": seconds, "num_asked": asked})
    storage.write_json(storage.join(root, "work", "bb", "part-00000.json"), {"seconds": 2.0})
    assert _work_in(root).seconds_per_fetch() == pytest.approx(0.12)
    storage.write_json(storage.join(root, "work", "dd", "staged-00000.json"), {"round": 0})
    assert _work_in(root).seconds_per_fetch() == pytest.approx(0.12)
    storage.write_bytes(storage.join(root, "work", "ee", "staged-00000.json"), b'{"seconds": 1')
    assert _work_in(root).seconds_per_fetch() == pytest.approx(0.12)
    assert _work_in(storage.join(root, "none")).seconds_per_fetch() is None


def test_what_was_fetched_foresees_the_rest(trap_world: Any, tmp_path: Path) -> None:
    """Of a build under way, its partitions tell; once published, the version does, to the row."""
    store = (tmp_path / "store").as_uri()
    config = trap_world.config(captions={})
    plan = plan_curation("traps", config, store)
    root = plan.build.dataset_root
    assert estimate_curation(config, root, store).known_from == "nothing"
    fetch(replace(plan, partitions=plan.partitions[:2]))
    under_way = estimate_curation(config, root, store)
    assert under_way.known_from == "2 partitions fetched"
    assert 0 < under_way.samples < under_way.fetches
    assert under_way.pace_known_from == "2 partitions fetched"
    manifest = run(plan_curation("traps", config, store))
    found = estimate_curation(config, root, store)
    assert found.known_from == f"version {manifest.version[:12]}"
    foreseen = {
        **{name: share.rows for name, share in found.funnel.items()},
        **found.web,
        "committed": found.samples,
    }
    staged = plan.build.read_all(StagedMarker, plan.build.num_partitions)
    parts = plan.build.read_all(PartMarker, plan.build.num_partitions)
    asked = sum(marker.num_asked for marker in staged.values())
    seconds = sum(m.seconds for m in staged.values()) + sum(m.seconds for m in parts.values())
    assert found.fetches_per_core_second == pytest.approx(asked / seconds)
    assert found.core_hours == pytest.approx(
        (found.rows_in / config.estimate.rows_per_core_second + found.fetches * seconds / asked)
        / 3600
    )
    other = trap_world.config(captions={}, partitions=1)
    elsewhere = estimate_curation(other, storage.join(store, "datasets", "new"), store)
    assert elsewhere.pace_known_from == f"dataset traps, version {manifest.version[:12]}"
    assert elsewhere.fetches_per_core_second == found.fetches_per_core_second
    came = funnel_of(manifest)
    assert foreseen == {n: k for n, k in came.items() if n not in ("rows_in", *ROW_COPIES)}
    assert found.to_fetch.rows - found.fetches == sum(came[name] for name in ROW_COPIES)


def test_json_lines_are_drawn_in_stretches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipelines.clusters, "STRETCH_BYTES", 5000)
    records = [
        json.dumps(
            {"img_path": f"{i}.jpg", "prompt": "a fox" if i % 4 else " ", "Task2": {"Caption": ""}}
        )
        for i in range(3000)
    ]
    path = tmp_path / "j.jsonl"
    path.write_text("\n".join(records))
    for row_groups in (10, 1000):
        config = CurationConfig.model_validate(
            {"metadata": [str(path)], "image_base_url": "https://i.example/",
             "estimate": {"row_groups": row_groups}}
        )  # fmt: skip
        found = estimate_curation(config, (tmp_path / "none").as_uri())
        assert found.rows_in == pytest.approx(3000, rel=0 if row_groups == 1000 else 0.02)
        assert found.funnel["no_caption"].ratio == pytest.approx(0.25, rel=0.02)


def test_the_painted_world_ends_as_foreseen(tmp_path: Path) -> None:
    """The metadata's own reasons, to the row; what its web then does is in the slow test."""
    build_world(WorldConfig.model_validate({"num_rows": 400, "trap_ratio": 0.4}), tmp_path)
    config = CurationConfig.model_validate(
        {"metadata": [str(tmp_path / "metadata")], "filters": FILTERS}
    )
    rows_in, truth, _ = true_reasons(config)
    found: Estimate = estimate_curation(config, (tmp_path / "none").as_uri())
    assert found.rows_in == rows_in == found.rows_sampled
    assert {name: share.rows for name, share in found.funnel.items() if name in truth} == {
        name: number for name, number in truth.items() if name is not None
    }
