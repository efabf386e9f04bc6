"""Where a run stores and tracks: this machine's own services, or those that a recipe names."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import unquote, urlsplit

from app.recipe import ServicesConfig


@dataclass(frozen=True)
class Place:
    """A store and an MLflow server that answer; ``environment`` holds the keys to them."""

    home: Path
    store_uri: str
    tracking_uri: str
    is_local: bool
    environment: Mapping[str, str] = field(repr=False)

    def local_path(self, uri: str) -> str | None:
        """The path on this machine of an object's address, when the store lies here."""
        parts = urlsplit(uri)
        if parts.scheme == "file":
            return unquote(parts.path)
        if self.is_local and uri.startswith("s3://"):
            return str(self.home / "s3" / uri.removeprefix("s3://"))
        return None


def connect(config: ServicesConfig, home: Path, say: Callable[[str], None]) -> Place:
    """Have the services answer (starting this machine's own), with their keys in the environment
    of this process and of its children.
    """
    if config.store_uri is not None and config.tracking_uri is not None:
        names = [name for name in os.environ if name.startswith(("AWS_", "MLFLOW_"))]
        environment = {name: os.environ[name] for name in names}
        environment["MLFLOW_TRACKING_URI"] = config.tracking_uri
        os.environ.update(environment)
        return Place(home, config.store_uri, config.tracking_uri, False, environment)
    from infra.local.services import up

    services = up(home, say)
    environment = services.environment()
    os.environ.update(environment)
    return Place(home, services.store_uri, services.mlflow_uri, True, environment)
