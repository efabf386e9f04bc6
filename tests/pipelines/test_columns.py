"""Every published schema, made here to the column and the type, into canonical rows."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any, get_args

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from infra.errors import UserError
from pipelines.columns import CANONICAL_SCHEMA, canonical_rows, layout_of, own_captions, sample_id
from pipelines.columns import sample_ids as ids_of
from pipelines.config import CurationConfig, FetchConfig, FormatName
from pipelines.inputs import check_inputs, find_inputs, metadata_batches, units_of
from pipelines.sources import SOURCE_FORMATS

I32, I64, F32, F64, STR = pa.int32(), pa.int64(), pa.float32(), pa.float64(), pa.string()
U = "http://a.example/1.jpg"
SHA, MD5 = "ab" * 32, "cd" * 16
Columns = dict[str, tuple[pa.DataType, Any]]


def canonical(**known: Any) -> dict[str, Any]:
    row = dict.fromkeys(name for name in CANONICAL_SCHEMA.names if name != "sample_id")
    return row | {"url": U, "caption": "a fox", "source": "laion"} | known


JOINED: Columns = {
    "URL": (STR, U), "TEXT": (STR, "a fox"), "WIDTH": (I32, 640), "HEIGHT": (I32, 480),
    "similarity": (F64, 0.3), "hash": (I64, -5), "punsafe": (F32, 0.125),
    "pwatermark": (F32, 0.25),
}  # fmt: skip
JOINED_ROW: dict[str, Any] = {
    "width_px": 640, "height_px": 480, "clip_similarity": 0.3, "unsafe_prob": 0.125,
    "watermark_prob": 0.25,
}  # fmt: skip
BLIP = "BLIP ViT-L/14, chosen by CLIP (LAION-COCO)"
# What is published -> the format it is found to be, the canonical row, its long captions.
CASES: dict[str, tuple[Columns, str, dict[str, Any], list[tuple[str, str]]]] = {
    "laion2B-en raw": (
        {"SAMPLE_ID": (I64, 1), "URL": (STR, U), "TEXT": (STR, "a fox"), "HEIGHT": (I32, 480),
         "WIDTH": (I32, 640), "LICENSE": (STR, "?"), "NSFW": (STR, "UNLIKELY"),
         "similarity": (F64, 0.3)},
        "laion-raw", canonical(width_px=480, height_px=640, clip_similarity=0.3), []),
    "laion2B-multi raw": (
        {"SAMPLE_ID": (I64, 1), "URL": (STR, U), "TEXT": (STR, "a fox"), "HEIGHT": (I32, 480),
         "WIDTH": (I32, 640), "LICENSE": (STR, "?"), "NSFW": (STR, "UNLIKELY"),
         "similarity": (F64, 0.3), "LANGUAGE": (STR, "De")},
        "laion-raw",
        canonical(width_px=480, height_px=640, clip_similarity=0.3, language="de"), []),
    "laion2B-en-md5": (
        JOINED | {"md5": (STR, MD5.upper())}, "laion-joined",
        canonical(**JOINED_ROW, recorded_md5=MD5), []),
    "laion2B-en-joined": (JOINED, "laion-joined", canonical(**JOINED_ROW), []),
    "laion2B-en-aesthetic": (
        JOINED | {"aesthetic": (F32, 7.5)}, "laion-aesthetic-v1",
        canonical(**JOINED_ROW, aesthetic_score=7.5, aesthetic_scale="v1"), []),
    "laion-art": (
        JOINED | {"LANGUAGE": (STR, "en"), "aesthetic": (F32, 8.5)}, "laion-aesthetic-v1",
        canonical(**JOINED_ROW, language="en", aesthetic_score=8.5, aesthetic_scale="v1"), []),
    "laion-high-resolution": (
        JOINED | {"LANGUAGE": (STR, "en")}, "laion-joined",
        canonical(**JOINED_ROW, language="en"), []),
    "improved_aesthetics_6plus": (
        JOINED | {"WIDTH": (F64, 640.0), "HEIGHT": (F64, 480.0), "punsafe": (F64, 0.125),
                  "pwatermark": (F64, 0.25), "AESTHETIC_SCORE": (F64, 6.5),
                  "__index_level_0__": (I64, 7)},
        "laion-aesthetics-v2",
        canonical(**JOINED_ROW, aesthetic_score=6.5, aesthetic_scale="v2"), []),
    "Re-LAION, least": (
        {"url": (STR, U), "caption": (STR, "a fox")}, "re-laion", canonical(), []),
    "Re-LAION, as fetched": (
        {"url": (STR, U), "caption": (STR, "a fox"), "similarity": (F64, 0.3),
         "punsafe": (F64, 0.125), "pwatermark": (F64, 0.25), "key": (STR, "0"),
         "status": (STR, "success"), "width": (I64, 256), "height": (I64, 192),
         "original_width": (I64, 640), "original_height": (I64, 480), "exif": (STR, "{}"),
         "md5": (STR, MD5), "sha256": (STR, SHA.upper())},
        "re-laion", canonical(**JOINED_ROW, recorded_sha256=SHA, recorded_md5=MD5), []),
    "LAION-COCO": (
        JOINED | {"WIDTH": (F64, 640.0), "HEIGHT": (F64, 480.0), "top_caption": (STR, "a red fox"),
                  "all_captions": (pa.list_(STR), ["a red fox", "one fox"]),
                  "all_similarities": (pa.list_(F64), [0.4, 0.3])},
        "laion-coco", canonical(**JOINED_ROW),
        [("a red fox", BLIP), ("a red fox", BLIP), ("one fox", BLIP)]),
    "DataComp": (
        {"uid": (STR, "0" * 32), "url": (STR, U), "text": (STR, "a fox"),
         "original_width": (I64, 640), "original_height": (I64, 480),
         "clip_b32_similarity_score": (F32, 0.25), "clip_l14_similarity_score": (F32, 0.5),
         "face_bboxes": (pa.list_(pa.list_(F64)), [[0.0, 0.0, 1.0, 1.0]]), "sha256": (STR, SHA)},
        "datacomp",
        canonical(width_px=640, height_px=480, clip_similarity=0.25, recorded_sha256=SHA), []),
    "COYO-700M": (
        {"id": (I64, 1), "url": (STR, U), "text": (STR, "a fox"), "width": (I32, 640),
         "height": (I32, 480), "image_phash": (STR, "c9b6a7d8469c1959"), "text_length": (I32, 5),
         "word_count": (I32, 2), "num_tokens_bert": (I32, 2), "num_tokens_gpt": (I32, 2),
         "num_faces": (I32, 0), "clip_similarity_vitb32": (F32, 0.25),
         "clip_similarity_vitl14": (F32, 0.5), "nsfw_score_opennsfw2": (F32, 0.125),
         "nsfw_score_gantman": (F32, 0.75), "watermark_score": (F32, 0.25),
         "aesthetic_score_laion_v2": (F32, 5.5)},
        "coyo",
        canonical(width_px=640, height_px=480, clip_similarity=0.25, unsafe_prob=0.125,
                  watermark_prob=0.25, aesthetic_score=5.5, aesthetic_scale="v2"), []),
    "CapsFusion-120M": (
        {"image_url": (STR, U), "laion_2b": (STR, "a fox"), "laion_coco": (STR, "a red fox"),
         "capsfusion": (STR, "A red fox sits.")},
        "capsfusion", canonical(),
        [("a red fox", BLIP), ("A red fox sits.", "CapsFus-LLaMA (CapsFusion)")]),
    "Recap-DataComp-1B": (
        {"url": (STR, U), "re_caption": (STR, "A red fox sits."), "org_caption": (STR, "a fox"),
         "sha256": (STR, SHA), "key": (STR, "0"), "re_clip_score": (F64, 0.5),
         "org_clip_score": (F64, 0.5), "re_length": (I64, 4), "org_length": (I64, 2),
         "re_gpt4v_score": (I64, 5), "org_gpt4v_score": (I64, 2)},
        "recap-datacomp", canonical(recorded_sha256=SHA),
        [("A red fox sits.", "LLaVA-1.5-LLaMA3-8B (Recap-DataComp)")]),
    "PixelProse": (
        {"uid": (STR, "0"), "url": (STR, U), "original_caption": (STR, "a fox"),
         "vlm_caption": (STR, " This image displays: A red fox. "), "aesthetic_score": (F64, 5.5),
         "watermark_class_id": (I64, 0), "original_width": (I64, 640),
         "original_height": (I64, 480)},
        "pixelprose", canonical(width_px=640, height_px=480, watermark_prob=1.0),
        [("A red fox.", "Gemini 1.0 Pro Vision (PixelProse)")]),
    "large strings": (
        {"URL": (pa.large_string(), U), "TEXT": (pa.large_string(), "a fox")},
        "laion-joined", canonical(), []),
}  # fmt: skip


def config(**filters: Any) -> CurationConfig:
    return CurationConfig.model_validate({"metadata": ["x"], "filters": filters})


def table(columns: Columns) -> pa.Table:
    return pa.table({name: pa.array([value], kind) for name, (kind, value) in columns.items()})


@pytest.mark.parametrize("name", CASES)
def test_every_published_schema_becomes_ours(name: str) -> None:
    columns, format_name, expected, long = CASES[name]
    raw = table(columns)
    layout = layout_of(raw.schema, config(), "file")
    rows = canonical_rows(raw.select(layout.columns), layout, "laion")
    assert layout.format == format_name
    assert rows.row(0, named=True) == expected
    whole = rows.with_columns(ids_of(rows)).select(CANONICAL_SCHEMA.names)
    assert whole.to_arrow().cast(CANONICAL_SCHEMA).num_rows == 1
    assert whole["sample_id"][0] == sample_id(U, "a fox")
    captions = own_captions(raw, rows["url"], layout, None)
    assert captions.rows() == [(U, text, model) for text, model in long]
    assert own_captions(raw, pl.Series([None], dtype=pl.String), layout, None).is_empty()
    assert own_captions(raw, rows["url"], layout, 2).is_empty()


def test_the_table_of_formats_is_whole_and_tells_them_apart() -> None:
    assert set(SOURCE_FORMATS) == set(get_args(FormatName))
    marks = {known.marks for known in SOURCE_FORMATS.values()}
    assert len(marks) == len(SOURCE_FORMATS)


@pytest.mark.parametrize(("class_id", "prob"), [(0, 1.0), (1, 0.0), (2, 0.0), (3, None)])
def test_a_watermark_class_is_certain_or_nothing(class_id: int, prob: float | None) -> None:
    raw = table(CASES["PixelProse"][0] | {"watermark_class_id": (I64, class_id)})
    rows = canonical_rows(raw, layout_of(raw.schema, config(max_watermark_prob=0.5), "f"), "s")
    assert rows["watermark_prob"].to_list() == [prob]


def test_a_pair_is_two_rows(tmp_path: Path) -> None:
    columns: Columns = {
        "are_different": (pa.bool_(), True), "best_image_uid": (STR, "1"),
        "caption": (STR, "a fox"), "created_at": (pa.timestamp("us"), 0),
        "has_label": (pa.bool_(), True),
        "image_0_uid": (STR, "0"), "image_0_url": (STR, U), "image_1_uid": (STR, "1"),
        "image_1_url": (STR, U + "2"), "jpg_0": (pa.binary(), b"x"), "jpg_1": (pa.binary(), b"y"),
        "label_0": (F64, 0.0), "label_1": (F64, 1.0), "model_0": (STR, "m"), "model_1": (STR, "m"),
        "ranking_id": (I64, 1), "user_id": (I64, 1), "num_example_per_prompt": (I64, 1),
    }  # fmt: skip
    pq.write_table(table(columns), tmp_path / "pairs.parquet")
    asked = CurationConfig(metadata=[str(tmp_path)])
    (file,) = find_inputs(asked)
    assert file.num_rows == 2
    ((raw, layout),) = metadata_batches(units_of([file])[0], asked)
    assert layout.format == "pick-a-pic"
    assert not {"jpg_0", "jpg_1"} & set(raw.columns)
    assert canonical_rows(raw, layout, "laion").rows(named=True) == [
        canonical(human_preference=0.0),
        canonical(url=U + "2", human_preference=1.0),
    ]


JOURNEY = {
    "img_path": "./000/fox.jpg", "prompt": "a fox", "Task1": {"Style": ["x"], "Content": ["y"]},
    "Task2": {"Caption": "A red fox sits."}, "Task3": [{"Question": "?"}],
}  # fmt: skip
CHOICE = {"human_preference": [1, 0], "prompt": "a fox", "file_path": ["1.jpg", "2.jpg"]}


def lines(path: Path, *records: Any) -> CurationConfig:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return CurationConfig.model_validate(
        {"metadata": [str(path)], "image_base_url": "https://images.example/set/"}
    )


def rows_of(asked: CurationConfig) -> list[dict[str, Any]]:
    files = find_inputs(asked)
    batches = [batch for unit in units_of(files) for batch in metadata_batches(unit, asked)]
    rows = pl.concat(canonical_rows(raw, layout, "laion") for raw, layout in batches)
    assert rows.height == sum(file.num_rows for file in files)
    return rows.rows(named=True)


def test_json_lines_become_ours(tmp_path: Path) -> None:
    base = "https://images.example/set/"
    asked = lines(tmp_path / "j.jsonl", JOURNEY, "no record", {"prompt": 5})
    nothing = canonical(url="", caption="")
    assert rows_of(asked) == [canonical(url=base + "000/fox.jpg"), nothing, nothing]
    (unit,) = units_of(find_inputs(asked))
    ((raw, layout),) = metadata_batches(unit, asked)
    urls = canonical_rows(raw, layout, "laion")["url"]
    assert own_captions(raw, urls, layout, None).rows()[0] == (
        base + "000/fox.jpg", "A red fox sits.", "GPT-3.5 (JourneyDB)",
    )  # fmt: skip
    asked = lines(tmp_path / "h.json", CHOICE)
    assert rows_of(asked) == [
        canonical(url=base + "1.jpg", human_preference=1.0),
        canonical(url=base + "2.jpg", human_preference=0.0),
    ]


@pytest.mark.parametrize("ending", ["", "\n"])
@pytest.mark.parametrize("num_lines", [1, 6, 7, 8, 14, 40])
def test_json_lines_are_cut_into_blocks_of_whole_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_lines: int, ending: str
) -> None:
    monkeypatch.setattr("pipelines.json_lines.BlockCutter.__init__.__defaults__", (7,))
    monkeypatch.setattr("pipelines.inputs._READ_BYTES", 100)
    asked = lines(
        tmp_path / "j.jsonl", *(JOURNEY | {"img_path": f"{n}.jpg"} for n in range(num_lines))
    )
    path = tmp_path / "j.jsonl"
    path.write_text(path.read_text().removesuffix("\n") + ending)
    (file,) = find_inputs(asked)
    assert len(file.row_groups) == math.ceil(num_lines / 7)
    urls = [row["url"] for row in rows_of(asked)]
    assert urls == [f"https://images.example/set/{n}.jpg" for n in range(num_lines)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[\n{}]", "got one array; turn it into lines: jq"),
        ("", "one JSON record a line"),
        ("not json\n", "got b'not json'"),
        ('{"a": 1}\n', "nearest journeydb, without Task2.Caption, img_path, prompt"),
    ],
)
def test_json_that_does_not_fit_is_one_line(tmp_path: Path, text: str, expected: str) -> None:
    (tmp_path / "x.jsonl").write_text(text)
    with pytest.raises(UserError) as caught:
        check_inputs(CurationConfig(metadata=[str(tmp_path / "x.jsonl")]))
    assert expected in str(caught.value)
    assert "x.jsonl" in str(caught.value)


def test_paths_need_an_address(tmp_path: Path) -> None:
    asked = lines(tmp_path / "j.jsonl", JOURNEY).model_copy(update={"image_base_url": None})
    with pytest.raises(UserError, match="`image_base_url` in the recipe"):
        check_inputs(asked)


def test_swapping_can_be_said() -> None:
    raw = table(JOINED)
    said = CurationConfig(metadata=["x"], swapped_sizes=True)
    row = canonical_rows(raw, layout_of(raw.schema, said, "f"), "s").row(0, named=True)
    assert (row["width_px"], row["height_px"]) == (480, 640)


PAIR: Columns = {"URL": (STR, U), "TEXT": (STR, "t")}


@pytest.mark.parametrize(
    ("columns", "filters", "expected"),
    [
        ({"TEXT": (STR, "t")}, {}, "nearest laion-joined, without URL"),
        ({"URL": (STR, U)}, {}, "nearest laion-joined, without TEXT"),
        ({"URL": (I64, 1), "TEXT": (STR, "t")}, {}, "URL as text"),
        ({"URL": (STR, U), "TEXT": (F64, 1.0)}, {}, "TEXT as text"),
        (PAIR | {"pwatermark": (STR, "x")}, {}, "pwatermark as a number"),
        (PAIR | {"top_caption": (I64, 1)}, {}, "top_caption as text"),
        (PAIR, {"min_width_px": 1}, "a column for width_px, a column for height_px"),
        (PAIR, {"max_unsafe_prob": 0.5}, "a column for unsafe_prob"),
        (PAIR, {"max_watermark_prob": 0.5}, "a column for watermark_prob"),
        (PAIR, {"min_clip_similarity": 0.2}, "a column for clip_similarity"),
        (PAIR, {"languages": ["en"]}, "a column for language"),
        (PAIR, {"min_aesthetic_score": 4.5}, "a column for aesthetic_score"),
        (PAIR | {"aesthetic": (F32, 7.0), "AESTHETIC_SCORE": (F32, 5.0)}, {},
         "got what fits laion-aesthetic-v1 and laion-aesthetics-v2; set `format`"),
    ],
)  # fmt: skip
def test_a_schema_that_does_not_fit_is_one_line(
    columns: Columns, filters: dict[str, Any], expected: str
) -> None:
    with pytest.raises(UserError) as caught:
        layout_of(table(columns).schema, config(**filters), "part-7.parquet")
    assert expected in str(caught.value)
    assert "part-7.parquet" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_column_that_is_there_twice_is_one_line(tmp_path: Path) -> None:
    twice = pa.Table.from_arrays(
        [pa.array([U]), pa.array(["a"]), pa.array([U])], ["URL", "TEXT", "URL"]
    )
    pq.write_table(twice, tmp_path / "part-7.parquet")
    with pytest.raises(UserError, match=r"part-7\.parquet once; got URL more than once; rename"):
        find_inputs(CurationConfig(metadata=[str(tmp_path)]))


@pytest.mark.parametrize("giant", [False, True])
def test_categories_are_text(tmp_path: Path, giant: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if giant:  # read by Arrow
        monkeypatch.setattr("pipelines.parquet.GIANT_GROUP_BYTES", 0)
    plain: Columns = PAIR | {"LANGUAGE": (STR, "De"), "top_caption": (STR, "a long one")}
    raw = table(plain)
    coded = pa.table({name: raw[name].dictionary_encode() for name in plain})
    pq.write_table(coded, tmp_path / "coded.parquet")
    asked = CurationConfig.model_validate(
        {"metadata": [str(tmp_path)], "filters": {"languages": ["de"]}}
    )
    (unit,) = units_of(find_inputs(asked))
    ((found, layout),) = metadata_batches(unit, asked, without_rejected=True)
    rows = canonical_rows(found, layout, "s")
    assert rows.equals(canonical_rows(raw, layout_of(raw.schema, asked, "f"), "s"))
    assert rows.select("url", "caption", "language").row(0) == (U, "t", "de")
    assert own_captions(found, rows["url"], layout, None)["caption"].to_list() == ["a long one"]


def test_a_format_can_be_named_and_is_held_to() -> None:
    both = table(PAIR | {"aesthetic": (F32, 7.0), "AESTHETIC_SCORE": (F32, 5.0)})
    for name, score in (("laion-aesthetic-v1", 7.0), ("laion-aesthetics-v2", 5.0)):
        asked = CurationConfig.model_validate({"metadata": ["x"], "format": name})
        layout = layout_of(both.schema, asked, "f")
        assert canonical_rows(both, layout, "s")["aesthetic_score"].to_list() == [score]
    asked = CurationConfig(metadata=["x"], format="coyo")
    with pytest.raises(UserError, match="expected coyo in f: id, image_phash, text, url column;"):
        layout_of(both.schema, asked, "f")


RAW, *_ = CASES["laion2B-en raw"]
TRACES = ("SAMPLE_ID", "LICENSE", "NSFW")
SOME_TRACES = [
    names for number in (1, 2) for names in itertools.combinations(TRACES, number)
]  # fmt: skip


@pytest.mark.parametrize("dropped", SOME_TRACES)
@pytest.mark.parametrize("more", [{}, {"AESTHETIC_SCORE": (F32, 5.0)}, {"hash": (I64, 1)}])
def test_a_thinner_copy_of_a_raw_file_is_not_taken_for_another_set(
    dropped: tuple[str, ...], more: Columns
) -> None:
    """Their sizes are the other way round, and nothing else tells them apart."""
    columns = {name: value for name, value in RAW.items() if name not in dropped}
    raw = table(columns | more)
    fits = "laion-aesthetics-v2" if "AESTHETIC_SCORE" in more else "laion-joined"
    left = ", ".join(sorted(set(TRACES) - set(dropped)))
    with pytest.raises(UserError) as caught:
        layout_of(raw.schema, config(), "part-7.parquet")
    assert str(caught.value) == (
        f"expected one known schema in part-7.parquet; got what fits {fits} and in part (by {left})"
        " laion-raw: LAION-2B raw, whose WIDTH and HEIGHT are exchanged; set `format` to the one "
        "it is"
    )
    for told, sizes in (
        ({"format": "laion-raw"}, (480, 640)),
        ({"format": fits}, (640, 480)),
        ({"swapped_sizes": True}, (480, 640)),
        ({"swapped_sizes": False}, (640, 480)),
    ):
        asked = CurationConfig.model_validate({"metadata": ["x"], **told})
        layout = layout_of(raw.schema, asked, "f")
        row = canonical_rows(raw, layout, "s").row(0, named=True)
        assert (row["width_px"], row["height_px"]) == sizes


def test_without_sizes_a_raw_file_is_like_any_other() -> None:
    columns = {name: value for name, value in RAW.items() if name not in ("WIDTH", "LICENSE")}
    assert layout_of(table(columns).schema, config(), "f").format == "laion-joined"
    asked = CurationConfig(metadata=["x"], format="laion-raw")
    with pytest.raises(UserError, match="expected laion-raw in f: WIDTH column; got"):
        layout_of(table(columns).schema, asked, "f")


@pytest.mark.parametrize("unknown", ["drop", "keep", "later"])
@pytest.mark.parametrize(("scale", "other"), [("v1", "v2"), ("v2", "v1")])
def test_a_threshold_on_the_other_scale_is_refused(scale: str, other: str, unknown: str) -> None:
    raw = table(PAIR | {("aesthetic" if scale == "v1" else "AESTHETIC_SCORE"): (F32, 7.0)})
    policy = {"aesthetic_score": unknown}
    asked = config(min_aesthetic_score=4.5, aesthetic_scale=other, unknown=policy)
    with pytest.raises(UserError, match=f"on scale {other} in f; got scale {scale}"):
        layout_of(raw.schema, asked, "f")
    assert layout_of(raw.schema, config(aesthetic_scale=other), "f").aesthetic_scale == scale


def test_two_scales_make_no_dataset(tmp_path: Path) -> None:
    for name in ("aesthetic", "AESTHETIC_SCORE"):
        pq.write_table(table(PAIR | {name: (F32, 7.0)}), tmp_path / f"{name}.parquet")
    with pytest.raises(UserError, match=r"on one scale .* got v1 in .* and v2 in .*"):
        check_inputs(CurationConfig(metadata=[str(tmp_path)]))


@pytest.mark.parametrize("policy", ["keep", "later"])
def test_a_column_may_lack_where_unknown_rows_go_on(policy: str) -> None:
    names = ("size", "aesthetic_score", "watermark_prob", "unsafe_prob", "clip_similarity",
             "language")  # fmt: skip
    asked = config(
        min_width_px=1, min_aesthetic_score=5, max_watermark_prob=0.5, max_unsafe_prob=0.5,
        min_clip_similarity=0.2, languages=["en"], unknown=dict.fromkeys(names, policy),
    )  # fmt: skip
    assert layout_of(table(PAIR).schema, asked, "f").columns == ["URL", "TEXT"]


def test_a_column_may_be_all_null() -> None:
    raw = pa.table({"URL": ["u"], "TEXT": pa.nulls(1), "pwatermark": pa.nulls(1)})
    row = canonical_rows(raw, layout_of(raw.schema, config(), "f"), "s").row(0, named=True)
    assert (row["caption"], row["watermark_prob"]) == ("", None)


@pytest.mark.parametrize(
    ("column", "canonical_name", "unknown"),
    [
        ("pwatermark", "watermark_prob", [None, math.nan, -1.0, 2.0, math.inf, -math.inf]),
        ("punsafe", "unsafe_prob", [None, math.nan, -0.001, 1.001]),
        ("AESTHETIC_SCORE", "aesthetic_score", [None, math.nan, -1.0, 10.5]),
        ("similarity", "clip_similarity", [None, math.nan, -1.5, 1.5]),
        ("WIDTH", "width_px", [None, math.nan, 0.0, -5.0, 0.5, math.inf, 1e9]),
        ("HEIGHT", "height_px", [None, math.nan, 0.0, -5.0, math.inf, 1e9]),
        ("LANGUAGE", "language", [None, "", " ", "XX", "und"]),
        (
            "md5",
            "recorded_md5",
            [None, "", "0", MD5[1:], MD5 + "0", MD5[1:] + "g", MD5 + "\n", SHA],
        ),
    ],
)
def test_values_that_say_nothing_are_null(
    column: str, canonical_name: str, unknown: list[Any]
) -> None:
    kind = STR if column in ("LANGUAGE", "md5") else F64
    columns = {"URL": ["u"] * len(unknown), "TEXT": ["t"] * len(unknown)}
    raw = pa.table(columns | {column: pa.array(unknown, kind)})
    rows = canonical_rows(raw, layout_of(raw.schema, config(), "f"), "s")
    assert rows[canonical_name].to_list() == [None] * len(unknown)


def test_a_digest_to_compare_with_must_be_in_the_metadata_where_the_recipe_asks(
    tmp_path: Path,
) -> None:
    for name, columns in (("a", PAIR), ("b", PAIR | {"hash": (I64, 1)})):
        pq.write_table(table(columns), tmp_path / f"{name}.parquet")
    asked = CurationConfig.model_validate(
        {"metadata": [str(tmp_path)], "fetch": {"on_hash_mismatch": "reject"}}
    )
    with pytest.raises(UserError) as caught:
        check_inputs(asked)
    assert "\n" not in str(caught.value)
    assert "got no such column in " in str(caught.value)
    assert "a.parquet (laion-joined) nor in 1 others; take a variant" in str(caught.value)
    check_inputs(asked.model_copy(update={"fetch": FetchConfig()}))
    pq.write_table(table(PAIR | {"md5": (STR, MD5)}), tmp_path / "c.parquet")
    assert len(check_inputs(asked)) == 3  # rows of the other two are kept as they come


def test_the_ends_of_a_range_are_known() -> None:
    raw = pa.table({"URL": ["u"] * 2, "TEXT": ["t"] * 2, "pwatermark": [0.0, 1.0]})
    rows = canonical_rows(raw, layout_of(raw.schema, config(), "f"), "s")
    assert rows["watermark_prob"].to_list() == [0.0, 1.0]


def test_identity_is_content_and_tells_url_from_caption() -> None:
    assert sample_id("u", "t") == "d5f8d50c29883bfe847cfc51ccaa1ab2"
    assert sample_id("ab", "c") != sample_id("a", "bc")
    assert sample_id("u", "t") != sample_id("u", "t2")
    frame = pl.DataFrame({"url": ["u", "", "ü"], "caption": ["t", "", "日本"]})
    assert ids_of(frame).to_list() == [sample_id(*row) for row in frame.rows()]


# Where sha256 pads its last block, and where Polars stores text apart from its length.
@pytest.mark.parametrize("num_bytes", [0, 11, 12, 13, 54, 55, 56, 62, 63, 64, 119, 120, 5000])
def test_identities_of_a_frame_are_hashlibs_at_every_length(num_bytes: int) -> None:
    frame = pl.DataFrame({"url": ["u" * num_bytes, ""], "caption": ["", "c" * num_bytes]})
    assert ids_of(frame).to_list() == [sample_id(*row) for row in frame.rows()]


@given(st.lists(st.tuples(st.text(), st.text()), max_size=20))
def test_identities_of_a_frame_are_hashlibs_for_any_text(rows: list[tuple[str, str]]) -> None:
    frame = pl.DataFrame(rows, schema={"url": pl.String, "caption": pl.String}, orient="row")
    found = ids_of(frame)
    assert found.to_list() == [sample_id(*row) for row in rows]
    assert found.name == "sample_id"
    assert found.dtype == pl.String
