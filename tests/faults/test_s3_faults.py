"""Storage that loses answers, changes bytes, is busy or lies: through a proxy, on a real server."""

from __future__ import annotations

import os
import secrets
import time
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest

from infra import storage, storage_s3, storage_upload
from infra.digests import sha256_bytes
from infra.storage import DigestMismatch, StorageUnavailable
from pipelines.clean import clean, take_stock
from tests.faults.s3_proxy import INTERNAL, Fault, S3Proxy

PART_BYTES = 100_000


@pytest.fixture(autouse=True)
def small_and_quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small files travel in parts, and botocore waits a hundredth of its time between attempts."""
    import botocore.endpoint

    sleep = time.sleep
    hasty = SimpleNamespace(sleep=lambda seconds: sleep(seconds / 100))
    monkeypatch.setattr(botocore.endpoint, "time", hasty)
    monkeypatch.setattr(storage_upload, "PART_BYTES", PART_BYTES)


@pytest.fixture
def big(tmp_path: Path) -> Path:
    """A file that travels in four parts."""
    path = tmp_path / "big"
    path.write_bytes(os.urandom(3 * PART_BYTES + 17))
    return path


@pytest.fixture
def store() -> str:
    return f"s3://atelier/faults-{secrets.token_hex(6)}"


def write(action: str, uri: str, source: Path) -> str:
    """Write in the way that makes such requests; returns the sha256 of what was sent."""
    if action == "Put":
        return storage.write_bytes(uri, source.read_bytes()).sha256
    return storage.upload(source, uri).sha256


FAULTS = {
    "reset": Fault("reset"),
    "lost answer": Fault("lose_answer"),
    "cut answer": Fault("cut_answer"),
    "500": Fault("status", status=500, body=INTERNAL),
    "503 SlowDown": Fault("status", status=503),
    "twice 503": Fault("status", status=503, times=2),
    "bits sent": Fault("flip_sent"),
    "error in a 200": Fault("error_in_200", body=INTERNAL),
}
WRITES = ("Put", "CreateUpload", "UploadPart", "CompleteUpload")
# S3 answers 200 and an error where the work outlasts the headers: when it puts parts together.
NOT_MADE = {("error in a 200", action) for action in ("Put", "CreateUpload", "UploadPart")}
# Requests whose body holds no bytes of an object, or whose answer has no body.
NOT_MADE |= {("bits sent", action) for action in ("CreateUpload", "CompleteUpload")}
NOT_MADE |= {("cut answer", action) for action in ("Put", "UploadPart")}


@pytest.mark.parametrize(
    ("name", "action"),
    [(name, action) for name in FAULTS for action in WRITES if (name, action) not in NOT_MADE],
)
def test_a_disturbed_write_ends_as_one_whole_object(
    s3_proxy: S3Proxy, store: str, big: Path, name: str, action: str
) -> None:
    s3_proxy.faults = [Fault(**{**vars(FAULTS[name]), "action": action})]
    data = big.read_bytes()
    assert write(action, f"{store}/x", big) == sha256_bytes(data)
    assert s3_proxy.faults[0].times == 0, "the fault was not met"
    assert s3_proxy.actions()[action] >= 2
    assert storage.read_bytes(f"{store}/x") == data
    assert [info.num_bytes for info in storage.list_objects(store)] == [len(data)]


@pytest.mark.parametrize("action", ["Put", "UploadPart", "CompleteUpload"])
def test_a_write_that_never_gets_through_leaves_the_old_object(
    s3_proxy: S3Proxy, store: str, big: Path, action: str
) -> None:
    storage.write_bytes(f"{store}/x", b"old")
    for fault in (Fault("reset"), Fault("status", status=503), Fault("status", status=500)):
        s3_proxy.faults = [Fault(**{**vars(fault), "action": action, "times": 1000})]
        with pytest.raises(StorageUnavailable) as caught:
            write(action, f"{store}/x", big)
        assert "\n" not in str(caught.value)
        assert storage.read_bytes(f"{store}/x") == b"old"
    actions = s3_proxy.actions()
    assert actions["AbortUpload"] == actions["CreateUpload"]
    assert actions[action] <= 40, "retries are bounded"


@pytest.mark.parametrize("action", ["Put", "UploadPart"])
def test_bytes_that_always_change_on_their_way_are_refused(
    s3_proxy: S3Proxy, store: str, big: Path, action: str
) -> None:
    s3_proxy.faults = [Fault("flip_sent", action=action, times=1000)]
    with pytest.raises(StorageUnavailable, match=r"BadDigest|NoSuchUpload"):  # rclone gives up, too
        write(action, f"{store}/x", big)
    assert not storage.exists(f"{store}/x")


def test_an_upload_that_the_server_always_forgets_is_an_error(
    s3_proxy: S3Proxy, store: str, big: Path
) -> None:
    unknown = b"<Error><Code>NoSuchUpload</Code><Message>x</Message></Error>"
    s3_proxy.faults = [Fault("status", "CompleteUpload", times=99, status=404, body=unknown)]
    with pytest.raises(StorageUnavailable, match="NoSuchUpload"):
        storage.upload(big, f"{store}/x")
    assert s3_proxy.actions()["CreateUpload"] == storage_upload.SEND_ATTEMPTS
    assert not storage.exists(f"{store}/x")


@pytest.mark.parametrize(
    ("name", "action"),
    [
        *((name, "Get") for name in ("reset", "lost answer", "cut answer", "500", "twice 503")),
        *((name, "List") for name in ("lost answer", "503 SlowDown")),
        *((name, "DeleteObjects") for name in ("lost answer", "500")),
        ("503 SlowDown", "Head"),
    ],
)
def test_a_disturbed_request_is_made_again(
    s3_proxy: S3Proxy, store: str, name: str, action: str
) -> None:
    storage.write_bytes(f"{store}/x", b"whole body")
    s3_proxy.faults = [Fault(**{**vars(FAULTS[name]), "action": action})]
    if action == "Get":
        assert storage.read_bytes(f"{store}/x") == b"whole body"
    elif action == "Head":
        assert storage.stat(f"{store}/x").num_bytes == 10
    elif action == "List":
        assert [info.num_bytes for info in storage.list_objects(store)] == [10]
    else:
        assert storage.delete_prefix(store) == 1
        assert not storage.exists(f"{store}/x")
    assert s3_proxy.faults[0].times == 0, "the fault was not met"


def test_a_server_that_does_not_answer_in_time_is_asked_again(
    s3_proxy: S3Proxy, store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage_s3, "READ_TIMEOUT_SECONDS", 1)
    s3_proxy.faults = [Fault("delay", "Put", seconds=3.0), Fault("delay", "Get", seconds=3.0)]
    storage.write_bytes(f"{store}/x", b"whole body")
    assert storage.read_bytes(f"{store}/x") == b"whole body"
    assert [fault.times for fault in s3_proxy.faults] == [0, 0]


def test_bytes_that_changed_on_their_way_here_are_asked_for_again(
    s3_proxy: S3Proxy, store: str, tmp_path: Path
) -> None:
    data = os.urandom(50_000)
    sha256 = storage.write_bytes(f"{store}/x", data).sha256
    s3_proxy.faults = [Fault("flip_received", "Get")]
    assert storage.download(f"{store}/x", tmp_path / "x", sha256).sha256 == sha256
    s3_proxy.faults = [Fault("flip_received", "Get")]
    assert storage.read_bytes(f"{store}/x", sha256) == data
    s3_proxy.faults = [Fault("flip_received", "Get", times=2)]
    with pytest.raises(DigestMismatch):
        storage.read_bytes(f"{store}/x", sha256)
    s3_proxy.faults = [Fault("flip_received", "Get", times=2)]
    with pytest.raises(DigestMismatch):
        storage.download(f"{store}/x", tmp_path / "y", sha256)
    assert not (tmp_path / "y").exists()


def test_parts_of_a_killed_writer_are_found_and_dropped(
    s3_proxy: S3Proxy, store: str, big: Path
) -> None:
    storage.write_bytes(f"{store}/whole", b"whole")
    for name in ("x", "y"):
        s3_proxy.faults = [
            Fault("reset", "CompleteUpload", times=9),
            Fault("reset", "AbortUpload", times=9),  # the writer is not there any more to say so
        ]
        with pytest.raises(StorageUnavailable):
            storage.upload(big, f"{store}/{name}")
    s3_proxy.faults = []
    found = storage.unfinished_uploads(store)
    assert [each.uri for each in found] == [f"{store}/x", f"{store}/y"]
    assert all(timedelta() <= each.age < timedelta(hours=1) for each in found)
    assert storage.unfinished_uploads(f"{store}/x") == []  # a folder, and no beginning of a name
    storage.drop_upload(found[0])
    left = storage.unfinished_uploads(store)
    assert [each.upload_id for each in left] == [found[1].upload_id]
    storage.drop_upload(found[0])  # by somebody else meanwhile
    storage.drop_upload(found[1])
    assert storage.unfinished_uploads(store) == []
    assert [info.uri for info in storage.list_objects(store)] == [f"{store}/whole"]


def test_a_cleaning_drops_the_parts_that_killed_writers_left(
    s3_proxy: S3Proxy, store: str, big: Path
) -> None:
    """All but young ones of training, which writes tokens and asks nobody."""
    root = f"{store}/datasets/d"
    storage.write_bytes(f"{root}/notes.txt", b"whole")
    for path in ("shards/a.tar", "tokens/x/b.parquet"):
        s3_proxy.faults = [Fault("reset", kind, times=9) for kind in ("UploadPart", "AbortUpload")]
        with pytest.raises(StorageUnavailable):
            storage.upload(big, f"{root}/{path}")
    s3_proxy.faults = []
    assert [each.uri for each in take_stock(root).uploads] == [f"{root}/shards/a.tar"]
    clean(root)
    assert [each.uri for each in storage.unfinished_uploads(root)] == [f"{root}/tokens/x/b.parquet"]
    assert storage.exists(f"{root}/notes.txt")
    storage.drop_upload(*storage.unfinished_uploads(root))
