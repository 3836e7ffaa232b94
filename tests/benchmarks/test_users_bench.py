"""The measures of benchmarks/users*.py by known answers, and every section on a tiny model."""

import json
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fakes import FakeMllm, make_catalogue, users_config
from mllm_srec.config import UsersConfig
from mllm_srec.mllm.base import Prompt, Request
from mllm_srec.pipeline import Pipeline
from mllm_srec.user_states import NOBODY, History, UserState, Window, build_state
from mllm_srec.users import Summary
from mllm_srec.workspace import Workspace

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

import common
import users as program
import users_change as change
import users_common
import users_events as events
import users_likelihood as likelihood
import users_ranking as ranking
import users_speed as speed
import users_worked as worked

# Marks


def test_a_share_above_its_most_misses_its_mark() -> None:
    assert common.at_most(common.figure([0, 0, 1, 0]), 0.25)["met"]
    found = common.at_most(common.figure([0, 1, 1, 0]), 0.25)
    assert not found["met"] and common.shown(found).endswith("misses at most 0.25")
    assert not common.at_most(common.figure([]), 0.25)["met"]


@pytest.mark.parametrize(
    ("low", "high", "above", "not_below"),
    [(0.1, 0.3, True, True), (-0.1, 0.2, False, True), (-0.3, -0.1, False, False)],
)
def test_a_difference_is_judged_by_its_interval(low: float, high: float, above: bool, not_below: bool) -> None:
    of = {"value": (low + high) / 2, "low": low, "high": high, "n": 9}
    assert common.above_zero(of)["met"] is above
    assert common.not_below_zero(of)["met"] is not_below
    assert common.shown(common.above_zero(of)).endswith("meets above 0" if above else "misses above 0")


# A log without weights

CATALOGUE = make_catalogue(
    a="red shoe",
    b="red hat",
    c="red lamp",
    d="blue shoe",
    e="blue hat",
    f="blue lamp",
    g="green mug",
    h="green bag",
    i="black kite",
    j="black ball",
)


def history(items: str, low: str = "", times: list[int] | None = None, user: str = "u") -> History:
    places = np.array([CATALOGUE.place[item] for item in items], dtype=np.int32)
    disliked = np.array([item in low for item in items])
    return History(user, places, None if times is None else np.array(times, dtype=np.int64), disliked)


def ids(places: np.ndarray) -> str:
    return "".join(CATALOGUE.ids[at] for at in places)


@dataclass
class Renderer:
    """A word is a token."""

    context: int = 10_000

    def split(self, request: Request) -> tuple[str, str]:
        return " ".join([request.prefix.system, *map(str, request.prefix.parts)]), ""

    def ids(self, text: str) -> list[str]:
        return text.split()

    def text(self, prompt: Prompt) -> str:
        return " ".join([*map(str, prompt.parts), prompt.answer])

    def neutral(self, text: str) -> str:
        return text


@dataclass
class Model(FakeMllm):
    batch_size: int = 2
    renderer: Renderer = field(default_factory=Renderer)


def make_log(config: UsersConfig | None = None, model: Model | None = None, name: str = "sample") -> users_common.Log:
    pipeline = SimpleNamespace(catalogue=CATALOGUE, config=SimpleNamespace(users=config or users_config(step=2)))
    return users_common.Log(name, pipeline, model or Model())  # type: ignore[arg-type]


def case(items: str, target: str, user: int, moment: int | None = None, times: list[int] | None = None) -> Any:
    own = history(items, user=f"u{user}", times=times)
    return users_common.Case(user, own, len(items), moment, CATALOGUE.place[target])


# Likelihood


def test_the_likeliest_number_of_items_is_chosen_and_of_equal_ones_the_smaller() -> None:
    assert likelihood.best({0: -5.0, 3: -4.0, 10: -4.5}) == 3
    assert likelihood.best({0: -5.0, 10: -4.0, 3: -4.0, likelihood.ALL: -4.0}) == 3


