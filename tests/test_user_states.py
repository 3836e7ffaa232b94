"""A state says what stays, moves and was disliked; its profile waits for closed windows; it knows no later event."""

import time as clock
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fakes import CATALOGUE, IDS, make_catalogue, make_dataset, place
from fakes import users_config as config
from mllm_srec.catalogue import Catalogue
from mllm_srec.config import UsersConfig
from mllm_srec.data.dataset import Histories
from mllm_srec.prompts import users as prompts
from mllm_srec.tastes import MEMORY, STRONG, Counts, count, movement, strengths
from mllm_srec.user_states import (
    DISLIKED_NAMED,
    NOBODY,
    PAUSE,
    History,
    UserState,
    build_state,
    disliked_events,
    low_rating,
    movement_of,
    read_window,
)
from mllm_srec.windows import DAY, HOUR, closed_until, window_bounds


def history(items: str, time: list[int] | None = None, low: str = "", catalogue: Catalogue = CATALOGUE) -> History:
    """Items by their letter; those in `low` are disliked."""
    return History(
        "u",
        np.array([catalogue.place[item] for item in items], dtype=np.int32),
        None if time is None else np.array(time, dtype=np.int64),
        np.array([item in low for item in items], dtype=bool),
    )


def state(
    items: str,
    time: list[int] | None = None,
    low: str = "",
    summary: str = prompts.NO_TASTE,
    catalogue: Catalogue = CATALOGUE,
    **changes: object,
) -> UserState:
    return build_state(history(items, time, low, catalogue), len(items), summary, catalogue, config(**changes))


def profile(
    likes: Sequence[str] = (),
    hints: Sequence[str] = (),
    dislikes: Sequence[str] = (),
    origin: str = "",
    breadth: str = "",
    prices: tuple[float, float] | None = None,
    rhythm: str = "",
) -> str:
    return prompts.profile(likes, hints, dislikes, origin, breadth, prices, rhythm)


BLANKS = dict.fromkeys("ABCDEFGHIJKLMNOPQRST", "")
BARE = make_catalogue(**dict.fromkeys("abcdefgh", ""))


# Dislikes


def histories_of(*ratings: float | None) -> Histories:
    log = {"u": [(IDS[n], n, rating) for n, rating in enumerate(ratings)]}
    return make_dataset(Path(), [{"item_id": item_id} for item_id in IDS], log).histories()


def test_the_lowest_third_of_the_scale_is_a_dislike() -> None:
    histories = histories_of(1, 2, None, 2.5, 5)
    assert low_rating(histories) == pytest.approx(1 + 0.3 * 4)
    np.testing.assert_array_equal(disliked_events(histories, 0, 2.2), [True, True, False, False, False])
    np.testing.assert_array_equal(disliked_events(histories, 0, None), [False] * 5)
    np.testing.assert_array_equal(History.of(histories, 0, 2.2).disliked, [True, True, False, False, False])


@pytest.mark.parametrize("ratings", [(None, None), (3, 3, None)])
def test_without_a_scale_nothing_is_a_dislike(ratings: tuple[float | None, ...]) -> None:
    assert low_rating(histories_of(*ratings)) is None


def test_dislikes_are_said_as_such_and_are_no_tastes() -> None:
    window = read_window(history("abde", low="de"), 0, 4, CATALOGUE)
    assert window.events[2:] == tuple(prompts.event(f"{item} the title", "", wait=None, disliked=True) for item in "de")
    assert "red" in window.tastes and "blue" not in window.tastes
    made = state("abcdede", low="de")
    assert made.stable == strengths(count([["red", "shoe"], ["red", "hat"], ["red", "scarf"]]), CATALOGUE.rates)
    assert "blue" not in made.phrases
    assert made.preference == prompts.preference(["red"], [], [], [], ["d the title", "e the title"], prompts.NO_TASTE)


def test_the_newest_dislikes_of_the_newest_window_are_named() -> None:
    made = state("defghiab", low="defab", window=4)
    said = prompts.preference([], [], [], [], ["a the title", "b the title"], prompts.NO_TASTE)
    assert made.preference.endswith(said)
    assert state("defdef", low="def", window=3, step=3).preference.count("the title") == DISLIKED_NAMED
    assert "rated low" not in state("defghiga", low="def", window=4).preference


