"""Recommender: lists for users of the log and for histories from outside, out of the catalogue and nothing else."""

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mllm_srec import recommender as recommender_module
from mllm_srec.config import load_config
from mllm_srec.data.dataset import Queries
from mllm_srec.errors import ModelError, StoreError, UsageError
from mllm_srec.mllm.local import LocalMllm
from mllm_srec.pipeline import Pipeline
from mllm_srec.ranking import Fusion
from mllm_srec.recommender import Answer, Choices, Recommender, attach_adapter
from mllm_srec.retrieval import Mix
from mllm_srec.user_states import NOBODY
from mllm_srec.workspace import Workspace, read_manifest
from tiny_models import tiny_mllm

K = 8
"""`retrieval.candidates` of the fixture."""


@pytest.fixture(scope="module")
def ready(finished: Path) -> Recommender:
    return Recommender(Workspace.open(finished))


@pytest.fixture
def fuse_by(ready: Recommender, monkeypatch: pytest.MonkeyPatch) -> Callable[[Fusion], None]:
    """Puts other weights in place of the chosen ones."""
    return lambda fusion: monkeypatch.setattr(ready, "choices", replace(ready.choices, fusion=fusion))


def ids(answer: Answer) -> list[str]:
    return [item.item_id for item in answer.items]


def history_of(ready: Recommender, user: str) -> list[str]:
    index = ready.histories.users.index(user)
    return [ready.catalogue.ids[i] for i in ready.histories.of(index)]


# Users of the log


def test_nobody_is_shown_what_he_has_chosen(ready: Recommender) -> None:
    for user in ready.histories.users:
        answer = ready.recommend(user=user, k=K)
        shown = ids(answer)
        assert len(set(shown)) == K
        assert not set(shown) & set(history_of(ready, user))
        assert answer.user == user
        assert all(math.isfinite(value) for item in answer.items for value in (item.score, item.retrieval, item.odds))
        assert [item.score for item in answer.items] == sorted((item.score for item in answer.items), reverse=True)


def test_a_list_is_the_best_of_retrieval_in_another_order(
    ready: Recommender, fuse_by: Callable[[Fusion], None]
) -> None:
    user = ready.histories.users[3]
    assert ready.histories.time is not None
    asked = Queries([ready.histories.of(3)], [ready.histories.time[ready.histories.span(3)]])
    best = ready.retriever.candidates(asked, K)[0][0]
    retrieved = [ready.catalogue.ids[i] for i in best]
    fuse_by(Fusion(1.0, 0.0, 0.0, False))
    assert ids(ready.recommend(user=user, k=K)) == retrieved
    fuse_by(Fusion(0.0, 1.0, 0.0, False))
    by_odds = ready.recommend(user=user, k=K)
    assert set(ids(by_odds)) == set(retrieved)
    assert [item.odds for item in by_odds.items] == sorted((item.odds for item in by_odds.items), reverse=True)


def test_a_short_list_is_the_beginning_of_a_longer_one(ready: Recommender) -> None:
    user = ready.histories.users[0]
    longest = ids(ready.recommend(user=user, k=200))
    for k in (1, 5, K, 30):
        assert ids(ready.recommend(user=user, k=k)) == longest[:k]


def test_behind_the_candidates_the_list_goes_on_in_retrieval_order(ready: Recommender) -> None:
    user = ready.histories.users[0]
    items = ready.recommend(user=user, k=30).items
    assert len(items) == 30
    assert [math.isnan(item.score) for item in items] == [False] * K + [True] * (30 - K)
    assert [math.isnan(item.odds) for item in items] == [False] * K + [True] * (30 - K)
    behind = [item.retrieval for item in items[K:]]
    assert behind == sorted(behind, reverse=True)
    assert max(behind) <= min(item.retrieval for item in items[:K])


