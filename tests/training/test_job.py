from __future__ import annotations

from training.job import Job


def test_the_drivers_dictionary_is_understood() -> None:
    raw = {
        "recipe": "demo",
        "stage": "concepts",
        "kind": "masked",
        "run_uri": "file:///store/runs/concepts-k",
        "stage_key": "k",
        "run_name": "concepts-k",
        "attempt": 2,
        "configs": {},
        "store_uri": "file:///store",
        "manifest_uri": "file:///m",
        "manifest_sha256": "s",
        "init_uri": None,
        "init_sha256": None,
        "progress_uri": "file:///p",
        "tracking_uri": "http://localhost:1",
        "mlflow_run_id": "r",
    }
    job = Job.parse(raw)
    assert (job.kind, job.manifest_sha256, job.cpus) == ("masked", "s", None)
