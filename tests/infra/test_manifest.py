from __future__ import annotations

import io
import random
import tarfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from infra import storage
from infra.digests import sha256_bytes
from infra.errors import UserError
from infra.manifest import (
    DatasetManifest,
    FileEntry,
    ShardEntry,
    dataset_root,
    dataset_version,
    ledger_path,
    listed_files,
    load_manifest,
    manifest_problems,
    parse_manifest,
    publish_manifest,
    shard_path,
    verify_dataset,
)
from infra.manifest_verify import unlisted_files

names = st.text(min_size=1, max_size=12)
counts = st.integers(0, 10**12)
digests = st.binary(min_size=32, max_size=32).map(bytes.hex)
shards = st.builds(ShardEntry, names, counts, digests, counts)
files = st.builds(FileEntry, names, counts, digests, counts)
manifests = st.builds(
    DatasetManifest,
    name=names,
    recipe_fingerprint=digests,
    shards=st.lists(shards, max_size=3),
    ledger=st.lists(files, max_size=3),
    counts=st.dictionaries(names, counts),
    rejected=st.dictionaries(names, counts),
    failed=st.dictionaries(names, counts),
    parents=st.lists(names),
    attributes=st.dictionaries(names, names | counts | st.none()),
)


@given(manifests)
def test_a_manifest_reads_back_equal_with_the_same_version(manifest: DatasetManifest) -> None:
    copy = parse_manifest(manifest.to_bytes())
    assert copy == manifest
    assert copy.version == manifest.version == sha256_bytes(manifest.to_bytes())


def test_the_order_of_mappings_does_not_change_the_version() -> None:
    one = replace(made(), rejected={"a": 1, "b": 2})
    two = replace(made(), rejected={"b": 2, "a": 1})
    assert one.version == two.version
    assert one.version != replace(one, name="other").version


def tar_of(*members: str) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name in members:
            info = tarfile.TarInfo(name)
            info.size = 700
            tar.addfile(info, io.BytesIO(name.encode().ljust(700)))
    return buffer.getvalue()


def parquet_of(num_rows: int) -> bytes:
    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.table({"row": list(range(num_rows))}), sink)
    return bytes(sink.getvalue())


def made() -> DatasetManifest:
    return DatasetManifest("d", "f" * 64, [], [], dict.fromkeys(COUNTS, 0))


COUNTS = ("rows_in", "committed", "rejected", "failed")
SHARDS = (
    tar_of("aa.jpg", "aa.txt", "aa.json", "bb.jpg", "bb.txt"),
    tar_of("cc.jpg", "cc.txt", "cc.json"),
)
LEDGER = parquet_of(5)


def store(root: str, **changes: Any) -> DatasetManifest:
    entries = []
    for data, num_samples in zip(SHARDS, (2, 1), strict=True):
        sha256 = sha256_bytes(data)
        storage.write_bytes(storage.join(root, shard_path(sha256)), data)
        entries.append(ShardEntry(shard_path(sha256), len(data), sha256, num_samples))
    sha256 = sha256_bytes(LEDGER)
    storage.write_bytes(storage.join(root, ledger_path(sha256)), LEDGER)
    manifest = DatasetManifest(
        name="d",
        recipe_fingerprint="f" * 64,
        shards=entries,
        ledger=[FileEntry(ledger_path(sha256), len(LEDGER), sha256, 5)],
        counts={"rows_in": 6, "committed": 3, "rejected": 2, "failed": 1},
        rejected={"too_small": 2},
        failed={"timeout": 1},
        attributes={"resolution_px": 256},
    )
    return replace(manifest, **changes)


@pytest.fixture
def root(store_uri: str) -> str:
    return storage.join(store_uri, "datasets", "d")


def test_a_published_dataset_loads_and_verifies(root: str) -> None:
    manifest = store(root)
    uri = publish_manifest(root, manifest)
    assert uri == storage.join(root, manifest.version, "manifest.json")
    assert dataset_root(uri) == root
    assert dataset_version(uri) == manifest.version
    assert load_manifest(uri, manifest.version) == manifest
    assert verify_dataset(uri) == []
    assert publish_manifest(root, manifest) == uri


def test_progress_is_told(root: str) -> None:
    seen: list[tuple[int, int | None]] = []

    class Bar:
        def update(self, done: int, total: int | None = None) -> None:
            seen.append((done, total))

        def advance(self, num_done: int = 1) -> None:
            raise AssertionError("not used")

    verify_dataset(publish_manifest(root, store(root)), progress=Bar())
    assert seen == [(1, 1)]


