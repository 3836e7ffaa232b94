import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mllm_srec.data.dataset import Dataset, Histories
from mllm_srec.data.split import Split, Targets, global_time, leave_last_out, liked_only, rated
from mllm_srec.errors import DataError, UsageError


def histories(of: dict[str, list[int]], has_time: bool = True) -> Histories:
    """User -> times of the events; every event is of another item."""
    rows = [(user, f"i{user}{n}", time) for user, times in of.items() for n, time in enumerate(times)]
    schema = {"user_id": pl.String, "item_id": pl.String, "timestamp": pl.Int64}
    log = pl.DataFrame(rows, schema=schema, orient="row")
    items = pl.DataFrame({"item_id": log["item_id"]})
    return Dataset.build("shop", items, log, has_time=has_time, root=None).histories()


def rows(targets: Targets) -> list[tuple[int, int, int]]:
    return list(zip(targets.user.tolist(), targets.position.tolist(), targets.end.tolist(), strict=True))


def test_leave_last_out_by_hand() -> None:
    # a: 8 events, 6 before validation, the newest ceil(0.25 * 6) = 2 of them are training targets.
    # b: 3 events, 1 before validation: its only training target would see nothing. c: too short.
    split = leave_last_out(
        histories({"a": [1, 2, 3, 4, 5, 6, 7, 8], "b": [1, 2, 3], "c": [1, 2]}), "file_order", min_history=3
    )
    assert rows(split.test) == [(0, 7, 7), (1, 2, 2)]
    assert rows(split.validation) == [(0, 6, 6), (1, 1, 1)]
    assert rows(split.training) == [(0, 4, 4), (0, 5, 5)]
    seen = [[1, 1, 1, 1, 1, 1, 1, 0, 1, 1, 0, 1, 1], [1, 1, 1, 1, 1, 1, 0, 0, 1, 0, 0, 1, 1]]
    np.testing.assert_array_equal(split.seen_test, np.array(seen[0], dtype=bool))
    np.testing.assert_array_equal(split.seen_validation, np.array(seen[1], dtype=bool))
    np.testing.assert_array_equal(split.seen_training, np.array([1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 1, 1], dtype=bool))
    assert (split.users_too_short, split.targets_without_history) == (1, 0)
    assert (split.protocol, split.tie_rule, split.min_history) == ("leave_last_out", "file_order", 3)


def test_at_most_ten_events_of_a_user_are_training_targets() -> None:
    split = leave_last_out(histories({"a": list(range(100))}), "file_order", 3)
    assert split.training.position.tolist() == list(range(88, 98))


def test_the_strict_rule_hides_what_is_tied_with_the_target() -> None:
    log = histories({"a": [1, 2, 5, 5, 5], "b": [7, 7, 7]})
    assert rows(leave_last_out(log, "file_order", 3).test) == [(0, 4, 4), (1, 2, 2)]
    strict = leave_last_out(log, "strict", 3)
    assert rows(strict.test) == [(0, 4, 2)]
    assert rows(strict.validation) == [(0, 3, 2)]
    assert strict.targets_without_history == 2, "b's test and validation see nothing"


def test_a_longer_minimum_leaves_users_out() -> None:
    split = leave_last_out(histories({"a": [1, 2, 3, 4], "b": [1, 2, 3]}), "file_order", 4)
    assert rows(split.test) == [(0, 3, 3)]
    assert split.users_too_short == 1
    assert split.seen_test.tolist() == [True, True, True, False, True, True, True]


def test_global_time_by_hand() -> None:
    # 20 events at the times 0..19: cuts at the 14th, 16th and 18th.
    split = global_time(histories({"a": list(range(0, 20, 2)), "b": list(range(1, 20, 2))}), "file_order", 3)
    assert rows(split.training) == [(0, 7, 7), (1, 7, 7)]
    assert rows(split.validation) == [(0, 8, 8), (1, 8, 8)]
    assert rows(split.test) == [(0, 9, 9), (1, 9, 9)]
    assert split.seen_test.tolist() == [*[True] * 9, False] * 2
    assert split.seen_training.tolist() == [*[True] * 7, *[False] * 3] * 2


def test_every_event_after_the_cut_is_a_target_with_its_history_up_to_it() -> None:
    times = {"old": list(range(17)), "new": [18, 19, 20]}
    split = global_time(histories(times), "file_order", 3)
    # users sort as new, old; of new's three test events only the third has two events before it
    assert rows(split.test) == [(0, 2, 2)]
    assert split.targets_without_history == 2


def test_wrong_use_is_refused() -> None:
    untimed = histories({"a": [1, 2, 3]}, has_time=False)
    with pytest.raises(UsageError, match="no times, so it cannot be cut"):
        global_time(untimed, "file_order", 3)
    with pytest.raises(UsageError, match=r"use data\.tie_rule=file_order"):
        leave_last_out(untimed, "strict", 3)
    with pytest.raises(UsageError, match="'loose': choose file_order or strict"):
        leave_last_out(untimed, "loose", 3)
    with pytest.raises(DataError, match="too few different times"):
        global_time(histories({"a": [5, 5, 5, 5]}), "file_order", 3)


