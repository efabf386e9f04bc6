"""Importing Lightning without what a training worker never uses.

``lightning.pytorch`` imports torchmetrics, and torchmetrics imports torchvision, transformers,
scipy and matplotlib for its image, text and signal metrics wherever they are installed: more
seconds than torch itself takes. Both ask ``lightning_utilities.core.imports.RequirementCache``
what is installed, which asks ``importlib.metadata``. While Lightning is imported here, that one
question is answered "not installed" for the packages below, so the metrics that need them are not
defined, as in an environment without them. The packages themselves stay importable, and every
question asked later is answered truthfully.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError
from types import ModuleType
from typing import Any

UNUSED = frozenset(
    {
        "librosa",
        "lpips",
        "matplotlib",
        "nltk",
        "onnx",
        "onnxruntime",
        "pycocotools",
        "scipy",
        "torch-fidelity",
        "torchaudio",
        "torchvision",
        "transformers",
    }
)


def import_lightning() -> ModuleType:
    """``lightning.pytorch``; imported lean unless it was imported before."""
    if "lightning.pytorch" not in sys.modules:
        with _hidden(UNUSED):
            importlib.import_module("lightning.pytorch")
    return sys.modules["lightning.pytorch"]


@contextmanager
def _hidden(names: frozenset[str]) -> Iterator[None]:
    """Let Lightning's own availability checks miss these distributions and modules.

    Should a later version of lightning_utilities look elsewhere, nothing is hidden and the import
    is slow and complete.
    """
    import lightning_utilities.core.imports as module

    checks: Any = module
    names_asked = ("_version", "module_available", "package_available")
    asked = {name: getattr(checks, name) for name in names_asked if hasattr(checks, name)}
    is_hiding = True

    def is_unused(name: str) -> bool:
        return is_hiding and name.partition(".")[0].lower().replace("_", "-") in names

    def version(name: str) -> Any:
        if is_unused(name):
            raise PackageNotFoundError(name)
        return asked["_version"](name)

    def module_available(path: str) -> Any:
        return not is_unused(path) and asked["module_available"](path)

    def package_available(name: str) -> Any:
        return not is_unused(name) and asked["package_available"](name)

    answers = dict(zip(names_asked, (version, module_available, package_available), strict=True))
    for name in asked:
        setattr(checks, name, answers[name])
    try:
        yield
    finally:
        is_hiding = False  # for whoever took a reference meanwhile
        for name, function in asked.items():
            setattr(checks, name, function)
