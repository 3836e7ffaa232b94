"""Stage 2, temporal user comprehension: windows -> summaries -> dynamic preference and profile (Sci Rep 2025, Fig. 3a).

The model reads each window once and writes what it is after; `user_states` makes the states. Windows do not read each
other's texts, so windows of all users and depths are written in the same batches.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from difflib import get_close_matches

import numpy as np
import pyarrow as pa

from mllm_srec.catalogue import Catalogue
from mllm_srec.config import UsersConfig
from mllm_srec.errors import StoreError, UsageError
from mllm_srec.facts import unsupported_words
from mllm_srec.mllm.base import Mllm, PartialFailure, Prompt
from mllm_srec.progress import say
from mllm_srec.prompts import users as prompts
from mllm_srec.tastes import Movement, Strengths
from mllm_srec.user_states import History, UserState, Window, build_state, low_rating, movement_of, read_window
from mllm_srec.windows import window_bounds
from mllm_srec.workspace import Counts, Job, Table, Workspace, fingerprint

STRENGTHS = pa.list_(pa.struct([("fact", pa.string()), ("strength", pa.float64())]))

WINDOWS = Table(
    "user_windows",
    pa.schema(
        [
            ("user_id", pa.string()),
            ("start", pa.int32()),
            ("stop", pa.int32()),
            ("as_of", pa.int64()),
            ("summary", pa.string()),
            ("written_by", pa.string()),
            ("read", pa.string()),
            ("tastes", pa.list_(pa.string())),
        ]
    ),
)
"""One row per window whose text was needed; it knows events [start, stop), the newest at `as_of` (ms), and no other.

`read`: fingerprint of the instruction alone, whoever followed it.
"""

STATES = Table(
    "user_states",
    pa.schema(
        [
            ("user_id", pa.string()),
            ("end", pa.int32()),
            ("as_of", pa.int64()),
            ("window_start", pa.int32()),
            ("profile", pa.string()),
            ("preference", pa.string()),
            *((name, STRENGTHS) for name in ("stays", "rises", "fades", "lately")),
            ("stable", STRENGTHS),
            *((name, pa.float32()) for name in ("by_picture", "by_text", "by_both")),
            ("recent", pa.list_(pa.string())),
            ("typical", pa.string()),
            ("newest", pa.string()),
        ]
    ),
)


@dataclass(frozen=True)
class Summary:
    """A window's text, written by "model" or "rule"; `error` where the model failed."""

    text: str
    by: str
    error: str = ""


def summarise(mllm: Mllm | None, windows: Sequence[Window], config: UsersConfig) -> list[Summary]:
    """One text per window. A sentence with words that neither events nor tastes hold gives way to the rule's.

    Raises:
        UsageError: the model is to write, and none is given.
    """
    composed = [Summary(prompts.summary(window.tastes), "rule") for window in windows]
    if config.summary == "compose" or not windows:
        return composed
    if mllm is None:
        raise UsageError("the summary of a window is not stored yet: give the model, or use users.summary=compose")
    asked = [Prompt((window.prompt,), answer=prompts.SUMMARY_ANSWER) for window in windows]
    errors = {}
    try:
        written: Sequence[str | None] = mllm.generate(asked, config.summary_tokens)
    except PartialFailure as failure:
        written, errors = failure.results, failure.errors
    made = []
    for row, (window, text, rule) in enumerate(zip(windows, written, composed, strict=True)):
        words = " ".join((text or "").split()).rstrip(". ")
        sound = words and not unsupported_words(words, *window.events, *window.tastes, prompts.SUMMARY_WORDS)
        made.append(Summary(words, "model") if sound else Summary(rule.text, "rule", errors.get(row, "")))
    return made


def window_key(user_id: str, start: int, stop: int) -> str:
    """The key of a window's row."""
    return json.dumps([user_id, start, stop], ensure_ascii=False)


def state_key(user_id: str, end: int) -> str:
    """The key of a state's row."""
    return json.dumps([user_id, end], ensure_ascii=False)


def read_mark(window: Window) -> str:
    """Fingerprint of what is read of a window."""
    return fingerprint(window.prompt, prompts.VERSION)


def window_mark(window: Window, mllm: Mllm | None, config: UsersConfig) -> str:
    """Fingerprint of all that a window's text is made from."""
    made_by = ("rule",) if config.summary == "compose" else (mllm.identity if mllm else "", config.summary_tokens)
    return fingerprint(read_mark(window), *made_by)


