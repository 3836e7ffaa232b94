import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mllm_srec.data.dataset import Dataset, Queries, no_rows_skipped
from mllm_srec.data.schema import INTERACTIONS, ITEMS, RowCheck
from mllm_srec.errors import DataError, UsageError

CATALOGUE = pl.DataFrame(
    {"item_id": ["b", "a", "c"], "title": [" Bee ", None, "Sea"], "image": [" ", "images/a.jpg", None]}
)


def log(rows: list[tuple[str, str, int | None]]) -> pl.DataFrame:
    schema = {"user_id": pl.String, "item_id": pl.String, "timestamp": pl.Int64}
    return (
        pl.DataFrame(rows, schema=schema, orient="row").with_row_index("line", 2).with_columns(file=pl.lit("log.csv"))
    )


def build(rows: list[tuple[str, str, int | None]], **options: object) -> Dataset:
    options = {"has_time": True, "root": None} | options
    return Dataset.build("shop", CATALOGUE, log(rows), **options)  # type: ignore[arg-type]


def test_build_completes_the_catalogue() -> None:
    items = build([("u", "a", 1)]).items
    assert items.schema == pl.Schema(ITEMS)
    assert items.rows() == [
        ("b", "Bee", "", "", None, "{}"),
        ("a", "", "", "", "images/a.jpg", "{}"),
        ("c", "Sea", "", "", None, "{}"),
    ]


def test_build_sorts_by_user_then_time_and_keeps_file_order_in_ties() -> None:
    dataset = build([("v", "a", 5), ("u", "c", 9), ("u", "b", 3), ("v", "b", 5), ("u", "a", 3)])
    assert dataset.interactions.schema == pl.Schema(INTERACTIONS)
    assert dataset.interactions.select("user_id", "item_id", "timestamp", "position").rows() == [
        ("u", "b", 3, 0),
        ("u", "a", 3, 1),
        ("u", "c", 9, 2),
        ("v", "a", 5, 0),
        ("v", "b", 5, 1),
    ]
    assert dataset.interactions["rating"].null_count() == 5


def test_without_times_the_file_order_counts() -> None:
    rows = log([("v", "a", None), ("u", "c", None), ("u", "a", None)]).drop("timestamp")
    dataset = Dataset.build("shop", CATALOGUE, rows, has_time=False, root=None)
    assert dataset.interactions["item_id"].to_list() == ["c", "a", "a"]
    assert dataset.interactions["timestamp"].null_count() == 3
    assert dataset.histories().time is None
    assert not dataset.histories().has_time
    ignored = build([("u", "a", 9), ("u", "b", 3)], has_time=False).interactions
    assert ignored.select("item_id", "timestamp").rows() == [("a", None), ("b", None)]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (("u", "zzz", 1), "log.csv line 3, column item_id: item zzz of the log is not in the catalogue"),
        (("", "a", 1), "log.csv line 3, column user_id: the user has no id"),
        (("u", "", 1), "log.csv line 3, column item_id: the item has no id"),
        (("u", "a", None), "log.csv line 3, column timestamp: the time is missing"),
    ],
)
def test_a_bad_event_stops_or_is_listed(row: tuple[str, str, int | None], message: str) -> None:
    rows = [("u", "a", 1), row]
    with pytest.raises(DataError) as caught:
        build(rows)
    assert str(caught.value).startswith(message)
    dataset = build(rows, check=RowCheck("skip"))
    assert dataset.interactions.height == 1
    assert dataset.skipped["line"].to_list() == [3]


def test_an_item_twice_stops_or_keeps_the_first() -> None:
    twice = pl.DataFrame({"item_id": ["a", "a"], "title": ["one", "two"], "file": ["items.csv"] * 2, "line": [2, 3]})
    with pytest.raises(DataError, match=r"items\.csv line 3, column item_id: item a stands here twice"):
        Dataset.build("shop", twice, log([("u", "a", 1)]), has_time=True, root=None)
    dataset = Dataset.build("shop", twice, log([("u", "a", 1)]), has_time=True, root=None, check=RowCheck("skip"))
    assert dataset.items["title"].to_list() == ["one"]
    assert dataset.skipped.height == 1


def test_nothing_left_is_an_error() -> None:
    with pytest.raises(DataError, match="shop: no interactions left"):
        build([])
    with pytest.raises(DataError, match="shop: no items left"):
        Dataset.build("shop", CATALOGUE.clear(), log([]), has_time=True, root=None)