def test_the_number_of_items_is_chosen_on_validation_by_the_mean(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cases = [case("abcdefgh", "i", 0), case("bcdefg", "j", 1)]
    log = make_log(model=Model(likelihood=lambda before, _: -abs(before.count("\n- ") - 3)))
    monkeypatch.setattr(users_common.Log, "split", SimpleNamespace(validation="validation"))
    monkeypatch.setattr(users_common.Log, "cases", lambda _, targets: cases if targets == "validation" else [])
    monkeypatch.setattr(likelihood, "sample", lambda _, targets, count: targets)
    found = likelihood.choose_recent(common.Bench(tmp_path, tmp_path, 0), log)
    assert found["chosen"] == 3 and found["targets"] == 2
    assert {recent: of["value"] for recent, of in found["loglik"].items()} == {
        "0": -3, "1": -2, "3": 0, "5": -2, "10": -4,
    }  # fmt: skip


@given(st.integers(0, 12), st.integers(0, 40))
def test_a_prompt_shows_the_most_newest_items_that_fit(count: int, budget: int) -> None:
    seen = np.arange(count)

    def tokens(state: UserState) -> int:
        return 5 + 3 * len(state.recent)

    found = users_common.newest_within(NOBODY, seen, tokens, budget).recent
    assert found == tuple(range(count - len(found), count))
    assert tokens(replace(NOBODY, recent=found)) <= max(budget, 5)
    assert len(found) == count or 5 + 3 * (len(found) + 1) > budget


def test_more_items_than_the_context_holds_are_not_shown() -> None:
    log, of = make_log(), case("abcdefgh", "i", 0)
    state = build_state(of.history, of.end, "", CATALOGUE, log.config)
    shown = users_common.with_recent(log, state, of, likelihood.ALL)
    assert ids(np.array(shown.recent)) == "abcdefgh"
    assert users_common.with_recent(log, state, of, 0).recent == ()
    log.mllm.renderer.context = log.tokens(shown) + len(CATALOGUE.candidates[of.target].split()) - 1
    assert ids(np.array(users_common.with_recent(log, state, of, likelihood.ALL).recent)) == "bcdefgh"


def test_runs_change_places_while_times_stay_and_dislikes_go_with_their_items() -> None:
    own = history("abcdefgh", low="be", times=[10, 20, 30, 40, 50, 60, 70, 80])
    found = likelihood.shuffled(own, 7, 2, seed=3)
    assert sorted(ids(found.items)) == list("abcdefg")
    runs = ids(found.items).replace("g", "")
    assert {runs[at : at + 2] for at in (0, 2, 4)} == {"ab", "cd", "ef"} and runs[:2] != "ab"
    assert found.time is not None and found.time.tolist() == [10, 20, 30, 40, 50, 60, 70]
    assert [CATALOGUE.ids[item] for item in found.items[found.disliked]] == sorted("be", key=ids(found.items).index)


def test_one_run_stays_as_it_is() -> None:
    found = likelihood.shuffled(history("abc"), 2, 3, seed=0)
    assert ids(found.items) == "ab"


def test_conditions_differ_in_what_they_say_and_share_the_moment(tmp_path: Path) -> None:
    log = make_log()
    times = [1000 * at for at in range(9)]
    cases = [
        case("abcabdeg", "c", 0, 9_000, times[:8]),
        case("defdefgh", "a", 1, 10_000, times[:8]),
        case("ghijghij", "b", 2, 11_000, times[:8]),
    ]
    told = likelihood.conditions(common.Bench(tmp_path, tmp_path, 0), log, cases, 3)
    own, other, mixed = told[likelihood.OWN], told[likelihood.OTHER], told["another's state, own last n"]
    for at, of in enumerate(cases):
        assert ids(np.array(own[at].recent)) == ids(of.seen)[-3:]
        assert other[at].user_id != own[at].user_id == f"u{at}"
        assert (other[at].profile, other[at].recent) in {(state.profile, state.recent) for state in own}
        assert (mixed[at].user_id, mixed[at].recent) == (other[at].user_id, own[at].recent)
        for bare in (told[likelihood.RAW][at], told["raw, last n"][at]):
            assert (bare.profile, bare.preference, bare.typical, bare.newest) == ("", "", None, None)
        assert of.target not in (*other[at].recent, other[at].typical, other[at].newest)
        assert (told[likelihood.CHOICES][at].typical, told[likelihood.CHOICES][at].profile) == (own[at].typical, "")
        assert (told["own words + n"][at].newest, told["own words + n"][at].profile) == (None, own[at].profile)
        assert told["raw, all"][at].recent == tuple(of.seen)
        assert told["profile alone"][at].profile and not told["profile alone"][at].preference
        for name, states in told.items():
            assert name == "nobody" or states[at].waited == of.moment - 7000
        for raw, whole in ((likelihood.RAW, own), (likelihood.RAW_STATE, told[likelihood.STATE])):
            bare, budget = told[raw][at], log.tokens(whole[at])
            longer = replace(bare, recent=tuple(of.seen[-len(bare.recent) - 1 :]))
            assert log.tokens(bare) <= budget
            assert len(bare.recent) == of.end or log.tokens(longer) > budget
    assert {one for one, _, _ in likelihood.PAIRS} | {other for _, other, _ in likelihood.PAIRS} == set(told)


def test_another_user_who_chose_the_target_is_passed_over() -> None:
    shown = [replace(NOBODY, user_id=str(at), recent=of) for at, of in enumerate([(1,), (7,), (2,), (7, 3)])]
    moved = np.array([1, 2, 3, 0])
    assert [likelihood.stranger(shown, moved, at, 7) for at in (0, 2)] == [2, 0]
    assert [likelihood.stranger(shown, moved, at, 9) for at in range(4)] == [1, 2, 3, 0]
    full = [shown[0], replace(shown[2], typical=7), replace(shown[2], newest=7), shown[2]]
    assert likelihood.stranger(full, moved, 0, 7) == 3
    assert likelihood.stranger([replace(one, recent=(7,)) for one in shown], moved, 2, 7) == 2  # nobody is left


def test_the_own_state_is_compared_with_the_mean_of_others_who_did_not_choose_the_target(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The likelihood is minus the number of choices shown: 2, 3 and 4. What the first chose next, the second is shown.
    cases = [case("ab", "e", 0), case("cde", "j", 1), case("fghi", "j", 2)]
    log = make_log(model=Model(likelihood=lambda before, _: -before.count("\n- ")))
    monkeypatch.setattr(users_common.Log, "split", SimpleNamespace(test="test"))
    monkeypatch.setattr(users_common.Log, "cases", lambda _, targets: cases)
    monkeypatch.setattr(likelihood, "sample", lambda _, targets, count: targets)
    found = likelihood.strangers(common.Bench(tmp_path, tmp_path, 0), log, 10)
    assert found["targets"] == 3
    assert found["own - others"]["value"] == pytest.approx(((4 - 2) + (6 / 2 - 3) + (5 / 2 - 4)) / 3)
    cases = [case("ab", "e", 0), case("cde", "e", 1)]
    found = likelihood.strangers(common.Bench(tmp_path, tmp_path, 0), log, 10)
    assert (found["targets"], found["own - others"]["value"]) == (1, 2 - 3)


# Change

TASTE = {
    "kinds": ["shoe", "lamp"],
    "colour": "red",
    "pattern": "plain",
    "material_group": "classic",
    "collection": "retro",
}
GROUPS = {"classic": ["silk", "oak"], "natural": ["cotton"]}


def test_names_are_whole_words_in_one_number_or_the_other() -> None:
    facts = {"red", "mug", "pair of shoes", "dress", "oak"}
    assert change.named_in("bored by mugs, a Pair of shoes and dresses", facts) == {"mug", "pair of shoes", "dress"}
    assert change.named_in("", facts) == set()


@pytest.mark.parametrize(
    ("said", "met"),
    [
        (change.Said(stays=("red",)), True),
        (change.Said(rises=("shoes",)), True),
        (change.Said(summary="something Retro"), True),
        (change.Said(fades=("red",)), False),
        (change.Said(lately=("red",)), True),
        (change.Said(stays=("silk", "fashion"), summary="a colourful thing"), False),
    ],
)
def test_a_preference_meets_a_taste_by_what_it_prints_but_not_by_what_fades(said: change.Said, met: bool) -> None:
    assert change.meets(said, change.true_to(TASTE), {"retro", "red", "silk"}) is met


def test_the_leading_fact_is_what_the_user_weighs() -> None:
    assert change.leading(TASTE, "picture") == {"red"}
    assert change.leading(TASTE, "text") == {"retro"}
    assert change.leading(TASTE, "both") == {"red", "retro"}
    assert change.whole_truth(TASTE, GROUPS) == {"pair of shoes", "lamp", "red", "plain", "retro", "silk", "oak"}


def changing(items: str, position: int, old: str, new: str, weighs: str = "picture") -> change.Person:
    taste = {**TASTE, "kinds": [], "pattern": "", "collection": ""}
    return change.Person(
        history(items), weighs, {**taste, "colour": old}, {"position": position, "taste": {**taste, "colour": new}}
    )


def test_a_clear_change_is_named_and_that_of_another_user_is_not(tmp_path: Path) -> None:
    people = [changing("abcabcdefdef", 6, "red", "blue"), changing("defdefabcabc", 6, "blue", "red")]
    log = make_log(users_config(window=6, step=3, summary="compose"))
    found = change.said_of_change(common.Bench(tmp_path, tmp_path, 0), log, people)
    assert found["names a fact of the new taste"]["value"] == 1 and found["names a fact of the new taste"]["met"]
    assert found["names the leading fact"]["value"] == found["rises only"]["value"] == 1
    assert found["names one of another user's new taste"]["value"] == 0
    assert found["old taste fades, at the end"]["value"] == 1
    assert found["summary written by the model"]["value"] == 0


def test_a_steady_user_claims_nothing_and_false_names_count_as_false() -> None:
    person = change.Person(history("abcabcabcabc"), "picture", {**TASTE, "kinds": []}, None)
    log = make_log(users_config(window=6, step=3))
    found = change.said_of_unchanged(log, [person], GROUPS)
    assert found["claims a change, at the end"]["value"] == 0 and found["claims a change, at the end"]["met"]
    assert found["true names, stays"]["value"] == 1
    wrong = replace(person, taste={**TASTE, "kinds": [], "colour": "blue"})
    assert change.said_of_unchanged(log, [wrong], GROUPS)["true names, stays"]["value"] == 0
    turned = replace(person, history=history("abcabcdefdef"))
    found = change.said_of_unchanged(log, [turned], GROUPS)["claims a change, at the end"]
    assert found["value"] == 1 and not found["met"]


def test_summaries_are_judged_by_true_names_and_by_those_that_are_missing() -> None:
    windows = [Window(0, 2, (), ("Red", "hat")), Window(0, 2, (), ("retro", "Lamp"))]
    summaries = [Summary("red hats", "model"), Summary("a lamp", "rule")]
    facts = [{"red", "hat", "silk"}, {"retro", "lamp"}]
    found = change.judged(windows, summaries, facts, [change.true_to(TASTE)] * 2, [0, 1])
    assert found["names that are true"]["value"] == pytest.approx(2 / 3)
    assert found["true tastes of the prompt that are named"]["value"] == pytest.approx(2 / 3)
    assert found["written by the model"]["value"] == 0.5


def test_separation_is_one_where_groups_do_not_overlap_and_a_half_where_they_are_equal() -> None:
    assert change.separation(np.array([2.0, 3.0]), np.array([0.0, 1.0]))["value"] == 1
    assert change.separation(np.ones(3), np.ones(2))["value"] == 0.5
    assert change.separation(np.array([1.0, 0.0]), np.array([0.5]))["value"] == 0.5
    assert change.separation(np.zeros(0), np.ones(2))["value"] is None


# Ranking


@given(st.lists(st.booleans(), min_size=1, max_size=40), st.integers(1, 10))
def test_targets_are_taken_up_to_so_many_held_ones(among: list[bool], count: int) -> None:
    held = np.array(among)
    rows = ranking.until_held(held, count)
    assert (np.diff(rows) > 0).all()
    assert held[rows].sum() == min(count, held.sum())
    assert held.sum() >= count or len(rows) == len(held)


def test_the_state_is_compared_with_raw_history_under_the_same_reading() -> None:
    systems = {"retrieval": np.array([0.0, 0.5, 0.0])}
    for gain, telling in ((0.5, ranking.STATE), (0.25, ranking.RAW), (0.75, ranking.ONLY)):
        systems |= {f"{telling}: {reading}": systems["retrieval"] + gain for reading in ranking.READINGS}
    found = ranking.compared(systems, np.arange(3))["differences"]
    against_raw = [of for name, of in found.items() if name.endswith(f"({ranking.STATE}) - ({ranking.RAW})")]
    assert [(of["value"], of["met"]) for of in against_raw] == [(0.25, True)] * len(ranking.READINGS)
    against_only = [of for name, of in found.items() if name.endswith(f"({ranking.STATE}) - ({ranking.ONLY})")]
    assert [of["value"] for of in against_only] == [-0.25] * len(ranking.READINGS)
    assert found[f"({ranking.RAW}: likelihood) - retrieval"]["value"] == 0.25


# Speed and events


def test_ratios_of_speed_are_the_medians_of_the_rounds() -> None:
    def a_round(batched: float, bare: float, alone: float) -> dict[str, Any]:
        seconds = {"batched": batched, "bare": bare, "one at a time": alone, "newest only": batched / 2}
        seconds_of = {name: {"processor": value, "wall": 2 * value} for name, value in seconds.items()}
        return {"seconds": seconds_of, "same_texts": 1.0, "written_one_at_a_time": 2}

    found = speed.medians([a_round(2, 1, 10), a_round(2, 2, 8), a_round(4, 3, 4)])["ratios"]
    assert found["processor"]["batched against one at a time"] == {
        "value": 4, "least": 1, "most": 5, "mark": 4, "met": True,
    }  # fmt: skip
    assert found["processor"]["states against all windows one at a time"]["value"] == 8
    assert found["processor"]["bare share"]["value"] == 0.75 and not found["processor"]["bare share"]["met"]
    assert "mark" not in found["wall"]["bare share"]


def test_every_prompt_and_its_tokens_are_counted() -> None:
    counted = events.Counted(Model(say=lambda _: "red shoes"))  # type: ignore[arg-type]
    assert counted.generate([Prompt(("what is it",), answer="It is"), Prompt(("say",))], 5) == ["red shoes"] * 2
    assert (counted.calls, counted.tokens) == (2, 5 + 1 + 2 + 2)
    counted.score([Request(Prompt(("a b c",)), ("d e", "f"))])
    assert (counted.calls, counted.tokens) == (3, 10 + 3 + 3)


def test_an_event_is_compared_with_its_own_user_from_scratch() -> None:
    def cost(end: int, closes: bool, calls: int, work: float) -> dict[str, Any]:
        return {"end": end, "closes": closes, "calls": calls, "tokens": work, "processor": work, "wall": work}

    rows = [
        [cost(50, False, 16, 100), cost(51, True, 1, 10), cost(52, False, 3, 50)],
        [cost(50, False, 10, 10), cost(51, True, 5, 3), cost(52, False, 1, 1)],
    ]
    found = events.summary([4, 7], rows)
    assert (found["users"], found["events"]) == (2, 4)
    assert found["calls"]["value"] == 2.5 and not found["calls"]["met"]
    assert found["calls_when_a_window_closes"]["value"] == 3 and found["calls_when_a_window_closes"]["met"]
    assert found["shares"]["tokens"]["value"] == pytest.approx((0.1 + 0.5 + 0.3 + 0.1) / 4)
    assert not found["shares"]["processor"]["met"] and "mark" not in found["shares"]["wall"]


# Worked


def test_the_user_of_the_nearest_length_is_told() -> None:
    lengths = np.array([4, 10, 7, 10])
    assert worked.nearest(lengths, 9.0, range(4)) == 1
    assert worked.nearest(lengths, 9.0, [0, 2, 3]) == 3


# Every section on a tiny model

SECTIONS = {
    "likelihood": "sample",
    "change": "sample",
    "ranking": "hm_sample",
    "speed": "sample",
    "worked": "hm_sample",
}


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory, finished: Path, shop_data: Path) -> Iterator[common.Bench]:
    work = tmp_path_factory.mktemp("bench")
    for name in ("sample", "hm_sample", events.SET):
        shutil.copytree(finished, work / name)
    shutil.copytree(shop_data, work / "sample_shop")
    made = common.Bench(work, work, 4)
    mllm = Pipeline(Workspace.open(finished)).mllm
    made.__dict__.update(trained=mllm, untrained=mllm)
    yield made
    users_common.opened.cache_clear()


@pytest.mark.parametrize("name", SECTIONS)
def test_a_section_is_told_again_without_the_model(
    name: str, bench: common.Bench, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    measure, show = program.SECTIONS[name]
    first = measure(bench, (SECTIONS[name],))
    show(first)
    told = capsys.readouterr().out

    def refuse(*_: object) -> None:
        raise AssertionError("the model is asked again")

    for method in ("generate", "score"):
        monkeypatch.setattr(bench.trained, method, refuse)
    again = measure(bench, (SECTIONS[name],))
    show(again)
    assert again == first
    assert capsys.readouterr().out == told != ""


@pytest.mark.parametrize("name", ["change", "ranking", "speed", "events"])
def test_a_section_without_its_set_says_so_or_is_empty(name: str, tmp_path: Path) -> None:
    measure, show = program.SECTIONS[name]
    found = measure(common.Bench(tmp_path, tmp_path, 0), ())
    assert found == {}
    show(found)


def test_events_after_the_stored_ones_cost_only_their_newest_window(
    bench: common.Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(events, "STORED", 12)
    found = events.events(bench, (events.SET,))
    assert 1 <= found["users"] <= 4 and found["events"] >= 2
    assert found["from_scratch"]["calls"]["value"] == 3  # [0, 6), [3, 9), [6, 12)
    assert (found["one_event"]["calls"]["value"], found["calls_when_a_window_closes"]["value"]) == (1, 1)
    assert found["one_event"]["tokens"]["value"] < found["from_scratch"]["tokens"]["value"]


def test_a_real_persons_id_is_cut_short(bench: common.Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worked, "ID", 2)
    of_log = users_common.opened(bench, "hm_sample")
    text = worked.tell_user(bench, of_log, 5, "short", {})
    user = of_log.histories.users[5]
    assert f"user {user[:2]}:" in text and user not in text
    assert f"user {user}:" in worked.tell_user(bench, users_common.opened(bench, "sample"), 5, "short", {})


def test_the_truth_of_another_shop_is_refused(
    bench: common.Bench, tmp_path: Path, write_shop: Callable[[Path], None]
) -> None:
    shutil.copytree(bench.work / "sample", tmp_path / "sample")
    write_shop(tmp_path / "sample_shop")
    other = common.Bench(tmp_path, tmp_path, 4)
    other.__dict__["trained"] = bench.trained
    with pytest.raises(ValueError, match="was not made from"):
        change.change(other, ("sample",))


@pytest.fixture
def write_shop() -> Callable[[Path], None]:
    from mllm_srec.data.sample import write_sample

    return lambda folder: write_sample(folder, users=24, seed=1)


@pytest.mark.parametrize("as_json", [False, True])
def test_the_wanted_sections_are_measured_in_order_and_printed_in_one_way(
    as_json: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    def measured(name: str) -> tuple[Any, Any]:
        return (lambda given: {"told": f"{name} of {given}"}), (lambda found: print("table:", found["told"]))

    sections = {name: measured(name) for name in ("one", "two", "three")}
    head = {"machine": {"cores": 2}, "limit": 0}
    common.report(head, {"model": "tiny"}, sections, ["three", "one"], as_json, "it")
    out = capsys.readouterr().out
    if not as_json:
        assert [line.split() for line in out.splitlines() if line] == [
            ["cores", "2"], ["model", "tiny"], ["table:", "three", "of", "it"], ["table:", "one", "of", "it"],
        ]  # fmt: skip
        return
    found = json.loads(out)
    assert list(found) == ["machine", "limit", "sections", "seconds"] and list(found["seconds"]) == ["three", "one"]
    assert found["sections"] == {"three": {"told": "three of it"}, "one": {"told": "one of it"}}
