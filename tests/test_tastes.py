"""Tastes are what the formulas say: more than the catalogue has, sure only after some items, moved only by enough."""

import math
from math import factorial

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mllm_srec.tastes import (
    CHANGED,
    HINT,
    MEMORY,
    Counts,
    Movement,
    Rates,
    change,
    count,
    distinct,
    explained,
    movement,
    strengths,
)


def rates(**base: float) -> Rates:
    """Every fact a named one: its prior odds are its share."""
    return Rates(base, base)


def beta(hits: int, misses: int) -> float:
    """B(hits + 1, misses + 1) = hits! misses! / (hits + misses + 1)!."""
    return factorial(hits) * factorial(misses) / factorial(hits + misses + 1)


def rounded(found: dict[str, float]) -> dict[str, float]:
    return {fact: round(value, 4) for fact, value in found.items()}


# Counting


def test_counts_by_hand() -> None:
    assert count([["red", "hat"], ["red"], []]) == Counts(3.0, {"red": 2.0, "hat": 1.0})
    assert count([]) == Counts()
    past, later = Counts(4.0, {"red": 2.0, "hat": 1.0}), Counts(2.0, {"red": 1.0, "wool": 2.0})
    assert past.add(later, 0.5) == Counts(4.0, {"red": 2.0, "hat": 0.5, "wool": 2.0})
    assert past.add(later) == Counts(6.0, {"red": 3.0, "hat": 1.0, "wool": 2.0})
    assert Counts().add(later, MEMORY) == later


# Strength


@pytest.mark.parametrize(
    ("n", "m", "b", "odds"),
    [
        # B(4, 2) = 3! 1! / 5! = 1/20, over (1/4)^3 (3/4) = 3/256, times prior odds of 1/4
        (3, 4, 1 / 4, 1 / 20 * 256 / 3 / 4),
        (2, 2, 1 / 10, 1 / 3 * 100 / 10),  # B(3, 1) = 2! 0! / 3! = 1/3
        (3, 3, 2 / 3, 1 / 4 * 27 / 8 * 2 / 3),  # B(4, 1) = 3! 0! / 4! = 1/4
        (1, 1, 1 / 100, 1 / 2),  # B(2, 1) = 1/2: one item proves nothing, however rare its facts
        (6, 10, 1 / 5, factorial(6) * factorial(4) / factorial(11) / (0.2**6 * 0.8**4) / 5),
    ],
)
def test_a_strength_by_hand(n: int, m: int, b: float, odds: float) -> None:
    counts = Counts(m, {"red": n})
    assert strengths(counts, rates(red=b), -9) == rounded({"red": math.log(odds)})
    assert strengths(counts, rates(red=b)) == (rounded({"red": math.log(odds)}) if odds > 1 else {})


def test_a_word_of_a_text_needs_more_than_a_named_fact() -> None:
    counts, base = Counts(2.0, {"red": 2.0, "tale": 2.0}), {"red": 0.1, "tale": 0.1}
    found = strengths(counts, Rates(base, {"red": 0.1, "tale": 0.025}), -9)
    assert found == rounded({"red": math.log(10 / 3), "tale": math.log(10 / 12)})
    assert list(strengths(counts, Rates(base, {"red": 0.1, "tale": 0.025}))) == ["red"]


@given(st.integers(1, 50), st.sampled_from([-9.0, HINT, 0.0]))
def test_what_all_the_catalogue_has_is_no_taste(size: int, least: float) -> None:
    counts = Counts(size, {"black": size, "rare": size})
    assert list(strengths(counts, rates(black=1.0, rare=0.1), least)) == ["rare"] * (size > 1 or least < 0)


@given(st.integers(0, 30), st.integers(0, 30), st.floats(0.01, 0.99))
def test_only_what_is_commoner_than_in_the_catalogue_is_a_taste(hits: int, misses: int, base: float) -> None:
    counts = Counts(hits + misses, {"red": hits})
    found = strengths(counts, rates(red=base), -999)
    assert bool(found) == (hits > (hits + misses) * base)
    if found:
        assert found["red"] == pytest.approx(
            math.log(beta(hits, misses) / (base**hits * (1 - base) ** misses) * base), abs=1e-4
        )


