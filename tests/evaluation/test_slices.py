"""Labels follow their definitions; rows by slice are those of the slice alone, and an empty slice says so."""

import math
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mllm_srec import metrics
from mllm_srec.data.dataset import Histories
from mllm_srec.data.split import Targets
from mllm_srec.evaluation.slices import (
    Labels,
    by_slice,
    changed_taste,
    cold_items,
    history_length,
    item_popularity,
    minded,
    target_picture,
)


def ints(*values: int) -> np.ndarray:
    return np.array(values, dtype=np.int64)


def bools(*values: int) -> np.ndarray:
    return np.array(values, dtype=bool)


def log(*users: list[int], items: int) -> Histories:
    """The items that each user chose, oldest first."""
    flat = [item for user in users for item in user]
    return Histories(
        users=[f"u{n}" for n in range(len(users))],
        items=[f"i{n}" for n in range(items)],
        offsets=np.cumsum([0, *map(len, users)]).astype(np.int64),
        item=np.array(flat, dtype=np.int32),
        time=None,
        rating=np.full(len(flat), np.nan, dtype=np.float32),
    )


def called(labels: Labels) -> list[str]:
    return [labels.names[number] for number in labels.of.tolist()]


# Twelve seen events: item 0 has four, 5 three, 1 and 2 two, 3 one, 4 none. The targets are 4, 0, 5, 1, 2 and 3.
HISTORIES = log([0, 0, 0, 0, 5, 5, 5, 3, 4, 0, 5], [1, 1, 2, 2, 1, 2, 3], items=6)
SEEN = bools(*[1] * 8, 0, 0, 0, *[1] * 4, 0, 0, 0)
TARGETS = Targets(user=ints(0, 0, 0, 1, 1, 1), position=ints(8, 9, 10, 4, 5, 6), end=ints(8, 8, 8, 4, 4, 6))


# Labels


def test_an_item_is_cold_if_nothing_that_is_seen_holds_it() -> None:
    labels = cold_items(HISTORIES, SEEN, TARGETS)
    assert labels.names == ("cold", "warm")
    assert called(labels) == ["cold", "warm", "warm", "warm", "warm", "warm"]
    assert called(cold_items(HISTORIES, np.ones(18, dtype=bool), TARGETS)) == ["warm"] * 6
    assert called(cold_items(HISTORIES, np.zeros(18, dtype=bool), TARGETS)) == ["cold"] * 6


def test_head_mid_and_tail_hold_a_third_of_the_events_each() -> None:
    # Of 12 events there stand 0 above item 0, 4 above 5 (a third, so mid), 7 above 1 and 2, 11 above 3, all above 4.
    labels = item_popularity(HISTORIES, SEEN, TARGETS)
    assert labels.names == ("head", "mid", "tail")
    assert called(labels) == ["tail", "head", "mid", "mid", "mid", "tail"]


def test_popularity_is_of_what_is_seen_alone() -> None:
    # With all events: 0 and 5 have five and four of 18, then 1 and 2 three each, 3 two, 4 one. Nothing seen: all cold.
    everything = item_popularity(HISTORIES, np.ones(18, dtype=bool), TARGETS)
    assert called(everything) == ["tail", "head", "head", "mid", "mid", "tail"]
    assert called(item_popularity(HISTORIES, np.zeros(18, dtype=bool), TARGETS)) == ["tail"] * 6


def test_equally_popular_items_are_all_head() -> None:
    histories = log([0, 1, 2, 0], [2, 1, 0, 1], items=3)
    targets = Targets(ints(0, 1, 0), ints(1, 3, 2), ints(1, 3, 2))
    assert called(item_popularity(histories, bools(1, 1, 1, 0, 1, 1, 1, 0), targets)) == ["head"] * 3


