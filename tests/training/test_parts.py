"""Folders of published parts: known by their bytes, wherever they lie and whenever they change."""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path

import pytest

from infra import storage
from infra.config import atelier_home
from infra.errors import UserError
from training.initial import part_folder
from training.parts import find_parts, folder_digest, with_digests


@pytest.fixture(autouse=True)
def _home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATELIER_HOME", str(tmp_path / "home"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder like a published one, with what no model is read from beside it."""
    folder = tmp_path / "models" / "transformer"
    (folder / "pictures.json").mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "diffusion_pytorch_model.safetensors").write_bytes(b"weights")
    (folder / "README.md").write_text("words")
    (folder / "pictures.json" / "a.json").write_text("{}")
    return folder


def _configs(address: str) -> dict[str, object]:
    return {"stage": {"init": {"pretrained": address}, "seed": 1}, "network": {"layers": 2}}


def test_the_same_bytes_have_the_same_key_wherever_they_lie(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    moved = shutil.copytree(folder, tmp_path / "else where")
    monkeypatch.chdir(tmp_path)
    for address in (str(folder), "models/transformer", "models/transformer/", str(moved)):
        (found,) = find_parts(_configs(address))
        assert (found.field, found.address) == ("stage.init.pretrained", address)
        assert with_digests(_configs(address), (found,)) == _configs(folder_digest(str(folder)))
    assert find_parts({"stage": {"init": {"pretrained": None}}}) == ()


def test_other_bytes_at_the_same_place_are_told(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage, "LOCAL_CLOCK_NS", 0)  # what was just written is remembered too
    weights = folder / "diffusion_pytorch_model.safetensors"
    seen = [folder_digest(str(folder))]
    time.sleep(0.05)  # a tick of the file system's clock
    assert folder_digest(str(folder)) == seen[0]
    stat = weights.stat()
    weights.write_bytes(b"WEIGHTS")  # of the same size and, as it says, of the same time
    os.utime(weights, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    seen.append(folder_digest(str(folder)))
    weights.rename(folder / "model.safetensors")
    seen.append(folder_digest(str(folder)))
    (folder / "config.json").write_text("{ }")
    seen.append(folder_digest(str(folder)))
    (folder / "README.md").write_text("other words")
    (folder / "pictures.json" / "a.json").write_text("[]")
    assert folder_digest(str(folder)) == seen[-1]
    assert len(set(seen)) == 4


def test_what_was_read_once_is_not_read_again(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage, "LOCAL_CLOCK_NS", 0)
    digest = folder_digest(str(folder))
    read: list[str] = []
    open_stream = storage.open_stream

    def counted(uri: str) -> object:
        if "/cache/" not in uri:
            read.append(uri)
        return open_stream(uri)

    monkeypatch.setattr(storage, "open_stream", counted)
    assert folder_digest(str(folder)) == digest
    assert read == []
    for note in (atelier_home() / "cache" / "parts").iterdir():
        note.write_text("no note")
    assert folder_digest(str(folder)) == digest
    assert len(read) == 2


@pytest.mark.parametrize("name", ["nowhere", "models"])
def test_a_folder_without_a_model_is_refused(folder: Path, tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError) as told:
        find_parts(_configs(str(tmp_path / name)))
    for part in (str(tmp_path / name), "stage.init.pretrained", "correct the path"):
        assert part in str(told.value)


def test_a_worker_takes_nothing_but_what_was_planned(folder: Path) -> None:
    planned = {str(folder): folder_digest(str(folder))}
    assert part_folder(str(folder), planned) == folder
    (folder / "config.json").write_text("{ }")
    with pytest.raises(UserError, match="as it was planned"):
        part_folder(str(folder), planned)
