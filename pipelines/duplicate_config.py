"""Which images and captions must not be there: copies, and what evaluation sets hold."""

from __future__ import annotations

from infra.config import StrictModel, operational, semantic


class PerceptualConfig(StrictModel):
    """What looks the same. Any size, encoding, brightness and contrast count as the same."""

    min_similarity: float = semantic(
        0.8,
        "cosine of the low frequencies, in [0.7, 1], from which two images are the same",
        ge=0.7,
        le=1,
    )
    max_crop_ratio: float = semantic(
        0.1,
        "of each side that may be cut off, in [0, 0.15]; 0 is eight times as fast",
        ge=0,
        le=0.15,
    )
    mirrored: bool = semantic(False, "an image and its mirror image are the same")


class DuplicateConfig(StrictModel):
    """Which samples count as the same. The highest aesthetic score stays, then the smallest id."""

    same_url: bool = semantic(True, "rows with the same URL, however it is spelled")
    same_bytes: bool = semantic(True, "images with the same sha256 as fetched")
    perceptual: PerceptualConfig | None = semantic(
        None, "images that look the same: {} for the defaults, null: not asked"
    )
    against: list[str] = operational(
        default_factory=list,
        description="manifest.json of published versions whose images must not come again, by "
        "bytes and, with perceptual, by looks; known by their versions; reason duplicate_of_other",
    )
    placeholder_captions: int | None = semantic(
        None,
        "an image whose very bytes so many different captions share stands for one that is gone "
        "(removed, hotlinked, parked): no copy stays; null: not asked",
        ge=2,
    )

    @property
    def compares_images(self) -> bool:
        """Whether images of the same dataset are compared."""
        asked = (self.perceptual, self.placeholder_captions)
        return self.same_bytes or any(each is not None for each in asked)


class DecontaminationConfig(StrictModel):
    """Evaluation sets that must not be trained on: `contaminated` and `contaminated_image`."""

    prompts: list[str] = operational(
        default_factory=list,
        description="files of prompts (.txt: a line each; .jsonl, .parquet: prompt, caption or "
        "text), paths or URIs, known by their content",
    )
    images: list[str] = operational(
        default_factory=list,
        description="images, folders of images, or a published version's manifest.json (the "
        "quickest for large sets), paths or URIs, known by their content",
    )
    images_alike: bool = semantic(
        True,
        "images that look like one of them go, too (as duplicates.perceptual says, or its "
        "defaults); false: the same bytes only",
    )
    min_prompt_likeness: float | None = semantic(
        0.75,
        "captions that share so much of a prompt's weighted letter trigrams, in (0, 1]; null: only "
        "the same words",
        gt=0,
        le=1,
    )