def test_repeats() -> None:
    dataset = build([("u", "a", 1), ("u", "b", 2), ("u", "a", 3), ("v", "a", 4), ("u", "c", 5)])
    assert dataset.with_repeats("keep") is dataset
    first = dataset.with_repeats("first")
    assert first.interactions.select("user_id", "item_id", "timestamp", "position").rows() == [
        ("u", "a", 1, 0),
        ("u", "b", 2, 1),
        ("u", "c", 5, 2),
        ("v", "a", 4, 0),
    ]
    assert (first.repeats, first.repeats_dropped) == ("first", 1)
    assert first.with_repeats("first") is first
    assert first.histories().length(0) == 3, "the histories of another log must not be reused"
    with pytest.raises(UsageError, match="dropped from this data set already"):
        first.with_repeats("keep")
    with pytest.raises(UsageError, match="'last': choose first or keep"):
        dataset.with_repeats("last")


def test_histories_by_hand() -> None:
    histories = build([("v", "a", 5), ("u", "c", 9), ("u", "b", 3)]).histories()
    assert (histories.users, histories.items) == (["u", "v"], ["b", "a", "c"])
    np.testing.assert_array_equal(histories.offsets, [0, 2, 3])
    np.testing.assert_array_equal(histories.item, [0, 2, 1])
    assert histories.time is not None
    np.testing.assert_array_equal(histories.time, [3, 9, 5])
    assert np.isnan(histories.rating).all()
    assert [a.dtype for a in (histories.offsets, histories.item, histories.time, histories.rating)] == [
        np.int64,
        np.int32,
        np.int64,
        np.float32,
    ]
    np.testing.assert_array_equal(histories.of(0), [0, 2])
    np.testing.assert_array_equal(histories.of(0, 1), [0])
    assert histories.of(1, 0).size == 0
    np.testing.assert_array_equal(histories.of(0, 99), [0, 2], err_msg="an end beyond the last event is the last event")


events = st.lists(
    st.tuples(st.sampled_from("uvwü"), st.sampled_from("abc"), st.integers(0, 5)), min_size=1, max_size=30
)


@given(events)
def test_histories_hold_every_event_once_in_order(rows: list[tuple[str, str, int | None]]) -> None:
    histories = build(rows).histories()
    assert histories.offsets[-1] == len(rows)
    assert histories.time is not None
    for number, user in enumerate(histories.users):
        expected = sorted((r for r in rows if r[0] == user), key=lambda r: r[2] or 0)  # stable, as ties must be
        assert [histories.items[i] for i in histories.of(number)] == [item for _, item, _ in expected]
        span = slice(histories.offsets[number], histories.offsets[number + 1])
        assert histories.time[span].tolist() == [time for _, _, time in expected]


@given(events)
def test_dropping_repeats_keeps_each_pair_once(rows: list[tuple[str, str, int | None]]) -> None:
    first = build(rows).with_repeats("first")
    pairs = first.interactions.select("user_id", "item_id").rows()
    assert len(pairs) == len(set(pairs)) == len({(user, item) for user, item, _ in rows})
    assert first.repeats_dropped == len(rows) - len(pairs)
    for _, user in first.interactions.group_by("user_id"):
        assert user["position"].to_list() == list(range(user.height))


def test_no_rows_skipped_has_the_columns_of_the_list() -> None:
    assert no_rows_skipped().columns == ["file", "line", "column", "reason"]


def test_queries_are_histories_with_what_is_known_of_their_times() -> None:
    histories = [np.array([1, 2]), np.array([], dtype=int), np.array([0])]
    plain = Queries.of(histories)
    assert [history.tolist() for history in plain] == [[1, 2], [], [0]]
    assert (len(plain), plain.times, plain.now) == (3, None, None)
    assert Queries.of(plain) is plain
    timed = Queries(histories, [np.array([5, 9]), np.array([], dtype=int), np.array([7])], np.array([10, 11, 12]))
    part = timed[1:]
    assert isinstance(part, Queries) and len(part) == 2
    assert part[1].tolist() == [0] and part.times is not None and part.now is not None
    assert [times.tolist() for times in part.times] == [[], [7]] and part.now.tolist() == [11, 12]
    assert plain[:2].times is None
