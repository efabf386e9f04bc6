"""Verbs that look after what is stored: `report`."""

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


def register(app: typer.Typer) -> None:
    """Add the verbs to the command."""
    app.command(epilog=REPORT_EXAMPLES)(report)


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
