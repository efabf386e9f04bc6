"""A tracker for tests of what a worker logs."""

from __future__ import annotations

from collections.abc import Mapping


class Notes:
    """A tracker that remembers."""

    def __init__(self) -> None:
        self.points: list[tuple[int, dict[str, float]]] = []
        self.tags: dict[str, str] = {}
        self.artifacts: dict[str, bytes] = {}
        self.is_closed = False

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        self.points.append((step, dict(metrics)))

    def set_tag(self, key: str, value: str) -> None:
        self.tags[key] = value

    def log_artifact(self, data: bytes, path: str) -> None:
        self.artifacts[path] = data

    def flush(self, timeout_seconds: float = 5.0) -> bool:
        return True

    def close(self, timeout_seconds: float = 30.0) -> int:
        self.is_closed = True
        return 0