def test_the_strongest_stand_first_and_equal_ones_in_alphabetical_order() -> None:
    counts = Counts(4.0, {"b": 4.0, "a": 4.0, "c": 3.0, "d": 4.0})
    assert list(strengths(counts, rates(a=0.1, b=0.1, c=0.1, d=0.05))) == ["d", "a", "b", "c"]


def test_a_thousand_items_are_no_overflow() -> None:
    found = strengths(Counts(10_000.0, {"red": 9_000.0}), rates(red=1e-4))
    assert found["red"] == pytest.approx(9_000 * math.log(1e4), rel=0.1)


# Change


def test_a_change_by_hand() -> None:
    none, all_three = Counts(3.0, {}), Counts(3.0, {"red": 3.0})
    # B(1, 4) B(4, 1) / B(4, 4) = 3!/4! 3!/4! 7!/(3! 3!) = 1/4 1/4 140
    assert change(none, all_three, "red") == pytest.approx(math.log(140 / 16))
    assert change(all_three, none, "red") == pytest.approx(-math.log(140 / 16))
    assert math.log(140 / 16) > CHANGED
    # B(2, 2) B(2, 2) / B(3, 3) = 1/6 1/6 30 < 1: one rate explains both better
    half = Counts(2.0, {"red": 1.0})
    assert change(half, half, "red") == 0.0
    assert change(Counts(), all_three, "red") == 0.0  # without a past nothing can change


@given(st.integers(0, 12), st.integers(0, 12), st.integers(1, 5), st.integers(1, 5))
def test_no_change_is_claimed_of_a_constant_rate(hits: int, misses: int, before: int, later: int) -> None:
    past = Counts(before * (hits + misses), {"red": before * hits})
    newest = Counts(later * (hits + misses), {"red": later * hits})
    assert change(past, newest, "red") == 0.0
    moved = movement(past, newest, rates(red=0.05))
    assert (moved.rises, moved.fades) == ({}, {})


COUNTS = st.integers(0, 9).flatmap(lambda size: st.tuples(st.just(size), st.integers(0, size)))


@given(COUNTS, COUNTS)
def test_a_change_is_the_same_backwards_with_the_other_sign(one: tuple[int, int], other: tuple[int, int]) -> None:
    past, newest = (Counts(size, {"red": hits}) for size, hits in (one, other))
    value = math.log(
        beta(one[1], one[0] - one[1])
        * beta(other[1], other[0] - other[1])
        / beta(one[1] + other[1], one[0] + other[0] - one[1] - other[1])
    )
    assert abs(change(past, newest, "red")) == pytest.approx(max(0.0, value), abs=1e-9)
    assert change(past, newest, "red") == pytest.approx(-change(newest, past, "red"), abs=1e-9)
    if value > 1e-9:
        assert (change(past, newest, "red") > 0) == (other[1] * one[0] > one[1] * other[0])


# Movement

TENTHS = rates(old=0.1, new=0.1, kept=0.1, some=0.1)


def test_what_stays_rises_fades_and_is_only_hinted_at_by_hand() -> None:
    past = Counts(3.0, {"old": 3.0, "kept": 3.0})
    newest = Counts(3.0, {"new": 3.0, "kept": 3.0, "some": 2.0})
    three_of_three = math.log(1 / 4 * 1000 / 10)  # B(4, 1) = 1/4
    assert movement(past, newest, TENTHS) == Movement(
        stays=rounded({"kept": math.log(1 / 7 * 10**6 / 10)}),  # six of six: B(7, 1) = 1/7
        rises=rounded({"new": three_of_three}),  # by ln(140/16) = 2.2 nats
        fades=rounded({"old": three_of_three}),
        # two of three: B(3, 2) = 2! 1! / 4! = 1/12; changed by 1/4 1/12 105 = e^0.8 only
        lately=rounded({"some": math.log(1 / 12 * 100 / 0.9 / 10)}),
    )


def test_in_the_first_window_nothing_rises() -> None:
    newest = Counts(3.0, {"new": 3.0})
    assert movement(Counts(), newest, TENTHS) == Movement({}, {}, {}, strengths(newest, TENTHS))
    assert movement(Counts(), Counts(), TENTHS) == Movement({}, {}, {}, {})


