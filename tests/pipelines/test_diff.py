"""Two versions compared: every kind of change is counted, on a folder and on S3."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import polars as pl
import pytest

from infra import storage
from infra.manifest import DatasetManifest, ShardEntry, load_manifest, publish_manifest
from pipelines import diff
from pipelines.config import ShardConfig
from pipelines.ledger import LEDGER_SCHEMA, LedgerFile, count
from pipelines.shard_sample import first_samples
from pipelines.shards import ShardWriter

Row = tuple[str, str, str, str | None, str | None, float | None]
OLD: list[Row] = [
    ("a", "http://x/a", "committed", None, "1", 5.0),
    ("b", "http://x/b", "committed", None, "2", 5.0),
    ("c", "http://x/c", "rejected", "unsafe", None, 5.0),
    ("d", "http://x/d", "committed", None, "4", None),
    ("e", "http://x/e", "failed", "timeout", None, 5.0),
    ("a", "http://x/a", "rejected", "duplicate_row", None, 5.0),
]
NEW: list[Row] = [
    ("a", "http://x/a", "committed", None, "1", 5.0),
    ("b", "http://x/b", "committed", None, "9", 9.0),
    ("c", "http://x/c", "committed", None, "3", 9.0),
    ("d2", "http://x/d", "committed", None, "4", None),
    ("e", "http://x/e", "rejected", "format", None, 5.0),
]


def published(root: str, folder: Path, rows: list[Row]) -> str:
    names = ["sample_id", "url", "disposition", "reason", "sha256", "aesthetic_score"]
    schema = dict.fromkeys(names[:-1], pl.String()) | {"aesthetic_score": pl.Float64()}
    frame = pl.DataFrame(rows, schema=schema, orient="row")
    empty = pl.DataFrame(pl.from_arrow(LEDGER_SCHEMA.empty_table()))
    frame = pl.concat([empty, frame], how="diagonal")
    counts = count(frame)
    with LedgerFile(folder, "test") as file:
        file.add(frame)
        entry = file.publish(root)
    assert entry is not None
    stored = storage.write_bytes(storage.join(root, "shards/x.tar"), b"never read")
    shard = ShardEntry("shards/x.tar", stored.num_bytes, stored.sha256, counts.committed)
    totals = {
        "rows_in": counts.num_rows,
        "committed": counts.committed,
        "rejected": sum(counts.rejected.values()),
        "failed": sum(counts.failed.values()),
    }
    return publish_manifest(
        root,
        DatasetManifest("d", "f" * 64, [shard], [entry], totals, counts.rejected, counts.failed),
    )


@pytest.mark.parametrize("rows_per_bucket", [1, 5_000_000])
def test_every_kind_of_change_is_counted(
    store_uri: str, tmp_path: Path, rows_per_bucket: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(diff, "ROWS_PER_BUCKET", rows_per_bucket)
    root = storage.join(store_uri, "datasets", "d")
    old, new = (published(root, tmp_path, rows) for rows in (OLD, NEW))
    found = diff.diff_datasets(old, new)
    assert (found.added, found.removed, found.changed, found.kept) == (2, 1, 1, 1)
    assert found.examples == {"added": ["c", "d2"], "removed": ["d"], "changed": ["b"]}
    assert found.captions_changed == 1
    assert found.outcomes_changed == [
        ("committed", "no row", 1),
        ("failed:timeout", "format", 1),
        ("no row", "committed", 1),
        ("unsafe", "committed", 1),
    ]
    scores = found.histograms["aesthetic_score"]
    assert (scores["old"][10], scores["old"][-1]) == (2, 1)
    assert (scores["new"][10], scores["new"][18], scores["new"][-1]) == (1, 2, 1)
    assert found.scores_moved["aesthetic_score"] == pytest.approx(0.5)


def test_a_version_does_not_differ_from_itself(tmp_path: Path) -> None:
    uri = published(storage.file_uri(tmp_path / "d"), tmp_path, OLD)
    found = diff.diff_datasets(uri, uri)
    assert (found.added, found.removed, found.changed, found.kept) == (0, 0, 0, 3)
    assert found.outcomes_changed == []
    assert found.captions_changed == 0
    assert set(found.scores_moved.values()) == {0.0}


def test_a_ledger_with_a_changed_bit_is_named_and_nothing_is_said(tmp_path: Path) -> None:
    root = storage.file_uri(tmp_path / "d")
    old, new = (published(root, tmp_path, rows) for rows in (OLD, NEW))
    (entry,) = load_manifest(new).ledger
    path = tmp_path / "d" / entry.path
    whole = path.read_bytes()
    for at in range(0, len(whole), len(whole) // 40):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        with pytest.raises(storage.DigestMismatch, match=entry.path):
            diff.diff_datasets(old, new)
    path.unlink()
    with pytest.raises(storage.ObjectMissing):
        diff.diff_datasets(old, new)
    path.write_bytes(whole)
    assert diff.diff_datasets(old, new).kept == 1


def test_moves_are_named_and_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(diff, "ROWS_PER_BUCKET", 2)
    root = storage.file_uri(tmp_path / "d")
    old, new = (published(root, tmp_path, rows) for rows in (OLD, NEW))
    path = tmp_path / "moves.parquet"
    found = diff.diff_datasets(old, new, moves_path=path)
    assert found.rows_in_both == 4
    assert found.overlap == pytest.approx(2 / 5)
    assert found.texts_changed is None
    expected = {
        "committed -> no row": ["d"], "failed:timeout -> format": ["e"],
        "no row -> committed": ["d2"], "unsafe -> committed": ["c"],
    }  # fmt: skip
    assert found.moves == expected
    written = pl.read_parquet(path).sort("sample_id")
    assert written.rows() == [
        ("c", "unsafe", "committed"), ("d", "committed", "no row"),
        ("d2", "no row", "committed"), ("e", "failed:timeout", "format"),
    ]  # fmt: skip


def test_captions_to_train_on_are_compared_in_shards_that_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = storage.file_uri(tmp_path / "d")
    keys = [f"{number:032x}" for number in range(6)]

    def version(texts: dict[str, str]) -> str:
        shards = []
        for part in (keys[:3], keys[3:]):
            with ShardWriter(ShardConfig(), root, tmp_path) as writer:
                for key in part:
                    if key in texts:
                        writer.add(key, {"txt": texts[key].encode(), "json": b"{}", "jpg": b"i"})
                shards += writer.finish()
        rows: list[Row] = [(key, f"http://x/{key}", "committed", None, key, 5.0) for key in texts]
        uri = published(root, tmp_path, rows)
        manifest = dataclasses.replace(load_manifest(uri), shards=shards)
        return publish_manifest(root, manifest)

    texts = {key: f"a fox {key}" for key in keys}
    old = version(texts)
    changed = {**texts, keys[4]: "a red fox \N{FOX FACE}" * 50}
    del changed[keys[5]]
    new = version(changed)
    read: list[str] = []

    def noting(root: str, shard: ShardEntry) -> Iterator[tuple[str, dict[str, bytes]]]:
        read.append(shard.path)
        return first_samples(root, shard)

    monkeypatch.setattr("pipelines.diff.first_samples", noting)
    found = diff.diff_datasets(old, new, with_texts=True)
    assert found.texts_changed == 1
    ((key, before, after),) = found.texts
    assert (key, before) == (keys[4], f"a fox {keys[4]}")
    assert len(after) == diff.TEXT_CHARS
    assert len(read) == 2
    assert len(set(read)) == 2
    for shard in load_manifest(new).shards:
        path = Path(root.removeprefix("file://"), shard.path)
        whole = path.read_bytes()
        path.write_bytes(whole.replace(b"fox", b"fix", 1))
        if shard in load_manifest(old).shards:
            assert diff.diff_datasets(old, new, with_texts=True).texts_changed == 1
        else:
            with pytest.raises(storage.DigestMismatch, match=shard.path):
                diff.diff_datasets(old, new, with_texts=True)
        path.write_bytes(whole)
