"""Pictures that look alike find each other: against pixels, brute force and a sequential rule."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import pipelines.near_images
from infra import storage
from infra.manifest import load_manifest
from infra.sessions import ClusterConfig, spark_session, stop_spark
from pipelines.config import CurationConfig
from pipelines.curate import curate
from pipelines.duplicate_config import DuplicateConfig, PerceptualConfig
from pipelines.duplicates import IMAGES, duplicates_among, rank_of
from pipelines.near_images import entries, losers, pairs
from pipelines.perceptual import Signatures, Views, alike, bits_for, signature
from tests.pipelines.alike import KINDS, altered, scene
from tests.pipelines.conftest import EvilWeb, encoded, make_trap_world, response

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

CONFIG = PerceptualConfig()
NUM_SCENES, NUM_COPIES = 400, 100


def image_id(number: int) -> str:
    return f"{number:032x}"


def frame_of(pictures: list[Any], scores: Sequence[float | None] | None = None) -> pl.DataFrame:
    scores = scores or [None] * len(pictures)
    ranks = [rank_of(0, score, image_id(n)) for n, score in enumerate(scores)]
    return pl.DataFrame(
        {
            "slot": pl.Series([0] * len(pictures), dtype=pl.Int32),
            "rank": ranks,
            "signature": [signature(picture) for picture in pictures],
        }
    )


def found_in(images: pl.DataFrame, config: PerceptualConfig = CONFIG) -> set[tuple[int, int]]:
    """The pairs, by the images' numbers, that the buckets bring together."""
    table = pl.concat(entries(images, config, bits_for(images.height)))
    found = pairs(table, config)
    number = {rank: n for n, rank in enumerate(images["rank"])}
    return {(number[row["kept"]], number[row["lost"]]) for row in found.iter_rows(named=True)}


def brute_force(images: pl.DataFrame, config: PerceptualConfig = CONFIG) -> set[tuple[int, int]]:
    views = Views(config.max_crop_ratio, config.mirrored)
    known = Signatures.parse(images["signature"].to_list())
    lumas, chromas = views.luma(known), views.chroma(known)
    order = images["rank"].to_list()
    found: set[tuple[int, int]] = set()
    for one in range(images.height):
        cosines, agree = alike(lumas[one], chromas[one], lumas[:, 0], chromas[:, 0])
        for other in np.flatnonzero((cosines >= config.min_similarity) & agree).tolist():
            if one != other:
                found.add((one, other) if order[one] < order[other] else (other, one))
    return found


@pytest.fixture(scope="module")
def planted() -> tuple[pl.DataFrame, dict[int, int]]:
    """Scenes, then copies of some; copy -> original. Copies rank below."""
    rng = np.random.default_rng(3)
    pictures = [scene(seed) for seed in range(NUM_SCENES)]
    origin = {}
    for number in range(NUM_COPIES):
        origin[NUM_SCENES + number] = original = number * 3
        pictures.append(altered(pictures[original], rng, KINDS[number % len(KINDS)]))
    scores = [6.0] * NUM_SCENES + [5.0] * NUM_COPIES
    return frame_of(pictures, scores), origin


def test_copies_are_found_and_nothing_else(planted: tuple[pl.DataFrame, dict[int, int]]) -> None:
    images, origin = planted
    found = found_in(images)
    gone = {int(rank.split("-")[2], 16) for rank in losers(
        (images["rank"][kept], images["rank"][lost]) for kept, lost in found
    )}  # fmt: skip
    right = gone & set(origin)
    assert len(right) / len(origin) >= 0.98
    assert len(right) / len(gone) >= 0.98
    assert found <= brute_force(images)
    assert len(found) >= 0.98 * len(brute_force(images))


