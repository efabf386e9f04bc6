"""The `atelier` command: one verb per thing a person does. Heavy imports happen inside the verbs.

Exit codes: 0 done, 1 failed with a one-line cause on stderr, 2 bad usage, 130 stopped by Ctrl-C,
143 by SIGTERM.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from app import (
    captioning_verbs,
    dataset_verbs,
    model_verbs,
    painting_verbs,
    report_verbs,
    scoring_verbs,
)
from app.verb import Output, verb

HELP = """From LAION-shaped metadata to a text-to-image model: curate, train, paint.

\b
First steps
  atelier run recipes/demo.yaml            the whole path on this machine, in minutes
  atelier plan recipes/demo.yaml           what it would do, and why
  atelier status --watch                   follow a run from another terminal
  atelier sample "a red circle" --out red.png
  atelier edit red.png "change the circle to blue"

\b
Change a recipe without editing it
  atelier run recipes/demo.yaml --set stages.concepts.steps=500

Everything made here lies in .atelier/ beside the code; ATELIER_HOME moves it.
Every command may be stopped at any time: given again, it goes on where it was."""

app = typer.Typer(
    help=HELP,
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

RecipePath = Annotated[Path, typer.Argument(help="a YAML file of recipes/")]
Version = Annotated[str, typer.Argument(help="name/version, or a manifest.json's address")]
Json = Annotated[bool, typer.Option("--json", help="print one JSON object, no progress")]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="override a recipe key; may be repeated"),
]
Repair = Annotated[
    bool, typer.Option("--repair", help="make damaged datasets and checkpoints again")
]


def _examples(*lines: str) -> str:
    return "\b\nExamples\n" + "\n".join(f"  {line}" for line in lines)


@app.command(epilog=_examples("atelier doctor", "atelier doctor --json"))
@verb
def doctor(json_: Json = False) -> None:
    """Check this machine.

    Python, Java, the locked packages, disk, memory, ports, services, keys; a remedy for each.
    """
    from app.doctor import examine, exit_code_of

    out = Output(json_)
    checks = examine()
    for check in checks:
        out.say(check.line())
    out.result({"checks": [check.to_json() for check in checks]})
    raise typer.Exit(exit_code_of(checks))


@app.command(epilog=_examples("atelier up", "ATELIER_MLFLOW_PORT=5000 atelier up"))
@verb
def up(json_: Json = False) -> None:
    """Start the S3 server and MLflow.

    On loopback, with keys of their own; what already runs well is left alone.
    """
    from infra.config import atelier_home
    from infra.local.services import up as start_services

    out = Output(json_)
    services = start_services(atelier_home(), out.say)
    out.say(f"S3      {services.s3_endpoint}  ({services.store_uri}; keys in the services folder)")
    out.say(f"MLflow  {services.mlflow_uri}")
    out.result({"s3": services.s3_endpoint, "mlflow": services.mlflow_uri})


@app.command(epilog=_examples("atelier down"))
@verb
def down(json_: Json = False) -> None:
    """Stop the services of this home.

    And nothing else; what is stored stays.
    """
    from infra.config import atelier_home
    from infra.local.services import down as stop_services

    out = Output(json_)
    stopped = stop_services(atelier_home())
    out.say(f"stopped {' and '.join(stopped)}" if stopped else "nothing was running")
    out.result({"stopped": stopped})


@app.command(
    epilog=_examples(
        "atelier plan recipes/demo.yaml",
        "atelier plan recipes/demo.yaml --set stages.aesthetics.steps=200",
        "atelier plan recipes/meissonic.yaml --estimate     the funnels alone, in seconds",
    )
)
@verb
def plan(
    recipe: RecipePath,
    estimate: Annotated[
        bool,
        typer.Option("--estimate", help="only sample the datasets' metadata, digest nothing"),
    ] = False,
    set_: Overrides = None,
    json_: Json = False,
) -> None:
    """Say what `run` would do, and why.

    SKIP, RESUME, INIT or RUN for each step, with pinned inputs; for a dataset not yet curated the
    expected funnel, bytes, hours and cost. Starts the services, and changes nothing else.
    """
    from app.plan import estimate_datasets, plan_run, show_funnels, show_plan
    from app.recipe import load_recipe

    out = Output(json_)
    loaded = load_recipe(recipe, set_ or ())
    if estimate:
        steps = estimate_datasets(loaded, out)
        show_funnels(steps, out)
    else:
        steps = plan_run(loaded, out)
        show_plan(steps, out)
    out.result({"steps": [step.to_json() for step in steps]})


@app.command(
    epilog=_examples(
        "atelier run recipes/demo.yaml",
        "atelier run recipes/demo.yaml --set stages.concepts.steps=500",
        "atelier run recipes/demo.yaml --repair     after `verify` found damage",
    )
)
@verb
def run(
    recipe: RecipePath, set_: Overrides = None, repair: Repair = False, json_: Json = False
) -> None:
    """Do it all: curate, train every stage, paint, score.

    Finished steps are verified and skipped.
    """
    from app.recipe import load_recipe
    from app.run import run_recipe

    out = Output(json_)
    status = run_recipe(load_recipe(recipe, set_ or ()), recipe, out, repair=repair)
    out.result(status.to_json())


@app.command(
    epilog=_examples(
        "atelier curate recipes/demo.yaml",
        "atelier curate recipes/demo.yaml --dataset concepts",
        "atelier curate recipes/demo.yaml --retry-failed    timeouts, busy hosts and the like",
    )
)
@verb
def curate(
    recipe: RecipePath,
    dataset: Annotated[
        list[str] | None, typer.Option("--dataset", help="only this dataset; may be repeated")
    ] = None,
    set_: Overrides = None,
    repair: Repair = False,
    retry_failed: Annotated[
        bool, typer.Option("--retry-failed", help="fetch again what failed in passing")
    ] = False,
    json_: Json = False,
) -> None:
    """Make the recipe's datasets.

    Filter, fetch, check, caption and shard; every row is accounted for.
    """
    from app.recipe import load_recipe
    from app.run import run_recipe
    from app.selection import Selection

    out = Output(json_)
    loaded = load_recipe(recipe, set_ or ())
    selection = Selection.datasets_only(loaded, dataset or (), retry_failed=retry_failed)
    status = run_recipe(loaded, recipe, out, selection=selection, repair=repair)
    out.result(status.to_json())


@app.command(
    epilog=_examples(
        "atelier train recipes/demo.yaml",
        "atelier train recipes/demo.yaml --stage concepts     up to this stage",
    )
)
@verb
def train(
    recipe: RecipePath,
    stage: Annotated[
        str | None, typer.Option("--stage", help="the last stage to train; default: all")
    ] = None,
    set_: Overrides = None,
    repair: Repair = False,
    json_: Json = False,
) -> None:
    """Train the stages on curated datasets.

    Each starts from the one before it; a stage that is done is verified and skipped.
    """
    from app.recipe import load_recipe
    from app.run import run_recipe
    from app.selection import Selection

    out = Output(json_)
    loaded = load_recipe(recipe, set_ or ())
    selection = Selection.training_only(loaded, stage)
    status = run_recipe(loaded, recipe, out, selection=selection, repair=repair)
    out.result(status.to_json())


@app.command(epilog=_examples("atelier status", "atelier status --watch", "atelier status --json"))
@verb
def status(
    watch: Annotated[bool, typer.Option("--watch", help="follow until the run ends")] = False,
    json_: Json = False,
) -> None:
    """Show the newest run.

    Its steps with reasons, times and versions, the funnel, and the scores per stage.
    """
    from app.report import follow, status_page
    from app.status import read_latest
    from infra.config import atelier_home

    out = Output(json_)
    if watch and not json_:
        follow(atelier_home())
        return
    found = read_latest(atelier_home())
    if found is None:
        out.fail("nothing has run here yet; try `atelier run recipes/demo.yaml`")
    out.say(status_page(found))
    out.result(found.to_json())


@app.command(
    epilog=_examples(
        "atelier verify", "atelier verify s3://atelier/datasets/concepts/<version>/manifest.json"
    )
)
@verb
def verify(
    manifest: Annotated[
        str | None, typer.Argument(help="a dataset's manifest.json; default: all that is made here")
    ] = None,
    json_: Json = False,
) -> None:
    """Prove every byte of what the newest recipe made here, or of one dataset.

    Datasets and checkpoints are read and compared with their digests; one line per problem, and
    exit code 1 when there is one.
    """
    from app.verify import verify_address, verify_run

    out = Output(json_)
    problems = verify_run(out) if manifest is None else verify_address(manifest, out)
    out.result({"ok": not problems, "problems": problems})
    if problems:
        raise typer.Exit(1)


@app.command(
    epilog=_examples(
        "atelier diff concepts/3f9a12c0 concepts/77be01d2",
        "atelier diff concepts/3f9a12c0 concepts/77be01d2 --store s3://atelier",
        "atelier diff <old manifest.json> <new manifest.json> --captions --moves moves.parquet",
    )
)
@verb
def diff(
    old: Version,
    new: Version,
    captions: Annotated[
        bool, typer.Option("--captions", help="compare captions to train on: reads changed shards")
    ] = False,
    moves: Annotated[
        Path | None, typer.Option("--moves", help="write every row that ends otherwise (parquet)")
    ] = None,
    store: report_verbs.Store = None,
    json_: Json = False,
) -> None:
    """Compare two versions of a dataset.

    Samples added, removed and changed, rows that now end otherwise, and scores that moved; from
    the ledgers alone, unless captions are asked for.
    """
    from app.diff import show_diff

    out = Output(json_)
    out.result(show_diff(old, new, store, out, with_texts=captions, moves_path=moves))


painting_verbs.register(app)
scoring_verbs.register(app)
captioning_verbs.register(app)
dataset_verbs.register(app)
report_verbs.register(app)
model_verbs.register(app)


def main() -> None:
    """The entry point."""
    app()