def test_files_that_no_version_lists_are_named(root: str) -> None:
    manifest = store(root)
    uri = publish_manifest(root, manifest)
    assert unlisted_files(root) == []
    storage.write_bytes(storage.join(root, "shards", "left.tar"), SHARDS[0])
    storage.write_bytes(storage.join(root, "ledger", "left.parquet"), LEDGER)
    assert unlisted_files(root) == ["ledger/left.parquet", "shards/left.tar"]
    assert verify_dataset(uri) == []


def damaged(data: bytes, position: int) -> bytes:
    return data[:position] + bytes([data[position] ^ 1]) + data[position + 1 :]


@pytest.mark.parametrize(
    ("index", "data", "problem"),
    [
        (0, None, "missing"),
        (0, SHARDS[0][:-512], f"{len(SHARDS[0]) - 512} bytes, expected {len(SHARDS[0])}"),
        (0, SHARDS[0][:1024], f"1024 bytes, expected {len(SHARDS[0])}"),
        (0, damaged(SHARDS[0], 600), "sha256"),
        (1, damaged(SHARDS[1], 10), "sha256"),
        (2, None, "missing"),
        (2, damaged(LEDGER, 9), "sha256"),
    ],
)
def test_damage_is_found_and_named(root: str, index: int, data: bytes | None, problem: str) -> None:
    manifest = store(root)
    uri = publish_manifest(root, manifest)
    path = listed_files(manifest)[index].path
    if data is None:
        storage.delete(storage.join(root, path))
    else:
        storage.write_bytes(storage.join(root, path), data)
    problems = verify_dataset(uri)
    assert any(line.startswith(f"{path}: ") and problem in line for line in problems)


@settings(max_examples=60, deadline=None)
@given(position=st.integers(0, len(SHARDS[1]) - 1), bit=st.integers(0, 7))
def test_any_flipped_bit_of_a_shard_is_found(
    tmp_path_factory: pytest.TempPathFactory, position: int, bit: int
) -> None:
    root = storage.file_uri(tmp_path_factory.getbasetemp() / "flip" / "datasets" / "d")
    manifest = store(root)
    uri = publish_manifest(root, manifest)
    data = bytearray(SHARDS[1])
    data[position] ^= 1 << bit
    storage.write_bytes(storage.join(root, manifest.shards[1].path), bytes(data))
    assert any(manifest.shards[1].path in problem for problem in verify_dataset(uri))


