"""Tars that somebody else wrote, with digests that are right: nothing in them gets anywhere."""

from __future__ import annotations

import io
import json
import os
import pickle
import subprocess
import tarfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from infra import storage
from infra.digests import sha256_bytes
from infra.errors import UserError
from infra.manifest import (
    DatasetManifest,
    ShardEntry,
    load_manifest,
    publish_manifest,
    shard_path,
    verify_dataset,
)
from infra.shard_members import BadMember, Inventory
from pipelines.config import CurationConfig, ShardConfig
from pipelines.inputs import check_inputs
from pipelines.shard_sample import first_samples
from pipelines.shards import ShardWriter, read_shard
from training.shards import read_samples

KEY = "a" * 32
OTHER = "b" * 32


def plain(name: str, data: bytes = b"{}") -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    return info, data


def special(name: str, kind: bytes, target: str = "") -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info, b""


def tar_of(members: Iterable[tuple[tarfile.TarInfo, bytes]]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for info, data in members:
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


class Payload:
    """Runs a command when it is unpickled."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (self.command,)


GOOD = [plain(f"{KEY}.jpg", b"jpeg"), plain(f"{KEY}.json"), plain(f"{KEY}.txt", b"text")]
HOSTILE: dict[str, list[tuple[tarfile.TarInfo, bytes]]] = {
    "parent folder": [plain("../../out.jpg")],
    "absolute path": [plain("/tmp/out.jpg")],
    "drive letter": [plain("C:\\out.jpg")],
    "backslashes": [plain("..\\out.jpg")],
    "folder": [plain(f"dir/{OTHER}.jpg")],
    "hidden file": [plain(".bashrc")],
    "nothing before the dot": [plain(".jpg")],
    "no extension": [plain(OTHER)],
    "control character": [plain("b\nb.jpg")],
    "NUL and more": [plain("b\x01b.jpg")],
    "not ASCII": [plain("b\u202eb.jpg")],
    "very long name": [plain("b" * 200 + ".jpg")],
    "symbolic link": [special(f"{OTHER}.txt", tarfile.SYMTYPE, "/etc/passwd")],
    "link to a member": [special(f"{OTHER}.txt", tarfile.LNKTYPE, f"{KEY}.json")],
    "character device": [special(f"{OTHER}.jpg", tarfile.CHRTYPE)],
    "pipe": [special(f"{OTHER}.jpg", tarfile.FIFOTYPE)],
    "folder entry": [special(OTHER, tarfile.DIRTYPE)],
    "pickle": [plain(f"{OTHER}.pkl")],
    "pyd": [plain(f"{OTHER}.pyd")],
    "pth": [plain(f"{OTHER}.pth")],
    "two extensions": [plain(f"{OTHER}.jpg.pyd")],
    "a member twice": [plain(f"{OTHER}.jpg"), plain(f"{OTHER}.jpg", b"another")],
    "a sample in two places": [
        plain(f"{OTHER}.jpg"), plain(f"{OTHER}.json"), plain("cc.jpg"), plain("cc.json"),
        plain(f"{OTHER}.txt"),
    ],
}  # fmt: skip


def published(root: str, data: bytes, num_samples: int) -> str:
    entry = ShardEntry(shard_path(sha256_bytes(data)), len(data), sha256_bytes(data), num_samples)
    storage.write_bytes(storage.join(root, entry.path), data)
    counts = {"rows_in": num_samples, "committed": num_samples, "rejected": 0, "failed": 0}
    return publish_manifest(root, DatasetManifest("d", "f" * 64, [entry], [], counts))


def consumers(data: bytes, uri: str, folder: Path) -> list[Callable[[], Any]]:
    """All that reads shards."""
    path = folder / "shard.tar"
    path.write_bytes(data)
    root, entry = uri.rsplit("/", 2)[0], load_manifest(uri).shards[0]
    return [
        lambda: dict(read_shard(data)),
        lambda: dict(first_samples(root, entry)),
        lambda: list(read_samples(path)),
    ]


def tree(folder: Path) -> set[str]:
    return {path.as_posix() for path in folder.rglob("*")}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_member_is_named_by_verify_and_stops_every_reader(
    tmp_path: Path, name: str
) -> None:
    data = tar_of([*GOOD, *HOSTILE[name]])
    uri = published((tmp_path / "datasets" / "d").as_uri(), data, 2)
    readers = consumers(data, uri, tmp_path)
    before = tree(tmp_path)
    assert [line for line in verify_dataset(uri) if "member" in line or "two places" in line]
    for read in readers:
        with pytest.raises(BadMember) as caught:
            read()
        assert "\n" not in str(caught.value)
    assert tree(tmp_path) == before


def test_plain_members_are_read_by_every_reader(tmp_path: Path) -> None:
    data = tar_of(GOOD)
    uri = published((tmp_path / "datasets" / "d").as_uri(), data, 1)
    assert verify_dataset(uri) == []
    samples = {KEY: {"jpg": b"jpeg", "json": b"{}", "txt": b"text"}}
    assert [read() for read in consumers(data, uri, tmp_path)] == [
        samples, samples, [({}, b"jpeg")],
    ]  # fmt: skip


def test_a_sample_without_its_image_is_no_sample_to_train_on(tmp_path: Path) -> None:
    (tmp_path / "shard.tar").write_bytes(tar_of([*GOOD, plain(f"{OTHER}.json")]))
    with pytest.raises(UserError, match=f"an image and its json for sample {OTHER}; got json"):
        list(read_samples(tmp_path / "shard.tar"))


@pytest.mark.parametrize("extension", ["pkl", "pickle", "pyd", "pth", "npy", "json", "txt", "jpg"])
def test_a_pickle_is_never_loaded_whatever_it_is_called(tmp_path: Path, extension: str) -> None:
    canary = tmp_path / "canary"
    bomb = pickle.dumps(Payload(f"touch {canary}"))
    members = [each for each in GOOD if not each[0].name.endswith(f".{extension}")]
    data = tar_of([*members, plain(f"{KEY}.{extension}", bomb)])
    uri = published((tmp_path / "datasets" / "d").as_uri(), data, 1)
    for read in consumers(data, uri, tmp_path):
        try:
            read()
        except (UserError, ValueError):  # json that is none
            continue
    verify_dataset(uri)
    assert not canary.exists()
    pickle.loads(bomb)
    assert canary.exists(), "the bomb is a dud"


@pytest.mark.parametrize("text", ["pipe:touch {}", "pipe:cat x | touch {}", "file:///|touch {}"])
def test_no_address_is_a_command(
    tmp_path: Path, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    canary = tmp_path / "canary"
    monkeypatch.setattr(subprocess, "Popen", None)
    address = text.format(canary)
    calls: list[Callable[[], object]] = [
        lambda: storage.read_bytes(address),
        lambda: storage.download(address, tmp_path / "x"),
        lambda: load_manifest(f"{address}/v/manifest.json"),
        lambda: list(check_inputs(CurationConfig(metadata=[address]))),
        lambda: check_inputs(CurationConfig(metadata=[f"{address}/*.parquet"])),
    ]
    for call in calls:
        with pytest.raises(UserError):
            call()
    assert not canary.exists()
    uri = published((tmp_path / "datasets" / "d").as_uri(), tar_of(GOOD), 1)
    raw = json.loads(storage.read_bytes(uri))
    raw["shards"][0]["path"] = address
    hostile = storage.join(uri.rsplit("/", 2)[0], "v", "manifest.json")
    storage.write_json(hostile, raw)
    assert verify_dataset(hostile)
    assert not canary.exists()


@settings(deadline=None, max_examples=200)
@given(st.lists(st.text(max_size=120), max_size=4))
def test_any_names_are_plain_samples_or_refused(names: list[str]) -> None:
    inventory = Inventory()
    for name in names:
        info = tarfile.TarInfo(name)
        if inventory.problem_with(info) is None:
            key, extension = name.split(".")
            assert key.replace("-", "").replace("_", "").isalnum()
            assert key.isascii()
            assert len(name.encode()) <= 100
            assert extension in ("jpeg", "jpg", "json", "png", "txt", "webp")


@pytest.mark.parametrize("number", range(3))
def test_an_exception_at_any_member_publishes_nothing(
    tmp_path: Path, store_uri: str, number: int
) -> None:
    """Neither the shard nor a part of it is on storage, and no temporary file either."""

    class Broken(bytes):
        def __len__(self) -> int:
            raise OSError("the disk went away")

    samples = {f"{n:032x}": {"jpg": b"x" * 5000, "json": b"{}", "txt": b"t"} for n in range(3)}
    samples[f"{number:032x}"]["jpg"] = Broken(b"x")

    def write() -> None:
        with ShardWriter(ShardConfig(), store_uri, tmp_path) as writer:
            for key, members in samples.items():
                writer.add(key, members)
            writer.finish()

    with pytest.raises(OSError, match="went away"):
        write()
    assert list(storage.list_objects(store_uri)) == []
    assert storage.unfinished_uploads(store_uri) == []
