"""Versions that a registered model, a run or another version refers to stay; others may go."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from app.cli import app
from app.status import DONE, RunStatus, StatusFile, StepStatus
from infra import storage
from infra.manifest import publish_manifest
from infra.tracking_server import TrackingServer
from tests.pipelines.test_report import ledger_rows, published
from training.versions import (
    TAG_DATASET,
    TAG_SHA256,
    TAG_STAGE_KEY,
    create_registered_model,
    create_version,
)


def test_only_versions_that_nobody_refers_to_are_removed(
    server: TrackingServer, mlflow_uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home, store = tmp_path / "home", (tmp_path / "store").as_uri()
    monkeypatch.setenv("ATELIER_HOME", str(home))
    root = storage.join(store, "datasets", "d")
    made = [published(root, tmp_path, [ledger_rows(n)], b"no image") for n in (10, 20, 30, 40)]
    parent, forgotten, of_run, _ = [manifest.version for _, manifest in made]
    parents = [{"dataset": "d", "version": parent}]
    child = dataclasses.replace(made[3][1], parents=parents)
    publish_manifest(root, child)
    unparented = made[3][1].version

    create_registered_model(server, "references")
    run = server.create_run(server.experiment_id("references"), "references", {})
    tags = {TAG_STAGE_KEY: "k" * 64, TAG_SHA256: "a" * 64, TAG_DATASET: child.version}
    create_version(server, "references", f"{store}/models/x", run.run_id, tags)
    step = StepStatus(
        "curate:d", "dataset", DONE, dataset_version=of_run,
        manifest_uri=storage.join(root, of_run, "manifest.json"),
    )  # fmt: skip
    status = RunStatus(
        "r1", "recipe", "recipe.yaml", "0" * 64, "atelier run recipe.yaml", 1, "t", "t", DONE,
        store_uri=store, mlflow_uri=mlflow_uri, steps=[step],
    )  # fmt: skip
    services = {"store_uri": store, "tracking_uri": mlflow_uri}
    StatusFile.create(home, status, {"services": services})

    for options in ([], ["--gc"]):
        command = ["clean", "--store", store, "--versions", "--json", *options]
        done = CliRunner().invoke(app, command)
        assert done.exit_code == 0, done.output
        (told,) = json.loads(done.output)["datasets"]
        assert told["versions"] == sorted([forgotten, unparented])
    left = {
        info.uri.rsplit("/", 2)[1]
        for info in storage.list_objects(root)
        if info.uri.endswith("/manifest.json")
    }
    assert left == {parent, of_run, child.version}
    done = CliRunner().invoke(app, ["clean", "--store", store, "--versions", "--json"])
    assert json.loads(done.output)["datasets"][0]["versions"] == []
