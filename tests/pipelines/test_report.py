"""The page and the card of a version: counted right, bounded, deterministic, and never run."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import yaml

from infra import storage
from infra.digests import sha256_bytes
from infra.errors import UserError
from infra.manifest import (
    DatasetManifest,
    FileEntry,
    ShardEntry,
    ledger_path,
    load_manifest,
    publish_manifest,
)
from infra.sessions import ClusterConfig, spark_session, stop_spark
from pipelines import ledger, ledger_counts
from pipelines.card import card
from pipelines.config import ShardConfig
from pipelines.diff import diff_datasets
from pipelines.histograms import LEDGER_BINS
from pipelines.ledger import LEDGER_SCHEMA, REASONS, LedgerFile, count
from pipelines.ledger_counts import LedgerCounts, count_ledgers, counts_of_rows, counts_path
from pipelines.reasons import BEFORE_FETCH, WORDS, words_for
from pipelines.report import write_report
from pipelines.shards import ShardWriter

HOSTILE = "<script>alert(1)</script>"


def ledger_rows(num_rows: int) -> pl.DataFrame:
    """Rows of every disposition, with scores known and unknown, and hosts with hostile names."""
    ends = [
        ("committed", None, None), ("rejected", "unsafe", False), ("failed", "http_404", False),
        ("failed", "timeout", True), ("committed", None, None),
    ]  # fmt: skip
    rows = []
    for number in range(num_rows):
        disposition, reason, retryable = ends[number % len(ends)]
        rows.append(
            {
                "sample_id": f"{number:032x}",
                "url": f"http://u@Host{number % 3}.example:80/{number}" if number % 7 else None,
                "width_px": number % 900 or None,
                "height_px": 300,
                "aesthetic_score": None if number % 4 == 0 else number % 100 / 10,
                "unsafe_prob": number % 11 / 10,
                "language": (None, "en", HOSTILE)[number % 3],
                "source": "made",
                "disposition": disposition,
                "reason": reason,
                "retryable": retryable,
            }
        )
    empty = pl.DataFrame(pl.from_arrow(LEDGER_SCHEMA.empty_table()))
    return pl.concat([empty, pl.DataFrame(rows, infer_schema_length=None)], how="diagonal_relaxed")


def published(
    root: str, folder: Path, frames: list[pl.DataFrame], image: bytes, **attributes: Any
) -> tuple[str, DatasetManifest]:
    """A version whose ledger files are ``frames`` and whose shard is whole."""
    entries = []
    for number, frame in enumerate(frames):
        with LedgerFile(folder, f"part {number}") as file:
            file.add(frame)
            entry = file.publish(root)
        assert entry is not None
        entries.append(entry)
    counts = count(pl.concat(frames))
    shards: list[ShardEntry] = []
    with ShardWriter(ShardConfig(max_samples=40), root, folder) as writer:
        for number in range(counts.committed):
            caption = f"{HOSTILE} & number {number}"
            json = f'{{"caption": "{caption}"}}'.encode()
            writer.add(f"{number:032x}", {"jpg": image, "json": json, "txt": caption.encode()})
        shards = writer.finish()
    totals = {
        "rows_in": counts.num_rows,
        "committed": counts.committed,
        "rejected": sum(counts.rejected.values()),
        "failed": sum(counts.failed.values()),
    }
    manifest = DatasetManifest(
        "d", "f" * 64, shards, entries, totals, counts.rejected, counts.failed,
        attributes=attributes,
    )  # fmt: skip
    return publish_manifest(root, manifest), manifest


class Page(HTMLParser):
    """Every tag, every attribute that can load or run something, and the text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: Counter[str] = Counter()
        self.loads: list[str] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        for name, value in attrs:
            if name in ("src", "href", "action", "data") or name.startswith("on"):
                self.loads.append(f"{name}={value}")

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture
def image(encode: Any, make_picture: Any) -> bytes:
    found: bytes = encode(make_picture(1))
    return found


