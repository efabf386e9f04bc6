"""How many tokens high and wide the images of a shard are.

All images of a shard have one grid: the square of the stage, or that of their aspect bucket.
"""

from __future__ import annotations

import math

from infra.errors import UserError
from infra.manifest import SHARD_SIZES, DatasetManifest
from training.config import CropPolicy

Grid = tuple[int, int]  # height, width, tokens


def grids_of(
    manifest: DatasetManifest, crop: CropPolicy, resolution_px: int, factor: int
) -> dict[str, Grid]:
    """Shard path -> grid; ``factor`` is the side of a token in pixels.

    Raises ``UserError`` when buckets are asked of a dataset that has none.
    """
    if crop != "bucket":
        side = resolution_px // factor
        return dict.fromkeys((shard.path for shard in manifest.shards), (side, side))
    sizes = manifest.attributes.get(SHARD_SIZES, {})
    missing = [shard.path for shard in manifest.shards if shard.path not in sizes]
    if missing:
        raise UserError(
            expected=f"aspect buckets in dataset {manifest.name}, for crop: bucket",
            got=f"{len(missing)} of {len(manifest.shards)} shards without the size of their images",
            remedy="curate it with resize.crop: bucket, or set the stage's crop to center",
        )
    grids = {}
    for shard in manifest.shards:
        width_px, height_px = sizes[shard.path]
        grids[shard.path] = bucket_grid(width_px, height_px, resolution_px, factor)
    return grids


def bucket_grid(width_px: int, height_px: int, resolution_px: int, factor: int) -> Grid:
    """The grid of a bucket: about its shape and no larger than it, nor than ``resolution_px``
    squared in area.

    Sides are even, so that a network that compresses takes them too, and at least two.
    """
    scale = min(1.0, resolution_px / math.sqrt(width_px * height_px))
    # The 1e-9 is for sides that a rounded scale would put just below a multiple.
    height, width = (
        max(2, 2 * math.floor(side_px * scale / (2 * factor) + 1e-9))
        for side_px in (height_px, width_px)
    )
    return height, width
