"""The hostile web and its canary, for faults too."""

from tests.pipelines.conftest import canary, evil_web, trap_world

__all__ = ["canary", "evil_web", "trap_world"]
