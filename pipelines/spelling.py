"""One spelling per address: what a server could not tell apart is compared as one.

``HTTP://A.example:80/x/../1.jpg#top`` asks for what ``http://a.example/1.jpg`` does. Requests keep
their own spelling; this one serves tombstones, block lists and copies of an address.
"""

from __future__ import annotations

import re
from dataclasses import replace
from urllib.parse import quote

import polars as pl

from pipelines.guard import MAX_URL_CHARS, Rejected, Target, take_apart

# Nearly all addresses, which are spelled so already. No empty segment, none that begins with a
# dot, no percent, no default port: whatever else there may be is taken apart.
_PLAIN = (
    r"\Ahttps?://[a-z0-9_-]+(\.[a-z0-9_-]+)*"
    r"(/[A-Za-z0-9_~!$'()*+,;=:@&-][A-Za-z0-9._~!$'()*+,;=:@&-]*)+"
    r"(\?[A-Za-z0-9._~!$'()*+,;=:@&/-]+)?"
)
_PLAIN_HERE = re.compile(_PLAIN)
_PERCENT = re.compile(r"%([0-9A-Fa-f]{2})")
_UNRESERVED = frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-._~")
_KEEP_IN_PATH = "%/:=&?~+!$,;'@()*[]|"


def one_path(path: str) -> str:
    """A path, with its query if it has one: what must be escaped is, what need not be is not."""

    def unescaped(found: re.Match[str]) -> str:
        character = chr(int(found.group(1), 16))
        return character if character in _UNRESERVED else found.group().upper()

    return _PERCENT.sub(unescaped, quote(path, safe=_KEEP_IN_PATH))


def one_address(url: str) -> str | None:
    """The spelling of a web address; None for what is none, and would not be asked for."""
    if len(url) <= MAX_URL_CHARS and _PLAIN_HERE.fullmatch(url):
        return url
    try:
        return address_of(take_apart(url))
    except Rejected:
        return None


def address_of(target: Target) -> str:
    """The spelling of the address that a request goes to."""
    path, question, query = one_path(target.request_path).partition("?")
    host = target.host.strip(".") or target.host
    return replace(target, host=host, request_path=_without_dots(path) + question + query).url


def one_addresses(urls: pl.Series) -> pl.Series:
    """Per address its one spelling; itself where it is no web address, null where it is null."""
    odd = urls.filter(~urls.str.contains(_PLAIN + r"\z")).unique().drop_nulls()
    if odd.is_empty():
        return urls
    return urls.replace(odd, [one_address(url) or url for url in odd])


def _without_dots(path: str) -> str:
    """The path without ``.`` and ``..``, as RFC 3986 wants them removed."""
    kept: list[str] = []
    segments = path.split("/")[1:]
    for segment in segments:
        if segment == "..":
            kept = kept[:-1]
        elif segment != ".":
            kept.append(segment)
    if segments[-1] in (".", ".."):
        kept.append("")
    return "/" + "/".join(kept)