def test_a_view_is_what_cropped_pixels_would_give() -> None:
    views = Views(0.1, mirrored=True)
    assert views.num_views == 162
    for seed in range(8):
        pixels = scene(seed)
        luma = views.luma(Signatures.parse([signature(pixels)]))[0]
        side = len(pixels)
        # The last crop: a tenth off every side, then the same mirrored.
        cut = round(side * 0.1)
        cropped = np.ascontiguousarray(pixels[cut : side - cut, cut : side - cut])
        direct = views.luma(Signatures.parse([signature(cropped)]))[0, 0]
        assert luma[80] @ direct > 0.97
        assert luma[0] @ direct < luma[80] @ direct
        mirrored = np.ascontiguousarray(cropped[:, ::-1])
        direct = views.luma(Signatures.parse([signature(mirrored)]))[0, 0]
        assert luma[161] @ direct > 0.97


def test_size_brightness_and_contrast_do_not_count_and_colour_does() -> None:
    pixels = scene(1)
    darker = (pixels * 0.6 + 20).astype(np.uint8)
    larger = np.asarray(Image.fromarray(pixels).resize((300, 300), Image.Resampling.BICUBIC))
    other_colours = np.ascontiguousarray(pixels[..., [2, 0, 1]])
    images = frame_of([pixels, darker, larger, other_colours])
    assert found_in(images) == {(0, 1), (0, 2), (1, 2)}


def test_flat_pictures_and_odd_signatures_are_no_ones_copies() -> None:
    grey = [np.full((64, 64, 3), level, np.uint8) for level in (10, 200)]
    assert found_in(frame_of(grey)) == set()
    with pytest.raises(ValueError, match="a signature has"):
        Signatures.parse([b"short"])


def test_mirror_images_are_the_same_when_asked() -> None:
    pixels = scene(2)
    images = frame_of([pixels, np.ascontiguousarray(pixels[:, ::-1])])
    assert found_in(images) == set()
    assert found_in(images, PerceptualConfig(mirrored=True)) == {(0, 1)}


def test_without_crops_only_whole_pictures_are_compared() -> None:
    pixels = scene(5)
    cropped = np.ascontiguousarray(pixels[9:-9, 9:-9])
    images = frame_of([pixels, cropped, pixels[::2, ::2]])
    assert found_in(images) == {(0, 1), (0, 2), (1, 2)}
    assert found_in(images, PerceptualConfig(max_crop_ratio=0, min_similarity=0.95)) == {(0, 2)}


def test_a_crowded_bucket_costs_comparisons_with_the_first_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rng = np.random.default_rng(0)
    pictures = [altered(scene(7), rng, "encode") for _ in range(40)] + [scene(8)]
    images = frame_of(pictures)
    everything = found_in(images)
    monkeypatch.setattr(pipelines.near_images, "MAX_IN_BUCKET", 10)
    found = found_in(images)
    assert found < everything
    for pairs_found in (found, everything):
        gone = losers((f"{kept:02}", f"{lost:02}") for kept, lost in pairs_found)
        assert gone == {f"{number:02}" for number in range(1, 40)}


@settings(deadline=None)
@given(st.sets(st.tuples(st.integers(0, 12), st.integers(0, 12)), max_size=30))
def test_the_rule_is_the_sequential_one(drawn: set[tuple[int, int]]) -> None:
    found = {(f"{min(p):02}", f"{max(p):02}") for p in drawn if p[0] != p[1]}
    stays: list[str] = []
    for name in (f"{number:02}" for number in range(13)):
        if not any((kept, name) in found for kept in stays):
            stays.append(name)
    assert losers(found) == {f"{number:02}" for number in range(13)} - set(stays)


ROWS = st.tuples(
    st.integers(0, 3), st.none() | st.floats(allow_nan=False), st.text("ab", max_size=2)
)


@settings(deadline=None)
@given(st.lists(ROWS, max_size=8))
def test_ranks_sort_as_the_rule_says(rows: list[tuple[int, float | None, str]]) -> None:
    def rule(row: tuple[int, float | None, str]) -> tuple[Any, ...]:
        return row[0], row[1] is None, -(row[1] or 0.0), row[2]

    assert sorted(rows, key=lambda row: rank_of(*row)) == sorted(rows, key=rule)


@pytest.fixture(scope="module")
def spark(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SparkSession]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ATELIER_HOME", str(tmp_path_factory.mktemp("home")))
        session = spark_session("alike", ClusterConfig(), {})
        yield session
        stop_spark(session)


