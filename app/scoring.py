"""What `score`, `refilter` and `search` do, over the datasets of a recipe or of a store."""

from __future__ import annotations

from collections.abc import Collection
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from app.place import Place, connect, place_of
from app.recipe import Recipe
from app.recipe_problems import did_you_mean
from app.selection import Selection
from app.verb import Output
from infra.cluster import ClusterConfig
from infra.config import atelier_home
from infra.errors import UserError

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

    from pipelines.scoring_config import ScoringConfig


@dataclass(frozen=True)
class Query:
    """What is looked for: ``words`` or ``image``; ``store`` None is the newest run's."""

    words: str | None
    image: Path | None
    dataset: str | None
    k: int
    export: str | None
    store: str | None
    max_memory_mb: int


class LazySpark:
    """One session for all datasets, started at first use."""

    def __init__(self, cluster: ClusterConfig, place: Place, stack: ExitStack) -> None:
        self._cluster, self._place, self._stack = cluster, place, stack
        self._session: SparkSession | None = None

    def __call__(self) -> SparkSession:
        if self._session is None:
            from infra.sessions import spark_session, stop_spark

            environment = self._place.environment
            self._session = spark_session("scoring", self._cluster, environment)
            self._stack.callback(stop_spark, self._session)
        return self._session


def score_datasets(recipe: Recipe, names: Collection[str], out: Output) -> list[dict[str, Any]]:
    """Embed and score; returns per dataset what came out."""
    from infra.progress import progress
    from pipelines.score import score

    config = _config(recipe)
    chosen = Selection.datasets_only(recipe, names).datasets
    found = []
    with ExitStack() as stack:
        place = connect(recipe.services, atelier_home(), out.say)
        spark = LazySpark(recipe.cluster, place, stack)
        for name in chosen:
            uri = published(recipe, name, place.store_uri)
            scoring = score(uri, config, spark, progress, place.environment)
            counts = scoring.embeddings.manifest.counts
            columns = sorted(scoring.scores.manifest.provenance())
            out.say(
                f"{name}: {counts['embedded']:,} images embedded, {counts['failed']:,} failed; "
                f"scored {', '.join(columns)}"
            )
            found.append(
                {
                    "dataset": name,
                    "version": scoring.embeddings.manifest.dataset_version,
                    "counts": counts,
                    "shards_embedded_now": scoring.embeddings.num_made,
                    "embeddings": scoring.embeddings.manifest_uri,
                    "scores": scoring.scores.manifest_uri,
                    "models": scoring.scores.manifest.provenance(),
                }
            )
    return found


def refilter_datasets(
    recipe: Recipe, names: Collection[str], out: Output, *, dry_run: bool
) -> list[dict[str, Any]]:
    """Publish, or with ``dry_run`` count, what the thresholds of the derived datasets leave."""
    from infra.manifest import load_manifest
    from infra.progress import progress
    from pipelines.derived import make_derived, plan_derived
    from pipelines.publish import funnel_of
    from pipelines.score import score, selection
    from pipelines.verdicts import preview

    chosen = _derived(recipe, names)
    found = []
    with ExitStack() as stack:
        place = connect(recipe.services, atelier_home(), out.say)
        spark = LazySpark(recipe.cluster, place, stack)
        for name in chosen:
            config = recipe.derived[name]
            uri = published(recipe, config.dataset, place.store_uri)
            version = None
            if dry_run and config.keep is None:
                funnel = {}
            elif dry_run and config.keep is not None:
                scoring = _config(recipe)
                scored = score(uri, scoring, spark, progress, place.environment)
                job = selection(scored, scoring, config.keep, progress, place.environment)
                funnel = preview(job)
            else:
                plan = plan_derived(uri, recipe.sections, config)
                environment = place.environment
                made = plan.manifest_uri
                if made is None:
                    sections = recipe.sections
                    made, _ = make_derived(plan, sections, config, spark, progress, environment)
                manifest = load_manifest(made)
                funnel, version = funnel_of(manifest), manifest.version
            _say_funnel(out, name, funnel, version)
            found.append(
                {"name": name, "dataset": config.dataset, "version": version, "funnel": funnel}
            )
    return found


