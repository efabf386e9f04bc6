"""`promote`, `rollback` and `lineage`: which version of a stage is ready, and what made it."""

from __future__ import annotations

from typing import Annotated

import typer

from app.verb import FAILED, Output, verb

Json = Annotated[bool, typer.Option("--json", help="print one JSON object, no progress")]
Model = Annotated[str, typer.Argument(help="a stage of the newest recipe, or a registered model")]
Why = Annotated[str, typer.Option("--why", help="a reason, kept in the history")]

PROMOTE_EXAMPLES = """\b
Examples
  atelier promote concepts                    its versions, and every move of its aliases
  atelier promote concepts 2 --why "better hands\""""

ROLLBACK_EXAMPLES = """\b
Examples
  atelier rollback concepts
  atelier rollback concepts --why "blurred backgrounds\""""

LINEAGE_EXAMPLES = """\b
Examples
  atelier lineage                             the newest run's last stage
  atelier lineage fox.png                     an image that `sample` painted
  atelier lineage concepts/2 --verify         a version, with every byte of its checkpoints
  atelier lineage s3://atelier/models/concepts/<sha> --json"""


def register(app: typer.Typer) -> None:
    """Add the verbs to the command."""
    app.command(epilog=PROMOTE_EXAMPLES)(promote)
    app.command(epilog=ROLLBACK_EXAMPLES)(rollback)
    app.command(epilog=LINEAGE_EXAMPLES)(lineage)


@verb
def promote(
    model: Model,
    version: Annotated[
        int | None, typer.Argument(min=1, help="its number; without one, what there is")
    ] = None,
    why: Why = "promoted by hand",
    json_: Json = False,
) -> None:
    """Make a version of a stage the one that is `ready`.

    It must have passed its gate, and its files are verified first. Every move is kept in a history,
    and of two who move an alias at once one wins and the other is told.
    """
    from app.models import promote_version, show_versions

    out = Output(json_)
    out.result(
        show_versions(model, out) if version is None else promote_version(model, version, why, out)
    )


@verb
def rollback(model: Model, why: Why = "rollback", json_: Json = False) -> None:
    """Make the version `ready` that was ready before.

    Given twice it goes back twice. The files of the earlier version are verified first.
    """
    from app.models import roll_back

    out = Output(json_)
    out.result(roll_back(model, why, out))


@verb
def lineage(
    target: Annotated[
        str | None,
        typer.Argument(help="a PNG, a checkpoint's address, MODEL or MODEL/VERSION"),
    ] = None,
    verify: Annotated[
        bool, typer.Option("--verify", help="read every byte of every checkpoint")
    ] = False,
    json_: Json = False,
) -> None:
    """Walk back from an image or a checkpoint to everything it was made of.

    Each stage with its step, what its weights began with and how often it began, its dataset, and
    the metadata files behind it. Digests are compared on the way; exit code 1 when one differs.
    """
    from app.models import show_lineage

    out = Output(json_)
    found = show_lineage(target, verify, out)
    out.result(found)
    if found["problems"]:
        raise typer.Exit(FAILED)
