"""Stage 2 in the workspace: rows are reused, one event costs one window, and no row knows a later event."""

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fakes import CATALOGUE, IDS, Event, FakeMllm, make_dataset, make_shop, place, shown
from fakes import users_config as config
from mllm_srec.catalogue import Catalogue
from mllm_srec.config import Config, UsersConfig
from mllm_srec.data.dataset import Histories
from mllm_srec.data.split import leave_last_out
from mllm_srec.mllm.base import Prompt
from mllm_srec.prompts import users as prompts
from mllm_srec.records import ranking_request
from mllm_srec.user_states import History, build_state, low_rating, read_window
from mllm_srec.users import (
    STATES,
    WINDOWS,
    comprehend,
    comprehend_history,
    load_states,
    state_key,
    window_key,
    window_mark,
)
from mllm_srec.windows import DAY, HOUR, window_bounds
from mllm_srec.workspace import Workspace

ITEMS = [{"item_id": item_id} for item_id in IDS]
SCALE: list[Event] = [("h", 0, 1.0), ("i", 0, 5.0)]
"""The lowest and the highest rating of every log."""


def shop(folder: Path, log: dict[str, list[Event]], **changes: object) -> Workspace:
    return make_shop(folder, ITEMS, log, Config(users=config(**changes)))


def events(items: str, start: int = 0, rating: float | None = None) -> list[Event]:
    return [(item, (start + n) * DAY, rating) for n, item in enumerate(items)]


def write(prompt: Prompt) -> str:
    """Sometimes something that is in the window, sometimes an invention."""
    return "golden rings" if len(shown(prompt)) % 3 == 0 else "title"


def tables(workspace: Workspace) -> list[pl.DataFrame]:
    return [workspace.rows(table) for table in (WINDOWS, STATES)]


SETTINGS: dict[str, dict[str, object]] = {
    "disjoint": {},
    "overlapping": {"step": 2},
    "single events": {"window": 1, "step": 1},
    "sessions": {"windows": "session", "session_hours": 2},
    "composed": {"summary": "compose", "recent": 0},
}


# Rows


PAST: list[Event] = [
    ("a", 0, 5.0),
    ("b", DAY, 1.0),
    ("c", DAY, None),
    ("d", 3 * DAY, 2.0),
    ("a", 5 * DAY, 4.0),
    ("g", 6 * DAY, 4.0),
]


def test_rows_name_their_span_the_newest_event_they_saw_and_what_made_them(tmp_path: Path) -> None:
    workspace = shop(tmp_path, {"u": PAST})
    mllm = FakeMllm()
    comprehend(workspace, mllm, CATALOGUE, [(0, 6), (0, 4), (0, 0)])
    whole = History.of(workspace.dataset().histories(), 0, low_rating(workspace.dataset().histories()))
    shape = workspace.config.users
    columns = ("key", "user_id", "start", "stop", "as_of", "written_by", "fingerprint")
    assert workspace.rows(WINDOWS).select(columns).rows() == [
        (window_key("u", *span), "u", *span, as_of, "rule", window_mark(read, mllm, shape))
        for span, as_of in (((0, 4), 3 * DAY), ((4, 6), 6 * DAY))
        for read in [read_window(whole, *span, CATALOGUE)]
    ]
    assert workspace.rows(WINDOWS)["tastes"].to_list() == [
        list(read_window(whole, *span, CATALOGUE).tastes) for span in ((0, 4), (4, 6))
    ]
    found = workspace.rows(STATES)
    assert found.select("key", "user_id", "end", "as_of", "window_start").rows() == [
        (state_key("u", 0), "u", 0, None, 0),
        (state_key("u", 4), "u", 4, 3 * DAY, 0),
        (state_key("u", 6), "u", 6, 6 * DAY, 4),
    ]
    assert found["recent"].to_list() == [[], ["b", "c", "d"], ["d", "a", "g"]]


@given(st.text(), st.text(), st.integers(0, 99), st.integers(0, 99))
def test_keys_of_different_users_and_spans_differ(one: str, other: str, start: int, stop: int) -> None:
    assert json.loads(window_key(one, start, stop)) == [one, start, stop]
    assert json.loads(state_key(one, stop)) == [one, stop]
    assert (state_key(one, stop) == state_key(other, start)) == ((one, stop) == (other, start))


def test_a_long_history_is_stored_to_the_last_digit(tmp_path: Path) -> None:
    workspace = shop(tmp_path, {"u": [("abc"[n % 3], n, None) for n in range(3001)]}, summary="compose")
    comprehend(workspace, None, CATALOGUE, [(0, 3001)])
    whole = History.of(workspace.dataset().histories(), 0, None)
    made = comprehend_history(None, CATALOGUE, whole, workspace.config.users)
    assert made.stable["red"] > 3000
    assert load_states(workspace, CATALOGUE)["u", 3001] == made


