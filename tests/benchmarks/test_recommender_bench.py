"""The measures of benchmarks/recommender*.py by known answers, and every section on a tiny model."""

import json
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fakes import FakeMllm, make_catalogue, make_state
from mllm_srec.config import load_config
from mllm_srec.data.dataset import Dataset
from mllm_srec.data.split import Targets
from mllm_srec.ranking import Candidates, Fusion
from mllm_srec.recommender import RUN
from mllm_srec.records import ranking_request
from mllm_srec.user_states import History
from mllm_srec.workspace import Workspace, write_manifest
from tiny_models import tiny_mllm

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

import recommender as program
import recommender_faithful as faithful
import recommender_lists as lists
import recommender_shop as shop
import users_common
from common import Bench

CATALOGUE = make_catalogue(**{letter: f"{letter}-like" for letter in "abcdefghijklmnopqrstuvwxyz"})


def places(items: str) -> np.ndarray:
    return np.array([CATALOGUE.place[item] for item in items], dtype=np.int32)


def ids(found: np.ndarray) -> str:
    return "".join(CATALOGUE.ids[at] for at in found)


def case(items: str, target: str, low: str = "", timed: bool = True, user: int = 0) -> users_common.Case:
    """The target is chosen an hour after `items`, which are chosen every hour."""
    whole = items + target
    time = 3_600_000 * np.arange(len(whole), dtype=np.int64) if timed else None
    history = History(f"u{user}", places(whole), time, np.array([item in low for item in whole]))
    moment = None if time is None else int(time[-1])
    return users_common.Case(user, history, len(items), moment, CATALOGUE.place[target])


@dataclass
class Model(FakeMllm):
    checked: set[str] = field(default_factory=lambda: {"fake-1"})


def make_log(model: Model | None = None, **pipeline: Any) -> users_common.Log:
    made = SimpleNamespace(catalogue=CATALOGUE, folder=Path("run"), **pipeline)
    return users_common.Log("set", made, model or Model())  # type: ignore[arg-type]


# Gains over the sets


def test_gains_over_the_sets_count_each_set_alike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def log(folder: Path, ours: list[int], theirs: list[int]) -> Any:
        folder.mkdir()
        rows = {"system": ["MLLM-SRec"] * len(ours) + ["retrieval"] * len(theirs), "greater": ours + theirs}
        users = [f"u{number}" for number in (*range(len(ours)), *range(len(theirs)))]
        pl.DataFrame(rows | {"user_id": users, "ties": [0] * len(users)}).write_parquet(folder / "places.parquet")
        return SimpleNamespace(pipeline=SimpleNamespace(folder=folder))

    # Places 1 and 3 are worth 1 and .5, places behind 10 nothing: from .5 to .75, and from 1 to .5.
    logs = {"one": log(tmp_path / "one", [0, 2, 0, 2], [2, 2, 2, 2]), "two": log(tmp_path / "two", [0, 10], [0, 0])}
    monkeypatch.setattr(program, "opened", lambda bench, place: logs[place.name])
    found = program.together(Bench(tmp_path, tmp_path, 0), {name: tmp_path / name for name in logs})
    assert [found[name]["value"] for name in ("one", "two", "together")] == pytest.approx([0.5, -0.5, 0.0])
    assert [found[name]["met"] for name in ("one", "two", "together")] == [True, False, False]
    assert [found[name]["n"] for name in ("one", "two", "together")] == [4, 2, 6]


# Uniform negatives


