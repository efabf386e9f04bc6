"""What is computed from images after a curation: embeddings, scores, an index, a new selection."""

from __future__ import annotations

from typing import Literal

from pydantic import model_validator

from infra.config import StrictModel, operational, semantic
from pipelines.duplicate_config import DecontaminationConfig, DuplicateConfig

ScoreColumn = Literal["aesthetic_score", "unsafe_prob", "watermark_prob"]
HeadLayout = Literal[
    "laion_aesthetic_v1", "laion_aesthetic_v2", "laion_unsafe_l14", "laion_unsafe_h14", "described"
]
COLUMN_OF: dict[str, str] = {
    "laion_aesthetic_v1": "aesthetic_score",
    "laion_aesthetic_v2": "aesthetic_score",
    "laion_unsafe_l14": "unsafe_prob",
    "laion_unsafe_h14": "unsafe_prob",
}


class ClipConfig(StrictModel):
    """A CLIP as open_clip publishes it, on this machine or in the store; nothing is downloaded."""

    folder: str = operational(
        description="path or URI of a folder with open_clip_config.json and one .safetensors file "
        "(known by its bytes, wherever it lies)",
        min_length=1,
    )
    precision: Literal["fp32", "bf16"] = semantic(
        "fp32",
        "compute type; bf16 is faster on GPUs and on CPUs with AVX512-BF16, and is refused when it "
        "turns an embedding by more than 0.001 (1 - cosine)",
    )
    batch_size: int = operational(128, "images embedded at a time", ge=1, le=65_536)
    num_threads: int | None = operational(
        None, "torch threads per Spark task; null: what Spark gives a task, one", ge=1
    )
    decode_threads: int = operational(2, "images decoded at once per Spark task", ge=1, le=256)
    checkpoint_seconds: float = operational(
        60.0, "a task stores what it has of a shard so often; what a kill costs at most", ge=0.0
    )
    decode_deadline_seconds: float = operational(
        60.0, "an image whose decoding takes longer fails, and the others go on", gt=0
    )


class HeadConfig(StrictModel):
    """A small network from an image's embedding to one score."""

    layout: HeadLayout = semantic(
        description="how the file names its tensors: one of LAION's published heads, or described: "
        "layers and activations in <weights>.json"
    )
    weights: str = operational(
        description="path or URI of a .safetensors file (known by its bytes)", min_length=1
    )
    column: ScoreColumn | None = semantic(
        None, "the score it gives; null: the layout's own; a described head must say"
    )
    aesthetic_scale: Literal["v1", "v2"] | None = semantic(
        None, "scale of an aesthetic score; null: the layout's own"
    )

    @model_validator(mode="after")
    def _says_what_it_scores(self) -> HeadConfig:
        own = COLUMN_OF.get(self.layout)
        if own is None and self.column is None:
            raise ValueError("a described head says which column it scores")
        if own is not None and self.column not in (None, own):
            raise ValueError(f"{self.layout} scores {own}, not {self.column}")
        if self.score == "aesthetic_score" and self.scale is None:
            raise ValueError("a described aesthetic head says its aesthetic_scale")
        return self

    @property
    def score(self) -> str:
        """The canonical column that it fills."""
        return self.column or COLUMN_OF[self.layout]

    @property
    def scale(self) -> str | None:
        """v1 or v2 for an aesthetic score, else None."""
        if self.score != "aesthetic_score":
            return None
        own = {"laion_aesthetic_v1": "v1", "laion_aesthetic_v2": "v2"}
        return self.aesthetic_scale or own.get(self.layout)


class IndexConfig(StrictModel):
    """Search over image embeddings: exact while that fits, else compressed by autofaiss."""

    max_memory_mb: int = operational(
        1024, "memory of the index, MiB; an exact one takes 4 bytes x dimension x images", ge=1
    )
    max_train_memory_mb: int = operational(
        2048, "memory to build a compressed index with, MiB", ge=64
    )


class MismatchConfig(StrictModel):
    """Pairs whose image is not what the caption says: suspected, counted, and rejected if asked.

    Deviations are robust ones: 1.4826 x the median absolute deviation is one.
    """

    reject: bool = semantic(True, "suspected samples leave as `mismatched`; false: only counted")
    max_deviations: float = semantic(
        4.0,
        "how far an image may lie from the other images of a word in its caption, and its "
        "recomputed similarity below what the recorded one foretells",
        gt=0,
    )
    min_images: int = semantic(40, "a word is a concept from so many images on", ge=10)
    max_share: float = semantic(
        0.2, "a word in more than this share of the captions says nothing, in (0, 1]", gt=0, le=1
    )
    max_samples: int = semantic(
        200_000, "samples, in whole shards evenly drawn, to learn concepts from", ge=100
    )


