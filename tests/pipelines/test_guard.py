"""What may be fetched: URLs by their text, addresses by what they are."""

from __future__ import annotations

import ipaddress
import socket
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.config import FetchConfig
from pipelines.fetch import Fetcher
from pipelines.guard import Rejected, check_addresses, parse_url, redirect_url, special_address

PORTS = (80, 443)

REFUSED_URLS = [
    ("file:///etc/passwd", "scheme"),
    ("FILE:///etc/passwd", "scheme"),
    ("ftp://a.example/x.jpg", "scheme"),
    ("gopher://a.example/", "scheme"),
    ("data:image/png;base64,AAAA", "scheme"),
    ("javascript:alert(1)", "scheme"),
    ("jar:http://a.example!/x", "scheme"),
    ("ws://a.example/", "scheme"),
    ("ldap://a.example/", "scheme"),
    ("dict://a.example:11211/", "scheme"),
    ("s3://bucket/key", "scheme"),
    ("blob:http://a.example/", "scheme"),
    ("//a.example/x.jpg", "scheme"),
    ("a.example/x.jpg", "scheme"),
    ("", "scheme"),
    ("http:", "url"),
    ("http://", "url"),
    ("http:///x.jpg", "url"),
    ("http://:80/x.jpg", "url"),
    ("http://user@a.example/", "url"),
    ("http://user:pass@a.example/", "url"),
    ("http://a.example@127.0.0.1/", "url"),
    ("http://a.example:80@127.0.0.1/", "url"),
    ("http://a.example\\@127.0.0.1/", "url"),
    ("http://127.0.0.1\\.a.example/", "url"),
    ("http://a.example\r\nHost: b/", "url"),
    ("http://a.example/x\r\nX: y", "url"),
    ("http://a.example/\x00", "url"),
    ("http://a.example/\x7f", "url"),
    ("ht\ntp://a.example/", "url"),
    ("http://a.ex\tample/", "url"),
    ("http://a b.example/", "url"),
    ("http://a%2eexample/", "url"),
    ("http://a.example%00.b/", "url"),
    ("http://[::1/", "url"),
    ("http://::1/", "url"),
    ("http://[fe80::1%25eth0]/", "url"),
    ("http://[v1.x]/", "url"),
    ("http://a.example:port/", "url"),
    ("http://a.example:99999/", "url"),
    ("http://a.example:-1/", "url"),
    ("http://a.example:22/", "port"),
    ("http://a.example:6379/", "port"),
    ("http://a.example:8265/", "port"),
    ("http://a.example:9000/", "port"),
    ("https://a.example:0/", "port"),
    ("http://\u2100.example/", "url"),
    ("http://" + "a" * 300 + ".example/", "url"),
    ("http://a.example/" + "x" * 5000, "url"),
]

# Every one resolves, numerically, to an address inside; names are tested with scripted answers.
INTERNAL_HOSTS = [
    "127.0.0.1",
    "127.1",
    "127.0.1",
    "2130706433",
    "0x7f000001",
    "0x7f.1",
    "0177.0.0.1",
    "017700000001",
    "127.255.255.254",
    "0.0.0.0",
    "0",
    "localhost",
    "LOCALHOST",
    "10.0.0.1",
    "172.16.0.1",
    "192.168.1.1",
    "169.254.169.254",
    "100.64.0.1",
    "198.18.0.1",
    "192.0.2.1",
    "224.0.0.1",
    "240.0.0.1",
    "255.255.255.255",
    "\uff11\uff12\uff17.0.0.1",
    "[::1]",
    "[::]",
    "[::ffff:127.0.0.1]",
    "[::ffff:7f00:1]",
    "[::127.0.0.1]",
    "[64:ff9b::7f00:1]",
    "[2002:7f00:1::]",
    "[fc00::1]",
    "[fe80::1]",
    "[ff02::1]",
    "[fec0::1]",
]

SPECIAL_ADDRESSES = [
    "127.0.0.1", "10.1.2.3", "172.31.255.255", "192.168.0.1", "169.254.169.254", "100.100.100.200",
    "0.0.0.0", "192.0.0.192", "192.0.2.5", "198.51.100.5", "203.0.113.5", "198.19.0.1",
    "224.0.0.251", "239.1.1.1", "240.0.0.1", "255.255.255.255", "168.63.129.16",
    "::1", "::", "::ffff:10.0.0.1", "::ffff:8.8.8.8", "::8.8.8.8", "64:ff9b::808:808",
    "64:ff9b:1::1", "2002:808:808::1", "2001:0:808:808::1", "fd00:ec2::254", "fe80::1",
    "fe80::1%eth0", "ff0e::1", "fec0::1", "2001:db8::1", "100::1", "1.2.3", "", "host",
]  # fmt: skip

