"""What is taken down is known by digests, in whatever part of a row it shows."""

from __future__ import annotations

from pathlib import Path

import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from infra import storage
from infra.digests import canonical_json, sha256_bytes
from pipelines.guard import take_apart
from pipelines.ledger import without_addresses
from pipelines.plan import build_key
from pipelines.tombstones import Tombstones, digest_of, load_tombstones, publish_tombstones

HOSTS = ["a.example", "img.a.example", "nota.example", "a.example.org", "b.example", "1.2.3.4"]


def rows(urls: list[str | None]) -> pl.DataFrame:
    return pl.DataFrame(
        {"url": urls, "sample_id": [f"{n:032x}" for n in range(len(urls))]},
        schema={"url": pl.String, "sample_id": pl.String},
    )


@pytest.mark.parametrize(
    ("url", "is_covered"),
    [
        ("http://a.example/1.jpg", True),
        ("https://IMG.A.example:8080/1.jpg?x=//b.example", True),
        ("https://user:word@a.example/1.jpg", True),
        ("//a.example/1.jpg", True),
        ("http://a.example./1.jpg", True),
        ("http://\uff41.example\u3002/1.jpg", True),
        ("http://b\u00fccher.example/1.jpg", True),
        ("http://nota.example/1.jpg", False),
        ("http://a.example.org/1.jpg", False),
        ("http://b.example/http://a.example/", False),
        ("http://[::1/", False),
        ("", False),
        (None, False),
    ],
)
def test_a_domain_covers_its_hosts_and_no_others(url: str | None, is_covered: bool) -> None:
    tombstones = Tombstones.of(domains=["A.Example", "xn--bcher-kva.example"])
    assert tombstones.covers(rows([url])).to_list() == [is_covered]


SPELLINGS = [
    "http://a.example/x/1.jpg",
    "http://a.example/x/1.jpg#top",
    "HTTP://A.EXAMPLE/x/1.jpg",
    "http://a.example:80/x/1.jpg",
    "http://a.example/x/1.jpg ",
    "http://a.example./x/1.jpg",
    "http://a.example/x/%31.jpg",
    "http://a.example/x/1.jpg?",
    "http://a.example/y/../x/./1.jpg",
    "http://a.example/%2e%2e/x/1.jpg",
]


@pytest.mark.parametrize("asked", SPELLINGS)
def test_an_address_is_known_in_every_spelling(asked: str) -> None:
    others = ["https://a.example/x/1.jpg", "http://a.example/X/1.jpg", "http://a.example/x/1.jpg?a",
              "http://a.example:8080/x/1.jpg", "http://a.example/x%2f1.jpg"]  # fmt: skip
    tombstones = Tombstones.of([asked])
    covered = tombstones.covers(rows([*SPELLINGS, *others])).to_list()
    assert covered == [True] * len(SPELLINGS) + [False] * len(others)
    assert all(tombstones.bar(take_apart(url)) for url in SPELLINGS)
    assert not any(tombstones.bar(take_apart(url)) for url in others)


def test_tombstones_of_earlier_versions_hold(store_uri: str) -> None:
    """They have the digest of what was asked for, and nothing else."""
    root = f"{store_uri}/datasets/d"
    odd = "http://b.example:80/1.jpg"
    old = {"urls": sorted(map(digest_of, [SPELLINGS[0], odd])), "domains": [], "images": [],
           "samples": [], "schema_version": 1}  # fmt: skip
    data = canonical_json(old)
    storage.write_bytes(f"{root}/tombstones/{sha256_bytes(data)[:32]}.json", data)
    found = load_tombstones(root)
    assert found.covers(rows([*SPELLINGS, odd])).all()
    assert found.bar(take_apart(SPELLINGS[3]))


def test_what_is_no_web_address_is_known_as_it_is() -> None:
    urls = ["tar://s/a.tar/k.jpg?offset=1&bytes=2", "http://u@a.example/", "", "x" * 5000]
    assert Tombstones.of(urls).covers(rows([*urls, None])).to_list() == [True] * 4 + [False]


@given(
    st.lists(st.sampled_from([f"http://{host}/{n}" for host in HOSTS for n in range(3)])),
    st.sets(st.sampled_from([f"http://{host}/{n}" for host in HOSTS for n in range(3)])),
    st.sets(st.sampled_from(HOSTS)),
    st.sets(st.integers(0, 5)),
)
def test_covers_agrees_with_brute_force(
    urls: list[str], removed: set[str], domains: set[str], samples: set[int]
) -> None:
    tombstones = Tombstones.of(removed, domains, samples=[f"{n:032X}" for n in samples])

    def is_covered(number: int, url: str) -> bool:
        host = url.split("/")[2]
        below = any(host == domain or host.endswith("." + domain) for domain in domains)
        return url in removed or below or number in samples

    expected = [is_covered(number, url) for number, url in enumerate(urls)]
    assert tombstones.covers(rows(list(urls))).to_list() == expected


def test_they_add_up_and_hold_nothing_plain(store_uri: str) -> None:
    root = f"{store_uri}/datasets/d"
    first = Tombstones.of(["http://secret.example/me.jpg"], ["secret.example"])
    second = Tombstones.of(images=["A" * 64], samples=["b" * 32])
    assert not load_tombstones(root)
    for each in (first, second, first):
        publish_tombstones(root, each)
    assert load_tombstones(root) == first | second
    stored = list(storage.list_objects(f"{root}/tombstones"))
    assert len(stored) == 2
    assert all(b"secret" not in storage.read_bytes(info.uri) for info in stored)
    storage.write_bytes(stored[0].uri, storage.read_bytes(stored[0].uri).replace(b"1", b"2"))
    with pytest.raises(storage.DigestMismatch):
        load_tombstones(root)


def test_a_build_without_takedowns_keeps_its_key() -> None:
    assert build_key("k", Tombstones()) == "k"
    one = build_key("k", Tombstones.of(["http://a.example/"]))
    assert len({one, "k", build_key("k", Tombstones.of(domains=["a.example"]))}) == 3


def test_the_ledger_forgets_addresses(tmp_path: Path) -> None:
    frame = rows(["http://a.example/", "http://b.example/", None]).with_columns(
        reason=pl.Series(["takedown", None, "no_url"])
    )
    expected = [f"removed:{digest_of('http://a.example/')}", "http://b.example/", None]
    once = without_addresses(frame)
    assert once["url"].to_list() == expected
    assert without_addresses(once).equals(once)