@pytest.mark.slow
@pytest.mark.parametrize("on_driver", [1_000_000, 0])
def test_spark_finds_the_same(
    planted: tuple[pl.DataFrame, dict[int, int]],
    spark: SparkSession,
    monkeypatch: pytest.MonkeyPatch,
    on_driver: int,
) -> None:
    images, _ = planted
    expected: dict[str, str] = {}
    by_lost: dict[str, set[str]] = defaultdict(set)
    ranks = images["rank"].to_list()
    for one, other in found_in(images):
        by_lost[ranks[other]].add(ranks[one])
    gone = losers((kept, lost) for lost, of in by_lost.items() for kept in of)
    for lost in gone:
        expected[lost.split("-")[2]] = min(by_lost[lost] - gone).split("-")[2]
    monkeypatch.setattr(pipelines.near_images, "MAX_PAIRS_ON_DRIVER", on_driver)
    monkeypatch.setattr(pipelines.near_images, "ENTRIES_PER_TASK", 20_000)
    rows = [
        (1, rank, image_id(number), bytes(mark), number)
        for number, (_, rank, mark) in enumerate(images.rows())
    ]
    random.Random(0).shuffle(rows)
    table = spark.createDataFrame(rows, IMAGES).repartition(3)
    asked = CurationConfig(metadata=["x"], duplicates=DuplicateConfig(perceptual=CONFIG))
    found = duplicates_among(table, asked, len(rows)).collect()
    assert {row.sample_id: row.detail for row in found} == {
        lost: f"like {kept}" for lost, kept in expected.items()
    }
    assert {(row.slot, row.reason) for row in found} == {(1, "near_duplicate")}


@pytest.mark.slow
def test_a_curation_keeps_the_best_copy(
    tmp_path: Path, evil_web: EvilWeb, spark: SparkSession
) -> None:
    world = make_trap_world(tmp_path / "traps", evil_web, num_good=0)
    template = world.rows[0]
    world.rows.clear()
    rng = np.random.default_rng(1)
    best: dict[int, tuple[float, str]] = {}
    for number in range(12):
        large = Image.fromarray(scene(100 + number)).resize((320, 320), Image.Resampling.BICUBIC)
        pixels = np.asarray(large)
        copies = [pixels, altered(pixels, rng, "crop"), altered(pixels, rng, "encode")]
        for place, copy in enumerate(copies):
            path = f"/alike/{number}/{place}.png"
            score = 9.0 - abs(place - number % 3)
            evil_web.route(path, response(encoded(Image.fromarray(copy), "PNG")))
            url = f"http://evil.example{path}"
            best.setdefault(number, (score, url))
            best[number] = max(best[number], (score, url))
            world.rows.append(template | {
                "URL": url, "TEXT": f"scene {number} {place}", "WIDTH": 320.0, "HEIGHT": 320.0,
                "AESTHETIC_SCORE": score, "hash": len(world.rows), "punsafe": 0.1,
                "pwatermark": 0.1, "similarity": 0.3,
            })  # fmt: skip
    world.write(num_files=2)
    config = world.config(duplicates={"perceptual": {}}, captions={"files": []})
    store = (tmp_path / "store").as_uri()
    result = curate("alike", config, store, lambda: spark)
    manifest = load_manifest(result.manifest_uri)
    root = result.manifest_uri.rsplit("/", 2)[0]
    ledger = pl.concat(
        pl.read_parquet(storage.read_bytes(storage.join(root, entry.path)))
        for entry in manifest.ledger
    )
    kept = ledger.filter(pl.col("disposition") == "committed")
    assert set(kept["url"]) == {url for _, url in best.values()}
    gone = ledger.filter(pl.col("disposition") == "rejected")
    assert set(gone["reason"]) == {"near_duplicate"}
    assert {detail.removeprefix("like ") for detail in gone["detail"]} == set(kept["sample_id"])
    assert result.funnel["near_duplicate"] == 24
    again = curate("alike", config, store, lambda: spark)
    assert (again.decision, again.version) == ("SKIP", result.version)