def comprehend(
    workspace: Workspace,
    mllm: Mllm | None,
    catalogue: Catalogue,
    wanted: Iterable[tuple[int, int]],
    every_window: bool = False,
) -> Counts:
    """Make or renew the states of `wanted` pairs (user number, events visible), with the text of the newest window.

    Args:
        every_window: write the earlier windows as well; states do not need them, timelines do.

    Returns:
        What was done about windows.
    """
    config = workspace.config.users
    histories = workspace.dataset().histories()
    low = low_rating(histories)
    pairs = sorted(set(wanted))
    of_user = {user: History.of(histories, user, low) for user, _ in pairs}
    windows: dict[str, tuple[str, Window, int | None]] = {}
    newest: dict[tuple[int, int], str] = {}
    for user, end in pairs:
        history = of_user[user]
        bounds = window_bounds(end, history.time, config)
        for start, stop in bounds if every_window else bounds[-1:]:
            key = newest[user, end] = window_key(history.user_id, start, stop)
            if key not in windows:
                as_of = None if history.time is None else int(history.time[stop - 1])
                windows[key] = (history.user_id, read_window(history, start, stop, catalogue), as_of)
    # By length, so that a batch's prompts are about as long and little is read that is only padding.
    ordered = sorted(windows.items(), key=lambda pair: (len(pair[1][1].prompt), pair[0]))
    jobs = [Job(key, window_mark(of[1], mllm, config), of) for key, of in ordered]

    def write(batch: list[Job]) -> list[dict[str, object]]:
        made = summarise(mllm, [job.payload[1] for job in batch], config)
        return [
            {
                "status": "error" if summary.error else "ok",
                "reason": summary.error,
                "user_id": user_id,
                "start": window.start,
                "stop": window.stop,
                "as_of": as_of,
                "summary": summary.text,
                "written_by": summary.by,
                "read": read_mark(window),
                "tastes": list(window.tastes),
            }
            for (user_id, window, as_of), summary in zip((job.payload for job in batch), made, strict=True)
        ]

    batch = workspace.config.model.batch_size
    counts = workspace.produce(WINDOWS, jobs, write, batch=batch, label="comprehend: windows")

    rows = {row["key"]: row for row in workspace.rows(WINDOWS).iter_rows(named=True)}
    state_jobs = []
    for user, end in pairs:
        history, row = of_user[user], rows[newest[user, end]] if end else None
        events = [history.items[:end], history.disliked[:end]]
        events += [] if history.time is None else [history.time[:end]]
        made_of = (*(int(value) for column in events for value in column), row["summary"] if row else "")
        mark = fingerprint(*made_of, catalogue.mark, prompts.VERSION, config.model_dump_json())
        state_jobs.append(Job(state_key(history.user_id, end), mark, (user, end, row["summary"] if row else "")))

    def compose(batch: list[Job]) -> list[dict[str, object]]:
        made = (job.payload for job in batch)
        states = [build_state(of_user[user], end, summary, catalogue, config) for user, end, summary in made]
        return [_state_row(state, catalogue) for state in states]

    workspace.produce(STATES, state_jobs, compose, batch=256, label="comprehend: states")
    return counts


def comprehend_history(
    mllm: Mllm | None,
    catalogue: Catalogue,
    history: History,
    config: UsersConfig,
    end: int | None = None,
    workspace: Workspace | None = None,
) -> UserState:
    """The state of a history after its first `end` events (all by default); nothing is stored.

    Args:
        workspace: where to look for the newest window's text before the model is asked; without a model, a text that
            another model wrote will do.
    """
    end = len(history.items) if end is None else end
    bounds = window_bounds(end, history.time, config)
    if not bounds:
        return build_state(history, end, "", catalogue, config)
    window = read_window(history, *bounds[-1], catalogue)
    if workspace is not None:
        row = workspace.row(WINDOWS, window_key(history.user_id, window.start, window.stop))
        any_writer = mllm is None and config.summary == "generate"  # without a model, whichever wrote it is good enough
        holds = ("read", read_mark(window)) if any_writer else ("fingerprint", window_mark(window, mllm, config))
        if row and row["status"] == "ok" and row[holds[0]] == holds[1]:
            return build_state(history, end, str(row["summary"]), catalogue, config)
    summary = summarise(mllm, [window], config)[0]
    if summary.error:
        say(f"user {history.user_id!r}: the newest window's summary is made by rule, the model failed: {summary.error}")
    return build_state(history, end, summary.text, catalogue, config)


def state(
    workspace: Workspace,
    user_id: str,
    as_of: int | datetime | None = None,
    mllm: Mllm | None = None,
    catalogue: Catalogue | None = None,
) -> UserState:
    """The state of a user of the log at any past moment; equal to what `comprehend` stores for it, stored or not.

    Args:
        as_of: how many of the user's events are visible, or a moment: events at or before it; None: all events.
        mllm: the model; not needed where the newest window's text is stored.

    Raises:
        UsageError: the user is unknown, has fewer events, or the log has no times; or the model is needed and missing.
    """
    history, _ = _known(workspace, user_id)
    end = visible(history, as_of)
    known = catalogue or Catalogue.load(workspace)
    return comprehend_history(mllm, known, history, workspace.config.users, end, workspace)


@dataclass(frozen=True)
class Step:
    """One window of a timeline: its row as stored, and how it moved the belief of those before it."""

    start: int
    stop: int
    began: int | None
    as_of: int | None
    """Times (ms UTC) of its first and newest event."""
    closed: bool
    summary: str
    written_by: str
    movement: Movement


