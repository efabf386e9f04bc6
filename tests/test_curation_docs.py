"""Every recipe fragment that the guide shows is one that the recipe takes."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from app.cli import app
from pipelines.config import CurationConfig

PAGE = Path(__file__).resolve().parent.parent / "docs" / "curation.md"
BLOCKS = re.findall(r"```yaml\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.split("\n")[0][:30])
def test_a_fragment_is_a_recipe_s(block: str) -> None:
    given = {"metadata": ["x"]} | yaml.safe_load(block)
    asked = CurationConfig.model_validate(given)
    for name in given:
        assert name in asked.model_fields_set


def test_the_guide_shows_what_it_can() -> None:
    assert len(BLOCKS) >= 6
    verbs = {
        command.name or command.callback.__name__
        for command in app.registered_commands
        if command.callback
    }
    named = set(re.findall(r"`atelier ([a-z]+)", PAGE.read_text(encoding="utf-8")))
    assert named <= verbs