# Making again


def test_what_is_made_already_is_reused(tmp_path: Path) -> None:
    workspace = shop(tmp_path, {"u": PAST, "v": SCALE})
    comprehend(workspace, FakeMllm(), CATALOGUE, [(0, 6), (1, 2)])
    before = tables(workspace)
    again = FakeMllm()
    comprehend(workspace, again, CATALOGUE, [(1, 2), (0, 6), (0, 6)])
    assert again.calls() == 0
    for reference, made in zip(before, tables(workspace), strict=True):
        assert made.equals(reference)


def changed_lines(item: str) -> Catalogue:
    lines = [f"a new {line}" if line.startswith(f"{item} ") else line for line in CATALOGUE.lines]
    return replace(CATALOGUE, lines=lines)


def changed_facts(item: str) -> Catalogue:
    facts = [{"green": "text"} if item == i else of_item for i, of_item in zip(IDS, CATALOGUE.facts, strict=True)]
    return replace(CATALOGUE, facts=facts)


@pytest.mark.parametrize(
    ("change", "asked"),
    [
        ("nothing", []),
        ("version", ["u", "v"]),
        ("model", ["u", "v"]),
        ("tokens", ["u", "v"]),
        ("recent", []),
        ("looks", ["v"]),
        ("line", ["u"]),
        ("facts", ["u"]),
        ("line of an old item", []),
        ("spelling", ["u"]),
        ("price", []),
    ],
)
def test_exactly_the_windows_that_changed_are_written_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str, asked: list[str]
) -> None:
    # the newest windows: d, a for u and g, f for v; the states know more
    workspace = shop(tmp_path, {"u": events("bchida"), "v": events("hihigf")})
    pairs = [(0, 6), (1, 6)]
    comprehend(workspace, FakeMllm(say=write), CATALOGUE, pairs)
    before = tables(workspace)
    looks = ["white" if item == "g" else "" for item in IDS]
    catalogue = {
        "looks": replace(CATALOGUE, looks=looks),
        "line": changed_lines("a"),
        "line of an old item": changed_lines("c"),
        "facts": changed_facts("a"),
        "spelling": replace(CATALOGUE, spelling={"shoe": "Shoe"}),
        "price": replace(CATALOGUE, prices=np.arange(len(IDS), dtype=np.float32)),
    }.get(change, CATALOGUE)
    if change == "version":
        monkeypatch.setattr(prompts, "VERSION", "users-next")
    if change in ("tokens", "recent"):
        changed = config(summary_tokens=9) if change == "tokens" else config(recent=1)
        workspace.save_config(Config(users=changed))
    again = FakeMllm("fake-2" if change == "model" else "fake-1", write)
    comprehend(workspace, again, catalogue, pairs)
    after = tables(workspace)
    assert len(again.generated) == len(asked)

    def renewed(table: int) -> list[str]:
        told = before[table]["fingerprint"] != after[table]["fingerprint"]
        return after[table].filter(told)["user_id"].to_list()

    assert renewed(0) == asked
    # A state is made of the whole catalogue and of its window's text; another model that says the same changes none.
    of_states = {"nothing": [], "model": []}.get(change, ["u", "v"])
    assert renewed(1) == of_states
    for reference, made in zip(before, after, strict=True):
        assert made["key"].equals(reference["key"])
        same = made.filter(made["fingerprint"] == reference["fingerprint"])
        assert same.equals(reference.filter(pl.col("key").is_in(same["key"].implode())))


def test_a_states_fingerprint_holds_times_and_dislikes_that_no_window_shows(tmp_path: Path) -> None:
    def marks(name: str, log: list[Event]) -> tuple[str, str]:
        workspace = shop(tmp_path / name, {"u": log, "v": SCALE})
        comprehend(workspace, FakeMllm(), CATALOGUE, [(0, 6)])
        of_windows, of_states = (table["fingerprint"].to_list() for table in tables(workspace))
        return of_windows[0], of_states[0]

    log = events("abcdei", rating=4.0)  # only the window of e and i is read
    (window, mark), *others = (
        marks("as it was", log),
        marks("earlier", [("a", -DAY, 4.0), *log[1:]]),
        marks("disliked", [*log[:2], ("c", 2 * DAY, 1.0), *log[3:]]),
    )
    assert len({mark, *(other for _, other in others)}) == 3
    assert all(other == window for other, _ in others)


