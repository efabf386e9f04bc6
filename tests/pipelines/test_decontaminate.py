"""Captions that repeat evaluation prompts: exact ones, changed ones, and clean ones."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from infra.errors import UserError
from pipelines.captions import CAPTIONS_TYPE
from pipelines.decontaminate import (
    MIN_NEAR_WORDS,
    PromptIndex,
    contaminated,
    decontamination_part,
    prompts_sha256,
    read_prompts,
    words_of,
)
from pipelines.duplicate_config import DecontaminationConfig
from pipelines.plan import plan_curation
from tests.pipelines.conftest import EvilWeb, make_trap_world
from tests.pipelines.test_build import ledger, run

# Prompts of GenEval, a public evaluation set.
GENEVAL = Path(__file__).parent / "data" / "geneval_prompts.txt"
MIN_LIKENESS = DecontaminationConfig().min_prompt_likeness

WHO = ["a young man", "two women", "a group of people", "a small child", "an old lady", "a cat",
       "a brown dog", "three zebras", "a surfer", "a baseball player", "a herd of sheep",
       "a white truck", "a red double decker bus", "a bathroom sink", "a wooden bench"]  # fmt: skip
DOES = ["standing", "sitting", "parked", "resting", "playing", "waiting", "lying", "walking",
        "posing", "seen"]  # fmt: skip
WHERE = ["next to a pile of luggage", "in front of a stone building", "on top of a kitchen counter",
         "under a striped umbrella", "on a crowded city street", "near a wire fence",
         "in a grassy field full of flowers", "beside a parked motorcycle",
         "at the edge of a frozen lake", "behind a glass window"]  # fmt: skip
WHILE = ["on a sunny day", "while holding a phone", "at night", "during a storm", "with a smile",
         "as the sun goes down", "eating a slice of pizza", "wearing a blue jacket"]  # fmt: skip


def phrases(seed: int, count: int) -> list[tuple[str, ...]]:
    """Different sentences like the captions of COCO, from one grammar of four phrases."""
    rng = random.Random(seed)
    found: dict[tuple[str, ...], None] = {}
    while len(found) < count:
        found[tuple(rng.choice(kind) for kind in (WHO, DOES, WHERE, WHILE))] = None
    return list(found)


def sentences(seed: int, count: int) -> list[str]:
    return [" ".join(parts) for parts in phrases(seed, count)]


def perturbed(prompt: str, rng: random.Random) -> str:
    """One of the ways in which a caption on the web repeats a sentence."""
    words = prompt.split()
    place = rng.randrange(len(words))
    how = rng.randrange(8)
    if how == 0:
        words[place] = words[place][:1] + words[place][2:] if len(words[place]) > 2 else "the"
    elif how == 1:
        words.insert(place, rng.choice(["very", "beautiful", "the", "vintage"]))
    elif how == 2:
        del words[place]
    elif how == 3:
        other = (place + 1) % len(words)
        words[place], words[other] = words[other], words[place]
    elif how == 4:
        return f"Stock photo: {prompt.upper()}!!! | free wallpaper, hd"
    elif how == 5:
        return prompt.title().replace(" ", "  ") + "."
    elif how == 6:
        return f"I love this one - {prompt} - 1080p jpg"
    else:
        words = ["\uff41" if word == "a" else word for word in words] + ["photo"]
    return " ".join(words)


def test_repeated_prompts_are_found_and_clean_captions_pass() -> None:
    """All of the exact ones, 95 % of the changed ones, and the rate of false alarms."""
    every = phrases(1, 3100)
    prompts = [" ".join(parts) for parts in every[:100]]
    index = PromptIndex(prompts, MIN_LIKENESS)
    rng = random.Random(2)
    assert all(index.holds(prompt) for prompt in prompts)
    changed = sum(index.holds(perturbed(prompt, rng)) for prompt in prompts)
    # Clean ones come from the same few phrases: by how many of four one shares with a prompt.
    alarms: Counter[int] = Counter()
    clean: Counter[int] = Counter()
    for parts in every[100:]:
        shared = max(sum(a == b for a, b in zip(parts, p, strict=True)) for p in every[:100])
        clean[shared] += 1
        alarms[shared] += index.holds(" ".join(parts))
    print(f"changed {changed}/100, false alarms by shared phrases {dict(alarms)} of {dict(clean)}")
    assert changed >= 95
    assert clean[2] > 1000
    assert alarms[0] + alarms[1] + alarms[2] <= 0.001 * clean.total()


def test_alt_texts_of_another_kind_raise_no_alarm() -> None:
    prompts = read_prompts(str(GENEVAL))
    index = PromptIndex(prompts, MIN_LIKENESS)
    assert all(index.holds(prompt) for prompt in prompts)
    assert not any(index.holds(caption) for caption in sentences(3, 2000))
    assert not index.holds("a photo of a lovely evening in the mountains of Norway")
    assert not index.holds("bench")


def test_a_prompt_inside_a_longer_text_is_found() -> None:
    index = PromptIndex(["A brown dog, resting on the sofa", "a dog"], None)
    assert index.holds("yesterday we saw a Brown Dog resting on the sofa and left it there")
    assert index.holds("A DOG!")
    assert index.holds("Holidays. A dog. More holidays.")
    assert not index.holds("a dog and a cat")
    assert not index.holds("a brown dog resting on the floor")


WORDS = st.lists(
    st.sampled_from(["red", "fox", "blue", "bench", "photo", "of", "a", "sky", "foxes"]),
    min_size=MIN_NEAR_WORDS, max_size=7,
).map(" ".join)  # fmt: skip


@settings(deadline=None, max_examples=200)
@given(st.lists(WORDS, min_size=1, max_size=12), WORDS, st.floats(0.2, 1.0))
def test_the_look_up_misses_no_prompt(prompts: list[str], caption: str, least: float) -> None:
    """Only the rarest trigrams are looked up; all prompts compared one by one find the same."""
    index = PromptIndex(prompts, least)
    everyone = PromptIndex(prompts, least)
    for number, grams in enumerate(everyone._grams):
        for gram in grams:
            everyone._rare[gram].append(number)
    assert index._is_near(words_of(caption)) == everyone._is_near(words_of(caption))


def rows_of(*texts: tuple[str, list[str]]) -> pl.DataFrame:
    captions = [
        [{"origin": "synthetic", "text": t, "model": None} for t in more] for _, more in texts
    ]
    return pl.DataFrame(
        {"caption": [text for text, _ in texts], "captions": captions},
        schema={"caption": pl.String, "captions": CAPTIONS_TYPE},
    )


def test_any_caption_of_a_row_counts(tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "two cats on a mat", "tag": "x"}\n\n{"caption": "one red fox"}\n')
    config = DecontaminationConfig(prompts=[str(file)])
    rows = rows_of(("hello", ["Two cats on a mat."]), ("one red fox", []), ("a cat", ["a mat"]))
    assert contaminated(rows, config).to_list() == [True, True, False]
    assert contaminated(rows, DecontaminationConfig()).to_list() == [False] * 3


def test_prompts_are_known_by_their_content(tmp_path: Path) -> None:
    lines, table = tmp_path / "a.txt", tmp_path / "b.parquet"
    lines.write_text("one\ntwo\n")
    pl.DataFrame({"TEXT": ["two", "one"]}).write_parquet(table)
    digests = {prompts_sha256(DecontaminationConfig(prompts=[str(f)])) for f in (lines, table)}
    assert len(digests) == 1
    lines.write_text("one\nthree\n")
    assert prompts_sha256(DecontaminationConfig(prompts=[str(lines)])) not in digests


@pytest.mark.parametrize(
    ("name", "content"),
    [("a.jsonl", '{"x": 1}'), ("a.jsonl", "{"), ("a.txt", "\n"), ("a.parquet", "x")],
)
def test_a_file_without_prompts_is_one_line(tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match="expected prompts in") as caught:
        read_prompts(str(tmp_path / name))
    assert "\n" not in str(caught.value)


def test_a_curation_keeps_prompts_out_and_says_which(tmp_path: Path, evil_web: EvilWeb) -> None:
    world = make_trap_world(tmp_path / "traps", evil_web, num_good=6)
    world.write()
    store = (tmp_path / "store").as_uri()
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("picture number 3\npicture number 4\n")
    asked = {"prompts": [str(prompts)], "min_prompt_likeness": None}
    config = world.config(decontaminate=asked, captions={"files": []})
    plain = plan_curation("kept", world.config(captions={"files": []}), store)
    plan = plan_curation("kept", config, store)
    manifest = run(plan)
    rows = ledger(plan.build, manifest).filter(pl.col("reason") == "contaminated")
    assert sorted(rows["url"]) == [f"http://evil.example/good/{n}.jpg" for n in (3, 4)]
    assert manifest.rejected["contaminated"] == 2
    assert manifest.attributes["decontaminated"] == {
        "prompts_sha256": prompts_sha256(config.decontaminate)
    }
    assert not any("/good/3.jpg" in head for head in evil_web.requests)
    keys = {plain.build_key, plan.build_key}
    prompts.write_text("picture number 5\n")
    assert plan_curation("kept", config, store).build_key not in keys
    assert decontamination_part(DecontaminationConfig()) == {}
