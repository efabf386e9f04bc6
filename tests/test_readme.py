"""The README's commands exist, and every shipped recipe is one."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import typer
from typer.main import get_command

from app.cli import app
from app.recipe import load_recipe

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
MAX_LINES = 150
BLOCKS = re.findall(r"```bash\n(.*?)```", README, re.S)
COMMANDS = [line for block in BLOCKS for line in block.splitlines() if line.strip()]
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))


def words_of(command: str) -> list[str]:
    return shlex.split(command, comments=True)


def make_targets() -> set[str]:
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    return set(re.findall(r"^([a-z]+):", text, re.M))


def test_it_is_short() -> None:
    assert len(README.splitlines()) <= MAX_LINES


def test_there_are_commands() -> None:
    assert len(COMMANDS) > 10


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_is_known(command: str) -> None:
    program, *arguments = words_of(command)
    if program == "make":
        assert set(arguments) <= make_targets()
        return
    assert program == ".venv/bin/atelier"
    group = get_command(app)
    assert isinstance(group, typer.core.TyperGroup)
    verb = group.commands[arguments[0]]
    with verb.make_context(arguments[0], list(arguments[1:])) as context:
        for value in context.params.values():
            if isinstance(value, Path) and value.suffix == ".yaml":
                assert (ROOT / value).is_file()


def test_every_verb_is_in_the_readme() -> None:
    group = get_command(app)
    assert isinstance(group, typer.core.TyperGroup)
    used = {words_of(command)[1] for command in COMMANDS if ".venv/bin/atelier" in command}
    assert used == set(group.commands)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.name)
def test_every_shipped_recipe_is_valid_and_named(recipe: Path) -> None:
    assert load_recipe(recipe).name == recipe.stem
    assert f"recipes/{recipe.name}" in README


def test_the_readme_names_no_recipe_that_is_not_there() -> None:
    named = set(re.findall(r"recipes/([\w-]+\.yaml)", README))
    assert named == {recipe.name for recipe in RECIPES}


def test_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", README):
        assert (ROOT / target).exists()


def test_ci_runs_the_documented_commands() -> None:
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert "make test" in script
    assert "make lint" in script
    assert ".ci/run" in (ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8")