def _derived(recipe: Recipe, names: Collection[str]) -> list[str]:
    """These of the recipe's derived datasets, or all of them."""
    if not recipe.derived:
        raise UserError(
            expected=f"a section `derived` in the recipe {recipe.name}",
            got="none",
            remedy="name a dataset and thresholds there; `atelier refilter --help` shows how",
        )
    for name in names:
        if name not in recipe.derived:
            hint = did_you_mean(name, recipe.derived)
            raise UserError(f"the recipe derives no dataset {name!r}; {hint}")
    return [name for name in recipe.derived if not names or name in names]


def _say_funnel(out: Output, name: str, funnel: dict[str, int], version: str | None) -> None:
    out.say(f"{name}:" + (" (nothing published)" if version is None else f" version {version}"))
    for reason, number in funnel.items():
        out.say(f"  {number:>12,}  {reason}")


def _config(recipe: Recipe) -> ScoringConfig:
    if recipe.scoring is None:
        raise UserError(
            expected=f"a section `scoring` in the recipe {recipe.name}",
            got="none",
            remedy="name a CLIP there; `atelier score --help` shows how",
        )
    return recipe.scoring


def published(recipe: Recipe, name: str, store_uri: str) -> str:
    """The manifest of the version that this recipe curates, which has to be there."""
    from app.steps import placed
    from pipelines.curate import plan_curation

    folder = None
    if recipe.world is not None:
        from app.world import plan_world

        world = plan_world(recipe.world, atelier_home())
        if world.decision != "SKIP":
            raise UserError(f"the painted world is not made: {world.reason}; run `atelier curate`")
        folder = world.folder
    plan = plan_curation(name, placed(recipe.datasets[name], folder), store_uri)
    if plan.manifest_uri is None:
        raise UserError(
            f"dataset {name} is not curated ({plan.reason}); run `atelier curate` first"
        )
    return plan.manifest_uri


def search_dataset(query: Query, out: Output) -> dict[str, Any]:
    """Find, print and, when asked to, publish; returns what ``--json`` prints."""
    if (query.words is None) == (query.image is None):
        raise UserError('give words or --image, and not both: atelier search "red car"')
    store_uri = place_of(query.store, out.say).store_uri

    from infra import storage
    from infra.progress import progress
    from pipelines.clip_model import encoder_of, weights_uri
    from pipelines.scoring_config import IndexConfig
    from pipelines.search import export_hits, find, image_query, latest_embeddings, text_query
    from pipelines.vector_index import open_index

    name = query.dataset or _only_dataset(store_uri)
    root = storage.join(store_uri, "datasets", name)
    embeddings = latest_embeddings(root)
    identity = embeddings.identity
    encoder = encoder_of(identity, weights_uri(store_uri, identity.weights_sha256))
    if query.image is not None:
        vector = image_query(encoder, query.image)
    else:
        vector = text_query(encoder, query.words or "")
    with progress(f"indexing {name}", embeddings.counts["embedded"], "images") as bar:
        config = IndexConfig(max_memory_mb=query.max_memory_mb)
        index = open_index(root, embeddings, config, bar.update)
        bar.update(embeddings.counts["embedded"])
    hits = find(index, vector, query.k)
    for hit in hits:
        out.say(f"{hit.cosine:7.4f}  {hit.sample_id}  {hit.shard}  {' '.join(hit.caption.split())}")
    exported = None
    if query.export is not None:
        asked = {"text": query.words, "image": _sha256_of(query.image), "k": query.k}
        made = export_hits(hits, index, store_uri, query.export, asked)
        exported = made.manifest_uri
        gone = f", without {made.num_taken_down} that were taken down" * bool(made.num_taken_down)
        out.say(f"published {made.num_samples} samples as {exported}{gone}")
    return {
        "dataset": name,
        "version": embeddings.dataset_version,
        "hits": [hit.to_json() for hit in hits],
        "exported": exported,
    }


def _sha256_of(image: Path | None) -> str | None:
    from infra.digests import sha256_file

    return None if image is None else sha256_file(image)


def _only_dataset(store_uri: str) -> str:
    from pipelines.search import searchable_datasets

    names = searchable_datasets(store_uri)
    if len(names) == 1:
        return names[0]
    raise UserError(
        expected="--dataset, one of " + ", ".join(names) if names else "a scored dataset",
        got="no --dataset" if names else f"none in {store_uri}",
        remedy=None if names else "run `atelier score RECIPE` first",
    )
