"""A published checkpoint is complete, named by its content, and any change to it is found."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from infra import storage
from infra.errors import UserError
from infra.storage import DigestMismatch, ObjectMissing
from training import publish

PROVENANCE = {"stage": "concepts", "step": 7}


@pytest.fixture
def exported(tmp_path: Path) -> Path:
    """A folder shaped like an exported model."""
    folder = tmp_path / "export"
    rng = random.Random(0)
    for name in ("model_index.json", "transformer/config.json", "transformer/w.safetensors"):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(rng.randbytes(3000))
    return folder


def _publish(exported: Path, store_uri: str) -> publish.PublishedCheckpoint:
    return publish.publish_folder(exported, store_uri, "concepts", PROVENANCE)


def test_round_trip(exported: Path, store_uri: str, tmp_path: Path) -> None:
    published = _publish(exported, store_uri)
    assert published.uri == storage.join(store_uri, "models", "concepts", published.sha256)
    assert publish.verify_checkpoint(published.uri) == []
    assert publish.read_listing(published.uri) == published
    assert publish.read_provenance(published.uri) == PROVENANCE
    folder = publish.fetch_checkpoint(published.uri, tmp_path / "cache")
    assert folder == tmp_path / "cache" / published.sha256
    for path in exported.rglob("*"):
        if path.is_file():
            assert (folder / path.relative_to(exported)).read_bytes() == path.read_bytes()


def test_the_name_is_the_content_alone(exported: Path, tmp_path: Path) -> None:
    first = publish.publish_folder(exported, (tmp_path / "a").as_uri(), "concepts", {"run": 1})
    second = publish.publish_folder(exported, (tmp_path / "b").as_uri(), "aesthetics", {"run": 2})
    assert first.sha256 == second.sha256
    (exported / "model_index.json").write_bytes(b"{}")
    assert publish.content_sha256(publish.describe_folder(exported)) != first.sha256


def test_publishing_again_changes_nothing(exported: Path, store_uri: str) -> None:
    first = _publish(exported, store_uri)
    again = publish.publish_folder(exported, store_uri, "concepts", {"another": "attempt"})
    assert again == first
    assert publish.read_provenance(first.uri) == PROVENANCE


def test_until_the_listing_is_written_there_is_no_checkpoint(
    exported: Path, store_uri: str
) -> None:
    def stop() -> None:
        raise UserError("the lease is lost")

    with pytest.raises(UserError, match="lease"):
        publish.publish_folder(exported, store_uri, "concepts", PROVENANCE, before_listing=stop)
    sha256 = publish.content_sha256(publish.describe_folder(exported))
    uri = publish.checkpoint_uri(store_uri, "concepts", sha256)
    assert len(list(storage.list_objects(uri))) == 4
    with pytest.raises(ObjectMissing):
        publish.verify_checkpoint(uri)
    assert _publish(exported, store_uri).uri == uri
    assert publish.verify_checkpoint(uri) == []


def test_every_flipped_bit_cut_and_missing_file_is_named(exported: Path, tmp_path: Path) -> None:
    published = _publish(exported, (tmp_path / "store").as_uri())
    root = Path(published.uri.removeprefix("file://"))
    rng = random.Random(1)
    names = [file.path for file in published.files]
    assert publish.PROVENANCE_NAME in names
    for _ in range(60):
        name = rng.choice(names)
        path = root / name
        whole = path.read_bytes()
        damaged = bytearray(whole)
        damaged[rng.randrange(len(whole))] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)
        assert [problem.split(":")[0] for problem in publish.verify_checkpoint(published.uri)] == [
            name
        ]
        path.write_bytes(whole[: rng.randrange(len(whole))])
        assert "bytes" in publish.verify_checkpoint(published.uri)[0]
        path.unlink()
        assert publish.verify_checkpoint(published.uri) == [f"{name}: missing"]
        path.write_bytes(whole)
    assert publish.verify_checkpoint(published.uri) == []


def test_a_changed_listing_does_not_add_up(exported: Path, tmp_path: Path) -> None:
    published = _publish(exported, (tmp_path / "store").as_uri())
    path = Path(published.uri.removeprefix("file://")) / publish.LISTING_NAME
    whole = path.read_bytes()
    raw = json.loads(whole)
    raw["files"][0]["sha256"] = "0" * 64
    for damaged in (json.dumps(raw).encode(), b"{}", b"", b'{"schema_version": 9}', whole[:-5]):
        path.write_bytes(damaged)
        problems = publish.verify_checkpoint(published.uri)
        assert len(problems) == 1
        with pytest.raises(UserError):
            publish.fetch_checkpoint(published.uri, tmp_path / "cache")
    path.write_bytes(whole)
    elsewhere = publish.checkpoint_uri((tmp_path / "store").as_uri(), "concepts", "0" * 64)
    for file in (*published.files, publish.CheckpointFile(publish.LISTING_NAME, 0, "")):
        data = storage.read_bytes(storage.join(published.uri, file.path))
        storage.write_bytes(storage.join(elsewhere, file.path), data)
    assert "to list the files of 0000" in publish.verify_checkpoint(elsewhere)[0]
    for name in ("../outside", "/etc/passwd"):
        raw = json.loads(whole)
        raw["files"][0]["path"] = name
        path.write_text(json.dumps(raw))
        with pytest.raises(UserError):
            publish.fetch_checkpoint(published.uri, tmp_path / "cache")


def test_fetching_repairs_the_cache_and_refuses_damaged_storage(
    exported: Path, store_uri: str, tmp_path: Path
) -> None:
    published = _publish(exported, store_uri)
    folder = publish.fetch_checkpoint(published.uri, tmp_path)
    weights = folder / "transformer" / "w.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert publish.fetch_checkpoint(published.uri, tmp_path) == folder
    assert weights.read_bytes() == whole
    storage.write_bytes(storage.join(published.uri, "transformer/w.safetensors"), b"other")
    assert publish.fetch_checkpoint(published.uri, tmp_path) == folder  # the copy is still right
    weights.unlink()
    with pytest.raises(DigestMismatch, match=r"w\.safetensors"):
        publish.fetch_checkpoint(published.uri, tmp_path)


def test_a_damaged_checkpoint_is_not_published_over(exported: Path, store_uri: str) -> None:
    published = _publish(exported, store_uri)
    storage.delete(storage.join(published.uri, "model_index.json"))
    with pytest.raises(UserError, match=r"model_index\.json: missing; restore it, or delete"):
        _publish(exported, store_uri)


def test_an_empty_export_is_refused(tmp_path: Path, store_uri: str) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no files"):
        _publish(tmp_path / "empty", store_uri)


def test_the_export_of_a_run_is_fetched_and_checked(tmp_path: Path, exported: Path) -> None:
    run = tmp_path / "run" / "checkpoint_1"
    exported.rename(tmp_path / "moved")
    run.mkdir(parents=True)
    (tmp_path / "moved").rename(run / "export")
    (run / "state.pt").write_bytes(b"optimizer")
    files = publish.describe_folder(run)
    storage.write_json(
        storage.join(run.as_uri(), publish.LISTING_NAME),
        {"files": [vars(file) for file in files]},
    )
    folder = publish.fetch_export(run.as_uri(), tmp_path / "scratch")
    assert {path.name for path in folder.rglob("*") if path.is_file()} == {
        "model_index.json",
        "config.json",
        "w.safetensors",
    }
    (run / "export" / "model_index.json").write_bytes(b"other")
    with pytest.raises(DigestMismatch):
        publish.fetch_export(run.as_uri(), tmp_path / "again")
    storage.write_json(storage.join(run.as_uri(), publish.LISTING_NAME), {"files": []})
    with pytest.raises(UserError, match="did not finish"):
        publish.fetch_export(run.as_uri(), tmp_path / "none")
