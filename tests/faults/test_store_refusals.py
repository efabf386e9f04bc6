"""Stores that are not there, refuse, or promise less: told before any work, with no secret."""

from __future__ import annotations

import os
import random
import secrets
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from infra import storage, storage_upload
from infra.digests import sha256_bytes
from infra.errors import UserError
from infra.storage import StorageUnavailable
from infra.storage_probe import ALLOW_UNCHECKED, check_store
from pipelines.curate import curate
from pipelines.plan import plan_curation
from tests.faults.s3_proxy import Fault, S3Proxy
from tests.faults.small_curation import NAME, config_of, curated, small_world
from tests.pipelines.conftest import EvilWeb, TrapWorld
from tests.pipelines.test_build import Crash, crash_after, run

if TYPE_CHECKING:
    from tests.conftest import S3Server

DENIED = b"<Error><Code>AccessDenied</Code><Message>no</Message></Error>"
MANY = 10_000


@pytest.fixture
def world(tmp_path: Path, evil_web: EvilWeb) -> TrapWorld:
    return small_world(tmp_path / "world", evil_web)


@pytest.fixture
def store() -> str:
    return f"s3://atelier/refusals-{secrets.token_hex(6)}"


def no_work() -> Any:
    raise AssertionError("work was begun")


def test_a_missing_bucket_is_named_before_any_work(s3_proxy: S3Proxy, world: TrapWorld) -> None:
    with pytest.raises(StorageUnavailable, match="no bucket 'nobody'"):
        curate(NAME, config_of(world), "s3://nobody/x", no_work)
    assert sum(s3_proxy.actions().values()) <= 10, "it was asked again and again"
    assert world.web.requests == []


@pytest.mark.parametrize(
    ("action", "word"),
    [("Put", "write"), ("Get", "read"), ("List", "list"), ("DeleteObjects", "delete")],
)
def test_what_is_denied_is_named_before_any_work(
    s3_proxy: S3Proxy, world: TrapWorld, store: str, action: str, word: str
) -> None:
    s3_proxy.faults = [Fault("status", action, times=MANY, status=403, body=DENIED)]
    with pytest.raises(StorageUnavailable, match=f"cannot {word} s3://atelier/.*access denied"):
        curate(NAME, config_of(world), store, no_work)
    assert sum(s3_proxy.actions().values()) <= 20
    assert world.web.requests == []


def test_a_store_on_a_read_only_disk_is_named_before_any_work(world: TrapWorld) -> None:
    with pytest.raises(UserError, match="cannot write file:///sys/"):
        curate(NAME, config_of(world), "file:///sys/atelier", no_work)
    assert world.web.requests == []


def test_a_store_that_is_fit_is_left_as_it_was(store_uri: str) -> None:
    storage.write_bytes(storage.join(store_uri, "work", "x"), b"x")
    check_store(storage.join(store_uri, "work"))
    assert [info.num_bytes for info in storage.list_objects(store_uri)] == [1]


