"""A recipe's training part as a chain of stages, each ready to be planned.

The tokenizer comes first; every further stage starts from the one before it. What decides a
stage's result is ``semantic`` (with the pins of its inputs); what a worker needs to know is
``configs``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from infra.config import semantic_part
from infra.errors import UserError
from training.config import NetworkConfig, StageConfig, TextEncoderConfig, TokenizerConfig

TOKENIZER_STAGE = "tokenizer"

StageKind = Literal["tokenizer", "masked"]

# The name of a dataset says where it lies; its bytes are pinned by the manifest's sha256.
# A gate decides whether a result is handed over, not what it is.
NOT_IN_KEY = frozenset({"dataset", "max_final_loss", "max_reconstruction_error"})


@dataclass(frozen=True)
class DatasetPin:
    """A curated dataset: ``version`` is its manifest's sha256."""

    name: str
    version: str
    manifest_uri: str


@dataclass(frozen=True)
class NextStage:
    """The stage that starts from this checkpoint."""

    name: str
    network: NetworkConfig
    config: StageConfig


@dataclass(frozen=True)
class Bounds:
    """Largest and smallest allowed value per metric; a metric that is missing does not pass."""

    max_values: Mapping[str, float] = field(default_factory=dict)
    min_values: Mapping[str, float] = field(default_factory=dict)

    def problems(self, metrics: Mapping[str, float]) -> list[str]:
        """A line per metric out of bounds."""
        bounds = [(name, limit, 1) for name, limit in self.max_values.items()]
        bounds += [(name, limit, -1) for name, limit in self.min_values.items()]
        problems = []
        for name, limit, sign in bounds:
            value = metrics.get(name)
            side = "at most" if sign > 0 else "at least"
            if value is None:
                problems.append(f"{name} was not measured: expected {side} {limit:g}")
            elif not math.isfinite(value) or sign * value > sign * limit:
                problems.append(f"{name} is {value:.4g}: expected {side} {limit:g}")
        return problems


@dataclass(frozen=True)
class StageSpec:
    """One stage of a recipe. ``parent`` names the stage it starts from (None for the tokenizer);
    ``dataset_name`` the dataset it reads (None when everything in it is pretrained)."""

    recipe: str
    stage: str
    kind: StageKind
    parent: str | None
    dataset_name: str | None
    init_policy: str
    semantic: Mapping[str, Any]
    configs: Mapping[str, Any]
    steps: int
    num_workers: int
    bounds: Bounds = field(default_factory=Bounds)
    next_stage: NextStage | None = field(default=None, repr=False)
    mixed_in: tuple[str, ...] = ()

    @property
    def dataset_names(self) -> tuple[str, ...]:
        """All datasets that it reads, its own first."""
        return (() if self.dataset_name is None else (self.dataset_name,)) + self.mixed_in


def stage_specs(
    recipe: str,
    *,
    tokenizer: TokenizerConfig,
    text_encoder: TextEncoderConfig,
    network: NetworkConfig,
    stages: Mapping[str, StageConfig],
    min_scores: Mapping[str, float] | None = None,
) -> list[StageSpec]:
    """The chain of a recipe, tokenizer first; ``min_scores`` bounds every masked stage's scores."""
    if TOKENIZER_STAGE in stages:
        raise UserError(f"a stage may not be called {TOKENIZER_STAGE!r}; that is stage 0")
    names = list(stages)
    followers: list[NextStage | None] = [*_followers(network, stages), None]
    specs = [_tokenizer_spec(recipe, tokenizer, text_encoder, followers[0])]
    for number, name in enumerate(names):
        specs.append(
            _masked_spec(
                recipe,
                name,
                specs[-1].stage,
                network,
                stages[name],
                followers[number + 1],
                min_scores or {},
            )
        )
    return specs


def _followers(network: NetworkConfig, stages: Mapping[str, StageConfig]) -> list[NextStage | None]:
    return [NextStage(name, network, config) for name, config in stages.items()]


def _tokenizer_spec(
    recipe: str,
    tokenizer: TokenizerConfig,
    text_encoder: TextEncoderConfig,
    next_stage: NextStage | None,
) -> StageSpec:
    reads_images = tokenizer.pretrained is None or tokenizer.pretrained_bpe is None
    limit = tokenizer.max_reconstruction_error
    return StageSpec(
        recipe=recipe,
        stage=TOKENIZER_STAGE,
        kind="tokenizer",
        parent=None,
        dataset_name=tokenizer.dataset if reads_images else None,
        init_policy="fresh",
        semantic={
            "tokenizer": _keyed(semantic_part(tokenizer)),
            "text_encoder": semantic_part(text_encoder),
        },
        configs={
            "tokenizer": tokenizer.model_dump(mode="json"),
            "text_encoder": text_encoder.model_dump(mode="json"),
        },
        steps=tokenizer.training.steps,
        num_workers=1,
        bounds=Bounds({} if limit is None else {"reconstruction_error": limit}),
        next_stage=next_stage,
    )


def _masked_spec(
    recipe: str,
    name: str,
    parent: str,
    network: NetworkConfig,
    config: StageConfig,
    next_stage: NextStage | None,
    min_scores: Mapping[str, float],
) -> StageSpec:
    limit = config.max_final_loss
    return StageSpec(
        recipe=recipe,
        stage=name,
        kind="masked",
        parent=parent,
        dataset_name=config.dataset,
        init_policy=init_policy(config),
        semantic={"stage": _keyed(semantic_part(config)), "network": semantic_part(network)},
        configs={
            "stage": config.model_dump(mode="json"),
            "network": network.model_dump(mode="json"),
        },
        steps=config.steps,
        num_workers=config.num_workers,
        bounds=Bounds({} if limit is None else {"final_loss": limit}, dict(min_scores)),
        next_stage=next_stage,
        mixed_in=tuple(config.mixed_in),
    )


def init_policy(config: StageConfig) -> str:
    """How a stage's transformer starts, as it is recorded: ``parent``, ``parent+new(…)``, …"""
    source = config.init.source
    new = "" if source == "fresh" else ",".join(config.init.new_parameters)
    return f"{source}+new({new})" if new else source


def _keyed(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if name not in NOT_IN_KEY}


def spec_by_name(specs: Sequence[StageSpec], stage: str) -> StageSpec:
    """The spec called ``stage``; ``UserError`` with the known names."""
    for spec in specs:
        if spec.stage == stage:
            return spec
    raise UserError(
        expected=f"one of the stages {', '.join(spec.stage for spec in specs)}", got=repr(stage)
    )
