"""What `caption` does, over the datasets of a recipe."""

from __future__ import annotations

from collections.abc import Collection
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from app.place import connect
from app.recipe import Recipe
from app.scoring import LazySpark, published
from app.selection import Selection
from app.verb import Output
from infra.config import atelier_home
from infra.errors import UserError

if TYPE_CHECKING:
    from pipelines.caption_answers import CaptionedShard
    from pipelines.caption_version import AskingJob
    from pipelines.captioning_config import CaptioningConfig

SHOWN_CHARS = 600


def caption_datasets(
    recipe: Recipe,
    names: Collection[str],
    out: Output,
    *,
    limit: int | None = None,
    retry_failed: bool = False,
) -> list[dict[str, Any]]:
    """Publish each dataset with captions, or with ``limit`` show some; returns what came out."""
    from pipelines.caption_version import plan_captions

    config = _config(recipe)
    chosen = Selection.datasets_only(recipe, names).datasets
    found = []
    with ExitStack() as stack:
        place = connect(recipe.services, atelier_home(), out.say)
        spark = LazySpark(recipe.cluster, place, stack)
        for name in chosen:
            uri = published(recipe, name, place.store_uri)
            job = plan_captions(uri, config, place.environment, retry_failed=retry_failed)
            if limit is not None:
                found.append(_try(name, job, limit, out))
            else:
                found.append(_caption(name, job, spark, out))
    return found


def _config(recipe: Recipe) -> CaptioningConfig:
    if recipe.captioning is None:
        raise UserError(
            expected=f"a section `captioning` in the recipe {recipe.name}",
            got="none",
            remedy="name an endpoint or a local model there; `atelier caption --help` shows how",
        )
    return recipe.captioning


def _try(name: str, job: AskingJob, limit: int, out: Output) -> dict[str, Any]:
    """Ask for a few samples and show them; what it would cost for all."""
    import json

    from pipelines.caption_version import trial

    with TemporaryDirectory(prefix="atelier-captions-") as folder:
        answers = trial(job, limit, Path(folder))
    shown = []
    for row in answers.iter_rows(named=True):
        has = json.loads(row["captions"])
        alt = next((each["text"] for each in has if each["origin"] == "alt"), "")
        verdict = "taken" if row["problem"] is None else f"not taken: {row['problem']}"
        out.say(f"{row['sample_id']}  {verdict}")
        out.say(f"  alt text   {alt[:SHOWN_CHARS]}")
        out.say(f"  caption    {row['text'][:SHOWN_CHARS]}")
        shown.append({"sample_id": row["sample_id"], "alt": alt, "text": row["text"]})
        shown[-1]["problem"] = row["problem"]
    estimate = None
    asked = answers["completion_tokens"].count()
    if asked:
        total = job.manifest.counts["committed"]
        estimate = {
            kind: round(int(answers[kind].sum()) / asked * total)
            for kind in ("prompt_tokens", "completion_tokens")
        }
        out.say(
            f"{name}: all {total:,} images would cost about {estimate['prompt_tokens']:,} prompt "
            f"and {estimate['completion_tokens']:,} completion tokens"
        )
    return {"dataset": name, "version": None, "trial": shown, "estimate": estimate}


def _caption(name: str, job: AskingJob, spark: LazySpark, out: Output) -> dict[str, Any]:
    from infra.progress import progress
    from pipelines.caption_version import ask_captions, counts_of, version_job
    from pipelines.derive import derive

    total = job.manifest.counts["committed"]
    with progress(f"captioning {name}", total, "images") as bar:
        answers, markers = ask_captions(job, spark, bar.update)
    made = version_job(job, answers)
    with progress(f"rewriting {name}", total, "samples") as bar:
        result = derive(made, spark, bar.update)
    counts = counts_of(made)
    out.say(f"{name}: version {result.manifest.version}")
    for reason, number in counts.items():
        out.say(f"  {number:>12,}  {reason.replace('_', ' ')}")
    cost = _cost(markers)
    if cost["completion_tokens"]:
        out.say(
            f"  {cost['prompt_tokens']:,} prompt tokens, "
            f"{cost['completion_tokens']:,} completion tokens"
        )
    return {
        "dataset": name,
        "version": result.manifest.version,
        "manifest": result.manifest_uri,
        "counts": counts,
        "tokens": cost,
    }


def _cost(markers: list[CaptionedShard]) -> dict[str, int]:
    return {
        "prompt_tokens": sum(marker.prompt_tokens for marker in markers),
        "completion_tokens": sum(marker.completion_tokens for marker in markers),
    }
