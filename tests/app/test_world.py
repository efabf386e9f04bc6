"""The painted world of a run: made once, noticed when damaged, served while it is needed."""

from __future__ import annotations

import urllib.request
from pathlib import Path

import pytest

from app.world import make_world, plan_world, serving
from demo.world import WorldConfig

CONFIG = WorldConfig(num_rows=30, num_parts=1, native_sizes_px=(32,))


@pytest.fixture
def home(tmp_path: Path) -> Path:
    plan = plan_world(CONFIG, tmp_path)
    assert plan.decision == "RUN"
    make_world(CONFIG, plan)
    return tmp_path


def test_a_world_is_made_once(home: Path) -> None:
    plan = plan_world(CONFIG, home)
    assert plan.decision == "SKIP"
    assert plan_world(CONFIG.model_copy(update={"seed": 1}), home).decision == "RUN"


def test_a_changed_byte_is_damage_and_a_missing_file_is_work(home: Path) -> None:
    folder = plan_world(CONFIG, home).folder
    part = next((folder / "metadata").iterdir())
    data = bytearray(part.read_bytes())
    data[100] ^= 1
    part.write_bytes(data)
    plan = plan_world(CONFIG, home)
    assert plan.decision == "RUN"
    assert plan.damaged == (f"metadata/{part.name}",)
    part.unlink()
    plan = plan_world(CONFIG, home)
    assert plan.damaged == ()
    assert "is missing" in plan.reason
    make_world(CONFIG, plan)
    assert plan_world(CONFIG, home).decision == "SKIP"


def test_the_world_is_served_by_its_hosts_names(home: Path) -> None:
    folder = plan_world(CONFIG, home).folder
    with serving(folder) as connect_to:
        assert "gallery.example:80" in connect_to
        (address,) = set(connect_to.values())
        with urllib.request.urlopen(f"http://{address}/robots.txt", timeout=5) as answer:
            assert answer.status == 200
    with pytest.raises(OSError, match=r"refused|reset"):
        urllib.request.urlopen(f"http://{address}/robots.txt", timeout=5)
