"""What was taken down and must not come back, as digests: never an address, a domain or an image.

``tombstones/`` under a dataset's root holds one file per takedown, named by its content. Every
curation, retry and derived version of the dataset honours all of them, before any request is made.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from urllib.parse import urlsplit

import polars as pl
from pydantic import TypeAdapter

from infra import storage
from infra.digests import canonical_json, sha256_bytes

TAKEDOWN = "takedown"
FOLDER = "tombstones"
SCHEMA_VERSION = 1


@dataclass(frozen=True)
class Tombstones:
    """Hex sha256 of addresses and host names (lower case), of images as fetched; sample ids."""

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
            frozenset(map(digest_of, urls)),
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
            found |= _looked_up(rows["url"], lambda url: digest_of(url) in self.urls)
        if "url" in rows.columns and self.domains:
            hosts = rows.select(host=pl.col("url").str.extract(r"^[^/?#]*//([^/?#]*)"))["host"]
            found |= _looked_up(hosts, self._is_domain)
        if "sha256" in rows.columns and self.images:
            found |= rows["sha256"].is_in(list(self.images)).fill_null(False)
        if "sample_id" in rows.columns and self.samples:
            found |= rows["sample_id"].is_in(list(self.samples)).fill_null(False)
        return found

    def _is_domain(self, authority: str) -> bool:
        """Whether the host, or a domain it lies in, is taken down."""
        try:
            host = urlsplit(f"//{authority}").hostname or ""
        except ValueError:
            return False
        labels = host.strip(".").split(".")
        return any(
            digest_of(".".join(labels[start:])) in self.domains for start in range(len(labels))
        )


def digest_of(text: str) -> str:
    """The sha256 of a text, 64 hex digits."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def _looked_up(values: pl.Series, is_covered: Callable[[str], bool]) -> pl.Series:
    covered = [value for value in values.drop_nulls().unique() if is_covered(value)]
    return values.is_in(covered).fill_null(False)


def load_tombstones(dataset_root: str) -> Tombstones:
    """All of a dataset's."""
    found = Tombstones()
    for info in storage.list_objects(storage.join(dataset_root, FOLDER)):
        data = storage.read_bytes(info.uri)
        name = info.uri.rpartition("/")[2].removesuffix(".json")
        if sha256_bytes(data)[: len(name)] != name:
            raise storage.DigestMismatch(
                info.uri, expected_sha256=name, got_sha256=sha256_bytes(data)
            )
        found |= TypeAdapter(Tombstones).validate_json(data)
    return found


def publish_tombstones(dataset_root: str, tombstones: Tombstones) -> str:
    """Add a file; returns its address. The same ones twice are one file."""
    uri = storage.join(dataset_root, FOLDER, f"{tombstones.digest[:32]}.json")
    storage.write_bytes(uri, tombstones.to_bytes())
    return uri