@pytest.mark.parametrize("name", ["disjoint", "overlapping", "sessions"])
def test_one_more_event_costs_one_call_and_changes_no_other_row(tmp_path: Path, name: str) -> None:
    log: list[Event] = [(item, n * HOUR, None) for n, item in enumerate("adbdaabdaaba")]
    workspace = shop(tmp_path, {"u": log, "v": SCALE}, **SETTINGS[name])
    comprehend(workspace, FakeMllm(say=write), CATALOGUE, [(0, 10), (1, 2)])
    before, one_more = tables(workspace), FakeMllm(say=write)
    comprehend(workspace, one_more, CATALOGUE, [(0, 11), (0, 10), (1, 2)])
    whole = History.of(workspace.dataset().histories(), 0, None)
    newest = read_window(whole, *window_bounds(11, whole.time, workspace.config.users)[-1], CATALOGUE)
    assert [prompt.parts for prompt in one_more.generated] == [(newest.prompt,)]
    for reference, made in zip(before, tables(workspace), strict=True):
        assert made.height == reference.height + 1
        assert made.filter(pl.col("key").is_in(reference["key"].implode())).equals(reference)


def test_users_and_depths_that_share_a_closed_window_pay_for_it_once(tmp_path: Path) -> None:
    workspace = shop(tmp_path, {"u": events("abcdefgh")}, step=4)
    mllm = FakeMllm(say=write)
    comprehend(workspace, mllm, CATALOGUE, [(0, 4), (0, 8)], every_window=True)
    assert len(mllm.generated) == workspace.count("user_windows") == 2


# Incremental equals from scratch

Step = tuple[str, int, float | None]
"""(item, ms since the event before, rating)."""
LOGS = st.lists(
    st.tuples(
        st.sampled_from(IDS),
        st.sampled_from([0, 0, HOUR, 3 * HOUR, 40 * HOUR]),
        st.none() | st.sampled_from([1.0, 3.0, 5.0]),
    ),
    min_size=4,
    max_size=14,
)


def timed(log: Sequence[Step], start: int = 0) -> list[Event]:
    times = start + np.cumsum([wait for _, wait, _ in log], dtype=np.int64)
    return [(item, int(time), rating) for (item, _, rating), time in zip(log, times, strict=True)]


