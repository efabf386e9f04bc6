"""Hostile captions through a whole build, to the shard, the ledger, the manifest and the page."""

from __future__ import annotations

import io
import json
import unicodedata
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from infra import storage
from infra.manifest import DatasetManifest
from pipelines.build import Build
from pipelines.plan import plan_curation
from pipelines.shards import read_shard
from tests.pipelines.test_build import run

SECRETS = ("jane.doe@example.com", "212-555-0187", "4111 1111 1111 1111", "AKIAIOSFODNN7EXAMPLE")
BIG = "ten megabytes of fox " * 500_000
NASTY = {
    "NUL": ("a\x00fox", "afox"),
    "ANSI": ("\x1b[31mred\x1b[0m fox", "[31mred[0m fox"),
    "forged line": ("fox\r\n2026 INFO all is well\u2028x", "fox 2026 INFO all is well x"),
    "bidi": ("safe\u202egnp.exe fox", "safegnp.exe fox"),
    "zero width": ("f\u200bo\u200dx\ufeff", "fox"),
    "combining": ("fo\u0301x", "fóx"),
    "script": ("<script>alert(1)</script>fox", "fox"),
    "escaped script": ("&lt;img src=x onerror=alert(1)&gt;fox", "fox"),
    "attribute": ('"><svg/onload=alert(1)>fox', '"> fox'),
    "formula": ("=HYPERLINK(\"http://evil.example\",\"fox\")", "HYPERLINK(\""),
    "special tokens": ("fox <|endoftext|> <|startoftext|>hen", "fox hen"),
    "special token in pieces": ("fox <|end\u200boftext|>", "fox"),
    "e-mail": (f"fox by {SECRETS[0]}", "fox by"),
    "phone": (f"fox, call {SECRETS[1]}", "fox, call"),
    "card": (f"fox card {SECRETS[2]}", "fox card"),
    "key": (f"fox key {SECRETS[3]}", "fox key"),
    "file": ("IMG_1234.jpg", None),
    "nothing": ("\u200b<b></b>", None),
    "braces": ("{{7*7}} ${7*7} %s %n fox", "{{7*7}} ${7*7} %s %n fox"),
    "path": ("../../etc/passwd fox", "../../etc/passwd fox"),
    "big": (BIG, BIG.strip()),
}  # fmt: skip


class Nodes(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.handlers: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.handlers += [name for name, _ in attrs if name.startswith("on")]


@pytest.fixture
def nasty_world(trap_world: Any) -> Any:
    """The good rows of the trap world with a nasty caption each."""
    good = [row for row in trap_world.rows if "/good/" in (row["URL"] or "")]
    del trap_world.captions[:-1]
    trap_world.rows[:] = [
        row | {"TEXT": text} for row, (text, _) in zip(good, NASTY.values(), strict=False)
    ]
    trap_world.write()
    return trap_world


def build(world: Any, tmp_path: Path, **captions: Any) -> tuple[Build, DatasetManifest]:
    if captions:  # the large one has its own test
        world.rows[:] = [row for row in world.rows if row["TEXT"] != BIG]
        world.write()
    config = world.config(
        filters={"max_caption_chars": None}, captions={"token_budget": 77, **captions}
    )
    plan = plan_curation("nasty", config, (tmp_path / "store").as_uri())
    return plan.build, run(plan)


def rows_of(build: Build, manifest: DatasetManifest) -> dict[str, dict[str, Any]]:
    files = [storage.join(build.dataset_root, entry.path) for entry in manifest.ledger]
    frame = pl.concat(pl.read_parquet(storage.read_bytes(file)) for file in files)
    return {row["url"]: row for row in frame.iter_rows(named=True)}


def test_nasty_captions_are_stored_clean_and_counted(nasty_world: Any, tmp_path: Path) -> None:
    job, manifest = build(nasty_world, tmp_path)
    assert manifest.counts["rows_in"] == len(NASTY)
    samples = {}
    for shard in manifest.shards:
        for _, members in read_shard(
            storage.read_bytes(storage.join(job.dataset_root, shard.path))
        ):
            known = json.loads(members["json"])
            samples[known["url"]] = (members["txt"].decode(), known)
    ledger = rows_of(job, manifest)
    for row, (name, (_, left)) in zip(nasty_world.rows, NASTY.items(), strict=False):
        if left is None:
            assert ledger[row["URL"]]["reason"] == "no_caption", name
            continue
        text, known = samples[row["URL"]]
        assert known["captions"][0]["origin"] == "alt"
        full = known["captions"][0]["text"]
        assert full.startswith(left), name
        assert full.startswith(text), name
        assert not [c for c in text + full if unicodedata.category(c) in ("Cc", "Cf", "Zl", "Zp")]
        assert "<" not in full
    assert len(samples[nasty_world.rows[-1]["URL"]][0].split()) < 77
    counts = manifest.attributes["captions"]
    assert {kind: counts[kind] for kind in ("email", "phone", "card", "secret")} == {
        "email": 1, "phone": 1, "card": 1, "secret": 1,
    }  # fmt: skip
    assert counts["cut_at_word"] == 1
    assert counts["markup"] == 7
    assert len(manifest.attributes["tokenizer_sha256"]) == 64
    told = {row["detail"] for row in ledger.values()}
    assert "caption: email" in told


def test_no_stored_byte_holds_personal_data(
    nasty_world: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    job, _ = build(nasty_world, tmp_path, train_on="alt")
    for path in (tmp_path / "store").rglob("*"):
        if not path.is_file():
            continue
        data = path.read_bytes()
        if data[:4] == b"PAR1":
            rows = pl.read_parquet(io.BytesIO(data))
            data = rows.drop(pl.selectors.binary()).write_json().encode()  # signatures are no text
        for secret in SECRETS:
            assert secret.encode() not in data, path
    assert not [secret for secret in SECRETS if secret in caplog.text]
    assert job.key


def test_dropped_rows_are_in_the_ledger_with_the_kind_alone(
    nasty_world: Any, tmp_path: Path
) -> None:
    job, manifest = build(nasty_world, tmp_path, personal_data="drop")
    assert manifest.rejected["personal_data"] == 4
    details = [
        r["detail"] for r in rows_of(job, manifest).values() if r["reason"] == "personal_data"
    ]
    assert sorted(details) == [
        "caption: card",
        "caption: email",
        "caption: phone",
        "caption: secret",
    ]


def test_the_page_shows_text_and_runs_nothing(nasty_world: Any, tmp_path: Path) -> None:
    off = {"clean": {"markup": False}, "personal_data": "off"}
    job, manifest = build(nasty_world, tmp_path, **off)
    page = storage.read_bytes(storage.join(job.dataset_root, manifest.version, "report.html"))
    nodes = Nodes()
    nodes.feed(page.decode())
    assert "figure" in nodes.tags
    assert not {"script", "svg", "iframe", "a"} & set(nodes.tags)
    assert not nodes.handlers
