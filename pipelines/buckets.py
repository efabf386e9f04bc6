"""Aspect buckets: a few sizes of about one area, so that a batch can have one shape uncropped.

An image goes to the bucket whose aspect ratio is nearest its own, is cropped as little as that
takes, and fills it exactly; one that would have to grow is refused. Every shard has the images of
one bucket, and the manifest says of which.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence

from infra.manifest import ShardEntry
from pipelines.config import ResizeConfig

Size = tuple[int, int]


@functools.lru_cache(maxsize=64)
def buckets_of(config: ResizeConfig) -> tuple[Size, ...]:
    """Width and height of every bucket, by rising aspect ratio.

    As listed in ``config.buckets``, or made: sides are multiples of ``bucket_step_px``, the area
    is at most ``image_size_px`` squared and as near it as that allows, and the longer side is at
    most ``max_bucket_ratio`` times the shorter.
    """
    if config.buckets is not None:
        return tuple(sorted(set(config.buckets), key=_by_ratio))
    step, area = config.bucket_step_px, config.image_size_px**2
    found = set[Size]()
    for long in range(config.image_size_px // step * step, area // step + 1, step):
        short = area // long // step * step
        if short == 0 or long > short * config.max_bucket_ratio:
            break
        found |= {(long, short), (short, long)}
    return tuple(sorted(found, key=_by_ratio))


def _by_ratio(size: Size) -> tuple[float, Size]:
    return size[0] / size[1], size


def bucket_of(width_px: int, height_px: int, config: ResizeConfig) -> Size:
    """The bucket with the nearest aspect ratio, as a factor; of two, the narrower."""
    ratio = width_px / height_px
    return min(buckets_of(config), key=lambda size: abs(math.log(size[0] / size[1] / ratio)))


def shortest_side_px(config: ResizeConfig) -> int:
    """The smallest side that an image stored at its full size can have."""
    if config.crop != "bucket":
        return config.image_size_px
    return min(min(size) for size in buckets_of(config))


def moved(
    sizes: Mapping[str, Sequence[int]],
    before: Sequence[ShardEntry],
    after: Sequence[Sequence[ShardEntry]],
) -> dict[str, list[int]]:
    """``sizes`` of shards that were written again: ``before[i]`` became ``after[i]``."""
    return {
        entry.path: list(sizes[old.path])
        for old, new in zip(before, after, strict=True)
        if old.path in sizes
        for entry in new
    }
