"""Score, refilter and search as a person does, on a painted world and a CLIP of random weights."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import yaml

from infra.manifest import load_manifest, verify_dataset

ROOT = Path(__file__).resolve().parent.parent.parent

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

MODEL_CFG = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 64, "patch_size": 8, "head_width": 32},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
}


def make_models(folder: Path) -> dict[str, Any]:
    import torch
    from safetensors.torch import save_file

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import open_clip
    torch.manual_seed(0)
    (folder / "clip").mkdir(parents=True)
    config = {"model_cfg": MODEL_CFG, "preprocess_cfg": {}}
    (folder / "clip" / "open_clip_config.json").write_text(json.dumps(config))
    tensors = {k: v.contiguous() for k, v in open_clip.CLIP(**MODEL_CFG).state_dict().items()}
    save_file(tensors, folder / "clip" / "open_clip_model.safetensors")
    save_file(
        {"weight": torch.randn(1, 32), "bias": torch.tensor([5.0])}, folder / "v1.safetensors"
    )
    head = {"layout": "laion_aesthetic_v1", "weights": str(folder / "v1.safetensors")}
    return {"clip": {"folder": str(folder / "clip")}, "heads": {"aesthetic": head}}


def test_score_refilter_and_search(tmp_path: Path) -> None:
    home = tmp_path / "home"
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        yaml.safe_dump(
            {
                "name": "small",
                "world": {"num_rows": 120, "trap_ratio": 0.1},
                "datasets": {
                    "painted": {
                        "metadata": ["{world}/metadata/*.parquet"],
                        "filters": {"min_aesthetic_score": 4.5},
                        "fetch": {"total_deadline_seconds": 10, "backoff_seconds": 0.1},
                        "resize": {"image_size_px": 64},
                        "partitions": 2,
                    }
                },
                "scoring": make_models(tmp_path / "models"),
                "derived": {"best": {"dataset": "painted", "keep": {"min_aesthetic_score": 5}}},
            }
        )
    )

    def atelier(*arguments: str, returns: int = 0) -> Any:
        done = subprocess.run(
            [sys.executable, "-c", "from app.cli import main; main()", *arguments, "--json"],
            cwd=ROOT,
            env={**os.environ, "ATELIER_HOME": str(home), "PYTHONDONTWRITEBYTECODE": ""},
            capture_output=True, text=True, check=False, timeout=400,
        )  # fmt: skip
        assert done.returncode == returns, done.stdout + done.stderr
        return json.loads(done.stdout)

    try:
        early = atelier("score", str(recipe), returns=1)
        assert "run `atelier curate`" in early["error"][0]
        atelier("curate", str(recipe))
        (scored,) = atelier("score", str(recipe))["datasets"]
        committed = scored["counts"]["samples"]
        assert scored["counts"] == {"samples": committed, "embedded": committed, "failed": 0}
        assert set(scored["models"]) == {"aesthetic_score", "clip_similarity"}
        assert atelier("score", str(recipe))["datasets"][0]["shards_embedded_now"] == 0

        higher = ["--set", "derived.best.keep.min_aesthetic_score=6"]
        (counted,) = atelier("refilter", str(recipe), "--dry-run", *higher)["datasets"]
        assert counted["version"] is None
        assert 0 < counted["funnel"]["committed"] < committed
        (published,) = atelier("refilter", str(recipe), *higher)["datasets"]
        assert published["funnel"]["committed"] == counted["funnel"]["committed"]
        assert published["funnel"]["low_aesthetic_score"] > 0
        (again,) = atelier("refilter", str(recipe), *higher)["datasets"]
        assert again == published
        steps = {step["name"]: step for step in atelier("plan", str(recipe), *higher)["steps"]}
        assert steps["derive:best"]["decision"] == "SKIP"
        assert steps["derive:best"]["inputs"] == {"dataset painted": scored["version"]}
        run = atelier("run", str(recipe), *higher)
        assert [step["decision"] for step in run["steps"]] == ["SKIP"] * 3
        assert run["steps"][2]["dataset_version"] == published["version"]

        found = atelier("search", "a red circle", "-k", "5", "--export", "circles")
        assert len(found["hits"]) == 5
        cosines = [hit["cosine"] for hit in found["hits"]]
        assert cosines == sorted(cosines, reverse=True)
        missing = atelier("search", "a red circle", "--dataset", "other", returns=1)
        assert "run `atelier score RECIPE` first" in missing["error"][0]

        url = found["hits"][0]["url"]
        odd = atelier("takedown", "--domain", "http://a.example/", returns=1)
        assert "a host like a.example" in odd["error"][0]
        dry = atelier("takedown", "--url", url, "--dry-run")["datasets"]
        assert {each["dataset"]: each["samples"] for each in dry} == {"painted": 1, "circles": 1}
        gone = atelier("takedown", "--url", url)
        assert {each["dataset"]: each["samples"] for each in gone["datasets"]} == {
            "painted": 1, "circles": 1,
        }  # fmt: skip
        (rescored,) = atelier("score", str(recipe))["datasets"]
        assert rescored["counts"]["samples"] == committed - 1
        like = found["hits"][1]["sample_id"]
        (near, elsewhere) = sorted(
            atelier("takedown", "--like", like, "--min-similarity", "0.999", "--dry-run")[
                "datasets"
            ],
            key=lambda each: -len(each["near"]),
        )
        assert near["dataset"] == "painted"
        assert near["near"][0]["sample_id"] == like
        assert near["near"][0]["cosine"] == pytest.approx(1, abs=1e-3)
        assert near["samples"] == len(near["near"]) < committed / 2
        assert elsewhere["near"] == []  # it has no embeddings of its own
        stranger = atelier("takedown", "--like", "0" * 32, "--dry-run", returns=1)
        assert "with an embedding" in stranger["error"][0]
        assert rescored["shards_embedded_now"] == 1
        (published,) = atelier("refilter", str(recipe), *higher)["datasets"]
        left = atelier("search", "a red circle", "--dataset", "painted", "-k", "5")["hits"]
        assert url not in {hit["url"] for hit in left}
        assert {hit["sample_id"] for hit in found["hits"][1:]} < {hit["sample_id"] for hit in left}
    finally:
        atelier("down")

    root = home / "s3" / "atelier" / "datasets"
    uri = (root / "painted" / published["version"] / "manifest.json").as_uri()
    assert verify_dataset(uri) == []
    manifest = load_manifest(uri)
    rows = pl.concat(pl.read_parquet(root / "painted" / file.path) for file in manifest.ledger)
    stay = rows.filter(pl.col("disposition") == "committed")
    assert stay.height == manifest.counts["committed"] == published["funnel"]["committed"]
    assert stay["aesthetic_score"].min() >= 6  # type: ignore[operator]
    exported = (root / "circles").glob("*/manifest.json")
    assert [verify_dataset(path.as_uri()) for path in exported] == [[]]
