"""Honesty checks: a model that uses one thing alone is found out by the check for it, by a known amount."""

import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from hand_made_run import AdaptedMllm
from mllm_srec.data.split import Targets
from mllm_srec.evaluation.honesty import ROUNDING, ReadLists, derangement, measure, retold, spearman
from mllm_srec.items import ITEM_TEXTS
from mllm_srec.ranking import PRIORS, SCORES, Candidates, Fusion
from mllm_srec.user_states import NOBODY
from read_lists import COLOURS, ITEMS, ODDS, Read, fake, likes, number_in, read_lists, sha
from tiny_models import tiny_mllm

HISTORIES, LISTS = [[0, 1, 2, 3], [5, 0, 1, 4]], [[6, 0, 1], [7, 2, 3]]
"""User 0 ends with item 3 and goes on to item 6, user 1 with item 4 to 7: the red ones, of the highest numbers."""
LAST = 0.5
"""NDCG of the last of three: 1 / log2(4)."""
TIED = (1 + 1 / math.log2(3) + 0.5) / 3
"""NDCG of one of three that are tied."""
POPULARITY = np.array([7, 3, 2, 1, 1, 1, 5, 0])
CHANGES = ("order_shuffled", "pictures_missing", "pictures_swapped", "history_shuffled", "preference_of_another")


def check(read: Read, scope: str = "") -> dict[str, Any]:
    """As metrics.json would hold it, to nine digits: sums leave a rounding."""
    text = json.dumps(measure(*read.given, POPULARITY, scope))
    found: dict[str, Any] = json.loads(text, parse_float=lambda digits: round(float(digits), 9) + 0.0)
    return found


def moved(found: dict[str, Any]) -> dict[str, float]:
    """The changes that make a difference."""
    return {name: found[name]["gain"] for name in CHANGES if found[name].get("gain")}


def by_newest(prefix: str, candidate: str) -> float:
    """Goes by the newest item of the short list: three further is wanted."""
    recent = re.findall(r"^- thing (\d)", prefix, re.MULTILINE)
    wanted = int(recent[-1]) + 3 if recent else -9
    return 5.0 * (number_in(candidate) == wanted) - number_in(candidate) / 100


def by_preference(prefix: str, candidate: str) -> float:
    """The same by the newest choice told in full."""
    newest = re.search(r"Newest choice: thing (\d)", prefix)
    wanted = int(newest[1]) + 3 if newest else -9
    return 5.0 * (number_in(candidate) == wanted) - number_in(candidate) / 100


# One thing at a time


def test_a_model_that_reads_nothing_but_titles_is_moved_by_nothing(tmp_path: Path) -> None:
    found = check(read_lists(tmp_path, fake(likes("thing 6")), HISTORIES, LISTS))
    assert moved(found) == {}
    assert found["ndcg"] == {"mean": 0.75, "low": 0.5, "high": 1.0}
    assert (found["lists"], found["lists_held"], found["people"]) == (2, 2, 2)
    assert found["pictures_missing"]["lists_changed"] == 2, "the prompts changed all the same"


def test_what_pictures_are_worth(tmp_path: Path) -> None:
    found = check(read_lists(tmp_path, fake(likes("red")), HISTORIES, LISTS))
    missing = found["pictures_missing"]
    assert (missing["before"], missing["after"], missing["lists_changed"]) == (1.0, LAST, 2)
    assert (missing["gain"], missing["gain_low"], missing["gain_high"]) == (-0.5, -0.5, -0.5)
    giver = derangement(ITEMS, np.random.default_rng(0))
    after = []
    for row in LISTS:
        red = [COLOURS[giver[n]] == "red" for n in row]
        above = sum(red[1:]) if red[0] else 2  # of equal colour, low numbers stand first
        after.append(1 / math.log2(above + 2))
    assert found["pictures_swapped"]["after"] == pytest.approx(np.mean(after))
    assert set(moved(found)) <= {"pictures_missing", "pictures_swapped"}
    assert "note" not in missing


def test_what_the_order_of_the_history_is_worth(tmp_path: Path) -> None:
    found = check(read_lists(tmp_path, fake(by_newest), HISTORIES, LISTS))
    generator = np.random.default_rng(0)
    stays = [generator.permutation(4)[-1] == 3 for _ in HISTORIES]
    assert found["history_shuffled"]["after"] == np.mean([1.0 if same else LAST for same in stays])
    assert found["history_shuffled"]["before"] == 1.0 and not all(stays)
    assert moved(found) == {"history_shuffled": np.mean(stays) / 2 - 0.5}
    assert "summaries are made by rule" in found["history_shuffled"]["note"]