def test_one_window_of_something_new_turns_a_long_old_taste() -> None:
    old, past = Counts(6.0, {"old": 6.0, "kept": 6.0}), Counts()
    for _ in range(10):
        past = past.add(old, MEMORY)
    assert past.size == pytest.approx(6 * (1 - MEMORY**10) / (1 - MEMORY))
    turned = Counts(6.0, {"new": 6.0, "kept": 6.0})
    moved = movement(past, turned, TENTHS)
    assert [list(found) for found in (moved.stays, moved.rises, moved.fades, moved.lately)] == [
        ["kept"],
        ["new"],
        ["old"],
        [],
    ]
    for _ in range(12):
        past = past.add(turned, MEMORY)
    moved = movement(past, turned, TENTHS)  # what was new has become known, what was old is forgotten
    assert (list(moved.stays), moved.rises, moved.fades) == (["kept", "new"], {}, {})


def test_a_weak_echo_of_what_fades_is_not_said_to_be_wanted() -> None:
    past, newest = Counts(20.0, {"old": 20.0}), Counts(6.0, {"old": 3.0})
    # 20 of 20, then 3 of 6: B(21, 1) B(4, 4) / B(24, 4) = 1/21 1/140 70200, three nats
    moved = movement(past, newest, rates(old=0.05))
    assert list(strengths(newest, rates(old=0.05), HINT)) == ["old"]
    assert (list(moved.fades), moved.lately, moved.stays) == (["old"], {}, {})


FACTS = st.lists(st.sets(st.sampled_from(["old", "new", "kept", "some"])), max_size=8)


@given(FACTS, FACTS)
def test_each_taste_moves_one_way_only_and_what_is_shown_is_told(past: list[set[str]], newest: list[set[str]]) -> None:
    moved = movement(count(past), count(newest), TENTHS)
    names = [fact for found in (moved.stays, moved.rises, moved.fades, moved.lately) for fact in found]
    assert len(set(names)) == len(names)
    assert set(strengths(count(newest), TENTHS, HINT)) <= set(names)
    for found in (moved.stays, moved.rises, moved.fades, moved.lately):
        assert list(found.values()) == sorted(found.values(), reverse=True)


@given(FACTS.flatmap(lambda facts: st.tuples(st.just(facts), st.permutations(facts))), FACTS)
def test_the_order_of_items_within_a_window_does_not_matter(
    both: tuple[list[set[str]], list[set[str]]], past: list[set[str]]
) -> None:
    one, other = both
    assert movement(count(past), count(one), TENTHS) == movement(count(past), count(other), TENTHS)
    assert movement(count(one), count(past), TENTHS) == movement(count(other), count(past), TENTHS)
    assert strengths(count(one), TENTHS, -9) == strengths(count(other), TENTHS, -9)


# Names


@pytest.mark.parametrize(
    ("found", "facts", "limit", "names"),
    [
        (["mug", "kitchen", "red"], [["mug", "kitchen"], ["mug", "kitchen", "red"]], 4, ["mug", "red"]),  # same items
        (["basic", "basics", "red"], [["basic"], ["basics", "basic"], ["red"]], 4, ["basic", "red"]),  # same words
        (["red shoe", "shoe", "shoes red"], [["red shoe"], ["shoe"], ["shoes red"]], 4, ["red shoe", "shoes red"]),
        (["a", "b", "c"], [["a"], ["b"], ["c"]], 2, ["a", "b"]),
        ([], [["a"]], 4, []),
    ],
)
def test_names_that_say_the_same_are_left_out(
    found: list[str], facts: list[list[str]], limit: int, names: list[str]
) -> None:
    assert distinct(dict.fromkeys(found, 1.0), facts, limit) == names


# Where a taste is known from


def test_shares_of_picture_and_text_by_hand() -> None:
    facts = [
        {"red": "picture", "hat": "text"},  # meets red by its picture
        {"hat": "text"},  # no taste
        {"wool": "text"},
        {"red": "both"},
        {"red": "picture", "wool": "text"},  # one taste each
        {"red": "picture", "pink": "picture"},
        {},
    ]
    assert explained(facts, ["red", "wool", "pink"]) == (round(2 / 7, 4), round(1 / 7, 4), round(2 / 7, 4))
    assert explained(facts, []) == (0.0, 0.0, 0.0)
    assert explained([], ["red"]) == (0.0, 0.0, 0.0)
