"""What a person reads of a version: a page to look at, and a card, both beside the manifest.

Neither is listed in the manifest: both are made from it and from what it lists, and may be made
again at any time, of any version. Nothing reads them back.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from infra import storage
from infra.manifest import DatasetManifest, dataset_root
from pipelines.card import card
from pipelines.ledger_counts import count_ledgers
from pipelines.rejected import rejected_pictures
from pipelines.report_page import report_page
from pipelines.shard_sample import sample_shards

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

REPORT_NAME = "report.html"
CARD_NAME = "card.md"


def write_report(
    manifest_uri: str,
    manifest: DatasetManifest,
    spark: Callable[[], SparkSession] | None = None,
    environment: Mapping[str, str] | None = None,
) -> str:
    """Write ``report.html`` and ``card.md`` beside the manifest; returns the page's address.

    ``spark`` counts a ledger of many rows that nobody counted before.
    """
    folder = storage.join(dataset_root(manifest_uri), manifest.version)
    storage.write_bytes(storage.join(folder, CARD_NAME), card(manifest).encode())
    uri = storage.join(folder, REPORT_NAME)
    storage.write_bytes(uri, make_page(manifest_uri, manifest, spark, environment).encode())
    return uri


def make_page(
    manifest_uri: str,
    manifest: DatasetManifest,
    spark: Callable[[], SparkSession] | None = None,
    environment: Mapping[str, str] | None = None,
) -> str:
    """The page of a version, from what its manifest lists; memory does not grow with it."""
    root = dataset_root(manifest_uri)
    counts = count_ledgers(root, manifest, spark, environment)
    rejected = rejected_pictures(root, manifest.version)
    return report_page(manifest, counts, sample_shards(root, manifest), rejected)
