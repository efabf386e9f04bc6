"""Verbs about stored things mean the store that their home's runs stored in, on a machine whose own
store has the very same address: two S3 servers, the one on loopback of a home and "production"."""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import yaml
from typer.testing import CliRunner

from app.cli import app
from app.place import place_of
from app.status import DONE, RunStatus, StatusFile, StepStatus
from infra import storage
from infra.errors import UserError
from infra.manifest import load_manifest
from infra.tracking_server import TrackingServer
from tests.conftest import Home, S3Server
from tests.pipelines.test_report import ledger_rows, published
from training.publish import publish_folder
from training.versions import (
    TAG_DATASET,
    TAG_SHA256,
    TAG_STAGE_KEY,
    create_registered_model,
    create_version,
)

STORE = "s3://atelier"  # of both servers


@dataclass
class Production:
    """A store on a server of its own with two versions of a dataset, a checkpoint, and the home of
    the run that made them."""

    home: Path
    recipe: str
    versions: list[str]
    checkpoint: str

    @property
    def manifest(self) -> str:
        return f"{STORE}/datasets/d/{self.versions[1]}/manifest.json"


def record(
    home: Path, recipe: str, run_id: str, services: dict[str, str], steps: list[StepStatus]
) -> None:
    status = RunStatus(
        run_id, recipe, "recipe.yaml", "0" * 64, "atelier run recipe.yaml", 1, "t", "t", DONE,
        store_uri=services.get("store_uri"), mlflow_uri=services.get("tracking_uri"), steps=steps,
    )  # fmt: skip
    StatusFile.create(home, status, {"services": services or None})


def registered(server: TrackingServer, name: str, checkpoint: str, version: str) -> None:
    create_registered_model(server, name)
    run = server.create_run(server.experiment_id(name), name, {})
    tags = {TAG_STAGE_KEY: "k" * 64, TAG_SHA256: "a" * 64, TAG_DATASET: version}
    create_version(server, name, checkpoint, run.run_id, tags)


