"""A published version loses its copies and what evaluation sets hold, as a curation would have."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from PIL import Image

from infra import storage
from infra.manifest import dataset_root, load_manifest, verify_dataset
from infra.progress import progress
from infra.sessions import ClusterConfig, spark_session, stop_spark
from pipelines.curate import curate
from pipelines.derived import prune
from pipelines.prune import prune_job
from pipelines.scoring_config import DerivedConfig, PruneConfig
from tests.pipelines.alike import altered, scene
from tests.pipelines.conftest import EvilWeb
from tests.pipelines.test_references import SceneWorld, ends_of

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

PROMPT = "a small brown fox resting under a striped umbrella"


def test_a_derived_dataset_asks_for_something() -> None:
    with pytest.raises(ValueError, match="`prune`"):
        DerivedConfig(dataset="x")
    assert DerivedConfig(dataset="x", prune=PruneConfig()).prune is not None


@pytest.fixture(scope="module")
def spark(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[], SparkSession]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ATELIER_HOME", str(tmp_path_factory.mktemp("home")))
        session = spark_session("prune", ClusterConfig(), {})
        yield lambda: session
        stop_spark(session)


@pytest.fixture
def world(tmp_path: Path, evil_web: EvilWeb) -> SceneWorld:
    rng = np.random.default_rng(2)
    scenes = SceneWorld(tmp_path / "scenes", evil_web)
    for number in range(6):
        scenes.add(f"/clean/{number}.png", scene(number), "committed")
        scenes.add(f"/copy/{number}.png", altered(scene(number), rng, "encode"), "near_duplicate")
        scenes.world.rows[-1]["AESTHETIC_SCORE"] = 5.0
    for number in range(20, 23):
        scenes.add(f"/test/{number}.png", scene(number), "contaminated_image")
    for number in range(4):
        scenes.add(f"/gone/{number}.png", scene(40), "placeholder")
    scenes.add("/prompt.png", scene(50), "contaminated", caption=f"{PROMPT}!")
    return scenes


def rules_in(folder: Path) -> dict[str, Any]:
    evaluation = folder / "evaluation"
    evaluation.mkdir()
    for number in range(20, 23):
        large = Image.fromarray(scene(number)).resize((320, 320), Image.Resampling.BICUBIC)
        large.save(evaluation / f"{number}.png")
    (folder / "prompts.txt").write_text(f"{PROMPT}\n")
    return {
        "duplicates": {"perceptual": {}, "placeholder_captions": 4},
        "decontaminate": {
            "images": [str(evaluation)],
            "prompts": [str(folder / "prompts.txt")],
        },
    }


@pytest.mark.slow
@pytest.mark.parametrize("signed", [True, False])
def test_what_a_curation_would_have_left_out_leaves(
    world: SceneWorld, tmp_path: Path, spark: Callable[[], SparkSession], signed: bool
) -> None:
    store = (tmp_path / "store").as_uri()
    rules = rules_in(tmp_path)
    by_curation = curate("ruled", world.config(**rules), store, spark)
    assert ends_of(by_curation.manifest_uri) == world.expected
    known: dict[str, Any] = {"duplicates": {"same_bytes": False}}
    if signed:  # signatures in the samples, as there is an evaluation image that none is like
        Image.fromarray(scene(999)).save(tmp_path / "999.png")
        known["decontaminate"] = {"images": [str(tmp_path / "999.png")]}
    plain = curate("plain", world.config(**known), store, spark)
    parent = load_manifest(plain.manifest_uri)
    config = PruneConfig.model_validate(rules)
    pruned = prune(plain.manifest_uri, config, spark, progress)
    assert verify_dataset(pruned) == []
    assert ends_of(pruned) == world.expected
    manifest = load_manifest(pruned)
    assert manifest.counts["rows_in"] == parent.counts["rows_in"]
    assert manifest.rejected["placeholder"] == 4
    assert prune(plain.manifest_uri, config, spark, progress) == pruned


@pytest.mark.slow
def test_killed_anywhere_the_same_version_comes(
    world: SceneWorld, tmp_path: Path, spark: Callable[[], SparkSession],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    store = (tmp_path / "store").as_uri()
    plain = curate("plain", world.config(duplicates={"same_bytes": False}), store, spark)
    config = PruneConfig.model_validate(rules_in(tmp_path))
    job = prune_job(plain.manifest_uri, config)
    writes = storage.write_json
    seen: list[str] = []

    def stop_at(uri: str, value: Any) -> None:
        writes(uri, value)
        if uri.startswith(job.folder) and uri not in seen:
            seen.append(uri)
            raise KeyboardInterrupt

    monkeypatch.setattr(storage, "write_json", stop_at)
    for _ in range(20):
        try:
            pruned = prune(plain.manifest_uri, config, spark, progress)
            break
        except KeyboardInterrupt:
            continue
    monkeypatch.undo()
    assert seen
    assert ends_of(pruned) == world.expected
    fresh = (tmp_path / "fresh").as_uri()
    again = curate("plain", world.config(duplicates={"same_bytes": False}), fresh, spark)
    assert again.version == plain.version
    elsewhere = prune(again.manifest_uri, config, spark, progress)
    assert load_manifest(elsewhere).to_bytes() == load_manifest(pruned).to_bytes()
    assert dataset_root(elsewhere) != dataset_root(pruned)
