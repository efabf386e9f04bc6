"""Where things are stored and tracked: this machine's own services, or those that a recipe names.

A verb that is given a recipe connects to what that names. One that is about stored things asks
``place_of``, which finds in the records of the runs here whose they are.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from urllib.parse import unquote, urlsplit

from pydantic import ValidationError

from app.recipe import ServicesConfig
from app.status import recorded_services
from infra.config import atelier_home
from infra.environment import credentials
from infra.errors import UserError
from infra.tracking_server import TrackingServer

Say = Callable[[str], None]
_IN_A_STORE = re.compile(
    r"(.+)/(?:datasets/[^/]+/[0-9a-f]{64}/manifest\.json|models/[^/]+/[0-9a-f]{64})"
)
# What says whose S3 is meant, besides a key: see botocore's chain of credentials.
_ACCOUNTS = (
    "AWS_PROFILE",
    "AWS_ENDPOINT_URL_S3",
    "AWS_ENDPOINT_URL",
    "AWS_WEB_IDENTITY_TOKEN_FILE",
    "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI",
    "AWS_CONTAINER_CREDENTIALS_FULL_URI",
)


@dataclass(frozen=True)
class Place:
    """A store and its MLflow server, None where nobody says which; ``environment`` holds the keys.

    ``is_local``: they are this machine's own. ``is_recorded``: a recipe, or a run here, says that
    the two belong together.
    """

    home: Path
    store_uri: str
    tracking_uri: str | None
    is_local: bool
    environment: Mapping[str, str] = field(repr=False)
    is_recorded: bool = True

    @property
    def server(self) -> TrackingServer:
        """A client of MLflow; ``UserError`` where nobody says which server it is."""
        if self.tracking_uri is None:
            raise UserError(
                expected=f"a run of this home that stored in {self.store_uri}, whose record names "
                "its MLflow server",
                got="none",
                remedy="set MLFLOW_TRACKING_URI, or set ATELIER_HOME to the home that stores there",
            )
        return TrackingServer(self.tracking_uri)

    def local_path(self, uri: str) -> str | None:
        """The path on this machine of an object's address, when the store lies here."""
        parts = urlsplit(uri)
        if parts.scheme == "file":
            return unquote(parts.path)
        if self.is_local and uri.startswith("s3://"):
            return str(self.home / "s3" / uri.removeprefix("s3://"))
        return None


def connect(config: ServicesConfig, home: Path, say: Say | None) -> Place:
    """Have the services answer (starting this machine's own), with their keys in the environment
    of this process and of its children.
    """
    if config.store_uri is not None and config.tracking_uri is not None:
        environment = credentials(os.environ)
        environment["MLFLOW_TRACKING_URI"] = config.tracking_uri
        os.environ.update(environment)
        return Place(home, config.store_uri, config.tracking_uri, False, environment)
    from infra.local.services import up

    services = up(home, say)
    environment = services.environment()
    os.environ.update(environment)
    return Place(home, services.store_uri, services.mlflow_uri, True, environment)


def place_of(address: str | None, say: Say | None = None) -> Place:
    """The store and the MLflow server that are meant where no recipe is given.

    ``address``: a store, or a manifest or checkpoint in one; None is the newest run's store, and
    before the first run this machine's own. Runs here that stored there say which MLflow belongs
    to it. This machine's own services are started only when they are meant: an S3 address is
    theirs when its bucket has their name and the environment names no other account, whose
    credentials then stay as they are.
    """
    home = atelier_home()
    if address is None:
        return connect(next(_recorded(home), ServicesConfig()), home, say)
    from infra.local.services import STORE_URI

    inside = _IN_A_STORE.fullmatch(address.rstrip("/"))
    store = inside[1] if inside else address.rstrip("/")
    is_others = _names_another_account(home)
    for services in _recorded(home):
        is_own = services.store_uri is None
        if _is_same(services.store_uri or STORE_URI, store) and not (is_own and is_others):
            return connect(services, home, say)
    if f"{store}/".startswith(f"{STORE_URI}/") and not is_others:
        return replace(connect(ServicesConfig(), home, say), store_uri=store)
    environment = credentials(os.environ)
    tracking_uri = environment.get("MLFLOW_TRACKING_URI")
    return Place(home, store, tracking_uri, False, environment, is_recorded=False)


def _recorded(home: Path) -> Iterator[ServicesConfig]:
    """What the runs of this home stored in, the newest first; the default is this machine's own."""
    for path, raw in recorded_services(home):
        try:
            yield ServicesConfig.model_validate(raw)
        except ValidationError as error:
            raise UserError(
                expected=f"a section `services` in {path} as this version writes it",
                got=error.errors(include_url=False)[0]["msg"],
                remedy="give the command that made it again, or remove that run's folder",
            ) from error


def _is_same(store: str, other: str) -> bool:
    return store.rstrip("/") == other.rstrip("/")


def _names_another_account(home: Path) -> bool:
    """Whether the environment names an account, and not the one of this machine's own services."""
    from infra.local.services import access_key_id

    key = os.environ.get("AWS_ACCESS_KEY_ID")
    if key:
        return key != access_key_id(home)
    return any(os.environ.get(name) for name in _ACCOUNTS)
