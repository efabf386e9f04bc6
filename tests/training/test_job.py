from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import pytest
from pydantic import BaseModel

from training.config import NetworkConfig, StageConfig, TextEncoderConfig, TokenizerConfig
from training.job import Job
from training.parts import FOLDER_FIELDS, with_whole_paths


def test_the_drivers_dictionary_is_understood() -> None:
    raw = {
        "recipe": "demo",
        "stage": "concepts",
        "kind": "masked",
        "run_uri": "file:///store/runs/concepts-k",
        "stage_key": "k",
        "run_name": "concepts-k",
        "attempt": 2,
        "configs": {},
        "store_uri": "file:///store",
        "manifest_uri": "file:///m",
        "manifest_sha256": "s",
        "init_uri": None,
        "init_sha256": None,
        "progress_uri": "file:///p",
        "tracking_uri": "http://localhost:1",
        "mlflow_run_id": "r",
    }
    job = Job.parse(raw)
    assert (job.kind, job.manifest_sha256, job.cpus) == ("masked", "s", None)


def test_a_worker_finds_folders_wherever_it_stands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    configs = {
        "tokenizer": {"pretrained": "models/vqvae", "pretrained_bpe": "s3://parts/bpe", "seed": 1},
        "text_encoder": {"pretrained": "/parts/clip"},
        "stage": {"init": {"pretrained": "models/transformer"}, "dataset": "models"},
        "network": {},
    }
    assert with_whole_paths(configs) == {
        "tokenizer": {
            "pretrained": str(tmp_path / "models" / "vqvae"),
            "pretrained_bpe": "s3://parts/bpe",
            "seed": 1,
        },
        "text_encoder": {"pretrained": "/parts/clip"},
        "stage": {
            "init": {"pretrained": str(tmp_path / "models" / "transformer")},
            "dataset": "models",
        },
        "network": {},
    }
    assert configs["text_encoder"] == {"pretrained": "/parts/clip"}


def _fields_with_folders(model: type[BaseModel]) -> set[str]:
    found: set[str] = set()
    for name, field in model.model_fields.items():
        if "folder (path or URI)" in (field.description or ""):
            found.add(name)
        for kind in (field.annotation, *get_args(field.annotation)):
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                found |= _fields_with_folders(kind)
    return found


def test_every_folder_of_a_recipe_is_meant() -> None:
    models: tuple[Any, ...] = (TokenizerConfig, TextEncoderConfig, NetworkConfig, StageConfig)
    assert set().union(*map(_fields_with_folders, models)) == set(FOLDER_FIELDS)
