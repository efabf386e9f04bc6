"""`promote`, `rollback` and `lineage`: the registry's versions, and where they come from."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from app.place import Place, place_of
from app.status import RunStatus, StepStatus, read_made
from app.verb import Output
from infra.config import atelier_home
from infra.errors import UserError
from infra.tracking_server import TrackingServer

if TYPE_CHECKING:
    from training.lineage import DatasetLink, Lineage, StageLink
    from training.versions import RegisteredVersion

SHORT = 12
SHOWN_FILES = 3


@dataclass(frozen=True)
class Registry:
    """A store with its MLflow server, and the newest run here."""

    place: Place
    run: RunStatus | None

    @property
    def server(self) -> TrackingServer:
        """MLflow."""
        return self.place.server

    @property
    def steps(self) -> list[StepStatus]:
        """The newest run's; none before the first."""
        return [] if self.run is None else self.run.steps

    def model_name(self, name: str) -> str:
        """A registered model by its name, or by its stage in the newest recipe."""
        if self.run is not None and any(step.name == name for step in self.run.steps):
            return f"{self.run.recipe_name}-{name}"
        return name


def open_registry(out: Output, address: str | None = None) -> Registry:
    """Connect to where a checkpoint lies; without ``address``, to the newest run's."""
    return Registry(place_of(address, out.say), read_made(atelier_home()))


# --- promote and rollback ------------------------------------------------------------------------


def show_versions(model: str, out: Output) -> dict[str, Any]:
    """A model's versions and the moves of its aliases, oldest first."""
    from training import registry, versions

    here = open_registry(out)
    name = here.model_name(model)
    found = versions.all_versions(here.server, name)
    if not found:
        raise _unknown_model(here, name)
    ready = registry.version_by_alias(here.server, name)
    moves = registry.history(here.place.store_uri, _stage_of(found[-1]), name)
    for version in found:
        mark = "ready" if ready is not None and version.version == ready.version else ""
        gate = version.tags.get(versions.TAG_GATE, "not gated")
        out.say(f"version {version.version:<4} {version.sha256[:SHORT]}  {gate:<8} {mark}")
    for move in moves:
        before = "nothing" if move.old is None else f"version {move.old}"
        what = f"{move.alias}: {before} -> version {move.new}"
        out.say(f"{move.at}  {move.kind:<8}  {what:<40}  {move.who}: {move.why}")
    return {
        "model": name,
        "ready": None if ready is None else ready.version,
        "versions": [asdict(version) for version in found],
        "history": [asdict(move) for move in moves],
    }


def promote_version(model: str, number: int, why: str, out: Output) -> dict[str, Any]:
    """Make a version `ready` by hand, its files verified first."""
    from training import registry, versions

    here = open_registry(out)
    name = here.model_name(model)
    if not versions.all_versions(here.server, name):
        raise _unknown_model(here, name)
    version = versions.get_version(here.server, name, number)
    move = registry.promote_verified(here.server, here.place.store_uri, version, why=why)
    out.say(
        f"{name}: version {number} is ready already"
        if move is None
        else f"{name}: version {number} is ready, before it was {move.old or 'none'}"
    )
    stage, key = version.tags.get(versions.TAG_STAGE), version.tags.get(versions.TAG_STAGE_KEY)
    made = next((s for s in here.steps if s.name == stage and s.model_version), None)
    if made is not None and str(made.model_version).startswith(f"{name}/") and made.key != key:
        number_made = str(made.model_version).rpartition("/")[2]
        out.say(
            f"`sample` and `edit` paint with it; the newest run's recipe has the key of version "
            f"{number_made}, and `plan`, `run` and `train` go on from that one: to go on from "
            f"version {number}, give the recipe that made it"
        )
    return {"model": name, "ready": number, "move": None if move is None else asdict(move)}


def roll_back(model: str, why: str, out: Output) -> dict[str, Any]:
    """Make the version ready that was ready before."""
    from training import registry, versions

    here = open_registry(out)
    name = here.model_name(model)
    found = versions.all_versions(here.server, name)
    if not found:
        raise _unknown_model(here, name)
    stage = _stage_of(found[-1])
    move = registry.rollback(here.server, here.place.store_uri, name, stage, why=why)
    out.say(
        f"{name}: back from version {move.old} to version {move.new}; `plan`, `run` and `train` "
        f"refuse version {move.old} until it is promoted, and nothing starts from it"
    )
    return {"model": name, "ready": move.new, "move": asdict(move)}


def _stage_of(version: RegisteredVersion) -> str:
    from training.versions import TAG_STAGE

    return version.tags.get(TAG_STAGE, "")


def _unknown_model(here: Registry, name: str) -> UserError:
    trained = [s.name for s in here.steps if s.model_version]
    return UserError(
        expected="a registered model, or a stage of the newest recipe",
        got=repr(name),
        remedy=f"trained here: {', '.join(trained) or 'nothing yet'}",
    )


