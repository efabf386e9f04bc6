"""Images of evaluation sets and of other versions stay out; placeholders go with all copies."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl
import pytest
from PIL import Image

from infra import storage
from infra.errors import UserError
from infra.manifest import dataset_root, load_manifest
from infra.sessions import ClusterConfig, spark_session, stop_spark
from pipelines.config import CurationConfig
from pipelines.curate import curate
from pipelines.duplicate_config import DecontaminationConfig, DuplicateConfig, PerceptualConfig
from pipelines.duplicates import rank_of, reference_rank
from pipelines.near_images import entries, pairs
from pipelines.perceptual import bits_for, signature
from pipelines.plan import plan_curation
from pipelines.references import find_references, read_reference, references_part
from pipelines.shards import read_shard
from tests.pipelines.alike import KINDS, altered, scene
from tests.pipelines.conftest import EvilWeb, encoded, make_trap_world, response

if TYPE_CHECKING:
    from pyspark.sql import SparkSession


def image_id(number: int) -> str:
    return f"{number:032x}"


def frame_of(pictures: list[Any], num_references: int) -> pl.DataFrame:
    ranks = [
        reference_rank("contaminated_image", image_id(n))
        if n < num_references
        else rank_of(0, 5.0, image_id(n))
        for n in range(len(pictures))
    ]
    return pl.DataFrame(
        {
            "slot": pl.Series([0] * len(pictures), dtype=pl.Int32),
            "rank": ranks,
            "signature": [signature(picture) for picture in pictures],
        }
    )


def found_in(images: pl.DataFrame, *, among_all: bool) -> set[tuple[int, int]]:
    config = PerceptualConfig()
    table = pl.concat(entries(images, config, bits_for(images.height)))
    found = pairs(table, config, among_all=among_all)
    number = {rank: n for n, rank in enumerate(images["rank"])}
    return {(number[row["kept"]], number[row["lost"]]) for row in found.iter_rows(named=True)}


@pytest.mark.parametrize("most", [2_000, 3])
def test_a_reference_is_never_lost_and_reaches_what_only_it_is_like(
    most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Were one of two references that look alike lost, what is like it alone would stay."""
    rng = np.random.default_rng(0)
    monkeypatch.setattr("pipelines.near_images.MAX_IN_BUCKET", most)
    one, other = scene(1), scene(2)
    pictures = [one, altered(one, rng, "encode"), altered(one, rng, "resize"), one, other,
                altered(other, rng, "encode"), scene(3)]  # fmt: skip
    images = frame_of(pictures, num_references=2)
    by_reference = found_in(images, among_all=False)
    assert by_reference == {(0, 2), (0, 3), (1, 2), (1, 3)}
    every = found_in(images, among_all=True)
    assert by_reference <= every
    assert (4, 5) in every
    assert not any(lost < 2 for _, lost in every)


def test_exactly_and_nearly_all_of_an_evaluation_set_is_found() -> None:
    """100 images exactly, and 100 cropped, resized, encoded again, recoloured."""
    rng = np.random.default_rng(7)
    references = [scene(number) for number in range(100)]
    changed = [altered(each, rng, KINDS[n % len(KINDS)]) for n, each in enumerate(references)]
    clean = [scene(number) for number in range(1_000, 1_400)]
    images = frame_of([*references, *references, *changed, *clean], num_references=100)
    found = found_in(images, among_all=False)
    gone = {lost for _, lost in found}
    assert set(range(100, 200)) <= gone
    assert len(gone & set(range(200, 300))) >= 95
    assert len(gone & set(range(300, 700))) <= 4
    assert {kept for kept, _ in found} <= set(range(100))


@pytest.fixture(scope="module")
def spark(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SparkSession]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ATELIER_HOME", str(tmp_path_factory.mktemp("home")))
        session = spark_session("references", ClusterConfig(), {})
        yield session
        stop_spark(session)


class SceneWorld:
    """Rows that point at scenes; each URL is to end as ``expected`` says."""

    def __init__(self, folder: Path, web: EvilWeb) -> None:
        self.world = make_trap_world(folder, web, num_good=0)
        self.template = self.world.rows[0]
        self.web = web
        self.clear()

    def clear(self) -> None:
        self.world.rows.clear()
        self.expected: dict[str, str] = {}

    def add(self, path: str, pixels: Any, ends: str, caption: str = "") -> None:
        url = f"http://evil.example{path}"
        large = Image.fromarray(pixels).resize((320, 320), Image.Resampling.BICUBIC)
        self.web.route(path, response(encoded(large, "PNG")))
        self.expected[url] = ends
        self.world.rows.append(self.template | {
            "URL": url, "TEXT": caption or f"scene number {len(self.world.rows)}",
            "WIDTH": 320.0, "HEIGHT": 320.0,
            "AESTHETIC_SCORE": 6.0, "hash": len(self.world.rows), "punsafe": 0.1,
            "pwatermark": 0.1, "similarity": 0.3,
        })  # fmt: skip

    def config(self, **changes: Any) -> CurationConfig:
        self.world.write(num_files=1)
        return self.world.config(**({"captions": {"files": []}} | changes))


def ends_of(manifest_uri: str) -> dict[str, str]:
    root, manifest = dataset_root(manifest_uri), load_manifest(manifest_uri)
    ledger = pl.concat(
        pl.read_parquet(storage.read_bytes(storage.join(root, entry.path)))
        for entry in manifest.ledger
    )
    return {row["url"]: row["reason"] or row["disposition"] for row in ledger.to_dicts()}


