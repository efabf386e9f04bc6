"""What was taken down and must not come back, as digests: never an address, a domain or an image.

``tombstones/`` under a dataset's root, or under the store's for all its datasets, holds files named
by their content. Every curation, retry, export and derived version honours all of them, before any
request is made and at every hop of a redirect. An address is known in every spelling that asks for
the same.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from urllib.parse import urlsplit

import polars as pl
from pydantic import TypeAdapter

from infra import storage
from infra.digests import canonical_json, sha256_bytes
from infra.errors import UserError
from infra.manifest import store_root
from pipelines.guard import Target
from pipelines.spelling import address_of, one_address

TAKEDOWN = "takedown"
FOLDER = "tombstones"
SCHEMA_VERSION = 1
# What a line of a list may name.
KINDS = ("url", "domain", "sha256", "sample", "url-sha256", "domain-sha256")
_DIGEST = re.compile(r"\A[0-9a-fA-F]{64}\Z")
_FORMS = {
    "url": re.compile("://"),
    "domain": re.compile(r"\A\.?[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*\.?\Z"),
    "sha256": _DIGEST,
    "sample": re.compile(r"\A[0-9a-fA-F]{32}\Z"),
    "url-sha256": _DIGEST,
    "domain-sha256": _DIGEST,
}


@dataclass(frozen=True)
class Tombstones:
    """Hex sha256 of addresses and host names (lower case), of images as fetched; sample ids.

    Of an address, what was asked for and its one spelling (``pipelines.spelling``). A list of
    digests, or a takedown of an earlier version, may have only one of them.
    """

    urls: frozenset[str] = frozenset()
    domains: frozenset[str] = frozenset()
    images: frozenset[str] = frozenset()
    samples: frozenset[str] = frozenset()
    schema_version: int = field(default=SCHEMA_VERSION)

    @classmethod
    def of(
        cls,
        urls: Iterable[str] = (),
        domains: Iterable[str] = (),
        images: Iterable[str] = (),
        samples: Iterable[str] = (),
    ) -> Tombstones:
        """From plain values."""
        return cls(
            frozenset(digest_of(each) for url in urls for each in _spellings(url)),
            frozenset(digest_of(domain.strip().strip(".").lower()) for domain in domains),
            frozenset(image.lower() for image in images),
            frozenset(sample.lower() for sample in samples),
        )

    def __bool__(self) -> bool:
        return bool(self.urls or self.domains or self.images or self.samples)

    def __or__(self, other: Tombstones) -> Tombstones:
        return Tombstones(
            self.urls | other.urls,
            self.domains | other.domains,
            self.images | other.images,
            self.samples | other.samples,
        )

    def to_bytes(self) -> bytes:
        """Canonical JSON."""
        known = asdict(self)
        return canonical_json(
            {name: sorted(v) if isinstance(v, frozenset) else v for name, v in known.items()}
        )

    @property
    def digest(self) -> str:
        """The sha256 of ``to_bytes``."""
        return sha256_bytes(self.to_bytes())

    def covers(self, rows: pl.DataFrame) -> pl.Series:
        """Whether each row is taken down; looks at ``url``, ``sample_id`` and ``sha256``, if any.

        Each distinct address and host is hashed once, and only when there is one to compare with.
        """
        found = pl.Series([False]).new_from_index(0, rows.height)
        if "url" in rows.columns and self.urls:
            found |= _looked_up(rows["url"], self._is_url)
        if "url" in rows.columns and self.domains:
            hosts = rows.select(host=pl.col("url").str.extract(r"^[^/?#]*//([^/?#]*)"))["host"]
            found |= _looked_up(hosts, self._is_domain)
        if "sha256" in rows.columns and self.images:
            found |= rows["sha256"].is_in(list(self.images)).fill_null(False)
        if "sample_id" in rows.columns and self.samples:
            found |= rows["sample_id"].is_in(list(self.samples)).fill_null(False)
        return found

    def bar(self, target: Target) -> bool:
        """Whether a request must not go there."""
        return self._is_host(target.host) or any(
            digest_of(url) in self.urls for url in {target.url, address_of(target)}
        )

    def _is_url(self, url: str) -> bool:
        return any(digest_of(each) in self.urls for each in _spellings(url))

    def _is_domain(self, authority: str) -> bool:
        """Whether the host, or a domain it lies in, is taken down."""
        try:
            host = urlsplit(f"//{authority}").hostname or ""
            host = host if host.isascii() else host.encode("idna").decode("ascii").lower()
        except ValueError:
            return False
        return self._is_host(host)

    def _is_host(self, host: str) -> bool:
        labels = host.strip(".").split(".")
        return any(
            digest_of(".".join(labels[start:])) in self.domains for start in range(len(labels))
        )


def parse_list(text: str, name: str) -> dict[str, list[str]]:
    """Kind -> values of a list: one address a line; or ``kind:value``; ``#`` begins a comment.

    ``UserError`` names the line that is odd, and not what stands in it.
    """
    found: dict[str, list[str]] = {kind: [] for kind in KINDS}
    for number, line in enumerate(map(str.strip, text.splitlines()), start=1):
        if not line or line.startswith("#"):
            continue
        kind, _, value = line.partition(":")
        if kind not in KINDS or value.startswith("//"):
            kind, value = "url", line
        value = value.strip()
        if not _FORMS[kind].search(value):
            raise UserError(
                expected=f"in line {number} of {name} an address with its scheme, or after "
                f"{', '.join(f'{each}:' for each in KINDS[1:])} a host name or hex digits",
                got=f"something else after {kind}:",
            )
        found[kind].append(value)
    return found


def named_by(known: Mapping[str, Iterable[str]]) -> Tombstones:
    """What ``parse_list`` found, as digests."""
    plain = (known.get(kind, ()) for kind in ("url", "domain", "sha256", "sample"))
    return Tombstones.of(*plain) | Tombstones(
        urls=frozenset(each.lower() for each in known.get("url-sha256", ())),
        domains=frozenset(each.lower() for each in known.get("domain-sha256", ())),
    )


def read_block_lists(uris: Iterable[str]) -> Tombstones:
    """What the lists at these addresses name, together; ``UserError`` for one that is not there."""
    found = Tombstones()
    for uri in uris:
        try:
            text = storage.read_bytes(uri).decode("utf-8")
        except (storage.ObjectMissing, UnicodeDecodeError) as error:
            raise UserError(
                expected=f"a block list, UTF-8 text, at {uri}", got=type(error).__name__
            ) from error
        found |= named_by(parse_list(text, uri))
    return found


def digest_of(text: str) -> str:
    """The sha256 of a text, 64 hex digits."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def _spellings(url: str) -> set[str]:
    return {url, one_address(url) or url}


