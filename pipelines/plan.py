"""What a curation would do and why, found out without starting Spark."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from infra import storage
from infra.config import semantic_part
from infra.digests import canonical_json, code_digest, sha256_bytes
from infra.errors import UserError
from infra.manifest import (
    MANIFEST_NAME,
    DatasetManifest,
    FileEntry,
    ShardEntry,
    listed_files,
    load_manifest,
    verify_dataset,
)
from pipelines.build import Build, PartMarker, ReadMarker, StagedMarker
from pipelines.caption_tokens import tokenizer_part
from pipelines.clip_model import as_uri
from pipelines.config import CurationConfig
from pipelines.decontaminate import decontamination_part
from pipelines.image_checks import checks_part
from pipelines.inputs import READ_AGAIN_BYTES, InputFile, Unit, find_inputs, tars_of, units_of
from pipelines.references import references_part
from pipelines.tombstones import Tombstones, load_tombstones, read_block_lists
from pipelines.workspace import noted_version

ROWS_PER_PARTITION = 5_000
MIN_PARTITIONS = 8
MAX_PARTITIONS = 10_000
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")


@dataclass(frozen=True)
class CurationPlan:
    """SKIP: a verified version is there. RESUME: some work is. RUN: none is.

    ``units`` are read, ``partitions`` fetched and ``parts`` written by a run. ``retried``: the
    version that a retry goes on from, when one is under way.
    """

    decision: Literal["SKIP", "RESUME", "RUN"]
    reason: str
    build: Build
    inputs: tuple[InputFile, ...]
    units: tuple[Unit, ...]
    partitions: tuple[int, ...]
    parts: tuple[int, ...]
    version: str | None = None
    retried: str | None = None

    @property
    def build_key(self) -> str:
        """sha256 over the semantic recipe, the inputs' digests and this package's code."""
        return self.build.key

    @property
    def rows_in(self) -> int:
        return sum(file.num_rows for file in self.inputs if file.kind == "metadata")

    @property
    def input_bytes(self) -> int:
        return sum(file.num_bytes for file in self.inputs)

    @property
    def manifest_uri(self) -> str | None:
        """The address of the version that is there, if one is."""
        if self.version is None:
            return None
        return storage.join(self.build.dataset_root, self.version, "manifest.json")


def plan_curation(name: str, config: CurationConfig, store_uri: str) -> CurationPlan:
    """Look at the inputs and at what is stored, and decide.

    Reads every input and, when a version is there, every stored byte, unless they were read before
    and not written since: a version whose files are damaged is no reason to skip. Raises
    ``UserError`` for inputs that cannot be curated.
    """
    if not _NAME.fullmatch(name):
        raise UserError(
            expected="a dataset name of a-z, 0-9, '.', '_' and '-', at most 64 long", got=repr(name)
        )
    root = storage.join(store_uri, "datasets", name)
    inputs = find_inputs(config, storage.join(root, "work", "inputs"))
    build = _build(name, config, store_uri, inputs)
    version = noted_version(build.result_uri)
    problems: list[str] = []
    if version is not None:
        problems = verify_unless_unchanged(build.dataset_root, version)
        if not problems and build.open_round() is not None:
            return replace(_unfinished(build, inputs, []), retried=version)
        if not problems:
            return CurationPlan(
                "SKIP",
                f"version {version[:12]} is there and verified",
                build,
                tuple(inputs),
                (),
                (),
                (),
                version,
            )
    return _unfinished(build, inputs, problems, version)


def plan_again(plan: CurationPlan) -> CurationPlan:
    """What is left to do of a plan for inputs that have not changed since; nothing is verified."""
    return replace(_unfinished(plan.build, list(plan.inputs), []), retried=plan.retried)


def follows(build: Build, manifest: DatasetManifest, units: Sequence[Unit]) -> bool:
    """Whether the build's markers, before the retry under way if one is, come to ``manifest``."""
    round = build.open_round()
    reads = build.read_all(ReadMarker, len(units))
    staged = build.read_all(StagedMarker, build.num_partitions)
    parts = build.read_all(PartMarker, build.num_partitions)
    if len(staged) < build.num_partitions or not metadata_units(units) <= reads.keys():
        return False
    before = [
        each.carried if round is not None and each.round == round else parts.get(index)
        for index, each in sorted(staged.items())
    ]
    shards = [entry for part in before if part is not None for entry in part.shards]
    files = [marker.ledger for marker in (*reads.values(), *before) if marker is not None]
    ledger = {entry.path for entry in files if entry is not None}
    return (
        None not in before
        and shards == manifest.shards
        and ledger == {entry.path for entry in manifest.ledger}
    )


