"""The recipe: one strict tree, composed of what each package defines beside its code.

``load_recipe`` reports every problem at once, each with its place, its key and its remedy.
Stages run in the order in which they are written; each starts from the one before it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from pydantic import ValidationError, field_validator, model_validator

from app.recipe_checks import Parts, cross_problems
from app.recipe_file import RecipeSource, parse_recipe, read_recipe
from app.recipe_problems import problems_of
from app.recipe_sizes import with_sizes
from demo.world import WorldConfig
from infra.config import StrictModel, operational, semantic
from infra.digests import canonical_json, sha256_bytes
from infra.errors import UserError
from infra.sessions import ClusterConfig
from pipelines.captioning_config import CaptioningConfig
from pipelines.config import CurationConfig
from pipelines.scoring_config import ClipConfig, DerivedConfig, ScoringConfig
from training.config import (
    NetworkConfig,
    Precision,
    StageConfig,
    TextEncoderConfig,
    TokenizerConfig,
)

if TYPE_CHECKING:
    from pipelines.derived import Sections

SEEDED_SECTIONS = ("world", "tokenizer", "evaluation")


class JudgeConfig(StrictModel):
    """A CLIP that says how well images fit their prompts: scale x the mean cosine."""

    clip: ClipConfig = semantic(
        description="a CLIP, for CLIP score; one trained on what people chose, such as HPS v2"
    )
    scale: float = semantic(100.0, "factor on the cosine; 100 as in published figures", gt=0)


class EvaluationConfig(StrictModel):
    """How finished stages are scored and shown: prompts about the painted world, read back by its
    oracle, or prompts of your own, looked at by CLIPs."""

    prompts: str | None = semantic(
        None,
        "path or URI of prompts, a line each, or jsonl or parquet with a field prompt; null: "
        "questions about the painted world",
    )
    judges: dict[str, JudgeConfig] = semantic(
        default_factory=dict, description="CLIPs that look at the images; each gives a score"
    )
    num_prompts: int = semantic(256, "prompts scored per stage, the first of a file", ge=6)
    seed: int = semantic(0, "start of the prompts' and the images' randomness", ge=0)
    steps: int = semantic(16, "unmasking steps per image", ge=1)
    guidance_scale: float = semantic(3.0, "uncond + scale * (cond - uncond); 1.0 is off", ge=0.0)
    temperature: float = semantic(1.0, "noise on the confidences at the first step", ge=0.0)
    precision: Precision = semantic("bf16", "compute type of the network, as in training")
    batch_size: int = operational(64, "images painted at a time", ge=1)
    min_scores: dict[str, float] = semantic(
        default_factory=dict, description="gate: smallest score of every stage, by name"
    )
    sheet_prompts: tuple[str, ...] = operational(
        (), "prompts on the contact sheet; none takes some of the scored ones"
    )
    sheet_columns: int = operational(8, "images per row of the contact sheet", ge=1, le=32)


class ServicesConfig(StrictModel):
    """Where a run stores and tracks; with neither, this machine's own services are started."""

    store_uri: str | None = operational(
        None,
        "s3:// or file:// address under which datasets and models lie",
        pattern="^(s3|file)://",
    )
    tracking_uri: str | None = operational(
        None,
        "address of an MLflow server; a user's name and password for it are read from "
        "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, and stored nowhere",
        pattern=r"^https?://[^\s/?#]+(/[^\s?#]*)?$",
    )

    @field_validator("tracking_uri", mode="before")
    @classmethod
    def _holds_no_password(cls, value: object) -> object:
        """A recipe is stored with its results, and an address is printed."""
        if isinstance(value, str) and "@" in value:
            raise ValueError(
                "expected the address of an MLflow server alone; got one with a user's name or "
                "password (not shown); remove what stands before the @, and set "
                "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD in the environment"
            )
        return value

    @model_validator(mode="after")
    def _both_or_neither(self) -> Self:
        if (self.store_uri is None) != (self.tracking_uri is None):
            raise ValueError(
                "expected store_uri and tracking_uri together, or neither; got one of them"
            )
        return self


