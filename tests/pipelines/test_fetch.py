"""Downloads against a hostile server: what comes back, what is refused, and how long it takes."""

from __future__ import annotations

import datetime
import email.message
import email.utils
import gzip
import ipaddress
import resource
import socket
import ssl
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import pipelines.fetch
from pipelines.connection import Connection, Deadline, Failed, retry_after_seconds
from pipelines.consent import is_opted_out
from pipelines.fetch import Fetcher
from pipelines.guard import Rejected
from pipelines.tombstones import Tombstones

URL = "http://evil.example"
CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
BODY = b"\xff\xd8\xff" + b"image" * 100


def failure(fetcher: Fetcher, path: str) -> Failed:
    with pytest.raises(Failed) as caught:
        fetcher.fetch(URL + path)
    return caught.value


def rejection(fetcher: Fetcher, url: str) -> Rejected:
    with pytest.raises(Rejected) as caught:
        fetcher.fetch(url)
    return caught.value


def test_fetches_a_body_and_says_honestly_who_asks(evil_web: Any, http_response: Any) -> None:
    evil_web.route("/a.jpg", http_response(BODY))
    assert evil_web.fetcher().fetch(f"{URL}/a.jpg?x=1") == BODY
    lines = evil_web.requests[0].split("\r\n")
    assert lines[0] == "GET /a.jpg?x=1 HTTP/1.1"
    assert "Host: evil.example" in lines
    assert "Accept-Encoding: identity" in lines
    assert any(line.startswith("User-Agent: atelier-curation/") for line in lines)


def test_reads_chunked_and_unannounced_bodies(evil_web: Any) -> None:
    evil_web.route(
        "/chunked",
        CHUNKED + b"3\r\nabc\r\n2;x=y\r\nde\r\n0\r\n\r\n",
    )
    evil_web.route("/close", b"HTTP/1.0 200 OK\r\n\r\nabcde", b"")
    fetcher = evil_web.fetcher()
    assert fetcher.fetch(f"{URL}/chunked") == b"abcde"
    assert fetcher.fetch(f"{URL}/close") == b"abcde"


def test_keeps_connections_and_never_mixes_up_answers(evil_web: Any, http_response: Any) -> None:
    connections: set[int] = set()
    for number in range(20):

        def send(connection: socket.socket, _: str, number: int = number) -> None:
            connections.add(id(connection))
            connection.sendall(http_response(b"body %d" % number))

        evil_web.routes[f"/{number}"] = send
    fetcher = evil_web.fetcher()
    for number in range(20):
        assert fetcher.fetch(f"{URL}/{number}") == b"body %d" % number
    assert len(connections) == 1


def test_bytes_after_an_answer_are_not_the_next_answer(evil_web: Any, http_response: Any) -> None:
    evil_web.route("/first", http_response(b"first") + http_response(b"smuggled"))
    evil_web.route("/second", http_response(b"second"))
    fetcher = evil_web.fetcher()
    assert fetcher.fetch(f"{URL}/first") == b"first"
    assert fetcher.fetch(f"{URL}/second") == b"second"


def test_a_kept_connection_that_was_closed_is_opened_again(
    evil_web: Any, http_response: Any
) -> None:
    evil_web.route("/a", http_response(b"a"), b"")
    fetcher = evil_web.fetcher()
    for _ in range(3):
        assert fetcher.fetch(f"{URL}/a") == b"a"


