"""Environment variables: for a while, and those that are credentials."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

CREDENTIALS = ("AWS_", "MLFLOW_")  # how the names of keys to a store and to MLflow begin


def credentials(environment: Mapping[str, str]) -> dict[str, str]:
    """The variables of ``environment`` that say whose store and MLflow are meant, with what keys.

    They belong in no log: what workers elsewhere need of them is handed to them, not named in
    Ray's runtime environment, which its agents write down.
    """
    return {k: v for k, v in environment.items() if k.startswith(CREDENTIALS)}


@contextmanager
def applied(environment: Mapping[str, str]) -> Iterator[None]:
    """Set these variables in this process, and put back what was there. Not for two threads."""
    before = {name: os.environ.get(name) for name in environment}
    os.environ.update(environment)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
