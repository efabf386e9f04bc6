"""The MLflow tracking server over its REST API: no MLflow import, so a re-run costs milliseconds.

Checked against ``mlflow server`` 3.17 and read back with the official client. Every failure is one
of two one-line errors: ``TrackingUnavailable`` (nobody answers; a later try may work) and
``TrackingRefused`` (the server said no; it says why).
"""

from __future__ import annotations

import base64
import json
import math
import os
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from infra import storage
from infra.errors import UserError

CALL_TIMEOUT_SECONDS = 20.0
PATIENCE_SECONDS = 30.0
FIRST_WAIT_SECONDS = 0.2
LONGEST_WAIT_SECONDS = 3.0
PAGE_SIZE = 200
MAX_DIGEST_CHARACTERS = 36
PROXIED_SCHEME = "mlflow-artifacts"
LOOPBACK_HOSTS = ("127.0.0.1", "localhost", "::1")


class TrackingUnavailable(UserError):
    """The tracking server does not answer, or answers that it cannot now."""


class TrackingRefused(UserError):
    """The tracking server refused a call; ``code`` is MLflow's name for why."""

    def __init__(self, message: str, code: str) -> None:
        super().__init__(message)
        self.code = code


@dataclass(frozen=True)
class TrackedRun:
    """An MLflow run as the driver needs it; ``started_at_ms`` is Unix time in milliseconds."""

    run_id: str
    experiment_id: str
    status: str
    artifact_uri: str
    started_at_ms: int
    tags: Mapping[str, str]
    params: Mapping[str, str]
    metrics: Mapping[str, float]
    metric_steps: Mapping[str, int]


@dataclass(frozen=True)
class DatasetInput:
    """A dataset a run read; MLflow keeps at most 36 characters of ``digest``."""

    name: str
    digest: str
    source_uri: str
    tags: Mapping[str, str]

    def to_json(self) -> dict[str, Any]:
        """The REST form; refuses a digest that MLflow would refuse."""
        if len(self.digest) > MAX_DIGEST_CHARACTERS:
            raise ValueError(f"digest of {len(self.digest)} characters, MLflow takes 36")
        return {
            "tags": key_values(self.tags),
            "dataset": {
                "name": self.name,
                "digest": self.digest,
                "source_type": "s3" if self.source_uri.startswith("s3:") else "local",
                "source": json.dumps({"uri": self.source_uri}),
            },
        }


def key_values(pairs: Mapping[str, str]) -> list[dict[str, str]]:
    """A mapping as MLflow's list of key and value."""
    return [{"key": key, "value": value} for key, value in pairs.items()]


def json_number(value: float) -> float | str:
    """A metric's value for JSON: NaN and infinities travel by name."""
    if math.isfinite(value):
        return float(value)
    return "NaN" if math.isnan(value) else ("Infinity" if value > 0 else "-Infinity")


def now_ms() -> int:
    """Unix time in milliseconds, MLflow's clock."""
    return time.time_ns() // 1_000_000