def test_a_server_that_does_not_compare_what_it_is_sent_is_refused(
    s3_proxy: S3Proxy, store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its answer to bytes with a wrong MD5 is 200."""
    s3_proxy.faults = [Fault("status", "Put", "probe-", after=1, status=200, body=b"")]
    with pytest.raises(UserError, match=r"compares the Content-MD5.*ATELIER_ALLOW_UNCH"):
        check_store(store)
    assert list(storage.list_objects(store)) == []
    s3_proxy.faults = [Fault("status", "Put", "probe-", after=1, status=200, body=b"")]
    monkeypatch.setenv(ALLOW_UNCHECKED, "1")
    check_store(store)


def test_a_server_whose_listings_lag_is_refused(s3_proxy: S3Proxy, store: str) -> None:
    empty = b"<ListBucketResult><IsTruncated>false</IsTruncated></ListBucketResult>"
    s3_proxy.faults = [Fault("status", "List", status=200, body=empty)]
    with pytest.raises(UserError, match="just written, in a listing"):
        check_store(store)


def test_nothing_asks_for_conditions_or_copies(
    s3_proxy: S3Proxy, world: TrapWorld, store: str
) -> None:
    """A whole curation: files appear where they belong, and the manifest makes them a dataset."""
    check_store(storage.join(store, "datasets", NAME, "work"))
    curated(config_of(world), store)
    actions = s3_proxy.actions()
    assert actions["Put"] > 10
    assert {"Copy", "Rename"}.isdisjoint(actions)
    names = {name.lower() for request in s3_proxy.requests for name, _ in request.headers}
    assert "content-md5" in names
    assert not {name for name in names if name.startswith("if-")}
    puts = [request for request in s3_proxy.requests if request.action == "Put"]
    is_manifest = ["/manifest.json" in request.path for request in puts]
    shards = [number for number, request in enumerate(puts) if "/shards/" in request.path]
    assert is_manifest.count(True) == 1
    assert is_manifest.index(True) > max(shards)


def test_keys_that_change_meanwhile_stop_it_in_one_line_and_new_ones_go_on(
    own_s3_server: S3Server, world: TrapWorld, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    config = config_of(world)
    with pytest.MonkeyPatch.context() as patch:
        count = crash_after(patch, MANY)
        _, expected = curated(config, (tmp_path / "undisturbed").as_uri())
    store = own_s3_server.store_uri
    plan = plan_curation(NAME, config, store)
    with pytest.MonkeyPatch.context() as patch:
        crash_after(patch, 2 * count() // 3)
        with pytest.raises(Crash):
            run(plan)
    before = own_s3_server.environment
    own_s3_server.kill()
    own_s3_server.access_key_id = secrets.token_hex(10).upper()
    own_s3_server.secret_access_key = secrets.token_hex(20)
    own_s3_server.start()
    with pytest.raises(StorageUnavailable, match="access denied") as caught:
        plan_curation(NAME, config, store)
    assert before["AWS_SECRET_ACCESS_KEY"] not in str(caught.value)
    for name, value in own_s3_server.environment.items():
        monkeypatch.setenv(name, value)
    plan, manifest = curated(config, store)
    assert plan.decision == "RESUME"
    assert manifest.version == expected.version
    log = (own_s3_server.folder.parent / "s3.log").read_text()
    for key in (before["AWS_SECRET_ACCESS_KEY"], own_s3_server.secret_access_key):
        assert key not in log
    stored = [storage.read_bytes(info.uri) for info in storage.list_objects(store)]
    assert not [data for data in stored if own_s3_server.secret_access_key.encode() in data]


NUM_KILLS = 20


@pytest.mark.slow
def test_a_server_killed_in_any_write_keeps_what_it_acknowledged(
    own_s3_server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server answers for a write once its bytes are there; what it did not answer for is
    whole, as it was before, or absent."""
    monkeypatch.setattr(storage_upload, "PART_BYTES", 100_000)
    store = own_s3_server.store_uri
    acknowledged: dict[str, str] = {}
    attempted: dict[str, set[str]] = {}
    answered = threading.Event()

    def write() -> None:
        for number in range(100_000):
            uri = f"{store}/objects/{number % 25:02}"
            data = os.urandom(40_000 if number % 2 else 450_000)
            (tmp_path / "source").write_bytes(data)
            attempted.setdefault(uri, set()).add(sha256_bytes(data))
            try:
                storage.upload(tmp_path / "source", uri)
            except UserError:
                acknowledged.pop(uri, None)  # the old bytes, or the new ones
                return
            acknowledged[uri] = sha256_bytes(data)
            answered.set()

    chance = random.Random(5)
    for _ in range(NUM_KILLS):
        writer = threading.Thread(target=write)
        answered.clear()
        writer.start()
        answered.wait()
        time.sleep(chance.uniform(0.0, 0.3))
        own_s3_server.kill()
        writer.join()
        own_s3_server.start()
        stored = {
            info.uri: sha256_bytes(storage.read_bytes(info.uri))
            for info in storage.list_objects(store)
        }
        assert acknowledged.items() <= stored.items()
        assert all(sha256 in attempted[uri] for uri, sha256 in stored.items())
    assert acknowledged
