"""Instruction records: a prompt holds all that is known and nothing of the answer; reasons cite what is there."""

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fakes import make_catalogue, make_state, shown
from mllm_srec.catalogue import Catalogue
from mllm_srec.config import RankingConfig
from mllm_srec.errors import MllmSrecError
from mllm_srec.prompts import ranking as prompts
from mllm_srec.prompts import users as user_prompts
from mllm_srec.records import (
    EVENTS_SHOWN,
    FACTS_SHOWN,
    Evidence,
    explain_questions,
    facts_note,
    find_evidence,
    ranking_request,
    rationale,
    shared_information,
    title,
    training_record,
)
from mllm_srec.tastes import Movement
from mllm_srec.user_states import NOBODY, UserState

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
        ("f", "ba", ("hat", "red", "wool"), "ba"),
        ("e", "ab", (), ""),  # blue is no taste of the user, and nothing of the history is blue
        ("g", "abc", (), ""),
        ("a", "", ("red",), ""),
    ],
)
def test_evidence_by_hand(item: str, history: str, meets: tuple[str, ...], like: str) -> None:
    found = find_evidence(STATE, CATALOGUE, IDS.index(item), place(history))
    assert (found.meets, found.like) == (meets, tuple(place(like)))
    assert (found.shares, found.clash) == ((), ())


def test_of_events_with_as_many_tastes_the_one_that_is_closest_in_all_comes_first() -> None:
    catalogue = make_catalogue(
        a="red", b="red silk lace", c="red silk", d="red silk lace", e="blue", f="blue", g="blue", h="blue", i="blue"
    )
    found = find_evidence(make_state("red"), catalogue, 3, np.array([0, 1, 2]))
    assert found.like == (1, 2)  # silk and lace in common, then silk
    # What the item's score loses without an event counts as much as what the two have in common.
    for falls, like in (([0, 0.1, 0.9], (2, 1)), ([0, 0.9, 0.1], (1, 2)), ([9, 0, 0], (0, 1)), ([0, -9, 0], (1, 2))):
        assert find_evidence(make_state("red"), catalogue, 3, np.array([0, 1, 2]), (), np.array(falls)).like == like


def test_an_event_that_has_more_of_the_tastes_comes_before_one_that_moves_the_score() -> None:
    found = find_evidence(STATE, CATALOGUE, IDS.index("c"), place("abd"), (), np.array([9.0, 0.1, 9.0]))
    assert found.like == tuple(place("ba"))


def test_what_events_share_with_an_item_weighs_as_much_as_it_is_rare() -> None:
    catalogue = make_catalogue(a="red silk", b="red silk", c="red", d="blue", e="wool", f="wool", g="wool", h="wool")
    base = catalogue.rates.base
    assert shared_information(catalogue, 0, [1, 2, 3]).tolist() == pytest.approx(
        [-math.log(base["red"]) - math.log(base["silk"]), -math.log(base["red"]), 0.0]
    )
    assert base["silk"] < base["red"]
    assert shared_information(catalogue, 0, place("")).shape == (0,)


def test_of_events_with_one_title_the_first_is_told_in_its_place() -> None:
    lines = ["Tee (Tops)" if item in "ab" else line for item, line in zip(IDS, CATALOGUE.lines, strict=True)]
    shop = replace(CATALOGUE, lines=lines, categories=[["tops"]] * len(IDS))
    assert find_evidence(STATE, shop, IDS.index("f"), place("abc")).like == tuple(place("cb"))
    assert find_evidence(STATE, shop, IDS.index("c"), place("abf")).like == tuple(place("fb"))
    assert find_evidence(STATE, shop, IDS.index("a"), place("bfab")).like == tuple(place("fb"))


def test_tastes_count_in_the_order_rising_staying_shown_and_stable_and_fading_ones_do_not() -> None:
    movement = Movement(stays={"shoe": 9.0}, rises={"wool": 1.0}, fades={"blue": 5.0}, lately={"hat": 8.0})
    state = replace(STATE, movement=movement, stable={"red": 7.0, "hat": 1.0})
    assert state.phrases == ("wool", "shoe", "hat", "red")
    assert find_evidence(state, CATALOGUE, IDS.index("f"), place("")).meets == ("wool", "shoe", "hat")
    fading = find_evidence(state, CATALOGUE, IDS.index("e"), place("d"))
    assert fading == Evidence((), (), lacks=("wool", "shoe"), clash=("blue",))


