"""The open web at its worst: rows that aim inside this machine, servers that never end.

A canary answers on loopback, on IPv4 and IPv6, with every port the vectors name mapped to its own
allowed; it must never be called.
"""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from pipelines.config import FetchConfig, OptOutConfig
from pipelines.connection import Failed
from pipelines.fetch import Fetcher
from pipelines.guard import Rejected
from pipelines.hosts import system_lookup


class Canary(BaseHTTPRequestHandler):
    """Would hand out an image and a secret to whoever gets through."""

    hits: list[str]

    def do_GET(self) -> None:
        self.hits.append(self.path)
        self.send_response(200)
        self.send_header("Content-Length", "6")
        self.end_headers()
        self.wfile.write(b"secret")

    def log_message(self, format: str, *args: Any) -> None:
        """Quiet."""


class Server6(ThreadingHTTPServer):
    address_family = socket.AF_INET6


@pytest.fixture(scope="module")
def canary() -> Iterator[tuple[int, list[str]]]:
    """A real HTTP server on 0.0.0.0 and, where the machine has it, on ::1; (port, paths asked)."""
    hits: list[str] = []
    handler = type("Counting", (Canary,), {"hits": hits})
    servers: list[ThreadingHTTPServer] = [ThreadingHTTPServer(("0.0.0.0", 0), handler)]
    port = int(servers[0].server_address[1])
    if socket.has_ipv6:
        with contextlib.suppress(OSError):
            servers.append(Server6(("::1", port), handler))
    threads = [threading.Thread(target=server.serve_forever, args=(0.05,)) for server in servers]
    for thread in threads:
        thread.start()
    yield port, hits
    for server in servers:
        server.shutdown()
        server.server_close()
    for thread in threads:
        thread.join()


HOSTS = [
    # Loopback, in every base and length that resolvers read.
    "127.0.0.1", "127.1", "127.0.1", "127.127.127.127", "127.255.255.254", "2130706433",
    "0x7f000001", "0x7F.0x0.0x0.0x1", "0x7f.1", "0x7f.0.1", "0177.0.0.1", "0177.1", "017700000001",
    "0000177.0.0.1", "00000000177.0.0.01", "127.0x1", "0x7f.0x000001", "127.00000000001",
    "0", "0.0", "0.0.0.0", "0x0", "00", "000.0.0.0",
    # Names.
    "localhost", "LOCALHOST", "LocalHost", "localhost.", "127.0.0.1.", "localhost.localdomain",
    "ip6-localhost",
    # Digits and dots that become ASCII when a name is normalised.
    "\uff11\uff12\uff17.0.0.1", "\u2460\u2461\u2466.0.0.1", "127\u30020\u30020\u30021",
    "127\uff0e0\uff0e0\uff0e1", "127\uff610\uff610\uff611", "\U0001d7cf\U0001d7d0\U0001d7d5.0.0.1",
    "\uff4c\uff4f\uff43\uff41\uff4c\uff48\uff4f\uff53\uff54", "l\u24deca\u24db\u24d7\u24deś\u24e3",
    "loc\u00adalhost", "local\u200bhost",
    # IPv6: loopback, unspecified, mapped, compatible, translated, tunnelled, scoped.
    "[::1]", "[0:0:0:0:0:0:0:1]", "[0000:0000:0000:0000:0000:0000:0000:0001]", "[::]",
    "[::ffff:127.0.0.1]", "[::ffff:7f00:1]", "[0:0:0:0:0:ffff:127.0.0.1]", "[::FFFF:127.0.0.1]",
    "[::127.0.0.1]", "[::7f00:1]", "[64:ff9b::127.0.0.1]", "[64:ff9b::7f00:1]",
    "[64:ff9b:1::7f00:1]", "[2002:7f00:1::]", "[2002:7f00:0001::7f00:1]", "[2002:a9fe:a9fe::1]",
    "[2001:0:7f00:1::]", "[2001::80ff:fffe]", "[::ffff:0:7f00:1]", "[::ffff:0.0.0.0]",
    "[fe80::1]", "[fe80::1%25lo]", "[fe80::1%lo]", "[fec0::1]", "[fc00::1]", "[fd00::1]",
    "[fd00:ec2::254]", "[ff02::1]", "[ff01::1]", "[2001:db8::1]", "[100::1]", "[3fff::1]",
    # Private, shared, link-local, documentation, multicast, reserved.
    "10.0.0.1", "10.255.255.255", "172.16.0.1", "172.31.255.254", "192.168.0.1", "192.168.1.254",
    "100.64.0.1", "100.127.255.254", "169.254.0.1", "192.0.0.1", "192.0.2.1", "198.18.0.1",
    "198.19.255.254", "198.51.100.1", "203.0.113.1", "192.88.99.1", "224.0.0.1", "239.255.255.250",
    "240.0.0.1", "255.255.255.255", "167772161", "0xa000001", "012.0.0.1", "0xC0A80001",
    "3232235521",
    # Where clouds hand out credentials: AWS, GCP, Azure, Alibaba, Oracle, ECS tasks.
    "169.254.169.254", "2852039166", "0xA9FEA9FE", "0xa9.0xfe.0xa9.0xfe", "0251.0376.0251.0376",
    "169.254.43518", "[::ffff:169.254.169.254]", "[::ffff:a9fe:a9fe]", "[64:ff9b::a9fe:a9fe]",
    "169.254.170.2", "168.63.129.16", "100.100.100.200", "192.0.0.192", "169.254.169.253",
]  # fmt: skip

