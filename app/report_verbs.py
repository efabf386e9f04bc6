"""Verbs that look after what is stored: `report`, `repair` and `clean`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from app.verb import Output, verb

Json = Annotated[bool, typer.Option("--json", help="print one JSON object, no progress")]
Dataset = Annotated[
    str, typer.Argument(help="a dataset's name (its newest version), name/version or manifest.json")
]
Store = Annotated[
    str | None,
    typer.Option("--store", help="s3:// or file:// address; default: the newest run's store"),
]

REPORT_EXAMPLES = """\b
Examples
  atelier report concepts                     the newest version's page, made again beside it
  atelier report concepts/3f9a12c0 --output page.html
  atelier report s3://atelier/datasets/concepts/<version>/manifest.json --card"""


REPAIR_EXAMPLES = """\b
Examples
  atelier repair concepts                     after `atelier verify` found damage
  atelier repair s3://atelier/datasets/concepts/<version>/manifest.json"""

CLEAN_EXAMPLES = """\b
Examples
  atelier clean                     what is stored, for whom, and what nobody needs: nothing goes
  atelier clean --gc                remove what nobody needs
  atelier clean concepts --gc --work --versions"""


def register(app: typer.Typer) -> None:
    """Add the verbs to the command."""
    app.command(epilog=REPORT_EXAMPLES)(report)
    app.command(epilog=REPAIR_EXAMPLES)(repair)
    app.command(epilog=CLEAN_EXAMPLES)(clean)


@verb
def report(
    dataset: Dataset,
    output: Annotated[
        Path | None, typer.Option("--output", help="write the page to this file, and only there")
    ] = None,
    card: Annotated[bool, typer.Option("--card", help="print the dataset card, too")] = False,
    store: Store = None,
    json_: Json = False,
) -> None:
    """Make a version's page and card again.

    One self-contained file: where every row went and why, what links failed of, histograms of all
    rows and of those that stayed, hosts, languages, and pictures. It counts what was not counted
    before, and changes nothing else.
    """
    from app.upkeep import make_report

    out = Output(json_)
    out.result(make_report(dataset, store, output, out, with_card=card))


@verb
def repair(dataset: Dataset, store: Store = None, json_: Json = False) -> None:
    """Make a damaged version whole again.

    Every byte is read. A damaged shard is put together from what is left of it, other versions, the
    build's working files and, as far as needed, the web; it is put back when its digest is the
    listed one. Else a new version is published without the samples that were lost, and names them.
    """
    from app.upkeep import repair_version

    out = Output(json_)
    out.result(repair_version(dataset, store, out))


@verb
def clean(
    dataset: Annotated[
        list[str] | None, typer.Argument(help="only these datasets; default: all")
    ] = None,
    gc: Annotated[bool, typer.Option("--gc", help="remove what may go; else nothing is")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="say what would go, whatever else is given")
    ] = False,
    work: Annotated[
        bool,
        typer.Option("--work", help="working files may go: a retry then reads the inputs"),
    ] = False,
    versions: Annotated[
        bool,
        typer.Option("--versions", help="versions may go that no model, run or version refers to"),
    ] = False,
    store: Store = None,
    json_: Json = False,
) -> None:
    """Say what is stored for whom, and remove what nobody needs.

    What no version lists and no build under way relies on: parts of killed attempts, shards of
    builds that were given up, embeddings of shards that are gone. A dataset on which a driver is at
    work is left alone, and named.
    """
    from app.cleaning import clean_datasets

    out = Output(json_)
    removes = gc and not dry_run
    out.result(
        clean_datasets(
            dataset or (), store, out, removes=removes, with_work=work, with_versions=versions
        )
    )