def test_what_is_rated_low_again_and_again_is_a_dislike_unless_it_is_liked_as_well() -> None:
    # blue: three of three disliked, B(4, 1) (9/2)^3 2/9 = 5 to 1; hat: two of three, B(3, 2) 9 3/2 1/3 = 3/8
    assert state("abcede", low="de", window=6).profile == profile(["red"], dislikes=["blue"])
    assert state("abcabc", low="abc", window=6).profile == profile(dislikes=["red"])
    both = replace(history("abcabc"), disliked=np.array([False] * 3 + [True] * 3))
    assert build_state(both, 6, "", CATALOGUE, config(window=6)).profile == profile(["red"])


def test_of_somebody_who_dislikes_everything_no_taste_is_claimed() -> None:
    made = state("abcdef", list(range(6)), low=IDS)
    assert (made.stable, made.phrases, made.by_origin) == ({}, (), (0.0, 0.0, 0.0))
    assert "likes" not in made.profile.replace("dislikes", "")
    assert made.recent == tuple(place("def"))


# Windows in words


def test_a_window_tells_lines_looks_and_long_waits() -> None:
    catalogue = make_catalogue(looks={"b": "red sun hat"}, a="red", b="red", c="", d="", e="")
    times = [0, DAY, DAY + PAUSE - 1, DAY + 2 * PAUSE - 1, 9 * DAY]
    whole = history("abcde", times, catalogue=catalogue)
    window = read_window(whole, 0, 5, catalogue)
    waits = [None, DAY, None, PAUSE, 8 * DAY - 2 * PAUSE + 1]
    looks = ["", "red sun hat", "", "", ""]
    assert window.events == tuple(
        prompts.event(f"{item} the title", look, wait, False)
        for item, look, wait in zip("abcde", looks, waits, strict=True)
    )
    assert window.prompt == prompts.summarise(window.events, window.tastes)
    later = read_window(whole, 1, 3, catalogue)  # it tells how long after the event before it its first one was
    assert later.events == window.events[1:3]
    assert not any("after" in told for told in read_window(history("abc"), 0, 3, CATALOGUE).events)


def test_a_window_names_what_its_items_share_strongest_first_without_saying_it_twice() -> None:
    catalogue = make_catalogue(a="warm red", b="red warm", c="red", d="mug kitchen", e="mug kitchen", **BLANKS)
    # red: three of three, B(4, 1) 25^2 / 3^2 = 17; warm: two of three, B(3, 2) 25^2 / (2 23) = 1.1
    assert read_window(history("abc", catalogue=catalogue), 0, 3, catalogue).tastes == ("red", "warm")
    assert read_window(history("de", catalogue=catalogue), 0, 2, catalogue).tastes == ("kitchen",)
    spelt = replace(catalogue, spelling={"red": "Red"})
    assert read_window(history("abc", catalogue=spelt), 0, 3, spelt).tastes == ("Red", "warm")
    assert build_state(history("abc", catalogue=spelt), 3, "", spelt, config()).profile.startswith(profile(["Red"]))


# The state


def test_of_a_user_without_events_nothing_is_known() -> None:
    assert state("", []) == replace(NOBODY, user_id="u")
    assert NOBODY.phrases == () and NOBODY.profile == NOBODY.preference == prompts.NOTHING
    outside = History.outside(place("ab"))
    assert (outside.user_id, outside.time, list(outside.disliked)) == ("", None, [False, False])


def test_one_event_shows_hints_and_no_taste() -> None:
    made = state("a", [7], summary="red shoe")
    assert made.profile == profile(hints=["red"])  # "shoe" says the same of the same item
    assert made.preference == prompts.preference([], [], [], list(made.movement.lately), [], "red shoe")
    assert (made.as_of, made.end, made.recent, made.window_start) == (7, 1, (0,), 0)
    # one of one: ln(1/2 / b * b) for each of its facts, a hint that nothing is claimed of
    assert made.movement.lately == {"red": -0.6931, "shoe": -0.6931}
    assert (made.movement.stays, made.movement.rises, made.movement.fades, made.stable) == ({}, {}, {}, {})
    assert made.phrases == ("red", "shoe")


