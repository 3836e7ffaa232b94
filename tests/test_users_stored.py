"""Stage 2 in the workspace: rows know nothing of later events, are reused, and cost one open window to renew."""

import json
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fakes import CATALOGUE, IDS, Event, FakeMllm, make_shop, place, shown
from fakes import users_config as config
from mllm_srec.config import Config
from mllm_srec.errors import StoreError
from mllm_srec.mllm.base import Prompt
from mllm_srec.prompts import users as prompts
from mllm_srec.users import (
    DAY,
    PHRASES,
    STATES,
    WINDOWS,
    comprehend,
    comprehend_history,
    disliked_events,
    load_states,
    low_rating,
    state_key,
    state_of,
    window_key,
)
from mllm_srec.workspace import Workspace


def shop(folder: Path, log: dict[str, list[Event]], **changes: object) -> Workspace:
    items = [{"item_id": item_id} for item_id in IDS]
    return make_shop(folder, items, log, Config(users=config(**changes)))


def events(items: str, start: int = 0, rating: float | None = None) -> list[Event]:
    return [(item, (start + n) * DAY, rating) for n, item in enumerate(items)]


def write(prompt: Prompt) -> str:
    """Sometimes something that is in the window, sometimes an invention."""
    return "golden rings" if len(shown(prompt)) % 3 == 0 else "title"


