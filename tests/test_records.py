"""Instruction records: a prompt holds all that is known and nothing of the answer; reasons cite what is there."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fakes import make_catalogue, make_state, shown
from mllm_srec.errors import MllmSrecError
from mllm_srec.prompts import ranking as prompts
from mllm_srec.prompts import users as user_prompts
from mllm_srec.records import (
    EVENTS_SHOWN,
    FACTS_SHOWN,
    Evidence,
    explain_questions,
    find_evidence,
    ranking_request,
    rationale,
    training_record,
)
from mllm_srec.tastes import Movement
from mllm_srec.user_states import NOBODY

CATALOGUE = make_catalogue(
    a="red shoe", b="red hat", c="red hat wool", d="blue shoe", e="blue", f="red hat wool warm shoe", g=""
)
IDS = "".join(CATALOGUE.ids)
STATE = make_state("hat", "red", "wool", "warm")


def place(items: str) -> np.ndarray:
    return np.array([IDS.index(item) for item in items], dtype=np.int32)


# The prompt


def test_the_prompt_holds_profile_preference_recent_items_candidate_and_question() -> None:
    request = ranking_request(STATE, CATALOGUE, place("df"))
    assert request.prefix.system == prompts.SYSTEM
    recent = ["a the title", "b the title"]
    assert request.prefix.parts == (prompts.prefix(STATE.profile, STATE.preference, recent),)
    assert request.candidates == ("d the title. blue shoe.", "f the title. red hat wool warm shoe.")
    assert request.question == prompts.QUESTION


def test_two_choices_are_told_in_full_and_none_twice() -> None:
    def told(typical: int | None, newest: int | None) -> str:
        state = replace(STATE, recent=(), typical=typical, newest=newest)
        return shown(ranking_request(state, CATALOGUE, [3]).prefix)

    plain, d, f = told(None, None), CATALOGUE.candidates[3], CATALOGUE.candidates[5]
    assert "choice:" not in plain
    both = told(3, 5)
    assert both.index(f"Typical choice: {d}\n") < both.index(f"Newest choice: {f}\n")
    assert told(5, 5) == told(None, 5) == plain.replace("Will the", f"Newest choice: {f}\nWill the")
    assert f"Typical choice: {d}" in told(3, None)


def test_the_prompt_tells_how_long_ago_the_last_choice_was_only_where_that_is_known() -> None:
    wait = 3 * 24 * 3_600_000
    told = shown(ranking_request(STATE.asked_at(7 + wait), CATALOGUE, [3]).prefix)
    plain = shown(ranking_request(STATE, CATALOGUE, [3]).prefix)
    assert told != plain == told.replace(f"{user_prompts.since(wait)}\n", "")
    timeless = replace(STATE, as_of=None)
    assert ranking_request(timeless.asked_at(99), CATALOGUE, [3]) == ranking_request(STATE, CATALOGUE, [3])
    assert user_prompts.since(0) in shown(ranking_request(STATE.asked_at(7), CATALOGUE, [3]).prefix)


def test_the_user_of_whom_nothing_is_known_leaves_only_the_item() -> None:
    request = ranking_request(NOBODY, CATALOGUE, [3])
    assert request.prefix.parts == (prompts.prefix(user_prompts.NOTHING, user_prompts.NOTHING, []),)
    assert not any(line in shown(request.prefix) for line in CATALOGUE.lines)


@given(st.permutations(range(len(IDS))))
def test_a_candidate_stands_nowhere_but_in_its_own_place(order: list[int]) -> None:
    recent, candidates = tuple(order[:3]), order[3:]
    request = ranking_request(replace(STATE, recent=recent), CATALOGUE, candidates)
    assert request.candidates == tuple(CATALOGUE.candidates[i] for i in candidates)
    for item in candidates:
        assert CATALOGUE.lines[item] not in shown(request.prefix)
    for item in recent:
        assert shown(request.prefix).count(CATALOGUE.lines[item]) == 1


def test_the_chain_of_thought_differs_only_in_its_question() -> None:
    direct, (prefix, asked) = ranking_request(STATE, CATALOGUE, [3]), explain_questions(STATE, CATALOGUE, [3, 1])
    assert prefix == direct.prefix
    assert [question.about for question in asked] == [*direct.candidates, CATALOGUE.candidates[1]]
    assert {(question.ask, question.answer, question.options) for question in asked} == {(prompts.QUESTION_COT, "", ())}


# Evidence


@pytest.mark.parametrize(
    ("item", "history", "meets", "like"),
    [
        ("c", "abd", ("hat", "red", "wool"), "ba"),  # b shares two facts, a one, d none
        ("b", "cbfc", ("hat", "red"), "cf"),  # equal ones: the newest first; each once; never the item itself
        ("f", "e", ("hat", "red", "wool"), ""),  # the three strongest tastes
        ("e", "de", (), ""),  # blue is no taste of the user
        ("g", "abc", (), ""),
        ("a", "", ("red",), ""),
    ],
)
def test_evidence_by_hand(item: str, history: str, meets: tuple[str, ...], like: str) -> None:
    found = find_evidence(STATE, CATALOGUE, IDS.index(item), place(history))
    assert found == Evidence(meets, tuple(place(like)))


def test_tastes_count_in_the_order_rising_staying_shown_and_stable_and_fading_ones_do_not() -> None:
    movement = Movement(stays={"shoe": 9.0}, rises={"wool": 1.0}, fades={"blue": 5.0}, lately={"hat": 8.0})
    state = replace(STATE, movement=movement, stable={"red": 7.0, "hat": 1.0})
    assert state.phrases == ("wool", "shoe", "hat", "red")
    assert find_evidence(state, CATALOGUE, IDS.index("f"), place("")).meets == ("wool", "shoe", "hat")
    assert find_evidence(state, CATALOGUE, IDS.index("e"), place("d")) == Evidence((), ())


@given(st.sampled_from(range(len(IDS))), st.text(IDS, max_size=9), st.permutations(STATE.phrases))
def test_evidence_cites_facts_of_the_item_and_events_of_the_history(
    item: int, history: str, phrases: list[str]
) -> None:
    found = find_evidence(make_state(*phrases), CATALOGUE, item, place(history))
    assert set(found.meets) <= set(CATALOGUE.facts[item]) & set(phrases)
    assert set(found.like) <= set(place(history).tolist()) - {item}
    assert (len(found.meets) <= FACTS_SHOWN, len(found.like) <= EVENTS_SHOWN) == (True, True)
    for event in found.like:
        assert set(CATALOGUE.facts[event]) & set(found.meets)


@pytest.mark.parametrize(
    ("evidence", "chosen", "text"),
    [
        (
            Evidence(("hat", "red"), (1, 0)),
            True,
            "It meets the taste for hat, red, like b the title and a the title. Yes",
        ),
        (Evidence(("red",), ()), False, "It meets the taste for red. No"),
        (Evidence((), ()), False, "None of its facts meets the known taste. No"),
    ],
)
def test_a_rationale_says_the_evidence_and_the_answer(evidence: Evidence, chosen: bool, text: str) -> None:
    assert rationale(evidence, CATALOGUE, chosen) == text


# Training records


def test_the_positive_stands_first_and_alone_is_answered_yes() -> None:
    record = training_record(STATE, CATALOGUE, 4, 2, [3, 4], place("abde"))
    assert record.request == ranking_request(STATE, CATALOGUE, [2, 3, 4])
    assert record.cot == (
        (0, "It meets the taste for hat, red, wool, like b the title and a the title. Yes"),
        (1, "None of its facts meets the known taste. No"),
    )


def test_a_record_without_negatives_has_one_rationale() -> None:
    record = training_record(STATE, CATALOGUE, 4, 2, [], place("abde"))
    assert [at for at, _ in record.cot] == [0]
    assert len(record.request.candidates) == 1


@given(st.integers(0, 9), st.integers(0, 9), st.integers(0, 9))
def test_a_state_or_a_history_that_has_seen_the_target_is_refused(end: int, seen: int, position: int) -> None:
    history = np.zeros(seen, dtype=np.int32)
    state = replace(STATE, user_id="ann", end=end)
    if max(end, seen) > position:
        with pytest.raises(MllmSrecError, match=rf"'ann'.*{max(end, seen)} events has seen .* position {position}"):
            training_record(state, CATALOGUE, position, 2, [3], history)
    else:
        assert training_record(state, CATALOGUE, position, 2, [3], history).request.candidates
