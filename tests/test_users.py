"""Stage 2: windows are anchored, phrases and movement are what the formulas say, and a state puts them in words."""

import math
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fakes import CATALOGUE, IDS, FakeMllm, make_dataset, place, shown
from fakes import users_config as config
from mllm_srec.config import UsersConfig
from mllm_srec.data.dataset import Histories
from mllm_srec.errors import ModelError
from mllm_srec.prompts import users as prompts
from mllm_srec.users import (
    DAY,
    PHRASES_PER_LINE,
    PHRASES_PER_WINDOW,
    Summary,
    UserState,
    Window,
    build_state,
    comprehend_history,
    cut_windows,
    disliked_events,
    low_rating,
    movement,
    shared_phrases,
    stable_tastes,
    summarise,
    window_bounds,
)


def nobody_dislikes(items: Sequence[object]) -> np.ndarray:
    return np.zeros(len(items), dtype=bool)


# Windows


@pytest.mark.parametrize(
    ("window", "step", "end", "bounds"),
    [
        (4, 4, 0, []),
        (4, 4, 1, [(0, 1)]),
        (4, 4, 4, [(0, 4)]),
        (4, 4, 5, [(0, 4), (4, 5)]),
        (4, 4, 12, [(0, 4), (4, 8), (8, 12)]),
        (4, 2, 3, [(0, 3)]),
        (4, 2, 4, [(0, 4)]),
        (4, 2, 5, [(0, 4), (2, 5)]),
        (4, 2, 6, [(0, 4), (2, 6)]),
        (4, 2, 7, [(0, 4), (2, 6), (4, 7)]),
        (1, 1, 2, [(0, 1), (1, 2)]),
    ],
)
def test_window_bounds_by_hand(window: int, step: int, end: int, bounds: list[tuple[int, int]]) -> None:
    assert window_bounds(end, config(last=100, window=window, step=step)) == bounds


@pytest.mark.parametrize(
    ("last", "bounds"),
    [
        (1, [(8, 10)]),
        (2, [(8, 10)]),
        (3, [(4, 8), (8, 10)]),
        (6, [(4, 8), (8, 10)]),
        (7, [(0, 4), (4, 8), (8, 10)]),
    ],
)
def test_windows_that_hold_none_of_the_last_events_are_left_out(last: int, bounds: list[tuple[int, int]]) -> None:
    assert window_bounds(10, config(last=last)) == bounds


SHAPES = st.builds(
    lambda last, step, overlap: config(last=last, window=step + overlap, step=step),
    *(st.integers(least, most) for least, most in ((1, 40), (1, 12), (0, 8))),
)


@given(SHAPES, st.integers(0, 60), st.integers(0, 20))
def test_a_closed_window_stays_where_it_is(shape: UsersConfig, end: int, more: int) -> None:
    closed = [b for b in window_bounds(end, shape) if b[1] - b[0] == shape.window]
    later = window_bounds(end + more, shape)
    assert [b for b in closed if b[1] > end + more - shape.last] == [b for b in later if b in closed]


@given(SHAPES, st.integers(1, 60))
def test_windows_cover_the_newest_events_and_end_with_the_last(shape: UsersConfig, end: int) -> None:
    bounds = window_bounds(end, shape)
    assert bounds[-1][1] == end
    assert bounds == sorted(bounds)
    assert all(0 <= start < stop <= end for start, stop in bounds)
    assert sum(stop - start != shape.window for start, stop in bounds) <= 1
    covered = {event for start, stop in bounds for event in range(start, stop)}
    assert covered.issuperset(range(max(0, end - shape.last), end))