@pytest.mark.parametrize("name", SETTINGS)
def test_states_made_event_by_event_equal_those_from_scratch_and_from_outside(name: str) -> None:
    @settings(max_examples=3, deadline=None)
    @given(LOGS)
    def check(log: list[Step]) -> None:
        with TemporaryDirectory() as folder:
            logs = {"u": timed(log), "v": SCALE}
            step_by_step, at_once = (shop(Path(folder) / n, logs, **SETTINGS[name]) for n in ("1", "2"))
            ends = [1, 2, len(log) // 2, len(log) - 1, len(log)]
            for end in dict.fromkeys(ends):
                comprehend(step_by_step, FakeMllm(say=write), CATALOGUE, [(0, end)])
            comprehend(at_once, FakeMllm(say=write), CATALOGUE, [(0, end) for end in ends])
            assert all(one.equals(other) for one, other in zip(tables(step_by_step), tables(at_once), strict=True))
            histories, stored = at_once.dataset().histories(), load_states(at_once, CATALOGUE)
            whole = History.of(histories, 0, low_rating(histories))
            for end in ends:
                made = comprehend_history(FakeMllm(say=write), CATALOGUE, whole, at_once.config.users, end)
                assert made == stored["u", end]

    check()


# No view of the future

Row = tuple[int, int]
"""(position, end) of a target of user u, the first one."""


def targets_of(histories: Histories, rule: str) -> list[Row]:
    split = leave_last_out(histories, rule, 3)
    return [
        (int(position), int(end))
        for part in (split.training, split.validation, split.test)
        for user, position, end in zip(part.user, part.position, part.end, strict=True)
        if user == 0
    ]


def log_of(user: list[Event]) -> Histories:
    return make_dataset(Path(), ITEMS, {"u": user, "v": SCALE}).histories()


def history_of(user: list[Event]) -> History:
    histories = log_of(user)
    return History.of(histories, 0, low_rating(histories))


def known(user: list[Event], end: int, asked: int, shape: UsersConfig) -> object:
    """All that ranking knows after `end` events: windows, texts, fingerprints, the state, the prompt's prefix."""
    history, mllm = history_of(user), FakeMllm(say=write)
    bounds = window_bounds(end, history.time, shape)
    windows = [read_window(history, *bound, CATALOGUE) for bound in bounds]
    marks = [window_mark(window, mllm, shape) for window in windows]
    state = comprehend_history(mllm, CATALOGUE, history, shape, end)
    prefix = shown(ranking_request(state.asked_at(asked), CATALOGUE, [0, 1]).prefix)
    return bounds, windows, marks, state, prefix, [shown(prompt) for prompt in mllm.generated]


@pytest.mark.parametrize("rule", ["file_order", "strict"])
@pytest.mark.parametrize("name", ["disjoint", "overlapping", "sessions"])
def test_nothing_that_ranking_knows_depends_on_events_at_or_after_the_target(name: str, rule: str) -> None:
    shape = config(**SETTINGS[name])

    @settings(max_examples=15, deadline=None)
    @given(LOGS, LOGS)
    def check(log: list[Step], other: list[Step]) -> None:
        user = timed(log)
        for position, end in targets_of(log_of(user), rule):
            asked = user[position][1] or 0  # the moment of asking is the target's, and all that is taken from it
            later = user[end:]  # under `strict` this holds what is tied with the target, too
            reordered = [(item, *event[1:]) for (item, *_), event in zip(later[::-1], later, strict=True)]
            reference = known(user, end, asked, shape)
            for changed in (reordered, timed(other, asked), []):
                assert known([*user[:end], *changed], end, asked, shape) == reference

    check()


def test_a_later_moment_of_asking_changes_only_the_words_of_the_wait() -> None:
    def prefix(asked: int) -> str:
        state = comprehend_history(FakeMllm(say=write), CATALOGUE, history_of(PAST), config(), 4)
        return shown(ranking_request(state.asked_at(asked), CATALOGUE, [0]).prefix)

    one, other = prefix(4 * DAY), prefix(30 * DAY)
    assert one != other == one.replace(prompts.since(DAY), prompts.since(27 * DAY))


@pytest.mark.parametrize("rule", ["file_order", "strict"])
def test_no_stored_row_depends_on_events_at_or_after_the_target(rule: str) -> None:
    @settings(max_examples=3, deadline=None)
    @given(LOGS, LOGS)
    def check(log: list[Step], other: list[Step]) -> None:
        user = timed(log)
        for position, end in targets_of(log_of(user), rule)[-1:]:  # none where all events are tied
            moved = [*user[:end], *timed(other, user[position][1] or 0)]
            with TemporaryDirectory() as folder:
                made = []
                for name, changed in (("1", user), ("2", moved)):
                    workspace = shop(Path(folder) / name, {"u": changed, "v": SCALE}, step=2)
                    comprehend(workspace, FakeMllm(say=write), CATALOGUE, [(0, end), (0, end - 1)], every_window=True)
                    made.append(tables(workspace))
                assert all(one.equals(other) for one, other in zip(*made, strict=True))

    check()


# The cheapest wrong ways, and that these checks catch them

SURE = timed([(item, HOUR, 4.0) for item in "abcabcdede"])


def blind_to_targets(view: Callable[[History, int, int], object]) -> bool:
    """Whether the view (history, position, end) of every target is the same with other items from the target on."""
    for position, end in targets_of(log_of(SURE), "file_order"):
        moved = [*SURE[:position], *[("g", time, rating) for _, time, rating in SURE[position:]]]
        if view(history_of(SURE), position, end) != view(history_of(moved), position, end):
            return False
    return True


def test_a_summary_that_includes_its_target_is_caught() -> None:
    def told(history: History, end: int) -> str:
        return read_window(history, *window_bounds(end, history.time, config())[-1], CATALOGUE).prompt

    assert blind_to_targets(lambda history, position, end: told(history, end))
    assert not blind_to_targets(lambda history, position, end: told(history, position + 1))


def test_a_profile_over_all_splits_is_caught() -> None:
    def profile(history: History, end: int) -> str:
        return build_state(history, end, "", CATALOGUE, config(window=1, step=1)).profile

    assert blind_to_targets(lambda history, position, end: profile(history, end))
    assert not blind_to_targets(lambda history, position, end: profile(history, len(history.items)))


def test_windows_in_the_order_of_the_files_rows_are_caught() -> None:
    def follows_time(read: Callable[[list[Event]], History]) -> bool:
        """Whether a file gives the same windows when its rows lie backwards."""
        one, other = read(SURE), read(SURE[::-1])
        bounds = window_bounds(len(SURE), one.time, config())
        return [read_window(one, *b, CATALOGUE) for b in bounds] == [read_window(other, *b, CATALOGUE) for b in bounds]

    def by_row(rows: list[Event]) -> History:
        items, times = place("".join(item for item, _, _ in rows)), np.array([time for _, time, _ in rows])
        return History("u", items, times, np.zeros(len(rows), dtype=bool))

    assert follows_time(history_of)
    assert not follows_time(by_row)