PUBLIC_ADDRESSES = ["8.8.8.8", "1.1.1.1", "151.101.1.1", "2606:4700:4700::1111", "2a00:1450::1"]


@pytest.mark.parametrize(("url", "reason"), REFUSED_URLS)
def test_refuses_urls_that_are_not_plain_web_addresses(url: str, reason: str) -> None:
    with pytest.raises(Rejected) as caught:
        parse_url(url, PORTS)
    assert caught.value.reason == reason


@pytest.mark.parametrize("host", INTERNAL_HOSTS)
def test_refuses_every_spelling_of_an_internal_address(host: str, canary: Any) -> None:
    config = FetchConfig(allowed_ports=[80, canary.port], total_deadline_seconds=2, retries=0)
    fetcher = Fetcher(config)
    try:
        with pytest.raises(Rejected) as caught:
            fetcher.fetch(f"http://{host}:{canary.port}/secret")
    finally:
        fetcher.close()
    assert caught.value.reason in ("address", "url")


@pytest.mark.parametrize("address", SPECIAL_ADDRESSES)
def test_knows_special_addresses(address: str) -> None:
    assert special_address(address) is not None


@pytest.mark.parametrize("address", PUBLIC_ADDRESSES)
def test_lets_public_addresses_pass(address: str) -> None:
    assert special_address(address) is None
    assert check_addresses([address]) == [address]


def test_one_special_answer_rejects_the_host() -> None:
    with pytest.raises(Rejected, match=r"10\.0\.0\.1 is private"):
        check_addresses(["8.8.8.8", "10.0.0.1"])


@given(st.integers(0, 2**32 - 1))
def test_no_address_outside_the_global_internet_passes(number: int) -> None:
    address = ipaddress.IPv4Address(number)
    if special_address(str(address)) is None:
        assert address.is_global
        assert not address.is_multicast


def test_takes_a_url_apart_once() -> None:
    target = parse_url(" HTTP://Gallery.Example:80/a b/\u00e9.jpg?q=1&r=%20#frag ", PORTS)
    assert (target.host, target.port) == ("gallery.example", 80)
    assert target.request_path == "/a%20b/%C3%A9.jpg?q=1&r=%20"
    assert target.host_header == "gallery.example"
    assert target.place == "gallery.example:80"
    assert parse_url(target.url, PORTS) == target


def test_international_hosts_become_ascii() -> None:
    assert parse_url("https://b\u00fccher.example/", PORTS).host == "xn--bcher-kva.example"


def test_ipv6_hosts_keep_their_brackets_where_they_need_them() -> None:
    target = parse_url("http://[2606:4700::1]:443/", PORTS)
    assert target.host == "2606:4700::1"
    assert target.host_header == "[2606:4700::1]:443"


@given(st.text(max_size=40))
def test_any_text_is_parsed_or_rejected_and_the_request_stays_one_line(text: str) -> None:
    for url in (text, f"http://{text}", f"http://a.example/{text}", f"http://a.example?{text}"):
        try:
            target = parse_url(url, PORTS)
        except Rejected:
            continue
        line = f"{target.request_path} {target.host_header}"
        assert line.isascii()
        assert line.count(" ") == 1
        assert line.isprintable()
        assert target.port in PORTS


@given(st.text(max_size=40))
def test_any_location_header_is_resolved_or_rejected(location: str) -> None:
    base = parse_url("http://a.example/dir/x.jpg", PORTS)
    try:
        parse_url(redirect_url(base, location), PORTS)
    except Rejected:
        return


def test_locations_are_relative_to_where_they_came_from() -> None:
    base = parse_url("http://a.example/dir/x.jpg", PORTS)
    assert redirect_url(base, "y.jpg") == "http://a.example/dir/y.jpg"
    assert redirect_url(base, "//b.example/z") == "http://b.example/z"


def test_the_resolver_itself_reads_odd_numbers_as_loopback() -> None:
    """Why addresses are judged after the look-up: the system reads these as 127.0.0.1."""
    for host in ("2130706433", "0x7f.1", "127.1"):
        assert socket.getaddrinfo(host, 80)[0][4][0] == "127.0.0.1"
