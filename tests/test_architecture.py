"""Who may import whom, read from the source: the house's walls stand when nobody looks."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("app", "demo", "infra", "model", "pipelines", "training")
MAY_IMPORT = {
    "app": {"demo", "infra", "model", "pipelines", "training"},
    "demo": set(),
    "infra": set(),
    "model": set(),
    "pipelines": {"infra"},
    "training": {"infra", "model"},
}
MODEL_NEEDS = {"PIL", "numpy", "safetensors", "tokenizers", "torch"}
MODEL_MAY_ASK_FOR = {"huggingface_hub"}  # inside the function that needs it, and told when absent
HEAVY = {
    "clip_retrieval",
    "faiss",
    "img2dataset",
    "lightning",
    "mlflow",
    "numpy",
    "open_clip",
    "pandas",
    "PIL",
    "polars",
    "pyarrow",
    "pyspark",
    "ray",
    "safetensors",
    "tokenizers",
    "torch",
    "torchvision",
    "transformers",
    "webdataset",
}
MAX_LINES = 400


def sources(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def every_import(tree: ast.AST) -> Iterator[str]:
    """The full name of every module that is imported anywhere, also inside functions."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"relative import of {node.module}"
            yield str(node.module)


def import_time_imports(body: list[ast.stmt]) -> Iterator[str]:
    """What runs when the module is imported; not functions, not ``if TYPE_CHECKING``."""
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            yield from import_time_imports(node.orelse)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            yield from every_import(node)
        else:
            for name in ("body", "orelse", "finalbody"):
                yield from import_time_imports(getattr(node, name, []))


def top(module: str) -> str:
    return module.split(".")[0]


@pytest.mark.parametrize("package", PACKAGES)
def test_packages_import_only_what_they_may(package: str) -> None:
    allowed = MAY_IMPORT[package] | {package}
    found = [
        f"{path.relative_to(ROOT)} imports {module}"
        for path in sources(package)
        for module in every_import(ast.parse(path.read_bytes()))
        if top(module) in (*PACKAGES, "tests") and top(module) not in allowed
    ]
    assert found == []


def test_the_model_needs_five_packages_and_nothing_else() -> None:
    found = {
        top(module)
        for path in sources("model")
        for module in every_import(ast.parse(path.read_bytes()))
    }
    assert found - MODEL_NEEDS - MODEL_MAY_ASK_FOR - {"model"} <= set(sys.stdlib_module_names)


@pytest.mark.parametrize("path", sources("app"), ids=lambda path: str(path.relative_to(ROOT)))
def test_the_command_imports_nothing_heavy_before_it_must(path: Path) -> None:
    found = [m for m in import_time_imports(ast.parse(path.read_bytes()).body) if top(m) in HEAVY]
    assert found == []


def test_storage_has_one_door() -> None:
    """boto3 and pyarrow's S3 client are infra's own; everyone else asks `infra.storage`."""
    found = [
        f"{path.relative_to(ROOT)} imports {module}"
        for package in set(PACKAGES) - {"infra"}
        for path in sources(package)
        for module in every_import(ast.parse(path.read_bytes()))
        if top(module) in ("boto3", "botocore", "s3fs", "fsspec") or module == "pyarrow.fs"
    ]
    assert found == []


def test_files_stay_readable_in_one_sitting() -> None:
    long = {
        str(path.relative_to(ROOT)): lines
        for package in PACKAGES
        for path in sources(package)
        if (lines := len(path.read_text().splitlines())) > MAX_LINES
    }
    assert long == {}


def test_every_package_is_installed_and_checked() -> None:
    text = (ROOT / "pyproject.toml").read_text() + (ROOT / "Makefile").read_text()
    assert [package for package in PACKAGES if package not in text] == []
    folders = {path.parent.name for path in ROOT.glob("*/__init__.py")}
    assert folders == set(PACKAGES)
