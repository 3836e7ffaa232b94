"""Honesty checks and disturbed pictures in the report: what was measured, in words, where there is anything."""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_report import Page

from hand_made_run import make_run
from mllm_srec.evaluation import honesty, robustness
from mllm_srec.evaluation.report import CHANGES
from mllm_srec.evaluation.report import honesty as rows_of
from read_lists import ITEMS, fake, likes, read_lists

HISTORIES, LISTS = [[0, 1, 2, 3], [5, 0, 1, 4]], [[6, 0, 1, 2, 3, 4, 5, 7], [7, 0, 1, 2, 3, 4, 5, 6]]


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a model that likes red pictures is found to do. Read only."""
    read = read_lists(tmp_path_factory.mktemp("read"), fake(likes("red")), HISTORIES, LISTS)
    checks = honesty.measure(*read.given, np.arange(ITEMS))
    return {"honesty": checks, "robustness": robustness.measure(*read.given)}


def test_the_page_tells_what_was_measured(tmp_path: Path, measured: dict[str, Any]) -> None:
    run = make_run(tmp_path, **measured)
    page = Page(run.write())
    assert page.open == [] and page.wrong == []
    ids = [str(attributes["id"]) for _, attributes in page.tags if "id" in attributes]
    assert {"honesty", "robustness"} <= set(ids) and len(ids) == len(set(ids))
    assert {"#honesty", "#robustness"} <= {str(link["href"]) for link in page.all("a")}
    missing = measured["honesty"]["pictures_missing"]
    assert missing["gain"] < -0.1
    said = f"difference −{-missing['gain']:.3f} [−{-missing['gain_low']:.3f}, −{-missing['gain_high']:.3f}] p = "
    for text in (
        "Honesty checks Do the lists hang on what they are said to hang on? 2 of the 2 lists",
        f"What pictures showed left out of the items' texts {said}",
        "Prompts that changed: 2 of 2.",
        "Candidates in another order largest change of a score 0 (difference 0.000 [0.000, 0.000])",
        "No score may move by more than 0.001, which is rounding; this is rounding.",
        "The windows' summaries are made by rule on both sides",
        "Popularity and likelihood rank correlation",
        "Disturbed pictures A share of the 8 pictures that 2 lists show",
        "swapped 10 % 0 not measured; pictures that would be touched: 1",
        "noised 50 % 4 ",
    ):
        assert text in page.text, text
    card = (run.folder / "MODEL_CARD.md").read_text(encoding="utf-8")
    assert card.count("\n- ", card.index("## Honesty checks"), card.index("## Licence")) == 2 + len(CHANGES) + 4
    assert "What pictures showed exchanged between items: difference" in card


def test_without_checks_nothing_is_said_of_them(tmp_path: Path) -> None:
    for number, found in enumerate(({}, {"honesty": {}, "robustness": {}})):
        run = make_run(tmp_path / str(number), **found)
        page, card = run.write(), (run.folder / "MODEL_CARD.md").read_text(encoding="utf-8")
        assert "honesty" not in page.lower() and "Disturbed" not in page and "Honesty" not in card
    assert rows_of({}) == ()


def test_what_was_left_out_and_what_fails_is_said(tmp_path: Path, measured: dict[str, Any]) -> None:
    found = copy.deepcopy(measured["honesty"])
    found["preference_of_another"] = {"left_out": "the lists are of one user"}
    found["popularity"]["odds"] = {"left_out": "the scores are the same"}
    found["order_shuffled"] |= {"largest": 0.25, "moved": True}
    rows = {row.check: row for row in rows_of(found)}
    person = rows["Profile and preference of another person"]
    assert (person.figure, person.interval, person.reading) == ("not checked", "", "The lists are of one user.")
    assert rows["Popularity and odds"].reading == "The scores are the same."
    order = rows["Candidates in another order"]
    assert order.figure.endswith("0.25") and "more than rounding: the order decides" in order.reading
    assert "not checked" in Page(make_run(tmp_path, honesty=found).write()).text