def test_two_events_have_a_rhythm() -> None:
    assert state("ab", [0, 2 * DAY], catalogue=BARE).profile == profile(rhythm=prompts.rhythm(2 * DAY, 2 * DAY))
    assert state("ab", catalogue=BARE).profile == profile()


def test_a_state_names_what_stays_rises_fades_and_is_sure() -> None:
    made = state("abcabcabcabdeded", window=4, summary="blue things")
    strong = prompts.strongly
    assert list(made.movement.rises) == ["blue"] and list(made.movement.fades) == ["red"]
    assert made.preference == prompts.preference([], ["blue"], ["red"], ["shoe"], [], "blue things")
    assert list(made.stable) == ["red"] and made.stable["red"] < STRONG
    assert made.profile == profile(["red"])
    assert made.phrases == tuple(dict.fromkeys(["blue", *made.movement.lately]))  # red fades
    steady = state("abcabcabcabc", window=4)
    assert steady.stable["red"] >= STRONG and steady.profile == profile([strong("red")])
    assert steady.preference == prompts.preference([strong("red")], [], [], ["scarf"], [], prompts.NO_TASTE)


def test_the_past_fades_window_by_window() -> None:
    shape, whole = config(window=4, step=2), history("abcdefghiabc")
    assert window_bounds(12, None, shape) == [(0, 4), (2, 6), (4, 8), (6, 10), (8, 12)]
    liked = [list(CATALOGUE.facts[i]) for i in whole.items]
    past = Counts()  # events [8, 12) move 0.7^3 [0, 2) + 0.7^2 [2, 4) + 0.7 [4, 6) + [6, 8)
    for start, memory in ((0, MEMORY**3), (2, MEMORY**2), (4, MEMORY), (6, 1.0)):
        pair = count(liked[start : start + 2])
        past = past.add(Counts(memory * pair.size, {fact: memory * n for fact, n in pair.of.items()}))
    wanted, made = movement(past, count(liked[8:]), CATALOGUE.rates), movement_of(whole, 12, CATALOGUE, shape)
    for name in ("stays", "rises", "fades", "lately"):
        assert getattr(made, name) == pytest.approx(getattr(wanted, name), abs=2e-4)
    assert movement_of(whole, 0, CATALOGUE, shape) == NOBODY.movement


@given(st.permutations(range(4)), st.sampled_from(["abcdeghi", "aabbccdd", "fghiabcd"]))
def test_the_order_within_a_window_moves_nothing(order: list[int], items: str) -> None:
    shuffled = items[:4] + "".join(items[4 + at] for at in order)
    one, other = (movement_of(history(text), 8, CATALOGUE, config()) for text in (items, shuffled))
    assert one == other


def test_repeats_count_as_often_as_they_were_chosen() -> None:
    once, often = state("a"), state("aaaa")
    assert "red" not in once.stable and often.stable["red"] > 0
    assert often.recent == (0, 0, 0)


def test_items_without_facts_or_text_make_a_state_without_tastes() -> None:
    catalogue = make_catalogue(a="", b="", c="red")
    made = state("abababab", list(range(8)), catalogue=catalogue)
    assert (made.stable, made.phrases, made.by_origin) == ({}, (), (0.0, 0.0, 0.0))
    assert made.preference == prompts.NOTHING
    assert read_window(history("ab", catalogue=catalogue), 0, 2, catalogue).tastes == ()


@pytest.mark.parametrize("windows", ["count", "session"])
def test_events_at_one_instant_have_no_pauses(windows: str) -> None:
    made = state("abcabc", [5] * 6, windows=windows)
    assert (made.as_of, made.end, made.window_start) == (5, 6, 4)
    assert made.profile == profile(["red"], rhythm=prompts.rhythm(0, 0))
    assert not any("after" in told for told in read_window(history("abc", [5] * 3), 0, 3, CATALOGUE).events)


def test_a_log_without_times_has_states_without_times() -> None:
    made = state("abcabc")
    assert made.as_of is None
    assert made.profile == profile(["red"])
    assert made.asked_at(99) is made