def test_the_surest_kind_of_taste_is_told_alone() -> None:
    """Tastes likelier than not, else hints of something that not most items have, else words of texts."""
    catalogue = make_catalogue(
        a="sure hint word common", b="hint word common", c="word common", d="common", e="common", f="other", g="other"
    )
    rates = catalogue.rates
    catalogue = replace(catalogue, rates=replace(rates, prior={**rates.prior, "word": rates.base["word"] / 4}))
    movement = Movement({}, {"word": 2.0}, {}, {"hint": -0.5, "common": -0.5, "sure": -0.1})
    state = replace(STATE, movement=movement, stable={"sure": 0.0})
    told = [find_evidence(state, catalogue, item, place("")) for item in range(6)]
    assert [evidence.meets for evidence in told] == [("sure",), ("hint",), ("word",), (), (), ()]
    assert [evidence.lacks for evidence in told] == [(), *[("sure",)] * 5]  # of hints and words none is lacking
    without = replace(state, movement=replace(movement, lately={"hint": -0.5}), stable={})
    assert find_evidence(without, catalogue, 5, place("")).lacks == ()


def test_what_says_the_same_in_the_same_words_is_told_once() -> None:
    catalogue = make_catalogue(a="under- underwear ladies ladieswear hat", b="blue", c="blue")
    state = make_state("under-", "underwear", "ladieswear", "ladies", "hat")
    assert find_evidence(state, catalogue, 0, place("")).meets == ("underwear", "ladieswear", "hat")
    assert find_evidence(state, catalogue, 1, place("")).lacks == ("underwear", "ladieswear")


def test_without_a_met_taste_what_it_has_in_common_with_the_closest_event_is_told() -> None:
    catalogue = make_catalogue(
        a="crime drama", b="drama", c="crime drama war", d="crime drama", e="drama war", f="hat", g="hat", h="hat"
    )
    state, history = make_state("hat"), np.array([1, 4, 2, 0])
    found = find_evidence(state, catalogue, 3, history)
    # Drama, which most items have, is left out: it tells nothing.
    assert (found.meets, found.shares, found.like, found.lacks) == ((), ("crime",), (0, 2), ("hat",))
    assert find_evidence(state, catalogue, 2, history[:2]).shares == ("war",)
    assert find_evidence(state, catalogue, 3, history[:2]) == Evidence((), (), lacks=("hat",))


def test_what_the_text_says_is_not_lacking() -> None:
    catalogue = make_catalogue(a="blue", b="red hat")
    told = replace(catalogue, candidates=["a the title. A blue thing for red days.", *catalogue.candidates[1:]])
    assert find_evidence(make_state("hat", "red"), catalogue, 0, place("")).lacks == ("hat", "red")
    assert find_evidence(make_state("hat", "red"), told, 0, place("")).lacks == ("hat",)


def test_what_disliked_items_share_speaks_against_an_item_and_against_a_weaker_taste() -> None:
    catalogue = make_catalogue(
        a="war red", b="war red", c="war red", d="hat", e="hat", f="blue", g="blue", h="blue", i="green", j="green"
    )
    state = replace(make_state("hat"), stable={"red": 0.2})
    assert find_evidence(state, catalogue, 0, np.array([3])).meets == ("red",)
    disliked = find_evidence(state, catalogue, 0, np.array([3]), np.array([1, 2]))
    # Two of two against 0.3: ln(1/3) - 2 ln 0.3 + ln 0.3 = 0.11 nats, less than speaks for red; three of three: 1.02.
    assert (disliked.meets, disliked.clash) == (("red",), ("war",))
    more = find_evidence(state, catalogue, 0, np.array([3]), np.array([1, 2, 1]))
    assert (more.meets, more.clash) == ((), ("red", "war"))
    assert find_evidence(state, catalogue, 4, np.array([3]), np.array([1, 2])).clash == ()


@given(
    st.sampled_from(range(len(IDS))),
    st.text(IDS, max_size=9),
    st.text(IDS, max_size=4),
    st.permutations(STATE.phrases),
)
def test_evidence_cites_facts_of_the_item_and_events_of_the_history(
    item: int, history: str, disliked: str, phrases: list[str]
) -> None:
    found = find_evidence(make_state(*phrases), CATALOGUE, item, place(history), place(disliked))
    facts = set(CATALOGUE.facts[item])
    assert set(found.meets) <= facts & set(phrases)
    assert set(found.shares) <= facts
    assert set(found.clash) <= facts - set(found.meets) - set(found.shares)
    assert set(found.lacks) <= set(phrases) - facts
    assert set(found.like) <= set(place(history).tolist()) - {item}
    assert (len(found.meets) <= FACTS_SHOWN, len(found.like) <= EVENTS_SHOWN) == (True, True)
    assert not (found.meets and found.shares)
    for event in found.like:
        assert set(CATALOGUE.facts[event]) & set(found.meets) or set(found.shares) <= set(CATALOGUE.facts[event])
    assert bool(found.like) >= bool(found.shares)