@given(st.sets(st.integers(0, 25), max_size=5), st.integers(0, 99))
def test_negatives_are_different_items_that_the_user_never_chose(chosen: set[int], seed: int) -> None:
    seen = "".join(CATALOGUE.ids[at] for at in sorted(chosen - {25}))
    of = replace(case(seen, "z"), end=len(seen) // 2)  # what comes behind the target is no negative either
    found = program.negatives(of, len(CATALOGUE.ids), np.random.default_rng(seed))
    assert len(set(found.tolist())) == program.NEGATIVES
    assert not set(found.tolist()) & {*chosen, 25}


def test_all_items_that_are_left_are_negatives_alike_often() -> None:
    generator = np.random.default_rng(0)
    found = [program.negatives(case("abc", "d"), 26, generator) for _ in range(2000)]
    counts = np.bincount(np.concatenate(found), minlength=26)
    assert counts[:4].tolist() == [0] * 4
    assert np.abs(counts[4:] / 2000 - 20 / 22).max() < 0.03


def test_too_few_items_are_refused_by_the_users_name() -> None:
    with pytest.raises(ValueError, match="user 'u0' has left 19 items: 20 negatives are needed"):
        program.negatives(case("abcdef", "g"), 26, np.random.default_rng(0))


def test_metrics_of_a_target_among_negatives_by_hand() -> None:
    # First of three, third of three, and tied with all: rank 1, 3, and each of 1 to 3 alike.
    found = program.placed(np.array([[3.0, 2, 1], [1, 2, 3], [1, 1, 1]]), [0, 1, 2])
    assert found["AUC"]["value"] == pytest.approx((1 + 0 + 0.5) / 3)
    assert found["HR@5"]["value"] == 1
    assert found["MRR@5"]["value"] == pytest.approx((1 + 1 / 3 + (1 + 1 / 2 + 1 / 3) / 3) / 3)
    chance = program.placed(np.zeros((4, 21)), range(4))
    assert chance["HR@5"]["value"] == pytest.approx(5 / 21)
    assert chance["MRR@5"]["value"] == pytest.approx((1 + 1 / 2 + 1 / 3 + 1 / 4 + 1 / 5) / 21)


# Lists


def test_retrieval_is_asked_what_the_target_sees_and_when() -> None:
    found = lists.queries_of([case("abc", "d"), case("e", "f")])
    assert [ids(history) for history in found] == ["abc", "e"]
    assert found.times is not None and [len(times) for times in found.times] == [3, 1]
    assert found.now is not None and found.now.tolist() == [3 * 3_600_000, 3_600_000]
    timeless = lists.queries_of([case("abc", "d", timed=False)])
    assert [ids(history) for history in timeless] == ["abc"] and timeless.times is timeless.now is None


def test_what_the_model_said_is_kept_and_asked_again_of_other_words_or_by_another_model(tmp_path: Path) -> None:
    bench = Bench(tmp_path, tmp_path, 0)
    states = [replace(make_state(), preference=f"turns to {number}") for number in range(20)]
    items, retrieval = np.array([places("abc")] * 20), np.zeros((20, 3))
    first = Model()
    found = lists.read_lists(bench, make_log(first), states, items, retrieval, "lists")
    asked = ranking_request(states[3], CATALOGUE, items[3])
    assert np.stack([found.odds[3], found.loglik[3]], 1) == pytest.approx(first.score([asked])[0])

    again = Model()
    kept = lists.read_lists(bench, make_log(again), states, items, retrieval, "other label")
    assert again.calls() == 0 and (kept.odds == found.odds).all() and (kept.loglik == found.loglik).all()
    lists.read_lists(bench, make_log(again), [*states[:-1], make_state()], items, retrieval, "lists")
    assert again.calls() == 20 - lists.LISTS  # the batch that holds the other state
    other = Model("fake-2", checked={"fake-2"})
    lists.read_lists(bench, make_log(other), states, items, retrieval, "lists")
    assert other.calls() == 20


@pytest.mark.parametrize("subtract", [False, True])
def test_systems_are_retrieval_each_reading_and_what_validation_chose(
    subtract: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # For the empty user item b alone is likely; with that taken out, it is the last of both readings.
    model = Model(
        odds=lambda _, item: 10.0 * item.startswith("b"), likelihood=lambda _, item: 10.0 * item.startswith("b")
    )
    chosen = SimpleNamespace(fusion=Fusion(1.0, 1.0, 0.0, subtract))
    monkeypatch.setattr(lists.Choices, "read", lambda _: chosen)
    read = Candidates(
        np.array([places("abc")]), np.array([[3.0, 2, 1]]), np.array([[0.0, 2, 1]]), np.array([[5.0, 6, 4]])
    )
    found = lists.systems(Bench(tmp_path, tmp_path, 0), make_log(model), read)
    assert {name: ids(places("abc")[np.argsort(-of[0])]) for name, of in found.items()} == (
        {"retrieval": "abc", "odds": "cab", "likelihood": "acb", "fused": "acb"}
        if subtract
        else {"retrieval": "abc", "odds": "bca", "likelihood": "bac", "fused": "bac"}
    )
    assert bool(model.calls()) is subtract


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Runs of a pipeline that only says that it has run."""
    runs: list[Path] = []

    class Stub:
        def __init__(self, workspace: Workspace) -> None:
            self.workspace, self.mllm = workspace, tiny_mllm()

        def run(self) -> None:
            runs.append(self.workspace.root)
            write_manifest(self.workspace.run(RUN), {})

    monkeypatch.setattr(lists, "Pipeline", Stub)
    return runs


def test_a_missing_workspace_is_made_and_run_and_a_finished_one_used(
    stub: list[Path], tmp_path: Path, ingested: Path
) -> None:
    place, config = tmp_path / "real" / "ws", load_config(overrides=("seed=3",))

    def dataset() -> Dataset:
        return Workspace.open(ingested).dataset()

    def refuse() -> Dataset:
        raise AssertionError("the data is read again")

    log = lists.finished(place, dataset, config)
    assert stub == [place] and log.name == "ws" and log.pipeline.workspace.config.seed == 3
    lists.finished(place, refuse, config)
    assert stub == [place]
    (place / "runs" / RUN / "manifest.json").unlink()
    lists.finished(place, refuse, config)
    assert stub == [place, place]


# Faithfulness


def test_an_event_is_taken_out_with_its_time_and_its_rating() -> None:
    found = faithful.without(case("abcbd", "z", low="ad"), CATALOGUE.place["b"])
    assert (ids(found.seen), found.end, CATALOGUE.ids[found.target], found.moment) == ("acd", 3, "z", 5 * 3_600_000)
    assert found.history.time is not None and (found.history.time // 3_600_000).tolist() == [0, 2, 4]
    assert found.history.disliked.tolist() == [True, False, True]
    assert len(found.history.items) == 3  # nothing of what comes later is left in it
    assert faithful.without(case("ab", "z", timed=False), CATALOGUE.place["a"]).history.time is None


@given(st.text("abcdefgh", min_size=1, max_size=12), st.data())
def test_another_event_lies_near_the_cited_one_and_is_not_cited(seen: str, data: st.DataObject) -> None:
    cited = data.draw(st.lists(st.sampled_from(seen), min_size=1, max_size=2))
    event, of = cited[0], places(seen)
    found = faithful.near(of, CATALOGUE.place[event], [CATALOGUE.place[c] for c in cited], np.random.default_rng(0))
    at = seen.rindex(event)
    around = set(seen[max(0, at - 3) : at + 4]) - set(cited)
    assert (found is None and not around) or (found is not None and CATALOGUE.ids[found] in around)


def test_all_events_near_are_drawn_and_none_further_away() -> None:
    generator = np.random.default_rng(0)
    seen = places("abcdefghij")
    drawn = {faithful.near(seen, CATALOGUE.place["e"], [CATALOGUE.place["e"]], generator) for _ in range(200)}
    assert ids(np.array(sorted(of for of in drawn if of is not None))) == "bcdfgh"


def cited(of: int, item: str, event: str, other: str, by_facts: bool = True) -> faithful.Cited:
    return faithful.Cited(of, *(CATALOGUE.place[name] for name in (item, event, other)), by_facts)


def test_a_share_counts_pairs_in_which_the_cited_event_costs_more_and_ties_half() -> None:
    shown = faithful.Given(
        cases=[case("abc", "z"), case("def", "z", user=1)],
        items=[places("xy"), places("yz")],
        cited=[cited(0, "x", "a", "b"), cited(0, "y", "a", "b"), cited(1, "y", "d", "e", by_facts=False)],
    )
    row = {(0, CATALOGUE.place["a"]): 0, (0, CATALOGUE.place["b"]): 1}
    row |= {(1, CATALOGUE.place["d"]): 2, (1, CATALOGUE.place["e"]): 3}
    # x falls by 3 against 1; y of the first by 1 against 1; y of the second rises by 1 against 0.
    after = np.array([[2.0, 3.0], [4.0, 3.0], [7.0, 0.0], [6.0, 0.0]])
    found = faithful.judged(shown, [np.array([5.0, 4.0]), np.array([6.0, 9.0])], after, row, mark=0.5)
    assert {name: of["value"] for name, of in found.items()} == {
        "share": pytest.approx((1 + 0.5 + 0) / 3),
        "share, reason names facts": 0.75,
        "share, reason names none": 0.0,
        "fall without the cited event": pytest.approx((3 + 1 - 1) / 3),
        "fall without another event": pytest.approx((1 + 1 + 0) / 3),
    }
    assert found["share"]["mark"] == 0.5 and found["share"]["met"]


def test_citations_are_gathered_from_what_is_shown_until_there_are_enough(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Of each user's list "vwxyz" fusion shows "zyx"; z's reason cites two events, y's none, x's the only one.
    cases = [case("ab" if user % 2 else "abcdef", "z", user=user) for user in range(40)]
    targets = Targets(np.arange(40), np.zeros(40, int), np.zeros(40, int))
    config = SimpleNamespace(retrieval=SimpleNamespace(candidates=5))
    log = make_log(chosen=SimpleNamespace(test=targets), config=config)
    monkeypatch.setattr(users_common.Log, "cases", lambda _, part: [cases[user] for user in part.user])
    monkeypatch.setattr(users_common.Log, "config", load_config().users)
    monkeypatch.setattr(faithful, "states", lambda *_: [make_state()] * len(_[2]))
    retriever: Any = SimpleNamespace(candidates=lambda asked, k: (np.array([places("vwxyz")] * len(asked)), None))

    def scores(*given: Any) -> dict[str, np.ndarray]:
        rising = np.tile(np.arange(5.0), (len(given[3]), 1))
        return {"odds": rising, "likelihood": rising, "fused": rising}

    def reasons(*given: Any) -> list[dict[str, Any]]:
        events = {"z": ["a", "b"], "y": [], "x": ["b"]}
        return [
            {"facts": ["f"] * (CATALOGUE.ids[item] == "z"), "events": events[CATALOGUE.ids[item]]} for item in given[5]
        ]

    monkeypatch.setattr(faithful, "scores_of", scores)
    monkeypatch.setattr(faithful, "reasons_of", reasons)
    bench = Bench(tmp_path, tmp_path, 0)
    found = faithful.shown_with_reasons(bench, log, retriever, 10)
    block = found.cases
    short = sum(len(of.seen) == 2 for of in block)
    assert len(block) == len(found.items) == len(found.scores["odds"]) == faithful.LISTS < 40
    assert [of.user for of in block] != list(range(len(block)))  # a seeded order, not that of the log
    assert (found.reasons, found.citing) == (3 * len(block), 2 * len(block))
    assert found.alone == 2 * short  # z's two citations of a history of two: nothing else is left
    assert len(found.cited) == 10
    for of in found.cited:
        event, other = (CATALOGUE.ids[at] for at in (of.event, of.other))
        assert CATALOGUE.ids[of.item] in "zx" and of.by_facts is (CATALOGUE.ids[of.item] == "z")
        assert event in "ab" and other in ids(block[of.case].seen) and other not in ("ab" if of.by_facts else "b")
    all_of_them = faithful.shown_with_reasons(bench, log, retriever, 10_000)
    assert len(all_of_them.cases) == 40 and len(all_of_them.cited) == 20 * 3 + 20 * 1


def test_reasons_that_cite_nothing_leave_no_cases(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(faithful, "shown_with_reasons", lambda *_: faithful.Given(reasons=3))
    monkeypatch.setattr(faithful, "states", lambda *_: [])
    monkeypatch.setattr(users_common.Log, "config", load_config().users)
    found = faithful.measure(Bench(tmp_path, tmp_path, 0), make_log(_retriever=lambda _: None))
    assert (found["reasons"], found["pairs"]) == (3, 0)
    assert found["readings"]["odds"]["share"]["value"] is None and not found["readings"]["odds"]["share"]["met"]
    faithful.show_faithful({"set": found})


# The shop


def test_a_shuffled_history_keeps_its_times_its_ratings_and_its_target() -> None:
    own = case("abcdefghij", "z", low="cj", user=4)
    found = shop.shuffled(own, 0)
    assert sorted(ids(found.seen)) == list("abcdefghij") and ids(found.seen) != "abcdefghij"
    assert found.history.time is not None and own.history.time is not None
    assert (found.history.time == own.history.time[:10]).all()
    assert sorted(ids(found.seen[found.history.disliked])) == ["c", "j"]
    assert (found.end, found.target, found.moment) == (own.end, own.target, own.moment)
    assert ids(shop.shuffled(own, 0).seen) == ids(found.seen) != ids(shop.shuffled(own, 1).seen)
    assert ids(shop.shuffled(replace(own, user=5), 0).seen) != ids(found.seen)


def test_a_loss_is_the_share_of_the_mean() -> None:
    whole, less = np.array([1.0, 0.5, 0.5, 0.0]), np.array([1.0, 0.0, 0.0, 0.5])
    found = shop.loss(whole, less, 0.25)
    assert found["value"] == pytest.approx(0.25) and found["met"] and found["n"] == 4
    assert found["low"] < 0.25 < found["high"] <= 1
    assert not shop.loss(whole, less, 0.26)["met"]
    assert shop.loss(whole, whole)["value"] == shop.loss(whole, whole)["low"] == 0
    assert shop.loss(whole, np.zeros(4))["low"] == 1
    assert shop.loss(less, whole)["value"] == pytest.approx(-1 / 3)


@pytest.mark.parametrize("count", [0, 3])
def test_where_nothing_was_right_nothing_is_lost(count: int) -> None:
    found = shop.loss(np.zeros(count), np.zeros(count), 0.2)
    assert found["value"] is None and not found["met"]


def test_only_the_fused_lists_of_the_group_are_marked() -> None:
    odds = np.ones(3)
    whole = {"retrieval": np.array([1.0, 1.0, 0.0]), "odds": odds, "fused": np.array([1.0, 0.5, 0.5])}
    less = {"retrieval": np.array([0.0, 1.0, 0.0]), "odds": odds, "fused": np.array([0.5, 0.5, 0.0])}
    found = shop.compared(whole, less, np.array([0, 2]), 0.3)
    assert found["retrieval"]["loss"]["value"] == 1 and "mark" not in found["retrieval"]["loss"]
    assert found["odds"]["loss"]["value"] == 0 and "mark" not in found["odds"]["loss"]
    assert found["fused"]["loss"]["value"] == pytest.approx(2 / 3) and found["fused"]["loss"]["met"]
    assert (found["fused"]["whole"]["value"], found["fused"]["less"]["value"]) == (0.75, 0.25)
    assert "mark" not in shop.compared(whole, less, np.array([0, 2]), None)["fused"]["loss"]


@pytest.mark.parametrize("pictures", [True, False])
def test_pictures_are_gone_before_ingest_and_reach_retrieval_where_they_are_not(
    pictures: bool, tmp_path: Path, shop_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(shop_data, tmp_path / "sample_shop")
    made: list[tuple[Path, Any]] = []

    def finished(place: Path, dataset: Any, config: Any) -> Any:
        made.append((place, config))
        shown = dataset().items["image"].is_not_null()
        assert shown.all() if pictures else not shown.any()
        return SimpleNamespace(histories=dataset().with_repeats(config.data.repeats).histories())

    monkeypatch.setattr(shop, "finished", finished)
    shop.opened_shop(Bench(tmp_path, tmp_path, 0), pictures)
    [(place, config)] = made
    assert place.name == ("shop_with_pictures" if pictures else "shop_without_pictures")
    assert (config.items.embedding, config.users.summary) == ("description", "compose")


def test_a_workspace_of_another_shop_is_refused(
    tmp_path: Path, shop_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(shop_data, tmp_path / "sample_shop")
    other = SimpleNamespace(histories=SimpleNamespace(users=["u001"], item=np.zeros(1)))
    monkeypatch.setattr(shop, "finished", lambda *_: other)
    with pytest.raises(ValueError, match="shop_with_pictures was not made from"):
        shop.opened_shop(Bench(tmp_path, tmp_path, 0), True)


# Every section on a tiny model


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory, finished: Path, shop_data: Path) -> Iterator[Bench]:
    work = tmp_path_factory.mktemp("bench")
    for name in ("hm_sample", "shop_with_pictures", "shop_without_pictures"):
        shutil.copytree(finished, work / name)
    shutil.copytree(shop_data, work / "sample_shop")
    yield Bench(work, work, 0)
    for kept in (lists.opened, shop.opened_shop):
        kept.cache_clear()


def test_lists_are_those_of_the_run(bench: Bench) -> None:
    log = lists.opened(bench, bench.work / "hm_sample")
    assert log.mllm.has_adapter
    cases = log.cases(log.pipeline.chosen.test)[::-1]
    found, of_run = shop.ndcg_of(bench, log, cases, "test"), shop.ndcg_of_run(log, cases)
    for system in shop.SYSTEMS:
        assert of_run[system].tolist() == pytest.approx(found[system].tolist())
    told = json.loads((log.pipeline.folder / "metrics.json").read_text(encoding="utf-8"))["systems"]
    assert found["retrieval"].mean() == pytest.approx(told["retrieval"]["NDCG@10"]["mean"])
    assert found["fused"].mean() == pytest.approx(told["MLLM-SRec"]["NDCG@10"]["mean"])


@pytest.mark.parametrize("name", program.SECTIONS)
def test_a_section_is_told_again_without_the_model(
    name: str, bench: Bench, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(faithful, "PAIRS", 6)
    measure, show = program.SECTIONS[name]
    of = {"hm_sample": bench.work / "hm_sample"}
    first = measure(bench, of)
    show(first)
    told = capsys.readouterr().out

    def refuse(*_: object) -> None:
        raise AssertionError("the model is asked again")

    logs = [lists.opened(bench, of["hm_sample"]), *(shop.opened_shop(bench, pictures) for pictures in (True, False))]
    for method in ("generate", "score", "ask"):
        for log in logs:
            monkeypatch.setattr(log.mllm, method, refuse)
    again = measure(bench, of)
    show(again)
    assert again == first
    assert capsys.readouterr().out == told != ""


def test_a_quick_look_is_limited(bench: Bench) -> None:
    found = program.sampled(replace(bench, limit=3), {"hm_sample": bench.work / "hm_sample"})
    assert found["hm_sample"]["targets"] == 3
