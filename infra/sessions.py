"""Spark and Ray, as the rest of the house asks for them."""

from __future__ import annotations

from infra.cluster import ClusterConfig
from infra.java import find_java
from infra.ray_local import ray_session
from infra.spark import spark_session, stop_spark

__all__ = ["ClusterConfig", "find_java", "ray_session", "spark_session", "stop_spark"]