def test_counts_are_those_of_the_rows(
    store_uri: str, tmp_path: Path, image: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ledger, "ROWS_AT_ONCE", 7)
    rows = ledger_rows(100)
    root = storage.join(store_uri, "datasets", "d")
    _, manifest = published(root, tmp_path, [rows[:61], rows[61:]], image)
    found = count_ledgers(root, manifest)
    assert found == counts_of_rows(rows)
    assert found.num_rows == 100
    assert found.outcomes == {
        "committed": 40, "unsafe": 20, "failed:http_404": 20, "failed:timeout": 20
    }  # fmt: skip
    assert found.retryable == {"timeout": 20}
    committed = rows.filter(pl.col("disposition") == "committed")
    for name, sides in found.histograms.items():
        assert [sum(sides["all"]), sum(sides["committed"])] == [100, 40], name
    scores = found.histograms["aesthetic_score"]
    assert scores["all"][-1] == rows["aesthetic_score"].null_count()
    assert scores["committed"][-1] == committed["aesthetic_score"].null_count()
    edge = LEDGER_BINS["aesthetic_score"].index(5.0)
    in_bin = rows.filter(pl.col("aesthetic_score").is_between(5.0, 5.5, closed="left")).height
    assert scores["all"][edge + 1] == in_bin > 0
    assert found.languages == {"": [34, 14], "en": [33, 13], HOSTILE: [33, 13]}
    urls = rows["url"].drop_nulls()
    assert sum(sum(hosts.values()) for hosts in found.hosts.values()) == urls.len()
    assert set(found.hosts["unsafe"]) == {"host0.example", "host1.example", "host2.example"}


