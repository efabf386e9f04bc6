"""The MLflow tracking server in one process: ``python -m infra.local.mlflow_server PORT FOLDER``.

``mlflow server`` imports MLflow twice, in the command and in the uvicorn child it starts: twice
the memory and twice the start time (7.3 s against 3.4 s here). This does what the command does,
in the process that serves. When MLflow's names have moved, the command itself is run.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

from infra.local.backups import Backups

HOST = "127.0.0.1"
ARTIFACT_ROOT = "mlflow-artifacts:/"
DATABASE = "mlflow.db"


def server_settings(port: int) -> dict[str, str]:
    """MLflow's environment: only loopback names, no jobs, no shells, no reports to anybody."""
    names = (HOST, "localhost")
    return {
        "DO_NOT_TRACK": "true",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_ENABLE_ASSISTANT_SANDBOX": "true",  # its assistant never runs shell on this host
        "MLFLOW_SERVER_ALLOWED_HOSTS": ",".join([*names, *(f"{name}:{port}" for name in names)]),
        "MLFLOW_SERVER_CORS_ALLOWED_ORIGINS": ",".join(f"http://{name}:{port}" for name in names),
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
    }


def main(port: int, folder: Path) -> None:
    """Serve on loopback ``port`` with ``mlflow.db`` and ``artifacts/`` in ``folder``; blocks.

    The database is copied to ``backups/`` now and then, and at the end.
    """
    os.environ.update(server_settings(port))
    os.environ.pop("MLFLOW_TRACKING_URI", None)
    artifacts = folder / "artifacts"
    artifacts.mkdir(parents=True, exist_ok=True)
    database = folder / DATABASE
    store_uri = f"sqlite:///{database}"
    try:
        _make_whole(database)
        _prepare_in_process(store_uri, artifacts.as_uri())
    except ImportError:
        _become_command(port, store_uri, artifacts.as_uri())
    import uvicorn

    # uvicorn stops at SIGTERM and raises it again, which would end all before the last copy.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    backups = Backups(database)
    try:
        uvicorn.run(
            "mlflow.server.fastapi_app:app", host=HOST, port=port, workers=1, access_log=False
        )
    finally:
        backups.close()


def _make_whole(database: Path) -> None:
    """Make the tables elsewhere and put them in place when all are there.

    MLflow makes them in dozens of steps, none of which can be repeated: a server killed among them
    would never start again.
    """
    if database.exists():
        return
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    unfinished = database.with_name(f"{DATABASE}.unfinished")
    for leftover in (unfinished, unfinished.with_name(f"{unfinished.name}-journal")):
        leftover.unlink(missing_ok=True)
    store = SqlAlchemyStore(  # type: ignore[no-untyped-call]  # MLflow has no hints here
        f"sqlite:///{unfinished}", ARTIFACT_ROOT
    )
    store.engine.dispose()
    os.replace(unfinished, database)


def _prepare_in_process(store_uri: str, artifacts_uri: str) -> None:
    from mlflow.server import constants
    from mlflow.server.handlers import initialize_backend_stores

    os.environ[constants.BACKEND_STORE_URI_ENV_VAR] = store_uri
    os.environ[constants.REGISTRY_STORE_URI_ENV_VAR] = store_uri
    os.environ[constants.ARTIFACT_ROOT_ENV_VAR] = ARTIFACT_ROOT
    os.environ[constants.ARTIFACTS_DESTINATION_ENV_VAR] = artifacts_uri
    os.environ[constants.SERVE_ARTIFACTS_ENV_VAR] = "true"
    initialize_backend_stores(store_uri, store_uri, ARTIFACT_ROOT)


def _become_command(port: int, store_uri: str, artifacts_uri: str) -> None:
    options = {
        "--host": HOST,
        "--port": str(port),
        "--workers": "1",
        "--backend-store-uri": store_uri,
        "--artifacts-destination": artifacts_uri,
    }
    words = [word for option in options.items() for word in option]
    command = [sys.executable, "-m", "mlflow", "server", "--serve-artifacts", *words]
    os.execv(sys.executable, command)


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
