"""What each way a row can end means, in words for a person."""

from __future__ import annotations

from pipelines.ledger import COMMITTED

# Reasons that are given before anything is asked of the web.
BEFORE_FETCH = frozenset(
    {
        "takedown",
        "no_url",
        "unknown_size",
        "too_small",
        "aspect_ratio",
        "unknown_aesthetic_score",
        "low_aesthetic_score",
        "unknown_watermark_prob",
        "watermarked",
        "unknown_unsafe_prob",
        "unsafe",
        "unknown_clip_similarity",
        "low_clip_similarity",
        "unknown_language",
        "other_language",
        "caption_too_long",
        "personal_data",
        "no_caption",
        "short_caption",
        "contaminated",
        "duplicate_row",
        "duplicate_url",
        "url",
        "scheme",
        "port",
    }
)
WORDS = {
    "rows_in": "rows of the metadata",
    COMMITTED: "samples of this version",
    "takedown": "removed on request, or on a block list",
    "no_url": "no address",
    "unknown_size": "width or height unknown",
    "too_small": "smaller than asked for, by the metadata",
    "aspect_ratio": "longer or wider than asked for, by the metadata",
    "unknown_aesthetic_score": "no aesthetic score",
    "low_aesthetic_score": "aesthetic score below the threshold",
    "unknown_watermark_prob": "no watermark probability",
    "watermarked": "watermark probability above the threshold",
    "unknown_unsafe_prob": "no probability of being unsafe",
    "unsafe": "probability of being unsafe above the threshold",
    "unknown_clip_similarity": "no similarity of image and caption",
    "low_clip_similarity": "similarity of image and caption below the threshold",
    "unknown_language": "language unknown",
    "other_language": "another language than those asked for",
    "caption_too_long": "caption longer than the bound",
    "personal_data": "personal data in the caption",
    "no_caption": "nothing left of the caption",
    "short_caption": "caption of fewer words than asked for",
    "contaminated": "caption like an evaluation prompt",
    "contaminated_image": "like an image of an evaluation set",
    "duplicate_row": "the same address and caption as another row",
    "duplicate_url": "the same address as another row",
    "url": "no address that may be asked",
    "scheme": "neither http nor https",
    "port": "a port that is not asked",
    "address": "the host is not on the public internet",
    "redirect": "led to where nothing is asked",
    "robots_txt": "robots.txt says no",
    "tdm_reservation": "rights to text and data mining are reserved",
    "optout": "the server's headers say no",
    "encoding": "a content encoding that is not read",
    "format": "not an image of a format that is decoded",
    "pixels": "more pixels than are decoded",
    "image_too_small": "smaller than asked for, once fetched",
    "image_aspect_ratio": "longer or wider than asked for, once fetched",
    "decode": "does not decode",
    "image_check": "a measure of the pixels out of its range",
    "mismatched": "the image is not what its caption says, by its embedding",
    "placeholder": "a picture that stands for many others",
    "duplicate_of_other": "like an image of another version",
    "duplicate_image": "the same bytes as another image",
    "near_duplicate": "looks like another image",
    "hash_mismatch": "not the bytes that the metadata recorded",
    "lost": "was damaged on storage and could not be made again",
}


def words_for(outcome: str) -> str:
    """A line for a reason, or for ``failed:<cause>``; the name itself when it has none."""
    cause = outcome.removeprefix("failed:")
    if cause != outcome:
        return f"could not be fetched: {cause.replace('_', ' ')}"
    return WORDS.get(outcome, outcome.replace("_", " "))