@pytest.mark.parametrize(
    ("name", "head", "part", "pause_seconds"),
    [
        ("status line", b"", b"H", 0.1),
        ("headers", b"HTTP/1.1 200 OK\r\n", b"X: y\r\n", 0.1),
        ("one header", b"HTTP/1.1 200 OK\r\nX: ", b"y", 0.1),
        ("body", b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n", b"b", 0.1),
        ("chunks", CHUNKED, b"1\r\nb\r\n", 0.1),
        ("chunk size", CHUNKED, b"0", 0.1),
        ("trailers", CHUNKED + b"0\r\n", b"a: b\r\n", 0.1),
        ("redirect body", b"HTTP/1.1 302\r\nLocation: /\r\nContent-Length: 9\r\n\r\n", b"b", 1),
        ("continue", b"", b"HTTP/1.1 100 Continue\r\n\r\n", 0.1),
    ],
)  # fmt: skip
def test_a_dripping_server_costs_the_deadline_and_no_more(
    evil_web: Any, name: str, head: bytes, part: bytes, pause_seconds: float
) -> None:
    evil_web.forever("/drip", head, part, pause_seconds)
    fetcher = evil_web.fetcher(total_deadline_seconds=0.5, retries=3)
    started_at = time.monotonic()
    failed = failure(fetcher, "/drip")
    assert failed.cause == "timeout", name
    assert failed.retryable
    assert not failed.retry_now
    assert 0.4 < time.monotonic() - started_at < 1.5


def test_a_silent_server_costs_the_deadline(evil_web: Any) -> None:
    evil_web.route("/silent", b"", pause_seconds=5)
    evil_web.routes["/silent"] = lambda *_: evil_web.stopping.wait(5)
    started_at = time.monotonic()
    assert failure(evil_web.fetcher(total_deadline_seconds=0.3), "/silent").cause == "timeout"
    assert time.monotonic() - started_at < 1.3


@pytest.mark.parametrize(
    "head",
    [
        b"HTTP/1.1 200 OK\r\n\r\n",
        CHUNKED,
        b"HTTP/1.1 200 OK\r\nContent-Length: 99999999999999\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: -5\r\n\r\n",
    ],
)
def test_an_endless_body_stops_at_the_cap(evil_web: Any, head: bytes) -> None:
    part = b"10000\r\n" + b"x" * 0x10000 + b"\r\n" if b"chunked" in head else b"x" * 0x10000
    evil_web.forever("/endless", head, part)
    fetcher = evil_web.fetcher(max_bytes=1_000_000, total_deadline_seconds=20)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    failed = failure(fetcher, "/endless")
    assert (failed.cause, failed.retryable) == ("too_big", False)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000  # KiB


@pytest.mark.parametrize("head", [b"HTTP/1.1 200 OK\r\n", b"HTTP/1.1 200 OK\r\nX: "])
def test_endless_headers_are_refused(evil_web: Any, head: bytes) -> None:
    evil_web.forever("/headers", head, b"X: y\r\n" if head.endswith(b"\n") else b"y" * 100)
    failed = failure(evil_web.fetcher(total_deadline_seconds=20), "/headers")
    assert failed.cause == "protocol"


@pytest.mark.parametrize(
    ("head", "part"),
    [
        (CHUNKED + b"0\r\n", b"a: b\r\n" * 5000),
        (b"", b"HTTP/1.1 100 Continue\r\n\r\n" * 5000),
        (CHUNKED, b"1;" + b"x" * 5000 + b"\r\nb\r\n"),
    ],
)  # fmt: skip
def test_bytes_around_a_body_count_too(evil_web: Any, head: bytes, part: bytes) -> None:
    evil_web.forever("/padded", head, part)
    fetcher = evil_web.fetcher(max_bytes=100_000, total_deadline_seconds=20)
    assert failure(fetcher, "/padded").cause == "too_big"


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\nonly this",
        CHUNKED + b"10\r\nonly",
        CHUNKED + b"4\r\nonly\r\n",
    ],
)
def test_a_short_body_is_a_failure_and_worth_a_retry(evil_web: Any, answer: bytes) -> None:
    evil_web.route("/short", answer, b"")
    failed = failure(evil_web.fetcher(retries=2), "/short")
    assert (failed.cause, failed.retryable) == ("short_body", True)
    assert len(evil_web.requests) == 3


@pytest.mark.parametrize(
    ("answer", "cause"),
    [
        (b"SSH-2.0-OpenSSH_9.6\r\n", "protocol"),
        (b"HTTP/1.1 abc\r\n\r\n", "protocol"),
        (b"HTTP/9.9 200 OK\r\n\r\n", "protocol"),
        (b"", "disconnect"),
        (CHUNKED + b"zz\r\n", "short_body"),
    ],
)
def test_answers_that_are_not_http(evil_web: Any, answer: bytes, cause: str) -> None:
    evil_web.route("/odd", *([answer] if answer else []), b"")
    assert failure(evil_web.fetcher(), "/odd").cause == cause


