"""Datasets that a recipe writes as one and that are stored at several sizes.

``also_sizes_px: [512]`` of a dataset ``photos`` stands for a second dataset, ``photos-512``, that
differs in ``resize`` alone. From here on it is a dataset like any: planned, curated (from the same
fetch), verified and named by stages.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import TypeAdapter, ValidationError

from app.recipe_problems import Problem, problem
from pipelines.config import CurationConfig

KEY = "also_sizes_px"


def with_sizes(values: Mapping[str, Any]) -> tuple[dict[str, Any], list[Problem], frozenset[str]]:
    """The recipe's values with every size written out, what is wrong, and the new names.

    What is not a list of sizes stays where it is, for the validation to tell.
    """
    datasets = values.get("datasets")
    if not isinstance(datasets, dict):
        return dict(values), [], frozenset()
    written: dict[str, Any] = {}
    problems: list[Problem] = []
    added: set[str] = set()
    for name, dataset in datasets.items():
        sizes = _sizes(dataset)
        written[name] = {k: v for k, v in dataset.items() if k != KEY} if sizes else dataset
        for size_px in sizes:
            other = f"{name}-{size_px}"
            if other in datasets or other in added:
                line = f"{size_px} stands for a dataset {other}, which is there already; remove one"
                problems.append(problem(("datasets", name, KEY), line))
                continue
            added.add(other)
            written[other] = _at_size(written[name], size_px)
    return {**values, "datasets": written}, problems, frozenset(added)


def _sizes(dataset: Any) -> list[int]:
    sizes = dataset.get(KEY) if isinstance(dataset, dict) else None
    kind: Any = CurationConfig.model_fields[KEY].annotation
    try:
        found: list[int] = TypeAdapter(kind).validate_python(sizes or [], strict=True)
    except ValidationError:
        return []
    return found


def _at_size(dataset: Mapping[str, Any], size_px: int) -> dict[str, Any]:
    resize = dataset.get("resize")
    if resize is not None and not isinstance(resize, dict):
        return dict(dataset)  # told once, at the dataset as written
    own = {"image_size_px": size_px, "if_smaller": "reject"}
    return {**dataset, "resize": {**(resize or {}), **own}}
