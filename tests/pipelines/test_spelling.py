"""One spelling per address, the same row by row and by whole columns."""

from __future__ import annotations

import re

import polars as pl
from hypothesis import given
from hypothesis import strategies as st

from pipelines.guard import Rejected, take_apart
from pipelines.spelling import address_of, one_address, one_addresses

PIECES = [
    "a",
    "B",
    "1.jpg",
    ".",
    "..",
    "%2e",
    "%41",
    "%2f",
    "%zz",
    "",
    "~",
    "caf\u00e9",
    "&",
    "x y",
]
HOSTS = [
    "a.example", "A.Example", "a.example.", "a.example:80", "a.example:443", "a.example:8080",
    "[::1]", "1.2.3.4", "b\u00fccher.example", "u@a.example",
]  # fmt: skip
PATHS = st.lists(st.sampled_from(PIECES), max_size=4).map(
    lambda parts: "".join(f"/{p}" for p in parts)
)
QUERIES = st.lists(st.sampled_from(["?", *PIECES, "/", "="]), max_size=3).map("".join)
URLS = st.one_of(
    st.tuples(
        st.sampled_from(["http://", "https://", "HTTP://", "ftp://"]),
        st.sampled_from(HOSTS),
        PATHS,
        QUERIES.map(lambda query: f"?{query}" if query else ""),
        st.sampled_from(["", " ", "#top"]),
    ).map("".join),
    st.text(max_size=20),
)


@given(URLS)
def test_a_spelling_is_its_own_and_nothing_is_spelled_past_the_parser(url: str) -> None:
    spelled = one_address(url)
    try:
        target = take_apart(url)
    except Rejected:
        assert spelled is None
        return
    assert spelled == address_of(target) == one_address(str(spelled))
    assert not re.search(r"/\.\.?(/|$)", str(spelled).partition("?")[0])
    # What is asked for and the spelling go to the same place.
    again = take_apart(str(spelled))
    assert (again.scheme, again.port) == (target.scheme, target.port)
    assert again.host == target.host.strip(".")


@given(st.lists(st.one_of(URLS, st.none())))
def test_a_column_is_spelled_as_its_rows_are(urls: list[str | None]) -> None:
    expected = [None if url is None else one_address(url) or url for url in urls]
    assert one_addresses(pl.Series("url", urls, dtype=pl.String)).to_list() == expected
