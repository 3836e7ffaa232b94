"""Section `worked`: a few users told as Markdown: items with their facts, windows with their texts, the state."""

import json
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

import numpy as np
from common import Bench
from users_change import ORIGINS
from users_common import SAMPLE, Log, moved_names, opened, shop
from users_readings import written

from mllm_srec.tastes import Strengths
from mllm_srec.user_states import History, UserState, build_state, movement_of, read_window
from mllm_srec.windows import closed_until, window_bounds

LENGTHS = {"short": 0.1, "middle": 0.5, "long": 0.9}
"""Quantiles of the lengths of histories."""
ID = 8
"""Characters of a real person's id."""
ITEMS, WINDOWS = 24, 8
"""The newest so many are told."""


def worked(bench: Bench, sets: Sequence[str]) -> dict[str, Any]:
    """Per set one Markdown text per user."""
    return {name: tell(bench, opened(bench, name)) for name in sets}


def tell(bench: Bench, log: Log) -> list[str]:
    """A short, a middle and a long history; the sample's middle one is of a user whose taste changes."""
    lengths = np.diff(log.histories.offsets)
    truth: dict[str, Any] = {}
    if log.name == SAMPLE:
        truth = json.loads((shop(bench) / "truth.json").read_text(encoding="utf-8"))["users"]
    changing = [at for at, user in enumerate(log.histories.users) if truth.get(user, {}).get("change")]
    told, seen = [], set()
    for words, share in LENGTHS.items():
        allowed = changing if words == "middle" and changing else range(len(lengths))
        user = nearest(lengths, float(np.quantile(lengths, share)), [at for at in allowed if at not in seen])
        seen.add(user)
        told.append(tell_user(bench, log, user, words, truth))
    return told


def nearest(lengths: np.ndarray, length: float, allowed: Sequence[int]) -> int:
    """The allowed user whose history is closest to `length` events; the first of several."""
    return min(allowed, key=lambda user: (abs(lengths[user] - length), user))


def tell_user(bench: Bench, log: Log, user: int, words: str, truth: dict[str, Any]) -> str:
    """One user in Markdown."""
    history, config, catalogue = log.history(user), log.config, log.catalogue
    end = len(history.items)
    bounds = window_bounds(end, history.time, config)
    windows = [read_window(history, start, stop, catalogue) for start, stop in bounds[-(bench.limit or WINDOWS) :]]
    summaries = written(bench, log.mllm, windows, config, f"{log.name} worked {words}")
    state = build_state(history, end, summaries[-1].text, catalogue, config)
    name = history.user_id if log.name == SAMPLE else history.user_id[:ID]
    lines = [f"### {log.name}, user {name}: a {words} history of {end} events", ""]
    if history.user_id in truth:
        lines += [f"Truth: {json.dumps(truth[history.user_id])}", ""]
    lines += [*items_told(log, history), "", *_left_out(len(bounds), len(windows), "windows")]
    closed = closed_until(bounds, config)
    for window, summary in zip(windows, summaries, strict=True):
        moved = movement_of(history, window.stop, catalogue, config)
        parts = [f"{part} {strengths(getattr(moved, part))}" for part in ("stays", "rises", "fades", "lately")]
        kind, shared = "closed" if window.stop <= closed else "open", ", ".join(window.tastes) or "nothing"
        lines += [
            f"- **events {window.start + 1} to {window.stop}** ({kind}), shared: {shared}",
            f"  - wants {summary.text} (by {summary.by})",
            f"  - {'; '.join(parts)}",
        ]
    return "\n".join([*lines, "", *state_told(log, history, state)])


def items_told(log: Log, history: History) -> list[str]:
    """The newest items: day, line, facts with their origin."""
    end = len(history.items)
    lines = _left_out(end, ITEMS, "events")
    for at in range(max(0, end - ITEMS), end):
        item = history.items[at]
        day = "" if history.time is None else f"{datetime.fromtimestamp(history.time[at] / 1000, UTC):%Y-%m-%d} "
        facts = ", ".join(f"{fact} ({origin})" for fact, origin in log.catalogue.facts[item].items())
        low = ", rated low" if history.disliked[at] else ""
        lines.append(f"{at + 1}. {day}{log.catalogue.lines[item]}{low}: {facts}")
    return lines


def _left_out(count: int, told: int, what: str) -> list[str]:
    return [f"({count - told} earlier {what} are not told here.)", ""] if count > told else []


def strengths(found: Strengths) -> str:
    """Facts with their log odds."""
    return ", ".join(f"{fact} {value:+.1f}" for fact, value in found.items()) or "-"


def state_told(log: Log, history: History, state: UserState) -> list[str]:
    """The state as ranking reads it, and what it was made from."""
    printed = moved_names(state, history, log.catalogue)
    named = [f"{part} {', '.join(names) or '-'}" for part, names in printed.items()]
    by = ", ".join(f"{origin} {share:.2f}" for origin, share in zip(ORIGINS, state.by_origin, strict=True))
    return [
        f"- profile: The user {state.profile}. Typical choice: {in_full(log, state.typical)}",
        f"- preference: Lately the user {state.preference}. Newest choice: {in_full(log, state.newest)}",
        f"- named: {'; '.join(named)}",
        f"- stable: {strengths(state.stable)}",
        f"- choices explained by {by}",
        f"- newest items: {'; '.join(log.catalogue.lines[item] for item in state.recent)}",
        "",
    ]


def in_full(log: Log, item: int | None) -> str:
    """A choice as the state tells it."""
    return "-" if item is None else log.catalogue.candidates[item]


def show_worked(result: dict[str, Any]) -> None:
    """The Markdown as it is."""
    for told in result.values():
        for text in told:
            print(text)
