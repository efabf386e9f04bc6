"""B14, B15, B26, B27, B28: bombs, certificates, opt-outs on the wire, hosts that are busy."""

from __future__ import annotations

import datetime
import json
import socket
import ssl
import struct
import threading
import zlib
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from infra.manifest import DatasetManifest
from pipelines.arrivals import fetch_body
from pipelines.config import FetchConfig
from pipelines.connection import Failed
from pipelines.guard import Rejected
from pipelines.outcomes import NotStored
from pipelines.robots import parse_robots, parse_tdmrep
from tests.conftest import run_python
from tests.pipelines.conftest import EvilWeb, response
from tests.pipelines.test_fetch import serve_tls

GIGABYTE = 1 << 30
BODY = b"\xff\xd8\xff" + b"image" * 100
BOMB = """
import json, sys, tracemalloc
from pipelines.config import FetchConfig
from pipelines.fetch import Fetcher
from pipelines.arrivals import fetch_body

fetcher = Fetcher(FetchConfig(
    connect_to={"evil.example:80": sys.argv[1]}, retries=0, total_deadline_seconds=120,
    max_bytes=12_000_000,
    opt_outs={"robots_txt": False, "tdm_reservation": False},
))
fetch_body("http://evil.example/small", fetcher)
tracemalloc.start()
ended = [fetch_body(f"http://evil.example/{name}", fetcher).reason for name in ("gzip", "deflate")]
print(json.dumps([ended, tracemalloc.get_traced_memory()[1] // 1_000_000]))
"""


def zeros(num_gigabytes: int) -> bytes:
    """A deflate stream of so many gigabytes of nothing, made of one megabyte over and over."""
    packer = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
    megabyte = packer.compress(bytes(1 << 20)) + packer.flush(zlib.Z_FULL_FLUSH)
    return megabyte * (num_gigabytes * 1024) + packer.flush(zlib.Z_FINISH)


def test_ten_megabytes_that_unpack_to_ten_gigabytes_stop_at_the_cap(evil_web: EvilWeb) -> None:
    """With a cap of 12 MB less is ever held than what one read of the stream unpacks to."""
    stream = zeros(10)
    assert 9e6 < len(stream) < 12e6
    gzip_head = b"\x1f\x8b\x08\0\0\0\0\0\0\xff"
    evil_web.route("/small", response(b"x"))
    evil_web.route(
        "/gzip",
        response(gzip_head + stream + struct.pack("<II", 0, 0), "Content-Encoding: gzip"),
    )
    evil_web.route("/deflate", response(b"\x78\x9c" + stream, "Content-Encoding: deflate"))
    done = run_python(BOMB, f"127.0.0.1:{evil_web.port}")
    assert done.returncode == 0, done.stderr
    ended, most_mb = json.loads(done.stdout)
    assert ended == ["too_big", "too_big"]
    assert most_mb < 50


