import polars as pl
import pytest

from mllm_srec.data.schema import SKIPPED, RowCheck
from mllm_srec.errors import DataError

FRAME = pl.DataFrame({"item_id": ["a", None, "c"], "n": [1, 5, 7], "file": ["f.csv"] * 3, "line": [2, 4, 9]})


def test_all_rows_good_returns_the_frame_and_lists_nothing() -> None:
    check = RowCheck()
    assert check.keep(FRAME, pl.col("n") > 0, "n", "bad") is FRAME
    assert check.skipped().height == 0
    assert check.skipped().schema == pl.Schema(SKIPPED)


def test_stop_names_file_line_column_value_number_and_remedy() -> None:
    with pytest.raises(DataError) as caught:
        RowCheck("stop").keep(FRAME, pl.col("n") < 5, "n", "{n} is too much")
    assert str(caught.value).startswith("f.csv line 4, column n: 5 is too much (2 such rows).")
    assert "--on-bad-row skip" in str(caught.value)


def test_skip_keeps_the_good_rows_and_lists_each_bad_one() -> None:
    check = RowCheck("skip")
    kept = check.keep(FRAME, pl.col("n") < 7, "n", "{n} is too much")
    kept = check.keep(kept, pl.col("item_id") != "", "item_id", "no id")
    assert kept["item_id"].to_list() == ["a"]
    assert check.skipped().rows() == [("f.csv", 9, "n", "7 is too much"), ("f.csv", 4, "item_id", "no id")]


def test_null_counts_as_bad() -> None:
    check = RowCheck("skip")
    assert check.keep(FRAME, pl.col("item_id") != "zzz", "item_id", "no id")["line"].to_list() == [2, 9]


def test_values_with_braces_do_not_break_the_reason() -> None:
    frame = pl.DataFrame({"x": ["{y}"], "file": ["f"], "line": [1]})
    with pytest.raises(DataError, match=r"column x: x is \{y\}\. Correct"):
        RowCheck().keep(frame, pl.lit(False), "x", "x is {x}")
