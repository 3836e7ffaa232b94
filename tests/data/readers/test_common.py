import csv
from datetime import UTC, datetime
from pathlib import Path

import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mllm_srec.data.readers.common import (
    find_file,
    items_of,
    joined,
    look_up,
    pictures_in,
    read_ids,
    read_log,
    read_parquet,
    read_text_table,
    require,
)
from mllm_srec.data.schema import RowCheck
from mllm_srec.errors import DataError


def write(folder: Path, text: str | bytes, name: str = "t.csv") -> Path:
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def rows_of(path: Path, check: RowCheck | None = None, **options: object) -> list[tuple[object, ...]]:
    frame = read_text_table(path, check or RowCheck(), **options)  # type: ignore[arg-type]
    assert frame["file"].unique().to_list() in ([path.name], [])
    return frame.drop("file").rows()


@pytest.mark.parametrize(
    ("text", "rows"),
    [
        ("a,b\n1,2\n3,4\n", [("1", "2", 2), ("3", "4", 3)]),
        ("a,b\n1,2\n3,4", [("1", "2", 2), ("3", "4", 3)]),
        ("a,b\r\n1,2\r\n3,4\r\n", [("1", "2", 2), ("3", "4", 3)]),
        ("\ufeffa,b\n1,é\n", [("1", "é", 2)]),
        ("a,b\n", []),
        ("a,b\n1,\n,2\n", [("1", None, 2), (None, "2", 3)]),
        # a short row is filled, blank lines count as lines only
        ("a,b\n1\n", [("1", None, 2)]),
        ("a,b\n\n1,2\n\n\n3,4\n\n", [("1", "2", 3), ("3", "4", 6)]),
        # quoted newlines, commas and quotes; the line is where the row starts
        ('a,b\n1,"x\ny"\n3,4\n', [("1", "x\ny", 2), ("3", "4", 4)]),
        ('a,b\n"x\n\ny","p\nq"\n3,"4,""5"""\n', [("x\n\ny", "p\nq", 2), ("3", '4,"5"', 6)]),
        ('"a","b\nc"\n1,2\n', [("1", "2", 3)]),
        # quotes inside unquoted fields are just characters
        ('a,b\n1,2" x\n3,4" y\n5,6\n', [("1", '2" x', 2), ("3", '4" y', 3), ("5", "6", 4)]),
        ('a,b\n1,"x\ny"\n\n3,4" y\n', [("1", "x\ny", 2), ("3", '4" y', 5)]),
    ],
)
def test_text_table_values_and_lines(tmp_path: Path, text: str, rows: list[tuple[object, ...]]) -> None:
    assert rows_of(write(tmp_path, text)) == rows


def test_text_table_without_header_or_quotes(tmp_path: Path) -> None:
    path = write(tmp_path, '1\t"x\r\n2\ty"\r\n\r\n3\t\r\n')
    options = {"separator": "\t", "quote": False, "columns": ("a", "b")}
    assert rows_of(path, **options) == [("1", '"x', 1), ("2", 'y"', 2), ("3", None, 4)]


def test_text_table_in_latin_1(tmp_path: Path) -> None:
    path = write(tmp_path, "1|Misérables\n".encode("latin-1"))
    assert rows_of(path, separator="|", quote=False, columns=("a", "b"), encoding="latin-1") == [("1", "Misérables", 1)]
    with pytest.raises(DataError, match=r"t\.csv line 1 is not UTF-8 text"):
        rows_of(path, separator="|", quote=False, columns=("a", "b"))


