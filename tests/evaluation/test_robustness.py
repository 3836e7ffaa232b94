"""Robustness: disturbed pictures cost what they must, invented facts are counted, and nothing of it is stored."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mllm_srec.evaluation.honesty import derangement
from mllm_srec.evaluation.robustness import DISTURBANCES, SHARES, UNSUPPORTED, contradicts, measure, unsupported
from mllm_srec.items import ITEM_TEXTS
from mllm_srec.mllm.base import PartialFailure
from mllm_srec.prompts import items as prompts
from mllm_srec.ranking import PRIORS, SCORES, Candidates, Fusion
from read_lists import COLOURS, ITEMS, ODDS, SAID, Read, fake, likes, read_lists
from tiny_models import tiny_mllm

HISTORIES = [[0, 1, 2, 3], [5, 0, 1, 4]]
LISTS = [[6, 0, 1, 2, 3, 4, 5, 7], [7, 0, 1, 2, 3, 4, 5, 6]]
"""All items, so that half of the pictures are four, three tenths two, and a tenth one."""
ORDER = np.random.default_rng(0).permutation(ITEMS)
"""In which items are touched."""
NOTHING = {"seen": 0, "unsupported": 0, "rate": None}


def check(read: Read) -> dict[tuple[float, str], dict[str, Any]]:
    """The rows by share and kind."""
    found = measure(*read.given)
    assert json.loads(json.dumps(found)) == found
    assert (found["unsupported"], found["items_with_picture"], found["lists"]) == (UNSUPPORTED, ITEMS, 2)
    assert [(row["share"], row["kind"]) for row in found["disturbed"]] == [(s, k) for s in SHARES for k in DISTURBANCES]
    return {(row["share"], row["kind"]): row for row in found["disturbed"]}


def ndcg(colours: list[str], row: list[int]) -> float:
    """By hand: red ones first, of equal colour the lower number."""
    order = sorted(row, key=lambda n: (colours[n] != "red", n))
    return float(1 / np.log2(order.index(row[0]) + 2))


def test_missing_and_swapped_pictures_by_hand(tmp_path: Path) -> None:
    rows = check(read_lists(tmp_path, fake(likes("red")), HISTORIES, LISTS))
    before = np.mean([ndcg(COLOURS, row) for row in LISTS])
    for share, count in ((0.1, 1), (0.3, 2), (0.5, 4)):
        touched = ORDER[:count]
        missing, swapped = list(COLOURS), list(COLOURS)
        for item in touched:
            missing[item] = ""
        if count > 1:
            for item, giver in zip(touched, touched[derangement(count, np.random.default_rng(0))], strict=True):
                swapped[item] = COLOURS[giver]
        for kind, colours in (("missing", missing), ("swapped", swapped)):
            row = rows[share, kind]
            if kind == "swapped" and count == 1:
                assert row == {
                    "share": share,
                    "kind": kind,
                    "items": 0,
                    "left_out": "pictures that would be touched: 1",
                }
                continue
            after = np.mean([ndcg(colours, of) for of in LISTS])
            assert (row["items"], row["failed"]) == (count, 0)
            assert row["before"] == pytest.approx(before) and row["after"] == pytest.approx(after)
            assert row["gain"] == pytest.approx(after - before)
            wrong = sum(one != other for one, other in zip(colours, COLOURS, strict=True))
            assert row["facts_before"] == {"seen": count, "unsupported": 0, "rate": 0.0}
            told = {"seen": count, "unsupported": wrong, "rate": wrong / count}
            assert row["facts_after"] == (NOTHING if kind == "missing" else told)
            assert row["lists_changed"] == 2 * (wrong > 0)
    assert rows[0.5, "missing"]["gain"] < 0, "one of the red ones is among the four"


def test_a_model_that_sees_things_in_noise_is_found_out(tmp_path: Path) -> None:
    invents = fake(likes("red"))
    invents.sees = {**invents.sees, SAID: "green"}  # of pictures that it does not know
    rows = check(read_lists(tmp_path, invents, HISTORIES, LISTS))
    sound = check(read_lists(tmp_path / "sound", fake(likes("red")), HISTORIES, LISTS))
    for share, count in ((0.1, 1), (0.3, 2), (0.5, 4)):
        assert rows[share, "noised"]["items"] == count
        assert rows[share, "noised"]["facts_after"] == {"seen": count, "unsupported": count, "rate": 1.0}
        assert sound[share, "noised"]["facts_after"] == NOTHING
        assert sound[share, "noised"]["after"] == sound[share, "missing"]["after"]


def test_nothing_is_stored_and_only_what_is_touched_is_described(tmp_path: Path) -> None:
    mllm = fake(likes("red"))
    read = read_lists(tmp_path, mllm, HISTORIES, LISTS, fusion=replace(ODDS, subtract_empty=True))
    tables = {table.name: read.workspace.rows(table) for table in (ITEM_TEXTS, SCORES, PRIORS)}
    asked, adapters = len(mllm.asked), mllm.taken_off
    first = measure(*read.given)
    for table in (ITEM_TEXTS, SCORES, PRIORS):
        assert read.workspace.rows(table).equals(tables[table.name]), table.name
    pictures = {prefix.parts for prefix, _ in mllm.asked[asked:] if len(prefix.parts) > 1}
    # Noised ones are new pictures, swapped ones among those that are touched; missing ones are not asked about.
    assert len(pictures) == 4 + 4
    assert mllm.taken_off == adapters + 8, "described as the items were at first, without the adapter"
    assert measure(*read.given) == first


def test_what_the_model_fails_on_is_counted(tmp_path: Path) -> None:
    mllm = fake(likes("red"))
    read = read_lists(tmp_path, mllm, HISTORIES, LISTS)
    ask = mllm.ask

    def fail(prefixes: Any, questions: Any, tokens: int) -> Any:
        told: list[Any] = ask(prefixes, questions, tokens)
        if len(prefixes[0].parts) == 1:
            return told
        told[0] = None
        raise PartialFailure(told, {0: "the server is gone"})

    mllm.ask = fail  # type: ignore[method-assign]
    rows = check(read)
    assert rows[0.5, "noised"]["failed"] == rows[0.5, "swapped"]["failed"] == 1
    assert rows[0.5, "missing"]["failed"] == 0


def test_without_lists_there_is_nothing_to_disturb(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    read = read_lists(tmp_path, fake(likes("red")), HISTORIES, LISTS)
    of = read.lists.read
    none = Candidates(of.items[:0], of.retrieval[:0], of.odds[:0], of.loglik[:0])
    lists = replace(read.lists, targets=read.lists.targets.take(np.arange(0)), states=[], read=none)
    assert measure(*replace(read, lists=lists).given) == {}
    assert "no test list holds its target" in capsys.readouterr().err


def test_a_shop_without_pictures_says_so(tmp_path: Path) -> None:
    read = read_lists(tmp_path, fake(likes("red")), HISTORIES, LISTS, pictures=False)
    found = measure(*read.given)
    assert found["items_with_picture"] == 0
    assert {row["left_out"] for row in found["disturbed"]} == {"pictures that would be touched: 0"}


# What counts as unsupported


def fact(attribute: str, value: str, origin: str = "picture", contradicted: bool = False) -> dict[str, Any]:
    return {"attribute": attribute, "value": value, "origin": origin, "contradicted": contradicted}


RED = [fact("colour", "red"), fact("kind", "hat")]


@pytest.mark.parametrize(
    ("after", "counted"),
    [
        (RED, (0, 2)),
        ([fact("colour", "blue"), fact("kind", "mug")], (2, 2)),
        ([fact("colour", "orange")], (0, 1)),  # near red
        ([fact("colour", "blue", "both")], (1, 1)),  # the text knows it, but the picture showed red
        ([fact("colour", "blue", "text")], (0, 0)),  # nobody says that the picture shows it
        ([fact("pattern", "striped", contradicted=True)], (1, 1)),  # the text names another
        ([fact("pattern", "striped")], (0, 1)),  # nothing is known against it
        ([fact("kind", "woolly thing")], (0, 1)),  # no vocabulary knows it: it may be a hat
        ([], (0, 0)),
    ],
)
def test_unsupported_facts_by_hand(after: list[dict[str, Any]], counted: tuple[int, int]) -> None:
    assert unsupported(RED, after) == counted


def test_only_a_picture_can_be_contradicted_by_a_picture() -> None:
    assert unsupported([fact("colour", "red", "text")], [fact("colour", "blue")]) == (0, 1)
    assert unsupported([fact("colour", "red", "text")], [fact("colour", "blue", contradicted=True)]) == (1, 1)


def test_every_question_can_be_compared_where_its_options_are_known() -> None:
    for name, question in prompts.QUESTIONS.items():
        assert not contradicts(name, "something strange", "something else")
        if question.options:
            one, other = question.options[0], question.options[-1]
            assert contradicts(name, one, other) and not contradicts(name, one, one)
    assert contradicts("kind", "hat", "mug") and not contradicts("scene", "hat", "mug")
    assert not contradicts("colour", "red", "")


# A real model, if a tiny one


def test_a_tiny_model_with_pictures_in_its_prompts(tmp_path: Path) -> None:
    fusion = Fusion(1.0, 1.0, 1.0, True)
    rows = check(read_lists(tmp_path, tiny_mllm(), HISTORIES, LISTS, "ranking.picture=true", fusion=fusion))
    assert all(row["lists_changed"] == 2 for row in rows.values() if row["items"])
    assert rows[0.5, "missing"]["facts_after"]["seen"] == 0