def test_no_list_is_longer_than_what_is_left_of_the_catalogue(ready: Recommender) -> None:
    user = ready.histories.users[0]
    shown = ids(ready.recommend(user=user, k=10_000))
    assert sorted([*shown, *set(history_of(ready, user))]) == sorted(ready.catalogue.ids)


def test_an_unknown_user_is_answered_with_near_names(ready: Recommender) -> None:
    with pytest.raises(UsageError, match=r"unknown user 'u0011': did you mean .*u001.*\? For somebody new, give a"):
        ready.recommend(user="u0011")
    with pytest.raises(UsageError, match=r"unknown user 'Zoë'\. For somebody new, give a history"):
        ready.recommend(user="Zoë")


# Histories from outside


def test_a_history_from_outside_counts_like_a_known_one(ready: Recommender, monkeypatch: pytest.MonkeyPatch) -> None:
    user = ready.histories.users[5]
    # Times enter the profile; a history from outside has none.
    monkeypatch.setattr(ready, "histories", replace(ready.histories, time=None))
    known = ready.recommend(user=user, k=20, explain=True)
    outside = ready.recommend(history=history_of(ready, user), k=20, explain=True)
    assert repr(replace(known, user=None)) == repr(outside)  # repr: NaN equals NaN
    assert outside.user is None


def test_the_order_of_a_history_counts(ready: Recommender) -> None:
    history = history_of(ready, ready.histories.users[5])
    assert ids(ready.recommend(history=history, k=K)) != ids(ready.recommend(history=history[::-1], k=K))
    assert ready.recommend(history=history).recent != ready.recommend(history=history[::-1]).recent


@pytest.mark.parametrize("length", [1, 2])
def test_a_short_history_is_enough(ready: Recommender, length: int) -> None:
    history = ready.catalogue.ids[:length]
    answer = ready.recommend(history=history, k=5, explain=True)
    assert len(set(ids(answer)) - set(history)) == 5
    assert answer.recent == tuple(ready.catalogue.lines[:length])


def test_an_item_may_stand_twice_in_a_history(ready: Recommender) -> None:
    one, two = ready.catalogue.ids[:2]
    shown = ids(ready.recommend(history=[one, two, one], k=1000))
    assert len(shown) == len(ready.catalogue.ids) - 2


@pytest.mark.parametrize("subtract", [False, True])
def test_somebody_new_gets_what_is_popular(
    ready: Recommender, fuse_by: Callable[[Fusion], None], subtract: bool
) -> None:
    fuse_by(Fusion(1.0, 2.0 * subtract, 2.0 * subtract, subtract))
    answer = ready.recommend(history=[], k=K, explain=True)
    popularity = np.bincount(ready.histories.item, minlength=len(ready.catalogue.ids))
    order = sorted(range(len(popularity)), key=lambda i: (-popularity[i], i))
    assert ids(answer) == [ready.catalogue.ids[i] for i in order[:K]]
    assert (answer.profile, answer.preference, answer.recent) == ("shows no taste yet", "shows no taste yet", ())
    assert {item.reason for item in answer.items} == {"Chosen by many users; no fact of it meets the known taste."}


def test_who_has_everything_gets_an_empty_list(ready: Recommender) -> None:
    assert ready.recommend(history=ready.catalogue.ids, k=5, explain=True).items == ()
    all_but_one = ready.recommend(history=ready.catalogue.ids[1:], k=5, explain=True)
    assert ids(all_but_one) == ready.catalogue.ids[:1]


def test_unknown_items_are_named_with_near_ones(ready: Recommender) -> None:
    with pytest.raises(UsageError, match=r"2 of 3 items are not in the .* \(first: 'i00011'; close: .*i0001.*\)"):
        ready.recommend(history=["i0001", "i00011", "nowhere"])
    with pytest.raises(UsageError, match=r"1 of 1 items are not in the catalogue \(first: '%%'\): correct the ids"):
        ready.recommend(history=["%%"])


