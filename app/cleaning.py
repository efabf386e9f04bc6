"""What `clean` does: stock is taken of every dataset, and what nobody needs is removed."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import TYPE_CHECKING, Any

from app.place import Place, place_of
from app.status import newest_of_each_recipe
from app.upkeep import chosen_datasets, dataset_names, stored_versions
from app.verb import Output
from infra import storage
from infra.config import atelier_home
from infra.errors import UserError
from infra.lease import LeaseHeld
from infra.manifest import MANIFEST_NAME, DatasetManifest, load_manifest, successor_of

if TYPE_CHECKING:
    from pipelines.clean import Stock


def clean_datasets(
    names: Collection[str],
    store: str | None,
    out: Output,
    *,
    removes: bool,
    with_work: bool,
    with_versions: bool,
) -> dict[str, Any]:
    """Say what is stored, and with ``removes`` remove what may go; returns the JSON.

    A dataset on which a driver is at work is named and left alone.
    """
    from infra.progress import progress
    from pipelines.clean import clean, take_stock

    place = place_of(store, out.say)
    store_uri = place.store_uri
    chosen = chosen_datasets(store_uri, names)
    needed = _referred_to(place, dataset_names(store_uri)) if with_versions else None
    found: list[dict[str, Any]] = []
    for name in chosen:
        root = storage.join(store_uri, "datasets", name)
        versions = None if needed is None else needed[name]
        try:
            if removes:
                with progress(f"cleaning {name}", None, "files") as bar:
                    stock = clean(
                        root,
                        needed=versions,
                        with_work=with_work,
                        environment=place.environment,
                        progress=bar,
                    )
            else:
                stock = take_stock(root, needed=versions, with_work=with_work)
        except LeaseHeld as error:
            out.say(f"{name}: left alone, {error}")
            found.append({"dataset": name, "left_alone": str(error)})
            continue
        _say(stock, out, removes=removes)
        found.append(_json(stock, removes=removes))
    others = _beside(store_uri)
    for folder, num_bytes in others.items():
        out.say(f"{folder}/ beside the datasets: {_size(num_bytes)}, not looked into")
    freed = sum(each.get("removable_bytes", 0) for each in found)
    if not removes and (freed or any(each.get("unfinished_uploads") for each in found)):
        out.say(f"nothing was removed; with --gc, {_size(freed)} would go")
    return {"datasets": found, "removed": removes, "bytes": freed, "beside": others}


def _say(stock: Stock, out: Output, *, removes: bool) -> None:
    total = sum(stock.sizes.values())
    out.say(f"{stock.name}: {len(stock.sizes):,} files, {_size(total)}")
    for paths, word in (
        (stock.kept, "stays"),
        (stock.removable, "removed" if removes else "may go"),
    ):
        for kind, (files, num_bytes) in stock.by_kind(paths).items():
            out.say(f"  {word:<8}  {_size(num_bytes):>11}  {files:>9,} files  {kind}")
    if stock.uploads:
        word = "removed" if removes else "may go"
        out.say(f"  {word:<8}  {len(stock.uploads):,} uploads that killed writers left unfinished")
    for version in stock.going:
        out.say(f"  {'removed' if removes else 'may go'}: version {version[:12]}")


def _json(stock: Stock, *, removes: bool) -> dict[str, Any]:
    def told(paths: dict[str, str]) -> list[dict[str, Any]]:
        return [
            {"kind": kind, "files": files, "bytes": num_bytes}
            for kind, (files, num_bytes) in stock.by_kind(paths).items()
        ]

    return {
        "dataset": stock.name,
        "stays": told(stock.kept),
        "removed" if removes else "may_go": told(stock.removable),
        "versions": stock.going,
        "removable_bytes": stock.removable_bytes,
        "unfinished_uploads": len(stock.uploads),
    }


def _beside(store_uri: str) -> dict[str, int]:
    """Bytes of the store's other folders: checkpoints, images, models."""
    prefix = store_uri.rstrip("/") + "/"
    found: dict[str, int] = {}
    for info in storage.list_objects(store_uri):
        folder = info.uri.removeprefix(prefix).partition("/")[0]
        if folder != "datasets":
            found[folder] = found.get(folder, 0) + info.num_bytes
    return dict(sorted(found.items()))


def _referred_to(place: Place, names: Iterable[str]) -> dict[str, set[str]]:
    """Dataset -> versions that a registered model, a run of this home, a search index or another
    such version refers to. ``UserError`` where the registry cannot be asked."""
    from training.versions import trained_on

    store_uri = place.store_uri
    if not place.is_recorded:
        raise UserError(
            expected="a store of runs of this home, whose registry is known, for --versions",
            got=store_uri,
            remedy="leave --versions out, or work from the home that trains on this store",
        )
    server = place.server
    here = storage.join(store_uri, "datasets") + "/"
    manifests: dict[tuple[str, str], DatasetManifest] = {}
    for name in names:
        root = storage.join(store_uri, "datasets", name)
        for version in stored_versions(root):
            manifests[name, version] = load_manifest(storage.join(root, version, MANIFEST_NAME))
    used = {(name, version) for name, version in manifests if trained_on(server, version)}
    for run in newest_of_each_recipe(atelier_home()):
        for step in run.steps:
            uri = step.manifest_uri or ""
            if step.dataset_version is not None and uri.startswith(here):
                root = uri.rsplit("/", 2)[0]
                used.add((root.rpartition("/")[2], successor_of(root, step.dataset_version)))
    for name in names:
        used.add((name, _searched(storage.join(store_uri, "datasets", name))))
    return with_parents(used, manifests)


def _searched(root: str) -> str:
    """The version that `search` looks in; the empty text when there is none."""
    from pipelines.search import latest_embeddings

    try:
        return latest_embeddings(root).dataset_version
    except UserError:
        return ""


def with_parents(
    used: Iterable[tuple[str, str]], manifests: dict[tuple[str, str], DatasetManifest]
) -> dict[str, set[str]]:
    """Dataset -> the versions in ``used``, what they were made from, and so on."""
    found: dict[str, set[str]] = {name: set() for name, _ in manifests}
    pending = [key for key in used if key in manifests]
    while pending:
        name, version = pending.pop()
        if version in found[name]:
            continue
        found[name].add(version)
        for parent in manifests[name, version].parents:
            if isinstance(parent, dict) and "version" in parent:
                key = (str(parent.get("dataset")), str(parent["version"]))
                pending += [key] if key in manifests else []
    return found


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 1e6:,.1f} MB"
