"""`atelier verify`: read everything a run made, or one dataset, and compare it with its digests."""

from __future__ import annotations

from app.place import place_of
from app.status import read_made
from app.verb import Output
from infra.config import atelier_home
from infra.errors import UserError


def verify_address(manifest_uri: str, out: Output) -> list[str]:
    """The problems of one dataset version; files that no version lists are said, and no problem."""
    from infra.manifest import dataset_root, verify_dataset
    from infra.manifest_verify import unlisted_files
    from infra.progress import progress

    root = dataset_root(manifest_uri)
    place_of(manifest_uri, out.say)
    with progress("reading", None, "MB") as bar:
        problems = verify_dataset(manifest_uri, bar)
    for problem in problems:
        out.say(problem)
    for path in unlisted_files(root):
        out.say(f"{path}: extra; no version lists it, and no reader looks at it")
    out.say("damaged" if problems else "ok")
    return problems


def verify_run(out: Output) -> list[str]:
    """The problems found, one line each; empty when every byte is right."""
    run = read_made(atelier_home())
    made = [] if run is None else [step for step in run.steps if step.is_made]
    if run is None or not made:
        raise UserError("there is nothing to verify yet; try `atelier run recipes/demo.yaml`")

    from infra.manifest import verify_dataset
    from infra.progress import progress
    from infra.storage import ObjectMissing
    from training.publish import verify_checkpoint

    place_of(None, out.say)
    problems = []
    for step in made:
        try:
            if step.manifest_uri is not None:
                what = f"dataset {step.label} {str(step.dataset_version)[:12]}"
                with progress(f"reading {step.label}", None, "MB") as bar:
                    found = verify_dataset(step.manifest_uri, bar)
            else:
                what = f"stage {step.name} {str(step.checkpoint_sha256)[:12]}"
                found = verify_checkpoint(str(step.checkpoint_uri))
        except ObjectMissing as error:
            found = [str(error)]
        out.say(f"{'damaged' if found else 'ok     '}  {what}")
        for problem in found:
            out.say(f"         {problem}")
        problems += [f"{what}: {problem}" for problem in found]
    if problems:
        out.say(f"to make what is damaged again: atelier run {run.recipe_path} --repair")
    return problems
