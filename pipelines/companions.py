"""Datasets that differ only in how they store an image, and so can share one fetch.

Each is planned, written, published and resumed on its own, and is byte for byte what it would be
alone. While one of them fetches, every body is also stored for those of the others that lack the
partition: they find it staged, as if they had fetched it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from infra.config import semantic_part
from pipelines.config import CurationConfig

# What a dataset decides after its images have arrived.
_OWN_SECTIONS = ("resize", "shards", "preference")


def companions_of(name: str, datasets: Mapping[str, CurationConfig]) -> dict[str, CurationConfig]:
    """Those of ``datasets`` that ask for the same rows and bodies as the one called ``name``."""
    asked = _asked_for(datasets[name])
    return {
        other: config
        for other, config in datasets.items()
        if other != name and _asked_for(config) == asked
    }


def _asked_for(config: CurationConfig) -> dict[str, Any]:
    shared = {
        key: value for key, value in semantic_part(config).items() if key not in _OWN_SECTIONS
    }
    return {
        **shared,
        "metadata": config.metadata,
        "caption_files": config.captions.files,
        "prompts": config.decontaminate.prompts,
        "signs_images": config.signs_images,
        "block": config.block,
    }