class RefilterConfig(StrictModel):
    """Thresholds on scores that are stored or computed; a sample below is rejected by name."""

    min_aesthetic_score: float | None = semantic(
        None, "in [0, 10], on aesthetic_scale", ge=0, le=10
    )
    aesthetic_scale: Literal["v1", "v2"] = semantic("v2", "the scale of min_aesthetic_score")
    max_watermark_prob: float | None = semantic(None, "in [0, 1]", ge=0, le=1)
    max_unsafe_prob: float | None = semantic(None, "in [0, 1]", ge=0, le=1)
    min_clip_similarity: float | None = semantic(None, "cosine, in [-1, 1]", ge=-1, le=1)
    use_computed: Literal["unknown", "always", "never"] = semantic(
        "unknown",
        "where a computed score takes the stored one's place: where that is unknown, always, never",
    )
    on_unknown: Literal["keep", "drop"] = semantic(
        "drop", "a sample whose score is unknown while its threshold is on"
    )
    near_duplicate_cosine: float | None = semantic(
        None,
        "images closer than this are one; the highest aesthetic score stays, then the smallest id",
        gt=0,
        le=1,
    )
    mismatches: MismatchConfig | None = semantic(
        None, "pairs whose image is not what the caption says: {} for the defaults, null: not asked"
    )


class ScoringConfig(StrictModel):
    """Embeddings and scores of curated datasets."""

    clip: ClipConfig = semantic(description="the model that embeds images and captions")
    heads: dict[str, HeadConfig] = semantic(
        default_factory=dict, description="scores to compute from image embeddings, by name"
    )
    index: IndexConfig = operational(default_factory=IndexConfig, description="search")

    @model_validator(mode="after")
    def _one_head_per_column(self) -> ScoringConfig:
        filled: dict[str, str] = {}
        for name, head in self.heads.items():
            if head.score in filled:
                raise ValueError(f"heads {filled[head.score]} and {name} both give {head.score}")
            filled[head.score] = name
        return self


class PruneConfig(StrictModel):
    """What is taken out of a published version: copies, and what evaluation sets hold."""

    duplicates: DuplicateConfig = semantic(
        default_factory=DuplicateConfig, description="which copies go; same_url counts for nothing"
    )
    decontaminate: DecontaminationConfig = semantic(
        default_factory=DecontaminationConfig, description="evaluation sets to keep out"
    )


class ModelPreferenceConfig(StrictModel):
    """The preference score by a model of human choices: offset + scale x the cosine of an image
    with the caption that is trained on."""

    clip: ClipConfig = semantic(
        description="a CLIP trained on what people chose, such as HPS v2 (scale 100 gives its own "
        "figures, 20 to 35) or PickScore"
    )
    scale: float = semantic(100.0, "factor on the cosine")
    offset: float = semantic(0.0, "added")
    unknown: float | None = semantic(None, "the score of an image that cannot be embedded")


class DerivedConfig(StrictModel):
    """A version of a curated dataset by other thresholds, without copies, with captions, or with
    preference scores by a model; stages take it like a dataset. What is asked for is done in this
    order.

    Several may come from one dataset: it is fetched and scored once.
    """

    dataset: str = semantic(description="the curated dataset it is made from")
    keep: RefilterConfig | None = semantic(
        None, "thresholds on stored and computed scores (section `scoring`); null: all stay"
    )
    prune: PruneConfig | None = semantic(
        None, "copies and evaluation sets to take out; null: all stay"
    )
    caption: bool = semantic(
        False, "whether its images, those that stay, get captions (section `captioning`)"
    )
    preference: ModelPreferenceConfig | None = semantic(
        None, "the model that gives those that stay their preference scores; null: as they were"
    )

    @model_validator(mode="after")
    def _derives(self) -> DerivedConfig:
        if not (self.keep or self.prune or self.caption or self.preference):
            raise ValueError(
                "expected `keep`, `prune`, `caption: true` or `preference`, or several; got none"
            )
        return self
