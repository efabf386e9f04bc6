"""What `takedown` does: a request checked, carried out in every dataset, the models named."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from app.place import connect
from app.recipe import ServicesConfig
from app.scoring import LazySpark, newest_store
from app.verb import Output
from infra import storage
from infra.cluster import ClusterConfig
from infra.config import atelier_home
from infra.errors import UserError

if TYPE_CHECKING:
    from pipelines.tombstones import Tombstones

_SHA256 = re.compile(r"[0-9a-f]{64}")
_SAMPLE = re.compile(r"[0-9a-f]{32}")
_HOST = re.compile(r"[a-z0-9_-]+(\.[a-z0-9_-]+)*")


@dataclass(frozen=True)
class Request:
    """What is to go; checked: a slip here would remove nothing, or too much."""

    urls: tuple[str, ...]
    domains: tuple[str, ...]
    images: tuple[str, ...]
    samples: tuple[str, ...]

    @classmethod
    def of(
        cls,
        urls: Iterable[str],
        domains: Iterable[str],
        images: Iterable[str],
        samples: Iterable[str],
        file: Path | None,
    ) -> Request:
        """From the options and the file's lines; ``UserError`` names the first that is odd."""
        known = {"url": [*urls], "domain": [*domains], "sha256": [*images], "sample": [*samples]}
        if file is not None:
            try:
                lines = file.read_text(encoding="utf-8").splitlines()
            except (OSError, UnicodeDecodeError) as error:
                raise UserError(f"{file} cannot be read: {error}") from error
            for line in (line.strip() for line in lines):
                kind, _, value = line.partition(":")
                if kind in known and not value.startswith("//"):
                    known[kind].append(value.strip())
                elif line and not line.startswith("#"):
                    known["url"].append(line)
        request = cls(
            tuple(known["url"]),
            tuple(domain.strip().strip(".").lower() for domain in known["domain"]),
            tuple(image.lower() for image in known["sha256"]),
            tuple(sample.lower() for sample in known["sample"]),
        )
        request._check()
        return request

    def _check(self) -> None:
        for values, is_right, expected in (
            (self.urls, lambda v: "://" in v, "an address like https://a.example/1.jpg"),
            (self.domains, _HOST.fullmatch, "a host like a.example, without scheme or path"),
            (self.images, _SHA256.fullmatch, "a sha256 of 64 hex digits"),
            (self.samples, _SAMPLE.fullmatch, "a sample id of 32 hex digits"),
        ):
            for value in values:
                if not is_right(value):
                    raise UserError(expected=expected, got=repr(value))
        if not any((self.urls, self.domains, self.images, self.samples)):
            raise UserError(
                "name what is to go: --url, --domain, --sha256, --sample or --file; "
                "`atelier takedown --help` has examples"
            )

    @property
    def tombstones(self) -> Tombstones:
        """The same as digests."""
        from pipelines.tombstones import Tombstones

        return Tombstones.of(self.urls, self.domains, self.images, self.samples)


def take_down_everywhere(
    request: Request, names: Collection[str], store: str | None, out: Output, *, dry_run: bool
) -> dict[str, Any]:
    """Carry it out, or with ``dry_run`` count, in these datasets or all; returns the JSON."""
    from infra.progress import progress
    from pipelines.takedown import look_for, take_down

    place = connect(ServicesConfig(), atelier_home(), out.say)
    store_uri = store or newest_store(out)
    done: list[dict[str, Any]] = []
    withdrawn: list[str] = []
    with ExitStack() as stack:
        spark = LazySpark(ClusterConfig(), place, stack)
        for name in _datasets(store_uri, names):
            root = storage.join(store_uri, "datasets", name)
            wanted = request.tombstones
            if dry_run:
                counts = look_for(root, wanted, spark, progress, place.environment)
                hit = {version: found for version, found in counts.items() if found[1]}
                withdrawn += hit
                samples, rows = max(hit.values(), default=(0, 0))
                done.append({"dataset": name, "versions": sorted(hit), "samples": samples})
                out.say(f"{name}: would remove {samples:,} samples, {rows:,} rows in all")
                continue
            made = take_down(root, wanted, spark, progress, place.environment)
            withdrawn += made.versions
            done.append(
                {
                    "dataset": name,
                    "versions": made.versions,
                    "samples": made.num_samples,
                    "rows": made.num_rows,
                    "bytes_deleted": made.num_bytes,
                }
            )
            out.say(
                f"{name}: {made.num_samples:,} samples removed, {made.num_rows:,} rows in all, "
                f"{len(made.versions)} versions replaced, {made.num_bytes / 1e6:,.1f} MB deleted"
            )
            for old, new in made.versions.items():
                out.say(f"  {old[:12]} is now {new[:12]}")
    models = _models_of(withdrawn, place.tracking_uri)
    for model in models:
        out.say(f"trained on it: {model['model']} version {model['version']} ({model['stage']})")
    return {"datasets": done, "models": models, "dry_run": dry_run}


def _datasets(store_uri: str, names: Collection[str]) -> list[str]:
    root = storage.join(store_uri, "datasets") + "/"
    found = sorted(
        {info.uri.removeprefix(root).partition("/")[0] for info in storage.list_objects(root)}
    )
    for name in names:
        if name not in found:
            raise UserError(
                expected=f"one of the datasets {', '.join(found) or '(none)'}", got=name
            )
    return [name for name in found if not names or name in names]


def _models_of(versions: Collection[str], tracking_uri: str) -> list[dict[str, Any]]:
    """The registered models that were trained on one of these dataset versions."""
    if not versions:
        return []

    from infra.tracking_server import TrackingServer
    from training.plan import TAG_DATASET
    from training.versions import TAG_STAGE, versions_with_tag

    server = TrackingServer(tracking_uri)
    return [
        {
            "model": found.name,
            "version": found.version,
            "stage": found.tags.get(TAG_STAGE, ""),
            "dataset_version": version,
            "checkpoint": found.uri,
        }
        for version in sorted(versions)
        for found in versions_with_tag(server, TAG_DATASET, version)
    ]