@pytest.mark.parametrize("choice", [{}, {"user": "u001", "history": ["i0001"]}])
def test_neither_or_both_of_user_and_history_are_refused(ready: Recommender, choice: dict[str, object]) -> None:
    with pytest.raises(UsageError, match="exactly one of user"):
        ready.recommend(**choice)  # type: ignore[arg-type]


@pytest.mark.parametrize("k", [0, -3])
def test_a_list_has_at_least_one_place(ready: Recommender, k: int) -> None:
    with pytest.raises(UsageError, match=f"k must be at least 1, not {k}"):
        ready.recommend(history=[], k=k)


# Reasons


def test_reasons_cite_facts_of_the_item_and_events_of_the_history(ready: Recommender) -> None:
    place = {item_id: i for i, item_id in enumerate(ready.catalogue.ids)}
    cited = 0
    for user in ready.histories.users[:8]:
        history = history_of(ready, user)
        for item in ready.recommend(user=user, k=K, explain=True).items:
            assert item.reason
            assert item.reason_by in ("model", "evidence")
            assert set(item.facts) <= set(ready.catalogue.facts[place[item.item_id]])
            assert set(item.events) <= set(history)
            for event in item.events:
                if item.facts:
                    assert set(item.facts) & set(ready.catalogue.facts[place[event]])
            cited += len(item.events)
    assert cited > 20