def test_names_are_stripped_and_place_columns_kept_apart(tmp_path: Path) -> None:
    frame = read_text_table(write(tmp_path, " a ,line,file\n1,Home,x\n"), RowCheck())
    assert frame.to_dicts() == [{"a": "1", "line_": "Home", "file_": "x", "file": "t.csv", "line": 2}]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", r"t\.csv is empty"),
        (b"\n\n", r"t\.csv is empty"),
        (b"a,b\n1,2\n3,\xff\n", r"t\.csv line 3 is not UTF-8 text"),
        (b'a,b\n1,2\n3,"open\n5,6\n', r"the row that starts in line 3: unexpected end of data"),
        (b'a,b\n1,2\n3,"x"y\n', r"the row that starts in line 3: .* expected after"),
        (b"a, a\n1,2\n", "two columns are called a"),
    ],
)
def test_unreadable_text_table(tmp_path: Path, text: bytes, message: str) -> None:
    with pytest.raises(DataError, match=message):
        rows_of(write(tmp_path, text), RowCheck("skip"))


def test_a_row_with_too_many_fields_is_a_bad_row(tmp_path: Path) -> None:
    path = write(tmp_path, 'a,b\n"x\ny",2\n1,2,3\n5,6\n')
    with pytest.raises(DataError, match=r"t\.csv line 4, column b: the row has 3 fields, more than the 2 columns"):
        rows_of(path)
    check = RowCheck("skip")
    assert rows_of(path, check) == [("x\ny", "2", 2), ("5", "6", 5)]
    assert check.skipped()["line"].to_list() == [4]


# "\r" alone is left out: csv ends a line there, an editor that shows line numbers need not.
cells = st.text(st.sampled_from('ab"\n, é'), max_size=4)


@given(table=st.lists(st.tuples(cells, cells), min_size=1, max_size=8))
def test_what_csv_writes_is_read_back_with_true_lines(
    tmp_path_factory: pytest.TempPathFactory, table: list[tuple[str, str]]
) -> None:
    path = tmp_path_factory.mktemp("csv") / "t.csv"
    expected, line = [], 2
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("p", "q"))
        for row in table:
            writer.writerow(row)
            expected += [(*row, line)] if any(row) else []
            line += 1 + sum(cell.count("\n") for cell in row)
    read = read_text_table(path, RowCheck()).select(pl.col("p", "q").fill_null(""), "line")
    assert read.rows() == expected


def test_parquet_becomes_text(tmp_path: Path) -> None:
    moment = datetime(2020, 1, 1, 10, tzinfo=UTC)
    pl.DataFrame(
        {
            "id": [7.0, 8.0],
            "number": [1.5, float("nan")],
            "tags": [["x", "y"], None],
            "moment": pl.Series([moment, None]).dt.convert_time_zone("Asia/Tokyo"),
            "nested": [{"k": 1}, {"k": 2}],
        }
    ).write_parquet(tmp_path / "t.parquet")
    assert read_parquet(tmp_path / "t.parquet").rows() == [
        ("7", "1.5", "x, y", "2020-01-01 10:00:00.000000", '{"k":1}', "t.parquet", 1),
        ("8", "NaN", None, None, '{"k":2}', "t.parquet", 2),
    ]
    with pytest.raises(DataError, match=r"t\.csv cannot be read as Parquet"):
        read_parquet(write(tmp_path, "not parquet"))


def raw(times: list[str | None], ratings: list[str | None] | None = None) -> pl.DataFrame:
    n = len(times)
    return pl.DataFrame(
        {
            "u": ["u"] * n,
            "i": ["i"] * n,
            "t": pl.Series(times, dtype=pl.String),
            "r": pl.Series(ratings or [None] * n, dtype=pl.String),
            "file": ["log.csv"] * n,
            "line": range(2, n + 2),
        }
    )


def times_of(times: list[str | None], check: RowCheck | None = None, **options: object) -> list[int]:
    log = read_log(raw(times), check or RowCheck(), user="u", item="i", time="t", **options)  # type: ignore[arg-type]
    assert log["timestamp"].dtype == pl.Int64
    return log["timestamp"].to_list()


NOON_2020 = 1_577_880_000_000  # 2020-01-01 12:00 UTC


