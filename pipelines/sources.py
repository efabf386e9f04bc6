"""The published schemas of image-text sets, one row each: how a file is known, what a column means.

A column is taken over only where it means what the canonical one means: ``clip_similarity`` is the
cosine of CLIP ViT-B/32 throughout, sizes are those of the image before any resize, hashes are those
of the bytes as downloaded. What is published without saying so (PixelProse's aesthetic scale, the
model behind Recap-DataComp's scores, perceptual hashes) stays out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from infra.errors import UserError
from pipelines.config import FormatName
from pipelines.tar_samples import ADDRESS, HEIGHT, TEXT, WIDTH

Container = Literal["parquet", "jsonl", "tar"]


@dataclass(frozen=True)
class SyntheticColumn:
    """Long captions inside a source. ``model`` is their provenance; a column may name it per row.

    ``prefix`` is a formula every caption begins with, and which is cut.
    """

    column: str
    model: str
    model_column: str | None = None
    prefix: str = ""


@dataclass(frozen=True)
class SourceFormat:
    """One published schema. ``marks`` are columns that, all together, only this one has.

    ``traces``: marks that hint at it by themselves; a file that lacks some of them may be a thinner
    copy. ``columns``: canonical column -> the names it goes by, the first one present wins.
    ``views``: one mapping per image of a record, laid over ``columns`` (pairs have two).
    ``has_paths``: the images are named by paths, to which the recipe's ``image_base_url`` is put in
    front.
    """

    about: str
    marks: frozenset[str]
    columns: Mapping[str, tuple[str, ...]]
    aesthetic: tuple[tuple[str, str], ...] = ()
    synthetic: tuple[SyntheticColumn, ...] = ()
    swapped_sizes: bool = False
    watermark_class: str | None = None
    views: tuple[Mapping[str, tuple[str, ...]], ...] = field(default=({},))
    has_paths: bool = False
    container: Container = "parquet"
    traces: frozenset[str] = frozenset()

    @property
    def needs(self) -> frozenset[str]:
        """Columns without which a file cannot be read as this, even where the recipe says so."""
        return self.marks - self.traces

    @property
    def rows_per_record(self) -> int:
        """Images, and so canonical rows, per record of the file."""
        return len(self.views)


_LAION_COLUMNS: dict[str, tuple[str, ...]] = {
    "url": ("URL",),
    "caption": ("TEXT",),
    "width_px": ("WIDTH",),
    "height_px": ("HEIGHT",),
    "clip_similarity": ("similarity",),
    "unsafe_prob": ("punsafe",),
    "watermark_prob": ("pwatermark",),
    "language": ("LANGUAGE",),
    "recorded_md5": ("md5",),
}
_INSIDE = {"url": (ADDRESS,), "width_px": (WIDTH,), "height_px": (HEIGHT,)}
_V1, _V2 = ("v1", "aesthetic"), ("v2", "AESTHETIC_SCORE")
_BLIP = "BLIP ViT-L/14, chosen by CLIP (LAION-COCO)"


def _pair(side: int) -> dict[str, tuple[str, ...]]:
    return {"url": (f"image_{side}_url",), "human_preference": (f"label_{side}",)}


def _choice(side: int) -> dict[str, tuple[str, ...]]:
    return {"url": (f"file_path_{side}",), "human_preference": (f"human_preference_{side}",)}


SOURCE_FORMATS: dict[FormatName, SourceFormat] = {
    "laion-raw": SourceFormat(
        "LAION-2B raw, whose WIDTH and HEIGHT are exchanged",
        frozenset({"SAMPLE_ID", "URL", "TEXT", "WIDTH", "HEIGHT", "LICENSE", "NSFW"}),
        _LAION_COLUMNS,
        swapped_sizes=True,
        traces=frozenset({"SAMPLE_ID", "LICENSE", "NSFW"}),
    ),
    "laion-joined": SourceFormat(
        "LAION-2B joined with watermark and safety scores; laion-high-resolution",
        frozenset({"URL", "TEXT"}),
        _LAION_COLUMNS,
    ),
    "laion-aesthetic-v1": SourceFormat(
        "LAION-2B aesthetic, laion-art: scores of the linear predictor (v1)",
        frozenset({"URL", "TEXT", "aesthetic"}),
        _LAION_COLUMNS,
        aesthetic=(_V1,),
    ),
    "laion-aesthetics-v2": SourceFormat(
        "LAION aesthetics v2, improved_aesthetics_*: scores of the MLP (v2)",
        frozenset({"URL", "TEXT", "AESTHETIC_SCORE"}),
        _LAION_COLUMNS,
        aesthetic=(_V2,),
    ),
    "re-laion": SourceFormat(
        "Re-LAION, and what img2dataset writes of LAION; other columns are read where they are",
        frozenset({"url", "caption"}),
        {
            "url": ("url",),
            "caption": ("caption",),
            "width_px": ("original_width", "WIDTH", "width"),
            "height_px": ("original_height", "HEIGHT", "height"),
            "clip_similarity": ("similarity",),
            "unsafe_prob": ("punsafe",),
            "watermark_prob": ("pwatermark",),
            "language": ("LANGUAGE", "language"),
            "recorded_sha256": ("sha256",),
            "recorded_md5": ("md5",),
        },
        aesthetic=(_V1, _V2),
    ),
    "laion-coco": SourceFormat(
        "LAION-COCO: alt text and BLIP captions",
        frozenset({"URL", "TEXT", "top_caption"}),
        _LAION_COLUMNS,
        synthetic=(SyntheticColumn("top_caption", _BLIP), SyntheticColumn("all_captions", _BLIP)),
    ),
    "datacomp": SourceFormat(
        "DataComp and CommonPool",
        frozenset({"uid", "url", "text", "clip_b32_similarity_score"}),
        {
            "url": ("url",),
            "caption": ("text",),
            "width_px": ("original_width",),
            "height_px": ("original_height",),
            "clip_similarity": ("clip_b32_similarity_score",),
            "recorded_sha256": ("sha256",),
        },
    ),
    "coyo": SourceFormat(
        "COYO-700M",
        frozenset({"id", "url", "text", "image_phash"}),
        {
            "url": ("url",),
            "caption": ("text",),
            "width_px": ("width",),
            "height_px": ("height",),
            "clip_similarity": ("clip_similarity_vitb32",),
            "unsafe_prob": ("nsfw_score_opennsfw2",),
            "watermark_prob": ("watermark_score",),
        },
        aesthetic=(("v2", "aesthetic_score_laion_v2"),),
    ),
    "capsfusion": SourceFormat(
        "CapsFusion-120M: alt text, BLIP's caption and both fused",
        frozenset({"image_url", "laion_2b", "laion_coco", "capsfusion"}),
        {"url": ("image_url",), "caption": ("laion_2b",)},
        synthetic=(
            SyntheticColumn("laion_coco", _BLIP),
            SyntheticColumn("capsfusion", "CapsFus-LLaMA (CapsFusion)"),
        ),
    ),
    "recap-datacomp": SourceFormat(
        "Recap-DataComp-1B: alt text and LLaVA's caption",
        frozenset({"url", "re_caption", "org_caption"}),
        {"url": ("url",), "caption": ("org_caption",), "recorded_sha256": ("sha256",)},
        synthetic=(SyntheticColumn("re_caption", "LLaVA-1.5-LLaMA3-8B (Recap-DataComp)"),),
    ),
    "pixelprose": SourceFormat(
        "PixelProse: dense captions; its watermark class counts as 1 or 0",
        frozenset({"uid", "url", "vlm_caption"}),
        {
            "url": ("url",),
            "caption": ("original_caption",),
            "width_px": ("original_width",),
            "height_px": ("original_height",),
            "recorded_sha256": ("sha256",),
        },
        synthetic=(
            SyntheticColumn(
                "vlm_caption",
                "Gemini 1.0 Pro Vision (PixelProse)",
                model_column="vlm_model",
                prefix="This image displays:",
            ),
        ),
        watermark_class="watermark_class_id",
    ),
    "journeydb": SourceFormat(
        "JourneyDB: Midjourney's prompts and GPT's captions, images by path",
        frozenset({"img_path", "prompt", "Task2.Caption"}),
        {"url": ("img_path",), "caption": ("prompt",)},
        synthetic=(SyntheticColumn("Task2.Caption", "GPT-3.5 (JourneyDB)"),),
        has_paths=True,
        container="jsonl",
    ),
    "pick-a-pic": SourceFormat(
        "Pick-a-Pic: two images a record, fetched by address; jpg_0 and jpg_1 are not read",
        frozenset({"caption", "image_0_url", "image_1_url", "label_0", "label_1"}),
        {"caption": ("caption",)},
        views=(_pair(0), _pair(1)),
    ),
    "hpd-v2": SourceFormat(
        "HPDv2's choices, one JSON record a line: two images each, by path",
        frozenset({"prompt", "file_path_0", "file_path_1", "human_preference_0"}),
        {"caption": ("prompt",)},
        views=(_choice(0), _choice(1)),
        has_paths=True,
        container="jsonl",
    ),
    "text-to-image-2m": SourceFormat(
        "text-to-image-2M: tars of images, each with a JSON that has its prompt",
        frozenset({ADDRESS, "prompt"}),
        {**_INSIDE, "caption": ("prompt",)},
        container="tar",
    ),
    "webdataset": SourceFormat(
        "any WebDataset of images and captions (.txt); of its JSON nothing is read",
        frozenset({ADDRESS, TEXT}),
        {**_INSIDE, "caption": (TEXT,)},
        container="tar",
    ),
}


def format_of(
    found: Sequence[str],
    container: Container,
    named: FormatName | None,
    file: str,
    *,
    are_sizes_told: bool = False,
) -> FormatName:
    """Which format a file with the columns ``found`` has; a ``UserError`` when it is not one.

    A format whose marks are all among another's gives way to it: joined to aesthetic, for one. What
    has some traces of a set with exchanged sizes is not guessed, unless ``are_sizes_told``.
    """
    columns = set(found)
    if named is not None:
        lacking = sorted(SOURCE_FORMATS[named].needs - columns)
        if lacking or SOURCE_FORMATS[named].container != container:
            raise UserError(
                expected=f"{named} in {file}: {', '.join(lacking) or 'a'} "
                f"{'column' if lacking else SOURCE_FORMATS[named].container + ' file'}",
                got=f"{container} with columns {', '.join(found)}",
                remedy="set `format` to the set's own name, or to null and let it be found",
            )
        return named
    fitting = [
        name
        for name, known in SOURCE_FORMATS.items()
        if known.container == container and known.marks <= columns
    ]
    marks = [SOURCE_FORMATS[name].marks for name in fitting]
    best = [name for name in fitting if not any(SOURCE_FORMATS[name].marks < m for m in marks)]
    thinner = [] if are_sizes_told else _thinner_copies(columns, container, fitting)
    if len(best) == 1 and not thinner:
        return best[0]
    if best:
        raise UserError(
            expected=f"one known schema in {file}",
            got=f"what fits {' and '.join(best + thinner)}",
            remedy="set `format` to the one it is",
        )
    nearest = min(
        (name for name, known in SOURCE_FORMATS.items() if known.container == container),
        key=lambda name: (len(SOURCE_FORMATS[name].marks - columns), -_overlap(name, columns)),
    )
    lacking = sorted(SOURCE_FORMATS[nearest].marks - columns)
    raise UserError(
        expected=f"one of the known schemas in {file} ({', '.join(SOURCE_FORMATS)})",
        got=f"columns {', '.join(found)}; nearest {nearest}, without {', '.join(lacking)}",
        remedy="rename the columns to those of a known schema",
    )


def _thinner_copies(
    columns: set[str], container: Container, fitting: Sequence[FormatName]
) -> list[str]:
    """What else the file may be, with sizes the other way round, and by which columns."""
    return [
        f"in part (by {', '.join(sorted(known.traces & columns))}) {name}: {known.about}"
        for name, known in SOURCE_FORMATS.items()
        if known.swapped_sizes
        and known.container == container
        and name not in fitting
        and known.traces & columns
        and known.needs <= columns
    ]


def _overlap(name: FormatName, columns: set[str]) -> int:
    return len(SOURCE_FORMATS[name].marks & columns)
