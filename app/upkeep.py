"""What `report` and `repair` do: a version found by its name, its page or its bytes made again."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from app.place import Place
from app.scoring import LazySpark, newest_store
from app.status import read_made
from app.verb import Output
from app.verify import reach
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

    uri = find_version(dataset, store, out)
    manifest = load_manifest(uri)
    with ExitStack() as stack:
        spark, environment = lazy_spark(stack)
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

    uri = find_version(dataset, store, out)
    with ExitStack() as stack:
        spark, environment = lazy_spark(stack)
        result = repair(uri, spark, progress, environment)
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


def lazy_spark(stack: ExitStack) -> tuple[LazySpark, Mapping[str, str]]:
    """Spark at first use, and the keys to the store that this process was given."""
    environment = {name: os.environ[name] for name in os.environ if name.startswith("AWS_")}
    place = Place(atelier_home(), "", "", False, environment)
    return LazySpark(ClusterConfig(), place, stack), environment


def find_version(dataset: str, store: str | None, out: Output) -> str:
    """The manifest's address of what a person calls a dataset.

    ``dataset``: a manifest's address, ``name``, or ``name/`` and the beginning of a version. A
    name alone is the version of the newest run that made it, else the only one there is.
    """
    if dataset.endswith(f"/{MANIFEST_NAME}"):
        reach(dataset)
        return dataset
    store_uri = reached_store(store, out)
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


def reached_store(store: str | None, out: Output) -> str:
    """The store that was named, or the newest run's; it answers."""
    if store is None:
        return newest_store(out)
    reach(store)
    return store


def dataset_names(store_uri: str) -> list[str]:
    """The names of the datasets in a store."""
    root = storage.join(store_uri, "datasets") + "/"
    return sorted(
        {info.uri.removeprefix(root).partition("/")[0] for info in storage.list_objects(root)}
    )


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