def test_without_explain_no_reason_is_written(ready: Recommender, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("the model gave reasons")

    monkeypatch.setattr(recommender_module, "explain", refuse)
    for item in ready.recommend(user="u001").items:
        assert (item.reason, item.reason_by, item.facts, item.events) == (None, None, (), ())


# What it needs


def test_a_workspace_without_a_finished_run_is_refused(ingested: Path, tmp_path: Path) -> None:
    shutil.copytree(ingested, tmp_path / "ws")
    with pytest.raises(StoreError, match=rf"has no finished run: run `mllm-srec run {tmp_path / 'ws'}` first"):
        Recommender(Workspace.open(tmp_path / "ws"))


def test_it_writes_nothing(copied: Path) -> None:
    def content() -> dict[str, bytes]:
        return {str(path): path.read_bytes() for path in sorted(copied.rglob("*")) if path.is_file()}

    before = content()
    made = Recommender(Workspace.open(copied))
    made.recommend(user="u001", explain=True)
    made.recommend(history=["i0009"], k=50)
    assert content() == before


def test_the_adapter_of_the_run_is_on_the_model(finished: Path, ready: Recommender) -> None:
    assert ready.mllm.has_adapter
    assert ready.mllm.identity == read_manifest(finished / "runs/main")["model"]


def test_users_are_comprehended_by_the_model_as_it_was_loaded(
    ready: Recommender, monkeypatch: pytest.MonkeyPatch
) -> None:
    with ready.mllm.without_adapter():
        bare = ready.mllm.identity
    read_by = []
    comprehend = recommender_module.comprehend_history

    def watch(mllm: LocalMllm, *rest: Any, **named: Any) -> Any:
        read_by.append(mllm.identity)
        return comprehend(mllm, *rest, **named)

    monkeypatch.setattr(recommender_module, "comprehend_history", watch)
    ready.recommend(user="u001", k=1)
    ready.recommend(history=["i0001"], k=1)
    assert read_by == [bare, bare] != [ready.mllm.identity] * 2


def test_an_adapter_of_another_model_is_refused(finished: Path) -> None:
    config, right = Workspace.open(finished).config, Pipeline(Workspace.open(finished)).mllm
    other = tiny_mllm(seed=1)
    config = config.model_copy(update={"model": config.model.model_copy(update={"name": "other/model"})})
    told = rf"another model, \S+/tiny \({right.identity}\), than other/model \({other.identity}\): run `mllm-srec train"
    with pytest.raises(StoreError, match=told):
        attach_adapter(other, finished / "runs/main", config)
    assert not other.has_adapter
    attach_adapter(right, finished / "runs/main", config)
    assert right.has_adapter


def test_a_model_that_is_given_is_used_as_it_is(finished: Path, ready: Recommender) -> None:
    workspace = Workspace.open(finished)
    bare = Recommender(workspace, Pipeline(workspace).mllm)
    assert not bare.mllm.has_adapter
    one, two = bare.recommend(user="u001", k=K), ready.recommend(user="u001", k=K)
    assert sorted(ids(one)) == sorted(ids(two))
    assert {i.item_id: i.odds for i in one.items} != {i.item_id: i.odds for i in two.items}


def test_a_run_without_adapter_is_served_by_the_model_alone(copied: Path) -> None:
    workspace = Workspace.open(copied)
    workspace.save_config(load_config(copied / "config.yaml", overrides=("training.rows=0",)))
    shutil.rmtree(copied / "runs/main/adapter")
    Pipeline(workspace).run()
    made = Recommender(Workspace.open(copied))
    assert not made.mllm.has_adapter
    assert len(made.recommend(user="u001", k=4, explain=True).items) == 4


def test_a_flipped_byte_of_the_adapter_is_refused_and_mended_by_run(copied: Path) -> None:
    manifest = read_manifest(copied / "runs/main")
    assert {"metrics.json", "choices.json", "adapter/adapter_model.safetensors"} <= manifest["files"].keys()
    Recommender(Workspace.open(copied))
    file = copied / "runs/main/adapter/adapter_model.safetensors"
    data = bytearray(file.read_bytes())
    data[-5] ^= 1
    file.write_bytes(data)
    with pytest.raises(StoreError, match=r"adapter_model.safetensors is damaged or was changed .*: run `mllm-srec run"):
        Recommender(Workspace.open(copied))
    with pytest.raises(StoreError, match=r"adapter is missing or was trained on other"):
        Pipeline(Workspace.open(copied)).evaluate()
    figures = json.loads((copied / "runs/main/metrics.json").read_text())
    assert Pipeline(Workspace.open(copied)).run() == figures
    assert read_manifest(copied / "runs/main")["files"] == manifest["files"]


def test_changed_figures_or_choices_of_a_run_are_refused(copied: Path) -> None:
    file = copied / "runs/main/choices.json"
    values = json.loads(file.read_text())
    file.write_text(json.dumps(values | {"retrieval": values["retrieval"] | {"content": 9.0}}))
    with pytest.raises(StoreError, match=r"choices.json is damaged or was changed after .*manifest.json was written"):
        Recommender(Workspace.open(copied))


@pytest.mark.parametrize(
    "content",
    ["{", '{"retrieval": {}}', "[]", '{"retrieval": {"odd": 1}, "retriever_epochs": []}', "\x00"],
)
def test_a_damaged_choice_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "choices.json").write_text(content)
    with pytest.raises(StoreError, match=r"choices.json is damaged \(.*\): run `mllm-srec retrieve WS` again"):
        Choices.read(tmp_path)


def test_choices_come_back_as_they_were_written(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"choices.json is missing: run `mllm-srec retrieve WS` first"):
        Choices.read(tmp_path)
    choices = Choices(Mix(0.25, 1.0, 0.0, 20), "abc", ((5, 0.125), (20, 0.25)), Fusion(1.0, 0.5, 2.0, True))
    (tmp_path / "choices.json").write_text(choices.dump())
    assert Choices.read(tmp_path) == choices


def test_scores_that_are_no_numbers_are_refused(ready: Recommender, monkeypatch: pytest.MonkeyPatch) -> None:
    def nan(self: LocalMllm, requests: list[object]) -> list[np.ndarray]:
        return [np.full((K, 2), np.nan, dtype=np.float32) for _ in requests]

    monkeypatch.setattr(LocalMllm, "score", nan)
    monkeypatch.setattr(recommender_module, "comprehend_history", lambda *_, **__: NOBODY)
    with pytest.raises(ModelError, match=r"not finite: try model.dtype=float32"):
        ready.recommend(user="u001")