class Authority:
    """A certificate authority of this test, and the certificates that it signs."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.name, self.key, self.certificate = self._make("Test Authority", is_authority=True)
        (folder / "ca.pem").write_bytes(self._pem(self.certificate))

    def server(self, host: str, days: tuple[int, int], *, is_self_signed: bool = False) -> Any:
        """A TLS server context for ``host``, valid from and to so many days from now."""
        _, key, certificate = self._make(host, days=days, is_self_signed=is_self_signed)
        from cryptography.hazmat.primitives import serialization as forms

        path = self.folder / f"{host}{days[0]}{days[1]}{is_self_signed}.pem"
        private = key.private_bytes(
            forms.Encoding.PEM, forms.PrivateFormat.PKCS8, forms.NoEncryption()
        )
        path.write_bytes(private + self._pem(certificate))
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(path)
        return context

    def trust(self) -> ssl.SSLContext:
        return ssl.create_default_context(cafile=str(self.folder / "ca.pem"))

    @staticmethod
    def _pem(certificate: Any) -> bytes:
        from cryptography.hazmat.primitives.serialization import Encoding

        return bytes(certificate.public_bytes(Encoding.PEM))

    def _make(
        self,
        host: str,
        *,
        days: tuple[int, int] = (-30, 30),
        is_authority: bool = False,
        is_self_signed: bool = False,
    ) -> tuple[Any, Any, Any]:
        from cryptography import x509
        from cryptography.hazmat.primitives import hashes
        from cryptography.hazmat.primitives.asymmetric import ec

        key = ec.generate_private_key(ec.SECP256R1())
        name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, host)])
        is_own = is_authority or is_self_signed
        now = datetime.datetime.now(datetime.UTC)
        begins, ends = (now + datetime.timedelta(days=day) for day in days)
        signer = key if is_own else self.key
        usage = x509.KeyUsage(True, False, False, False, False, is_authority, is_authority,
                              False, False)  # fmt: skip
        builder = (
            x509.CertificateBuilder()
            .subject_name(name)
            .issuer_name(name if is_own else self.name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(begins)
            .not_valid_after(ends)
            .add_extension(x509.SubjectAlternativeName([x509.DNSName(host)]), critical=False)
            .add_extension(x509.BasicConstraints(ca=is_authority, path_length=None), critical=True)
            .add_extension(usage, critical=True)
            .add_extension(
                x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False
            )
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key()),
                critical=False,
            )
        )
        return name, key, builder.sign(signer, hashes.SHA256())


@pytest.mark.parametrize(
    ("asked", "shown", "days", "is_self_signed", "is_trusted"),
    [
        ("good.example", "good.example", (-1, 1), False, True),
        ("good.example", "good.example", (-30, -1), False, False),
        ("good.example", "good.example", (1, 30), False, False),
        ("good.example", "good.example", (-1, 1), True, False),
        ("good.example", "other.example", (-1, 1), False, False),
        ("a.good.example", "*.good.example", (-1, 1), False, True),
        ("a.b.good.example", "*.good.example", (-1, 1), False, False),
    ],
    ids=["good", "expired", "not yet", "self-signed", "other host", "wildcard", "too deep"],
)  # fmt: skip
def test_certificates_are_what_they_must_be(
    evil_web: EvilWeb, tmp_path: Path, asked: str, shown: str, days: tuple[int, int],
    is_self_signed: bool, is_trusted: bool,
) -> None:  # fmt: skip
    authority = Authority(tmp_path)
    context = authority.server(shown, days, is_self_signed=is_self_signed)
    port, stop = serve_tls(context, response(BODY, "Connection: close"))
    fetcher = evil_web.fetcher(
        tls=authority.trust(), connect_to={f"{asked}:443": f"127.0.0.1:{port}"},
        total_deadline_seconds=20,
    )  # fmt: skip
    try:
        if is_trusted:
            assert fetcher.fetch(f"https://{asked}/a") == BODY
            return
        with pytest.raises(Failed) as caught:
            fetcher.fetch(f"https://{asked}/a")
        assert (caught.value.cause, caught.value.retryable) == ("tls", False)
    finally:
        stop()


def test_there_is_no_switch_that_trusts_everybody() -> None:
    """Were there one, the manifest would have to tell."""
    words = ("verify", "insecure", "tls", "ssl", "certificate")
    assert not [name for name in FetchConfig.model_fields if any(word in name for word in words)]
    assert not [name for name in DatasetManifest.__annotations__ if "insecure" in name]


X = "X-Robots-Tag: "
OPT_OUT_HEADS = [
    [X + "noai"], [X + "NOAI"], [X + "noimageai"], [X + "noindex"], [X + "noimageindex"],
    [X + "none"], [X + "noml"], ["x-robots-tag: noai"], ["X-ROBOTS-TAG:noai"], [X + "  noai  "],
    [X + "nofollow, noai"], [X + "nofollow,noai,nosnippet"], [X + "*: noai"],
    [X + "atelier: noai"], [X + "Atelier: NoImageAI"], [X + "nofollow", X + "noai"],
    [X + "otherbot: nofollow", X + "noml"], [X + "otherbot: nofollow, atelier: noai"],
    [X + "unavailable_after: 25 Jun 2030 15:00:00 PST, noai"],
    [X + "unavailable_after: Sunday, 06-Nov-94 08:49:37 GMT, noai"],
    [X + "max-snippet: 20, noindex"], [X + "max-image-preview: none, noimageindex"],
    ["tdm-reservation: 1"], ["TDM-Reservation:  1"], ["tdm-reservation: 0", "tdm-reservation: 1"],
]  # fmt: skip


def test_no_body_is_read_whose_headers_say_no(evil_web: EvilWeb) -> None:
    """25 forms on the wire; of a body of a gigabyte the server gets rid of what buffers hold."""
    assert len(OPT_OUT_HEADS) == 25
    sent: Counter[int] = Counter()
    done = [threading.Event() for _ in OPT_OUT_HEADS]

    def refusing(number: int, headers: list[str]) -> Any:
        head = "\r\n".join(["HTTP/1.1 200 OK", f"Content-Length: {GIGABYTE}", *headers])

        def send(connection: socket.socket, _: str) -> None:
            try:
                connection.sendall(f"{head}\r\n\r\n".encode())
                while True:
                    sent[number] += connection.send(b"x" * 65536)
            finally:
                done[number].set()

        return send

    fetcher = evil_web.fetcher(
        max_bytes=2 * GIGABYTE, total_deadline_seconds=60, opt_outs={"robots_txt": False}
    )
    evil_web.route("/.well-known/tdmrep.json", response(b"", status="404 x"))
    for number, headers in enumerate(OPT_OUT_HEADS):
        evil_web.routes[f"/{number}"] = refusing(number, headers)
        with pytest.raises(Rejected) as caught:
            fetcher.fetch(f"http://evil.example/{number}")
        expected = "optout" if headers[0].lower().startswith("x-robots") else "tdm_reservation"
        assert caught.value.reason == expected, headers
    assert all(event.wait(30) for event in done)  # the server was hung up on
    assert max(sent.values()) < 32_000_000


# What a site says, and of the paths /a.jpg and /no/a.jpg those that may be asked for.
SITES = {
    "robots": (b"User-agent: *\nDisallow: /no/", None, {"/a.jpg"}),
    "ours": (b"User-agent: atelier\nDisallow: /\n\nUser-agent: *\nAllow: /", None, set()),
    "others": (b"User-agent: otherbot\nDisallow: /", None, {"/a.jpg", "/no/a.jpg"}),
    "wildcard": (b"User-agent: *\nDisallow: /*.jpg$", None, set()),
    "longest": (b"User-agent: *\nDisallow: /\nAllow: /a.jpg", None, {"/a.jpg"}),
    "crlf": (b"\xef\xbb\xbfuser-agent:*\r\nDISALLOW:/no # why\r\n", None, {"/a.jpg"}),
    "escaped": (b"User-agent: *\nDisallow: /%6eo/", None, {"/a.jpg"}),
    "tdm all": (b"", [{"location": "/", "tdm-reservation": 1}], set()),
    "tdm part": (b"", [{"location": "/no/*", "tdm-reservation": "1"}], {"/a.jpg"}),
    "tdm except": (
        b"",
        [{"location": "/*", "tdm-reservation": 1}, {"location": "/a.jpg", "tdm-reservation": 0}],
        {"/a.jpg"},
    ),
    "nothing": (b"", None, {"/a.jpg", "/no/a.jpg"}),
}


def test_nothing_that_a_site_disallows_is_asked_for(evil_web: EvilWeb) -> None:
    """One host per site, on one server: who was asked is told by the Host header."""
    hosts = {f"{name.replace(' ', '-')}.example": site for name, site in SITES.items()}

    def by_host(path: str) -> Any:
        def send(connection: socket.socket, _: str) -> None:
            host = next(
                line.partition(": ")[2]
                for line in evil_web.requests[-1].split("\r\n")
                if line.startswith("Host: ")
            )
            robots, tdm, _allowed = hosts[host]
            body = {"/robots.txt": robots, "/.well-known/tdmrep.json": json.dumps(tdm).encode()}
            connection.sendall(response(body.get(path, BODY)))

        return send

    for path in ("/robots.txt", "/.well-known/tdmrep.json", "/a.jpg", "/no/a.jpg"):
        evil_web.routes[path] = by_host(path)
    place = f"127.0.0.1:{evil_web.port}"
    fetcher = evil_web.fetcher(
        connect_to={f"{host}:80": place for host in hosts}, opt_outs={}, total_deadline_seconds=20
    )
    for host, (robots, tdm, allowed) in hosts.items():
        evil_web.requests.clear()
        for path in ("/a.jpg", "/no/a.jpg", "/a.jpg"):
            found = fetch_body(f"http://{host}{path}", fetcher)
            if isinstance(found, NotStored):
                assert found.reason in ("robots_txt", "tdm_reservation")
            else:
                assert found == BODY
        asked = Counter(head.split(" ")[1] for head in evil_web.requests)
        policies = {"/robots.txt", "/.well-known/tdmrep.json"}
        assert set(asked) - policies == allowed, host
        assert {asked[path] for path in policies} == {1}, host
        for path in ("/a.jpg", "/no/a.jpg"):  # and the parsers say the same, without a server
            is_free = parse_robots(robots, "atelier").allow(path) and (
                parse_tdmrep(json.dumps(tdm).encode()).allow(path)
            )
            assert is_free == (path in allowed), host


def test_a_busy_host_is_asked_as_it_says_and_then_left_alone(evil_web: EvilWeb) -> None:
    """``Retry-After`` is waited for; a host that stays busy is not asked for every row."""
    lock = threading.Lock()
    now, most, asked = [0], [0], [0]

    def busy(connection: socket.socket, _: str) -> None:
        with lock:
            asked[0] += 1
            now[0] += 1
            most[0] = max(most[0], now[0])
        evil_web.stopping.wait(0.02)
        with lock:
            now[0] -= 1
        connection.sendall(response(b"", "Retry-After: 0", status="503 busy"))

    evil_web.routes["/busy"] = busy
    fetcher = evil_web.fetcher(
        max_per_host=3, max_failures_in_a_row=5, retries=1, num_threads=12,
        total_deadline_seconds=30,
    )  # fmt: skip
    causes: Counter[str] = Counter()

    def ask() -> None:
        for _ in range(5):
            try:
                fetcher.fetch("http://evil.example/busy")
            except Failed as failure:
                causes[failure.cause] += failure.retryable

    threads = [threading.Thread(target=ask) for _ in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert causes == {"http_503": 60}
    assert most[0] <= 3
    assert asked[0] <= 5 + 3  # those under way when the fifth failed
