"""Windows hold every event once in order or overlap by design; what is closed stays, and only the newest is open."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fakes import users_config as config
from mllm_srec.config import UsersConfig
from mllm_srec.errors import UsageError
from mllm_srec.windows import HOUR, closed_until, window_bounds


@pytest.mark.parametrize(
    ("window", "step", "end", "bounds", "closed"),
    [
        (4, 4, 0, [], 0),
        (4, 4, 1, [(0, 1)], 0),
        (4, 4, 4, [(0, 4)], 4),
        (4, 4, 5, [(0, 4), (4, 5)], 4),
        (4, 4, 12, [(0, 4), (4, 8), (8, 12)], 12),
        (4, 2, 3, [(0, 3)], 0),
        (4, 2, 4, [(0, 4)], 4),
        (4, 2, 5, [(0, 4), (2, 5)], 4),
        (4, 2, 6, [(0, 4), (2, 6)], 6),
        (4, 2, 7, [(0, 4), (2, 6), (4, 7)], 6),
        (5, 2, 8, [(0, 5), (2, 7), (4, 8)], 7),
        (1, 1, 2, [(0, 1), (1, 2)], 2),
    ],
)
def test_windows_by_count_by_hand(window: int, step: int, end: int, bounds: list[tuple[int, int]], closed: int) -> None:
    shape = config(window=window, step=step)
    assert window_bounds(end, None, shape) == bounds
    assert window_bounds(end, np.arange(end) * 99 * HOUR, shape) == bounds  # pauses mean nothing to a count
    assert closed_until(bounds, shape) == closed


@pytest.mark.parametrize(
    ("hours", "bounds", "closed"),
    [
        ([], [], 0),
        ([0], [(0, 1)], 0),
        ([0, 2], [(0, 2)], 0),  # a pause of exactly two hours is no break
        ([0, 2.01], [(0, 1), (1, 2)], 1),
        ([0, 1, 2, 5, 6], [(0, 3), (3, 5)], 3),
        ([0, 0, 0, 0], [(0, 3), (3, 4)], 3),  # three events at most
        ([0, 1, 2], [(0, 3)], 3),  # full, so it is closed before the next event is known
        ([0, 1, 2, 9], [(0, 3), (3, 4)], 3),  # full and a pause at once is one break
        ([0, 5, 10], [(0, 1), (1, 2), (2, 3)], 2),
    ],
)
def test_sessions_by_hand(hours: list[float], bounds: list[tuple[int, int]], closed: int) -> None:
    shape = config(windows="session", session_hours=2, window=3, step=1)
    time = (np.array(hours) * HOUR).astype(np.int64)
    assert window_bounds(len(hours), time, shape) == bounds
    assert closed_until(bounds, shape) == closed


def test_a_log_without_times_has_no_sessions() -> None:
    shape = config(windows="session")
    with pytest.raises(UsageError, match=r"no times, so it has no sessions: use users.windows=count"):
        window_bounds(3, None, shape)
    assert window_bounds(3, None, config(windows="count")) == [(0, 3)]


SHAPES = st.builds(
    lambda windows, step, overlap: config(windows=windows, window=step + overlap, step=step, session_hours=3),
    st.sampled_from(["count", "session"]),
    st.integers(1, 9),
    st.integers(0, 6),
)
TIMES = st.lists(st.sampled_from([0, 1, HOUR, 3 * HOUR, 3 * HOUR + 1, 99 * HOUR]), max_size=50).map(
    lambda waits: np.cumsum(np.array(waits, dtype=np.int64))
)


@given(SHAPES, TIMES)
def test_windows_hold_every_event_in_order(shape: UsersConfig, time: np.ndarray) -> None:
    bounds = window_bounds(len(time), time, shape)
    assert bounds == sorted(bounds)
    assert all(0 <= start < stop <= start + shape.window for start, stop in bounds)
    held = [event for start, stop in bounds for event in range(start, stop)]
    assert sorted(set(held)) == list(range(len(time)))
    if shape.windows == "session" or shape.step == shape.window:
        assert held == list(range(len(time)))  # disjoint


@given(SHAPES, TIMES)
def test_only_the_newest_window_may_be_open_and_it_ends_with_the_newest_event(
    shape: UsersConfig, time: np.ndarray
) -> None:
    bounds = window_bounds(len(time), time, shape)
    assert [stop for _, stop in bounds[-1:]] == [len(time)] * bool(bounds)
    assert closed_until(bounds, shape) in {0, *(stop for _, stop in bounds[-2:])}
    if shape.windows == "count":
        assert all(stop - start == shape.window for start, stop in bounds[:-1])
    else:
        for start, stop in bounds:
            assert (np.diff(time[start:stop]) <= 3 * HOUR).all()
        for start, stop in bounds[:-1]:
            assert stop - start == shape.window or time[stop] - time[stop - 1] > 3 * HOUR


@given(SHAPES, TIMES, st.integers(0, 50))
def test_a_closed_window_never_changes_when_events_are_added(shape: UsersConfig, time: np.ndarray, end: int) -> None:
    before, after = window_bounds(min(end, len(time)), time, shape), window_bounds(len(time), time, shape)
    closed = [bound for bound in before if bound[1] <= closed_until(before, shape)]
    assert after[: len(closed)] == closed
    assert len(closed) >= len(before) - 1
    assert closed_until(before, shape) <= closed_until(after, shape)


@given(SHAPES, TIMES, TIMES)
def test_windows_do_not_know_the_times_of_what_comes_later(
    shape: UsersConfig, time: np.ndarray, later: np.ndarray
) -> None:
    known = np.concatenate([time, later + (time[-1] if len(time) else 0)])
    assert window_bounds(len(time), known, shape) == window_bounds(len(time), time, shape)
