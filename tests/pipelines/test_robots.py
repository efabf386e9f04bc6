"""robots.txt as RFC 9309 reads it, TDM reservations, and patterns that try to take long."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.robots import PathRules, parse_robots, parse_tdmrep

ROBOTS = [
    # (robots.txt, path, allowed)
    ("", "/a", True),
    ("<html>not found</html>", "/a", True),
    ("User-agent: *\nDisallow: /", "/a", False),
    ("User-agent: *\nDisallow:", "/a", True),
    ("Disallow: /", "/a", True),
    ("User-agent: other\nDisallow: /", "/a", True),
    ("User-agent: Atelier\nDisallow: /", "/a", False),
    ("USER-AGENT : ATELIER/2.0\nDISALLOW : /", "/a", False),
    ("User-agent: atelierx\nDisallow: /", "/a", True),
    ("User-agent: *\nDisallow: /\n\nUser-agent: atelier\nAllow: /", "/a", True),
    ("User-agent: atelier\nDisallow:\n\nUser-agent: *\nDisallow: /", "/a", True),
    ("User-agent: a\nUser-agent: atelier\nUser-agent: b\nDisallow: /", "/a", False),
    ("User-agent: atelier\nDisallow: /a\nUser-agent: x\nDisallow: /\nUser-agent: atelier\n"
     "Disallow: /b", "/b/c", False),
    ("User-agent: atelier\nSitemap: http://x/\nUser-agent: b\nDisallow: /", "/a", False),
    ("User-agent: *\nCrawl-delay: 5\nDisallow: /a", "/a", False),
    ("\ufeffUser-agent: *\r\nDisallow: /a # why\r\n", "/a", False),
    ("User-agent: *\rDisallow: /a\r", "/a", False),
    ("User-agent: *\nDisallow: /a\nAllow: /a/b", "/a/b/c", True),
    ("User-agent: *\nAllow: /a/b\nDisallow: /a", "/a/c", False),
    ("User-agent: *\nAllow: /page\nDisallow: /*.htm", "/page.htm", False),
    ("User-agent: *\nAllow: /folder\nDisallow: /folder", "/folder/x", True),
    ("User-agent: *\nDisallow: /*.jpg$", "/x/y.jpg", False),
    ("User-agent: *\nDisallow: /*.jpg$", "/x/y.jpg?s=1", True),
    ("User-agent: *\nDisallow: /*?", "/x/y.jpg?s=1", False),
    ("User-agent: *\nDisallow: /fish*", "/fishheads/y.php", False),
    ("User-agent: *\nDisallow: /fish", "/Fish", True),
    ("User-agent: *\nDisallow: /*a*b*c$", "/xxaxbxbxc", False),
    ("User-agent: *\nDisallow: /*a*b*c$", "/xxaxbxbxcd", True),
    ("User-agent: *\nDisallow: /$", "/", False),
    ("User-agent: *\nDisallow: /$", "/a", True),
    ("User-agent: *\nDisallow: *private", "/x/private", False),
    ("User-agent: *\nDisallow: private", "/private", False),
    ("User-agent: *\nDisallow: /a%3cd", "/a%3Cd", False),
    ("User-agent: *\nDisallow: /%61b", "/ab", False),
    ("User-agent: *\nDisallow: /caf\u00e9", "/caf%C3%A9/x", False),
    ("User-agent: *\nDisallow: /a%2Fb", "/a/b", True),
    ("User-agent: *\nDisallow: /images/\n", "/images", True),
]  # fmt: skip


@pytest.mark.parametrize(("text", "path", "allowed"), ROBOTS)
def test_reads_robots_txt(text: str, path: str, allowed: bool) -> None:
    assert parse_robots(text.encode(), "atelier").allow(path) is allowed


TDM = [
    ('[{"location": "/", "tdm-reservation": 1}]', "/a", False),
    ('[{"location": "/", "tdm-reservation": 0}]', "/a", True),
    ('[{"location": "/img/*", "tdm-reservation": 1}]', "/a", True),
    ('[{"location": "/img/*", "tdm-reservation": 1}]', "/img/a", False),
    ('[{"location": "/", "tdm-reservation": 1}, {"location": "/free/", "tdm-reservation": 0}]',
     "/free/a", True),
    ('[{"location": "/a", "tdm-reservation": 0}, {"location": "/a", "tdm-reservation": 1}]',
     "/a", False),
    ('{"location": "/", "tdm-reservation": 1}', "/a", True),
    ('[{"location": 7, "tdm-reservation": 1}, null, []]', "/a", True),
    ("<html>", "/a", True),
    ("[" * 100_000, "/a", True),
]  # fmt: skip


@pytest.mark.parametrize(("text", "path", "allowed"), TDM)
def test_reads_tdm_reservations(text: str, path: str, allowed: bool) -> None:
    assert parse_tdmrep(text.encode()).allow(path) is allowed


def test_no_pattern_takes_long() -> None:
    hostile = b"User-agent: *\n" + b"Disallow: /" + b"*a" * 2000 + b"$\n"
    started_at = time.process_time()
    parse_robots(hostile, "atelier").allow("/" + "a" * 4000 + "b")
    assert time.process_time() - started_at < 0.5


def test_no_file_keeps_more_than_so_many_rules() -> None:
    text = b"User-agent: *\n" + b"".join(b"Disallow: /%d\n" % n for n in range(40_000))
    assert len(parse_robots(text, "atelier").rules) <= 20_000


@given(st.binary(max_size=300), st.text(max_size=30))
def test_any_bytes_are_read(data: bytes, path: str) -> None:
    for rules in (parse_robots(b"User-agent: *\nDisallow: " + data, "atelier"), parse_tdmrep(data)):
        assert isinstance(rules, PathRules)
        assert rules.allow("/" + path) in (True, False)
