"""`score`, `refilter` and `search`: what is done with a curated dataset by its images' content."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from app.verb import Output, verb

Json = Annotated[bool, typer.Option("--json", help="print one JSON object, no progress")]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="override a recipe key; may be repeated"),
]
RecipePath = Annotated[Path, typer.Argument(help="a YAML file with a section `scoring`")]
Datasets = Annotated[
    list[str] | None, typer.Option("--dataset", help="only this dataset; may be repeated")
]

SCORE_EXAMPLES = """\b
Examples
  atelier score recipes/laion.yaml
  atelier score recipes/laion.yaml --dataset laion-512 --set scoring.clip.precision=bf16

\b
In the recipe
  scoring:
    clip: {folder: models/ViT-L-14}      # open_clip_config.json and one .safetensors file
    heads:
      aesthetic: {layout: laion_aesthetic_v2, weights: models/aesthetic-v2.safetensors}
      unsafe: {layout: laion_unsafe_l14, weights: models/unsafe-l14.safetensors}"""

REFILTER_EXAMPLES = """\b
Examples
  atelier refilter recipes/laion.yaml --dry-run        how many would stay, and why not
  atelier refilter recipes/laion.yaml --name best --set derived.best.keep.min_aesthetic_score=6

\b
In the recipe, where stages name a derived dataset like any other
  derived:
    best: {dataset: laion-256, keep: {min_aesthetic_score: 6, near_duplicate_cosine: 0.97}}
    liked: {dataset: laion-1024, preference: {clip: {folder: models/HPS-v2}}}"""

SEARCH_EXAMPLES = """\b
Examples
  atelier search "red car"
  atelier search "red car" --dataset concepts -k 50 --export red-cars
  atelier search --image fox.png --json"""


def register(app: typer.Typer) -> None:
    """Add the verbs to the command."""
    app.command(epilog=SCORE_EXAMPLES)(score)
    app.command(epilog=REFILTER_EXAMPLES)(refilter)
    app.command(epilog=SEARCH_EXAMPLES)(search)


@verb
def score(
    recipe: RecipePath,
    dataset: Datasets = None,
    set_: Overrides = None,
    json_: Json = False,
) -> None:
    """Embed and score curated datasets.

    CLIP embeddings of images and captions, and the scores of the recipe's heads on them. Each
    shard is done once: given again, the command goes on where it was.
    """
    from app.recipe import load_recipe
    from app.scoring import score_datasets

    out = Output(json_)
    out.result({"datasets": score_datasets(load_recipe(recipe, set_ or ()), dataset or (), out)})


@verb
def refilter(
    recipe: RecipePath,
    name: Annotated[
        list[str] | None, typer.Option("--name", help="only this derived one; may be repeated")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="count, and publish nothing")] = False,
    set_: Overrides = None,
    json_: Json = False,
) -> None:
    """Publish the derived datasets: other thresholds, nothing fetched again.

    Samples below the thresholds leave their shards, with the reason in the ledger, and unknown
    scores take the computed ones. Only shards that change are written. `atelier run` does the same.
    """
    from app.recipe import load_recipe
    from app.scoring import refilter_datasets

    out = Output(json_)
    loaded = load_recipe(recipe, set_ or ())
    out.result({"datasets": refilter_datasets(loaded, name or (), out, dry_run=dry_run)})


@verb
def search(
    words: Annotated[str | None, typer.Argument(help="what the images should show")] = None,
    image: Annotated[
        Path | None, typer.Option("--image", help="an image file in place of words")
    ] = None,
    dataset: Annotated[
        str | None, typer.Option("--dataset", help="which one, if several are scored")
    ] = None,
    k: Annotated[int, typer.Option("-k", min=1, max=100_000, help="how many images")] = 10,
    export: Annotated[
        str | None, typer.Option("--export", metavar="NAME", help="publish them as a dataset")
    ] = None,
    store: Annotated[
        str | None,
        typer.Option("--store", help="s3:// or file:// address; default: the newest run's store"),
    ] = None,
    max_memory_mb: Annotated[
        int, typer.Option("--max-memory-mb", min=1, help="of the index; compressed above it")
    ] = 1024,
    json_: Json = False,
) -> None:
    """Find images by words or by an image.

    Prints cosine, sample id, shard and caption, best first. The dataset has to be scored.
    """
    from app.scoring import Query, search_dataset

    out = Output(json_)
    query = Query(words, image, dataset, k, export, store, max_memory_mb)
    out.result(search_dataset(query, out))
