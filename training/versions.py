"""Registered versions and logged models in MLflow, over REST, found by stage key.

Every ``create`` looks before it makes and again when the answer was lost, so a driver that is
killed and run again finds what it made.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from infra.errors import UserError
from infra.tracking_server import (
    TrackingRefused,
    TrackingServer,
    TrackingUnavailable,
    key_values,
    tag_filter,
)

PAGE_SIZE = 200
MAX_TAG_CHARACTERS = 5000
LOCAL_SCHEME = "file://"
MARKED_SCHEME = "atelier-file:"  # MLflow refuses file:// outside its own folder as a source

# Tags of a registered version, all strings.
TAG_STAGE = "stage"
TAG_STAGE_KEY = "stage_key"
TAG_SHA256 = "ckpt_sha256"
TAG_DATASET = "dataset_sha256"  # the stage's own; of each one mixed in: `mixed_in_tag`
TAG_GATE = "gate"
TAG_HANDOFF = "handoff"
PASSED = "passed"
COMPLETE = "complete"


@dataclass(frozen=True)
class RegisteredVersion:
    """A version of a registered model; ``uri`` is its published checkpoint."""

    name: str
    version: int
    uri: str
    run_id: str
    tags: Mapping[str, str] = field(default_factory=dict)

    @property
    def sha256(self) -> str:
        """The checkpoint's content digest."""
        return self.tags.get(TAG_SHA256, "")

    @property
    def is_handed_over(self) -> bool:
        """Whether it passed its gate and the driver finished publishing it."""
        return self.tags.get(TAG_GATE) == PASSED and self.tags.get(TAG_HANDOFF) == COMPLETE


Made = TypeVar("Made")


def find_versions(server: TrackingServer, name: str, stage_key: str) -> list[RegisteredVersion]:
    """The versions that carry a stage key, oldest first: more than one when it was trained again
    after its files were lost, and came out differently."""
    found = _search(server, f"name = '{_plain(name)}' and {_key_filter(stage_key)}")
    return sorted(found, key=lambda version: version.version)


def all_versions(server: TrackingServer, name: str) -> list[RegisteredVersion]:
    """Every version of a registered model, oldest first; none when it is not registered."""
    found = _search(server, f"name = '{_plain(name)}'")
    return sorted(found, key=lambda version: version.version)


def versions_with_tag(server: TrackingServer, tag: str, value: str) -> list[RegisteredVersion]:
    """Every version of any registered model that has this tag, by model and number."""
    found = _search(server, f"tags.`{tag}` = '{_plain(value)}'")
    return sorted(found, key=lambda version: (version.name, version.version))


def mixed_in_tag(dataset_sha256: str) -> str:
    """The tag that a version has for a dataset that was mixed in; its value is the whole digest."""
    return f"{TAG_DATASET}.{dataset_sha256[:12]}"


def trained_on(server: TrackingServer, dataset_sha256: str) -> list[RegisteredVersion]:
    """Every version that was trained on a dataset version, alone or mixed in."""
    tags = (TAG_DATASET, mixed_in_tag(dataset_sha256))
    found = [each for tag in tags for each in versions_with_tag(server, tag, dataset_sha256)]
    return sorted(found, key=lambda version: (version.name, version.version))


def get_version(server: TrackingServer, name: str, version: int) -> RegisteredVersion:
    """A version by number; ``UserError`` when there is none."""
    query = {"name": name, "version": str(version)}
    try:
        answer = server.call("GET", "mlflow/model-versions/get", query=query)
    except TrackingRefused as error:
        if error.code != "RESOURCE_DOES_NOT_EXIST":
            raise
        known = [str(found.version) for found in all_versions(server, name)]
        raise UserError(
            expected=f"a registered version of {name}",
            got=f"version {version}",
            remedy=f"there are {', '.join(known) or 'none'}",
        ) from error
    return version_from_json(answer["model_version"])


def create_registered_model(server: TrackingServer, name: str) -> None:
    """Have the registered model exist."""
    try:
        server.call("POST", "mlflow/registered-models/create", {"name": name})
    except TrackingRefused as error:
        if error.code != "RESOURCE_ALREADY_EXISTS":
            raise