def test_a_history_of_one_event_has_no_order(tmp_path: Path) -> None:
    found = check(read_lists(tmp_path, fake(by_newest), [[3], [4]], LISTS, "users.summary=compose"))
    shuffled = found["history_shuffled"]
    assert (shuffled["lists_changed"], shuffled["gain"], "note" in shuffled) == (0, 0.0, False)


def test_what_the_own_preference_is_worth(tmp_path: Path) -> None:
    mllm = fake(by_preference)
    read = read_lists(tmp_path, mllm, HISTORIES, [[6, 7, 0], [7, 6, 0]])
    found = check(read)
    assert found["preference_of_another"]["gain"] == -0.5
    assert (found["preference_of_another"]["before"], found["preference_of_another"]["after"]) == (1.0, LAST)
    told = [str(request.prefix.parts[0]) for request in mllm.scored]
    both = [text for text in told if "Newest choice: thing 4" in text and "- thing 3" in text.split("oldest first")[1]]
    assert len(both) == 1, "own recent items under the other's preference"
    assert read.lists.states[0].newest == 3


def test_a_model_that_goes_by_the_place_is_found_out(tmp_path: Path) -> None:
    class ByPlace(AdaptedMllm):
        def score(self, requests: Any) -> list[np.ndarray]:
            return [scores + np.arange(len(scores))[:, None] for scores in super().score(requests)]

    found = check(read_lists(tmp_path, ByPlace(odds=likes("red"), likelihood=lambda *_: 0.0), HISTORIES, LISTS))
    assert found["order_shuffled"]["moved"] and 1 <= found["order_shuffled"]["largest"] <= 2
    honest = check(read_lists(tmp_path / "honest", fake(likes("red")), HISTORIES, LISTS))["order_shuffled"]
    assert (honest["largest"], honest["moved"], honest["gain"]) == (0.0, False, 0.0)


@pytest.mark.parametrize(
    ("setting", "kind"),
    [("model.dtype=float32", "float32"), ("model.dtype=bfloat16", "bfloat16"), ("model.server=http://h:1", "bfloat16")],
)
def test_rounding_is_what_the_run_computes_in(tmp_path: Path, setting: str, kind: str) -> None:
    found = check(read_lists(tmp_path, fake(likes("red")), HISTORIES, LISTS, setting))
    assert found["order_shuffled"]["rounding"] == ROUNDING[kind]


def test_what_is_said_before_anything_is_read(tmp_path: Path) -> None:
    def odds(prefix: str, candidate: str) -> float:
        empty = candidate == "item without text." and "Last choices" not in prefix
        return 1.5 if empty else float(number_in(candidate))

    found = check(read_lists(tmp_path, fake(odds), HISTORIES, LISTS))["label_prior"]
    assert found["empty"] == 1.5 and found["chance"] == pytest.approx(1 / (1 + math.exp(-1.5)))
    assert found["mean"] == pytest.approx((6 + 0 + 1 + 7 + 2 + 3) / 6)
    assert found["deviation"] == pytest.approx(np.std([6, 0, 1, 7, 2, 3]))


def test_popularity_of_what_each_score_puts_first(tmp_path: Path) -> None:
    """Popularity of the lists: 5, 7, 3 and 0, 2, 1; retrieval has them in the order of the lists."""
    read = read_lists(tmp_path, fake(likes("red")), HISTORIES, LISTS)
    found = check(read)["popularity"]
    # Ranks 2 3 1 and 1 3 2 against 3 2 1: 1 - 6 (1 + 1) / 24 and 1 - 6 (4 + 1 + 1) / 24.
    assert found["retrieval"] == {"mean": 0.0, "low": -0.5, "high": 0.5, "lists": 2}
    assert found["odds"]["mean"] == found["fused"]["mean"] == 0.0
    read.lists.read.odds[1] = 4.0
    assert measure(*read.given, POPULARITY, "other")["popularity"]["odds"]["lists"] == 1
    flat = measure(*read.given, np.ones(ITEMS))["popularity"]
    assert all("left_out" in row for row in flat.values())


# What cannot be checked


