"""B1, B2, B8, B9: addresses that are no plain web addresses, and who is asked for the others."""

from __future__ import annotations

import json
from typing import Any

import pytest

from pipelines.connection import Failed
from pipelines.fetch import Fetcher
from pipelines.guard import Rejected, parse_url
from tests.conftest import run_python
from tests.pipelines.conftest import EvilWeb

PORTS = (80, 443)
SCHEMES = (
    "file", "data", "ftp", "ftps", "sftp", "jar", "gopher", "dict", "ldap", "ldaps", "tftp", "ws",
    "wss", "smb", "nfs", "s3", "gs", "ssh", "telnet", "javascript", "blob", "view-source", "netdoc",
    "php", "unix", "pipe",
)  # fmt: skip
INNER_PORTS = (22, 23, 25, 53, 110, 111, 2375, 3306, 5432, 6379, 8080, 8265, 9000, 9200, 11211)

OPENED = """
import json, sys
from pipelines.config import FetchConfig
from pipelines.fetch import Fetcher
from pipelines.arrivals import fetch_body

seen = []
fetcher = Fetcher(FetchConfig(retries=0, total_deadline_seconds=2))
fetch_body("http://a.example:22/", fetcher)  # whatever is imported late is imported
watched = ("open", "socket.connect", "socket.getaddrinfo", "subprocess.Popen", "os.system")
sys.addaudithook(lambda event, args: seen.append(event) if event in watched else None)
ended = [fetch_body(url, fetcher).reason for url in json.loads(sys.argv[1])]
seen = list(seen)
print(json.dumps([ended, seen]))
"""


def test_no_other_scheme_opens_a_file_a_socket_or_a_process() -> None:
    """As Python's audit events tell, in a process of its own."""
    urls = [f"{scheme}://127.0.0.1/etc/passwd" for scheme in SCHEMES]
    urls += [
        "file:///etc/passwd",
        "file:/etc/passwd",
        "FILE:///etc/passwd",
        "data:image/png;base64,AA",
    ]
    done = run_python(OPENED, json.dumps(urls))
    assert done.returncode == 0, done.stderr
    ended, seen = json.loads(done.stdout)
    assert len(SCHEMES) >= 15
    assert ended == ["scheme"] * len(urls)
    assert seen == []


@pytest.mark.parametrize("port", INNER_PORTS)
def test_ports_that_nobody_allowed_are_not_asked(port: int) -> None:
    for url in (f"http://public.example:{port}/a.jpg", f"https://public.example:{port}/a.jpg"):
        with pytest.raises(Rejected) as caught:
            parse_url(url, PORTS)
        assert caught.value.reason == "port"


# What parsers disagree on; evil.example is the host that the guard may come to, if any.
CONFUSING = [
    "http://a@evil.example/", "http://evil.example@a.example/", "http://a.example\\@evil.example/",
    "http://evil.example\\.a.example/", "http://evil.example\\a", "http:\\\\evil.example/",
    "http://evil.example#@a.example/", "http://evil.example?@a.example/",
    "http://evil.example;@a.example/", "http://evil.example;a.example/", "http://evil.example/@a",
    "http://evil.example//a.example/", "http://evil.example/\\a.example/", "http:///evil.example/",
    "http:/evil.example/", "http:evil.example/", "//evil.example/",
    "http://evil.example\r\nHost: a/",
    "http://evil.example/x\r\nHost: a", "http://evil.example/x\nHost: a",
    "http://evil.example\t/",
    "http://evil.example/\x00", "http://evil.example%00.a.example/", "http://evil.example%2f.a/",
    "http://evil.example%0d%0aHost:a/", "http://evil.example:80:81/", "http://evil.example:/",
    "http://evil.example:80#:81/", "http://evil.example:0x50/", "http://evil.example:+80/",
    "http://evil.example:\u0668\u0660/", "http://EVIL.example/", "http://evil.example./",
    "http://ev\u0131l.example/", "http://\uff45vil.example/", "http://e\u00advil.example/",
    "http://evil\u3002example/", "http://evil\uff0fa.example/", "http://evil\u2024example/",
    "http://[evil.example]/", "http://evil.example]/", "http://evil..example/", "http://.evil.example/",
    "http://-evil.example/", "http://evil_.example/", "http://xn--evil.example/",
    "http://evil.example/ HTTP/1.1\r\nHost: a", "http://evil.example/a b",
    "http://evil.example/?a b#c",
    " http://evil.example/ ", "http://evil.example\u2028/", "http://ev\u0456l.example/",
]  # fmt: skip


def test_who_is_looked_up_is_who_is_asked_for(evil_web: EvilWeb) -> None:
    """One parser: the name looked up, the Host header and the request line are of one target."""
    asked: list[str] = []

    def lookup(host: str, port: int) -> list[str]:
        asked.append(host)
        raise OSError("nobody is asked")

    place = f"127.0.0.1:{evil_web.port}"
    refused = 0
    fetcher: Fetcher = evil_web.fetcher(lookup, connect_to={"evil.example:80": place})
    assert len(set(CONFUSING)) >= 40
    for url in CONFUSING:
        asked.clear()
        evil_web.requests.clear()
        evil_web.routes.clear()
        evil_web.routes = _Anything()
        with pytest.raises((Rejected, Failed)) as caught:
            fetcher.fetch(url)
        if isinstance(caught.value, Rejected):
            assert caught.value.reason in ("url", "scheme", "port"), url
            assert (asked, evil_web.requests) == ([], []), url
            refused += 1
            continue
        target = parse_url(url, PORTS)
        for head in evil_web.requests:
            lines = head.split("\r\n")
            assert [line for line in lines if line.startswith("Host:")] == ["Host: evil.example"], (
                url
            )
            assert lines[0] == f"GET {target.request_path} HTTP/1.1", url
            assert target.host == "evil.example", url
        assert set(asked) <= {target.host}, url
        assert not any(host in ("a", "a.example") for host in asked), url
    assert 25 <= refused < len(CONFUSING)


class _Anything(dict[str, Any]):
    """Every path is answered: not here."""

    def __missing__(self, path: str) -> Any:
        return lambda connection, _: connection.sendall(
            b"HTTP/1.1 404 no\r\nContent-Length: 0\r\n\r\n"
        )
