"""What is on a block list is never asked for, never stored, and never told."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from infra import storage
from infra.errors import UserError
from pipelines.plan import plan_curation
from pipelines.tombstones import digest_of, named_by, parse_list, read_block_lists
from tests.pipelines.conftest import encoded, picture, response
from tests.pipelines.test_build import ledger, run, samples

GOOD = "http://evil.example/good"


def test_what_is_listed_is_not_fetched_not_stored_and_not_told(
    trap_world: Any, tmp_path: Path
) -> None:
    by_bytes = hashlib.sha256(encoded(picture(3))).hexdigest()
    (tmp_path / "urls.txt").write_text(
        f"# by address\n{GOOD}/0.jpg\n\nurl:{GOOD}/1.jpg\nurl-sha256:{digest_of(f'{GOOD}/2.jpg')}\n"
    )
    (tmp_path / "bytes.txt").write_text(f"sha256:{by_bytes.upper()}\n")
    config = trap_world.config(block=[str(tmp_path / "urls.txt"), str(tmp_path / "bytes.txt")])
    store = (tmp_path / "store").as_uri()
    plan = plan_curation("traps", config, store)
    manifest = run(plan)
    asked = {request.split(" ")[1] for request in trap_world.web.requests}
    assert not asked & {f"/good/{number}.jpg" for number in range(3)}
    assert "/good/4.jpg" in asked
    rows = ledger(plan.build, manifest)
    gone = rows.filter(pl.col("reason") == "takedown")
    # Row 0 is there twice and row 1 three times in some form.
    assert gone.height == manifest.rejected["takedown"] >= 4
    assert gone["url"].str.starts_with("removed:").all()
    told = [storage.read_bytes(info.uri) for info in storage.list_objects(store)]
    for number in range(3):
        assert not any(f"/good/{number}.jpg".encode() in data for data in told)
    stored = {hashlib.sha256(members["jpg"]).hexdigest() for members in
              samples(plan.build, manifest).values()}  # fmt: skip
    assert by_bytes not in stored


def test_no_other_spelling_and_no_redirect_leads_to_what_is_listed(
    trap_world: Any, tmp_path: Path
) -> None:
    web, host = trap_world.web, "evil.example"
    for number, url in enumerate(
        [f"{GOOD}/0.jpg#x", f"HTTP://{host}/good/0.jpg", f"http://{host}:80/good/0.jpg",
         f"{GOOD}/0.jpg ", f"http://{host}/bad/../good/%30.jpg", f"http://{host}/to/url",
         f"http://{host}/to/domain", f"http://{host}/to/good"]
    ):  # fmt: skip
        row = trap_world.rows[5] | {"URL": url, "TEXT": f"another picture {number}"}
        trap_world.rows.append(row)
    away = "http://listed.example/1.jpg"
    for name, leads_to in (("url", f"{GOOD}/0.jpg#y"), ("domain", away), ("good", "/good/4.jpg")):
        web.route(f"/to/{name}", response(b"", f"Location: {leads_to}", status="302 x"))
    web.route("/1.jpg", response(encoded(picture(77))))
    trap_world.write()
    listed = tmp_path / "list.txt"
    listed.write_text(f"{GOOD}/0.jpg\ndomain:listed.example\n")
    config = trap_world.config(block=[str(listed)])
    reached = {**config.fetch.connect_to, "listed.example:80": f"127.0.0.1:{web.port}"}
    fetch = config.fetch.model_copy(update={"connect_to": reached})
    config = config.model_copy(update={"fetch": fetch})
    plan = plan_curation("traps", config, (tmp_path / "store").as_uri())
    manifest = run(plan)
    asked = {request.split(" ")[1] for request in web.requests}
    assert {"/to/url", "/to/domain", "/good/4.jpg"} <= asked
    assert not asked & {"/good/0.jpg", "/good/%30.jpg", "/1.jpg", "/bad/../good/%30.jpg"}
    assert "listed.example" not in "".join(web.requests)
    rows = ledger(plan.build, manifest)
    gone = rows.filter(pl.col("reason") == "takedown")
    # The row itself, its copy, its five other spellings, and two redirects.
    assert gone.height == manifest.rejected["takedown"] == 9
    assert gone["url"].str.starts_with("removed:").all()
    led = rows.filter(pl.col("url").str.ends_with("/to/good"))["disposition"].to_list()
    assert led == ["rejected"]  # the same bytes as /good/4.jpg


def test_lists_are_known_by_what_they_name(trap_world: Any, tmp_path: Path) -> None:
    store = (tmp_path / "store").as_uri()
    first, second = tmp_path / "a.txt", tmp_path / "b.txt"
    first.write_text(f"{GOOD}/0.jpg\n{GOOD}/1.jpg\n")
    key = plan_curation("traps", trap_world.config(block=[str(first)]), store).build.key
    second.write_text(f"# the same, elsewhere\nurl:{GOOD}/1.jpg\n{GOOD}/0.jpg\n")
    assert plan_curation("traps", trap_world.config(block=[str(second)]), store).build.key == key
    second.write_text(f"{GOOD}/0.jpg\n")
    assert plan_curation("traps", trap_world.config(block=[str(second)]), store).build.key != key
    assert plan_curation("traps", trap_world.config(), store).build.key != key


def test_a_domain_is_not_asked(trap_world: Any, tmp_path: Path) -> None:
    listed = tmp_path / "domains.txt"
    listed.write_text(f"domain-sha256:{digest_of('evil.example')}\ndomain:other.example\n")
    plan = plan_curation(
        "traps", trap_world.config(block=[str(listed)]), (tmp_path / "store").as_uri()
    )
    manifest = run(plan)
    assert trap_world.web.requests == []
    assert manifest.counts["committed"] == 0


@pytest.mark.parametrize(
    "line",
    ["just words", "sha256:12", "sample:" + "g" * 32, "domain:http://a.example", "domain:",
     "url-sha256:https://a.example/1.jpg", "url:nothing"],
)  # fmt: skip
def test_a_line_that_is_odd_is_named_and_not_repeated(tmp_path: Path, line: str) -> None:
    path = tmp_path / "list.txt"
    path.write_text(f"https://a.example/1.jpg\n{line}\n")
    with pytest.raises(UserError, match="in line 2 of") as caught:
        read_block_lists([path.as_uri()])
    _, colon, after = line.partition(":")
    secret = after if colon else line
    assert len(secret) < 3 or secret not in str(caught.value)
    with pytest.raises(UserError, match="a block list"):
        read_block_lists([(tmp_path / "absent.txt").as_uri()])


def test_lines_and_digests_of_them_are_the_same_list() -> None:
    plain = parse_list("https://a.example/1.jpg\ndomain:B.example.\n", "x")
    hashed = parse_list(
        f"url-sha256:{digest_of('https://a.example/1.jpg')}\n"
        f"domain-sha256:{digest_of('b.example').upper()}\n",
        "x",
    )
    assert named_by(plain) == named_by(hashed)
