"""Windows over a history: by count (size, step) or by sessions, anchored at the first event (Sci Rep 2025, Fig. 3a).

All windows are closed but the last one, which ends at the newest event: a closed window never changes when events are
added, so states at several positions of one history share it.
"""

from itertools import pairwise

import numpy as np

from mllm_srec.config import UsersConfig
from mllm_srec.errors import UsageError

HOUR = 3_600_000
DAY = 24 * HOUR


def window_bounds(end: int, time: np.ndarray | None, config: UsersConfig) -> list[tuple[int, int]]:
    """(start, stop) of the windows of events [0, end), in order; together they hold every event.

    Args:
        end: visible events.
        time: int64, at least `end` times in ms; None for logs without times.
        config: `windows` "count": [k * step, k * step + window), and an open rest; "session": a new window begins where
            two events lie more than `session_hours` apart, or where the one before holds `window` events.

    Raises:
        UsageError: sessions are wanted of a log without times.
    """
    if config.windows == "session":
        if time is None:
            raise UsageError("the log has no times, so it has no sessions: use users.windows=count")
        return _sessions(time[:end], config)
    closed = 0 if end < config.window else (end - config.window) // config.step + 1
    bounds = [(k * config.step, k * config.step + config.window) for k in range(closed)]
    if end > (bounds[-1][1] if bounds else 0):
        bounds.append((closed * config.step, end))
    return bounds


def closed_until(bounds: list[tuple[int, int]], config: UsersConfig) -> int:
    """How many events lie in closed windows: all windows but the newest, and that one too if it is full."""
    if not bounds:
        return 0
    start, stop = bounds[-1]
    if stop - start == config.window:
        return stop
    return bounds[-2][1] if len(bounds) > 1 else 0


def _sessions(time: np.ndarray, config: UsersConfig) -> list[tuple[int, int]]:
    starts = [0] if len(time) else []
    for at in range(1, len(time)):
        if at - starts[-1] == config.window or time[at] - time[at - 1] > config.session_hours * HOUR:
            starts.append(at)
    return list(pairwise([*starts, len(time)]))
