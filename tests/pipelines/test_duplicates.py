"""Which copy stays, against a brute force, whatever the order of the rows."""

from __future__ import annotations

from typing import Any

import polars as pl
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.duplicates import row_duplicates

ROW = st.fixed_dictionaries(
    {
        "sample_id": st.sampled_from(["0", "1"]),
        "url": st.sampled_from(["u", "v"]),
        "aesthetic_score": st.none() | st.sampled_from([4.0, 5.0]),
        "unsafe_prob": st.none() | st.sampled_from([0.0, 1.0]),
        "reason": st.none() | st.just("watermarked"),
    }
).map(lambda row: row | {"sample_id": f"{row['url']}{row['sample_id']}"})  # an id tells its URL
SCHEMA = {
    "sample_id": pl.String, "url": pl.String, "aesthetic_score": pl.Float64,
    "unsafe_prob": pl.Float64, "reason": pl.String,
}  # fmt: skip


def kept(rows: list[dict[str, Any]], same_url: bool) -> list[dict[str, Any]]:
    found = row_duplicates(pl.DataFrame(rows, schema=SCHEMA), same_url=same_url)
    return [row for row, why in zip(rows, found, strict=True) if why is None]


@settings(deadline=None)
@given(st.lists(ROW, max_size=8), st.randoms(), st.booleans())
def test_the_best_copy_stays_whatever_the_order(
    rows: list[dict[str, Any]], random: Any, same_url: bool
) -> None:
    survivors = kept(rows, same_url)
    shuffled = list(rows)
    random.shuffle(shuffled)

    def key(row: dict[str, Any]) -> str:
        return str(sorted((name, str(value)) for name, value in row.items()))

    assert sorted(map(key, kept(shuffled, same_url))) == sorted(map(key, survivors))
    standing = [row for row in survivors if row["reason"] is None]
    assert len({row["sample_id"] for row in standing}) == len(standing)
    if same_url:
        assert len({row["url"] for row in standing}) == len(standing)
        for row in rows:
            if row["reason"] is None:
                best = next(other for other in standing if other["url"] == row["url"])
                ranks = [
                    (
                        -(-1.0 if r["aesthetic_score"] is None else r["aesthetic_score"]),
                        r["sample_id"],
                    )
                    for r in (best, row)
                ]
                assert ranks[0] <= ranks[1]


def test_rows_that_were_rejected_do_not_displace_others() -> None:
    rows = [
        {"sample_id": "0", "url": "u", "aesthetic_score": 9.0, "reason": "watermarked"},
        {"sample_id": "1", "url": "u", "aesthetic_score": 5.0, "reason": None},
        {"sample_id": "2", "url": "u", "aesthetic_score": None, "reason": None},
        {"sample_id": "1", "url": "u", "aesthetic_score": 4.0, "reason": None},
    ]
    found = row_duplicates(pl.DataFrame(rows, schema=SCHEMA), same_url=True)
    assert found.to_list() == [None, None, "duplicate_url", "duplicate_row"]
    found = row_duplicates(pl.DataFrame(rows, schema=SCHEMA), same_url=False)
    assert found.to_list() == [None, None, None, "duplicate_row"]


def test_a_url_is_the_same_however_it_is_spelled() -> None:
    spelled = ["http://a.example/1.jpg", "http://a.example:80/1.jpg", "http://A.example/1.jpg#top"]
    rows = [
        {"sample_id": str(number), "url": url, "aesthetic_score": float(number), "reason": None}
        for number, url in enumerate([*spelled, "http://a.example/2.jpg"])
    ]
    found = row_duplicates(pl.DataFrame(rows, schema=SCHEMA), same_url=True)
    assert found.to_list() == ["duplicate_url", "duplicate_url", None, None]
