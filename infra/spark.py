"""A Spark session that starts fast, stays on loopback and leaves nothing behind.

The heavy work of our jobs runs in Arrow and Polars inside the Python tasks, so a local JVM is tuned
to start, not to peak. Measured on 2 cores, CPU seconds until the first result: 18 with Spark's
defaults, 9 with ours, 4 with the class archive that ``python -m infra.spark_archive`` makes.
"""

from __future__ import annotations

import atexit
import logging
import os
import re
import secrets
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from infra.cluster import ClusterConfig
from infra.config import PROJECT_ROOT, atelier_home
from infra.environment import applied
from infra.errors import UserError
from infra.java import Java, find_java
from infra.same_code import code_expected
from infra.spark_archive import archive_path
from infra.spark_daemon import MODULE as DAEMON
from infra.spark_errors import jvm_starts, spark_log

if TYPE_CHECKING:
    from pyspark import SparkConf
    from pyspark.sql import SparkSession

HOST = "127.0.0.1"
LOG_SETTINGS = Path(__file__).with_name("spark_log4j2.properties")
JVM_STOP_SECONDS = 20.0
MAX_SOCKET_FOLDER_CHARS = 60
SECRET_VARIABLE = "ATELIER_SPARK_SECRET"  # what a cluster's members authenticate with
TASK_ATTEMPTS = 4  # what clusters do unless told otherwise; Spark tries local[N] once
_LOCAL_ONCE = re.compile(r"local(?:\[(\d+|\*)\])?")
# Names of settings whose values no page or log shows.
REDACTED = "(?i)secret|password|token|access[._]?key|credential"


def spark_session(
    app_name: str, cluster: ClusterConfig, environment: Mapping[str, str]
) -> SparkSession:
    """A session on ``cluster.spark_master`` whose Python tasks see ``environment``.

    A session that is active in this process is stopped first. Ends with ``stop_spark``. The JVM
    writes to ``<home>/logs/spark.log``. Raises ``UserError`` without a suitable Java.
    """
    from pyspark import SparkContext
    from pyspark.errors import PySparkRuntimeError
    from pyspark.sql import SparkSession

    java = find_java()
    active = SparkSession.getActiveSession()
    if active is not None:
        active.stop()
    launch_environment = {
        "JAVA_HOME": str(java.home),
        "PYSPARK_DRIVER_PYTHON": sys.executable,
        "PYSPARK_PYTHON": sys.executable,
    }
    if cluster.is_spark_local:
        launch_environment["SPARK_LOCAL_IP"] = HOST
    log = spark_log()
    log.parent.mkdir(parents=True, exist_ok=True)
    with applied(launch_environment):
        try:
            gateway = SparkContext._gateway or _launch_jvm(java, cluster, log)
        except PySparkRuntimeError as error:
            raise UserError(f"Spark's JVM did not start: {_last_line(log)}; see {log}") from error
        context = SparkContext(conf=_settings(app_name, cluster, environment), gateway=gateway)
    context.setLogLevel("ERROR")
    server: Any = context._accumulatorServer
    server.handle_error = _say_nothing  # what a JVM's end breaks is told in one line, by the job
    return SparkSession.builder.getOrCreate()


def _launch_jvm(java: Java, cluster: ClusterConfig, log: Path) -> Any:
    """Start the JVM with what must be known before it runs; secrets never reach its arguments."""
    from pyspark import SparkConf, java_gateway

    options = [f"-Dlog4j2.configurationFile={LOG_SETTINGS.as_uri()}"]
    if cluster.is_spark_local:
        options += cluster.spark_java_options.split()
        archive = archive_path(java, cluster.spark_java_options)
        if archive.exists():
            options.append(f"-XX:SharedArchiveFile={archive}")
    settings = SparkConf(loadDefaults=False, _jvm=None)
    settings.set("spark.driver.memory", f"{cluster.spark_driver_memory_mb}m")
    settings.set("spark.driver.extraJavaOptions", " ".join(options))
    settings.set("spark.ui.enabled", "false")
    jvm_starts()
    logging.getLogger().addFilter(_is_ours)
    with open(log, "ab") as output:
        launch: Any = java_gateway.launch_gateway
        return launch(settings, {"stdout": output, "stderr": output})