@pytest.mark.parametrize(
    "text",
    [
        "1577880000",
        " 1577880000.0 ",
        "1577880000000",
        "2020-01-01T12:00:00Z",
        "2020-01-01 12:00",
        "2020-01-01T12:00:00.000",
        "2020-01-01T14:00:00+02:00",
        "2020-01-01T07:00-0500",
    ],
)
def test_forms_of_time(text: str) -> None:
    assert times_of([text]) == [NOON_2020]


def test_dates_are_midnight_and_may_stand_beside_times() -> None:
    assert times_of(["2020-01-01", "2020-01-01T12:00:00Z", "1970-01-01"]) == [NOON_2020 - 43_200_000, NOON_2020, 0]


def test_fractions_of_seconds_are_kept_to_the_millisecond() -> None:
    assert times_of(["1577880000.125"]) == [NOON_2020 + 125]
    assert times_of(["2020-01-01T12:00:00.125Z"]) == [NOON_2020 + 125]


def test_the_unit_is_told_by_the_median_unless_it_is_known() -> None:
    assert times_of(["0", "1577880000", "1577880000"]) == [0, NOON_2020, NOON_2020]
    assert times_of(["150000000000"] * 2) == [150_000_000_000] * 2
    assert times_of(["1577880000"], unit="s") == [NOON_2020]
    with pytest.raises(DataError, match="as a unix time in seconds is not between 1970 and 2100"):
        times_of(["1577880000000"], unit="s")


@pytest.mark.parametrize(
    ("good", "bad", "message"),
    [
        ("1577880000", "soon", "'soon' is not a unix time in seconds"),
        ("1577880000", "NaN", "'NaN' is not a unix time in seconds"),
        ("1577880000", "inf", "'inf' is not a unix time in seconds"),
        ("1577880000", "-5", "'-5' as a unix time in seconds is not between 1970 and 2100"),
        ("1577880000", "1577880000000", "'1577880000000' as a unix time in seconds is not between 1970 and 2100"),
        ("1577880000000", "1577880000", "'1577880000' as a unix time in milliseconds is not between 1973 and 2100"),
        ("1577880000", "", "the time is missing"),
        ("1577880000", None, "the time is missing"),
        ("2020-01-01", "2020-13-01", "'2020-13-01' is not an ISO 8601 date or time"),
        ("2020-01-01", "1577880000", "'1577880000' is not an ISO 8601 date or time"),
        ("2020-01-01", "1820-01-01", "'1820-01-01' as an ISO 8601 date or time is not between 1970 and 2100"),
    ],
)
def test_a_bad_time_stops_or_is_listed(good: str, bad: str | None, message: str) -> None:
    with pytest.raises(DataError) as caught:
        times_of([good, good, bad, good])
    assert str(caught.value).startswith(f"log.csv line 4, column t: {message}")
    check = RowCheck("skip")
    assert len(times_of([good, good, bad, good], check)) == 3
    assert check.skipped().rows() == [("log.csv", 4, "t", message)]


def test_ratings_may_be_absent_but_not_wrong() -> None:
    def ratings(*texts: str | None, check: RowCheck | None = None) -> list[float | None]:
        frame = raw(["1"] * len(texts), list(texts))
        return read_log(frame, check or RowCheck(), user="u", item="i", rating="r")["rating"].to_list()

    assert ratings("5", " 0.5", "", None, "0", "-1") == [5.0, 0.5, None, None, 0.0, -1.0]
    for bad in ("five", "NaN", "inf", "1e300"):
        with pytest.raises(DataError, match=rf"log\.csv line 3, column r: the rating '{bad}' is not a finite number"):
            ratings("5", bad)
        check = RowCheck("skip")
        assert ratings("5", bad, "", check=check) == [5.0, None]
        assert check.skipped().height == 1