class TrackingServer:
    """One MLflow server. Calls wait up to ``patience_seconds`` for a server that is away.

    Credentials come from ``MLFLOW_TRACKING_USERNAME`` with ``MLFLOW_TRACKING_PASSWORD``, or
    ``MLFLOW_TRACKING_TOKEN``, read at call time.
    """

    def __init__(self, tracking_uri: str, *, patience_seconds: float = PATIENCE_SECONDS) -> None:
        parts = urllib.parse.urlsplit(tracking_uri)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise UserError(
                expected="an MLflow server's address like http://127.0.0.1:5000",
                got=repr(tracking_uri),
                remedy="set MLFLOW_TRACKING_URI, or run `atelier up`",
            )
        self.uri = tracking_uri.rstrip("/")
        self.patience_seconds = patience_seconds
        proxies: dict[str, str] | None = {} if parts.hostname in LOOPBACK_HOSTS else None
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler(proxies))

    # --- transport -------------------------------------------------------------------------------

    def call(
        self,
        method: str,
        path: str,
        body: Mapping[str, Any] | None = None,
        *,
        query: Mapping[str, str] | None = None,
        patience_seconds: float | None = None,
    ) -> dict[str, Any]:
        """One REST call below ``/api/2.0/``; returns the answer's JSON object.

        Repeated while the server is away, up to ``patience_seconds`` (the server's own when
        ``None``; 0 tries once). A repeated call may reach the server twice.
        """
        data = None if body is None else json.dumps(body).encode()
        raw = self._patiently(method, path, data, "application/json", query, patience_seconds)
        answer = json.loads(raw) if raw.strip() else {}
        return answer if isinstance(answer, dict) else {}

    def _patiently(
        self,
        method: str,
        path: str,
        data: bytes | None,
        content_type: str,
        query: Mapping[str, str] | None,
        patience_seconds: float | None,
    ) -> bytes:
        patience = self.patience_seconds if patience_seconds is None else patience_seconds
        give_up_at = time.monotonic() + patience
        wait_seconds = FIRST_WAIT_SECONDS
        while True:
            try:
                return self._send(method, path, data, content_type, query)
            except TrackingUnavailable:
                if time.monotonic() + wait_seconds > give_up_at:
                    raise
            time.sleep(wait_seconds)
            wait_seconds = min(2 * wait_seconds, LONGEST_WAIT_SECONDS)

    def _send(
        self,
        method: str,
        path: str,
        data: bytes | None,
        content_type: str,
        query: Mapping[str, str] | None,
    ) -> bytes:
        address = f"{self.uri}/api/2.0/{path}"
        if query:
            address += "?" + urllib.parse.urlencode(query)
        headers = {"Content-Type": content_type, **_authorization()}
        request = urllib.request.Request(address, data=data, method=method, headers=headers)
        try:
            with self._opener.open(request, timeout=CALL_TIMEOUT_SECONDS) as response:
                return bytes(response.read())
        except urllib.error.HTTPError as error:
            with error:
                raise self._refusal(error, path) from error
        except (OSError, urllib.error.URLError, ValueError) as error:
            reason = getattr(error, "reason", None) or error
            raise TrackingUnavailable(
                f"MLflow at {self.uri} does not answer ({reason}); "
                "run `atelier up`, or check MLFLOW_TRACKING_URI"
            ) from error

    def _refusal(self, error: urllib.error.HTTPError, path: str) -> UserError:
        text = error.read(4096).decode("utf-8", "replace")
        try:
            answer = json.loads(text)
        except ValueError:
            answer = {}
        code = str(answer.get("error_code", "")) if isinstance(answer, dict) else ""
        message = str(answer.get("message", text)) if isinstance(answer, dict) else text
        if error.code in (429, 500, 502, 503, 504) and code != "INVALID_PARAMETER_VALUE":
            return TrackingUnavailable(
                f"MLflow at {self.uri} answered {error.code} to {path}: {message[:300]}"
            )
        if error.code in (401, 403):
            message += (
                "; check MLFLOW_TRACKING_USERNAME and _PASSWORD, and the server's --allowed-hosts"
            )
        return TrackingRefused(
            f"MLflow at {self.uri} refused {path} ({error.code} {code}): {message[:600]}", code
        )

    # --- experiments and runs --------------------------------------------------------------------

    def experiment_id(self, name: str) -> str:
        """The id of the experiment called ``name``, made when it is not there."""
        for _ in range(2):
            try:
                found = self.call(
                    "GET", "mlflow/experiments/get-by-name", query={"experiment_name": name}
                )["experiment"]
            except TrackingRefused as error:
                if error.code != "RESOURCE_DOES_NOT_EXIST":
                    raise
            else:
                return self._active_experiment(found)
            try:
                made = self.call("POST", "mlflow/experiments/create", {"name": name})
                return str(made["experiment_id"])
            except TrackingRefused as error:
                if error.code != "RESOURCE_ALREADY_EXISTS":
                    raise
        raise UserError(f"MLflow experiment {name!r} appears and disappears; try again")

    @staticmethod
    def _active_experiment(found: Mapping[str, Any]) -> str:
        if found.get("lifecycle_stage") == "deleted":
            raise UserError(
                expected=f"the MLflow experiment {found['name']!r} to be active",
                got="deleted",
                remedy=f"mlflow experiments restore -x {found['experiment_id']}",
            )
        return str(found["experiment_id"])

    def create_run(self, experiment_id: str, name: str, tags: Mapping[str, str]) -> TrackedRun:
        """A new RUNNING run. Sent once: when the answer is lost, look for it by tag first."""
        body = {
            "experiment_id": experiment_id,
            "run_name": name,
            "start_time": now_ms(),
            "tags": key_values(tags),
        }
        return _run(self.call("POST", "mlflow/runs/create", body, patience_seconds=0)["run"])

    def find_or_create_run(
        self, experiment_id: str, name: str, identity: Mapping[str, str], tags: Mapping[str, str]
    ) -> TrackedRun:
        """The oldest run that carries the tags ``identity``, made with ``tags`` when none does."""
        give_up_at = time.monotonic() + self.patience_seconds
        while True:
            found = self.search_runs(experiment_id, identity)
            if found:
                return found[0]
            try:
                return self.create_run(experiment_id, name, {**tags, **identity})
            except TrackingUnavailable:
                if time.monotonic() > give_up_at:
                    raise
                time.sleep(FIRST_WAIT_SECONDS)

    def search_runs(self, experiment_id: str, tags: Mapping[str, str]) -> list[TrackedRun]:
        """The runs that carry all ``tags``, oldest first, up to 200."""
        body = {
            "experiment_ids": [experiment_id],
            "filter": tag_filter("tags", tags),
            "max_results": PAGE_SIZE,
            "order_by": ["attributes.start_time ASC"],
        }
        return [_run(run) for run in self.call("POST", "mlflow/runs/search", body).get("runs", [])]

    def get_run(self, run_id: str, *, patience_seconds: float | None = None) -> TrackedRun:
        """A run by id."""
        query = {"run_id": run_id}
        answer = self.call("GET", "mlflow/runs/get", query=query, patience_seconds=patience_seconds)
        return _run(answer["run"])

    def update_run(self, run_id: str, status: str) -> None:
        """Set RUNNING, FINISHED, FAILED or KILLED; the last three also set the end time."""
        body: dict[str, Any] = {"run_id": run_id, "status": status}
        if status != "RUNNING":
            body["end_time"] = now_ms()
        self.call("POST", "mlflow/runs/update", body)

    def log_batch(
        self,
        run_id: str,
        *,
        metrics: Sequence[Mapping[str, Any]] = (),
        params: Mapping[str, str] | None = None,
        tags: Mapping[str, str] | None = None,
        patience_seconds: float | None = None,
    ) -> None:
        """Metrics (``key, value, timestamp, step``; at most 1000), params and tags (100 each).

        The same metric or param sent twice is kept once; a param cannot change its value.
        """
        body = {
            "run_id": run_id,
            "metrics": list(metrics),
            "params": key_values(params or {}),
            "tags": key_values(tags or {}),
        }
        self.call("POST", "mlflow/runs/log-batch", body, patience_seconds=patience_seconds)

    def log_inputs(
        self, run_id: str, datasets: Sequence[DatasetInput], model_ids: Sequence[str] = ()
    ) -> None:
        """What a run reads: datasets, and logged models by id. Saying it twice changes nothing."""
        body = {
            "run_id": run_id,
            "datasets": [dataset.to_json() for dataset in datasets],
            "models": [{"model_id": model_id} for model_id in model_ids],
        }
        self.call("POST", "mlflow/runs/log-inputs", body)

    def log_outputs(self, run_id: str, model_ids: Sequence[str], step: int) -> None:
        """The logged models a run made, at a step; MLflow refuses one said twice, so look first."""
        run = self.call("GET", "mlflow/runs/get", query={"run_id": run_id})["run"]
        known = {each["model_id"] for each in run.get("outputs", {}).get("model_outputs", [])}
        models = [{"model_id": each, "step": step} for each in model_ids if each not in known]
        if models:
            self.call("POST", "mlflow/runs/outputs", {"run_id": run_id, "models": models})

    def put_artifact(
        self, run: TrackedRun, path: str, data: bytes, *, patience_seconds: float | None = None
    ) -> None:
        """Store a small file beside a run, where the server keeps the run's artifacts."""
        if ".." in path.split("/") or path.startswith("/"):
            raise ValueError(f"artifact path {path!r} is not relative")
        root = urllib.parse.urlsplit(run.artifact_uri)
        if root.scheme in ("s3", "file"):
            storage.write_bytes(storage.join(run.artifact_uri, path), data)
            return
        if root.scheme != PROXIED_SCHEME:
            raise UserError(
                expected="a run whose artifacts the MLflow server serves, or an s3:// address",
                got=run.artifact_uri,
                remedy="start the server with --serve-artifacts",
            )
        target = urllib.parse.quote(f"{root.path.strip('/')}/{path}")
        self._patiently(
            "PUT",
            f"mlflow-artifacts/artifacts/{target}",
            data,
            "application/octet-stream",
            None,
            patience_seconds,
        )


