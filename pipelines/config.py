"""What a curation is asked to do. ``None`` switches a threshold off; 0 is a threshold like any."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from infra.config import StrictModel, operational, semantic
from pipelines.caption_config import CaptionConfig
from pipelines.duplicate_config import DecontaminationConfig, DuplicateConfig
from pipelines.image_config import FaceBlurConfig, ImageCheckConfig

# keep: as if it passed; drop: rejected; later: goes on as unknown, for a scorer after the fetch.
OnUnknown = Literal["keep", "drop", "later"]
FormatName = Literal[
    "laion-raw",
    "laion-joined",
    "laion-aesthetic-v1",
    "laion-aesthetics-v2",
    "re-laion",
    "laion-coco",
    "datacomp",
    "coyo",
    "capsfusion",
    "recap-datacomp",
    "pixelprose",
    "journeydb",
    "pick-a-pic",
    "hpd-v2",
    "text-to-image-2m",
    "webdataset",
]
Side = Annotated[int, Field(ge=8, le=8192)]
Port = Annotated[int, Field(ge=1, le=65535)]

MAX_QUALITY = {"jpg": 100, "webp": 100, "png": 9}


class UnknownPolicy(StrictModel):
    """What happens to a row whose value is NULL, NaN or out of range while its filter is on.

    keep: it passes; drop: it is rejected; later: it goes on as unknown, to be scored once fetched.
    With keep and later, the metadata need not have the column at all.
    """

    size: OnUnknown = semantic("drop", "width or height unknown")
    aesthetic_score: OnUnknown = semantic("drop", "aesthetic score unknown")
    watermark_prob: OnUnknown = semantic("drop", "watermark probability unknown")
    unsafe_prob: OnUnknown = semantic("drop", "unsafe probability unknown")
    clip_similarity: OnUnknown = semantic("drop", "CLIP similarity unknown")
    language: OnUnknown = semantic("drop", "language unknown")


class FilterConfig(StrictModel):
    """Thresholds on the metadata, in the order in which they are asked."""

    min_width_px: int | None = semantic(None, "smallest width, px", ge=1)
    min_height_px: int | None = semantic(None, "smallest height, px", ge=1)
    max_aspect_ratio: float | None = semantic(None, "longer side over shorter side, >= 1", ge=1)
    min_aesthetic_score: float | None = semantic(
        None, "in [0, 10], on aesthetic_scale", ge=0, le=10
    )
    aesthetic_scale: Literal["v1", "v2"] = semantic(
        "v2", "v1: LAION's linear predictor (column aesthetic); v2: its MLP (AESTHETIC_SCORE)"
    )
    max_watermark_prob: float | None = semantic(None, "in [0, 1]", ge=0, le=1)
    max_unsafe_prob: float | None = semantic(None, "in [0, 1]", ge=0, le=1)
    min_clip_similarity: float | None = semantic(
        None, "cosine of CLIP ViT-B/32, in [-1, 1]", ge=-1, le=1
    )
    languages: list[str] | None = semantic(
        None, "languages kept, as the metadata's codes (en, de), whatever their case", min_length=1
    )
    max_caption_chars: int | None = semantic(2_000, "longest caption taken, characters", ge=1)
    min_caption_words: int | None = semantic(None, "fewest words of the caption to train on", ge=1)
    unknown: UnknownPolicy = semantic(
        default_factory=UnknownPolicy, description="what unknown values do"
    )


class ResizeConfig(StrictModel):
    """How an image is stored. It is never made larger."""

    image_size_px: int = semantic(
        256, "shorter side after the resize, or the root of a bucket's area, px", ge=8, le=8192
    )
    if_smaller: Literal["keep", "reject"] = semantic(
        "keep",
        "an image whose shorter side is below image_size_px: keep: stored as it is; reject: "
        "image_too_small",
    )
    crop: Literal["square", "none", "bucket"] = semantic(
        "square",
        "square: centre crop to a square first; none: keep the aspect ratio; bucket: centre crop "
        "to the nearest of a few aspect ratios, one per shard",
    )
    buckets: tuple[tuple[Side, Side], ...] | None = semantic(
        None, "[width, height] of every bucket, px; null: made from the next two", min_length=1
    )
    bucket_step_px: int = semantic(64, "sides of made buckets are multiples of it, px", ge=8)
    max_bucket_ratio: float = semantic(2.0, "longer over shorter side of made buckets", ge=1)
    encode_format: Literal["jpg", "webp", "png"] = semantic("jpg", "format of the stored image")
    encode_quality: int = semantic(
        95, "jpg and webp: quality, 1..100; png: compression level, 0..9", ge=0, le=100
    )

    @model_validator(mode="after")
    def _fits_together(self) -> ResizeConfig:
        is_made = self.crop == "bucket" and self.buckets is None
        if is_made and self.bucket_step_px > self.image_size_px:
            raise ValueError(
                f"bucket_step_px is {self.bucket_step_px}, more than image_size_px "
                f"{self.image_size_px}: no bucket has room; lower it"
            )
        if self.buckets is not None and self.crop != "bucket":
            raise ValueError("buckets are given, and crop is not bucket; set it, or remove them")
        highest = MAX_QUALITY[self.encode_format]
        if self.encode_quality > highest:
            raise ValueError(
                f"encode_quality is {self.encode_quality}; "
                f"for {self.encode_format} it ends at {highest}"
            )
        return self


class OptOutConfig(StrictModel):
    """Which ways of saying no are honoured. Each is asked for once per site and Python worker."""

    robots_txt: bool = semantic(
        True, "robots.txt (RFC 9309), in the group of robots_token or of *; reason robots_txt"
    )
    x_robots_tag: bool = semantic(
        True, "X-Robots-Tag: noai, noimageai, noindex, noimageindex, noml; reason optout"
    )
    tdm_reservation: bool = semantic(
        True, "header tdm-reservation and /.well-known/tdmrep.json; reason tdm_reservation"
    )


class FetchConfig(StrictModel):
    """Bounds on one download from the open web."""

    engine: Literal["atelier", "img2dataset"] = semantic(
        "atelier",
        "what decodes, resizes and encodes: atelier: upright sRGB, in a process of its own; "
        "img2dataset: its Downloader and Resizer, behind the same guarded requests",
    )
    max_bytes: int = semantic(20_000_000, "largest body, bytes, as sent and as decoded", ge=1)
    max_pixels: int = semantic(50_000_000, "largest width x height decoded", ge=1)
    on_hash_mismatch: Literal["keep", "reject"] = semantic(
        "keep",
        "a body whose sha256 or md5 is not the one the metadata recorded: keep: stored, and "
        "counted in the manifest; reject: hash_mismatch, and metadata without either are refused",
    )
    max_redirects: int = semantic(3, "redirect hops followed", ge=0, le=20)
    allowed_ports: list[Port] = semantic(
        default_factory=lambda: [80, 443], description="ports a URL may name"
    )
    total_deadline_seconds: float = operational(
        15.0,
        "DNS, connect, TLS, headers and body of one URL, all hops and attempts, seconds",
        gt=0,
    )
    retries: int = operational(2, "further attempts after a passing failure", ge=0, le=20)
    backoff_seconds: float = operational(0.5, "wait before the first retry; doubles", ge=0)
    num_threads: int = operational(16, "downloads at once per Spark task", ge=1, le=1024)
    max_per_host: int = operational(8, "downloads at once per host and Spark task", ge=1)
    max_requests_per_second_per_host: float | None = operational(
        10.0, "per host and Spark task, > 0; hosts of connect_to have no such bound", gt=0
    )
    max_failures_in_a_row: int | None = operational(
        10, "a host that fails so often in a row is left alone for a minute", ge=1
    )
    max_transient_ratio: float = operational(
        0.5,
        "a partition with more passing failures than this is not committed, in [0, 1]",
        ge=0,
        le=1,
    )
    user_agent: str = operational(
        "atelier-curation/0.1 (image-text dataset builder; honours robots.txt and X-Robots-Tag)",
        "what we say we are; add a contact address",
        min_length=1,
        pattern=r"^[\x21-\x7e]+( [\x21-\x7e]+)*$",
    )
    robots_token: str = operational(
        "atelier",
        "our name in robots.txt, and in an X-Robots-Tag rule meant for one agent",
        pattern=r"^[A-Za-z_-]+$",
    )
    opt_outs: OptOutConfig = semantic(
        default_factory=OptOutConfig, description="which opt-outs are honoured"
    )
    connect_to: dict[str, str] = operational(
        default_factory=dict,
        description='"host:port" of a URL -> "address:port" dialled instead, with no address check',
    )

    @field_validator("connect_to")
    @classmethod
    def _exact_pairs(cls, value: dict[str, str]) -> dict[str, str]:
        for place in (*value, *value.values()):
            host, colon, port = place.rpartition(":")
            if not (host and colon and port.isascii() and port.isdigit() and int(port) < 65536):
                raise ValueError(f"connect_to takes host:port, got {place!r}")
        return {key.lower(): target for key, target in value.items()}


class ShardConfig(StrictModel):
    """How large a tar may grow: whichever bound is met first closes it."""

    max_samples: int = semantic(10_000, "samples per shard", ge=1)
    max_bytes: int = semantic(256_000_000, "image, text and json bytes per shard", ge=1)


class PreferenceConfig(StrictModel):
    """preference_score = offset + scale * score, or ``unknown`` without one.

    It is what training gives the network as a micro-condition.
    """

    score: Literal["aesthetic_score", "human_preference"] = semantic(
        "aesthetic_score",
        "what it is made of; human_preference: the share of comparisons that an image won, in "
        "[0, 1] (Pick-a-Pic, HPDv2)",
    )
    scale: float = semantic(1.0, "factor on the score")
    offset: float = semantic(0.0, "added")
    unknown: float | None = semantic(None, "the score of an image whose score is unknown")


class EstimateConfig(StrictModel):
    """What `plan` reckons with before anything is fetched. Nothing here changes the dataset."""

    row_groups: int = operational(
        24, "row groups read as a sample; all are read where there are no more", ge=2, le=10_000
    )
    seed: int = operational(0, "of the draw of row groups", ge=0)
    fetch_success_ratio: float | None = operational(
        None,
        "expected share of the rows asked for over the web that become samples, in (0, 1]; "
        "null: as told by a version of this dataset, by the partitions that a build under way has "
        "fetched, or by another dataset of the store; else all of them",
        gt=0,
        le=1,
    )
    duplicate_ratio: float | None = operational(
        None,
        "expected share of the rows left by the filters that copy another's URL, in [0, 1); "
        "null: counted where every row is read, else as told by this dataset, else none",
        ge=0,
        lt=1,
    )
    bytes_per_pixel: float = operational(
        0.45, "of a stored image, where this dataset has no version yet to measure it by", gt=0
    )
    rows_per_core_second: float = operational(
        250_000.0, "metadata rows read and filtered per core and second", gt=0
    )
    fetches_per_core_second: float | None = operational(
        None,
        "images asked for, checked, encoded and written per core and second; null: as fast as this "
        "dataset, or else another of the store, was; without one, 60",
        gt=0,
    )
    num_cores: int | None = operational(
        None, "cores that will work; null: those of this machine", ge=1
    )
    price_per_core_hour: float | None = operational(
        None, "price of one core for one hour, in any currency; null: no cost is shown", ge=0
    )


class CurationConfig(StrictModel):
    """One dataset: which rows, which images, stored how."""

    metadata: list[str] = operational(
        description="the set's parquet, jsonl or tar files: s3:// or file:// URIs, paths, or globs",
        min_length=1,
    )
    format: FormatName | None = semantic(
        None, "which published schema the metadata has; null: found from its columns"
    )
    image_base_url: str | None = semantic(
        None,
        "put before the image paths of a set that has no URLs (JourneyDB, HPDv2)",
        pattern=r"^https?://.+/$",
    )
    source: str = semantic("laion", "name of the source, stored with every sample", min_length=1)
    swapped_sizes: bool | None = semantic(
        None, "WIDTH and HEIGHT are swapped; null: as the format has them (only raw LAION files do)"
    )
    block: list[str] = operational(
        default_factory=list,
        description="lists of what must never be asked for, known by their content: one address a "
        "line, or domain:, sha256:, sample:, url-sha256:, domain-sha256:; reason takedown",
    )
    partitions: int | None = semantic(
        None, "work units the rows are spread over; null: one per 5000 rows, 8 to 10000", ge=1
    )
    filters: FilterConfig = semantic(default_factory=FilterConfig, description="metadata filters")
    captions: CaptionConfig = semantic(default_factory=CaptionConfig, description="long captions")
    duplicates: DuplicateConfig = semantic(
        default_factory=DuplicateConfig, description="which duplicates are dropped"
    )
    decontaminate: DecontaminationConfig = semantic(
        default_factory=DecontaminationConfig, description="evaluation sets to keep out"
    )
    fetch: FetchConfig = semantic(default_factory=FetchConfig, description="download bounds")
    resize: ResizeConfig = semantic(default_factory=ResizeConfig, description="stored images")
    image_checks: list[ImageCheckConfig] = semantic(
        default_factory=list, description="what is measured of the pixels, and its range"
    )
    blur_faces: FaceBlurConfig | None = semantic(
        None, "faces that are found are blurred: {} for the defaults, null: not looked for"
    )
    also_sizes_px: list[Side] = operational(
        default_factory=list,
        description="further resize.image_size_px, px, from the same fetch: each N becomes a "
        "dataset NAME-N, without the images that are smaller",
    )
    shards: ShardConfig = semantic(default_factory=ShardConfig, description="shard sizes")
    preference: PreferenceConfig = semantic(
        default_factory=PreferenceConfig, description="the preference score written per sample"
    )
    estimate: EstimateConfig = operational(
        default_factory=EstimateConfig, description="what `plan` reckons with"
    )

    @property
    def signs_images(self) -> bool:
        """Whether images are compared by what they look like."""
        evaluation = self.decontaminate
        by_evaluation = bool(evaluation.images) and evaluation.images_alike
        return self.duplicates.perceptual is not None or by_evaluation

    @model_validator(mode="after")
    def _engine_can(self) -> CurationConfig:
        if self.fetch.engine == "atelier":
            return self
        for name, is_asked in {
            "resize.crop: bucket": self.resize.crop == "bucket",
            "also_sizes_px": bool(self.also_sizes_px),
            "duplicates.perceptual or decontaminate.images": self.signs_images,
            "image_checks": bool(self.image_checks),
            "blur_faces": self.blur_faces is not None,
        }.items():
            if is_asked:
                raise ValueError(
                    f"fetch.engine is img2dataset, which has no {name}; remove one of them"
                )
        if self.resize.crop == "square" and self.resize.if_smaller == "keep":
            raise ValueError(
                "fetch.engine is img2dataset, which leaves images below image_size_px as they "
                "are, not square; set resize.if_smaller: reject, or resize.crop: none"
            )
        return self