def _say_nothing(request: object, address: object) -> None:
    """Instead of a trace on standard error; nothing of ours counts by accumulators."""


def _is_ours(record: logging.LogRecord) -> bool:
    """py4j logs a trace of its own, past all loggers, when a signal interrupts it."""
    return "py4j" not in Path(record.pathname).parts


def _settings(app_name: str, cluster: ClusterConfig, environment: Mapping[str, str]) -> SparkConf:
    from pyspark import SparkConf

    scratch = atelier_home() / "tmp" / "spark"
    scratch.mkdir(parents=True, exist_ok=True)
    properties = {
        "spark.app.name": app_name,
        "spark.master": with_attempts(cluster.spark_master),
        "spark.sql.execution.arrow.pyspark.enabled": "true",
        "spark.sql.shuffle.partitions": str(cluster.spark_shuffle_partitions),
        "spark.ui.enabled": "false",
        "spark.ui.showConsoleProgress": "false",
    }
    worker_environment = {"PYTHONDONTWRITEBYTECODE": "", **environment}
    if cluster.is_spark_local:
        worker_environment["PYTHONPATH"] = str(PROJECT_ROOT)
        properties |= {
            "spark.authenticate": "true",
            "spark.authenticate.secret": secrets.token_hex(16),
            "spark.driver.bindAddress": HOST,
            "spark.driver.host": HOST,
            "spark.local.dir": str(scratch),
            "spark.python.daemon.module": DAEMON,
            **_private_sockets(),
            "spark.sql.warehouse.dir": (scratch / "warehouse").as_uri(),
        }
    else:
        worker_environment |= code_expected("infra", "pipelines")
        if secret := os.environ.get(SECRET_VARIABLE):
            properties |= {"spark.authenticate": "true", "spark.authenticate.secret": secret}
    properties |= {f"spark.executorEnv.{name}": value for name, value in worker_environment.items()}
    properties["spark.redaction.regex"] = REDACTED
    submitted = "PYSPARK_GATEWAY_PORT" in os.environ
    settings = SparkConf(loadDefaults=submitted)
    if submitted:  # what the command line says of the cluster wins over the recipe
        named = ("spark.master", "spark.app.name")
        properties = {k: v for k, v in properties.items() if k not in named or not settings.get(k)}
    return settings.setAll(list((properties | cluster.spark_properties).items()))


def with_attempts(master: str) -> str:
    """``master``, tasks of a local one tried as often as on a cluster unless it says how often."""
    found = _LOCAL_ONCE.fullmatch(master)
    return master if found is None else f"local[{found.group(1) or 1},{TASK_ATTEMPTS}]"


def _private_sockets() -> dict[str, str]:
    """JVM and Python workers talk through files that only this user opens.

    Over TCP, a task that returns little waits 40 ms for an acknowledgement.
    """
    folder = tempfile.mkdtemp(prefix="atelier-")  # mode 700, and short: a path ends at 107 bytes
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    if len(folder) > MAX_SOCKET_FOLDER_CHARS:
        return {}
    return {
        "spark.python.unix.domain.socket.enabled": "true",
        "spark.python.unix.domain.socket.dir": folder,
    }


def stop_spark(spark: SparkSession, wait_seconds: float = JVM_STOP_SECONDS) -> None:
    """Stop the session and its JVM, which else holds about 400 MB until this process ends.

    A JVM that does not end within ``wait_seconds`` is killed.
    """
    from py4j.protocol import Py4JError
    from pyspark import SparkContext
    from pyspark.sql import SparkSession

    try:
        spark.stop()
    except (Py4JError, ConnectionError):  # the JVM is gone; nor must the next session look for it
        SparkContext._active_spark_context = None
        SparkSession._instantiatedSession = None
    gateway: Any = SparkContext._gateway
    if gateway is None:
        return
    SparkContext._gateway = None
    SparkContext._jvm = None
    process: subprocess.Popen[bytes] | None = gateway.proc
    with suppress(Py4JError, ConnectionError):
        gateway.shutdown()
    if process is not None:
        if process.stdin is not None:
            process.stdin.close()  # the JVM ends when this pipe breaks
        try:
            process.wait(wait_seconds)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _last_line(log: Path) -> str:
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1][:300] if lines else "it wrote nothing"
