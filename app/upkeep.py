"""What `report` and `repair` do: a version found by its name, its page or its bytes made again."""

from __future__ import annotations

import re
from collections.abc import Collection
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from app.place import Place, place_of
from app.scoring import LazySpark
from app.status import read_made
from app.verb import Output
from infra import storage
from infra.cluster import ClusterConfig
from infra.config import atelier_home
from infra.errors import UserError
from infra.manifest import MANIFEST_NAME, dataset_root, dataset_version, load_manifest, successor_of

if TYPE_CHECKING:
    from pipelines.repair import RepairResult

_LOST_SHOWN = 20
_VERSION = re.compile(r"[0-9a-f]{64}")


def make_report(
    dataset: str, store: str | None, output: Path | None, out: Output, *, with_card: bool
) -> dict[str, Any]:
    """Make the page and the card of a version; returns the JSON."""
    from pipelines.card import card
    from pipelines.report import make_page, write_report

    place = place_of_dataset(dataset, store, out)
    uri = find_version(dataset, place.store_uri)
    manifest = load_manifest(uri)
    environment = place.environment
    with ExitStack() as stack:
        spark = LazySpark(ClusterConfig(), place, stack)
        if output is None:
            page = write_report(uri, manifest, spark, environment)
        else:
            try:
                output.write_text(make_page(uri, manifest, spark, environment), encoding="utf-8")
            except OSError as error:
                raise UserError(f"cannot write {output}: {error.strerror}") from error
            page = str(output)
    out.say(f"{manifest.name} {manifest.version[:12]}: {page}")
    if with_card:
        out.say(card(manifest))
    return {
        "dataset": manifest.name,
        "version": manifest.version,
        "manifest": uri,
        "report": page,
        "card": card(manifest) if with_card else None,
    }


def repair_version(dataset: str, store: str | None, out: Output) -> dict[str, Any]:
    """Make a version whole; returns the JSON."""
    from infra.progress import progress
    from pipelines.repair import repair

    place = place_of_dataset(dataset, store, out)
    uri = find_version(dataset, place.store_uri)
    with ExitStack() as stack:
        spark = LazySpark(ClusterConfig(), place, stack)
        result = repair(uri, spark, progress, place.environment)
    say_repair(result, dataset_version(uri), out)
    return asdict(result)


def say_repair(result: RepairResult, version: str, out: Output) -> None:
    """What came of a repair of ``version``."""
    for path in result.restored:
        out.say(f"{path}: put back as it was")
    if result.version == version:
        out.say(f"version {version[:12]} is whole")
        return
    for sample_id in result.lost[:_LOST_SHOWN]:
        out.say(f"lost: {sample_id}")
    if len(result.lost) > _LOST_SHOWN:
        out.say(f"and {len(result.lost) - _LOST_SHOWN:,} more; the ledger names all")
    out.say(
        f"version {version[:12]} could not be had again; {result.version[:12]} takes its place, "
        f"with {len(result.lost):,} samples less and {result.unproven:,} taken from damaged tars"
    )


def place_of_dataset(dataset: str, store: str | None, out: Output) -> Place:
    """Where what a person calls a dataset lies; a manifest's address says so itself."""
    is_address = dataset.endswith(f"/{MANIFEST_NAME}")
    return place_of(dataset if is_address else store, out.say)


def find_version(dataset: str, store_uri: str) -> str:
    """The manifest's address of what a person calls a dataset.

    ``dataset``: a manifest's address, ``name``, or ``name/`` and the beginning of a version. A
    name alone is the version of the newest run that made it, else the only one there is.
    """
    if dataset.endswith(f"/{MANIFEST_NAME}"):
        return dataset
    name, _, wanted = dataset.partition("/")
    root = storage.join(store_uri, "datasets", name)
    versions = stored_versions(root)
    if not versions:
        raise UserError(
            expected=f"a dataset in {store_uri}: {', '.join(dataset_names(store_uri)) or '(none)'}",
            got=repr(dataset),
        )
    if wanted:
        found = [version for version in versions if version.startswith(wanted)]
    else:
        found = [version] if (version := _made_here(root)) in versions else versions
    if len(found) != 1:
        some = ", ".join(f"{name}/{version[:12]}" for version in (found or versions)[:8])
        raise UserError(
            expected=f"one version of {name}: {some}", got=repr(dataset), remedy="name it so"
        )
    return storage.join(root, found[0], MANIFEST_NAME)


def dataset_names(store_uri: str) -> list[str]:
    """The names of the datasets in a store."""
    root = storage.join(store_uri, "datasets") + "/"
    return sorted(
        {info.uri.removeprefix(root).partition("/")[0] for info in storage.list_objects(root)}
    )


def chosen_datasets(store_uri: str, names: Collection[str]) -> list[str]:
    """These datasets of a store, or all; ``UserError`` for one that is not there, and for none."""
    every = dataset_names(store_uri)
    if not every:
        raise UserError(
            expected=f"a dataset in {store_uri}",
            got="none",
            remedy="name the store with --store, and give its keys in the environment",
        )
    for name in names:
        if name not in every:
            raise UserError(
                expected=f"one of the datasets {', '.join(every)} of {store_uri}", got=name
            )
    return [name for name in every if not names or name in names]


def stored_versions(root: str) -> list[str]:
    """The versions under a dataset's root."""
    prefix = root.rstrip("/") + "/"
    parts = [info.uri.removeprefix(prefix).split("/") for info in storage.list_objects(root)]
    return sorted(
        each[0]
        for each in parts
        if len(each) == 2 and each[1] == MANIFEST_NAME and _VERSION.fullmatch(each[0])
    )


def _made_here(root: str) -> str:
    """The version that the newest run made of a dataset, or what took its place."""
    run = read_made(atelier_home())
    for step in reversed([] if run is None else run.steps):
        uri = step.manifest_uri
        if uri is not None and dataset_root(uri) == root and step.dataset_version is not None:
            return successor_of(root, step.dataset_version)
    return ""