def test_take_keeps_rows_together() -> None:
    targets = Targets(np.array([0, 1, 2]), np.array([3, 4, 5]), np.array([2, 4, 1]))
    assert rows(targets.take(np.array([2, 0]))) == [(2, 5, 1), (0, 3, 2)]


# What was liked


def rated_log(*users: list[float | None]) -> Histories:
    """One list of ratings per user, oldest first; every event is of another item."""
    rows = [(f"u{n}", f"i{n}-{at}", at, rating) for n, of in enumerate(users) for at, rating in enumerate(of)]
    schema = {"user_id": pl.String, "item_id": pl.String, "timestamp": pl.Int64, "rating": pl.Float32}
    log = pl.DataFrame(rows, schema=schema, orient="row")
    return Dataset.build("shop", pl.DataFrame({"item_id": log["item_id"]}), log, has_time=True, root=None).histories()


@pytest.mark.parametrize(
    ("ratings", "high", "low"),
    [
        ([1, 2, 3, 4, 5], "00011", "11000"),  # the paper's thresholds: at least 4, at most 2
        ([1, 1.9, 2.1, 3.9, 4.1, 5], "000011", "110000"),
        ([0.5, 1.5, 2, 4, 5], "00011", "11000"),  # 0.5 to 5: from 3.875 on, and up to 1.625
        ([1, None, 5, 3], "0010", "1000"),  # what is not rated is neither
        ([0, 1, 1], "011", "100"),
        ([-10, -5, 0, 5, 10], "00011", "11000"),
    ],
)
def test_what_is_rated_high_and_low_by_hand(ratings: list[float | None], high: str, low: str) -> None:
    log = rated_log(ratings)
    for told, upper in ((high, True), (low, False)):
        found = rated(log, upper)
        assert found.dtype == bool
        assert "".join(str(int(value)) for value in found) == told


@given(st.lists(st.lists(st.one_of(st.none(), st.integers(1, 5).map(float)), min_size=1, max_size=6), min_size=1))
def test_nothing_is_rated_high_and_low_at_once(users: list[list[float | None]]) -> None:
    log = rated_log(*users)
    known = [rating for of in users for rating in of if rating is not None]
    if len(set(known)) < 2:
        with pytest.raises(UsageError, match="no ratings that differ"):
            rated(log, high=True)
        return
    high, low = rated(log, high=True), rated(log, high=False)
    assert high.any() and low.any() and not (high & low).any()
    assert not (high | low)[np.isnan(log.rating)].any()


def test_liked_targets_are_those_rated_high_and_all_is_seen_as_before() -> None:
    # Six events before validation: the newest two are training targets.
    log = rated_log([1, 5, 3, 5, 4, 2, 5, 4], [3, 3, 1, 5, 2, 4, 2, 3])
    split = leave_last_out(log, "file_order", 3)
    liked = liked_only(log, split)
    assert rows(split.training) == [(0, 4, 4), (0, 5, 5), (1, 4, 4), (1, 5, 5)]
    assert rows(liked.training) == [(0, 4, 4), (1, 5, 5)]
    assert (rows(liked.validation), rows(liked.test)) == ([(0, 6, 6)], [(0, 7, 7)])
    for name in ("seen_training", "seen_validation", "seen_test"):
        np.testing.assert_array_equal(getattr(liked, name), getattr(split, name))
    assert (liked.protocol, liked.users_too_short) == (split.protocol, split.users_too_short)


@pytest.mark.parametrize("ratings", [[None, None, None], [3, 3, 3], [None, 4, 4]])
def test_without_ratings_that_differ_nothing_was_liked(ratings: list[float | None]) -> None:
    log = rated_log(ratings)
    with pytest.raises(UsageError, match=r"no ratings that differ, so nothing says what was liked: use training\.task"):
        liked_only(log, leave_last_out(log, "file_order", 3))


logs = st.dictionaries(
    st.sampled_from("abcdef"), st.lists(st.integers(0, 12), min_size=1, max_size=12).map(sorted), min_size=1
)


@given(logs, st.sampled_from(["file_order", "strict"]), st.sampled_from([leave_last_out, global_time]))
def test_nothing_is_seen_that_must_not_be(log: dict[str, list[int]], rule: str, protocol: object) -> None:
    made = histories(log)
    try:
        split: Split = protocol(made, rule, 3)  # type: ignore[operator]
    except DataError:
        return
    assert made.time is not None
    later: set[int] = set()
    for targets, seen in (
        (split.test, split.seen_test),
        (split.validation, split.seen_validation),
        (split.training, split.seen_training),
    ):
        flat = made.offsets[targets.user] + targets.position
        later |= set(flat.tolist())
        assert not seen[list(later)].any(), "counts may hold neither these targets nor later ones"
        for user, position, end in rows(targets):
            assert 1 <= end <= position
            own = made.time[made.offsets[user] : made.offsets[user + 1]]
            if rule == "strict":
                assert (own[:end] < own[position]).all()
                assert own[end] == own[position], "everything earlier is visible"
            else:
                assert end == position
    assert not (split.seen_training & ~split.seen_validation).any()
    assert not (split.seen_validation & ~split.seen_test).any()