@given(SHAPES, st.text(IDS, min_size=1, max_size=25), st.text(IDS, max_size=9), st.text(IDS, max_size=9))
def test_windows_do_not_know_what_comes_later(shape: UsersConfig, past: str, future: str, other: str) -> None:
    one, two = place(past + future), place(past + other)
    windows = cut_windows(CATALOGUE, one, one % 2 == 0, shape, len(past))
    assert windows == cut_windows(CATALOGUE, two, two % 2 == 0, shape, len(past))
    assert windows == cut_windows(CATALOGUE, one[: len(past)], one[: len(past)] % 2 == 0, shape, len(past))


# What a window says


def test_shared_phrases_by_hand() -> None:
    base = {"red": 0.25, "wool": 0.1, "hat": 0.5}
    window = [["red", "wool"], ["red"], ["red", "hat"], ["hat"]]
    # red: 3 of 4, s = 3/5; hat: s = 2/5 is below its base rate; wool: one item of four shows no taste
    assert shared_phrases(window, base) == [("red", round(0.6 * math.log(0.6 / 0.25), 4))]
    # two items: one that has a fact is enough, s = 1/3
    assert shared_phrases([["red", "wool"], ["hat"]], base) == [
        ("wool", round(math.log(1 / 3 / 0.1) / 3, 4)),
        ("red", round(math.log(1 / 3 / 0.25) / 3, 4)),
    ]
    assert shared_phrases([["red", "red"], ["red"], []], base) == [("red", round(0.5 * math.log(2), 4))]
    assert shared_phrases([], base) == []


def test_what_the_catalogue_holds_often_shows_less_taste() -> None:
    window = [["common", "special"]] * 3
    assert shared_phrases(window, {"common": 0.5, "special": 0.05}) == [
        ("special", round(0.75 * math.log(15), 4)),
        ("common", round(0.75 * math.log(1.5), 4)),
    ]
    assert shared_phrases(window, {"common": 0.75, "special": 1.0}) == []


def test_the_strongest_phrases_are_kept_and_equal_ones_stand_in_alphabetical_order() -> None:
    names = [f"f{n}" for n in range(9)]
    found = shared_phrases([names[::-1]] * 3, dict.fromkeys(names, 0.1))
    assert [phrase for phrase, _ in found] == names[:PHRASES_PER_WINDOW]


def test_dislikes_are_written_down_and_are_no_taste() -> None:
    disliked = np.array([False, False, True, True])
    (window,) = cut_windows(CATALOGUE, place("abde"), disliked, config(), 4)
    assert window.lines == ("a the title", "b the title", "d the title, rated low", "e the title, rated low")
    # two liked items: red in both (s = 2/3, base 3/9), shoe and hat in one (s = 1/3, at or near the base rate)
    assert dict(window.phrases)["red"] == round(2 / 3 * math.log(2), 4)
    assert "blue" not in dict(window.phrases)


def histories_of(*ratings: float | None) -> Histories:
    log = {"u": [(IDS[n], n, rating) for n, rating in enumerate(ratings)]}
    return make_dataset(Path(), [{"item_id": item_id} for item_id in IDS], log).histories()


def test_the_lowest_third_of_the_scale_is_a_dislike() -> None:
    histories = histories_of(1, 2, None, 2.5, 5)
    assert low_rating(histories) == pytest.approx(1 + 0.3 * 4)
    np.testing.assert_array_equal(disliked_events(histories, 0, 2.2), [True, True, False, False, False])
    np.testing.assert_array_equal(disliked_events(histories, 0, None), [False] * 5)


@pytest.mark.parametrize("ratings", [(None, None), (3, 3, None)])
def test_without_a_scale_nothing_is_a_dislike(ratings: tuple[float | None, ...]) -> None:
    assert low_rating(histories_of(*ratings)) is None