def test_log_ids() -> None:
    frame = raw(["1"] * 4).with_columns(u=pl.Series([" u1 ", None, "u3", "u4"]), i=pl.Series(["a", "b", " ", "d"]))
    with pytest.raises(DataError, match=r"log\.csv line 3, column u: the user has no id"):
        read_log(frame, RowCheck(), user="u", item="i")
    check = RowCheck("skip")
    log = read_log(frame, check, user="u", item="i", known=pl.Series(["a", "b"]))
    assert log.rows() == [("u1", "a", "log.csv", 2)]
    assert check.skipped().drop("file").rows() == [
        (3, "u", "the user has no id"),
        (4, "i", "the item has no id"),
        (5, "i", "item d of the log is not in the catalogue"),
    ]


def test_item_ids_are_stripped_and_once() -> None:
    frame = pl.DataFrame({"asin": [" a", "a", "", "b"], "file": ["m"] * 4, "line": [1, 2, 3, 4]})
    check = RowCheck("skip")
    assert read_ids(frame, check, "asin")["item_id"].to_list() == ["a", "b"]
    assert check.skipped().drop("file").rows() == [
        (3, "asin", "the item has no id"),
        (2, "asin", "item a stands here twice"),
    ]


def test_items_of_a_log_in_the_order_of_their_first_event() -> None:
    log = pl.DataFrame({"item_id": ["b", "a", "b"], "file": ["f"] * 3, "line": [1, 2, 3]})
    assert items_of(log).rows() == [("b", "f", 1), ("a", "f", 2)]


def test_missing_columns_name_what_is_there_and_the_nearest() -> None:
    require(["user_id", "item_id"], "log.csv", "user_id")
    with pytest.raises(DataError) as caught:
        require(["userId", "movie", "file", "line"], "log.csv", "user_id")
    assert str(caught.value) == (
        "log.csv: there is no column user_id. The columns found: userId, movie. Is userId meant? Rename it to user_id"
    )
    with pytest.raises(DataError, match=r"found: x, y$"):
        require(["x", "y"], "log.csv", "user_id")


def test_find_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no items\.csv or items\.parquet; there are no files at all"):
        find_file(tmp_path, "items.csv", "items.parquet")
    write(tmp_path, "x", "Item.csv")
    with pytest.raises(DataError, match=r"The files found: Item\.csv\. Is Item\.csv meant\? Rename it to items\.csv"):
        find_file(tmp_path, "items.csv")
    (tmp_path / "Item.csv").unlink()
    path = write(tmp_path, "x", "items.csv")
    assert find_file(tmp_path, "items.csv", "items.parquet") == path
    write(tmp_path, "x", "items.parquet")
    with pytest.raises(DataError, match=r"holds items\.csv and items\.parquet: keep one"):
        find_file(tmp_path, "items.csv", "items.parquet")


def test_pictures_in(tmp_path: Path) -> None:
    assert pictures_in(tmp_path, "images") == {}
    (tmp_path / "images").mkdir()
    for name in ("a.png", "a.jpg", "b.PNG", "c.d.webp", "notes.txt"):
        write(tmp_path / "images", "x", name)
    pictures = pictures_in(tmp_path, "images")
    assert pictures == {"a": "images/a.jpg", "b": "images/b.PNG", "c.d": "images/c.d.webp"}
    for number in range(20):  # folders list their files in any order
        for suffix in (".gif", ".jpg", ".png") if number % 2 else (".png", ".jpg", ".gif"):
            write(tmp_path / "images", "x", f"{number}{suffix}")
    assert {path for stem, path in pictures_in(tmp_path, "images").items() if stem.isdigit()} == {
        f"images/{number}.jpg" for number in range(20)
    }
    frame = pl.DataFrame({"item_id": ["b", "z"]})
    assert frame.select(look_up("item_id", pictures)).to_series().to_list() == ["images/b.PNG", None]
    assert frame.select(look_up("item_id", {})).to_series().to_list() == [None, None]


def test_joined_leaves_out_what_is_empty() -> None:
    frame = pl.DataFrame({"a": ["x", " ", None], "b": [" y", "z", None]})
    assert frame.select(joined("a", "b")).to_series().to_list() == ["x, y", "z", ""]
