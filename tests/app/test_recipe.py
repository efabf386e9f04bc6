"""Recipes: what is wrong is said once, all together, with its place, its key and its remedy."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from app.recipe import Recipe, RecipeError, load_recipe, recipe_from_text
from infra.config import semantic_part
from infra.errors import UserError

ROOT = Path(__file__).resolve().parent.parent.parent
TINY = ROOT / "tests" / "recipes" / "tiny.yaml"
DEMO = ROOT / "recipes" / "demo.yaml"


def lines_of(*overrides: str, recipe: Path = TINY) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        load_recipe(recipe, overrides)
    return caught.value.lines


def test_a_recipe_with_three_mistakes_gets_three_lines(tmp_path: Path) -> None:
    text = TINY.read_text(encoding="utf-8")
    text = text.replace("num_parts: 2", "num_partz: 2")  # an unknown key
    text = text.replace("codebook_size: 64", "codebook_size: many")  # a wrong value
    text = text.replace("dataset: captioned", "dataset: captoined", 1)  # a dangling name
    path = tmp_path / "three.yaml"
    path.write_text(text, encoding="utf-8")
    lines = lines_of(recipe=path)
    assert len(lines) == 3
    assert lines[0].startswith(f"{path}:9: world.num_partz: unknown key; did you mean num_parts?")
    assert "tokenizer.codebook_size: expected a valid integer" in lines[1]
    assert "(codes); got 'many'; change it, or leave it out for 1024" in lines[1]
    assert "stages.alignment.dataset: no dataset 'captoined'" in lines[2]
    assert lines[2].endswith("did you mean captioned?")
    assert all("\n" not in line for line in lines)


def test_a_format_with_captions_of_its_own_has_synthetic_ones() -> None:
    overrides = ["datasets.captioned.captions={}", "datasets.captioned.format=laion-coco"]
    assert load_recipe(TINY, overrides).datasets["captioned"].format == "laion-coco"


def test_a_missing_key_says_what_it_is() -> None:
    with pytest.raises(RecipeError) as caught:
        recipe_from_text("seed: 1\n", "x.yaml")
    assert caught.value.lines == [
        "x.yaml: name: missing; expected a value (short name; results are registered under it); "
        "add it"
    ]


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("stages.concepts.resolution_px=18", "expected a multiple of 4 px"),
        ("stages.compression.resolution_px=36", "expected a multiple of 8 px"),
        ("stages.concepts.text_tokens=90", "expected at most 77"),
        ("stages.aesthetics.resolution_px=128", "expected at most 64, the side that"),
        ("stages.concepts.crop=bucket", "resize.crop is square; set that to bucket, or take"),
        ("stages.aesthetics.compress=false", "because the stage compression before it"),
        ("stages.compression.init={}", "name their prefixes"),
        ("datasets.captioned.captions={}", "has no synthetic captions"),
        ("tokenizer=null", "the stages need image tokens"),
        ("tokenizer.dataset=none", "no dataset 'none' under `datasets`"),
        ("tokenizer.training.resolutions_px=[32,256]", "expected at most 64"),
        ("world=null", "there is no `world` section"),
        ("network.axes_dims_rope=[4,6,8]", "adds up to 18"),
        ("services={store_uri: 's3://x'}", "together, or neither"),
        ("derived={best: {dataset: captioned, keep: {}}}", "there is no `scoring` section"),
        ("derived={best: {dataset: captioned, caption: true}}", "no `captioning` section"),
        ("derived={best: {dataset: captioned}}", "got none"),
        ("derived={captioned: {dataset: captioned, keep: {}}}", "has this name already"),
        ("derived={best: {dataset: captiond, keep: {}}}", "did you mean captioned?"),
        ("name=Tiny Recipe", "expected string should match pattern"),
        ("stages.concepts.num_workers=2", "cluster.num_workers, 1, for which the Ray of this"),
        ("stages.concepts.num_workers=40", "expected at most 16, a sample of global_batch_size"),
        ("seed=-1", "expected a value greater than or equal to 0"),
        ("datasets.captioned.filters.min_aesthetic_score=.nan", "a finite number"),
        ("datasets.captioned.filters.min_aesthetic_score=99", "less than or equal to 10"),
        ("datasets.captioned.filters.min_aesthetic_score=-1", "greater than or equal to 0"),
        ("derived={best: {dataset: captioned, keep: {min_aesthetic_score: 99}}}", "equal to 10"),
        (
            "derived={best: {dataset: captioned, preference: {clip: {folder: x}, scale: .nan}}}",
            "a finite number",
        ),
        ("services={store_uri: 's3://x', tracking_uri: 'mlflow:5000'}", "should match pattern"),
    ],
)
def test_what_disagrees_is_found(override: str, expected: str) -> None:
    lines = lines_of(override)
    assert any(expected in line for line in lines), lines
    assert all(line.startswith(("--set: ", str(TINY))) for line in lines)


def test_a_password_in_an_address_is_refused_and_not_repeated() -> None:
    address = "http://bob:s3cret@mlflow.example:5000"
    (line,) = lines_of(f"services={{store_uri: 's3://x', tracking_uri: '{address}'}}")
    assert "MLFLOW_TRACKING_PASSWORD" in line
    assert "s3cret" not in line
    for address in ("http://127.0.0.1:5000", "https://mlflow.example/team/", "http://[::1]:5000"):
        asked = f"services={{store_uri: 's3://x', tracking_uri: '{address}'}}"
        assert load_recipe(TINY, [asked]).services.tracking_uri == address


def test_a_mistake_is_not_told_twice() -> None:
    assert len(lines_of("seed=-1")) == 1
    assert len(lines_of("stages.concepts.dataset=7")) == 1


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("name: a\nname: b\n", "x.yaml:2: name is given twice, first on line 1; keep one"),
        ("name: !!python/name:os.system x\n", "x.yaml:1: expected a plain value; got a YAML tag"),
        ("name: [a\n", "x.yaml:2: not YAML"),
        ("- a\n", "expected keys such as `name:` and `stages:`; got list"),
        ("", "got nothing"),
    ],
)
def test_only_plain_yaml_is_taken(text: str, expected: str) -> None:
    with pytest.raises(UserError, match=r"^[^\n]*$") as caught:
        recipe_from_text(text, "x.yaml")
    assert expected in str(caught.value)


def test_a_missing_file_names_its_neighbour() -> None:
    with pytest.raises(UserError, match=r"did you mean .*demo\.yaml\?"):
        load_recipe(DEMO.with_name("demoo.yaml"))


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("stages.concepts.steps", "expected --set section.key=value"),
        ("stages.concpts.steps=3", "nothing is called 'concpts' under 'stages'; did you mean"),
        ("name.x.y=3", "'x' lies inside a value"),
        ("network.axes_dims_rope.9=3", "expected an index below 3"),
        ("seed=!!python/x 3", "got a YAML tag"),
        ("seed=[1", "is not a YAML value"),
    ],
)
def test_a_bad_override_is_one_line(override: str, expected: str) -> None:
    with pytest.raises(UserError) as caught:
        load_recipe(TINY, [override])
    assert expected in str(caught.value)


def test_overrides_reach_everywhere() -> None:
    recipe = load_recipe(
        TINY,
        [
            "stages.concepts.steps=9",
            "network.axes_dims_rope.1=8",
            "network.axes_dims_rope.0=2",
            "cluster.spark_driver_memory_mb=800",
            "evaluation.sheet_prompts=[a red circle]",
        ],
    )
    assert recipe.stages["concepts"].steps == 9
    assert recipe.network.axes_dims_rope == (2, 8, 6)
    assert recipe.cluster.spark_driver_memory_mb == 800
    assert recipe.evaluation is not None
    assert recipe.evaluation.sheet_prompts == ("a red circle",)


def test_the_seed_is_everybodys_unless_they_have_their_own() -> None:
    recipe = load_recipe(TINY, ["seed=7", "stages.alignment.seed=3"])
    assert recipe.world is not None
    assert recipe.tokenizer is not None
    assert (recipe.world.seed, recipe.tokenizer.seed) == (7, 7)
    assert [stage.seed for stage in recipe.stages.values()] == [7, 3, 7, 7]


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").glob("*.yaml")), ids=lambda p: p.stem)
def test_shipped_recipes_say_how_they_are_used(path: Path) -> None:
    load_recipe(path)
    head = path.read_text().partition("\nname: ")[0]
    assert f"recipes/{path.name}" in head
    for word in ("Command", "Expected"):
        assert f"# {word} " in head


def test_a_curation_needs_no_training() -> None:
    recipe = load_recipe(ROOT / "recipes" / "laion.yaml")
    assert not recipe.stages
    assert recipe.tokenizer is None
    assert list(recipe.datasets) == ["laion-512", "laion-512-256", "laion-512-1024"]


def test_stages_keep_the_order_in_which_they_are_written() -> None:
    stages = list(load_recipe(ROOT / "recipes" / "meissonic.yaml").stages)
    assert stages == ["concepts", "alignment", "compression", "aesthetics"]


def test_how_much_machine_is_used_does_not_change_what_comes_out() -> None:
    plain = load_recipe(TINY)
    other = load_recipe(TINY, ["cluster.num_workers=4", "datasets.concepts.fetch.retries=0"])
    assert semantic_part(plain) == semantic_part(other)
    assert plain.fingerprint != other.fingerprint


def test_meissonic_is_the_released_network() -> None:
    recipe = load_recipe(ROOT / "recipes" / "meissonic.yaml")
    network = recipe.network
    assert (network.num_layers, network.num_single_layers) == (14, 28)
    assert (network.num_attention_heads, network.attention_head_dim) == (8, 128)
    assert [s.resolution_px for s in recipe.stages.values()] == [256, 512, 1024, 1024]
    assert [s.global_batch_size for s in recipe.stages.values()][:3] == [2048, 512, 256]
    assert [s.steps for s in recipe.stages.values()][:3] == [100_000, 100_000, 42_000]
    assert [s.compress for s in recipe.stages.values()] == [False, False, True, True]
    assert [s.train_text_encoder for s in recipe.stages.values()] == [False, False, False, True]


def test_a_resolved_recipe_is_a_recipe() -> None:
    recipe = load_recipe(DEMO)
    assert Recipe.model_validate(recipe.model_dump(mode="json")) == recipe


SIZES = """
name: sized
datasets:
  photos:
    metadata: [x]
    resize: {image_size_px: 64, encode_format: webp}
    also_sizes_px: [128, 512]