def test_the_time_since_the_last_event_is_all_that_a_later_moment_adds() -> None:
    made = state("ab", [0, 3 * DAY])
    later = made.asked_at(5 * DAY)
    assert (made.waited, later.waited) == (None, 2 * DAY)
    assert replace(later, waited=None) == made
    assert later.asked_at(4 * DAY).waited == DAY
    assert NOBODY.asked_at(4) is NOBODY


def test_two_choices_stand_for_a_user_the_one_that_meets_the_tastes_best_and_the_newest() -> None:
    made = state("abcabcgd", window=4, step=4)  # red is a taste of the closed windows; g and d have it not
    assert list(made.stable) == ["red"] and "red" not in CATALOGUE.facts[place("d")[0]]
    assert (made.typical, made.newest) == (place("c")[0], place("d")[0])  # of equal ones the newest
    assert state("abcabcga", window=4, step=4).newest == place("a")[0]


def test_a_choice_that_was_rated_low_stands_for_nobody() -> None:
    made = state("abcabcgd", low="cd", window=4, step=4)
    assert (made.typical, made.newest) == (place("b")[0], place("g")[0])
    hated = state("abc", low="abc")
    assert (hated.typical, hated.newest) == (None, None) == (NOBODY.typical, NOBODY.newest)


@given(st.text("abcdeghi", min_size=1, max_size=14), st.integers(1, 13))
def test_the_choices_told_in_full_are_choices_of_the_time(items: str, end: int) -> None:
    end = min(end, len(items))
    made = build_state(history(items), end, "", CATALOGUE, config())
    assert made.newest == place(items)[end - 1] and made.typical in place(items[:end])


@pytest.mark.parametrize(("recent", "kept"), [(0, ""), (1, "d"), (3, "bcd"), (9, "abcd")])
def test_as_many_newest_items_are_kept_as_are_asked_for(recent: int, kept: str) -> None:
    assert state("abcd", recent=recent).recent == tuple(place(kept))


@pytest.mark.parametrize("windows", ["count", "session"])
@pytest.mark.parametrize("apart", [1000, 2 * HOUR])
def test_ten_thousand_events_take_less_than_a_second(windows: str, apart: int) -> None:
    items, shape = np.resize(place(IDS), 10_000), config(window=6, step=3, windows=windows, session_hours=1)
    whole = History("u", items, np.arange(10_000) * apart, np.zeros(10_000, dtype=bool))
    started = clock.process_time()
    made = build_state(whole, 10_000, "", CATALOGUE, shape)
    assert clock.process_time() - started < 1
    assert (made.end, made.as_of) == (10_000, 9_999 * apart)


# The slow profile


SHAPES = st.builds(
    lambda windows, step, overlap: config(windows=windows, window=step + overlap, step=step, session_hours=2),
    st.sampled_from(["count", "session"]),
    st.integers(1, 5),
    st.integers(0, 3),
)
EVENTS = st.lists(
    st.tuples(st.sampled_from(IDS), st.sampled_from([0, HOUR, 3 * HOUR]), st.booleans()), min_size=1, max_size=16
)


@given(SHAPES, EVENTS)
def test_the_profile_changes_only_when_a_window_closes(shape: UsersConfig, events: list[tuple[str, int, bool]]) -> None:
    time = np.cumsum([wait for _, wait, _ in events])
    whole = History("u", place("".join(e[0] for e in events)), time, np.array([e[2] for e in events]))
    made = [build_state(whole, end, "", CATALOGUE, shape) for end in range(1, len(events) + 1)]
    settled = [closed_until(window_bounds(end, time, shape), shape) for end in range(1, len(events) + 1)]
    for at in range(1, len(events)):
        if settled[at] == settled[at - 1] > 0:
            one, other = made[at - 1], made[at]
            assert (one.profile, one.stable, one.by_origin) == (other.profile, other.stable, other.by_origin)


def test_a_closing_window_renews_the_profile() -> None:
    found = [state("abcadede"[:end], window=4).profile for end in range(1, 9)]
    assert found[3] == found[4] == found[5] == found[6] == profile(["red"]) != found[7]
    assert found[0] != found[2]  # before any window has closed, all that is known speaks


