"""From a checkpoint back to what it was made of: stages, datasets, the metadata files they read.

Nothing is believed: a checkpoint's list must add up to its folder's name, its provenance to the
list, its parent's digest to what the child says, a manifest to its version. What does not is a line
in ``problems``, and the walk goes on as far as it can.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from infra import storage
from infra.errors import UserError
from infra.manifest import load_manifest
from training.publish import read_listing, read_provenance, verify_checkpoint

MAX_DEPTH = 64  # a chain of stages, or of derived datasets; a longer one is a circle


@dataclass(frozen=True)
class DatasetLink:
    """A dataset version and what it was made of: metadata files, or other versions."""

    name: str
    version: str
    uri: str
    num_samples: int
    rows_in: int
    files: tuple[Mapping[str, Any], ...] = ()
    parents: tuple[DatasetLink, ...] = ()


@dataclass(frozen=True)
class StageLink:
    """A published checkpoint. ``init`` says what its weights began with: ``source``,
    ``num_inherited`` and ``new_keys``; ``starts`` how often it began and from which step; ``parts``
    are the published folders that went in (``training.parts.PublishedPart``)."""

    stage: str
    sha256: str
    uri: str
    stage_key: str
    step: int
    mlflow_run_id: str
    init: Mapping[str, Any]
    starts: tuple[Mapping[str, Any], ...]
    metrics: Mapping[str, float]
    dataset: DatasetLink | None
    mixed_in: tuple[DatasetLink, ...] = ()
    parts: tuple[Mapping[str, Any], ...] = ()


@dataclass
class Lineage:
    """The checkpoint asked for first, its ancestors after it."""

    stages: list[StageLink] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """For a program."""
        return {"stages": [asdict(stage) for stage in self.stages], "problems": self.problems}


def trace(uri: str, store_uri: str, *, verify: bool = False) -> Lineage:
    """Walk back from a published checkpoint; ``verify`` reads every byte of every checkpoint.

    Raises ``UserError`` when there is none at ``uri``, or nothing of it makes sense.
    """
    found = Lineage()
    said: str | None = None
    while len(found.stages) < MAX_DEPTH:
        listing = read_listing(uri)
        if said is not None and listing.sha256 != said:
            found.problems.append(f"{uri} has digest {listing.sha256}; its child says {said}")
        if verify:
            found.problems += [f"{uri}: {problem}" for problem in verify_checkpoint(uri)]
        facts = read_provenance(uri)
        found.stages.append(_stage(uri, listing.sha256, facts, store_uri, found.problems))
        parent = facts.get("parent")
        if not parent:
            return found
        uri, said = str(parent["uri"]), str(parent["sha256"])
        try:
            read_listing(uri)
        except UserError as error:
            found.problems.append(f"stage {parent.get('stage', 'before')}: {error}")
            return found
    raise UserError(f"the parents of {found.stages[0].uri} go round in a circle")


def _stage(
    uri: str, sha256: str, facts: Mapping[str, Any], store_uri: str, problems: list[str]
) -> StageLink:
    def link_of(pin: Mapping[str, Any]) -> DatasetLink | None:
        name, version, at = (str(pin[key]) for key in ("name", "version", "manifest_uri"))
        return _dataset(name, version, at, store_uri, problems)

    dataset = facts.get("dataset")
    mixed_in = [link_of(pin) for pin in facts.get("mixed_in") or ()]
    return StageLink(
        stage=str(facts.get("stage", "")),
        sha256=sha256,
        uri=uri,
        stage_key=str(facts.get("stage_key", "")),
        step=int(facts.get("step", 0)),
        mlflow_run_id=str(facts.get("mlflow_run_id", "")),
        init=dict(facts.get("init") or {}),
        starts=tuple(facts.get("starts") or ()),
        metrics=dict(facts.get("metrics") or {}),
        dataset=link_of(dataset) if dataset else None,
        mixed_in=tuple(link for link in mixed_in if link is not None),
        parts=tuple(facts.get("parts") or ()),
    )


def _dataset(
    name: str, version: str, uri: str, store_uri: str, problems: list[str], depth: int = 0
) -> DatasetLink | None:
    try:
        manifest = load_manifest(uri, version)
    except UserError as error:
        problems.append(f"dataset {name}: {error}")
        return None
    files, parents = [], []
    for parent in manifest.parents:
        if isinstance(parent, dict) and {"dataset", "version"} <= set(parent):
            above_name, above = str(parent["dataset"]), str(parent["version"])
            above_uri = storage.join(store_uri, "datasets", above_name, above, "manifest.json")
            if depth < MAX_DEPTH:
                parents.append(
                    _dataset(above_name, above, above_uri, store_uri, problems, depth + 1)
                )
        elif isinstance(parent, dict):
            files.append(parent)
    return DatasetLink(
        name=name,
        version=version,
        uri=uri,
        num_samples=manifest.counts.get("committed", 0),
        rows_in=manifest.counts.get("rows_in", 0),
        files=tuple(files),
        parents=tuple(parent for parent in parents if parent is not None),
    )