def test_a_thousand_flips_and_cuts_are_all_found(tmp_path: Path) -> None:
    root = storage.file_uri(tmp_path)
    manifest = store(root)
    uri = publish_manifest(root, manifest)
    paths = [*(entry.path for entry in listed_files(manifest)), f"{manifest.version}/manifest.json"]
    draw = random.Random(7)
    for _ in range(1000):
        path = tmp_path / draw.choice(paths)
        data = path.read_bytes()
        hurt = bytearray(data)
        if draw.random() < 0.2:
            del hurt[draw.randrange(len(data)) :]
        else:
            hurt[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
        path.write_bytes(hurt)
        problems = verify_dataset(uri)
        assert any(path.name in problem for problem in problems)
        path.write_bytes(data)
    assert verify_dataset(uri) == []


def test_what_was_found_right_is_read_again_when_it_was_written(root: str) -> None:
    uri, note = publish_manifest(root, store(root)), f"{root}/work/note.json"
    manifest = load_manifest(uri)
    path = f"{root}/{manifest.shards[0].path}"
    data = storage.read_bytes(path)
    assert verify_dataset(uri, memory_uri=note) == []  # too fresh to note
    for damage in (bytes(len(data)), data[:-1]):
        storage.write_bytes(path, damage)
        (problem,) = verify_dataset(uri, memory_uri=note)
        assert problem.startswith(manifest.shards[0].path)
    storage.write_bytes(path, data)
    time.sleep(2.5 if root.startswith("s3:") else 0.1)
    assert verify_dataset(uri, memory_uri=note) == []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("infra.manifest_verify._check_shard", None)  # not called
        patch.setattr("infra.manifest_verify._check_ledger", None)
        assert verify_dataset(uri, memory_uri=note) == []
    storage.write_bytes(path, bytes(len(data)))
    (problem,) = verify_dataset(uri, memory_uri=note)
    assert verify_dataset(uri, memory_uri=note) == [problem]
    storage.delete(path)
    assert verify_dataset(uri, memory_uri=note) == [f"{manifest.shards[0].path}: missing"]
    storage.write_bytes(path, data)
    storage.write_bytes(note, b"{")
    assert verify_dataset(uri, memory_uri=note) == []


def publish_unchecked(root: str, manifest: DatasetManifest) -> str:
    uri = storage.join(root, manifest.version, "manifest.json")
    storage.write_bytes(uri, manifest.to_bytes())
    return uri


def test_wrong_sample_and_row_counts_are_found(root: str) -> None:
    manifest = store(root)
    wrong = replace(
        manifest,
        shards=[replace(manifest.shards[0], num_samples=3), manifest.shards[1]],
        ledger=[replace(manifest.ledger[0], num_rows=6)],
    )
    problems = verify_dataset(publish_unchecked(root, wrong))
    assert problems == [
        "counts say 3 committed, the listed ones add up to 4",
        f"{manifest.shards[0].path}: 2 samples, expected 3",
        f"{manifest.ledger[0].path}: 5 rows, expected 6",
    ]


@pytest.mark.parametrize("member", ["../out.txt", "dir/x.jpg", ".hidden"])
def test_a_member_that_is_no_plain_sample_is_found(root: str, member: str) -> None:
    data = tar_of(member)
    entry = ShardEntry("shards/x.tar", len(data), sha256_bytes(data), 1)
    storage.write_bytes(storage.join(root, entry.path), data)
    manifest = replace(
        made(), shards=[entry], counts=made().counts | {"rows_in": 1, "committed": 1}
    )
    (problem,) = verify_dataset(publish_manifest(root, manifest))
    assert "is not a plain sample file" in problem


def test_what_is_not_a_tar_is_found(root: str) -> None:
    data = b"not a tar at all" * 100
    entry = ShardEntry("shards/x.tar", len(data), sha256_bytes(data), 0)
    storage.write_bytes(storage.join(root, entry.path), data)
    uri = publish_manifest(root, replace(made(), shards=[entry]))
    (problem,) = verify_dataset(uri)
    assert "not a readable tar" in problem


def test_nothing_is_published_before_its_files(root: str) -> None:
    manifest = store(root)
    storage.delete(storage.join(root, manifest.shards[1].path))
    with pytest.raises(UserError, match=f"expected {manifest.shards[1].path} .* got nothing"):
        publish_manifest(root, manifest)
    storage.write_bytes(storage.join(root, manifest.shards[1].path), b"short")
    with pytest.raises(UserError, match="got 5 bytes"):
        publish_manifest(root, manifest)
    assert not storage.exists(storage.join(root, manifest.version, "manifest.json"))


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"counts": {"rows_in": 7, "committed": 3, "rejected": 2, "failed": 1}}, "7 rows in"),
        ({"counts": {"rows_in": 3}}, "expected"),
        ({"rejected": {"x": 1}}, "2 rejected"),
        ({"failed": {}}, "1 failed"),
    ],
)
def test_a_ledger_that_does_not_add_up_is_not_published(
    tmp_path: Any, changes: dict[str, Any], problem: str
) -> None:
    root = storage.file_uri(tmp_path)
    with pytest.raises(ValueError, match=problem):
        publish_manifest(root, store(root, **changes))


@pytest.mark.parametrize("path", ["/etc/passwd", "../x", "a/../b", "a//b", ""])
def test_a_path_out_of_the_dataset_is_a_problem(path: str) -> None:
    entry = ShardEntry(path, 0, "0" * 64, 0)
    assert any(
        "not a relative path" in p for p in manifest_problems(replace(made(), shards=[entry]))
    )


def test_a_changed_manifest_is_refused(root: str) -> None:
    manifest = store(root)
    uri = publish_manifest(root, manifest)
    storage.write_bytes(uri, manifest.to_bytes().replace(b'"rows_in":6', b'"rows_in":7'))
    with pytest.raises(storage.DigestMismatch):
        load_manifest(uri)
    (problem,) = verify_dataset(uri)
    assert "is damaged" in problem
    other = publish_manifest(root, replace(manifest, name="e"))
    with pytest.raises(storage.DigestMismatch):
        load_manifest(other, manifest.version)


def test_another_schema_or_shape_is_refused_with_a_remedy(root: str) -> None:
    uri = publish_unchecked(root, replace(made(), schema_version=2))
    with pytest.raises(UserError, match=r"expected manifest schema 1 .* got 2; use the version"):
        load_manifest(uri)
    with pytest.raises(UserError, match="not a dataset manifest"):
        parse_manifest(b"[]")
    with pytest.raises(UserError, match="expected JSON"):
        parse_manifest(b"{")
    more = made().to_bytes().replace(b'"name":', b'"nome":1,"name":')
    with pytest.raises(UserError, match="DatasetManifest fields"):
        parse_manifest(more)
    with pytest.raises(UserError, match=r"manifest\.json"):
        dataset_root("s3://bucket/x")
