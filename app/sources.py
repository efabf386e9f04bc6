"""Which model paints: a stage's version that is `ready`, a folder or a hub; and what says so."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from app.place import place_of
from app.status import RunStatus, StepStatus, read_made
from app.verb import Output
from infra.config import atelier_home
from infra.digests import folder_sha256
from infra.errors import UserError

if TYPE_CHECKING:
    from training.versions import RegisteredVersion

SOFTWARE = "atelier"  # in the text chunks of every image of ours
DEFAULT_STEPS, DEFAULT_GUIDANCE, DEFAULT_TEMPERATURE = 48, 9.0, 2.0  # the paper's
# Of a model's folder: what is read of it, so that a picture beside it changes no digest.
MODEL_FILES = (
    "model_index.json",
    *(f"{part}/*" for part in ("transformer", "vqvae", "text_encoder", "tokenizer", "scheduler")),
)


@dataclass(frozen=True)
class Source:
    """A model on this machine, how it is sampled by default, and where it comes from."""

    folder: Path
    lineage: dict[str, str]
    steps: int = DEFAULT_STEPS
    guidance_scale: float = DEFAULT_GUIDANCE
    temperature: float = DEFAULT_TEMPERATURE


def find_source(stage: str | None, model: str | None, out: Output) -> Source:
    """The model meant by ``--stage`` or ``--model``, fetched and with its digests checked."""
    if stage is not None and model is not None:
        raise UserError("--stage and --model exclude each other; give one")
    if model is None:
        return _of_stage(stage, out)
    if "://" in model:
        from training.publish import fetch_checkpoint

        place_of(model)
        return Source(fetch_checkpoint(model), {"model": model})
    from model import model_folder

    folder = model_folder(model)
    if not (folder / "model_index.json").is_file():
        raise UserError(
            expected=f"a model folder with model_index.json at {folder}",
            got="a folder without it" if folder.is_dir() else "no such folder",
            remedy="give the folder of a published model, or leave --model out",
        )
    if folder == Path(model):
        digest = folder_sha256(folder, *MODEL_FILES)
        return Source(folder, {"model": str(folder.resolve()), "model_sha256": digest})
    # The hub's copy lies under the commit it came from.
    return Source(folder, {"model": f"{model.partition('@')[0]}@{folder.name}"})


def _of_stage(stage: str | None, out: Output) -> Source:
    """The version that is `ready` of a stage of the newest run, its last when none is named."""
    home = atelier_home()
    run = read_made(home)
    trained = (
        [] if run is None else [s for s in run.steps if s.kind == "stage" and s.checkpoint_uri]
    )
    if run is None or not trained:
        raise UserError("no stage is trained here yet; try `atelier run recipes/demo.yaml`")
    step = trained[-1] if stage is None else _named(stage, trained)

    from app.models import open_registry
    from training import registry
    from training.keys import model_name
    from training.publish import fetch_checkpoint

    here = open_registry(out)
    store_uri, name = here.place.store_uri, model_name(run.recipe_name, step.name)
    ready = registry.version_by_alias(here.server, name)
    uri, lineage = str(step.checkpoint_uri), lineage_of(run, step)
    made = (step.model_version or "").rpartition("/")[2]
    if ready is None:
        out.say(f"no version of {name} is ready; painting with version {made}, the newest run's")
    else:
        registry.check_place(store_uri, ready)
        other = ""
        if ready.sha256 != step.checkpoint_sha256:
            uri, lineage = ready.uri, _lineage_of_version(ready, run.recipe_name, store_uri)
            other = f"; the newest run has version {made}"
        out.say(f"painting with version {ready.version} of {name}, which is ready{other}")
        lineage["version"] = f"{name}/{ready.version}"
    recipe = json.loads((home / "runs" / run.run_id / "recipe.json").read_text(encoding="utf-8"))
    how = recipe.get("evaluation") or {}
    return Source(
        fetch_checkpoint(uri),
        lineage,
        how.get("steps", DEFAULT_STEPS),
        how.get("guidance_scale", DEFAULT_GUIDANCE),
        how.get("temperature", DEFAULT_TEMPERATURE),
    )


def _named(stage: str, trained: list[StepStatus]) -> StepStatus:
    from app.recipe_problems import did_you_mean

    for step in trained:
        if step.name == stage:
            return step
    hint = did_you_mean(stage, [step.name for step in trained])
    raise UserError(f"no trained stage {stage!r} in this recipe's runs; {hint}")


def lineage_of(run: RunStatus, step: StepStatus) -> dict[str, str]:
    """What an image of ``step`` carries: the run, the checkpoint, and what it was made from."""
    stages = [s for s in run.steps if s.checkpoint_sha256]
    until = stages[: stages.index(step) + 1] if step in stages else [step]
    datasets = {s.label: str(s.dataset_version) for s in run.steps if s.kind == "dataset"}
    return {
        "software": SOFTWARE,
        "recipe": run.recipe_name,
        "recipe_fingerprint": run.recipe_fingerprint,
        "run": run.run_id,
        "stage": step.name,
        "checkpoint": str(step.checkpoint_uri),
        "checkpoints": json.dumps({s.name: s.checkpoint_sha256 for s in until}),
        "datasets": json.dumps(datasets),
    }


def _lineage_of_version(
    version: RegisteredVersion, recipe_name: str, store_uri: str
) -> dict[str, str]:
    """What an image of a version carries that the newest run did not make, from its provenance."""
    from training.lineage import trace

    stages = trace(version.uri, store_uri).stages[::-1]
    read = [link for stage in stages for link in (stage.dataset, *stage.mixed_in) if link]
    return {
        "software": SOFTWARE,
        "recipe": recipe_name,
        "stage": stages[-1].stage,
        "checkpoint": version.uri,
        "checkpoints": json.dumps({stage.stage: stage.sha256 for stage in stages}),
        "datasets": json.dumps({link.name: link.version for link in read}),
    }