@given(EVENTS, EVENTS, SHAPES)
def test_a_state_does_not_know_what_comes_later(
    past: list[tuple[str, int, bool]], later: list[tuple[str, int, bool]], shape: UsersConfig
) -> None:
    def made(events: list[tuple[str, int, bool]]) -> tuple[object, ...]:
        time = np.cumsum([wait for _, wait, _ in events])
        whole = History("u", place("".join(e[0] for e in events)), time, np.array([e[2] for e in events]))
        bounds = window_bounds(len(past), time, shape)
        windows = [read_window(whole, *bound, CATALOGUE) for bound in bounds]
        return windows, build_state(whole, len(past), "", CATALOGUE, shape)

    assert made(past) == made(past + later)


def test_the_price_range_is_the_middle_half_of_what_was_liked() -> None:
    catalogue = make_catalogue(
        prices=dict(zip("abcde", (10, 20, 30, 40, 1000), strict=True)), **dict.fromkeys("abcdefg", "")
    )
    # quartiles of 10, 20, 30, 40: 10 + 0.75 * 10 and 30 + 0.25 * 10
    assert state("abcdef", low="e", catalogue=catalogue, window=6, step=6).profile == profile(prices=(17.5, 32.5))
    assert state("abcf", catalogue=catalogue).profile == profile(prices=(15.0, 25.0))
    assert state("abfg", catalogue=catalogue).profile == profile()  # two prices are no range


def test_the_range_of_categories_is_told() -> None:
    paths = dict(zip("abcdefgh", ("Hats, Warm", "Hats", "Shoes", "Toys", "Books", "Films", "Food", "Tea"), strict=True))
    catalogue = make_catalogue(categories=paths, **dict.fromkeys("abcdefgh", ""))
    assert state("ab", low="b", catalogue=catalogue).profile == profile(breadth=prompts.breadth(2, 8))
    assert state("abcde", catalogue=catalogue, window=5).profile == profile(breadth=prompts.breadth(5, 8))
    assert state("ab", low="ab", catalogue=catalogue).profile == profile()


def test_the_rhythm_is_the_median_wait_and_the_longest() -> None:
    days = [n * DAY for n in (0, 1, 2, 12)]
    assert state("abcd", days, catalogue=BARE).profile == profile(rhythm=prompts.rhythm(DAY, 10 * DAY))


ORIGINS = make_catalogue(
    p="red:picture", q="red:picture", r="red:picture", s="wool", t="wool red:picture", u="red:both",
    **dict.fromkeys("ABCDEFGHIJKLMNOPQRSTUVWXYZ", ""),
)  # fmt: skip


@pytest.mark.parametrize(
    ("items", "shares", "origin"),
    [
        ("pqr", (1.0, 0.0, 0.0), "picture"),
        ("pqrA", (0.75, 0.0, 0.0), "picture"),
        ("ppqqrru", (round(6 / 7, 4), 0.0, round(1 / 7, 4)), "picture"),
        ("sssss", (0.0, 1.0, 0.0), ""),  # no picture tells anything, so nothing is chosen against looks
        ("tttuuu", (0.0, 0.0, 1.0), "both"),
        ("pp", (1.0, 0.0, 0.0), ""),  # two choices are no habit
        ("", (0.0, 0.0, 0.0), ""),
    ],
)
def test_cross_modal_shares_by_hand(items: str, shares: tuple[float, ...], origin: str) -> None:
    made = state(items, catalogue=ORIGINS, window=8)
    assert made.by_origin == shares
    told = [words for words in prompts.ORIGINS.values() if words in made.profile.split("; ")]
    assert told == ([prompts.ORIGINS[origin]] if origin else [])


def test_three_choices_of_nine_are_three() -> None:
    facts = {f"i{n}": "red:picture" if n < 3 else f"x{n}:picture" if n < 9 else "" for n in range(200)}
    catalogue = make_catalogue(**facts)
    whole = History.outside(np.arange(9, dtype=np.int32))
    made = build_state(whole, 9, "", catalogue, config(window=9, step=9))
    assert (list(made.stable), made.by_origin) == (["red"], (0.3333, 0.0, 0.0))
    assert prompts.ORIGINS["picture"] in made.profile.split("; ")
