"""Windows are summarised soundly or by the rule; a state of any past moment is the stored one; timelines are whole."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pytest

from fakes import CATALOGUE, IDS, Event, FakeMllm, make_shop, place, shown
from fakes import users_config as config
from mllm_srec import users
from mllm_srec.config import Config
from mllm_srec.errors import StoreError, UsageError
from mllm_srec.mllm.base import PartialFailure, Prompt
from mllm_srec.prompts import users as prompts
from mllm_srec.user_states import NOBODY, History, Window, movement_of
from mllm_srec.users import (
    WINDOWS,
    Summary,
    comprehend,
    comprehend_history,
    load_states,
    state_of,
    summarise,
    timeline,
    visible,
)
from mllm_srec.windows import DAY
from mllm_srec.workspace import Counts, Workspace


@dataclass
class Failing(FakeMllm):
    """Has no answer to prompts that hold one of `fails`."""

    fails: tuple[str, ...] = ()

    def generate(self, prompts: Sequence[Prompt], max_new_tokens: int) -> list[str]:
        results = super().generate(prompts, max_new_tokens)
        errors = {row: "HTTP 500" for row, p in enumerate(prompts) if any(text in shown(p) for text in self.fails)}
        if errors:
            raise PartialFailure([None if row in errors else text for row, text in enumerate(results)], errors)
        return results


def shop(folder: Path, log: dict[str, list[Event]], **changes: object) -> Workspace:
    return make_shop(folder, [{"item_id": item_id} for item_id in IDS], log, Config(users=config(**changes)))


def events(items: str, start: int = 0, rating: float | None = None) -> list[Event]:
    return [(item, (start + n) * DAY, rating) for n, item in enumerate(items)]


# Summaries

WINDOW_TEXTS = [
    Window(0, 2, ("red shoe", "red scarf"), ("red",)),
    Window(2, 4, ("green hat",), ("hat", "green")),
    Window(4, 5, ("glove",), ()),
]


def test_a_sound_sentence_is_kept_and_an_invented_or_empty_one_gives_way_to_the_rule() -> None:
    answers = {"red": "red\n scarfs with  shoe.", "green": "golden hats", "glove": " . "}
    mllm = FakeMllm(say=lambda p: next(text for word, text in answers.items() if word in shown(p)))
    assert summarise(mllm, WINDOW_TEXTS, config()) == [
        Summary("red scarfs with shoe", "model"),
        Summary(prompts.summary(["hat", "green"]), "rule"),
        Summary(prompts.NO_TASTE, "rule"),
    ]
    assert [prompt.parts for prompt in mllm.generated] == [(window.prompt,) for window in WINDOW_TEXTS]
    assert {prompt.answer for prompt in mllm.generated} == {prompts.SUMMARY_ANSWER}


@pytest.mark.parametrize(
    ("written", "by"),
    [
        ("Red scarfs", "model"),
        (prompts.NO_TASTE, "model"),
        ("scarfs, or a red hat", "model"),
        ("a green scarf of silk", "rule"),
        ("scarfs and violins", "rule"),
    ],
)
def test_words_of_the_events_and_their_tastes_are_sound(written: str, by: str) -> None:
    window = Window(0, 1, ("green scarf", "hat"), ("red",))
    assert summarise(FakeMllm(say=lambda _: written), [window], config())[0].by == by


def test_no_more_words_are_asked_for_than_are_configured() -> None:
    mllm = FakeMllm(say=lambda _: "green green green hat hat hat")
    assert summarise(mllm, WINDOW_TEXTS[1:2], config(summary_tokens=4))[0].text == "green green green hat"


def test_composing_asks_nothing() -> None:
    mllm = FakeMllm(say=lambda _: "hat")
    rule = [Summary(prompts.summary(window.tastes), "rule") for window in WINDOW_TEXTS]
    assert summarise(mllm, WINDOW_TEXTS, config(summary="compose")) == rule
    assert summarise(None, WINDOW_TEXTS, config(summary="compose")) == rule
    assert mllm.calls() == 0


def test_without_the_model_that_is_needed_the_fix_is_named() -> None:
    with pytest.raises(UsageError, match=r"give the model, or use users\.summary=compose"):
        summarise(None, WINDOW_TEXTS, config())
    assert summarise(None, [], config()) == []


def test_a_window_that_failed_gets_the_rules_text_and_says_why() -> None:
    made = summarise(Failing(say=lambda _: "red", fails=("green", "glove")), WINDOW_TEXTS, config())
    assert made == [
        Summary("red", "model"),
        Summary(prompts.summary(["hat", "green"]), "rule", "HTTP 500"),
        Summary(prompts.NO_TASTE, "rule", "HTTP 500"),
    ]


def test_a_window_that_failed_is_an_error_row_and_alone_is_asked_again(tmp_path: Path) -> None:
    workspace = shop(tmp_path, {"u": events("abcd"), "v": events("defg")})
    failing = Failing(say=lambda _: "title", fails=("g the title",))
    assert comprehend(workspace, failing, CATALOGUE, [(0, 4), (1, 4)]) == Counts(reused=0, made=1, failed=1)
    rows = workspace.rows(WINDOWS).select("user_id", "status", "reason", "written_by").rows()
    assert rows == [("u", "ok", "", "model"), ("v", "error", "HTTP 500", "rule")]
    before = load_states(workspace, CATALOGUE)
    again = FakeMllm(say=lambda _: "g the title")
    assert comprehend(workspace, again, CATALOGUE, [(0, 4), (1, 4)]) == Counts(reused=1, made=1, failed=0)
    assert ["g the title" in shown(prompt) for prompt in again.generated] == [True]
    after = load_states(workspace, CATALOGUE)
    assert after["u", 4] == before["u", 4]
    assert "now wants g the title" in after["v", 4].preference  # the state is renewed with its window's text
    assert "g the title" not in before["v", 4].preference


# The state of a moment

LOG: dict[str, list[Event]] = {
    "ann": [("a", 0, 5.0), ("b", DAY, 1.0), ("c", DAY, None), ("d", 3 * DAY, 2.0), ("a", 5 * DAY, 4.0)],
    "bob": events("hi"),
}
START = datetime(1970, 1, 1, tzinfo=UTC)


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    return shop(tmp_path, LOG)


@pytest.mark.parametrize(
    ("as_of", "end"),
    [
        (None, 5),
        (0, 0),
        (3, 3),
        (5, 5),
        (START - timedelta(days=9), 0),
        (START, 1),
        (START + timedelta(days=1) - timedelta(milliseconds=1), 1),
        (START + timedelta(days=1), 3),  # both events of that moment
        (START + timedelta(days=99), 5),
        (datetime.fromisoformat("1970-01-02T05:00:00+05:00"), 3),
    ],
)
def test_a_state_is_that_of_the_events_at_or_before_the_moment(
    workspace: Workspace, as_of: int | datetime | None, end: int
) -> None:
    mllm = FakeMllm(say=lambda _: "title")
    comprehend(workspace, mllm, CATALOGUE, [(0, n) for n in range(6)])
    asked = mllm.calls()
    made = users.state(workspace, "ann", as_of, mllm, CATALOGUE)
    assert made == state_of(load_states(workspace, CATALOGUE), "ann", end)
    assert made.end == end
    assert mllm.calls() == asked  # its text is stored


@pytest.mark.parametrize("by", ["fresh", "failed", "other model", "other catalogue"])
def test_a_text_that_is_not_stored_or_no_longer_holds_is_written_and_not_kept(workspace: Workspace, by: str) -> None:
    if by != "fresh":
        mllm = Failing(
            "fake-0" if by == "other model" else "fake-1", lambda _: "a", fails=("a the",) * (by == "failed")
        )
        comprehend(workspace, mllm, CATALOGUE, [(0, 5)])
    rows = workspace.rows(WINDOWS)
    catalogue = CATALOGUE
    if by == "other catalogue":
        catalogue = replace(CATALOGUE, lines=["another title"] * len(IDS))
    asked = FakeMllm(say=lambda _: "title")
    made = users.state(workspace, "ann", None, asked, catalogue)
    assert len(asked.generated) == 1
    assert made.preference.endswith("now wants title")
    assert workspace.rows(WINDOWS).equals(rows)
    if by == "other model":  # without a model its text is the best there is
        assert users.state(workspace, "ann", None, None, catalogue).preference.endswith("now wants a")
    else:
        with pytest.raises(UsageError, match="give the model"):
            users.state(workspace, "ann", None, None, catalogue)


def test_composed_states_need_no_model_and_no_store(tmp_path: Path) -> None:
    workspace = shop(tmp_path, LOG, summary="compose")
    made = users.state(workspace, "ann", 4, catalogue=CATALOGUE)
    comprehend(workspace, None, CATALOGUE, [(0, 4)])
    assert made == state_of(load_states(workspace, CATALOGUE), "ann", 4)


@pytest.mark.parametrize(
    ("user", "as_of", "message"),
    [
        ("anne", None, r"unknown user 'anne': did you mean ann\?"),
        ("zzzzz", None, r"unknown user 'zzzzz'$"),
        ("ann", 6, r"user 'ann' has 5 events: as_of=6 is out of range"),
        ("ann", -1, r"user 'ann' has 5 events: as_of=-1 is out of range"),
        ("ann", datetime(2026, 1, 2), r"as_of 2026-01-02T00:00:00 has no time zone: give one, e\.g\. \+00:00"),
    ],
)
def test_a_moment_that_is_none_of_the_users_is_refused(
    workspace: Workspace, user: str, as_of: int | datetime | None, message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        users.state(workspace, user, as_of, FakeMllm(), CATALOGUE)


def test_without_times_only_a_number_of_events_is_a_moment(tmp_path: Path) -> None:
    workspace = shop(tmp_path, {"u": [(item, None, None) for item in "abc"]})
    with pytest.raises(UsageError, match=r"no times: give as_of as a number of events"):
        users.state(workspace, "u", START, FakeMllm(), CATALOGUE)
    made = users.state(workspace, "u", 2, FakeMllm(), CATALOGUE)
    assert (made.end, made.as_of) == (2, None)
    assert visible(History.outside(place("abc")), None) == 3


def test_the_catalogue_is_read_where_none_is_given(workspace: Workspace) -> None:
    with pytest.raises(StoreError, match="run `mllm-srec describe`"):
        users.state(workspace, "ann", None, FakeMllm())


# Histories from outside


def test_a_history_of_nothing_asks_nothing() -> None:
    mllm = FakeMllm()
    assert comprehend_history(mllm, CATALOGUE, History.outside(place("")), config()) == NOBODY
    assert comprehend_history(mllm, CATALOGUE, History.outside(place("abc")), config(), end=0) == NOBODY
    assert mllm.calls() == 0


def test_a_history_costs_one_call_however_long_it_is() -> None:
    mllm = FakeMllm(say=lambda _: "title")
    made = comprehend_history(mllm, CATALOGUE, History.outside(place("abcdefghi")), config(step=1))
    assert len(mllm.generated) == 1
    assert [f"{item} the title" in shown(mllm.generated[0]) for item in IDS] == [False] * 5 + [True] * 4
    assert (made.user_id, made.end, made.as_of, made.window_start) == ("", 9, None, 5)


# Timelines


def test_a_timeline_tells_every_window_and_how_it_moved_the_belief(tmp_path: Path) -> None:
    workspace = shop(tmp_path, {"u": events("abcabdeded")})
    mllm = FakeMllm(say=lambda prompt: "e the title" if "e the title" in shown(prompt) else "golden")
    steps = timeline(workspace, mllm, CATALOGUE, "u")
    assert [(step.start, step.stop, step.closed) for step in steps] == [(0, 4, True), (4, 8, True), (8, 10, False)]
    assert [(step.began, step.as_of) for step in steps] == [(0, 3 * DAY), (4 * DAY, 7 * DAY), (8 * DAY, 9 * DAY)]
    assert [step.written_by for step in steps] == ["rule", "model", "model"]
    assert [step.summary for step in steps] == [prompts.summary(["red", "shoe"]), "e the title", "e the title"]
    whole = users.History.of(workspace.dataset().histories(), 0, None)
    assert [step.movement for step in steps] == [
        movement_of(whole, step.stop, CATALOGUE, workspace.config.users) for step in steps
    ]
    assert len(mllm.generated) == 3
    timeline(workspace, mllm, CATALOGUE, "u")
    assert len(mllm.generated) == 3
    assert load_states(workspace, CATALOGUE)["u", 10].preference.endswith("now wants e the title")


def test_a_window_that_is_just_full_is_closed(tmp_path: Path) -> None:
    workspace = shop(tmp_path, {"u": [(item, None, None) for item in "abcdefgh"]}, summary="compose")
    steps = timeline(workspace, None, CATALOGUE, "u")
    assert [step.closed for step in steps] == [True, True]
    assert [(step.began, step.as_of) for step in steps] == [(None, None)] * 2


def test_a_timeline_of_nobody_is_refused(workspace: Workspace) -> None:
    with pytest.raises(UsageError, match=r"unknown user 'bop': did you mean bob\?"):
        timeline(workspace, FakeMllm(), CATALOGUE, "bop")
    assert len(timeline(workspace, FakeMllm(), CATALOGUE, "bob")) == 1


def test_a_state_that_was_not_made_is_named(workspace: Workspace) -> None:
    assert load_states(workspace, CATALOGUE) == {}
    comprehend(workspace, FakeMllm(), CATALOGUE, [(0, 2)])
    states = load_states(workspace, CATALOGUE)
    np.testing.assert_array_equal(state_of(states, "ann", 2).recent, place("ab"))
    with pytest.raises(StoreError, match=r"user 'ann' has no state after 3 events: run `mllm-srec comprehend`"):
        state_of(states, "ann", 3)