def metadata_units(units: Sequence[Unit]) -> set[int]:
    """The numbers of the units that have rows of their own, and so a marker."""
    return {unit.index for unit in units if unit.file.kind == "metadata"}


def refuse_changed_inputs(plan: CurationPlan) -> None:
    """``UserError`` when an input is not what it was when the build was planned: rows of two states
    would be mixed in it. Reads again what ``plan_curation`` would."""
    planned = {file.uri: file.sha256 for file in plan.inputs}
    notes = storage.join(plan.build.dataset_root, "work", "inputs")
    found = {file.uri: file.sha256 for file in find_inputs(plan.build.config, notes)}
    changed = sorted(uri for uri in planned | found if planned.get(uri) != found.get(uri))
    if changed:
        raise UserError(
            expected=f"{changed[0]} as it was when the build began",
            got="another file" if changed[0] in planned and changed[0] in found else "a change",
            remedy="put it back, or run the same command again: it begins a build of its own",
        )


def refuse_new_tombstones(build: Build) -> None:
    """``UserError`` when something was taken down since the build was planned. To be asked by who
    has the build's lease: of a takedown and a curation that begin together, one notices."""
    if build.key != build_key(build.base_key, load_tombstones(build.dataset_root)):
        raise UserError(
            expected=f"nothing to be taken down while {build.dataset_root} was planned",
            got="a takedown",
            remedy="run the same command again",
        )


def verify_unless_unchanged(dataset_root: str, version: str) -> list[str]:
    """A version's problems. Of a large one, files found right before are read again only when they
    were written since: else its plan would take hours. ``atelier verify`` reads all of any.
    """
    uri = storage.join(dataset_root, version, "manifest.json")
    try:
        manifest = load_manifest(uri)
    except (storage.ObjectMissing, storage.DigestMismatch) as error:
        return [str(error)]
    num_bytes = sum(shard.num_bytes for shard in manifest.shards)
    if num_bytes < READ_AGAIN_BYTES:
        return verify_dataset(uri)
    note = storage.join(dataset_root, "work", "verified", f"{version}.json")
    return verify_dataset(uri, memory_uri=note)


def companion_build(name: str, config: CurationConfig, store_uri: str, plan: CurationPlan) -> Build:
    """The build that ``plan_curation`` would find for another dataset of the same inputs."""
    return _build(name, config, store_uri, list(plan.inputs))


def _build(
    name: str,
    config: CurationConfig,
    store_uri: str,
    inputs: list[InputFile],
) -> Build:
    rows_in = sum(file.num_rows for file in inputs if file.kind == "metadata")
    if rows_in == 0:
        raise UserError(f"the metadata of {name} holds no rows; check `metadata` in the recipe")
    identity = {
        "recipe": semantic_part(config),
        "inputs": [file.identity() for file in inputs],
        "code": code_digest("pipelines"),
        **tokenizer_part(config),
        **decontamination_part(config.decontaminate),
        **references_part(config.duplicates, config.decontaminate),
        **checks_part(config.image_checks),
    }
    blocked = read_block_lists(map(as_uri, config.block))
    if blocked:
        identity["block"] = blocked.digest
    base_key = sha256_bytes(canonical_json(identity))
    dataset_root = storage.join(store_uri, "datasets", name)
    tombstones = load_tombstones(dataset_root)
    automatic = math.ceil(rows_in / ROWS_PER_PARTITION)
    automatic = min(max(automatic, MIN_PARTITIONS), MAX_PARTITIONS)
    return Build(
        dataset_root=dataset_root,
        key=build_key(base_key, tombstones),
        config=config,
        num_partitions=config.partitions or automatic,
        base_key=base_key,
        tars=tars_of(inputs),
        tombstones=tombstones | blocked,
    )