def _looked_up(values: pl.Series, is_covered: Callable[[str], bool]) -> pl.Series:
    covered = [value for value in values.drop_nulls().unique() if is_covered(value)]
    return values.is_in(covered).fill_null(False)


def load_tombstones(dataset_root: str) -> Tombstones:
    """All that hold for a dataset: its own, and those of the store that it lies in."""
    homes = dict.fromkeys([dataset_root, store_root(dataset_root)])
    found = Tombstones()
    for info in [info for home in homes for info in storage.list_objects(_folder(home))]:
        data = storage.read_bytes(info.uri)
        name = info.uri.rpartition("/")[2].removesuffix(".json")
        if sha256_bytes(data)[: len(name)] != name:
            raise storage.DigestMismatch(
                info.uri, expected_sha256=name, got_sha256=sha256_bytes(data)
            )
        found |= TypeAdapter(Tombstones).validate_json(data)
    return found


def publish_tombstones(root: str, tombstones: Tombstones) -> str:
    """Add a file to a dataset's or a store's; returns its address. The same ones are one file."""
    uri = storage.join(_folder(root), f"{tombstones.digest[:32]}.json")
    storage.write_bytes(uri, tombstones.to_bytes())
    return uri


def _folder(root: str) -> str:
    return storage.join(root, FOLDER)
