"""What must agree between the sections of a recipe, checked on the sections that are valid."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, TypeAdapter, ValidationError

from app.recipe_problems import Problem, did_you_mean, problem

if TYPE_CHECKING:
    from infra.cluster import ClusterConfig
    from pipelines.config import CurationConfig
    from pipelines.scoring_config import DerivedConfig
    from training.config import StageConfig, TextEncoderConfig, TokenizerConfig

WORLD_MARK = "{world}"  # stands for the painted world's folder in a dataset's paths
DEFAULTED = ("text_encoder", "cluster")  # sections that are there when they are not written
PUBLISHED_DOWNSAMPLING = 16  # of the published VQ, for recipes that take one by path


@dataclass(frozen=True)
class Parts:
    """The sections of a recipe that are valid on their own; ``*_names`` are as written."""

    has_world: bool
    dataset_names: tuple[str, ...]
    datasets: dict[str, CurationConfig]
    derived_names: tuple[str, ...]
    derived: dict[str, DerivedConfig]
    has_scoring: bool
    has_captioning: bool
    tokenizer: TokenizerConfig | None
    has_tokenizer: bool
    text_encoder: TextEncoderConfig | None
    stage_names: tuple[str, ...]
    stages: dict[str, StageConfig] = field(default_factory=dict)
    has_evaluation: bool = False
    evaluation: Any = None  # an EvaluationConfig, whose module imports this one
    cluster: ClusterConfig | None = None

    @classmethod
    def of(cls, values: Mapping[str, Any], recipe: type[BaseModel]) -> Parts:
        """Validate each section, dataset and stage alone; leave out what is not valid."""

        def section(name: str) -> Any:
            annotation = recipe.model_fields[name].annotation
            return _valid(annotation, values.get(name, {} if name in DEFAULTED else None))

        def entries(name: str) -> dict[str, Any]:
            written = values.get(name)
            kind = recipe.model_fields[name].annotation.__args__[1]  # type: ignore[union-attr]  # dict[str, X]
            pairs = written.items() if isinstance(written, dict) else ()
            found = {key: _valid(kind, value) for key, value in pairs}
            return {key: value for key, value in found.items() if value is not None}

        def names(name: str) -> tuple[str, ...]:
            written = values.get(name)
            return tuple(map(str, written)) if isinstance(written, dict) else ()

        return cls(
            has_world=values.get("world") is not None,
            dataset_names=names("datasets"),
            datasets=entries("datasets"),
            derived_names=names("derived"),
            derived=entries("derived"),
            has_scoring=values.get("scoring") is not None,
            has_captioning=values.get("captioning") is not None,
            tokenizer=section("tokenizer"),
            has_tokenizer=values.get("tokenizer") is not None,
            text_encoder=section("text_encoder"),
            stage_names=names("stages"),
            stages=entries("stages"),
            has_evaluation=values.get("evaluation") is not None,
            evaluation=section("evaluation"),
            cluster=section("cluster"),
        )

    def dataset_of(self, name: str) -> CurationConfig | None:
        """The dataset that is curated under ``name``, or that the derived ``name`` is made from."""
        derived = self.derived.get(name)
        return self.datasets.get(name if derived is None else derived.dataset)


def _valid(annotation: Any, value: Any) -> Any:
    try:
        return TypeAdapter(annotation).validate_python(value)
    except ValidationError:
        return None


def cross_problems(parts: Parts) -> list[Problem]:
    """Every disagreement between sections."""
    return [
        *_dataset_problems(parts),
        *_derived_problems(parts),
        *_tokenizer_problems(parts),
        *_stage_problems(parts),
        *_world_problems(parts),
    ]


def _world_problems(parts: Parts) -> Iterator[Problem]:
    asked = parts.evaluation
    if asked is not None and asked.prompts is None and not parts.has_world:
        yield problem(
            ("evaluation",),
            "scores are read back from the painted world, and there is no `world` section; "
            "name prompts and judges of your own, or remove `evaluation`",
        )
    if asked is not None and asked.prompts is not None and not asked.judges:
        yield problem(
            ("evaluation", "judges"),
            "nobody looks at the images of these prompts; name a CLIP, as in "
            "`judges: {clip: {clip: {folder: models/ViT-L-14}}}`",
        )
    if parts.has_evaluation and not parts.stage_names:
        yield problem(("evaluation",), "there are no stages to evaluate; add some, or remove it")


def _dataset_problems(parts: Parts) -> Iterator[Problem]:
    for name, dataset in parts.datasets.items():
        for key, paths in (
            (("metadata",), dataset.metadata),
            (("captions", "files"), dataset.captions.files),
        ):
            if not parts.has_world and any(WORLD_MARK in path for path in paths):
                yield problem(
                    ("datasets", name, *key),
                    f"{WORLD_MARK} stands for the painted world, and there is no `world` "
                    "section; add one, or give real paths",
                )


def _derived_problems(parts: Parts) -> Iterator[Problem]:
    for name in parts.derived_names:
        if name in parts.dataset_names:
            yield problem(
                ("derived", name), "a dataset has this name already; give it one of its own"
            )
    for name, derived in parts.derived.items():
        if derived.keep is not None and not parts.has_scoring:
            yield problem(
                ("derived", name, "keep"),
                "thresholds are asked of scores, and there is no `scoring` section; add one",
            )
        if derived.caption and not parts.has_captioning:
            yield problem(
                ("derived", name, "caption"),
                "somebody has to write the captions, and there is no `captioning` section; add one",
            )
        at = ("derived", name, "dataset")
        yield from _known(at, derived.dataset, parts.dataset_names, "datasets")


def _tokenizer_problems(parts: Parts) -> Iterator[Problem]:
    if parts.stage_names and not parts.has_tokenizer:
        yield problem(("tokenizer",), "missing; the stages need image tokens; add the section")
    tokenizer = parts.tokenizer
    if tokenizer is None or (tokenizer.pretrained and tokenizer.pretrained_bpe):
        return
    yield from _known_dataset(parts, ("tokenizer", "dataset"), tokenizer.dataset)
    dataset = parts.dataset_of(tokenizer.dataset)
    largest = max(tokenizer.training.resolutions_px)
    if dataset is not None and not tokenizer.pretrained:
        yield from _large_enough(
            ("tokenizer", "training", "resolutions_px"), largest, tokenizer.dataset, dataset
        )


def _stage_problems(parts: Parts) -> Iterator[Problem]:
    longest = None
    if parts.text_encoder is not None and parts.text_encoder.pretrained is None:
        longest = parts.text_encoder.max_position_embeddings
    for name, stage in parts.stages.items():
        at = ("stages", name)
        yield from _known_dataset(parts, (*at, "dataset"), stage.dataset)
        for other in stage.mixed_in:
            yield from _known_dataset(parts, (*at, "mixed_in", other), other)
        for read in (stage.dataset, *stage.mixed_in):
            dataset = parts.dataset_of(read)
            if dataset is not None:
                yield from _fits(at, stage, read, dataset)
        dataset, derived = parts.dataset_of(stage.dataset), parts.derived.get(stage.dataset)
        if dataset is not None and (derived is None or not derived.caption):
            yield from _captions_there(at, stage, dataset)
        yield from _divisible(parts, at, stage)
        yield from _worker_problems(parts, at, stage)
        if longest is not None and stage.text_tokens > longest:
            yield problem(
                (*at, "text_tokens"),
                f"expected at most {longest}, text_encoder.max_position_embeddings; got "
                f"{stage.text_tokens}; lower it, or raise that",
            )
    yield from _order_problems(parts)


def _worker_problems(parts: Parts, at: tuple[str, ...], stage: StageConfig) -> Iterator[Problem]:
    """What would end after the start of all workers, or wait for workers that never come."""
    workers, batch = stage.num_workers, stage.global_batch_size
    if batch < workers:
        yield problem(
            (*at, "num_workers"),
            f"expected at most {batch}, a sample of global_batch_size for each; got {workers}; "
            "lower it, or raise that",
        )
    elif stage.strategy == "fsdp" and batch % workers:
        yield problem(
            (*at, "global_batch_size"),
            f"expected a multiple of num_workers, {workers}, as strategy: fsdp shares it equally; "
            f"got {batch}; take {batch // workers * workers}, or other workers",
        )
    cluster = parts.cluster
    if cluster is not None and cluster.ray_address is None and workers > cluster.num_workers:
        yield problem(
            (*at, "num_workers"),
            f"expected at most cluster.num_workers, {cluster.num_workers}, for which the Ray of "
            f"this machine is made; got {workers}; lower it, raise that, or name a ray_address",
        )


def _order_problems(parts: Parts) -> Iterator[Problem]:
    """Compression is put in once and never taken out; what it adds has to be named."""
    compressed_by = None
    for name in parts.stage_names:
        stage = parts.stages.get(name)
        if stage is None:
            return  # told already; what follows it would be guessed
        if stage.init.source != "parent":
            compressed_by = name if stage.compress else None
            continue
        if compressed_by is not None and not stage.compress:
            yield problem(
                ("stages", name, "compress"),
                f"expected true, because the stage {compressed_by} before it compresses and its "
                "weights are taken over; got false; set it, or init.source: fresh",
            )
        if stage.compress and compressed_by is None and name != parts.stage_names[0]:
            compressed_by = name
            if not stage.init.new_parameters:
                yield problem(
                    ("stages", name, "init", "new_parameters"),
                    "missing; compression adds parameters that the stage before it does not "
                    "have; name their prefixes",
                )


def _known_dataset(parts: Parts, path: tuple[str, ...], name: str) -> Iterator[Problem]:
    known = (*parts.dataset_names, *parts.derived_names)
    yield from _known(path, name, known, "datasets")


def _known(
    path: tuple[str, ...], name: str, known: Collection[str], section: str
) -> Iterator[Problem]:
    if name not in known:
        hint = did_you_mean(name, known) if known else "add one"
        yield problem(path, f"no dataset {name!r} under `{section}`; {hint}")


def _fits(
    at: tuple[str, ...], stage: StageConfig, name: str, dataset: CurationConfig
) -> Iterator[Problem]:
    """Whether the stored images are of the shape and size that the stage trains on."""
    if stage.crop != "bucket":
        yield from _large_enough((*at, "resolution_px"), stage.resolution_px, name, dataset)
        return
    buckets = dataset.resize.buckets or ((dataset.resize.image_size_px,) * 2,)
    stored_px = max(math.isqrt(width_px * height_px) for width_px, height_px in buckets)
    if dataset.resize.crop != "bucket":
        yield problem(
            (*at, "crop"),
            f"buckets are made where images are stored, and datasets.{name}.resize.crop is "
            f"{dataset.resize.crop}; set that to bucket, or take center",
        )
    elif stage.resolution_px > stored_px:
        yield problem(
            (*at, "resolution_px"),
            f"expected at most {stored_px}, the root of the area that datasets.{name}.resize "
            f"stores; got {stage.resolution_px}; lower it, or raise that",
        )


def _large_enough(
    path: tuple[str, ...], side_px: int, name: str, dataset: CurationConfig
) -> Iterator[Problem]:
    from pipelines.buckets import shortest_side_px

    stored_px = shortest_side_px(dataset.resize)
    if stored_px < side_px:
        yield problem(
            path,
            f"expected at most {stored_px}, the side that datasets.{name}.resize stores; got "
            f"{side_px}; lower it, or raise datasets.{name}.resize.image_size_px",
        )


def _captions_there(
    at: tuple[str, ...], stage: StageConfig, dataset: CurationConfig
) -> Iterator[Problem]:
    from pipelines.sources import SOURCE_FORMATS

    has_own = dataset.format is not None and SOURCE_FORMATS[dataset.format].synthetic
    has_some = bool(dataset.captions.files or has_own)
    if stage.caption_mix.get("synthetic", 0) > 0 and not has_some:
        yield problem(
            (*at, "caption_mix", "synthetic"),
            f"the dataset {stage.dataset} has no synthetic captions; add "
            f"datasets.{stage.dataset}.captions.files, name a `format` that has some, or remove "
            "this weight",
        )


def _divisible(parts: Parts, at: tuple[str, ...], stage: StageConfig) -> Iterator[Problem]:
    tokenizer = parts.tokenizer
    if tokenizer is None:
        return
    factor = PUBLISHED_DOWNSAMPLING
    if tokenizer.pretrained is None:
        factor = int(2 ** (len(tokenizer.block_out_channels) - 1))
    step = 2 * factor if stage.compress else factor
    if stage.resolution_px % step:
        yield problem(
            (*at, "resolution_px"),
            f"expected a multiple of {step} px (the tokenizer's {factor}"
            f"{', doubled by compression' if stage.compress else ''}); got {stage.resolution_px}; "
            f"take {max(step, stage.resolution_px // step * step)}",
        )
