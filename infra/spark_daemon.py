"""The process that Spark forks its Python workers from; what a job's tasks share, it loads once.

A network's libraries take ten seconds of a core to import. Each worker would pay that anew, also
the one that takes the place of a dead one. A job that names such a function in ``VARIABLE`` gets a
daemon of its own (Spark keeps one for each environment), which calls it before it forks.
"""

from __future__ import annotations

import gc
import importlib
import importlib.machinery
import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

MODULE = "infra.spark_daemon"
VARIABLE = "ATELIER_BEFORE_WORKERS"


@contextmanager
def before_workers(spark: SparkSession, function: str | None) -> Iterator[None]:
    """Have ``module:function`` called before workers are forked for the jobs of the block.

    It must start no threads, for these do not survive a fork. On a cluster, whose daemons are
    Spark's own, nothing is called, and every worker loads what it needs.
    """
    if function is None:
        yield
        return
    environment = spark.sparkContext.environment
    environment[VARIABLE] = function
    try:
        yield
    finally:
        environment.pop(VARIABLE, None)


def load_shared(function: str) -> None:
    """Call ``module:function``; what it raises is told again by the task that meets it."""
    module, _, name = function.partition(":")
    # Spark reads the daemon's address from its output: whatever prints meanwhile goes elsewhere.
    sys.stdout.flush()
    output = os.dup(1)
    os.dup2(2, 1)
    try:
        getattr(importlib.import_module(module), name)()
    except Exception:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os.dup2(output, 1)
        os.close(output)
    gc.collect()
    gc.freeze()  # collections in the workers neither look at it nor unshare its memory


def without_archives(search_path: list[str]) -> list[str]:
    """The path, less Spark's zipped copy of its Python library and its jar.

    Spark has them come before what is installed, which is the same; a zip keeps no bytecode, so
    that every daemon would compile pyspark anew, a second of a core, and search both ever after.
    """
    archives = (f"{os.sep}pyspark.zip", "-src.zip", ".jar")
    found = [folder for folder in search_path if not folder.endswith(archives)]
    is_installed = importlib.machinery.PathFinder.find_spec("pyspark", found) is not None
    return found if is_installed else search_path


if __name__ == "__main__":
    sys.path[:] = without_archives(sys.path)
    from pyspark.daemon import manager

    if asked := os.environ.get(VARIABLE):
        load_shared(asked)
    manager()