"""


def test_a_dataset_at_several_sizes_is_several_datasets() -> None:
    recipe = recipe_from_text(SIZES, "sized.yaml")
    assert list(recipe.datasets) == ["photos", "photos-128", "photos-512"]
    found = [dataset.resize for dataset in recipe.datasets.values()]
    assert [each.image_size_px for each in found] == [64, 128, 512]
    assert [each.if_smaller for each in found] == ["keep", "reject", "reject"]
    assert {each.encode_format for each in found} == {"webp"}
    resolved = yaml.safe_dump(recipe.model_dump(mode="json"))
    assert recipe_from_text(resolved, "resolved.yaml") == recipe


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ("[128, 128]", "photos-128, which is there already"),
        ("[4]", "also_sizes_px.0"),
        ("[big]", "also_sizes_px.0"),
        ("128", "also_sizes_px: expected"),
        ("[128]\n    source: 3", "datasets.photos.source"),
    ],
)
def test_sizes_that_cannot_be_are_told_once(written: str, expected: str) -> None:
    with pytest.raises(RecipeError) as caught:
        recipe_from_text(SIZES.replace("[128, 512]", written), "sized.yaml")
    assert len(caught.value.lines) == 1
    assert expected in caught.value.lines[0]


def test_workers_fit_the_batch_and_the_ray_they_run_on() -> None:
    three = ["stages.concepts.num_workers=3", "cluster.num_workers=3"]
    assert load_recipe(TINY, three).stages["concepts"].num_workers == 3
    (line,) = lines_of(*three, "stages.concepts.strategy=fsdp")
    assert "stages.concepts.global_batch_size: expected a multiple of num_workers, 3" in line
    assert "take 15" in line
    elsewhere = ["stages.concepts.num_workers=16", "cluster.ray_address=head:6379"]
    assert load_recipe(TINY, elsewhere).stages["concepts"].num_workers == 16