# --- lineage -------------------------------------------------------------------------------------


def show_lineage(target: str | None, verify: bool, out: Output) -> dict[str, Any]:
    """Where an image, a checkpoint or a model version comes from; problems are said and kept."""
    from training.lineage import trace

    here = open_registry(out, target if target is not None and "://" in target else None)
    uri, image = _checkpoint_of(target, here)
    for name, value in image.items():
        out.say(f"{name:<20} {value}")
    found = trace(uri, here.place.store_uri, verify=verify)
    if image and image.get("checkpoints"):
        found.problems += _image_problems(image, found)
    for depth, stage in enumerate(found.stages):
        for line in _stage_lines(stage):
            out.say(f"{'  ' * depth}{line}")
    for problem in found.problems:
        out.say(f"problem: {problem}")
    return {"image": image, **found.to_json()}


def _checkpoint_of(target: str | None, here: Registry) -> tuple[str, dict[str, str]]:
    """The address of the checkpoint meant, and what an image says of itself."""
    from training import registry, versions

    if target is None:
        trained = [s for s in here.steps if s.checkpoint_uri]
        if not trained:
            raise UserError("no stage is trained here yet; try `atelier run recipes/demo.yaml`")
        return str(trained[-1].checkpoint_uri), {}
    if target.lower().endswith(".png"):
        image = _image_facts(Path(target))
        return image["checkpoint"], image
    if "://" in target:
        return target, {}
    model, _, number = target.partition("/")
    name = here.model_name(model)
    if number:
        if not number.isdigit():
            raise UserError(expected="MODEL/VERSION with a number", got=repr(target))
        return versions.get_version(here.server, name, int(number)).uri, {}
    ready = registry.version_by_alias(here.server, name)
    if ready is None:
        raise _unknown_model(here, name)
    return ready.uri, {}


def _image_facts(path: Path) -> dict[str, str]:
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as image:
            facts = {str(key): str(value) for key, value in image.info.items()}
    except FileNotFoundError:
        raise UserError(expected="an image file", got=f"nothing at {path}") from None
    except (UnidentifiedImageError, OSError) as error:
        raise UserError(f"{path} does not read as an image: {error}") from error
    if "checkpoint" not in facts:
        raise UserError(
            expected=f"an image painted by a trained stage at {path}",
            got="one without a checkpoint in its text chunks",
            remedy="paint with `atelier sample`, or name the checkpoint itself",
        )
    return facts


def _image_problems(image: dict[str, str], found: Lineage) -> list[str]:
    """What the image says of its stages against what the store says."""
    try:
        said = dict(json.loads(image["checkpoints"]))
    except ValueError:
        return ["the image's list of checkpoints does not read"]
    return [
        f"the image names {said[stage.stage]} as stage {stage.stage}; the store has {stage.sha256}"
        for stage in found.stages
        if stage.stage in said and said[stage.stage] != stage.sha256
    ]


def _stage_lines(stage: StageLink) -> list[str]:
    lines = [f"{stage.stage}  {stage.sha256[:SHORT]}  step {stage.step}  {stage.uri}"]
    init = stage.init
    if init:
        new = list(init.get("new_keys") or ())
        began = f"  began {init.get('source', '?')}"
        if init.get("num_inherited"):
            began += f": {init.get('num_inherited', 0)} parameters inherited, {len(new)} new"
        lines.append(f"{began}{' (' + ', '.join(new[:SHOWN_FILES]) + ')' if new else ''}")
    for part in stage.parts:
        lines.append(f"  published {part.get('address')}  {str(part.get('sha256'))[:SHORT]}")
    for start in stage.starts:
        lines.append(f"  attempt {start.get('attempt')}: {start.get('how')}")
    lines.append(f"  key {stage.stage_key[:SHORT]}  MLflow run {stage.mlflow_run_id}")
    for dataset in (stage.dataset, *stage.mixed_in):
        if dataset is not None:
            lines += _dataset_lines(dataset)
    return lines


def _dataset_lines(dataset: DatasetLink, indent: str = "  ") -> list[str]:
    counts = f"{dataset.num_samples} samples of {dataset.rows_in} rows"
    lines = [f"{indent}dataset {dataset.name}  {dataset.version[:SHORT]}  {counts}"]
    for file in dataset.files[:SHOWN_FILES]:
        lines.append(f"{indent}  " + "  ".join(f"{key} {value}" for key, value in file.items()))
    if len(dataset.files) > SHOWN_FILES:
        lines.append(f"{indent}  and {len(dataset.files) - SHOWN_FILES} more files")
    for parent in dataset.parents:
        lines += _dataset_lines(parent, indent + "  ")
    return lines