def test_a_phrase_weighs_what_the_window_makes_it_likelier() -> None:
    def likelihood(before: str, phrase: str) -> float:
        if before == prompts.EMPTY_WINDOW:
            return -2.0
        return {"red": -2.0, "hat": -2.0 + math.log(3), "wool": -2.0 - math.log(4)}[phrase]

    windows = [
        Window(0, 2, ("a", "b"), (("red", 0.4), ("hat", 0.4), ("wool", 0.5))),
        Window(2, 4, ("c", "d"), ()),
        Window(4, 5, ("e",), (("red", 0.2),)),
    ]
    asked = FakeMllm(likelihood=likelihood)
    made = summarise(asked, windows, {"red": -2.0, "hat": -2.0, "wool": -2.0}, config())
    assert made == [
        ("hat, red, wool", {"red": 0.2, "hat": 0.3, "wool": 0.1}),
        ("no common taste", {}),
        ("red", {"red": 0.1}),
    ]
    assert [shown(request.prefix) for request in asked.scored] == [
        "A person chose these items, oldest first:\n- a\n- b\nThis person wants: ",
        "A person chose these items, oldest first:\n- e\nThis person wants: ",
    ]
    assert all(request.question == "" for request in asked.scored)
    assert asked.generated == []


def test_a_written_summary_with_invented_words_falls_back_to_the_phrases() -> None:
    windows = [
        Window(0, 2, ("red shoe", "red scarf"), (("red", 0.4),)),
        Window(2, 4, ("green hat",), (("hat", 0.3), ("green", 0.2), ("warm", 0.1), ("cheap", 0.1))),
        Window(4, 5, ("glove",), ()),
    ]
    answers = {"red": "red\n scarfs with shoe", "green": "golden hats", "glove": ""}
    asked = FakeMllm(say=lambda p: next(text for word, text in answers.items() if word in shown(p)))
    made = summarise(asked, windows, {}, config(summary="generate"))
    assert made == [
        ("red scarfs with shoe", {"red": 0.4}),
        ("hat, green, warm", dict(windows[1].phrases)),
        ("no common taste", {}),
    ]
    assert asked.scored == []
    assert {prompt.answer for prompt in asked.generated} == {"This person wants"}


@pytest.mark.parametrize("where", ["nothing is known", "oldest first"])
def test_a_phrase_likelihood_that_is_not_finite_stops_with_the_fix(where: str) -> None:
    broken = FakeMllm(likelihood=lambda before, _: float("nan") if where in before else -1.0)
    with pytest.raises(ModelError, match=r"phrases that are not finite: try model.dtype=float32"):
        comprehend_history(broken, CATALOGUE, place("abc"), config())


# What moves and what stays


def window(size: int = 4, closed: bool = True, text: str = "", **weights: float) -> Summary:
    return Summary(size, closed, text, weights)


def test_movement_by_hand() -> None:
    past = [window(red=0.4, hat=0.2), window(red=0.4)]  # belief: red 0.2 -> 0.3, hat 0.1 -> 0.05
    assert movement([*past, window(red=0.3, wool=0.2)]) == (["red"], ["wool"], ["hat"])
    assert movement([*past, window(), window()]) == ([], [], ["red"])  # belief: red 0.15, hat 0.025 is forgotten
    assert movement([*past, window(hat=0.06, red=0.04)]) == (["hat"], [], [])  # red is weak, but not gone


def test_two_events_make_nothing_fade() -> None:
    past = window(red=0.4)
    assert movement([past, window(2, False, wool=0.2)]) == ([], ["wool"], [])
    assert movement([past, window(3, False, wool=0.2)]) == ([], ["wool"], ["red"])


def test_in_the_first_window_every_taste_is_new() -> None:
    assert movement([window(red=0.4, hat=0.5, faint=0.04)]) == ([], ["hat", "red"], [])
    assert len(movement([window(a=1, b=1, c=1, d=1)])[1]) == PHRASES_PER_LINE


def test_stable_tastes_are_the_average_over_closed_windows() -> None:
    closed = [window(red=0.4, hat=0.1), window(red=0.2, wool=0.8, faint=0.08)]
    assert stable_tastes([*closed, window(2, False, green=9.0)]) == ["wool", "red", "hat"]
    assert stable_tastes([window(2, False, green=9.0)]) == ["green"]
    assert stable_tastes([window()]) == []


