"""From a published checkpoint back to the dataset; whatever was tampered with is told."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from infra import storage
from infra.errors import UserError
from infra.manifest import load_manifest
from training.lineage import trace
from training.publish import publish_folder

STAGES = ("tokenizer", "concepts", "alignment")


@pytest.fixture
def chain(tmp_path: Path, curated: Callable[..., str]) -> dict[str, str]:
    """Stage -> the address of its checkpoint, each made from the one before."""
    manifest_uri = curated([[(32, 32)] * 3])
    dataset = {
        "name": "toy",
        "version": load_manifest(manifest_uri).version,
        "manifest_uri": manifest_uri,
    }
    uris: dict[str, str] = {"manifest": manifest_uri}
    parent: dict[str, Any] | None = None
    for number, stage in enumerate(STAGES):
        folder = tmp_path / "exports" / stage
        folder.mkdir(parents=True)
        (folder / "weights").write_text(stage)
        facts = {
            "stage": stage,
            "step": 10 * number,
            "stage_key": "k" * 64,
            "parent": parent,
            "dataset": dataset,
            "init": {"source": "parent", "num_inherited": 7, "new_keys": ["a"]},
            "starts": [{"attempt": 1, "how": "INIT"}],
            "metrics": {"final_loss": 1.0},
        }
        published = publish_folder(folder, (tmp_path / "store").as_uri(), stage, facts)
        uris[stage] = published.uri
        parent = {"stage": stage, "uri": published.uri, "sha256": published.sha256}
    return uris


def store_of(chain: dict[str, str]) -> str:
    return chain["tokenizer"].partition("/models/")[0]


def test_the_whole_way_back(chain: dict[str, str]) -> None:
    found = trace(chain["alignment"], store_of(chain), verify=True)
    assert found.problems == []
    assert [stage.stage for stage in found.stages] == ["alignment", "concepts", "tokenizer"]
    newest = found.stages[0]
    assert (newest.step, newest.init["new_keys"], newest.starts[0]["how"]) == (20, ["a"], "INIT")
    assert newest.dataset is not None
    assert newest.dataset.num_samples == 3
    assert found.to_json()["stages"][2]["dataset"]["name"] == "toy"


def path_of(uri: str, name: str) -> Path:
    return Path(storage.join(uri, name).removeprefix("file://"))


def damage(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


@pytest.mark.parametrize(
    ("stage", "name", "needs_verify"),
    [
        ("concepts", "weights", True),
        ("concepts", "CHECKPOINT.json", False),
        ("tokenizer", "CHECKPOINT.json", False),
        ("manifest", "", False),
    ],
)
def test_tampering_is_a_problem(
    chain: dict[str, str], stage: str, name: str, needs_verify: bool
) -> None:
    path = path_of(chain[stage], name) if name else Path(chain[stage].removeprefix("file://"))
    damage(path)
    found = trace(chain["alignment"], store_of(chain), verify=needs_verify)
    assert found.problems
    assert all("\n" not in problem for problem in found.problems)


def test_provenance_that_was_rewritten_is_refused(chain: dict[str, str]) -> None:
    damage(path_of(chain["alignment"], "provenance.json"))
    with pytest.raises(UserError, match=r"provenance\.json is damaged"):
        trace(chain["alignment"], store_of(chain))


def test_a_lost_parent_is_told_and_what_is_there_is_shown(chain: dict[str, str]) -> None:
    storage.delete_prefix(chain["concepts"])
    found = trace(chain["alignment"], store_of(chain))
    assert [stage.stage for stage in found.stages] == ["alignment"]
    assert found.problems[0].startswith("stage concepts: no object at")