def test_a_ledger_file_is_counted_once_and_damaged_counts_again(
    store_uri: str, tmp_path: Path, image: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = ledger_rows(60)
    root = storage.join(store_uri, "datasets", "d")
    _, first = published(root, tmp_path, [rows[:30]], image)
    _, second = published(root, tmp_path, [rows[:30], rows[30:]], image)
    count_ledgers(root, first)
    read: list[str] = []
    download = storage.download

    def noting(uri: str, path: Path, sha256: str | None = None) -> storage.StoredObject:
        read.append(uri)
        return download(uri, path, sha256)

    monkeypatch.setattr(storage, "download", noting)
    whole = count_ledgers(root, second)
    assert read == [storage.join(root, second.ledger[1].path)]
    assert count_ledgers(root, second) == whole
    assert len(read) == 1
    storage.write_bytes(storage.join(root, counts_path(second.ledger[0])), b'{"num_rows": 1')
    assert count_ledgers(root, second) == whole
    storage.write_bytes(storage.join(root, second.ledger[0].path), b"damaged")
    storage.delete(storage.join(root, counts_path(second.ledger[0])))
    with pytest.raises(storage.DigestMismatch):
        count_ledgers(root, second)


@pytest.mark.slow
def test_many_rows_are_counted_by_spark(
    tmp_path: Path, image: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ATELIER_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(ledger_counts, "ROWS_ON_DRIVER", 10)
    rows = ledger_rows(100)
    root = (tmp_path / "datasets" / "d").as_uri()
    _, manifest = published(root, tmp_path, [rows[:30], rows[30:50], rows[50:]], image)
    session = spark_session("report", ClusterConfig(), {})
    try:
        assert count_ledgers(root, manifest, lambda: session) == counts_of_rows(rows)
        storage.write_bytes(storage.join(root, manifest.ledger[0].path), b"x" * 1000)
        storage.delete_prefix(storage.join(root, "report"))
        with pytest.raises(UserError, match=manifest.ledger[0].path):
            count_ledgers(root, manifest, lambda: session)
    finally:
        stop_spark(session)


def test_hosts_are_bounded_and_the_largest_stay() -> None:
    total = LedgerCounts()
    for part in range(50):
        hosts = {f"rare{part}-{number}.example": 1 for number in range(100)}
        total.add(LedgerCounts(hosts={"committed": {**hosts, "big.example": 9}}), hosts=100)
    assert len(total.hosts["committed"]) == 100
    assert next(iter(total.hosts["committed"].items())) == ("big.example", 450)
    for number in range(300):
        total.add(LedgerCounts(languages={f"l{number}": [1, 0], "en": [5, 5]}))
    assert len(total.languages) == ledger_counts.VALUES_IN_MEMORY
    assert total.languages["en"] == [1500, 1500]


def test_the_page_loads_nothing_and_text_is_text(
    store_uri: str, tmp_path: Path, image: bytes
) -> None:
    rows = ledger_rows(200)
    root = storage.join(store_uri, "datasets", "d")
    recipe = {"source": HOSTILE, "filters": {"languages": [HOSTILE]}}
    uri, manifest = published(root, tmp_path, [rows], image, recipe=recipe, source=HOSTILE)
    text = storage.read_bytes(write_report(uri, manifest)).decode()
    page = Page(text)
    assert not {"script", "link", "iframe", "a", "form", "object"} & set(page.tags)
    assert page.loads
    assert all(load.startswith("src=data:image/jpeg;base64,") for load in page.loads)
    assert "url(" not in text
    assert "@import" not in text
    assert HOSTILE in page.text
    assert page.tags["img"] == min(manifest.counts["committed"], 48)
    for told in (
        "http_404", "worth another try", "host1.example", "aesthetic score", "160 rows were left",
        "80 of 80 samples, from 2 of 2 shards", "words of the caption",
        "200 rows of metadata", "50.0 % of those rows became samples", "stayed: 80 (40.0 %)",
        "did not come: 80 (40.0 %)", "rejected before anything was asked: 40 (20.0 %)",
    ):  # fmt: skip
        assert told in " ".join(page.text.split()), told
    assert len(text) < 300_000
    assert storage.read_bytes(write_report(uri, manifest)).decode() == text


def test_a_damaged_shard_is_told_and_the_page_is_made(
    store_uri: str, tmp_path: Path, image: bytes
) -> None:
    root = storage.join(store_uri, "datasets", "d")
    uri, manifest = published(root, tmp_path, [ledger_rows(200)], image)
    storage.write_bytes(storage.join(root, manifest.shards[0].path), b"no tar")
    storage.delete(storage.join(root, manifest.shards[1].path))
    page = Page(storage.read_bytes(write_report(uri, manifest)).decode())
    assert "2 shards could not be read" in page.text
    assert page.tags["img"] == 0


def test_every_reason_has_words() -> None:
    assert set(REASONS) <= set(WORDS)
    assert set(REASONS) >= BEFORE_FETCH
    assert words_for("failed:http_404") == "could not be fetched: http 404"
    assert words_for("something_new") == "something new"


def test_the_card_is_made_from_the_manifest_alone(
    store_uri: str, tmp_path: Path, image: bytes, trap_world: Any
) -> None:
    from infra.config import semantic_part

    config = trap_world.config()
    root = storage.join(store_uri, "datasets", "d")
    uri, manifest = published(
        root, tmp_path, [ledger_rows(200)], image,
        recipe=semantic_part(config), source="laion", image_size_px=64, crop="square",
        unknown={"keep": {"watermark_prob": 7}}, captions={"cut at a word": 3},
    )  # fmt: skip
    write_report(uri, manifest)
    stored = storage.read_bytes(storage.join(root, manifest.version, "card.md")).decode()
    assert stored == card(manifest) == card(load_manifest(uri))
    _, front, body = stored.split("---\n", 2)
    known = yaml.safe_load(front)
    assert known["pretty_name"] == "d"
    assert known["size_categories"] == ["n<1K"]
    assert known["task_categories"] == ["text-to-image"]
    for told in (
        "width of at least 128 px and height of at least 128 px; rows without one were dropped",
        "probability of being unsafe of at most 0.5",
        "| failed:timeout | 40 | 20.00 % |",
        "80 of 160 links (50.0 %) did not answer",
        "7 rows went on without watermark prob (keep)",
        "no image was held against a digest",
        "robots.txt (RFC 9309)",
        "atelier takedown --dataset d",
        manifest.version,
    ):
        assert told in body, told


def test_a_ledger_of_an_earlier_version_is_read_and_written_on(
    store_uri: str, tmp_path: Path, image: bytes
) -> None:
    """It has neither an md5 nor what was recorded of one."""
    root = storage.join(store_uri, "datasets", "d")
    rows = ledger_rows(50).with_columns(pl.lit("0" * 64).alias("sha256"))
    uri, manifest = published(root, tmp_path, [rows], image, recorded_sha256={"same": 20})
    rows.drop("recorded_md5", "md5").write_parquet(tmp_path / "older.parquet")
    data = (tmp_path / "older.parquet").read_bytes()
    digest = sha256_bytes(data)
    storage.write_bytes(storage.join(root, ledger_path(digest)), data)
    older = [FileEntry(ledger_path(digest), len(data), digest, rows.height)]
    before = replace(manifest, ledger=older)
    old_uri = publish_manifest(root, before)
    write_report(old_uri, before)
    assert count_ledgers(root, before) == count_ledgers(root, manifest)
    found = diff_datasets(old_uri, uri)
    assert (found.kept, found.added, found.removed, found.changed) == (20, 0, 0, 0)
    assert "20 images had, when they were fetched, the sha256" in card(before)
    with LedgerFile(tmp_path, "again") as file:
        file.add(pl.read_parquet(data))
        again = file.publish(root)
    assert again is not None
    written = pl.read_parquet(storage.read_bytes(storage.join(root, again.path), again.sha256))
    assert written.equals(rows.select(written.columns))


def test_a_card_cannot_be_broken_out_of(tmp_path: Path, image: bytes) -> None:
    root = (tmp_path / "datasets" / "d").as_uri()
    name = 'x"\n---\nevil: 1'
    _, manifest = published(
        root, tmp_path, [ledger_rows(10)], image, source="<b>|`",
        derivations=[{"kind": "a`b", "keep": "```"}],
    )  # fmt: skip
    manifest.__dict__["name"] = name
    text = card(manifest)
    assert yaml.safe_load(text.split("---\n")[1])["pretty_name"] == name
    assert not re.search(r"(?<!\\)<b>", text)
    assert "```" not in text
