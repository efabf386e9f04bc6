"""The `atelier` command under `spark-submit`, whose --master, --conf and --properties-file count.

    spark-submit --master spark://head:7077 --conf spark.executor.memory=4g \\
        app/submit.py curate recipes/laion.yaml

The packages and their requirements are installed on every worker, at the same version: a task with
other code than the driver's is refused. Members of the cluster authenticate with the secret in
ATELIER_SPARK_SECRET, or as the properties file says.
"""

from __future__ import annotations

from app.cli import main

if __name__ == "__main__":
    main()