@pytest.mark.parametrize(
    ("evidence", "chosen", "text"),
    [
        (
            Evidence(("hat", "red"), (1, 0)),
            True,
            "It meets the taste for hat and red, like b the title and a the title. Yes",
        ),
        (Evidence(("red",), ()), False, "It meets the taste for red. No"),
        (Evidence((), ()), False, "None of its facts meets the known taste. No"),
        (Evidence((), ()), True, "None of its facts meets the known taste. Yes"),
        (Evidence((), (), lacks=("hat", "red")), True, "None of its facts meets the known taste. Yes"),
        (Evidence((), (), lacks=("hat", "red")), False, "It lacks hat and red. No"),
        (
            Evidence(("hat",), (1, 0), (), ("red",), ("blue", "wool")),
            False,
            "It meets the taste for hat, like b the title. It lacks red. Against it: blue and wool. No",
        ),
        (Evidence(("hat",), (), (), ("red",), ("blue",)), True, "It meets the taste for hat. Against it: blue. Yes"),
        (
            Evidence((), (0, 1), ("warm", "wool", "shoe"), ("hat",)),
            True,
            "It shares warm, wool and shoe with a the title and b the title. Yes",
        ),
    ],
)
def test_a_rationale_says_the_evidence_and_the_answer(evidence: Evidence, chosen: bool, text: str) -> None:
    assert rationale(evidence, CATALOGUE, chosen) == text


def test_a_rationale_names_things_as_texts_do() -> None:
    lines = ["Heat (1995) (Crime)", "Big (1988)", "The long title " * 9, *CATALOGUE.lines[3:]]
    categories = [["crime"], [], *CATALOGUE.categories[2:]]
    catalogue = replace(CATALOGUE, lines=lines, categories=categories, spelling={"wool": "Wool"})
    assert rationale(Evidence(("wool", "hat"), (0, 1)), catalogue, True) == (
        "It meets the taste for Wool and hat, like Heat (1995) and Big (1988). Yes"
    )
    assert title(catalogue, 2) == "The long title The long title The long ..."


# What stands behind an item


def note(state: UserState, item: str, catalogue: Catalogue = CATALOGUE) -> str:
    return facts_note(state, catalogue, IDS.index(item))


def test_a_note_says_what_an_item_shares_with_the_newest_choice_and_meets() -> None:
    # c: red hat wool; the newest, b: red hat; of the last two, a (red shoe) shares one fact with c, b two.
    state = replace(STATE, newest=IDS.index("b"), recent=tuple(place("ab")))
    assert note(state, "c") == "\nShares 2 of 2 with the newest choice: hat; near 1 of the last 2; also meets wool."
    assert note(state, "d") == "\nShares 0 of 2 with the newest choice; near 0 of the last 2."
    assert CATALOGUE.rates.base["red"] > 0.5, "too common to be told, though it is counted"


def test_a_note_names_what_fades_and_nothing_of_nobody() -> None:
    fading = replace(STATE, movement=Movement({}, {}, {"blue": 3.0}, {}), recent=())
    assert note(fading, "d") == "\nagainst it blue."
    assert note(NOBODY, "c") == ""
    assert ranking_request(NOBODY, CATALOGUE, place("cd")).notes == ()


def test_notes_stand_behind_candidates_only_where_they_are_asked_for() -> None:
    state = replace(STATE, newest=IDS.index("b"))
    request = ranking_request(state, CATALOGUE, place("cd"))
    assert request.notes == (note(state, "c"), note(state, "d"))
    without = replace(CATALOGUE, shown=RankingConfig(facts=False))
    assert ranking_request(state, without, place("cd")) == replace(request, notes=())


def test_profile_and_preference_are_told_where_they_are_asked_for() -> None:
    state = replace(STATE, typical=3, newest=5)

    def told(**shown: bool) -> str:
        catalogue = replace(CATALOGUE, shown=RankingConfig(**shown))
        return ranking_request(state, catalogue, [2]).prefix.parts[0]  # type: ignore[return-value]

    d, f = (CATALOGUE.candidates[i] for i in (3, 5))
    profile, preference = (STATE.profile, d), (STATE.preference, f)
    for text, kept_by in [(text, "profile") for text in profile] + [(text, "preference") for text in preference]:
        assert text in told()
        assert text not in told(**{kept_by: False})
        other = {"profile": "preference", "preference": "profile"}[kept_by]
        assert text in told(**{other: False})


# Training records


def test_the_positive_stands_first_and_rationales_are_in_order() -> None:
    record = training_record(STATE, CATALOGUE, 4, [2, 3, 4], ["Good. Yes", "Bad. No"], (1.0, 0.5, -2.0))
    assert record.request == ranking_request(STATE, CATALOGUE, [2, 3, 4])
    assert record.cot == ((0, "Good. Yes"), (1, "Bad. No"))
    assert record.retrieval == (1.0, 0.5, -2.0)
    assert training_record(STATE, CATALOGUE, 4, [2]).cot == ()


@given(st.integers(0, 9), st.integers(0, 9))
def test_a_state_that_has_seen_the_target_is_refused(end: int, position: int) -> None:
    state = replace(STATE, user_id="ann", end=end)
    if end > position:
        with pytest.raises(MllmSrecError, match=rf"'ann'.*{end} events has seen .* position {position}"):
            training_record(state, CATALOGUE, position, [2, 3])
    else:
        assert training_record(state, CATALOGUE, position, [2, 3]).request.candidates
