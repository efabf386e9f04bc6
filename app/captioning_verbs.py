"""`caption`: long synthetic captions for the images of curated datasets."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from app.scoring_verbs import Datasets, Json, Overrides
from app.verb import Output, verb

EXAMPLES = """\b
Examples
  atelier caption recipes/laion.yaml --limit 8          ask for a few, and show them
  atelier caption recipes/laion.yaml --dataset laion-512
  atelier caption recipes/laion.yaml --retry-failed     ask again what got no answer

\b
In the recipe, a server that speaks OpenAI's chat completions (vLLM, a provider)
  captioning:
    endpoint: {url: "http://gpu-1:8000/v1", model: llava-1.6-34b, api_key_env: CAPTION_KEY}

\b
or a model on this machine, as transformers saves it
  captioning:
    local: {folder: models/blip-large}
    take: {min_words: 8}"""


def register(app: typer.Typer) -> None:
    """Add the verb to the command."""
    app.command(epilog=EXAMPLES)(caption)


@verb
def caption(
    recipe: Annotated[Path, typer.Argument(help="a YAML file with a section `captioning`")],
    dataset: Datasets = None,
    limit: Annotated[
        int | None,
        typer.Option("--limit", min=1, max=10_000, help="ask for so many, show them, publish none"),
    ] = None,
    retry_failed: Annotated[
        bool, typer.Option("--retry-failed", help="ask again where the cause may have passed")
    ] = False,
    set_: Overrides = None,
    json_: Json = False,
) -> None:
    """Publish a new version with long captions.

    Each image is asked for once, by a server or a local model; refusals, loops, echoes and answers
    that are too short are not taken, and counted. Given again, the command goes on where it was.
    """
    from app.captioning import caption_datasets
    from app.recipe import load_recipe

    out = Output(json_)
    loaded = load_recipe(recipe, set_ or ())
    found = caption_datasets(loaded, dataset or (), out, limit=limit, retry_failed=retry_failed)
    out.result({"datasets": found})