@pytest.mark.slow
@pytest.mark.parametrize("perceptual", [{}, None])
def test_a_curation_keeps_out_what_others_hold(
    tmp_path: Path, evil_web: EvilWeb, spark: SparkSession, perceptual: Any
) -> None:
    rng = np.random.default_rng(1)
    store = (tmp_path / "store").as_uri()
    scenes = SceneWorld(tmp_path / "scenes", evil_web)
    for number in range(6):
        scenes.add(f"/other/{number}.png", scene(number), "committed")
    first = curate(
        "first", scenes.config(duplicates={"perceptual": perceptual}), store, lambda: spark
    )
    assert ends_of(first.manifest_uri) == scenes.expected
    evaluation = tmp_path / "evaluation"
    (evaluation / "deep").mkdir(parents=True)
    for number in range(20, 24):
        large = Image.fromarray(scene(number)).resize((320, 320), Image.Resampling.BICUBIC)
        large.save(evaluation / "deep" / f"{number}.png")
    scenes.clear()
    near_other = "committed" if perceptual is None else "duplicate_of_other"
    for number in range(6):
        scenes.add(f"/other/{number}.png", scene(number), "duplicate_of_other")
        scenes.add(f"/near/{number}.png", altered(scene(number), rng, "encode"), near_other)
    for number in range(20, 24):
        scenes.add(f"/test/{number}.png", scene(number), "contaminated_image")
        scenes.add(
            f"/test-like/{number}.png", altered(scene(number), rng, "crop"), "contaminated_image"
        )
    for number in range(5):
        scenes.add(f"/gone/{number}.png", scene(40), "placeholder")
        # As often, and of one caption: no placeholder, but copies.
        ends = "committed" if number == 0 else "duplicate_image"
        scenes.add(f"/popular/{number}.png", scene(41), ends, caption="a popular picture")
    for number in range(50, 56):
        scenes.add(f"/clean/{number}.png", scene(number), "committed")
    config = scenes.config(
        duplicates={
            "perceptual": perceptual,
            "against": [first.manifest_uri],
            "placeholder_captions": 5,
        },
        decontaminate={"images": [str(evaluation)]},
    )
    second = curate("second", config, store, lambda: spark)
    found = ends_of(second.manifest_uri)
    popular = [url for url in found if "/popular/" in url]
    assert sorted(found[url] for url in popular) == ["committed"] + ["duplicate_image"] * 4
    for url, ends in scenes.expected.items():
        if url not in popular:
            assert found[url] == ends, url
    manifest = load_manifest(second.manifest_uri)
    assert manifest.attributes["against"] == [first.version]
    assert len(manifest.attributes["evaluation_images_sha256"]) == 64
    assert manifest.rejected["placeholder"] == 5
    again = curate("second", config, store, lambda: spark)
    assert (again.decision, again.version) == ("SKIP", second.version)
    # Another evaluation set is another build; the same one elsewhere is not.
    evaluation.rename(tmp_path / "moved")
    moved = config.model_copy(
        update={"decontaminate": DecontaminationConfig(images=[str(tmp_path / "moved")])}
    )
    assert plan_curation("second", moved, store).decision == "SKIP"
    Image.fromarray(scene(60)).save(tmp_path / "moved" / "new.png")
    assert plan_curation("second", moved, store).decision != "SKIP"


@pytest.mark.slow
def test_a_version_s_signatures_come_with_its_samples(
    tmp_path: Path, evil_web: EvilWeb, spark: SparkSession
) -> None:
    """Half of a wide picture is stored; its signature is of the whole."""
    store = (tmp_path / "store").as_uri()
    scenes = SceneWorld(tmp_path / "scenes", evil_web)
    wide = np.concatenate([scene(1), scene(2)], axis=1)
    scenes.add("/wide.png", scene(1), "committed")
    image = Image.fromarray(wide).resize((640, 320), Image.Resampling.BICUBIC)
    evil_web.route("/wide.png", response(encoded(image, "PNG")))
    signed = curate("signed", scenes.config(duplicates={"perceptual": {}}), store, lambda: spark)
    plain = curate("plain", scenes.config(), store, lambda: spark)
    config = scenes.config(duplicates={"perceptual": {}, "against": [signed.manifest_uri]})
    (reference,) = find_references(config)
    (row,) = read_reference(reference).to_pylist()
    assert row["signature"] == signature(np.asarray(image))
    data = storage.read_bytes(reference.uri)
    ((key, members),) = read_shard(data)
    assert row["rank"] == f"!1-{key}"
    assert row["sha256"] == json.loads(members["json"])["sha256"]
    config = scenes.config(duplicates={"perceptual": {}, "against": [plain.manifest_uri]})
    (row,) = read_reference(find_references(config)[0]).to_pylist()
    assert row["signature"] not in (None, signature(np.asarray(image)))


def test_what_is_no_set_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for address in ("empty", "nowhere"):
        asked = DecontaminationConfig(images=[str(tmp_path / address)])
        with pytest.raises(UserError, match=r"decontaminate\.images"):
            references_part(DuplicateConfig(), asked)
    nowhere = DuplicateConfig(against=[str(tmp_path / "manifest.json")])
    with pytest.raises(UserError, match=r"version's manifest\.json"):
        references_part(nowhere, DecontaminationConfig())
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n and no more")
    config = CurationConfig(
        metadata=["x"], decontaminate=DecontaminationConfig(images=[str(tmp_path / "broken.png")])
    )
    (reference,) = find_references(config)
    with pytest.raises(UserError, match=r"broken\.png"):
        read_reference(reference)
    assert references_part(DuplicateConfig(), DecontaminationConfig()) == {}