def build_key(base_key: str, tombstones: Tombstones) -> str:
    """The key of a build that leaves out what was taken down."""
    if not tombstones:
        return base_key
    return sha256_bytes(canonical_json({"build": base_key, "tombstones": tombstones.digest}))


def _listed(build: Build, version: str) -> set[str] | None:
    """The files that a version lists; None when its manifest is not whole."""
    try:
        manifest = load_manifest(storage.join(build.dataset_root, version, MANIFEST_NAME))
    except (storage.ObjectMissing, storage.DigestMismatch):
        return None
    return {entry.path for entry in listed_files(manifest)}


def _unfinished(
    build: Build, inputs: list[InputFile], problems: list[str], version: str | None = None
) -> CurationPlan:
    """Which units, partitions and parts lack a marker with all its files in full size.

    Of a finished ``version`` with ``problems``, what it does not list does not count: nobody has
    looked into it. After a repair, markers name what was damaged before.
    """
    units = units_of(inputs)
    folders = [
        storage.join(build.dataset_root, "shards"),
        storage.join(build.dataset_root, "ledger"),
        build.folder,
    ]
    prefix = build.dataset_root.rstrip("/") + "/"
    sizes = {
        info.uri.removeprefix(prefix): info.num_bytes
        for folder in folders
        for info in storage.list_objects(folder)
    }
    listed = _listed(build, version) if version is not None else None
    if listed is not None:
        sizes = {
            path: size
            for path, size in sizes.items()
            if path in listed or not path.startswith(("shards/", "ledger/"))
        }
    for problem in problems:  # verify_dataset's lines begin with the file's path
        sizes.pop(problem.partition(":")[0], None)

    def is_whole(entry: FileEntry | ShardEntry | None) -> bool:
        return entry is None or sizes.get(entry.path) == entry.num_bytes

    reads = {
        index: marker
        for index, marker in build.read_all(ReadMarker, len(units)).items()
        if is_whole(marker.ledger)
    }
    staged = build.read_all(StagedMarker, build.num_partitions)
    parts = {
        index
        for index, marker in build.read_all(PartMarker, build.num_partitions).items()
        if all(map(is_whole, [*marker.shards, marker.ledger]))
        and index in staged
        and is_whole(staged[index].rows)
        and staged[index].round == marker.round
    }
    fetched = {
        index
        for index, marker in staged.items()
        if is_whole(marker.rows)
        and (index in parts or is_whole(marker.images))
        and all(map(is_whole, marker.carried_files))
    }
    every = range(build.num_partitions)
    to_fetch = tuple(index for index in every if index not in fetched)
    to_read = [
        unit
        for unit in units
        if to_fetch or (unit.file.kind == "metadata" and unit.index not in reads)
    ]
    if problems:
        reason = f"{len(problems)} stored files are damaged, first: {problems[0]}"
    elif fetched or parts:
        reason = f"{len(fetched)} of {len(every)} partitions are fetched, {len(parts)} written"
    else:
        reason = "these inputs, this recipe and this code have not been curated yet"
    return CurationPlan(
        decision="RESUME" if fetched or parts or problems else "RUN",
        reason=reason,
        build=build,
        inputs=tuple(inputs),
        units=tuple(to_read),
        partitions=to_fetch,
        parts=tuple(index for index in every if index not in parts),
    )