@pytest.fixture
def production(
    own_s3_server: S3Server, server: TrackingServer, mlflow_uri: str, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[Production]:  # fmt: skip
    home = tmp_path / "home"
    monkeypatch.setenv("ATELIER_HOME", str(home))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")  # the record's is meant
    root = f"{STORE}/datasets/d"
    made = [published(root, tmp_path, [ledger_rows(n)], b"no image")[1] for n in (11, 21)]
    versions = [manifest.version for manifest in made]
    manifest_uri = f"{root}/{versions[1]}/manifest.json"
    (tmp_path / "export").mkdir()
    (tmp_path / "export" / "weights").write_text("w")
    dataset = {"name": "d", "version": versions[1], "manifest_uri": manifest_uri}
    facts = {"stage": "s", "step": 1, "stage_key": "k" * 64, "parent": None, "dataset": dataset}
    checkpoint = publish_folder(tmp_path / "export", STORE, "s", facts).uri
    recipe = f"recipe-{secrets.token_hex(4)}"
    registered(server, f"{recipe}-s", checkpoint, versions[1])
    steps = [
        StepStatus("curate:d", "dataset", DONE, dataset_version=versions[1],
                   manifest_uri=manifest_uri),
        StepStatus("s", "stage", DONE, checkpoint_uri=checkpoint,
                   checkpoint_sha256=checkpoint.rpartition("/")[2]),
    ]  # fmt: skip
    record(home, recipe, "r1", {"store_uri": STORE, "tracking_uri": mlflow_uri}, steps)
    keys = {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
    yield Production(home, recipe, versions, checkpoint)
    assert {k: v for k, v in os.environ.items() if k.startswith("AWS_")} == keys
    assert not (home / "services").exists(), "this machine's own services were started"


def told(*arguments: str, returns: int = 0) -> Any:
    done = CliRunner().invoke(app, [*arguments, "--json"])
    assert done.exit_code == returns, done.output
    return json.loads(done.stdout)


def test_every_verb_finds_what_the_newest_run_stored(production: Production) -> None:
    old, new = (f"d/{version[:12]}" for version in production.versions)
    assert told("verify")["ok"]
    assert told("verify", production.manifest)["ok"]
    for store in ([], ["--store", STORE], ["--store", f"{STORE}/"]):
        assert told("report", "d", *store)["version"] == production.versions[1]
        assert told("repair", new, *store)["version"] == production.versions[1]
        assert told("diff", old, new, *store)["added"] == 4
        (cleaned,) = told("clean", "--versions", *store)["datasets"]
        assert cleaned["versions"] == [production.versions[0]]  # a model refers to the other
        assert STORE in told("search", "a fox", *store, returns=1)["error"][0]
    assert told("diff", old, production.manifest)["added"] == 4
    for target in ([], [production.checkpoint], ["s/1"]):
        (stage,) = told("lineage", *target)["stages"]
        assert stage["dataset"]["version"] == production.versions[1]
    assert len(told("promote", "s")["versions"]) == 1


def test_credentials_that_are_given_decide_before_a_record_of_own_services(
    production: Production, mlflow_uri: str
) -> None:
    record(
        production.home, production.recipe, "r2", {}, []
    )  # the newest run was in this machine's own services
    place = place_of(STORE)
    assert (place.store_uri, place.tracking_uri, place.is_local) == (STORE, mlflow_uri, False)
    assert told("report", "d", "--store", STORE, returns=1)["error"]  # two versions, none the run's
    assert told("verify", production.manifest)["ok"]


def test_a_store_that_no_run_here_knows_has_the_environments_mlflow(
    production: Production, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://mlflow.example:5000")
    for address, store in (
        ("s3://other/team", "s3://other/team"),
        (f"s3://other/team/datasets/d/{'a' * 64}/manifest.json", "s3://other/team"),
        (f"s3://other/models/s/{'a' * 64}", "s3://other"),
        (f"{STORE}/team", f"{STORE}/team"),
    ):
        place = place_of(address)
        assert (place.store_uri, place.is_local, place.is_recorded) == (store, False, False)
        assert place.tracking_uri == "http://mlflow.example:5000"
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    with pytest.raises(UserError, match=r"s3://other/team.*set MLFLOW_TRACKING_URI"):
        _ = place_of("s3://other/team").server
    empty = (production.home / "store").as_uri()
    for verb in (["takedown", "--url", "http://a.example/1.jpg"], ["clean"]):
        (line,) = told(*verb, "--store", empty, returns=1)["error"]
        assert line.startswith(f"expected a dataset in {empty}; got none; name the store")


def test_steps_of_another_store_are_not_what_was_made_here(production: Production) -> None:
    services = {"store_uri": "s3://atelier/new", "tracking_uri": "http://127.0.0.1:9"}
    record(production.home, production.recipe, "r2", services, [])
    assert "nothing to verify yet" in told("verify", returns=1)["error"][0]


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_takedown_is_carried_out_where_the_data_is(
    own_s3_server: S3Server, server: TrackingServer, mlflow_uri: str, tmp_path: Path,
    new_home: Callable[[Path], Home],
) -> None:  # fmt: skip
    home = new_home(tmp_path / "home")
    recipes = {}
    dataset = {
        "metadata": ["{world}/metadata/*.parquet"],
        "fetch": {"total_deadline_seconds": 10, "backoff_seconds": 0.1},
        "resize": {"image_size_px": 64},
        "partitions": 1,
    }
    for name, services in (
        ("own", None), ("production", {"store_uri": STORE, "tracking_uri": mlflow_uri})
    ):  # fmt: skip
        recipes[name] = tmp_path / f"{name}.yaml"
        written = {"name": name, "world": {"num_rows": 60, "trap_ratio": 0.1},
                   "datasets": {"painted": dataset}, "services": services or {}}  # fmt: skip
        recipes[name].write_text(yaml.safe_dump(written))
    folders = {"own": home.path / "s3", "production": own_s3_server.folder}

    def stored() -> dict[str, dict[str, int]]:
        return {
            name: {str(path): path.stat().st_size for path in folder.rglob("*") if path.is_file()}
            for name, folder in folders.items()
        }

    def atelier(*arguments: str) -> Any:
        done = home.atelier(*arguments, "--json", **own_s3_server.environment)
        assert done.returncode == 0, done.stdout + done.stderr
        return json.loads(done.stdout)

    try:
        for recipe in recipes.values():
            atelier("curate", str(recipe))
        manifest_uri = home.steps()["curate:painted"]["manifest_uri"]
        manifest = load_manifest(manifest_uri)
        registered(server, "painter", f"{STORE}/models/x", manifest.version)
        root = f"{STORE}/datasets/painted"
        ledgers = [storage.read_bytes(storage.join(root, e.path)) for e in manifest.ledger]
        rows = pl.concat(pl.read_parquet(data) for data in ledgers)
        urls = rows.filter(pl.col("disposition") == "committed")["url"].to_list()

        assert atelier("verify")["ok"]
        before = stored()
        (model,) = atelier("takedown", "--url", urls[0], "--dry-run")["models"]
        assert (model["model"], model["dataset_version"]) == ("painter", manifest.version)
        gone = atelier("takedown", "--url", urls[0])
        assert [each["samples"] for each in gone["datasets"]] == [1]
        assert [each["model"] for each in gone["models"]] == ["painter"]
        assert stored()["own"] == before["own"]
        assert stored()["production"] != before["production"]

        atelier("curate", str(recipes["own"]))  # nothing to do, and the newest run is the own
        before = stored()
        gone = atelier("takedown", "--url", urls[1], "--store", STORE)
        assert [each["samples"] for each in gone["datasets"]] == [1]
        assert stored()["own"] == before["own"]
        before = stored()
        gone = atelier("takedown", "--url", urls[0])
        assert [each["samples"] for each in gone["datasets"]] == [1]
        assert stored()["production"] == before["production"]
        assert stored()["own"] != before["own"]
    finally:
        home.atelier("down")