@given(st.lists(st.integers(0, 6), min_size=1, max_size=9))
def test_popularity_slices_follow_their_definition_whatever_the_items_are_called(counts: list[int]) -> None:
    # One user chose each item `counts` times, and then, unseen, every item once: these are the targets.
    count = len(counts)
    chosen = [item for item, times in enumerate(counts) for _ in range(times)]
    seen = bools(*[1] * len(chosen), *[0] * count)
    targets = Targets(np.zeros(count, np.int64), len(chosen) + np.arange(count), len(chosen) + np.arange(count))

    def expected(own: int) -> str:
        if own == 0:
            return "tail"
        above = Fraction(sum(other for other in counts if other > own), sum(counts))
        return "head" if above < Fraction(1, 3) else "mid" if above < Fraction(2, 3) else "tail"

    got = called(item_popularity(log([*chosen, *range(count)], items=count), seen, targets))
    assert got == [expected(own) for own in counts]
    new = np.random.default_rng(sum(counts)).permutation(count)  # another name for every item
    renamed = log([int(new[item]) for item in [*chosen, *range(count)]], items=count)
    assert called(item_popularity(renamed, seen, targets)) == got
    assert called(cold_items(renamed, seen, targets)) == ["warm" if own else "cold" for own in counts]


def test_histories_are_cut_at_their_terciles_and_the_names_say_where() -> None:
    labels = history_length(Targets(np.zeros(7, np.int64), np.full(7, 99), ints(50, 3, 9, 4, 9, 5, 20)))
    # Ascending 3, 4, 5, 9, 9, 20, 50: the third and the fifth.
    assert labels.names == ("short (events <= 5)", "medium (5 < events <= 9)", "long (events > 9)")
    assert "".join(name[0] for name in called(labels)) == "lsmsmsl"


def test_histories_of_one_length_are_one_slice() -> None:
    labels = history_length(Targets(ints(0, 1), ints(4, 4), ints(4, 4)))
    assert labels.names == ("short (events <= 4)", "medium (4 < events <= 4)", "long (events > 4)")
    assert labels.of.tolist() == [0, 0]


@given(st.lists(st.integers(1, 40), min_size=1, max_size=30, unique=True))
def test_terciles_of_different_lengths_are_equally_large_up_to_one(lengths: list[int]) -> None:
    count = len(lengths)
    sizes = np.bincount(history_length(Targets(ints(*range(count)), ints(*lengths), ints(*lengths))).of, minlength=3)
    assert sizes.sum() == count
    assert sizes.max() - sizes.min() <= 1


def test_no_targets_have_no_terciles() -> None:
    with pytest.raises(ValueError, match="there is no target"):
        history_length(TARGETS.take(ints()))


def test_labels_from_outside() -> None:
    assert called(changed_taste(bools(1, 0, 1))) == ["changed", "steady", "changed"]
    assert called(minded(bools(0, 1))) == ["text-minded", "picture-minded"]
    # Items 3 and 4 have no picture; the targets are 4, 0, 5, 1, 2 and 3.
    labels = target_picture(HISTORIES, TARGETS, bools(0, 0, 0, 1, 1, 0))
    assert called(labels) == ["missing", "present", "present", "present", "present", "missing"]


@pytest.mark.parametrize("wrong", [ints(0, 1, 1), np.array([0.0, np.nan, 1.0]), bools(0, 1, 1)[:, None]])
def test_labels_from_outside_are_one_bool_each(wrong: np.ndarray) -> None:
    for label in (changed_taste, minded):
        with pytest.raises(ValueError, match="is one bool per target"):
            label(wrong)
    with pytest.raises(ValueError, match=r"missing has shape \(3(, 1)?,?\), the catalogue 6 items"):
        target_picture(HISTORIES, TARGETS, wrong)
    with pytest.raises(ValueError, match="is one bool per target"):
        target_picture(HISTORIES, TARGETS, ints(0, 0, 0, 1, 1, 0))


# Rows

LABELS = Labels("parity", ("even", "odd", "neither"), ints(0, 1, 0, 1, 0))
VALUES, USERS = np.array([1.0, 0.5, 0.0, 0.5, 0.5]), ints(7, 7, 8, 9, 7)


def test_rows_by_hand_and_an_empty_slice_says_so() -> None:
    table = by_slice(VALUES, LABELS, USERS, 300, 0)
    assert list(table) == ["even", "odd", "neither"]
    # Even: user 7 with 1 and 1/2, user 8 with 0. Odd: users 7 and 9 with 1/2 each, so resampling moves nothing.
    assert table["even"] == {"n": 3, "users": 2, "mean": 0.5, "low": 0.0, "high": 0.75}
    assert table["odd"] == {"n": 2, "users": 2, "mean": 0.5, "low": 0.5, "high": 0.5}
    assert table["neither"] == {"n": 0, "users": 0}