SETTINGS = {
    "score": {},
    "overlapping": {"step": 2},
    "single events": {"window": 1, "step": 1},
    "few": {"last": 3, "recent": 0},
    "generate": {"summary": "generate"},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_a_history_from_outside_gets_the_state_of_a_stored_one(tmp_path: Path, name: str) -> None:
    generator = np.random.default_rng(0)
    log: dict[str, list[Event]] = {}
    for user in range(8):
        items = "".join(generator.choice(list(IDS), 14))
        log[f"u{user}"] = [(item, n * n, float(generator.integers(1, 6))) for n, item in enumerate(items)]
    workspace = shop(tmp_path, log, **SETTINGS[name])
    histories, chosen = workspace.dataset().histories(), workspace.config.users
    mllm = FakeMllm(say=write)
    pairs = [(user, end) for user in range(8) for end in (0, 1, 2, 3, 5, 8, 14)]
    comprehend(workspace, mllm, CATALOGUE, pairs)
    states = load_states(workspace, CATALOGUE)
    assert len(states) == len(pairs)
    assert len({made.preference for made in states.values()}) > 20
    low = low_rating(histories)
    for user, end in pairs:
        assert histories.time is not None
        time = histories.time[histories.span(user)][:end]
        disliked = disliked_events(histories, user, low)[:end]
        user_id = histories.users[user]
        made = comprehend_history(mllm, CATALOGUE, histories.of(user, end), chosen, user_id, time, disliked)
        assert made == state_of(states, user_id, end), (user, end)
        assert (made.end, made.as_of) == (end, time[-1] if end else None)


PAST = [("a", 0, 5.0), ("b", DAY, 1.0), ("c", DAY, None), ("d", 3 * DAY, 2.0), ("a", 5 * DAY, 4.0), ("g", 6 * DAY, 4.0)]
SCALE = [("h", 0, 1.0), ("i", 0, 5.0)]
EARLY = [(0, 1), (0, 3), (0, 4), (0, 6)]


def tables(workspace: Workspace) -> list[pl.DataFrame]:
    return [workspace.rows(table) for table in (PHRASES, WINDOWS, STATES)]


def comprehended(later: list[Event], **changes: object) -> tuple[list[pl.DataFrame], list[pl.DataFrame]]:
    """Tables after the states of PAST alone, and after the states that see `later` were added."""
    with TemporaryDirectory() as folder:
        workspace = shop(Path(folder), {"u": [*PAST, *later], "v": SCALE}, **changes)
        mllm = FakeMllm(say=write)
        comprehend(workspace, mllm, CATALOGUE, EARLY)
        early = tables(workspace)
        comprehend(workspace, mllm, CATALOGUE, [*EARLY, (0, len(PAST) + len(later))])
        return early, tables(workspace)


LATER = st.lists(
    st.tuples(st.sampled_from(IDS), st.integers(6, 9), st.none() | st.sampled_from([1.0, 3.0, 5.0])), max_size=8
).map(lambda found: sorted(((item, day * DAY, rating) for item, day, rating in found), key=lambda event: event[1]))


@pytest.mark.parametrize("name", ["overlapping", "few", "generate"])
def test_no_stored_row_depends_on_an_event_at_or_after_its_end(name: str) -> None:
    alone, _ = comprehended([], **SETTINGS[name])

    @settings(max_examples=6, deadline=None)
    @given(LATER)
    def check(later: list[Event]) -> None:
        early, all_rows = comprehended(later, **SETTINGS[name])
        for reference, made, after in zip(alone, early, all_rows, strict=True):
            assert made.equals(reference)
            assert after.filter(pl.col("key").is_in(reference["key"].implode())).equals(reference)

    check()


def test_rows_name_their_span_and_the_newest_event_they_saw(tmp_path: Path) -> None:
    workspace = shop(tmp_path, {"u": PAST})
    comprehend(workspace, FakeMllm(), CATALOGUE, [(0, 6), (0, 4)])
    windows = workspace.rows(WINDOWS)
    assert windows.select("key", "user_id", "start", "stop").rows() == [
        (window_key("u", 0, 4), "u", 0, 4),
        (window_key("u", 4, 6), "u", 4, 6),
    ]
    found = workspace.rows(STATES)
    assert found.select("key", "user_id", "end", "as_of").rows() == [
        (state_key("u", 4), "u", 4, 3 * DAY),
        (state_key("u", 6), "u", 6, 6 * DAY),
    ]
    assert found["recent"].to_list() == [["b", "c", "d"], ["d", "a", "g"]]


def test_what_is_made_already_is_reused(tmp_path: Path) -> None:
    workspace = shop(tmp_path, {"u": PAST, "v": SCALE})
    comprehend(workspace, FakeMllm(), CATALOGUE, [(0, 6), (1, 2)])
    before = tables(workspace)
    again = FakeMllm()
    comprehend(workspace, again, CATALOGUE, [(1, 2), (0, 6), (0, 6)])
    assert again.calls() == 0
    for reference, made in zip(before, tables(workspace), strict=True):
        assert made.equals(reference)


@pytest.mark.parametrize("change", ["model", "version"])
def test_whatever_made_a_row_makes_it_again_when_it_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    workspace = shop(tmp_path, {"u": events("abcdg")})
    comprehend(workspace, FakeMllm(), CATALOGUE, [(0, 5)])
    before = tables(workspace)
    if change == "version":
        monkeypatch.setattr(prompts, "VERSION", "users-next")
    comprehend(workspace, FakeMllm("fake-2" if change == "model" else "fake-1"), CATALOGUE, [(0, 5)])
    for reference, made in zip(before, tables(workspace), strict=True):
        assert made["key"].equals(reference["key"])
        assert not (made["fingerprint"] == reference["fingerprint"]).any()


def test_what_only_the_prompt_shows_is_changed_without_the_model(tmp_path: Path) -> None:
    workspace = shop(tmp_path, {"u": events("abcdg")})
    comprehend(workspace, FakeMllm(), CATALOGUE, [(0, 5)])
    before = workspace.rows(STATES)
    workspace.save_config(Config(users=config(recent=1)))
    again = FakeMllm()
    comprehend(workspace, again, CATALOGUE, [(0, 5)])
    assert again.calls() == 0
    assert before["recent"].to_list() != workspace.rows(STATES)["recent"].to_list() == [["g"]]


def test_a_window_is_read_again_when_the_texts_of_its_items_change(tmp_path: Path) -> None:
    workspace = shop(tmp_path, {"u": events("abcdabga")})
    comprehend(workspace, FakeMllm(), CATALOGUE, [(0, 8)])
    again = FakeMllm()
    lines = [line if line != "g the title" else "a new title" for line in CATALOGUE.lines]
    comprehend(workspace, again, replace(CATALOGUE, lines=lines), [(0, 8)])
    assert [shown(request.prefix).count("a new title") for request in again.scored] == [1]


def test_a_states_fingerprint_holds_times_and_dislikes_that_no_window_shows() -> None:
    def marks(log: list[Event]) -> tuple[list[str], list[str]]:
        with TemporaryDirectory() as folder:
            workspace = shop(Path(folder), {"u": log, "v": SCALE}, last=1)
            comprehend(workspace, FakeMllm(), CATALOGUE, [(0, 5)])
            of_windows, of_states = (workspace.rows(table)["fingerprint"].to_list() for table in (WINDOWS, STATES))
            return of_windows, of_states

    log = events("abcde", rating=4.0)  # only the window of e is read
    later = [(item, time + DAY, rating) for item, time, rating in log]
    disliked = [*log[:2], ("c", 2 * DAY, 1.0), *log[3:]]
    (window, state_mark), *others = marks(log), marks(later), marks(disliked)
    assert len({state_mark[0], *(mark for _, (mark,) in others)}) == 3
    assert all(other == window for other, _ in others)


def test_one_more_event_costs_one_open_window_and_one_state(tmp_path: Path) -> None:
    # red and shoe are shared by every window, so no phrase is new
    workspace = shop(tmp_path, {"u": events("adbdaabdaaba")})
    comprehend(workspace, FakeMllm(), CATALOGUE, [(0, 10)])
    states, windows = workspace.count("user_states"), workspace.count("user_windows")
    one_more = FakeMllm()
    comprehend(workspace, one_more, CATALOGUE, [(0, 11)])
    assert [shown(request.prefix) for request in one_more.scored] == [
        prompts.window(["a the title", "a the title", "b the title"])
    ]
    assert (workspace.count("user_states"), workspace.count("user_windows")) == (states + 1, windows + 1)


def test_a_log_without_times_has_states_without_times(tmp_path: Path) -> None:
    workspace = shop(tmp_path, {"u": [(item, None, None) for item in "abcdg"]})
    comprehend(workspace, FakeMllm(), CATALOGUE, [(0, 5)])
    made = load_states(workspace, CATALOGUE)["u", 5]
    assert made.as_of is None
    assert made.profile.endswith("; 4 choices so far")


def test_a_state_that_was_not_made_is_named(tmp_path: Path) -> None:
    workspace = shop(tmp_path, {"ü'1": events("abc")})
    assert load_states(workspace, CATALOGUE) == {}
    comprehend(workspace, FakeMllm(), CATALOGUE, [(0, 2)])
    states = load_states(workspace, CATALOGUE)
    assert state_of(states, "ü'1", 2).recent == tuple(place("ab"))
    with pytest.raises(StoreError, match=r"user \"ü'1\" has no state after 3 events: run `mllm-srec comprehend`"):
        state_of(states, "ü'1", 3)


@given(st.text(), st.text(), st.integers(0, 99), st.integers(0, 99))
def test_keys_of_different_users_and_spans_differ(one: str, other: str, start: int, stop: int) -> None:
    assert json.loads(window_key(one, start, stop)) == [one, start, stop]
    assert json.loads(state_key(one, stop)) == [one, stop]
    assert (state_key(one, stop) == state_key(other, start)) == ((one, stop) == (other, start))
