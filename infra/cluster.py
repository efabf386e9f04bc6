"""Where the work runs: nothing here changes a result, so every field is operational."""

from __future__ import annotations

from infra.config import StrictModel, operational

LAPTOP_JAVA_OPTIONS = "-XX:TieredStopAtLevel=1 -XX:+UseSerialGC"


class ClusterConfig(StrictModel):
    """Spark for curation, Ray for training; the defaults are a laptop with two cores."""

    spark_master: str = operational(
        "local[2,4]", "Spark master; local[N,4] runs N tasks at once and tries each 4 times"
    )
    spark_driver_memory_mb: int = operational(1024, "heap of Spark's driver, MiB", ge=512)
    spark_shuffle_partitions: int = operational(4, "partitions after a shuffle", ge=1)
    spark_java_options: str = operational(
        LAPTOP_JAVA_OPTIONS,
        "JVM options of a local driver; the default halves the start, as the heavy work is not "
        "in the JVM",
    )
    spark_properties: dict[str, str] = operational(
        default_factory=dict, description="further spark.* properties; they win over ours"
    )
    ray_address: str | None = operational(
        None, "host:port of a running Ray cluster; none starts one here, on loopback"
    )
    ray_object_store_mb: int = operational(150, "shared memory of a local Ray, MiB", ge=80)
    num_workers: int = operational(1, "training workers", ge=1)
    cpus_per_worker: int = operational(2, "CPU cores a training worker may count on", ge=1)
    price_per_worker_hour: float | None = operational(
        None, "what a training worker costs an hour, in any currency; `plan` multiplies it", ge=0.0
    )
    use_gpu: bool = operational(False, "one GPU for each training worker")

    @property
    def is_spark_local(self) -> bool:
        """Whether Spark runs inside this machine's driver."""
        return self.spark_master.startswith("local")
