"""Every behaviour holds for a folder and for a real S3 server alike."""

from __future__ import annotations

import os
import secrets
from pathlib import Path

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from infra import storage
from infra.digests import sha256_bytes
from infra.errors import UserError
from infra.storage import DigestMismatch, ObjectMissing

# The store is shared by the examples of a property on purpose: each uses its own key.
per_example = settings(
    max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def names(store_uri: str, folder: str) -> list[str]:
    uri = storage.join(store_uri, folder)
    return [info.uri.removeprefix(uri + "/") for info in storage.list_objects(uri)]


def test_what_is_written_reads_back_and_is_replaced_whole(store_uri: str) -> None:
    uri = storage.join(store_uri, "a/b", "c.bin")
    assert not storage.exists(uri)
    stored = storage.write_bytes(uri, b"one")
    assert (stored.num_bytes, stored.sha256) == (3, sha256_bytes(b"one"))
    storage.write_bytes(uri, b"second")
    assert storage.read_bytes(uri) == b"second"
    assert storage.stat(uri).num_bytes == 6
    storage.delete(uri)
    assert not storage.exists(uri)
    storage.delete(uri)


@per_example
@given(data=st.binary(max_size=5000))
def test_any_bytes_round_trip(store_uri: str, data: bytes) -> None:
    uri = storage.join(store_uri, "any", secrets.token_hex(8))
    storage.write_bytes(uri, data)
    assert storage.read_bytes(uri) == data


@per_example
@given(name=st.text(min_size=1, max_size=40))
def test_a_key_round_trips_exactly_or_is_refused(store_uri: str, name: str) -> None:
    assume(name.strip("/") != "")  # slashes alone add no name to the folder's
    folder = storage.join(store_uri, "names", secrets.token_hex(8))
    try:
        uri = storage.join(folder, name)
        storage.write_bytes(uri, b"x")
    except UserError:
        return
    assert storage.read_bytes(uri) == b"x"
    assert [info.uri for info in storage.list_objects(folder)] == [uri]


@pytest.mark.parametrize("call", [storage.read_bytes, storage.stat, storage.read_json])
def test_a_missing_object_is_named(store_uri: str, call: object) -> None:
    uri = storage.join(store_uri, "nowhere")
    assert callable(call)
    with pytest.raises(ObjectMissing, match=r"no object at .*nowhere"):
        call(uri)


def test_a_folder_is_not_an_object(store_uri: str) -> None:
    storage.write_bytes(storage.join(store_uri, "folder/x"), b"1")
    assert not storage.exists(storage.join(store_uri, "folder"))
    with pytest.raises(ObjectMissing):
        storage.read_bytes(storage.join(store_uri, "folder"))


def test_a_listing_is_sorted_recursive_and_stops_at_the_folder(store_uri: str) -> None:
    for name in ("d/b/2", "d/a", "d/b-1", "d/b/1", "other/x", "d2"):
        storage.write_bytes(storage.join(store_uri, name), name.encode())
    assert names(store_uri, "d") == ["a", "b-1", "b/1", "b/2"]
    assert names(store_uri, "nothing") == []


def test_a_long_listing_is_complete(store_uri: str, tmp_path: Path) -> None:
    for number in range(1105):
        storage.write_bytes(storage.join(store_uri, "many", f"{number:05}"), b"")
    assert names(store_uri, "many") == [f"{number:05}" for number in range(1105)]
    assert storage.delete_prefix(storage.join(store_uri, "many")) == 1105
    assert names(store_uri, "many") == []


def test_deleting_a_folder_leaves_its_neighbours(store_uri: str) -> None:
    for name in ("d/a", "d/b/c", "d2/x", "dd"):
        storage.write_bytes(storage.join(store_uri, name), b"x")
    assert storage.delete_prefix(storage.join(store_uri, "d")) == 2
    assert storage.delete_prefix(storage.join(store_uri, "d")) == 0
    assert storage.exists(storage.join(store_uri, "d2/x"))
    assert storage.exists(storage.join(store_uri, "dd"))


@pytest.mark.parametrize("uri", ["s3://bucket", "s3://bucket/", "file:///", "file:///home"])
def test_a_whole_store_is_never_deleted(uri: str) -> None:
    with pytest.raises(UserError, match="refused to delete"):
        storage.delete_prefix(uri)


@pytest.mark.parametrize(
    "uri",
    [
        "/plain/path",
        "file://relative",
        "http://host/x",
        "s3:///key",
        "s3://bucket/a/../b",
        "s3://bucket/a//b",
        "file:///a/../b",
        "file:///a/%2e%2e/b",
        "pipe:touch canary",
    ],
)
def test_an_odd_address_is_refused(uri: str) -> None:
    with pytest.raises(UserError, match="expected an address like"):
        storage.read_bytes(uri)


def test_join_keeps_to_the_folder(store_uri: str) -> None:
    assert storage.join("s3://b/", "/a/", "b/c") == "s3://b/a/b/c"
    assert storage.join("file:///t", "a b#1%") == "file:///t/a%20b%231%25"
    with pytest.raises(UserError):
        storage.join(store_uri, "..", "x")


def test_files_and_folders_travel_both_ways(store_uri: str, tmp_path: Path) -> None:
    source = tmp_path / "source"
    (source / "in").mkdir(parents=True)
    (source / "a.bin").write_bytes(os.urandom(70_000))
    (source / "in" / "b 1.txt").write_text("ü")
    stored = storage.upload_folder(source, storage.join(store_uri, "f"))
    assert sorted(stored) == ["a.bin", "in/b 1.txt"]
    assert stored["a.bin"].sha256 == sha256_bytes((source / "a.bin").read_bytes())
    back = storage.download_folder(storage.join(store_uri, "f"), tmp_path / "back")
    assert {name: o.sha256 for name, o in back.items()} == {
        name: o.sha256 for name, o in stored.items()
    }
    assert (tmp_path / "back" / "in" / "b 1.txt").read_text() == "ü"
    with pytest.raises(ObjectMissing):
        storage.download_folder(storage.join(store_uri, "empty"), tmp_path / "none")
    with pytest.raises(ObjectMissing):
        storage.upload(tmp_path / "none", storage.join(store_uri, "x"))


def test_a_download_with_the_wrong_digest_leaves_nothing(store_uri: str, tmp_path: Path) -> None:
    uri = storage.join(store_uri, "x")
    storage.write_bytes(uri, b"flipped")
    with pytest.raises(DigestMismatch, match="is damaged"):
        storage.download(uri, tmp_path / "x", sha256=sha256_bytes(b"whole"))
    assert list(tmp_path.glob("**/*x*")) == [path for path in tmp_path.glob("store/x")]
    stored = storage.download(uri, tmp_path / "y" / "x", sha256=sha256_bytes(b"flipped"))
    assert stored.num_bytes == 7


def test_json_is_canonical_and_a_broken_one_is_named(store_uri: str) -> None:
    uri = storage.join(store_uri, "x.json")
    storage.write_json(uri, {"b": 1, "a": "é"})
    assert storage.read_bytes(uri) == '{"a":"é","b":1}'.encode()
    assert storage.read_json(uri) == {"a": "é", "b": 1}
    storage.write_bytes(uri, b"{")
    with pytest.raises(UserError, match=r"expected JSON at .*x\.json"):
        storage.read_json(uri)


def test_arrow_sees_the_same_objects(store_uri: str) -> None:
    filesystem, path = storage.arrow_filesystem(storage.join(store_uri, "arrow/x"))
    storage.write_bytes(storage.join(store_uri, "arrow/y"), b"from storage")
    with filesystem.open_output_stream(path) as stream:
        stream.write(b"from arrow")
    assert storage.read_bytes(storage.join(store_uri, "arrow/x")) == b"from arrow"
    with filesystem.open_input_file(path[:-1] + "y") as file:
        assert file.read() == b"from storage"
