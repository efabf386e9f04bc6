"""Where Spark forks Python workers from, with tasks that fail; ``spark.python.daemon.module``.

``FAIL_ONCE``: a folder for the names of tasks that failed. Every Spark task fails at its first
attempt, when the first of our tasks in it has done all its work. ``FAIL_ALWAYS``: the name of a
task that fails whenever it ends.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pyspark import TaskContext, daemon

from pipelines.workspace import Workspace

_task = Workspace.task


@contextmanager
def failing_task(workspace: Workspace, name: str) -> Iterator[Path]:
    with _task(workspace, name) as folder:
        yield folder
        if name == os.environ.get("FAIL_ALWAYS"):
            raise ZeroDivisionError("planted")
        once, context = os.environ.get("FAIL_ONCE"), TaskContext.get()
        if once is not None and context is not None and context.attemptNumber() == 0:
            Path(once, name).touch()
            raise OSError("planted, in passing")


if __name__ == "__main__":
    Workspace.task = failing_task  # type: ignore[method-assign, assignment]
    daemon.manager()