@pytest.mark.parametrize(
    ("status", "retryable", "num_requests"),
    [("404 x", False, 1), ("403 x", False, 1), ("410 x", False, 1), ("206 x", False, 1),
     ("500 x", True, 3), ("503 x", True, 3), ("429 x", True, 3), ("304 x", False, 1)],
)  # fmt: skip
def test_statuses_are_causes(
    evil_web: Any, http_response: Any, status: str, retryable: bool, num_requests: int
) -> None:
    evil_web.route("/status", http_response(b"" if "304" in status else b"no", status=status))
    failed = failure(evil_web.fetcher(retries=2), "/status")
    assert (failed.cause, failed.retryable) == (f"http_{status[:3]}", retryable)
    assert len(evil_web.requests) == num_requests


def test_a_passing_failure_passes(evil_web: Any, http_response: Any) -> None:
    answers = [http_response(b"", status="503 x"), http_response(BODY)]
    evil_web.routes["/once"] = lambda connection, _: connection.sendall(answers.pop(0))
    assert evil_web.fetcher(retries=1).fetch(f"{URL}/once") == BODY


LONG_AGO = "Date: Sun, 06 Nov 1994 08:49:37 GMT"


@pytest.mark.parametrize(
    ("busy", "later"),
    [
        (["Retry-After: 1"], ["Retry-After: 9999999"]),
        ([LONG_AGO, "Retry-After: Sun, 06 Nov 1994 08:49:38 GMT"],
         ["Retry-After: Fri, 01 Jan 2100 00:00:00 GMT"]),
    ],
)  # fmt: skip
def test_waits_as_long_as_the_server_asks(
    evil_web: Any, http_response: Any, busy: list[str], later: list[str]
) -> None:
    answers = [http_response(b"", *busy, status="429 x"), http_response(BODY)]
    evil_web.routes["/busy"] = lambda connection, _: connection.sendall(answers.pop(0))
    started_at = time.monotonic()
    fetcher = evil_web.fetcher(retries=1, total_deadline_seconds=2)
    assert fetcher.fetch(f"{URL}/busy") == BODY
    assert time.monotonic() - started_at >= 1
    num_requests = len(evil_web.requests)
    evil_web.route("/later", http_response(b"", *later, status="503 x"))
    assert failure(fetcher, "/later").cause == "http_503"
    assert len(evil_web.requests) == num_requests + 1  # not again in this run: it is too long


@pytest.mark.parametrize(
    ("told", "seconds"),
    [
        ("0", 0), (" 7 ", 7), ("120", 120), ("100000", 100_000),
        ("Sun, 06 Nov 1994 08:50:37 GMT", 60),
        ("Sunday, 06-Nov-94 08:50:37 GMT", 60),
        ("Sun Nov  6 08:50:37 1994", 60),
        ("Sun, 06 Nov 1994 10:50:37 +0200", 60),
        ("Sun, 06 Nov 1994 08:00:00 GMT", 0),
        ("", None), ("-1", None), ("1.5", None), ("soon", None), ("\u0663", None),
        ("Sun, 99 Nov 1994 08:50:37 GMT", None), ("06 Nov 999999999999 08:50:37 GMT", None),
    ],
)  # fmt: skip
def test_reads_both_forms_of_retry_after(told: str, seconds: float | None) -> None:
    headers = email.message.Message()
    headers["Date"] = LONG_AGO.removeprefix("Date: ")
    headers["Retry-After"] = told
    assert retry_after_seconds(headers) == seconds


@pytest.mark.parametrize("clock", [None, "yesterday"])
def test_a_date_is_held_against_our_clock_where_the_server_tells_no_time(clock: str | None) -> None:
    headers = email.message.Message()
    if clock is not None:
        headers["Date"] = clock
    headers["Retry-After"] = email.utils.formatdate(time.time() + 1000, usegmt=True)
    asked_seconds = retry_after_seconds(headers)
    assert asked_seconds is not None
    assert 0 < asked_seconds <= 1000


def test_follows_redirects_and_counts_hops(evil_web: Any, http_response: Any) -> None:
    def hop(to: str) -> bytes:
        return bytes(http_response(b"moved", f"Location: {to}", status="302 x"))

    evil_web.route("/1", hop("/2"))
    evil_web.route("/2", hop("http://evil.example/3"))
    evil_web.route("/3", hop("3/../4"))
    evil_web.route("/4", http_response(BODY))
    assert evil_web.fetcher(max_redirects=3).fetch(f"{URL}/1") == BODY
    assert rejection(evil_web.fetcher(max_redirects=2), f"{URL}/1").reason == "redirect"
    assert rejection(evil_web.fetcher(max_redirects=0), f"{URL}/1").reason == "redirect"