# {port} is the canary's.
URLS = [
    "http://user@127.0.0.1:{port}/", "http://user:pass@127.0.0.1:{port}/",
    "http://public.example@127.0.0.1:{port}/", "http://public.example:80@127.0.0.1:{port}/",
    "http://public.example%40127.0.0.1:{port}/", "http://public.example#@127.0.0.1:{port}/",
    "http://public.example?@127.0.0.1:{port}/", "http://public.example;@127.0.0.1:{port}/",
    "http://127.0.0.1:{port}#@public.example/", "http://127.0.0.1:{port}?@public.example/",
    "http://127.0.0.1:{port}\\@public.example/", "http://public.example\\@127.0.0.1:{port}/",
    "http:\\\\127.0.0.1:{port}/", "http:/\\127.0.0.1:{port}/", "http:/127.0.0.1:{port}/",
    "http:///127.0.0.1:{port}/", "http:127.0.0.1:{port}/", "////127.0.0.1:{port}/",
    "http://127.0.0.1:{port}:80/", "http://127.0.0.1 :{port}/", "http://127.0.0.1\t:{port}/",
    "http://127.0.0.1:{port}\r\n/", "http://127.0.0.1%00:{port}/", "http://127.0.0.1\x00:{port}/",
    "http://127.0.0.1%2f:{port}/", "http://127.0.0.1%0d%0aHost:x:{port}/", "http://[127.0.0.1]:{port}/",
    "http://[::1]x:{port}/", "http://[::1:{port}/", "http://::1:{port}/", "http://[::1]]:{port}/",
    "http://[v1.127.0.0.1]:{port}/", "http://0x7f.0x.0.1:{port}/", "http://127.0.0.1:+{port}/",
    "http://127.0.0.1:0{port}/", "http://127.0.0.1:{port}./", "\u00a0http://127.0.0.1:{port}/",
    "\ufeffhttp://127.0.0.1:{port}/", "hTTp://127.0.0.1:{port}/", "url:http://127.0.0.1:{port}/",
    "jar:http://127.0.0.1:{port}/!/", "view-source:http://127.0.0.1:{port}/",
    "feed://127.0.0.1:{port}/", "ftp://127.0.0.1:{port}/", "gopher://127.0.0.1:{port}/_GET%20/",
    "dict://127.0.0.1:{port}/info", "ldap://127.0.0.1:{port}/", "ws://127.0.0.1:{port}/",
    "file://127.0.0.1:{port}/etc/passwd", "file:///etc/passwd", "netdoc:///etc/passwd",
    "data:image/png;base64,AAAA", "blob:http://127.0.0.1:{port}/", "unix:/var/run/docker.sock",
    "https://127.0.0.1:{port}/", "http://127.0.0.1:{port}/../../", "http://[::ffff:127.0.0.1]:{port}/",
]  # fmt: skip


def fetcher_for(port: int, **changes: Any) -> Fetcher:
    known: dict[str, Any] = {
        "allowed_ports": [80, 443, port], "total_deadline_seconds": 2, "retries": 0,
        "max_requests_per_second_per_host": None, "max_failures_in_a_row": None,
    }  # fmt: skip
    return Fetcher(FetchConfig(**(known | changes)))


