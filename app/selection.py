"""Which of a recipe's steps a command means."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING

from app.recipe import Recipe
from app.recipe_problems import did_you_mean
from infra.errors import UserError

if TYPE_CHECKING:
    from training.stages import StageSpec

DATASET_PREFIX, DERIVED_PREFIX = "curate:", "derive:"
WORLD, SHEET = "world", "contact sheet"


@dataclass(frozen=True)
class Selection:
    """Datasets, those derived from them, and training stages (tokenizer first), in order; without
    ``may_curate`` the datasets have to be there already."""

    command: str
    datasets: tuple[str, ...]
    specs: tuple[StageSpec, ...]
    derived: tuple[str, ...] = ()
    may_curate: bool = True
    retry_failed: bool = False

    @property
    def step_kinds(self) -> list[tuple[str, str]]:
        """(name, kind) of every step after the world, in order."""
        steps = [(DATASET_PREFIX + name, "dataset") for name in self.datasets]
        steps += [(DERIVED_PREFIX + name, "dataset") for name in self.derived]
        return steps + [
            (spec.stage, "tokenizer" if spec.kind == "tokenizer" else "stage")
            for spec in self.specs
        ]

    @classmethod
    def everything(cls, recipe: Recipe) -> Selection:
        """The whole recipe."""
        return cls("run", tuple(recipe.datasets), specs_of(recipe), tuple(recipe.derived))

    @classmethod
    def datasets_only(
        cls, recipe: Recipe, names: Collection[str], *, retry_failed: bool = False
    ) -> Selection:
        """These datasets, or all."""
        for name in names:
            if name not in recipe.datasets:
                hint = did_you_mean(name, recipe.datasets)
                raise UserError(f"the recipe has no dataset {name!r}; {hint}")
        chosen = tuple(name for name in recipe.datasets if not names or name in names)
        return cls("curate", chosen, (), retry_failed=retry_failed)

    @classmethod
    def training_only(cls, recipe: Recipe, last_stage: str | None) -> Selection:
        """The stages up to ``last_stage``, on datasets that are there."""
        specs = specs_of(recipe)
        if not specs:
            raise UserError(f"the recipe {recipe.name} has no stages to train; add `stages`")
        names = [spec.stage for spec in specs]
        if last_stage is not None:
            if last_stage not in names:
                hint = did_you_mean(last_stage, names)
                raise UserError(f"the recipe has no stage {last_stage!r}; {hint}")
            specs = specs[: names.index(last_stage) + 1]
        used = {name for spec in specs for name in spec.dataset_names}
        derived = tuple(name for name in recipe.derived if name in used)
        used |= {recipe.derived[name].dataset for name in derived}
        datasets = tuple(name for name in recipe.datasets if name in used)
        return cls("train", datasets, specs, derived, may_curate=False)


def specs_of(recipe: Recipe) -> tuple[StageSpec, ...]:
    """The recipe's training stages, tokenizer first; none for a recipe that only curates."""
    if recipe.tokenizer is None:
        return ()

    from training.stages import stage_specs

    return tuple(
        stage_specs(
            recipe.name,
            tokenizer=recipe.tokenizer,
            text_encoder=recipe.text_encoder,
            network=recipe.network,
            stages=recipe.stages,
            min_scores=recipe.evaluation.min_scores if recipe.evaluation else None,
        )
    )
