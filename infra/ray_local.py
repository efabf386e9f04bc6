"""A Ray that starts fast, stays on loopback and leaves nothing behind.

Not started is what a laptop has no use for: the autoscaler, the API server (no dashboard) and the
log monitor (logs stay in files). On 2 busy cores that halves ``ray.init`` (8.1 s to 4.3 s), saves
2.6 CPU seconds and 265 MB, and Ray Train behaves as before.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import os
import secrets
import shutil
import signal
import socket
import stat
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from infra.cluster import ClusterConfig
from infra.config import PROJECT_ROOT, atelier_home
from infra.environment import applied, credentials
from infra.errors import UserError
from infra.same_code import code_expected

HOST = "127.0.0.1"
KNOCK_SECONDS = 5.0
QUIET = {
    "RAY_DISABLE_IMPORT_WARNING": "1",
    "RAY_TRAIN_ENABLE_V2_MIGRATION_WARNINGS": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
}
LOOPBACK = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}  # off: Ray's own address is 127.0.0.1
LEAN = {
    # Nobody serves Ray's state API here. Ray Train asks it whether its controller lives and takes
    # a refusal as "not known", but without an address it would look for one for 40 s.
    "RAY_API_SERVER_ADDRESS": f"http://{HOST}:1",
    "RAY_enable_metrics_collection": "0",
}


@contextmanager
def ray_session(cluster: ClusterConfig, environment: Mapping[str, str]) -> Iterator[None]:
    """A connected Ray whose workers see ``environment``; its processes end with the block.

    In a Ray elsewhere they do not see its credentials: whoever has work done there hands them over
    (``infra.ray_task``, ``training.group``).

    Without ``cluster.ray_address`` a Ray is started here, guarded by a random token, and
    ``environment`` holds in this process too while the block runs. Raises ``UserError`` when a Ray
    is already connected, does not start, or does not answer.
    """
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    if cluster.ray_address is None:
        with _local_ray(cluster, environment):
            yield
    else:
        with _remote_ray(cluster.ray_address, environment):
            yield


@contextmanager
def _remote_ray(address: str, environment: Mapping[str, str]) -> Iterator[None]:
    os.environ.setdefault("RAY_AUTH_MODE", "token")
    import ray

    _refuse_second(ray)
    _knock(address)
    hidden = credentials(environment)
    told = {name: value for name, value in environment.items() if name not in hidden}
    told |= code_expected("infra", "model", "training")
    try:
        ray.init(
            address=address,
            runtime_env={"env_vars": told},
            log_to_driver=False,
            logging_level=logging.ERROR,
        )
    except (ConnectionError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        raise UserError(
            f"cannot join Ray at {address}: {error}; check ray_address and RAY_AUTH_TOKEN"
        ) from error
    try:
        yield
    finally:
        ray.shutdown()


def _knock(address: str) -> None:
    """Fail in seconds where nobody listens: ``ray.init`` itself waits for many minutes."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        raise UserError(expected="ray_address like host:6379", got=repr(address))
    try:
        socket.create_connection((host.strip("[]"), int(port)), KNOCK_SECONDS).close()
    except OSError as error:
        raise UserError(
            f"no Ray answers at {address} ({error.strerror or error}); start that cluster, or "
            "leave ray_address out to run one here"
        ) from error


@contextmanager
def _local_ray(cluster: ClusterConfig, environment: Mapping[str, str]) -> Iterator[None]:
    if "ray" not in sys.modules:
        os.environ.setdefault("RAY_AUTH_MODE", "token")  # read when ray is imported
    os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    os.environ.update(LOOPBACK)
    import ray

    _refuse_second(ray)
    python_path = [str(PROJECT_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    variables = {
        **LEAN,
        **environment,
        "PYTHONDONTWRITEBYTECODE": "",
        "PYTHONPATH": os.pathsep.join(python_path),
    }
    folder = _private_folder(atelier_home())
    with applied(variables):
        try:
            with _own_sigterm(), _without_extras():
                _start(ray, cluster, folder)
        except (ConnectionError, OSError, RuntimeError, ValueError) as error:
            ray.shutdown()
            raise UserError(f"Ray did not start: {error}; its logs are in {folder}") from error
        session = Path(_node(ray).get_session_dir_path())
        try:
            yield
        finally:
            ray.shutdown()
            if sys.exc_info()[0] is None:
                _sweep(session)


def _sweep(session: Path) -> None:
    """Remove a session's files, and the folders above it unless another session is in them."""
    shutil.rmtree(session, ignore_errors=True)
    latest = session.with_name("session_latest")
    with suppress(OSError):  # another session's folders stay
        if latest.is_symlink() and not latest.exists():
            latest.unlink()
        session.parent.rmdir()
        session.parent.parent.rmdir()


def _node(ray: Any) -> Any:
    return ray._private.worker._global_node


def _start(ray: Any, cluster: ClusterConfig, folder: Path) -> None:
    """Workers get their cores, and one is left for the tasks of whoever drives them."""
    ray.init(
        address="local",
        num_cpus=cluster.num_workers * cluster.cpus_per_worker + 1,
        num_gpus=None if cluster.use_gpu else 0,
        object_store_memory=cluster.ray_object_store_mb << 20,
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
        _node_ip_address=HOST,
        _temp_dir=str(folder),
    )


def _refuse_second(ray: Any) -> None:
    if ray.is_initialized():
        raise UserError("this process is connected to a Ray already; leave that session first")


@contextmanager
def _without_extras() -> Iterator[None]:
    """Start a head node without autoscaler, log monitor and API server.

    ``ray.init`` has no argument for it. Should Ray have moved these names, it starts everything:
    slower, and otherwise the same.
    """
    import ray._raylet
    from ray._private import parameter, ray_constants, services

    raylet: Any = ray._raylet
    constants: Any = ray_constants
    constants.ENABLE_RAY_CLUSTER = False  # as LOOPBACK does, when ray was imported before
    lean_parameters = functools.partial(
        parameter.RayParams,
        include_log_monitor=False,  # type: ignore[arg-type]  # Ray's hint says str, it is a flag
        no_monitor=True,
    )
    with (
        _replaced(parameter, "RayParams", lean_parameters),
        _replaced(services, "start_api_server", lambda *_, **__: ("", None)),
        _replaced(raylet, "CoreWorker", _keeping_sigterm(raylet.CoreWorker)),
    ):
        yield


@contextmanager
def _own_sigterm() -> Iterator[None]:
    """``ray.init`` puts a handler of its own in the place of ours: put ours back."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)


def _keeping_sigterm(connect: Callable[..., Any]) -> Callable[..., Any]:
    """Connecting installs a handler that prints a stack and aborts: what was there is put back."""

    def connected(*arguments: Any, **options: Any) -> Any:
        before = signal.getsignal(signal.SIGTERM)
        found = connect(*arguments, **options)
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)
        return found

    return connected


@contextmanager
def _replaced(module: object, name: str, value: object) -> Iterator[None]:
    before = getattr(module, name, None)
    if before is None:
        yield
        return
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, before)


def _private_folder(home: Path) -> Path:
    """A folder only we can enter, with a path short enough for Ray's sockets (107 bytes)."""
    digest = hashlib.sha256(str(home).encode()).hexdigest()[:8]
    folder = Path(f"/tmp/atelier-ray-{os.getuid()}-{digest}")
    folder.mkdir(mode=0o700, exist_ok=True)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
        raise UserError(
            expected=f"{folder} private to you",
            got=f"mode {found.st_mode & 0o777:o}, owner {found.st_uid}",
            remedy="remove it",
        )
    return folder / "r"  # Ray opens its own folder to everybody
