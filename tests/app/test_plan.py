"""The plan as a person reads it, and as a program does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import polars as pl

from app.plan import PlannedStep, expected_line, show_plan
from app.verb import Output
from pipelines.config import CurationConfig
from pipelines.estimate import estimate_curation


def planned(tmp_path: Path, **estimate: Any) -> PlannedStep:
    sides = [100.0, 500.0, 500.0, None]
    frame = {"URL": list("abcd"), "TEXT": ["x y"] * 4, "WIDTH": sides, "HEIGHT": [500.0] * 4}
    pl.DataFrame(frame).write_parquet(tmp_path / "m.parquet")
    config = CurationConfig.model_validate(
        {
            "metadata": [str(tmp_path / "m.parquet")],
            "filters": {"min_width_px": 256, "unknown": {"size": "later"}},
            "estimate": estimate,
        }
    )
    found = estimate_curation(config, tmp_path.as_uri()).to_json()
    return PlannedStep("dataset x", "RUN", "not there", work={"rows": 4}, estimate=found)


def test_the_funnel_is_printed_with_its_reckoning(tmp_path: Path, capsys: Any) -> None:
    step = planned(
        tmp_path, fetch_success_ratio=0.5, duplicate_ratio=0.0, price_per_core_hour=3600.0,
        rows_per_core_second=4.0, fetches_per_core_second=1.0, num_cores=4,
    )  # fmt: skip
    show_plan([step], Output(False))
    printed = " ".join(capsys.readouterr().out.split())
    assert "expected, from 4 of 4 rows (1 draws of 1 row groups, 95 % intervals)" in printed
    assert "- too_small 1 25.00 % ± 0.00" in printed
    assert "= to fetch 3 75.00 % ± 0.00 of it later:size 1 25.00 % ± 0.00" in printed
    assert "- copies 0 known from recipe - not fetched 1" in printed
    assert "= samples 2 ± 0 (50.0 % of those asked for, known from recipe)" in printed
    assert "cost 4.00" in printed  # one second of reading, three of fetching
    assert "on 4 cores, cost 4.00 (1 fetches a second each, known from recipe)" in printed
    assert json.loads(json.dumps(step.to_json()))["estimate"]["samples"] == 2


def test_what_is_not_known_is_said(tmp_path: Path, capsys: Any) -> None:
    show_plan([planned(tmp_path)], Output(False))
    printed = capsys.readouterr().out
    assert "set estimate.fetch_success_ratio" in printed
    assert "copies 0 known from all rows" in " ".join(printed.split())
    assert "cost" not in printed
    assert "(60 fetches a second each, not measured yet)" in printed


def test_hours_say_on_how_many_workers_they_were_measured() -> None:
    expected = {
        "hours": 0.25, "images_per_second": 80.0, "num_workers": 8, "measured_workers": 1,
        "known_from": "version 2 of tiny-concepts", "cost": 4.0,
    }  # fmt: skip
    assert expected_line(expected) == (
        "0.25 hours on 8 workers, cost 4.00 (80.0 images/s; known from version 2 of "
        "tiny-concepts, measured on 1 worker)"
    )
