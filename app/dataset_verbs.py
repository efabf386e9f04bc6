"""Verbs about published datasets: `takedown`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from app.verb import Output, verb

Json = Annotated[bool, typer.Option("--json", help="print one JSON object, no progress")]

TAKEDOWN_EXAMPLES = """\b
Examples
  atelier takedown --url https://a.example/me.jpg --dry-run
  atelier takedown --domain a.example --url https://b.example/2.jpg
  atelier takedown --file requests.txt        one address a line; or domain:…, sha256:…, sample:…
  atelier takedown --sha256 9f86d0… --dataset laion-256
  atelier takedown --like portrait.jpg --min-similarity 0.9 --dry-run"""


def register(app: typer.Typer) -> None:
    """Add the verbs to the command."""
    app.command(epilog=TAKEDOWN_EXAMPLES)(takedown)


@verb
def takedown(
    url: Annotated[
        list[str] | None, typer.Option("--url", help="an image's address; may be repeated")
    ] = None,
    domain: Annotated[
        list[str] | None, typer.Option("--domain", help="a host and all below it; may be repeated")
    ] = None,
    sha256: Annotated[
        list[str] | None,
        typer.Option("--sha256", help="of an image's bytes as fetched; may be repeated"),
    ] = None,
    sample: Annotated[
        list[str] | None, typer.Option("--sample", help="a sample id; may be repeated")
    ] = None,
    like: Annotated[
        list[str] | None,
        typer.Option("--like", help="an image file or a sample id: what looks like it, by CLIP"),
    ] = None,
    min_similarity: Annotated[
        float,
        typer.Option("--min-similarity", min=0.0, max=1.0, help="cosine from which --like holds"),
    ] = 0.95,
    file: Annotated[
        Path | None, typer.Option("--file", help="such requests, one a line; # begins a comment")
    ] = None,
    dataset: Annotated[
        list[str] | None,
        typer.Option("--dataset", help="only in this one; default: in all, later ones too"),
    ] = None,
    store: Annotated[
        str | None,
        typer.Option("--store", help="s3:// or file:// address; default: the newest run's store"),
    ] = None,
    keep_copies: Annotated[
        bool,
        typer.Option("--keep-copies", help="leave the same bytes where other addresses have them"),
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="say what would go, change nothing")
    ] = False,
    json_: Json = False,
) -> None:
    """Remove images from every version, and keep them out.

    Affected shards are written again, old versions give way to new ones, and what no version lists
    any more is deleted: shards, embeddings, scores, tokens. Digests stay, of the addresses and of
    the bytes, so that no later curation of any dataset in the store brings it back, from wherever;
    with --dataset they hold for these datasets alone. Samples that only look like it are named, and
    so are models that were trained on it; neither are changed.
    """
    from app.takedown import Request, take_down_everywhere

    out = Output(json_)
    request = Request.of(
        url or (), domain or (), sha256 or (), sample or (), file, like or (), min_similarity
    )
    done = take_down_everywhere(
        request, dataset or (), store, out, dry_run=dry_run, keep_copies=keep_copies
    )
    out.result(done)
