"""The painted world: determinism, held-out combinations, captions, and traps as announced."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from demo.captions import alt_text, long_caption, plain_prompt
from demo.metadata import EXPECTED, SCHEMA, build_world, make_rows
from demo.questions import geneval_prompts
from demo.world import (
    SPANS,
    Scene,
    Thing,
    WorldConfig,
    cells,
    combinations,
    held_out,
    place,
    relation,
    render,
    render_array,
    sample_scene,
)


def scenes(config: WorldConfig, count: int, seed: int = 0) -> list[Scene]:
    rng = np.random.default_rng(seed)
    return [sample_scene(rng, config) for _ in range(count)]


@pytest.mark.parametrize("config", [WorldConfig(), WorldConfig(held_out_by="place")])
def test_training_scenes_and_questions_share_no_combination_that_is_held_out(
    config: WorldConfig,
) -> None:
    seen = {c for scene in scenes(config, 2000) for c in combinations(scene, config)}
    for question in geneval_prompts(config, 60, seed=1):
        asked = set(combinations(question.scene, config))
        assert held_out(question.scene, config)
        assert asked - seen, question.prompt


def test_prompts_of_questions_are_never_captions_of_training() -> None:
    config = WorldConfig(held_out_by="place", grid_cells=2, sizes=("small",))
    rng = np.random.default_rng(0)
    captions = {
        text
        for scene in scenes(config, 2000)
        for text in (plain_prompt(scene, config), alt_text(scene, rng, config).lower())
    }
    questions = geneval_prompts(config, 120, seed=1)
    single = [q.prompt for q in questions if q.tag in ("single_object", "colors")]
    assert not captions & set(single)
    assert all(" at the " in prompt for prompt in single)
    without_place = [text for text in captions if " at the " not in text]
    assert any(text.startswith("a ") and " and " not in text for text in without_place)


@pytest.mark.parametrize("grid_cells", [2, 3, 4, None])
def test_the_words_for_a_settled_pair_leave_one_picture(grid_cells: int | None) -> None:
    config = WorldConfig(
        grid_cells=grid_cells, sizes=("small",), settled_pairs=True, colors=("red", "blue", "white")
    )
    asked = [question.scene for question in geneval_prompts(config, 200, seed=1)]
    pictures: dict[str, set[tuple[float, ...]]] = {}
    for scene in scenes(config, 3000) + asked:
        if len(scene.things) == 2:
            places = tuple(x for thing in scene.things for x in (thing.row, thing.column))
            pictures.setdefault(plain_prompt(scene, config), set()).add(places)
    assert len(pictures) > 150
    middle = (cells(config) - 1) / 2
    for words, found in pictures.items():
        assert len(found) == 1 or grid_cells != 2
        for top, left, bottom, right in found:
            if " left of " in words or " right of " in words:
                assert top == bottom == middle
                assert (left < right) == (" left of " in words)
            elif " above " in words or " below " in words:
                assert left == right == middle
                assert (top < bottom) == (" above " in words)
            else:
                assert (top, left, bottom, right) == (0, 0, 2 * middle, 2 * middle)


def test_things_stay_inside_and_apart() -> None:
    config = WorldConfig(sizes=("large", "small"))
    for scene in scenes(config, 300):
        taken: set[tuple[int, int]] = set()
        for thing in scene.things:
            span = SPANS[thing.size]
            own = {
                (int(thing.row) + i, int(thing.column) + j)
                for i in range(span)
                for j in range(span)
            }
            assert all(0 <= x < 4 for cell in own for x in cell)
            assert not own & taken
            taken |= own
            assert thing.color != scene.background


def test_small_render_looks_like_a_shrunk_large_one() -> None:
    config = WorldConfig()
    for scene in scenes(config, 50):
        large = render_array(scene, 128, config).reshape(32, 4, 32, 4, 3).mean(axis=(1, 3))
        assert np.abs(large - render_array(scene, 32, config)).mean() < 1.5


@pytest.mark.parametrize(
    ("row", "column", "expected"),
    [(0, 2, "above"), (2, 0, "left of"), (0, 0, None), (2, 2, None)],
)
def test_relation(row: float, column: float, expected: str | None) -> None:
    first = Thing("circle", "red", row=row, column=column)
    second = Thing("square", "blue", row=2 if row == 0 else row, column=2)
    if (row, column) == (2, 2):
        second = first
    assert relation(first, second) == expected


def test_captions_hold_the_facts() -> None:
    config = WorldConfig()
    rng = np.random.default_rng(0)
    for scene in scenes(config, 200):
        prompt = plain_prompt(scene, config)
        assert prompt in long_caption(scene, rng, config)
        assert prompt.lower() in alt_text(scene, rng, config).lower()
        assert len(long_caption(scene, rng, config).split()) > 50
        for thing in scene.things:
            assert thing.color in prompt
            assert thing.shape in prompt


@pytest.mark.parametrize(
    ("grid_cells", "size", "row", "column", "words"),
    [
        (4, "large", 0, 1, "top centre"),
        (4, "large", 2, 2, "bottom right"),
        (4, "small", 1, 2, "top right"),
        (2, "small", 0, 0, "top left"),
        (2, "small", 1, 0, "bottom left"),
        (3, "small", 1, 1, "middle centre"),
        (None, "large", 1.0, 2.0, "middle right"),
    ],
)
def test_the_words_for_a_place(
    grid_cells: int | None, size: str, row: float, column: float, words: str
) -> None:
    config = WorldConfig(grid_cells=grid_cells, sizes=(size,))
    assert place(Thing("circle", "red", size, row, column), config) == words


def digests(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_the_same_seed_gives_the_same_bytes(tmp_path: Path) -> None:
    config = WorldConfig(num_rows=60)
    first = digests(build_world(config, tmp_path / "a"))
    assert first == digests(build_world(config, tmp_path / "b"))
    other = digests(build_world(WorldConfig(num_rows=60, seed=1), tmp_path / "c"))
    assert (
        first["metadata/part-00000.snappy.parquet"] != other["metadata/part-00000.snappy.parquet"]
    )


def test_metadata_has_the_real_schema_and_the_announced_traps(tmp_path: Path) -> None:
    config = WorldConfig(num_rows=800, trap_ratio=0.5)
    folder = build_world(config, tmp_path)
    parts = sorted((folder / "metadata").glob("*.parquet"))
    assert len(parts) == config.num_parts
    tables = [pq.read_table(part) for part in parts]
    assert all(table.schema.equals(SCHEMA) for table in tables)
    known = json.loads((folder / "world.json").read_text())
    assert sum(known["rows"].values()) == sum(len(table) for table in tables) == 800
    assert set(known["rows"]) == set(EXPECTED)
    rows = make_rows(config)
    assert Counter(row.trap for row in rows) == known["rows"]
    assert any(row.aesthetic is None for row in rows)
    assert len({row.url for row in rows}) < len(rows)
    truth = pq.read_table(folder / "truth" / "rows.parquet").to_pylist()
    assert {row["expected"] for row in truth} == {"committed", "rejected", "failed", "either"}


def test_render_has_the_asked_size() -> None:
    assert render(Scene("red"), 48, WorldConfig()).size == (48, 48)