def test_without_lists_there_is_nothing_to_check(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    read = read_lists(tmp_path, fake(likes("red")), HISTORIES, LISTS)
    of = read.lists.read
    none = Candidates(of.items[:0], of.retrieval[:0], of.odds[:0], of.loglik[:0])
    lists = replace(read.lists, targets=read.lists.targets.take(np.arange(0)), states=[], read=none)
    assert check(replace(read, lists=lists)) == {}
    assert "no test list holds its target" in capsys.readouterr().err


def test_one_user_and_no_pictures_are_said(tmp_path: Path) -> None:
    read = read_lists(tmp_path, fake(likes("red")), HISTORIES[:1], LISTS[:1], pictures=False)
    found = check(read)
    assert found["preference_of_another"] == {"left_out": "the lists are of one user"}
    reason = "fewer than two items have a picture that can be read"
    assert found["pictures_missing"] == found["pictures_swapped"] == {"left_out": reason}
    assert found["order_shuffled"]["gain"] == 0.0


@pytest.mark.parametrize("subtract", [False, True])
def test_items_that_only_a_picture_tells_apart_are_tied_without_it(tmp_path: Path, subtract: bool) -> None:
    mllm = fake(lambda prefix, candidate: 5.0 * ("red" in candidate) * bool("Last choices" in prefix) + len(candidate))
    titles = dict.fromkeys(range(ITEMS), "")
    fusion = replace(ODDS, subtract_empty=subtract)
    found = check(read_lists(tmp_path, mllm, HISTORIES, LISTS, titles=titles, fusion=fusion))
    assert found["pictures_missing"]["before"] == 1.0
    assert found["pictures_missing"]["after"] == pytest.approx(TIED)


def test_the_empty_user_reads_the_changed_texts(tmp_path: Path) -> None:
    """Red is liked by nobody and by everybody alike: subtracted, pictures are worth nothing."""
    subtracting = replace(ODDS, subtract_empty=True)

    def odds(prefix: str, candidate: str) -> float:
        own = -number_in(candidate) if "Last choices" in prefix else 0.0
        return own + 100.0 * ("red" in candidate)

    found = check(read_lists(tmp_path, fake(odds), HISTORIES, LISTS, fusion=subtracting))
    assert found["pictures_missing"]["lists_changed"] == 2
    assert moved(found) == {} and found["ndcg"]["mean"] == LAST


def test_descriptions_by_the_model_are_compared_with_such_by_rule_on_both_sides(tmp_path: Path) -> None:
    mllm = fake(likes("red"), say=lambda prompt: "A thing.")
    read = read_lists(tmp_path, mllm, HISTORIES, LISTS, "items.fusion=generate", "users.summary=compose")
    assert set(read.workspace.rows(ITEM_TEXTS)["fused_by"]) == {"model"}
    found = check(read)
    assert found["ndcg"]["mean"] == LAST
    missing = found["pictures_missing"]
    assert (missing["before"], missing["after"]) == (1.0, LAST)
    assert missing["note"] == found["pictures_swapped"]["note"] and "made by rule on both sides" in missing["note"]


# Stored once


def test_a_second_time_nothing_is_asked_and_a_run_beside_has_readings_of_its_own(tmp_path: Path) -> None:
    read = read_lists(tmp_path, fake(likes("red")), HISTORIES, LISTS, fusion=Fusion(1.0, 1.0, 0.5, True))
    before = {json.loads(key)[0] for key in read.workspace.rows(SCORES)["key"]}
    first = check(read)
    calls = read.mllm.calls()
    assert check(read) == first and read.mllm.calls() == calls
    labels = {json.loads(key)[0] for key in read.workspace.rows(SCORES)["key"]} - before
    assert labels and all(label.startswith("honesty: ") for label in labels)
    stored = read.workspace.rows(PRIORS).filter(read.workspace.rows(PRIORS)["key"] == "i6")
    assert check(read, "beside") == first and read.mllm.calls() > calls
    assert read.workspace.rows(PRIORS).filter(read.workspace.rows(PRIORS)["key"] == "i6").equals(stored)


def test_lists_that_stay_the_same_are_not_read_again(tmp_path: Path) -> None:
    """Prompts that tell titles alone: no picture changes them."""
    read = read_lists(tmp_path, fake(likes("red")), HISTORIES, LISTS, "ranking.item=title", "ranking.picture=false")
    found = check(read)
    assert (found["pictures_missing"]["lists_changed"], found["pictures_swapped"]["lists_changed"]) == (0, 0)
    assert not any("pictures" in key for key in read.workspace.rows(SCORES)["key"])


def test_a_sample_is_seeded_and_has_a_list_per_user_and_moment() -> None:
    count = 100
    user = np.repeat(np.arange(count // 2), 2)
    end = np.where(np.arange(count) < 10, 4, 4 + np.arange(count) % 2)  # the first ten are pairs tied in time
    shape = (count, 3)
    values = np.arange(count, dtype=np.float32)[:, None] * np.ones(3, np.float32)
    read = Candidates(np.zeros(shape, np.int32), values, values, values)
    lists = ReadLists(Targets(user, end, end), [replace(NOBODY, end=n) for n in range(count)], read, values, ODDS)
    drawn = lists.sample(40, 3)
    rows = [state.end for state in drawn.states]
    assert len(rows) == 40 and rows == sorted(set(rows))
    assert drawn.read.odds[:, 0].tolist() == drawn.read.loglik[:, 0].tolist() == drawn.read.retrieval[:, 0].tolist()
    assert drawn.read.odds[:, 0].astype(int).tolist() == rows
    assert drawn.targets.user.tolist() == user[rows].tolist()
    assert [state.end for state in lists.sample(40, 3).states] == rows
    assert [state.end for state in lists.sample(40, 4).states] != rows
    every = lists.sample(1000, 0)
    assert len(every.targets) == 95 and len(set(zip(every.targets.user, every.targets.end, strict=True))) == 95


# Texts told again


def test_told_with_their_own_pictures_items_read_as_they_are(tmp_path: Path) -> None:
    """Texts that agree, disagree, name a near shade, say nothing."""
    titles = {0: "navy hat", 1: "red hat", 2: "blue thing", 3: "striped shirt", 4: ""}
    colours = ["black", "blue", "blue", "green", "red", "blue", "red", "red"]
    read = read_lists(tmp_path, fake(likes("red"), colours), HISTORIES, LISTS, titles=titles)
    again = retold(read.workspace, {item: item for item in read.catalogue.ids})
    for part in ("candidates", "looks", "facts", "pictures", "lines", "embedding_texts", "spelling"):
        assert getattr(again, part) == getattr(read.catalogue, part), part
    assert again.candidates[0] == "navy hat. Picture: blue.", "the shade's name is the text's"
    assert again.looks[1] == "", "what the text contradicts is not claimed"


def test_without_pictures_facts_come_from_texts_alone(tmp_path: Path) -> None:
    read = read_lists(tmp_path, fake(likes("red")), HISTORIES, LISTS, titles={2: "blue thing"})
    blind = retold(read.workspace, dict.fromkeys(read.catalogue.ids))
    assert (blind.pictures, blind.looks) == ([None] * ITEMS, [""] * ITEMS)
    assert blind.facts == [
        {fact: "text" for fact, origin in of_item.items() if origin != "picture"} for of_item in read.catalogue.facts
    ]
    assert blind.facts[2] == {"blue": "text"} and read.catalogue.facts[2]["blue"] == "both"
    assert blind.candidates[6] == "thing 6." and read.catalogue.candidates[6] == "thing 6. Picture: red."
    swapped = retold(read.workspace, {"i2": "i6", "i6": "i2"})
    assert swapped.pictures[2] == sha(6) and swapped.candidates[6] == "thing 6. Picture: blue."
    assert swapped.looks[2] == "", "red is not claimed of what its text calls blue"
    assert swapped.candidates[0] == "thing 0.", "who is not named keeps no picture's words"


# Parts


@given(st.integers(2, 30), st.integers(0, 1000))
def test_nobody_keeps_his_own(count: int, seed: int) -> None:
    giver = derangement(count, np.random.default_rng(seed))
    assert sorted(giver) == list(range(count)) and not (giver == np.arange(count)).any()


@pytest.mark.parametrize("count", [0, 1])
def test_one_alone_cannot_exchange(count: int) -> None:
    with pytest.raises(ValueError, match=f"{count} cannot be exchanged"):
        derangement(count, np.random.default_rng(0))


def test_rank_correlation_by_hand() -> None:
    scores = np.array([[1.0, 2, 3], [1, 1, 2], [5, 5, 5], [1, 2, 3]])
    popularity = np.array([[3, 2, 1], [1, 2, 3], [1, 2, 3], [4, 4, 4]])
    assert spearman(scores, popularity) == pytest.approx([-1, math.sqrt(3) / 2, np.nan, np.nan], nan_ok=True)
    # Ranks 1.5 1.5 3 4 against 1 2 3 4: 4.5 / sqrt(4.5 * 5).
    assert spearman(np.array([[7, 7, 8, 9]]), np.array([[1, 2, 3, 4]])) == pytest.approx(math.sqrt(0.9))


@settings(max_examples=50)
@given(arrays(np.int8, (2, 3, 6)))
def test_rank_correlation_hangs_on_order_alone(values: np.ndarray) -> None:
    one, two = values.astype(np.float64)
    found = spearman(one, two)
    np.testing.assert_allclose(spearman(np.exp(one / 50), two**3), found, atol=1e-12)
    np.testing.assert_allclose(spearman(-one, two), -found, atol=1e-12)
    assert (np.abs(found[~np.isnan(found)]) <= 1 + 1e-12).all()


# A real model, if a tiny one


def test_a_tiny_model_with_pictures_in_its_prompts(tmp_path: Path) -> None:
    read = read_lists(
        tmp_path, tiny_mllm(), HISTORIES, LISTS, "ranking.picture=true", fusion=Fusion(1.0, 1.0, 1.0, True)
    )
    found = check(read)
    assert not found["order_shuffled"]["moved"] and found["order_shuffled"]["rounding"] == 1e-3
    assert found["pictures_missing"]["lists_changed"] == found["pictures_swapped"]["lists_changed"] == 2
    assert all(-1 <= found[name]["gain"] <= 1 for name in CHANGES)
    assert check(read) == found
