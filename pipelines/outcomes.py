"""How the rows of a fetch ended: with a stored image, or without, and why."""

from __future__ import annotations

import logging
from dataclasses import asdict, dataclass

import polars as pl

from infra.digests import canonical_json
from pipelines.connection import Failed
from pipelines.guard import Rejected
from pipelines.images import StoredImage
from pipelines.ledger import FAILED, REJECTED

MAX_DETAIL_CHARS = 200

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class NotStored:
    """How a row ended that has no image."""

    disposition: str
    reason: str
    retryable: bool
    detail: str


# What the task adds to a canonical row. ``disposition`` is null for rows that have an image.
OUTCOME_SCHEMA: dict[str, pl.DataType] = {
    "disposition": pl.String(),
    "reason": pl.String(),
    "retryable": pl.Boolean(),
    "detail": pl.String(),
    "sha256": pl.String(),
    "md5": pl.String(),
    "image_width_px": pl.Int32(),
    "image_height_px": pl.Int32(),
    "original_width_px": pl.Int32(),
    "original_height_px": pl.Int32(),
    "crop_left_px": pl.Int32(),
    "crop_top_px": pl.Int32(),
    "offset": pl.Int64(),
    "num_bytes": pl.Int64(),
    "signature": pl.Binary(),
    "measures": pl.String(),
}


def outcome_columns(outcome: StoredImage | NotStored | None, offset: int = 0) -> dict[str, object]:
    """The outcome under the names of ``OUTCOME_SCHEMA``; the rest is null."""
    if outcome is None:
        return {}
    if isinstance(outcome, NotStored):
        return asdict(outcome)
    return {
        "sha256": outcome.sha256,
        "md5": outcome.md5,
        "image_width_px": outcome.width_px,
        "image_height_px": outcome.height_px,
        "original_width_px": outcome.original_width_px,
        "original_height_px": outcome.original_height_px,
        "crop_left_px": outcome.crop_left_px,
        "crop_top_px": outcome.crop_top_px,
        "offset": offset,
        "num_bytes": len(outcome.data),
        "signature": outcome.signature,
        "measures": canonical_json(outcome.measures).decode() if outcome.measures else None,
    }


def not_stored(error: Exception) -> NotStored:
    """What nobody foresaw fails this row only."""
    if isinstance(error, Rejected):
        return NotStored(REJECTED, error.reason, False, error.detail[:MAX_DETAIL_CHARS])
    if isinstance(error, Failed):
        return NotStored(FAILED, error.cause, error.retryable, error.detail[:MAX_DETAIL_CHARS])
    logger.error("unforeseen in one image", exc_info=error)
    return NotStored(FAILED, "internal_error", True, type(error).__name__)
