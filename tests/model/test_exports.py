"""The names that the rest of the house, and anyone's notebook, may rely on."""

import subprocess
import sys

import model

ALLOWED = {"torch", "safetensors", "tokenizers", "numpy", "PIL"}
REFUSED = {"ray", "mlflow", "lightning", "torchvision", "transformers", "diffusers", "pydantic"}


def test_every_exported_name_exists() -> None:
    assert sorted(model.__all__, key=str.lower) == sorted(set(model.__all__), key=str.lower)
    assert all(hasattr(model, name) for name in model.__all__)


def test_importing_brings_in_nothing_heavy() -> None:
    code = "import sys, model; print(' '.join({name.split('.')[0] for name in sys.modules}))"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120
    )
    loaded = set(result.stdout.split())
    assert loaded >= ALLOWED
    assert not loaded & REFUSED
