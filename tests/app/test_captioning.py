"""Caption as a person does, on a painted world and a server that answers like one."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from infra.manifest import verify_dataset
from tests.conftest import Home
from tests.pipelines.captions.conftest import KEY, CaptionServer, caption_server

__all__ = ["caption_server"]


def write_recipe(path: Path, server: CaptionServer) -> Path:
    recipe = {
        "name": "small",
        "world": {"num_rows": 120, "trap_ratio": 0.1},
        "datasets": {
            "painted": {
                "metadata": ["{world}/metadata/*.parquet"],
                "fetch": {"total_deadline_seconds": 10, "backoff_seconds": 0.1},
                "resize": {"image_size_px": 64},
                "captions": {"token_budget": 24},
                "partitions": 2,
            }
        },
        "derived": {"told": {"dataset": "painted", "caption": True}},
        "captioning": {
            "endpoint": {"url": server.url, "model": "captioner", "api_key_env": "CAPTION_KEY"}
        },
    }
    path.write_text(yaml.safe_dump(recipe))
    return path


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_trial_then_a_version(
    tmp_path: Path, caption_server: CaptionServer, new_home: Callable[[Path], Home]
) -> None:
    home = new_home(tmp_path / "home")
    recipe = str(write_recipe(tmp_path / "recipe.yaml", caption_server))

    def atelier(*arguments: str) -> Any:
        done = home.atelier(*arguments, "--json", CAPTION_KEY=KEY)
        assert done.returncode == 0, done.stdout + done.stderr
        assert KEY not in done.stdout + done.stderr
        return json.loads(done.stdout)

    try:
        home.refuses(["caption", recipe], "run `atelier curate`", CAPTION_KEY=KEY)
        atelier("curate", recipe)
        home.refuses(["caption", recipe], "environment variable CAPTION_KEY", CAPTION_KEY="")
        (tried,) = atelier("caption", recipe, "--limit", "3")["datasets"]
        assert len(tried["trial"]) == 3
        assert all(row["text"].startswith("Coloured tiles") for row in tried["trial"])
        assert all(row["alt"] for row in tried["trial"])
        shown = home.atelier("caption", recipe, "--limit", "3", CAPTION_KEY=KEY).stdout
        assert "alt text" in shown
        assert "completion tokens" in shown
        assert caption_server.requests.total() == 3
        (made,) = atelier("caption", recipe)["datasets"]
        total = made["counts"]["taken"]
        assert caption_server.requests.total() == total
        assert tried["estimate"]["prompt_tokens"] == 700 * total
        assert made["tokens"] == {"prompt_tokens": 700 * total, "completion_tokens": 40 * total}
        assert atelier("caption", recipe)["datasets"] == [made]
        assert verify_dataset_at(home, made["version"]) == []
        for decision in ("RUN", "SKIP"):  # as a derived dataset of the recipe, the same version
            step = atelier("run", recipe)["steps"][-1]
            assert (step["name"], step["decision"]) == ("derive:told", decision)
            assert step["dataset_version"] == made["version"]
        assert caption_server.requests.total() == total
        stored = [path for path in home.path.rglob("*") if path.is_file()]
        assert not [path for path in stored if KEY.encode() in path.read_bytes()]
    finally:
        home.atelier("down")


def verify_dataset_at(home: Home, version: str) -> list[str]:
    path = home.stored(f"datasets/painted/{version}/manifest.json")
    return verify_dataset(path.as_uri())