def test_the_difference_of_two_systems_is_paired_by_slice() -> None:
    # The reference is worse by 1/4 on every even target, and equal on the odd ones.
    table = by_slice(VALUES, LABELS, USERS, 199, 0, VALUES - np.array([0.25, 0, 0.25, 0, 0.25]))
    keys = ("gain", "gain_low", "gain_high", "p")
    assert [table["even"][key] for key in keys] == [0.25, 0.25, 0.25, 2 / 200]
    assert [table["odd"][key] for key in keys] == [0, 0, 0, 1]
    assert table["neither"] == {"n": 0, "users": 0}
    assert table["even"].items() >= by_slice(VALUES, LABELS, USERS, 199, 0)["even"].items()


@given(st.integers(1, 40), st.integers(0, 999))
def test_a_row_is_that_of_the_slice_alone_and_the_rows_make_up_the_whole(count: int, seed: int) -> None:
    generator = np.random.default_rng(seed)
    values, other = generator.random(count), generator.random(count)
    users, labels = generator.integers(0, 9, count), Labels("any", ("a", "b", "c"), generator.integers(0, 3, count))
    table = by_slice(values, labels, users, 20, seed, other)
    for number, name in enumerate(labels.names):
        own, row = labels.of == number, table[name]
        assert (row["n"], row["users"]) == (own.sum(), len(set(users[own].tolist())))
        if not own.any():
            assert list(row) == ["n", "users"]
            continue
        interval = metrics.bootstrap(values[own], users[own], 20, seed)
        paired = metrics.paired_bootstrap(values[own], other[own], users[own], 20, seed)
        assert (row["mean"], row["low"], row["high"]) == (interval.mean, interval.low, interval.high)
        assert (row["gain"], row["gain_low"], row["gain_high"]) == (paired.mean, paired.low, paired.high)
        assert row["p"] == paired.p_value
    filled = [row for row in table.values() if row["n"]]
    assert sum(row["n"] for row in filled) == count
    assert sum(row["n"] * row["mean"] for row in filled) / count == pytest.approx(values.mean(), rel=1e-12)


def test_the_order_of_the_targets_changes_nothing() -> None:
    generator = np.random.default_rng(0)
    values, users, of = generator.random(50), generator.integers(0, 12, 50), generator.integers(0, 2, 50)
    labels, order = Labels("any", ("a", "b"), of), generator.permutation(50)
    wanted = by_slice(values, labels, users, 200, 3, values[::-1])
    got = by_slice(values[order], replace(labels, of=of[order]), users[order], 200, 3, values[::-1][order])
    for name in labels.names:
        assert got[name] == pytest.approx(wanted[name], rel=1e-12)


def test_no_targets_have_empty_slices_only() -> None:
    table = by_slice(np.zeros(0), Labels("any", ("a", "b"), ints()), ints(), 100, 0, np.zeros(0))
    assert table == {"a": {"n": 0, "users": 0}, "b": {"n": 0, "users": 0}}


def test_lengths_that_differ_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"labels has shape \(4,\)"):
        by_slice(VALUES, replace(LABELS, of=ints(0, 1, 0, 1)), USERS, 100, 0)
    with pytest.raises(ValueError, match=r"users has shape \(4,\)"):
        by_slice(VALUES, LABELS, USERS[:4], 100, 0)
    with pytest.raises(ValueError, match=r"reference has shape \(4,\)"):
        by_slice(VALUES, LABELS, USERS, 100, 0, VALUES[:4])
    with pytest.raises(ValueError, match=r"values has shape \(5, 1\)"):
        by_slice(VALUES[:, None], LABELS, USERS, 100, 0)


def test_values_that_are_not_finite_are_refused_with_their_place_among_all_targets() -> None:
    broken = VALUES.copy()
    broken[3] = math.nan
    with pytest.raises(ValueError, match=r"values\[3\] is nan"):
        by_slice(broken, LABELS, USERS, 100, 0)
    with pytest.raises(ValueError, match=r"reference\[3\] is nan"):
        by_slice(VALUES, LABELS, USERS, 100, 0, broken)


def test_no_samples_are_refused() -> None:
    with pytest.raises(ValueError, match="samples is 0"):
        by_slice(VALUES, LABELS, USERS, 0, 0)
