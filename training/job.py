"""What a worker is told by the driver."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal


@dataclass(frozen=True)
class Job:
    """One stage, as JSON values. ``configs`` holds the resolved configurations by part:
    ``tokenizer`` and ``text_encoder``, or ``stage`` and ``network``.

    ``manifest_*`` pin the dataset, ``mixed_in`` those beside it (``DatasetPin`` as JSON), and
    ``init_*`` the published checkpoint to start from; ``parts`` are the digests of the folders that
    the configurations name. ``run_uri`` is where the run keeps its
    checkpoints, ``attempt`` which try of a driver this is and ``resume_step`` the step of the
    checkpoint that the plan saw (None: none). ``cpus`` is how many threads to use (None: as many as
    the environment gives) and ``local_dir`` where temporary files lie (None: the system's place).
    """

    kind: Literal["tokenizer", "masked"]
    stage: str
    stage_key: str
    configs: Mapping[str, Any]
    run_uri: str
    attempt: int = 1
    resume_step: int | None = None
    manifest_uri: str | None = None
    manifest_sha256: str | None = None
    mixed_in: Sequence[Mapping[str, str]] = ()
    init_uri: str | None = None
    init_sha256: str | None = None
    parts: Mapping[str, str] = field(default_factory=dict)
    progress_uri: str | None = None
    tracking_uri: str | None = None
    mlflow_run_id: str | None = None
    cpus: int | None = None
    local_dir: str | None = None

    @classmethod
    def parse(cls, raw: Mapping[str, Any]) -> Job:
        """The job in the driver's dictionary; what a worker has no use for is left out."""
        return cls(**{each.name: raw[each.name] for each in fields(cls) if each.name in raw})