class Recipe(StrictModel):
    """Everything that decides a run, and how much machine it may use."""

    name: str = semantic(
        description="short name; results are registered under it",
        pattern=r"^[a-z0-9][a-z0-9_.-]{0,62}$",
    )
    seed: int = semantic(0, "start of all randomness; a section's own seed comes first", ge=0)
    world: WorldConfig | None = semantic(None, "the painted world, for runs without real data")
    datasets: dict[str, CurationConfig] = semantic(
        default_factory=dict, description="datasets to curate, by name"
    )
    scoring: ScoringConfig | None = semantic(
        None, "embeddings, scores and search of the curated datasets"
    )
    derived: dict[str, DerivedConfig] = semantic(
        default_factory=dict,
        description="versions of curated datasets by other thresholds, by name; nothing is fetched "
        "again for them",
    )
    captioning: CaptioningConfig | None = semantic(
        None, "long captions for the curated datasets' images"
    )
    tokenizer: TokenizerConfig | None = semantic(None, "stage 0: image codes and vocabulary")
    text_encoder: TextEncoderConfig = semantic(
        default_factory=TextEncoderConfig, description="CLIP's text tower"
    )
    network: NetworkConfig = semantic(
        default_factory=NetworkConfig, description="the masked image transformer"
    )
    stages: dict[str, StageConfig] = semantic(
        default_factory=dict, description="training stages by name, in order"
    )
    evaluation: EvaluationConfig | None = semantic(None, "scores and contact sheet")
    services: ServicesConfig = operational(
        default_factory=ServicesConfig, description="where a run stores and tracks"
    )
    cluster: ClusterConfig = operational(
        default_factory=ClusterConfig, description="how much machine Spark and Ray may use"
    )

    @property
    def sections(self) -> Sections:
        """What derived datasets draw on."""
        from pipelines.derived import Sections

        return Sections(self.scoring, self.captioning)

    @property
    def fingerprint(self) -> str:
        """The sha256 of the resolved recipe, 64 hex digits."""
        return sha256_bytes(canonical_json(self.model_dump(mode="json")))


class RecipeError(UserError):
    """All that is wrong with a recipe; ``lines`` has one line per problem."""

    def __init__(self, lines: Sequence[str]) -> None:
        super().__init__("; ".join(lines))
        self.lines = list(lines)


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read, override and validate. Raises ``UserError``; a ``RecipeError`` names every problem."""
    return _validated(read_recipe(path, overrides))


def recipe_from_text(text: str, name: str, overrides: Sequence[str] = ()) -> Recipe:
    """``load_recipe`` for a text; ``name`` is what messages call it."""
    return _validated(parse_recipe(text, name, overrides))


def _validated(source: RecipeSource) -> Recipe:
    values, problems, sizes = with_sizes(_with_seeds(source.values))
    recipe: Recipe | None = None
    try:
        recipe = Recipe.model_validate(values)
    except ValidationError as error:
        problems += problems_of(error, Recipe)
    broken = {problem.path for problem in problems}
    problems += [
        problem for problem in cross_problems(Parts.of(values, Recipe))
        if not any(problem.path[: len(path)] == path for path in broken)
    ]  # fmt: skip
    # What is wrong with a dataset is so at every size, and told once.
    problems = [each for each in problems if not (each.path[:1] == ("datasets",)
                and len(each.path) > 1 and each.path[1] in sizes)]  # fmt: skip
    if problems or recipe is None:
        raise RecipeError([f"{source.where(each.path)}: {each.line}" for each in problems])
    return recipe


def _with_seeds(values: Mapping[str, Any]) -> dict[str, Any]:
    """The recipe's seed in every section that has none of its own."""
    values = dict(values)
    seed = values.get("seed", 0)
    if type(seed) is not int or seed < 0:
        return values  # told once, at the recipe's own key
    for name in SEEDED_SECTIONS:
        if isinstance(values.get(name), dict):
            values[name] = {"seed": seed, **values[name]}
    stages = values.get("stages")
    if isinstance(stages, dict):
        values["stages"] = {
            name: {"seed": seed, **stage} if isinstance(stage, dict) else stage
            for name, stage in stages.items()
        }
    return values
