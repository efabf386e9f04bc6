"""The pages a person reads: what fell is said, what is there is shown."""

from __future__ import annotations

import pytest

from app.report import closing_page, duration, funnel_table, lowered, score_table, status_page
from app.status import DONE, FAILED, RUNNING, RunStatus, StepStatus


def stage(name: str, **scores: float) -> StepStatus:
    return StepStatus(
        name, "stage", DONE, "INIT", "never trained", 12.0, scores=scores, checkpoint_uri="s3://a/b"
    )


def run(*steps: StepStatus) -> RunStatus:
    return RunStatus(
        "r1", "demo", "recipes/demo.yaml", "0" * 64, "atelier run", 1, "t", "t", DONE,
        seconds=75.0, contact_sheet="/x/sheet.png", mlflow_uri="http://127.0.0.1:5000",
        steps=list(steps),
    )  # fmt: skip


def test_a_stage_that_lowers_a_score_says_so() -> None:
    stages = [stage("one", position=0.6, colors=0.5), stage("two", position=0.5, colors=0.49)]
    assert lowered(stages) == [("two", ["position (0.60 to 0.50)"])]
    lines = score_table(stages)
    assert any("position" in line and "0.50v" in line for line in lines)
    assert lines[-1] == "  v two is lower than the stage before it in position (0.60 to 0.50)"


def test_a_stage_that_only_gains_says_nothing() -> None:
    assert lowered([stage("one", position=0.5), stage("two", position=0.9)]) == []


def test_a_score_that_is_new_is_shown() -> None:
    lines = score_table([stage("one", colors=0.5), stage("two", colors=0.5, position=0.1)])
    assert any(line.split()[:2] == ["position", "-"] for line in lines)


def test_the_funnel_keeps_its_order_and_ends_with_what_is_left() -> None:
    lines = funnel_table(
        {"a": {"rows_in": 1200, "unsafe": 3, "committed": 9}, "b": {"rows_in": 9, "committed": 9}}
    )
    assert [line.split()[0] for line in lines[1:]] == ["rows", "unsafe", "committed"]
    assert lines[1].split() == ["rows", "in", "1,200", "9"]
    assert lines[2].split() == ["unsafe", "3", "0"]


def test_the_closing_page_shows_where_to_look() -> None:
    dataset = StepStatus("curate:a", "dataset", DONE, funnel={"rows_in": 5, "committed": 4})
    page = closing_page(run(dataset, stage("concepts", background=1.0)))
    for expected in ("/x/sheet.png", "http://127.0.0.1:5000", "background", "committed"):
        assert expected in page
    assert "atelier sample" in page


def test_the_status_page_shows_failures() -> None:
    status = run(StepStatus("concepts", "stage", FAILED, "INIT", "x" * 300, 3.0))
    status.error = "the line"
    page = status_page(status)
    assert "!!  concepts" in page
    assert "the line" in page
    assert max(map(len, page.splitlines())) < 170


def test_a_running_step_shows_how_far_it_is_and_what_its_machine_does() -> None:
    training = StepStatus("concepts", "stage", RUNNING, "INIT", "new")
    training.progress = {
        "done": 1500, "total": 6000, "unit": "steps", "loss": 5.9123, "images_per_second": 812.4,
        "eta_seconds": 200, "use": {"host/gpu_share": 0.97, "host/cpu_share": 0.5, "mfu": 0.412},
    }  # fmt: skip
    curating = StepStatus("curate:a", "dataset", RUNNING, "RUN", "new")
    curating.progress = {"done": 70, "total": None, "unit": "rows"}
    lines = status_page(run(curating, training)).splitlines()
    assert any("70 rows; new" in line for line in lines)
    assert any(
        "1,500/6,000 steps (25 %), loss 5.912, 812 images/s, 3 min 20 s left; "
        "machine: 41 % of the peak, 97 % GPU, 50 % CPU; new" in line
        for line in lines
    )


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.42, "0.4 s"),
        (12.3, "12 s"),
        (59.7, "1 min 0 s"),
        (200, "3 min 20 s"),
        (7500, "2 h 5 min"),
    ],
)
def test_durations_are_for_people(seconds: float, text: str) -> None:
    assert duration(seconds) == text
