"""Which URL may be fetched, and which address may be dialled. One parser for check and fetch.

A metadata row is a stranger's input that makes this machine open a connection. The guard answers
with a ``Target`` (everything the connection needs, taken from one parse) or raises ``Rejected``.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from urllib.parse import quote, urljoin, urlsplit

DEFAULT_PORTS = {"http": 80, "https": 443}
MAX_URL_CHARS = 4096
# C0 and C1 controls, and the backslash that browsers and libraries read differently.
_FORBIDDEN_IN_URL = re.compile(r"[\x00-\x1f\x7f-\x9f\\]")
_HOST = re.compile(r"[a-z0-9._-]{1,253}|\[[0-9a-f:.]+\]")
_KEEP_IN_PATH = "%/:=&?~+!$,;'@()*[]|"
# What the IANA registries call special and some versions of ``ipaddress`` call global, and the
# address inside Azure that serves metadata.
_SPECIAL_NETWORKS = tuple(
    ipaddress.ip_network(network)
    for network in (
        "0.0.0.0/8",
        "100.64.0.0/10",
        "168.63.129.16/32",
        "192.0.0.0/24",
        "192.31.196.0/24",
        "192.52.193.0/24",
        "192.88.99.0/24",
        "192.175.48.0/24",
        "198.18.0.0/15",
        "100::/63",
        "2001::/23",
        "2001:db8::/32",
        "2620:4f:8000::/48",
        "3fff::/20",
        "5f00::/16",
    )
)
_NAT64_NETWORKS = (
    ipaddress.IPv6Network("64:ff9b::/96"),
    ipaddress.IPv6Network("64:ff9b:1::/48"),
)
_IPV4_COMPATIBLE = ipaddress.IPv6Network("::/96")

IPAddress = ipaddress.IPv4Address | ipaddress.IPv6Address


class Rejected(Exception):
    """The row is refused for what it is; trying again would change nothing."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason
        self.detail = detail


@dataclass(frozen=True)
class Target:
    """A URL taken apart once. ``host`` is lower case ASCII; IPv6 literals carry no brackets."""

    scheme: str
    host: str
    port: int
    request_path: str

    @property
    def place(self) -> str:
        """``host:port``, as ``connect_to`` names it."""
        return f"{self._bracketed}:{self.port}"

    @property
    def host_header(self) -> str:
        is_default = self.port == DEFAULT_PORTS[self.scheme]
        return self._bracketed if is_default else f"{self._bracketed}:{self.port}"

    @property
    def url(self) -> str:
        return f"{self.scheme}://{self.host_header}{self.request_path}"

    @property
    def _bracketed(self) -> str:
        return f"[{self.host}]" if ":" in self.host else self.host


def parse_url(url: str, allowed_ports: Collection[int]) -> Target:
    """Take ``url`` apart, or raise ``Rejected`` with reason ``url``, ``scheme`` or ``port``."""
    target = take_apart(url)
    if target.port not in allowed_ports:
        raise Rejected("port", str(target.port))
    return target


def take_apart(url: str) -> Target:
    """``url`` in its parts, whatever its port; ``Rejected`` with reason ``url`` or ``scheme``."""
    if len(url) > MAX_URL_CHARS:
        raise Rejected("url", f"longer than {MAX_URL_CHARS} characters")
    if _FORBIDDEN_IN_URL.search(url):
        raise Rejected("url", "control character or backslash")
    try:
        parts = urlsplit(url.strip(" "))
        port = parts.port
    except ValueError as error:
        raise Rejected("url", str(error)) from error
    scheme = parts.scheme.lower()
    if scheme not in DEFAULT_PORTS:
        raise Rejected("scheme", scheme[:20] or "none")
    if "@" in parts.netloc:
        raise Rejected("url", "user information before the host")
    host = _ascii_host(parts.netloc, parts.hostname)
    port = DEFAULT_PORTS[scheme] if port is None else port
    path = quote(parts.path or "/", safe=_KEEP_IN_PATH)
    if parts.query:
        path += "?" + quote(parts.query, safe=_KEEP_IN_PATH)
    return Target(scheme, host, port, path)


def _ascii_host(netloc: str, hostname: str | None) -> str:
    host = hostname or ""
    if not host.isascii():
        try:
            host = host.encode("idna").decode("ascii").lower()
        except UnicodeError as error:
            raise Rejected("url", "host name is not valid IDNA") from error
    bracketed = f"[{host}]" if netloc.startswith("[") else host
    if not _HOST.fullmatch(bracketed):
        raise Rejected("url", "host name")
    return host


def redirect_url(base: Target, location: str) -> str:
    """The absolute URL of a ``Location`` header, still to be parsed and checked."""
    if _FORBIDDEN_IN_URL.search(location):
        raise Rejected("url", "control character or backslash in a redirect")
    try:
        return urljoin(base.url, location.strip(" "))
    except ValueError as error:
        raise Rejected("url", str(error)) from error


def check_addresses(addresses: Iterable[str]) -> list[str]:
    """The addresses when *every* one is on the public internet, else ``Rejected("address")``."""
    checked = []
    for address in addresses:
        why = special_address(address)
        if why is not None:
            raise Rejected("address", f"{address} is {why}")
        checked.append(address)
    return checked


def special_address(address: str) -> str | None:
    """Why ``address`` must not be dialled (``loopback``, ``private`` …), or None when public."""
    try:
        ip: IPAddress = ipaddress.ip_address(address)
    except ValueError:
        return "not an address"
    return _special(ip)


def _special(ip: IPAddress) -> str | None:
    for name in ("loopback", "link_local", "multicast", "unspecified", "reserved", "private"):
        if getattr(ip, f"is_{name}"):
            return name.replace("_", "-")
    if isinstance(ip, ipaddress.IPv6Address):
        if ip.is_site_local or ip.scope_id is not None:
            return "site-local or scoped"
        for embedded in _embedded_ipv4(ip):
            why = _special(embedded)
            return f"an IPv4 address in disguise ({why or 'translated'})"
    if any(ip in network for network in _SPECIAL_NETWORKS):
        return "set aside for special use"
    return None if ip.is_global else "not global"


def _embedded_ipv4(ip: ipaddress.IPv6Address) -> list[ipaddress.IPv4Address]:
    """IPv4 addresses that a mapped, translated or tunnelled IPv6 address leads to."""
    found = [ip.ipv4_mapped, ip.sixtofour]
    if ip.teredo is not None:
        found.extend(ip.teredo)
    if ip in _IPV4_COMPATIBLE or any(ip in network for network in _NAT64_NETWORKS):
        found.append(ipaddress.IPv4Address(int(ip) & 0xFFFF_FFFF))
    return [address for address in found if address is not None]
