"""Spark's classes, loaded once and mapped ever after: ``python -m infra.spark_archive``.

The JVM can start from an archive of already parsed classes (150 MB in ``.tools/``). Making it
takes one Spark start, about 20 s; each later start saves half its time. Sessions use the
archive when it is there and fits their Java, pyspark and options.
"""

from __future__ import annotations

import importlib.metadata
import os
from pathlib import Path

from infra.config import PROJECT_ROOT
from infra.digests import canonical_json, sha256_bytes
from infra.java import Java

DUMP_SECONDS = 300.0


def archive_path(java: Java, java_options: str) -> Path:
    """Where the archive for this Java, pyspark and these options lies, or would lie."""
    pyspark = importlib.metadata.version("pyspark")
    key = sha256_bytes(canonical_json([str(java.home), java.version, pyspark, java_options]))
    return PROJECT_ROOT / ".tools" / f"spark-{key[:12]}.jsa"


def make_archive() -> Path:
    """Make the archive for the default options unless it is there; returns its path."""
    from infra.cluster import LAPTOP_JAVA_OPTIONS, ClusterConfig
    from infra.java import find_java
    from infra.spark import spark_session, stop_spark

    path = archive_path(find_java(), LAPTOP_JAVA_OPTIONS)
    if path.exists():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(f".{os.getpid()}")
    options = f"{LAPTOP_JAVA_OPTIONS} -XX:ArchiveClassesAtExit={unfinished} -Xlog:disable"
    spark = spark_session("archive", ClusterConfig(spark_java_options=options), {})
    rows = spark.range(100).repartition(2)
    rows.mapInArrow(lambda batches: batches, "id long").groupBy("id").count().collect()
    stop_spark(spark, wait_seconds=DUMP_SECONDS)
    os.replace(unfinished, path)
    return path


if __name__ == "__main__":
    print(make_archive())