def test_there_are_enough_ways_in_to_speak_of_it() -> None:
    assert len(set(HOSTS)) == len(HOSTS)
    assert len(HOSTS) + len(URLS) >= 150


def test_the_canary_sings(canary: tuple[int, list[str]]) -> None:
    """It can be reached, by the very fetcher, once the recipe itself names its address."""
    port, hits = canary
    fetcher = fetcher_for(port, connect_to={f"127.0.0.1:{port}": f"127.0.0.1:{port}"})
    assert fetcher.fetch(f"http://127.0.0.1:{port}/sing") == b"secret"
    assert hits == ["/robots.txt", "/.well-known/tdmrep.json", "/sing"]
    hits.clear()
    fetcher.close()


@pytest.mark.parametrize("is_redirect", [False, True], ids=["row", "redirect"])
def test_no_spelling_of_an_inner_address_is_dialled(
    canary: tuple[int, list[str]], is_redirect: bool
) -> None:
    """As the row's own URL, and as where a public site redirects to."""
    port, hits = canary
    urls = [f"http://{host}:{port}/" for host in HOSTS] + [url.format(port=port) for url in URLS]
    location = [""]

    class Public(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(302 if self.path == "/out" else 404)
            if self.path == "/out":
                self.send_header("Location", location[0])
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, format: str, *args: Any) -> None:
            """Quiet."""

    public = ThreadingHTTPServer(("127.0.0.1", 0), Public)
    thread = threading.Thread(target=public.serve_forever, args=(0.05,))
    thread.start()
    mapped = {"public.example:80": f"127.0.0.1:{public.server_address[1]}"}
    fetcher = fetcher_for(port, connect_to=mapped)
    got_in, causes = [], set[str]()
    try:
        for url in urls:
            location[0] = url.encode("utf-8").decode("latin-1").replace("\r\n", "\r")
            try:
                fetcher.fetch("http://public.example/out" if is_redirect else url)
                got_in.append(url)
            except Rejected:
                continue
            except Failed as failure:
                causes.add(failure.cause)
    finally:
        fetcher.close()
        public.shutdown()
        public.server_close()
        thread.join()
    assert (got_in, hits) == ([], [])
    # A name that nobody has, or the public site itself, which has no image.
    assert causes <= {"dns", "dns_no_such_host", "http_404"}


def test_a_name_that_changes_its_mind_never_leads_inside(canary: tuple[int, list[str]]) -> None:
    """DNS rebinding, in every order of answers: what was checked is what is dialled."""
    port, hits = canary
    for answers in (["192.0.2.1", "127.0.0.1"], ["127.0.0.1", "8.8.8.8"], ["::1", "8.8.8.8"]):
        turn = iter(answers * 50)
        fetcher = Fetcher(
            FetchConfig(allowed_ports=[port], total_deadline_seconds=0.2, retries=2),
            lookup=lambda *_, turn=turn: [next(turn)],
        )
        for number in range(20):
            with pytest.raises((Rejected, Failed)):
                fetcher.fetch(f"http://rebind{number}.example:{port}/")
        fetcher.close()
    assert hits == []


def drip(part: bytes, pause_seconds: float, head: bytes = b"") -> Callable[[socket.socket], None]:
    def serve(connection: socket.socket) -> None:
        connection.recv(65536)
        connection.sendall(head)
        while True:
            connection.sendall(part)
            time.sleep(pause_seconds)

    return serve


@pytest.fixture
def serving() -> Iterator[Callable[[Callable[[socket.socket], None]], int]]:
    """Start a TCP server with one behaviour; its port."""
    listeners: list[socket.socket] = []

    def start(serve: Callable[[socket.socket], None]) -> int:
        listener = socket.create_server(("127.0.0.1", 0))
        listeners.append(listener)

        def one(connection: socket.socket) -> None:
            with connection:
                try:
                    serve(connection)
                except OSError:
                    return

        def accept() -> None:
            while True:
                try:
                    connection, _ = listener.accept()
                except OSError:
                    return
                threading.Thread(target=one, args=(connection,), daemon=True).start()

        threading.Thread(target=accept, daemon=True).start()
        return int(listener.getsockname()[1])

    yield start
    for listener in listeners:
        listener.close()


OK = b"HTTP/1.1 200 OK\r\n"


