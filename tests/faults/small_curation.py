"""A curation of a few rows in this process: what Spark would do, in one thread and in a second."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from infra.manifest import DatasetManifest
from pipelines.config import CurationConfig
from pipelines.plan import CurationPlan, plan_curation
from tests.pipelines import test_build
from tests.pipelines.conftest import HOST, EvilWeb, TrapWorld, encoded, picture, response

NAME = "traps"  # what test_build calls its dataset


def small_world(folder: Path, web: EvilWeb, num_rows: int = 6) -> TrapWorld:
    """``num_rows`` pictures and two rows that are left out."""
    world = TrapWorld(folder, web, [], [], {})
    for number in range(num_rows + 2):
        path = f"/{number}.jpg"
        world.rows.append(
            {
                "URL": f"http://{HOST}{path}", "TEXT": f"picture number {number}",
                "WIDTH": 320.0 if number < num_rows else 10.0, "HEIGHT": 256.0,
                "similarity": 0.3, "hash": number, "punsafe": 0.1, "pwatermark": 0.2,
                "AESTHETIC_SCORE": 5.0, "__index_level_0__": number,
            }
        )  # fmt: skip
        web.route(path, response(encoded(picture(number))))
    world.captions.append({"url": "http://nobody.example/", "caption": "x", "model": "m"})
    world.write(num_files=2)
    return world


def config_of(world: TrapWorld, **changes: Any) -> CurationConfig:
    known: dict[str, Any] = {
        "partitions": 2,
        "captions": {},
        "fetch": world.web.config(max_bytes=200_000, total_deadline_seconds=20.0),
        "shards": {"max_samples": 2},
    }
    return world.config(**(known | changes))


def curated(config: CurationConfig, store_uri: str) -> tuple[CurationPlan, DatasetManifest]:
    """All of it."""
    plan = plan_curation(NAME, config, store_uri)
    return plan, test_build.run(plan)


class Stopped(Exception):
    """Where ``all_but_published`` stops."""


def all_but_published(config: CurationConfig, store_uri: str) -> CurationPlan:
    """Everything is done, and nothing is published: the rest needs no Spark."""

    def stop(*_: Any) -> str:
        raise Stopped

    plan = plan_curation(NAME, config, store_uri)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(test_build, "publish_manifest", stop)
        with pytest.raises(Stopped):
            test_build.run(plan)
    return plan
