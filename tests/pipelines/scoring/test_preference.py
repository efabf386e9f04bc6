"""Preference scores by a model: what is written, what stays, and what makes a version anew."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
from PIL import Image

from infra import storage
from infra.manifest import load_manifest, verify_dataset
from pipelines.clip_model import encoder_of, identify
from pipelines.derived import Sections, make_derived, plan_derived
from pipelines.preference import PreferenceJob
from pipelines.scoring_config import ClipConfig, DerivedConfig, ModelPreferenceConfig
from tests.pipelines.scoring.by_hand import derived_version, ledger_of, samples_of, scored
from tests.pipelines.scoring.conftest import PREPROCESS_CFG


def chosen(folder: Path, **options: Any) -> ModelPreferenceConfig:
    return ModelPreferenceConfig(clip=ClipConfig(folder=str(folder), batch_size=8), **options)


@pytest.mark.parametrize("unknown", [None, 21.5])
def test_every_sample_has_the_models_cosine_with_its_caption(
    new_dataset: Callable[..., Any], clip_folder: Path, direct: Any,
    tmp_path: Path, home: Path, unknown: float | None,
) -> None:  # fmt: skip
    dataset = new_dataset(tmp_path.as_uri(), broken=[2])
    found = scored(dataset, clip_folder, [], tmp_path)
    config = chosen(clip_folder, scale=50.0, offset=1.0, unknown=unknown)
    manifest = derived_version(PreferenceJob(dataset.root, dataset.manifest, found.scores, config))

    before, after = samples_of(dataset.root, dataset.manifest), samples_of(dataset.root, manifest)
    assert list(after) == list(before)
    whole = [key for key in after if dataset.scores[key]["number"] != 2]
    images, texts = direct(
        clip_folder,
        [dataset.images[key] for key in whole],
        [dataset.captions[key] for key in whole],
    )
    expected = dict(zip(whole, 1.0 + 50.0 * (images * texts).sum(axis=1), strict=True))
    for key, members in after.items():
        known, old = json.loads(members["json"]), json.loads(before[key]["json"])
        score = known.pop("preference_score")
        old.pop("preference_score")
        assert score == (pytest.approx(expected[key], abs=0.1) if key in expected else unknown)
        assert known.pop("score_models") == {
            "preference_score": {
                "model": found.scores.model_key, "scale": 50.0, "offset": 1.0, "unknown": unknown,
            }
        }  # fmt: skip
        assert known == old
        assert {**members, "json": b""} == {**before[key], "json": b""}
    assert len({json.loads(members["json"])["preference_score"] for members in after.values()}) > 9

    assert verify_dataset(storage.join(dataset.root, manifest.version, "manifest.json")) == []
    assert manifest.counts == dataset.manifest.counts
    rows = [
        ledger_of(dataset.root, each).sort("sample_id") for each in (dataset.manifest, manifest)
    ]
    assert rows[0].drop("shard").equals(rows[1].drop("shard"))
    assert set(rows[1]["shard"].drop_nulls()) == {shard.path for shard in manifest.shards}
    (step,) = manifest.attributes["derivations"]
    assert (step["kind"], step["model"]) == ("preference", found.scores.model_key)


def test_an_image_that_is_padded_and_not_cropped_is_prepared_so(
    new_clip: Callable[..., Path], tmp_path: Path, home: Path
) -> None:
    """HPS v2 shows its network the whole image, with black beside it."""
    folder = new_clip(tmp_path / "model")
    path = folder / "open_clip_config.json"
    described = json.loads(path.read_text())
    described["preprocess_cfg"]["resize_mode"] = "longest"
    path.write_text(json.dumps(described))
    identity, weights = identify(ClipConfig(folder=str(folder)))
    wide = Image.new("RGB", (64, 32), (255, 255, 255))
    made = encoder_of(identity, weights).prepare(wide).numpy()
    mean, std = (np.array(PREPROCESS_CFG[name])[:, None, None] for name in ("mean", "std"))
    levels = made * std + mean
    np.testing.assert_allclose(levels[:, 8:24], 1.0, atol=1e-6)
    np.testing.assert_allclose(levels[:, [*range(8), *range(24, 32)]], 0.0, atol=1e-6)


def test_what_a_version_depends_on(
    new_dataset: Callable[..., Any], clip_folder: Path, new_clip: Callable[..., Path],
    tmp_path: Path, home: Path,
) -> None:  # fmt: skip
    uri = new_dataset(tmp_path.as_uri()).manifest_uri

    def key(folder: Path, **options: Any) -> str:
        config = DerivedConfig(dataset="small", preference=chosen(folder, **options))
        return plan_derived(uri, Sections(), config).key

    moved = tmp_path / "elsewhere"
    shutil.copytree(clip_folder, moved)
    assert key(moved) == key(clip_folder)
    keys = [
        key(clip_folder), key(clip_folder, scale=1.0), key(clip_folder, offset=1.0),
        key(clip_folder, unknown=0.0), key(new_clip(tmp_path / "other", seed=1)),
    ]  # fmt: skip
    assert len(set(keys)) == len(keys)


@pytest.mark.slow
def test_spark_makes_it_after_the_rest_and_once(
    new_dataset: Callable[..., Any], clip_folder: Path, spark: Any, s3_server: Any
) -> None:
    dataset = new_dataset(f"{s3_server.store_uri}/liked", num_samples=20, copies=[(3, 4)])
    config = DerivedConfig.model_validate(
        {"dataset": "small", "preference": chosen(clip_folder).model_dump(), "prune": {}}
    )
    environment = s3_server.environment
    asked = Mock(side_effect=spark)

    def bars(what: str, total: int, unit: str) -> Any:
        return nullcontext(Mock())

    plan = plan_derived(dataset.manifest_uri, Sections(), config)
    assert plan.decision == "RUN"
    uri, manifest = make_derived(plan, Sections(), config, asked, bars, environment)
    assert load_manifest(uri).version == manifest.version
    steps = [step["kind"] for step in manifest.attributes["derivations"]]
    assert steps[-1] == "preference"
    scores = [
        json.loads(members["json"])["preference_score"]
        for members in samples_of(dataset.root, manifest).values()
    ]
    assert len(set(scores)) == manifest.counts["committed"]
    assert asked.called
    again = plan_derived(dataset.manifest_uri, Sections(), config)
    assert (again.decision, again.version) == ("SKIP", manifest.version)
