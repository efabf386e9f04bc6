"""`report`: a version is found as a person calls it, and told when it is not."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from app.cli import app
from infra import storage
from infra.digests import sha256_bytes
from infra.manifest import shard_path
from tests.pipelines.test_report import ledger_rows, published


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("ATELIER_HOME", str(tmp_path / "home"))
    return (tmp_path / "store").as_uri()


@pytest.fixture
def versions(store: str, tmp_path: Path) -> list[str]:
    root = storage.join(store, "datasets", "d")
    found = [published(root, tmp_path, [ledger_rows(n)], b"no image")[0] for n in (10, 20)]
    for uri in found:
        storage.write_bytes(uri.replace("manifest.json", "report.html"), b"old")
    return found


def test_a_report_is_made_again_and_says_where(versions: list[str], store: str) -> None:
    version = versions[0].rsplit("/", 2)[1]
    done = CliRunner().invoke(
        app, ["report", f"d/{version[:10]}", "--store", store, "--card", "--json"]
    )
    assert done.exit_code == 0, done.output
    told = json.loads(done.output)
    assert told["version"] == version
    assert told["card"].startswith("---\n")
    page = storage.read_bytes(told["report"]).decode()
    assert f"Version <code>{version}</code>" in page
    assert "<b>4</b> <span>samples</span>" in page
    assert storage.read_bytes(versions[1].replace("manifest.json", "report.html")) == b"old"


def test_a_page_goes_to_a_file_and_nowhere_else(
    versions: list[str], store: str, tmp_path: Path
) -> None:
    page = tmp_path / "page.html"
    done = CliRunner().invoke(app, ["report", versions[1], "--output", str(page)])
    assert done.exit_code == 0, done.output
    assert "8 samples" in page.read_text()
    assert storage.read_bytes(versions[1].replace("manifest.json", "report.html")) == b"old"
    nowhere = tmp_path / "none" / "page.html"
    done = CliRunner().invoke(app, ["report", versions[1], "--output", str(nowhere)])
    assert done.exit_code == 1
    assert "cannot write" in done.output


@pytest.mark.parametrize(
    ("name", "told"),
    [("e", "a dataset in .*: d; got 'e'"), ("d", "one version of d: d/"), ("d/xyz", "name it so")],
)
def test_a_name_that_is_not_one_version_is_one_line(
    versions: list[str], store: str, name: str, told: str
) -> None:
    done = CliRunner().invoke(app, ["report", name, "--store", store])
    assert done.exit_code == 1
    assert re.search(told, done.output), done.output
    assert len(done.output.strip().splitlines()) == 1


def test_cleaning_says_and_removes_only_when_told(versions: list[str], store: str) -> None:
    root = storage.join(store, "datasets", "d")
    data = b"x" * 2_000_000
    stray = storage.join(root, shard_path(sha256_bytes(data)))  # what a killed attempt leaves
    storage.write_bytes(stray, data)
    for options in ([], ["--gc", "--dry-run"]):
        done = CliRunner().invoke(app, ["clean", "--store", store, *options])
        assert done.exit_code == 0, done.output
        assert "with --gc, 2.0 MB would go" in done.output
        assert storage.exists(stray)
    done = CliRunner().invoke(app, ["clean", "d", "--store", store, "--gc", "--json"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.output)["bytes"] == 2_000_000
    assert not storage.exists(stray)
    assert all(storage.exists(uri) for uri in versions)


def test_versions_are_not_removed_where_the_registry_is_unknown(
    versions: list[str], store: str
) -> None:
    done = CliRunner().invoke(app, ["clean", "--store", store, "--gc", "--versions"])
    assert done.exit_code == 1
    assert "whose registry is known" in done.output
    assert all(storage.exists(uri) for uri in versions)


def test_a_version_that_is_whole_is_said_to_be(store: str, tmp_path: Path) -> None:
    root = storage.join(store, "datasets", "d")
    uri, manifest = published(root, tmp_path, [ledger_rows(10)], b"no image")
    done = CliRunner().invoke(app, ["repair", uri, "--json"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.output)["version"] == manifest.version
    storage.write_bytes(storage.join(root, manifest.ledger[0].path), b"x")
    done = CliRunner().invoke(app, ["repair", "d", "--store", store])
    assert done.exit_code == 1
    assert "atelier run RECIPE --repair" in done.output


def test_versions_are_compared_by_name_and_moves_written(
    versions: list[str], store: str, tmp_path: Path
) -> None:
    moves = tmp_path / "moves.parquet"
    done = CliRunner().invoke(app, ["diff", *versions, "--moves", str(moves)])
    assert done.exit_code == 0, done.output
    assert "samples: 4 added, 0 removed, 0 with another image, 4 as they were" in done.output
    assert "in both: 10 rows, 4 samples (50.0 % of those in either)" in done.output
    assert "4 rows: no row -> committed" in done.output
    assert moves.stat().st_size > 0
    done = CliRunner().invoke(app, ["diff", *versions, "--moves", str(tmp_path / "x" / "y")])
    assert done.exit_code == 1
    assert "make it first" in done.output
