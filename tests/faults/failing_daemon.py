"""Where Spark forks Python workers from, with tasks that fail; ``spark.python.daemon.module``.

``FAIL_ONCE``: a folder; every task fails once, after all its work is done. ``FAIL_ALWAYS``: the
name of a task that fails whenever it ends.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pyspark import daemon

from pipelines.workspace import Workspace

_task = Workspace.task


@contextmanager
def failing_task(workspace: Workspace, name: str) -> Iterator[Path]:
    with _task(workspace, name) as folder:
        yield folder
        if name == os.environ.get("FAIL_ALWAYS"):
            raise ZeroDivisionError("planted")
        once = os.environ.get("FAIL_ONCE")
        if once is not None:
            try:
                Path(once, name).touch(exist_ok=False)
            except FileExistsError:
                return
            raise OSError("planted, in passing")


if __name__ == "__main__":
    Workspace.task = failing_task  # type: ignore[method-assign]
    daemon.manager()