def create_version(
    server: TrackingServer,
    name: str,
    uri: str,
    run_id: str,
    tags: Mapping[str, str],
    model_id: str | None = None,
) -> RegisteredVersion:
    """The version with these tags' stage key and digest, made when there is none yet."""
    body: dict[str, Any] = {
        "name": name,
        "source": uri.replace(LOCAL_SCHEME, MARKED_SCHEME, 1),
        "run_id": run_id,
        "tags": key_values({key: value[:MAX_TAG_CHARACTERS] for key, value in tags.items()}),
    }
    if model_id is not None:
        body["model_id"] = model_id

    def find() -> RegisteredVersion | None:
        found = find_versions(server, name, tags[TAG_STAGE_KEY])
        return next((each for each in found if each.sha256 == tags[TAG_SHA256]), None)

    def make() -> RegisteredVersion:
        answer = server.call("POST", "mlflow/model-versions/create", body, patience_seconds=0)
        return version_from_json(answer["model_version"])

    return _found_or_made(find, make)


def set_version_tags(server: TrackingServer, version: RegisteredVersion, **tags: str) -> None:
    """Set tags of a version, one call each, in the order given."""
    for key, value in tags.items():
        body = {
            "name": version.name,
            "version": str(version.version),
            "key": key,
            "value": value[:MAX_TAG_CHARACTERS],
        }
        server.call("POST", "mlflow/model-versions/set-tag", body)


def logged_model(
    server: TrackingServer,
    experiment_id: str,
    name: str,
    run_id: str,
    stage_key: str,
    *,
    params: Mapping[str, str],
    tags: Mapping[str, str],
) -> str:
    """The id of the READY logged model of a run and stage key, made when there is none yet."""

    def find() -> str | None:
        body = {
            "experiment_ids": [experiment_id],
            "filter": f"{_key_filter(stage_key)} and source_run_id = '{run_id}'",
            "max_results": 1,
        }
        models = server.call("POST", "mlflow/logged-models/search", body).get("models", [])
        return str(models[0]["info"]["model_id"]) if models else None

    def make() -> str:
        body = {
            "experiment_id": experiment_id,
            "name": name,
            "model_type": "text-to-image",
            "source_run_id": run_id,
            "params": key_values(params),
            "tags": key_values({**tags, TAG_STAGE_KEY: stage_key}),
        }
        answer = server.call("POST", "mlflow/logged-models", body, patience_seconds=0)
        return str(answer["model"]["info"]["model_id"])

    model_id = _found_or_made(find, make)
    ready = {"model_id": model_id, "status": "LOGGED_MODEL_READY"}
    server.call("PATCH", f"mlflow/logged-models/{model_id}", ready)
    return model_id


def _found_or_made(find: Callable[[], Made | None], make: Callable[[], Made]) -> Made:
    """Look, then make once; when the answer to making is lost, look before making again."""
    for _ in range(5):
        found = find()
        if found is not None:
            return found
        try:
            return make()
        except TrackingUnavailable:
            continue  # find() waits for the server
    raise TrackingUnavailable("MLflow keeps failing while it registers; run the command again")


def _search(server: TrackingServer, filter_text: str) -> list[RegisteredVersion]:
    return [version_from_json(raw) for raw in _pages(server, filter_text)]


def _pages(server: TrackingServer, filter_text: str) -> Iterator[Mapping[str, Any]]:
    token = ""
    while True:
        query = {"filter": filter_text, "max_results": str(PAGE_SIZE)}
        if token:
            query["page_token"] = token
        answer = server.call("GET", "mlflow/model-versions/search", query=query)
        yield from answer.get("model_versions", [])
        token = str(answer.get("next_page_token") or "")
        if not token:
            return


def _key_filter(stage_key: str) -> str:
    return tag_filter("tags", {TAG_STAGE_KEY: stage_key})


def _plain(name: str) -> str:
    if any(character in name for character in "'\"`\\"):
        raise UserError(expected="a model name without quotes", got=repr(name))
    return name


def version_from_json(raw: Mapping[str, Any]) -> RegisteredVersion:
    """A version in MLflow's JSON."""
    return RegisteredVersion(
        name=str(raw["name"]),
        version=int(raw["version"]),
        uri=str(raw.get("source", "")).replace(MARKED_SCHEME, LOCAL_SCHEME, 1),
        run_id=str(raw.get("run_id", "")),
        tags={tag["key"]: tag.get("value", "") for tag in raw.get("tags", [])},
    )