def test_no_hop_leads_to_what_was_taken_down(evil_web: Any, http_response: Any) -> None:
    evil_web.route("/1", http_response(b"", "Location: /2", status="302 x"))
    evil_web.route(
        "/2", http_response(b"", "Location: http://evil.example:80/3#top", status="302 x")
    )
    evil_web.route("/3", http_response(BODY))
    evil_web.route("/robots.txt", http_response(b"", "Location: /rules", status="302 x"))
    evil_web.route("/rules", http_response(b"User-agent: *\nDisallow: /"))
    tombstones = Tombstones.of([f"{URL}/3", f"{URL}/rules"])
    fetcher = evil_web.fetcher(tombstones=tombstones, opt_outs={"tdm_reservation": False})
    for path in ("/1", "/3"):
        assert rejection(fetcher, f"{URL}{path}").reason == "takedown"
    asked = [request.split(" ")[1] for request in evil_web.requests]
    assert asked == ["/robots.txt", "/1", "/2"]


def test_a_redirect_loop_is_noticed(evil_web: Any, http_response: Any) -> None:
    evil_web.route("/a", http_response(b"", "Location: /b", status="301 x"))
    evil_web.route("/b", http_response(b"", "Location: /a", status="301 x"))
    rejected = rejection(evil_web.fetcher(max_redirects=20), f"{URL}/a")
    assert (rejected.reason, rejected.detail) == ("redirect", "loop")
    assert len(evil_web.requests) == 2


@pytest.mark.parametrize(
    "location",
    [
        "http://127.0.0.1:{port}/", "http://localhost:{port}/", "http://2130706433:{port}/",
        "http://[::ffff:127.0.0.1]:{port}/", "file:///etc/passwd", "//127.1:{port}/",
        "gopher://127.0.0.1:{port}/", "http://evil.example@127.0.0.1:{port}/",
        "http://evil.example:22/", "http:\\\\127.0.0.1:{port}/", "http://127.0.0.1:{port}\t/",
        "http://169.254.169.254/latest/meta-data/",
    ],
)  # fmt: skip
def test_a_redirect_inside_is_refused(
    evil_web: Any, http_response: Any, canary: Any, location: str
) -> None:
    location = location.format(port=canary.port)
    evil_web.route("/out", http_response(b"", f"Location: {location}", status="302 x"))
    fetcher = evil_web.fetcher(pipelines.hosts.system_lookup, allowed_ports=[80, 443, canary.port])
    assert rejection(fetcher, f"{URL}/out").reason == "redirect"


@pytest.mark.parametrize(
    "answers",
    [["127.0.0.1"], ["8.8.8.8", "127.0.0.1"], ["::1"], ["169.254.169.254"], ["::ffff:10.0.0.1"]],
)
def test_a_name_that_leads_inside_is_refused(
    evil_web: Any, canary: Any, answers: list[str]
) -> None:
    fetcher = evil_web.fetcher(lambda *_: answers, allowed_ports=[canary.port])
    url = f"http://inside.example:{canary.port}/"
    assert rejection(fetcher, url).reason == "address"