def tag_filter(kind: str, tags: Mapping[str, str]) -> str:
    """MLflow's search filter for equal tags; ``kind`` is ``tags``, or ``tag`` for versions."""
    for key, value in tags.items():
        if any(character in key + value for character in "'\"`\\"):
            raise ValueError(f"tag {key}={value!r} cannot be searched: it holds a quote")
    return " and ".join(f"{kind}.`{key}` = '{value}'" for key, value in tags.items())


def _authorization() -> dict[str, str]:
    token = os.environ.get("MLFLOW_TRACKING_TOKEN")
    if token:
        return {"Authorization": f"Bearer {token}"}
    user = os.environ.get("MLFLOW_TRACKING_USERNAME")
    if not user:
        return {}
    secret = f"{user}:{os.environ.get('MLFLOW_TRACKING_PASSWORD', '')}"
    return {"Authorization": "Basic " + base64.b64encode(secret.encode()).decode()}


def _run(answer: Mapping[str, Any]) -> TrackedRun:
    info, data = answer["info"], answer.get("data", {})
    metrics = data.get("metrics", [])
    return TrackedRun(
        run_id=str(info["run_id"]),
        experiment_id=str(info["experiment_id"]),
        status=str(info.get("status", "")),
        artifact_uri=str(info.get("artifact_uri", "")),
        started_at_ms=int(info.get("start_time", 0)),
        tags={tag["key"]: tag.get("value", "") for tag in data.get("tags", [])},
        params={param["key"]: param.get("value", "") for param in data.get("params", [])},
        metrics={metric["key"]: float(metric["value"]) for metric in metrics},
        metric_steps={metric["key"]: int(metric.get("step", 0)) for metric in metrics},
    )