@pytest.mark.parametrize(
    ("scheme", "serve"),
    [
        ("http", drip(b"H", 0.05)),
        ("http", drip(b"X: y\r\n", 0.05, OK)),
        ("http", drip(b"b", 0.05, OK + b"Content-Length: 100000\r\n\r\n")),
        ("http", drip(b"1\r\nb\r\n", 0.05, OK + b"Transfer-Encoding: chunked\r\n\r\n")),
        ("http", drip(b"HTTP/1.1 103 Early Hints\r\n\r\n", 0.05)),
        ("https", drip(b"\x16", 0.05)),
        ("https", lambda connection: time.sleep(5)),
        ("https", drip(b"", 1.0)),
    ],
    ids=["status", "headers", "body", "chunks", "hints", "tls drip", "tls silence", "tls hello"],
)
def test_no_phase_outlasts_the_deadline(serving: Any, scheme: str, serve: Any) -> None:
    port = serving(serve)
    place = {"slow.example:80": f"127.0.0.1:{port}", "slow.example:443": f"127.0.0.1:{port}"}
    fetcher = fetcher_for(
        80, connect_to=place, total_deadline_seconds=0.6, retries=3,
        opt_outs={"robots_txt": False, "tdm_reservation": False},
    )  # fmt: skip
    started_at = time.monotonic()
    with pytest.raises(Failed) as caught:
        fetcher.fetch(f"{scheme}://slow.example/a.jpg")
    elapsed_seconds = time.monotonic() - started_at
    fetcher.close()
    assert caught.value.retryable
    assert elapsed_seconds < 1.6


def test_retries_share_the_deadline(serving: Any) -> None:
    """A server that hangs up late each time costs one deadline, not one per attempt."""

    def hang_up(connection: socket.socket) -> None:
        connection.recv(65536)
        time.sleep(0.4)

    fetcher = fetcher_for(
        80, connect_to={"slow.example:80": f"127.0.0.1:{serving(hang_up)}"}, retries=10,
        backoff_seconds=0.01, total_deadline_seconds=1.0,
        opt_outs={"robots_txt": False, "tdm_reservation": False},
    )  # fmt: skip
    started_at = time.monotonic()
    with pytest.raises(Failed):
        fetcher.fetch("http://slow.example/a.jpg")
    fetcher.close()
    assert time.monotonic() - started_at < 2.0


def test_a_host_that_fails_and_fails_is_left_alone(serving: Any) -> None:
    asked: list[float] = []

    def reset(connection: socket.socket) -> None:
        asked.append(time.monotonic())
        connection.recv(65536)

    fetcher = fetcher_for(
        80, connect_to={"dead.example:80": f"127.0.0.1:{serving(reset)}"}, max_failures_in_a_row=4,
        opt_outs={"robots_txt": False, "tdm_reservation": False},
    )  # fmt: skip
    for _ in range(100):
        with pytest.raises(Failed) as caught:
            fetcher.fetch("http://dead.example/a.jpg")
        assert (caught.value.cause, caught.value.retryable) == ("disconnect", True)
    fetcher.close()
    assert len(asked) == 4


def test_requests_per_second_are_bounded_where_the_host_is_a_strangers() -> None:
    """Attempts are what counts, so an address that is refused stands in for a stranger's."""
    asked: list[float] = []

    def lookup(host: str, port: int) -> list[str]:
        del port
        return system_lookup("127.0.0.1", 80) if host == "inside.example" else []

    fetcher = Fetcher(
        FetchConfig(
            max_requests_per_second_per_host=20,
            retries=0,
            max_failures_in_a_row=None,
            opt_outs=OptOutConfig(robots_txt=False, tdm_reservation=False),
        ),
        lookup=lookup,
    )
    started_at = time.monotonic()
    for _ in range(11):
        with pytest.raises((Failed, Rejected)):
            fetcher.fetch("http://inside.example/a.jpg")
        asked.append(time.monotonic())
    fetcher.close()
    assert asked[-1] - started_at >= 0.45


def test_file_descriptors_that_run_out_cost_rows_and_nothing_else() -> None:
    """B35: with no descriptor left a row fails as retryable; with some, the next one works."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    fetcher = fetcher_for(
        80, connect_to={"a.example:80": "127.0.0.1:9"},
        opt_outs={"robots_txt": False, "tdm_reservation": False},
    )  # fmt: skip
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
    try:
        with pytest.raises(Failed) as caught:
            fetcher.fetch("http://a.example/a.jpg")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        fetcher.close()
    assert caught.value.retryable