def test_a_name_is_looked_up_once_and_that_answer_is_dialled(
    evil_web: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """DNS rebinding: the second answer would lead inside; nobody asks for it."""
    answers = [["93.184.216.34"], ["127.0.0.1"]]
    dialled: list[tuple[str, int]] = []

    def dial(address: tuple[str, int], *_: Any) -> Connection:
        dialled.append(address)
        raise ConnectionRefusedError(111, "refused")

    monkeypatch.setattr(pipelines.fetch, "connect", dial)
    fetcher = evil_web.fetcher(lambda *_: answers.pop(0), retries=2)
    with pytest.raises(Failed) as caught:
        fetcher.fetch("http://rebind.example/")
    assert caught.value.cause == "connect"
    assert dialled == [("93.184.216.34", 80)] * 3
    assert len(answers) == 1


def test_only_the_exact_place_is_mapped(evil_web: Any, canary: Any) -> None:
    fetcher = evil_web.fetcher(
        lambda *_: ["127.0.0.1"],
        connect_to={"evil.example:80": f"127.0.0.1:{canary.port}"},
    )
    for url in ("http://sub.evil.example/", "https://evil.example/", "http://evil.example.:80/"):
        assert rejection(fetcher, url).reason == "address"


def test_dns_failures(evil_web: Any) -> None:
    def no_such_host(*_: Any) -> list[str]:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    def down(*_: Any) -> list[str]:
        raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure")

    def slow(*_: Any) -> list[str]:
        evil_web.stopping.wait(1.5)
        return ["8.8.8.8"]

    for lookup, cause, retryable in (
        (no_such_host, "dns_no_such_host", False),
        (down, "dns", True),
        (slow, "dns", True),
    ):
        fetcher = evil_web.fetcher(lookup, total_deadline_seconds=0.3)
        started_at = time.monotonic()
        with pytest.raises(Failed) as caught:
            fetcher.fetch("http://gone.example/")
        assert (caught.value.cause, caught.value.retryable) == (cause, retryable)
        assert time.monotonic() - started_at < 1.3


def test_a_refused_connection_is_worth_a_retry(evil_web: Any) -> None:
    with socket.create_server(("127.0.0.1", 0)) as unused:
        port = unused.getsockname()[1]
    fetcher = evil_web.fetcher(connect_to={"evil.example:80": f"127.0.0.1:{port}"})
    failed = failure(fetcher, "/")
    assert (failed.cause, failed.retryable) == ("connect", True)


def test_ambient_proxies_and_credentials_are_ignored(
    evil_web: Any, http_response: Any, canary: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / ".netrc").write_text("machine evil.example login canary password canary\n")
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("http_proxy", "HTTP_PROXY", "https_proxy", "all_proxy"):
        monkeypatch.setenv(name, f"http://127.0.0.1:{canary.port}")
    evil_web.route("/a", http_response(BODY, "Set-Cookie: id=1"))
    fetcher = evil_web.fetcher()
    assert fetcher.fetch(f"{URL}/a") == fetcher.fetch(f"{URL}/a") == BODY
    assert not [r for r in evil_web.requests if "ookie" in r or "uthorization" in r]


def test_content_encodings_are_undone_under_the_cap(evil_web: Any, http_response: Any) -> None:
    evil_web.route("/gz", http_response(gzip.compress(BODY), "Content-Encoding: gzip"))
    bomb = gzip.compress(b"\0" * 50_000_000)
    evil_web.route("/bomb", http_response(bomb, "Content-Encoding: gzip"))
    evil_web.route("/br", http_response(BODY, "Content-Encoding: br"))
    evil_web.route("/lie", http_response(BODY, "Content-Encoding: gzip"))
    fetcher = evil_web.fetcher(max_bytes=1_000_000, total_deadline_seconds=10)
    assert fetcher.fetch(f"{URL}/gz") == BODY
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert failure(fetcher, "/bomb").cause == "too_big"
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 30_000  # KiB
    assert rejection(fetcher, f"{URL}/br").reason == "encoding"
    assert failure(fetcher, "/lie").cause == "protocol"


OPTED_OUT = [
    ["noai"], ["NoAI"], ["noimageai"], ["noindex"], ["noimageindex"], ["none"], ["noml"],
    ["nofollow, noai"], ["nofollow,noai"], [" noai "], ["*: noai"], ["atelier: noai"],
    ["Atelier: noindex"], ["nofollow", "noai"], ["otherbot: nofollow", "noimageai"],
    ["unavailable_after: 25 Jun 2030 15:00:00 PST, noai"],
    ["unavailable_after: Sunday, 06-Nov-94 08:49:37 GMT, noai"],
    ["max-snippet: 20, noindex"], ["otherbot: nofollow, atelier: noai"],
]  # fmt: skip
NOT_OPTED_OUT = [
    [], [""], ["all"], ["nofollow"], ["noarchive, nosnippet"], ["otherbot: noai"],
    ["googlebot: noindex, nofollow"], ["max-image-preview: none"],
    ["unavailable_after: 25 Jun 2030 15:00:00 PST"], ["noaibutnotreally"], ["atelier: nofollow"],
]  # fmt: skip


@pytest.mark.parametrize(
    ("values", "expected"), [(v, True) for v in OPTED_OUT] + [(v, False) for v in NOT_OPTED_OUT]
)
def test_reads_opt_outs_in_all_their_forms(values: list[str], expected: bool) -> None:
    headers = email.message.Message()
    for value in values:
        headers["X-Robots-Tag"] = value
    assert is_opted_out(headers, "atelier") is expected


def test_an_opted_out_body_is_not_read(evil_web: Any) -> None:
    head = b"HTTP/1.1 200 OK\r\nX-Robots-Tag: noai\r\nContent-Length: 100000000\r\n\r\n"
    sent = [0]

    def send(connection: socket.socket, _: str) -> None:
        connection.sendall(head)
        while True:
            sent[0] += connection.send(b"x" * 65536)

    evil_web.routes["/no"] = send
    fetcher = evil_web.fetcher(max_bytes=200_000_000, total_deadline_seconds=10)
    assert rejection(fetcher, f"{URL}/no").reason == "optout"
    time.sleep(0.1)
    assert sent[0] < 20_000_000


def test_downloads_at_once_per_host_are_bounded(evil_web: Any, http_response: Any) -> None:
    now, most = [0], [0]
    lock = threading.Lock()

    def send(connection: socket.socket, _: str) -> None:
        with lock:
            now[0] += 1
            most[0] = max(most[0], now[0])
        time.sleep(0.05)
        with lock:
            now[0] -= 1
        connection.sendall(http_response(BODY))

    evil_web.routes["/slow"] = send
    fetcher = evil_web.fetcher(max_per_host=2, num_threads=8, total_deadline_seconds=5)
    threads = [threading.Thread(target=fetcher.fetch, args=(f"{URL}/slow",)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most[0] == 2


def certificate(folder: Path, name: str) -> tuple[Path, ssl.SSLContext]:
    """A self-signed certificate for ``name`` and a server context that shows it."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
    now = datetime.datetime.now(datetime.UTC)
    signed = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(name)]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    path = folder / "certificate.pem"
    pem = signed.public_bytes(serialization.Encoding.PEM)
    path.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
        + pem
    )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(path)
    return path, context


def serve_tls(context: ssl.SSLContext, answer: bytes) -> tuple[int, Callable[[], None]]:
    server = socket.create_server(("127.0.0.1", 0))
    server.settimeout(0.05)
    stopping = threading.Event()

    def serve() -> None:
        while not stopping.is_set():
            try:
                connection, _ = server.accept()
                connection.settimeout(2)
                with context.wrap_socket(connection, server_side=True) as tls:
                    tls.recv(65536)
                    tls.sendall(answer)
            except OSError:
                continue

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()

    def stop() -> None:
        stopping.set()
        thread.join()
        server.close()

    return server.getsockname()[1], stop


def test_tls_is_verified_against_the_name_in_the_url(
    evil_web: Any, http_response: Any, tmp_path: Path
) -> None:
    path, server_context = certificate(tmp_path, "tls.example")
    port, stop = serve_tls(server_context, http_response(BODY, "Connection: close"))
    trusting = ssl.create_default_context(cafile=str(path))
    mapped = {"tls.example:443": f"127.0.0.1:{port}", "other.example:443": f"127.0.0.1:{port}"}
    try:
        fetcher = evil_web.fetcher(tls=trusting, connect_to=mapped, total_deadline_seconds=5)
        assert fetcher.fetch("https://tls.example/a") == BODY
        for url, context in (("https://other.example/", trusting), ("https://tls.example/", None)):
            fetcher = evil_web.fetcher(tls=context, connect_to=mapped, total_deadline_seconds=5)
            with pytest.raises(Failed) as caught:
                fetcher.fetch(url)
            assert (caught.value.cause, caught.value.retryable) == ("tls", False)
    finally:
        stop()


def test_a_deadline_that_has_passed_is_a_timeout() -> None:
    deadline = Deadline(0.0)
    with pytest.raises(TimeoutError):
        deadline.remaining()


def test_the_test_addresses_are_what_they_are_taken_for() -> None:
    assert ipaddress.ip_address("93.184.216.34").is_global