# The state


def state(items: str, time: list[int] | None, *summaries: Summary, low: str = "", **changes: object) -> UserState:
    times = None if time is None else np.array(time, dtype=np.int64)
    disliked = np.array([item in low for item in items], dtype=bool)
    found = place(items)
    return build_state("u", found, times, disliked, len(items), summaries, CATALOGUE, config(**changes))


def test_of_a_user_without_events_nothing_is_known() -> None:
    assert state("", [], last=3) == UserState("u", 0, None, "shows no taste yet", "shows no taste yet", (), ())


def test_one_event_has_no_rhythm() -> None:
    made = state("a", [7], window(1, False, red=0.3))
    assert made.profile == "likes red; 1 choice so far"
    assert made.preference == "newly turns to red"
    assert (made.as_of, made.end, made.phrases, made.recent) == (7, 1, ("red",), (0,))


@pytest.mark.parametrize(
    ("time", "rhythm"),
    [
        ([0, 2 * DAY], ", typically one in 2 days"),
        ([0, DAY], ", typically one in 1 day"),
        ([0, DAY // 2], ", typically several a day"),
        ([5, 5], ", typically several a day"),
        (None, ""),
    ],
)
def test_the_rhythm_is_the_median_gap(time: list[int] | None, rhythm: str) -> None:
    assert state("ab", time, window(2, False)).profile == f"has a broad taste; 2 choices so far{rhythm}"


def test_a_state_names_what_stays_turns_and_was_rated_low() -> None:
    days = [n * DAY for n in (0, 3, 6, 9, 9, 9)]
    made = state("abcdef", days, window(red=0.4, hat=0.4), window(2, False, red=0.2, wool=0.1), low="bef")
    # four events are settled: three gaps of three days; b is not among the newest four
    assert made.profile == "likes hat, red; 4 choices so far, typically one in 3 days"
    assert made.preference == "stays with red; newly turns to wool; rated low e the title, f the title"
    assert made.phrases == ("red", "wool", "hat")
    assert made.recent == tuple(place("def"))
    assert made.as_of == 9 * DAY


def test_an_unknown_taste_is_said_to_be_unknown() -> None:
    made = state("abcd", None, window())
    assert made.profile == "has a broad taste; 4 choices so far"
    assert made.preference == "shows no taste yet"
    assert (made.as_of, made.phrases) == (None, ())


def test_no_recent_items_are_kept_when_none_are_asked_for() -> None:
    assert state("abcd", None, window(), recent=0).recent == ()


def test_only_the_last_events_set_the_rhythm() -> None:
    days = [n * DAY for n in (0, 50, 100, 101)]
    assert state("abcd", days, window(), last=2).profile.endswith("one in 1 day")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert state("abcd", days, window(), last=1).profile == "has a broad taste; 4 choices so far"


def test_a_written_summary_ends_the_preference() -> None:
    asked = {"summary": "generate"}
    made = state("abcd", None, window(text="red hats.", red=0.3), **asked)
    assert made.preference == "newly turns to red. This person wants red hats"
    assert state("abcd", None, window(text="no common taste"), **asked).preference == "shows no taste yet"


def test_a_history_of_nothing_asks_nothing() -> None:
    mllm = FakeMllm()
    made = comprehend_history(mllm, CATALOGUE, place(""), config())
    assert made == UserState("", 0, None, prompts.NOTHING, prompts.NOTHING, (), ())
    assert mllm.calls() == 0


def test_a_model_that_writes_is_not_asked_to_score() -> None:
    mllm = FakeMllm(say=lambda prompt: "title")
    comprehend_history(mllm, CATALOGUE, place("abcde"), config(summary="generate"))
    assert (len(mllm.generated), len(mllm.scored)) == (2, 0)