def timeline(workspace: Workspace, mllm: Mllm | None, catalogue: Catalogue, user_id: str) -> list[Step]:
    """All windows of a user in order, their texts made or renewed.

    Raises:
        UsageError: the user is unknown.
    """
    config, history, number = workspace.config.users, *_known(workspace, user_id)
    comprehend(workspace, mllm, catalogue, [(number, len(history.items))], every_window=True)
    steps = []
    for start, stop in window_bounds(len(history.items), history.time, config):
        row = workspace.row(WINDOWS, window_key(user_id, start, stop))
        assert row is not None  # made just now
        began = None if history.time is None else int(history.time[start])
        moved = movement_of(history, stop, catalogue, config)
        closed = stop < len(history.items) or stop - start == config.window
        steps.append(Step(start, stop, began, row["as_of"], closed, row["summary"], row["written_by"], moved))
    return steps


def _known(workspace: Workspace, user_id: str) -> tuple[History, int]:
    histories = workspace.dataset().histories()
    if user_id not in histories.users:
        near = get_close_matches(user_id, histories.users, n=3)
        raise UsageError(f"unknown user {user_id!r}" + (f": did you mean {', '.join(near)}?" if near else ""))
    number = histories.users.index(user_id)
    return History.of(histories, number, low_rating(histories)), number


def visible(history: History, as_of: int | datetime | None) -> int:
    """How many events lie at or before `as_of` (a number of events, a moment, or None for all).

    Raises:
        UsageError: there are fewer events, or a moment is asked of a log without times.
    """
    if as_of is None:
        return len(history.items)
    if isinstance(as_of, datetime):
        if history.time is None:
            raise UsageError("the log has no times: give as_of as a number of events")
        if as_of.tzinfo is None:
            raise UsageError(f"as_of {as_of.isoformat()} has no time zone: give one, e.g. +00:00")
        return int(np.searchsorted(history.time, round(as_of.timestamp() * 1000), side="right"))
    if not 0 <= as_of <= len(history.items):
        raise UsageError(f"user {history.user_id!r} has {len(history.items)} events: as_of={as_of} is out of range")
    return as_of


def load_states(workspace: Workspace, catalogue: Catalogue) -> dict[tuple[str, int], UserState]:
    """All stored states by (user id, end)."""
    return {
        (row["user_id"], row["end"]): _as_state(row, catalogue) for row in workspace.rows(STATES).iter_rows(named=True)
    }


def state_of(states: dict[tuple[str, int], UserState], user_id: str, end: int) -> UserState:
    """The state of a user after `end` events.

    Raises:
        StoreError: `comprehend` has not made it.
    """
    if (user_id, end) not in states:
        raise StoreError(f"user {user_id!r} has no state after {end} events: run `mllm-srec comprehend`")
    return states[user_id, end]


def _state_row(state: UserState, catalogue: Catalogue) -> dict[str, object]:
    listed = {name: getattr(state.movement, name) for name in ("stays", "rises", "fades", "lately")}
    return {
        "status": "ok",
        "reason": "",
        "user_id": state.user_id,
        "end": state.end,
        "as_of": state.as_of,
        "window_start": state.window_start,
        "profile": state.profile,
        "preference": state.preference,
        **{
            name: [{"fact": fact, "strength": value} for fact, value in found.items()]
            for name, found in {**listed, "stable": state.stable}.items()
        },
        **dict(zip(("by_picture", "by_text", "by_both"), state.by_origin, strict=True)),
        "recent": [catalogue.ids[i] for i in state.recent],
        **{name: _id(getattr(state, name), catalogue) for name in ("typical", "newest")},
    }


def _as_state(row: dict[str, object], catalogue: Catalogue) -> UserState:
    def found(name: str) -> Strengths:
        return {pair["fact"]: pair["strength"] for pair in row[name]}  # type: ignore[attr-defined]

    return UserState(
        user_id=str(row["user_id"]),
        end=int(row["end"]),  # type: ignore[call-overload]
        as_of=row["as_of"],  # type: ignore[arg-type]
        profile=str(row["profile"]),
        preference=str(row["preference"]),
        movement=Movement(*(found(name) for name in ("stays", "rises", "fades", "lately"))),
        stable=found("stable"),
        # Stored as float32: rounded as they were, so that a state is the same whether it was stored or not.
        by_origin=tuple(round(row[name], 4) for name in ("by_picture", "by_text", "by_both")),  # type: ignore
        recent=tuple(catalogue.place[item_id] for item_id in row["recent"]),  # type: ignore[attr-defined]
        window_start=int(row["window_start"]),  # type: ignore[call-overload]
        typical=_place(row["typical"], catalogue),
        newest=_place(row["newest"], catalogue),
    )


def _id(item: int | None, catalogue: Catalogue) -> str | None:
    return None if item is None else catalogue.ids[item]


def _place(item_id: object, catalogue: Catalogue) -> int | None:
    return None if item_id is None else catalogue.place[str(item_id)]
