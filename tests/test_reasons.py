"""Reasons: of what the model writes only sentences stay that are borne out, tied to exactly what they name."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fakes import FakeMllm, make_catalogue, make_state, shown
from mllm_srec.catalogue import Catalogue
from mllm_srec.mllm.base import Prompt
from mllm_srec.prompts import ranking as prompts
from mllm_srec.reasons import Reason, Sentence, explain
from mllm_srec.records import ranking_request
from mllm_srec.tastes import Rates
from mllm_srec.user_states import UserState

CATALOGUE = make_catalogue(
    a="red shoe", b="red hat", c="red hat wool", d="blue shoe", e="blue", f="red hat wool warm shoe"
)
IDS = "".join(CATALOGUE.ids)
STATE = make_state("hat", "red", "wool")


def place(items: str) -> np.ndarray:
    return np.array([IDS.index(item) for item in items], dtype=np.int32)


HISTORY = place("abde")
SHARED = Sentence(
    "It meets the taste for hat, red and wool, like b the title and a the title.",
    "evidence",
    ("hat", "red", "wool"),
    ("b", "a"),
)


def reason(
    written: str,
    item: str = "c",
    company: str = "",
    kin: str = "",
    history: str = "abde",
    disliked: str = "",
    catalogue: Catalogue = CATALOGUE,
    state: UserState = STATE,
) -> Reason:
    found = [IDS.index(other) if other else None for other in (company, kin)]
    (made,) = explain(
        FakeMllm(say=lambda prompt: written),
        catalogue,
        state,
        place(history),
        [IDS.index(item)],
        *([at] for at in found),
        place(disliked),
    )
    return made


def of_share(**shares: float) -> Catalogue:
    """`CATALOGUE` as if these shares of it had the facts."""
    rates = CATALOGUE.rates
    return replace(CATALOGUE, rates=Rates({**rates.base, **shares}, {**rates.prior, **shares}))


def model(text: str, facts: Sequence[str] = (), events: str = "") -> Sentence:
    return Sentence(text, "model", tuple(facts), tuple(events))


# The model's words


@pytest.mark.parametrize(
    ("written", "kept"),
    [
        (
            "It meets the taste for red, like b the title. Yes",
            [model("It meets the taste for red, like b the title.", ["red"], "b")],
        ),
        (
            "A red hat with wool, \n for the taste for red. Yes.",
            [model("A red hat with wool, for the taste for red.", ["red", "hat", "wool"])],
        ),
        ("c the title meets the taste for red.", [model("c the title meets the taste for red.", ["red"])]),
        (
            "c the title is red, like b the title.",
            [model("c the title is red, like b the title.", ["red"], "b")],
        ),
        ("Red wool meets the taste.", [model("Red wool meets the taste.", ["red", "wool"])]),
        ("It is like a the title. Yes", [model("It is like a the title.", (), "a")]),
        (
            "It shares hat and red with b the title!",
            [model("It shares hat and red with b the title!", ["hat", "red"], "b")],
        ),
        ("Two hats with it. Yes", [model("Two hats with it.", ["hat"])]),
        # each sentence is tied to its own facts and events
        (
            "It meets the taste for hat. It is red, like b the title and a the title. Yes",
            [
                model("It meets the taste for hat.", ["hat"]),
                model("It is red, like b the title and a the title.", ["red"], "ba"),
            ],
        ),
    ],
)
def test_the_models_words_are_kept_where_everything_in_them_is_known(written: str, kept: list[Sentence]) -> None:
    made = reason(written)
    assert made == Reason(tuple(kept))
    assert made.text == " ".join(sentence.text for sentence in kept)
    assert made.by == "model"


GOOD = "It meets the taste for hat."


@pytest.mark.parametrize(
    "removed",
    [
        "A red hat of golden silk.",  # invented
        "It meets the taste.",  # names no fact and no event
        "It does not meet the taste for red.",
        "It doesn't meet the taste for red.",
        "None of it meets the taste for red.",
        "It lacks wool.",
        "Against it: red.",
        "A blue hat.",  # a fact that it has not
        "It is for men.",  # a short fact that it has not
        "It is red, like d the title.",  # an event that is not red
        "It shares red and wool with b the title.",  # an event that has but one of them
        "It is red, like Fargo.",  # an item outside the history
        "It is red, like Mr. Fargo.",
        "It is c the title.",  # itself
        "It meets the taste for red, like c the title.",
        "It shares red and wool with c the title.",
        "It is red, like b the title (1981).",  # no such title
        "It meets the taste for red and red.",
        "It meets the taste for hat, Red, and red.",
        "It is red, like b the title and b the title.",
        "Red.",  # an echo of the item
        "Red and wool.",
        "Red hat. b the title.",
    ],
)
def test_a_sentence_that_is_not_borne_out_is_removed_and_the_others_stay(removed: str) -> None:
    catalogue = replace(CATALOGUE, facts=[*CATALOGUE.facts[:4], {"men": "text"}, CATALOGUE.facts[5]])
    base = catalogue.rates.base
    catalogue = replace(
        catalogue, rates=replace(catalogue.rates, base={**base, "men": 0.2}, prior={**base, "men": 0.2})
    )
    for written in (f"{removed} {GOOD} Yes", f"{GOOD} {removed} Yes"):
        assert reason(written, catalogue=catalogue) == Reason((model(GOOD, ["hat"]),))
    assert reason(f"{removed} Yes", catalogue=catalogue).by == "evidence"


@pytest.mark.parametrize(
    "written",
    [
        f"{GOOD} No",  # answers the other way
        "It meets the taste for red, like b the ti",  # cut off
        "Yes",
        "No.",
        "",
    ],
)
def test_other_words_give_way_to_the_evidence(written: str) -> None:
    assert reason(written) == Reason((SHARED,))


def test_only_tastes_are_told_as_tastes() -> None:
    made = reason("It meets the taste for warm and hat. It is a warm shoe. It is a warm hat. Yes", "f")
    assert made == Reason((model("It is a warm hat.", ["warm", "hat"]),))


def test_a_word_that_merely_stands_in_a_text_is_no_fact_unless_it_is_a_taste() -> None:
    prior = {**CATALOGUE.rates.prior, "warm": CATALOGUE.rates.base["warm"] / 4}
    catalogue = replace(CATALOGUE, rates=replace(CATALOGUE.rates, prior=prior))
    assert reason("It is a warm hat. Yes", "f", catalogue=catalogue).facts == ("hat",)
    assert reason("It is a warm hat. Yes", "f", catalogue=catalogue, state=make_state("warm")).facts == ("warm", "hat")


def named(**titles: str) -> Catalogue:
    """`CATALOGUE` with other titles, in category "Things"."""
    return replace(
        CATALOGUE,
        lines=[f"{titles[i]} (Things)" if i in titles else line for i, line in zip(IDS, CATALOGUE.lines, strict=True)],
        categories=[["things"]] * len(IDS),
    )


@pytest.mark.parametrize("called", ["Mr. No (1990) (Things)", "Mr. No (1990)", "Mr. No"])
def test_a_title_is_a_name_whatever_it_says_and_however_it_is_called(called: str) -> None:
    text = f"It is red, like {called}."
    assert reason(f"{text} Yes", catalogue=named(b="Mr. No (1990)")) == Reason((model(text, ["red"], "b"),))


def test_a_title_that_is_but_a_fact_or_grammar_names_no_event() -> None:
    catalogue = named(a="Hat", b="It")
    assert reason("It meets the taste for Hat. Yes", catalogue=catalogue).events == ()
    assert reason("It is red, like It (Things). Yes", catalogue=catalogue).events == ("b",)


def test_a_name_that_may_mean_the_item_names_no_event() -> None:
    written = "It is red, like Basic tee. Yes"
    version = Sentence("Another version of Basic tee, chosen before.", "evidence", (), ("b",))
    made = reason(written, catalogue=named(b="Basic tee", c="Basic tee"))
    assert (made.sentences[0], made.by) == (version, "evidence")
    assert reason(written, catalogue=named(b="Basic tee", c="Basic tee"), history="a").by == "evidence"  # itself
    catalogue = named(b="Basic tee (1)", c="Basic tee")
    assert reason(written, catalogue=catalogue).by == "evidence"
    assert reason("It is red, like Basic tee (1). Yes", catalogue=catalogue).events == ("b",)


def test_a_version_in_another_category_is_not_named_again_either() -> None:
    catalogue = named(b="Basic tee", c="Basic tee")
    lines = [
        line.replace("Basic tee (Things)", "Basic tee (Tops)") if i == 1 else line
        for i, line in enumerate(catalogue.lines)
    ]
    catalogue = replace(catalogue, lines=lines, rates=of_share(hat=0.1, red=0.1, wool=0.1).rates)
    made = reason("It is red, like Basic tee (Tops). Yes", catalogue=catalogue)
    assert [sentence.events for sentence in made.sentences if "b" in sentence.events] == [("b",)]


def test_another_version_of_a_choice_is_said_to_be_one() -> None:
    narrow = of_share(hat=0.1, red=0.1, wool=0.1).rates
    catalogue = replace(named(b="Basic tee", c="Basic tee", d="Basic tee"), rates=narrow)
    version = Sentence("Another version of Basic tee, chosen before.", "evidence", (), ("d",))
    text = "It is red, like a the title."
    made = reason(f"{text} Yes", catalogue=catalogue, history="abd")  # d is the newest of the name
    assert made.sentences == (version, model(text, ["red"], "a"))
    assert made.by == "model"
    made = reason("", catalogue=catalogue, history="abd")
    assert made.sentences[0] == version and made.by == "evidence" and len(made.sentences) == 2
    # Neither the item itself, chosen before, nor an item of another title is another version of it.
    assert version not in reason("", catalogue=catalogue, history="ac").sentences
    assert version not in reason("", history="abd").sentences
    assert all("version" not in sentence.text for sentence in reason("", catalogue=catalogue, history="ac").sentences)


def test_a_choice_that_the_item_is_another_version_of_is_named_once() -> None:
    catalogue = replace(named(b="Basic tee", c="Basic tee", d="Basic tee"), rates=of_share(red=0.5, hat=0.1).rates)
    version = Sentence("Another version of Basic tee, chosen before.", "evidence", (), ("d",))
    nothing, broad, narrow = make_state(), make_state("red"), make_state("hat", "red")
    for state in (nothing, broad):
        for company, kin in (("d", "d"), ("b", ""), ("", "d"), ("", "")):
            assert reason("", "c", company, kin, catalogue=catalogue, state=state) == Reason((version,))
        assert reason("", "c", "d", "e", catalogue=catalogue, state=state).events == ("d", "e")
        assert reason("", "c", "a", "d", catalogue=catalogue, state=state).events == ("d", "a")
    for written in ("", "It meets the taste for hat, like Basic tee. Yes", "Basic tee meets the taste for hat. Yes"):
        # b is a red hat as well, but called so too
        told = reason(written, "c", "d", "d", catalogue=catalogue, state=narrow)
        taste = Sentence("It meets the taste for hat and red, like a the title.", "evidence", ("hat", "red"), ("a",))
        assert told == Reason((version, taste))
        alone = Sentence("It meets the taste for hat and red.", "evidence", ("hat", "red"), ())
        told = reason(written, "c", history="bd", catalogue=catalogue, state=narrow)
        assert told == Reason((version, alone))


@pytest.mark.parametrize("first", ["Basic tee", "Basic tee (Things)"])
def test_two_versions_of_one_choice_are_not_two_choices(first: str) -> None:
    catalogue = named(a="Basic tee", b="Basic tee")
    made = reason(f"It is red, like {first} and Basic tee. {GOOD} Yes", catalogue=catalogue)
    assert made == Reason((model(GOOD, ["hat"]),))


def test_of_events_with_one_title_the_newest_of_which_it_is_true_is_meant() -> None:
    assert reason("It is red, like Tee. Yes", catalogue=named(a="Tee", d="Tee")).events == ("a",)
    assert reason("It shares hat with Tee. Yes", catalogue=named(a="Tee", b="Tee"), history="ba").events == ("b",)
    assert reason("It shares wool with Tee. Yes", catalogue=named(a="Tee", b="Tee"), history="ba").by == "evidence"
    catalogue = named(a="Basic tee", b="Basic tee")
    assert reason("It is red, like Basic tee. Yes", catalogue=catalogue).events == ("b",)
    assert reason("It is red, like Basic tee. Yes", catalogue=catalogue, history="ba").events == ("a",)


# The evidence's words


def test_a_mere_word_is_a_weaker_reason_than_log_and_content() -> None:
    prior = {**CATALOGUE.rates.prior, "warm": CATALOGUE.rates.base["warm"] / 4}
    catalogue = replace(CATALOGUE, rates=replace(CATALOGUE.rates, prior=prior))
    state = make_state("warm")
    assert reason("", "f", "a", "b", catalogue=catalogue, state=state).events == ("a",)
    assert reason("", "f", "", "b", catalogue=catalogue, state=state).events == ("b",)
    assert reason("", "f", catalogue=catalogue, state=state).text == "It meets the taste for warm."
    assert reason("", "f", "a", "b", state=state).text == "It meets the taste for warm."  # one of six items is


@pytest.mark.parametrize("written", ["", "It meets the taste for red, like b the title. Yes"])
def test_what_much_of_the_catalogue_has_is_a_weaker_reason_than_log_and_content(written: str) -> None:
    state = make_state("red")
    by = "model" if written else "evidence"
    for share, weaker in ((0.5, True), (0.21, True), (0.2, False)):
        catalogue = of_share(red=share)
        for company, kin in (("d", "e"), ("d", ""), ("", "e")):
            told = reason(written, "c", company, kin, catalogue=catalogue, state=state)
            assert (told.events == (company or kin,)) == weaker
            assert told.by == ("evidence" if weaker else by)
        told = reason(written, "c", catalogue=catalogue, state=state)
        assert (told.facts, told.by) == (("red",), by)  # nothing better is known
    told = reason("", "c", "d", "e", catalogue=of_share(red=0.5, hat=0.1), state=make_state("red", "hat"))
    assert told.facts == ("red", "hat")


def test_a_sentence_that_names_no_fact_gives_way_to_nothing() -> None:
    assert reason("It is like a the title. Yes", "c", "d", "e").events == ("a",)


@pytest.mark.parametrize(
    ("company", "kin", "expected"),
    [
        ("a", "b", Sentence("Often chosen by those who chose a the title.", "evidence", (), ("a",))),
        ("", "b", Sentence("Close in content to b the title.", "evidence", (), ("b",))),
        ("", "e", Sentence("Close in content to e the title: both have blue.", "evidence", ("blue",), ("e",))),
        ("", "", Sentence("Chosen by many users; no fact of it meets the known taste.", "evidence", (), ())),
    ],
)
def test_without_met_tastes_the_log_then_the_content_give_the_reason(
    company: str, kin: str, expected: Sentence
) -> None:
    # d is blue and a shoe, none of the user's tastes: that the model says so is not kept
    assert reason("It meets the taste for blue. Yes", "d", company, kin) == Reason((expected,))


def test_what_the_user_dislikes_is_no_reason() -> None:
    catalogue = make_catalogue(a="red", b="red", c="red hat", d="hat", e="blue", f="blue", **dict.fromkeys("ghij", "x"))
    state = replace(make_state("hat"), stable={"red": 0.2})
    assert reason("", "c", catalogue=catalogue, state=state).facts == ("hat", "red")
    assert reason("", "c", history="d", disliked="aba", catalogue=catalogue, state=state).facts == ("hat",)
    assert reason("", "a", "", "b", "d", "b", catalogue, make_state("hat")).facts == ("red",)
    assert reason("", "a", "", "b", "d", "bb", catalogue, make_state("hat")).facts == ()


def test_met_tastes_go_before_company() -> None:
    narrow = of_share(hat=0.1, red=0.1, wool=0.1)
    assert reason("", "c", "d", "e", catalogue=narrow) == Reason((SHARED,))
    assert reason("", "c", "d", "e", "e", catalogue=narrow) == Reason(
        (Sentence("It meets the taste for hat, red and wool.", "evidence", ("hat", "red", "wool"), ()),)
    )


def test_the_evidence_calls_things_as_texts_do() -> None:
    catalogue = replace(named(b="Big (1988)"), spelling={"hat": "Hat"})
    assert reason("", "b", catalogue=catalogue, history="b").text == "It meets the taste for Hat and red."
    assert reason("", "c", catalogue=catalogue, history="b").text.startswith(
        "It meets the taste for Hat, red and wool, like Big (1988)."
    )
    assert reason("", "d", "b", catalogue=catalogue).text == "Often chosen by those who chose Big (1988)."
    assert reason("", "d", "", "b", catalogue=catalogue).text == "Close in content to Big (1988)."


# Both


def test_a_reason_has_what_its_sentences_have_each_once() -> None:
    made = Reason((model("One.", ["red", "hat"], "ab"), model("Two.", ["wool", "red"], "bd")))
    assert (made.text, made.by) == ("One. Two.", "model")
    assert (made.facts, made.events) == (("red", "hat", "wool"), ("a", "b", "d"))


def test_every_item_is_asked_once_in_the_chain_of_thought_form() -> None:
    mllm = FakeMllm()
    assert explain(mllm, CATALOGUE, STATE, HISTORY, [], [], []) == []
    assert mllm.calls() == 0
    explain(mllm, CATALOGUE, STATE, HISTORY, place("cf").tolist(), [None] * 2, [None] * 2)
    request = ranking_request(STATE, CATALOGUE, place("cf"))
    assert [shown(prompt) for prompt in mllm.generated] == [
        shown(request.prefix) + str(candidate) + prompts.QUESTION_COT for candidate in request.candidates
    ]


PARTS = [
    "It meets the taste for red.",
    "It is a warm hat, like f the title.",
    "golden.",
    "blue shoe.",
    "It shares shoe with a the title.",
    "It lacks wool.",
    "\0 .",
    "Yes",
    "No",
]


def test_of_events_that_say_as_much_the_evidence_names_first_what_moves_the_score() -> None:
    def like(falls: np.ndarray | None) -> tuple[str, ...]:
        # c and f have the same of the tastes; f is closer to the item, for both are warm.
        (made,) = explain(FakeMllm(), catalogue, STATE, place("cf"), [6], [None], [None], (), falls)
        return made.events

    catalogue = make_catalogue(
        a="red shoe",
        b="red hat",
        c="red hat wool",
        d="blue shoe",
        e="blue",
        f="red hat wool warm",
        g="red hat wool warm",
    )
    assert like(None) == like(np.zeros((1, 2))) == ("f", "c")
    assert like(np.array([[1.0, 0.1]])) == ("c", "f")


def test_of_the_others_that_is_named_first_which_moves_the_score_where_a_version_is_named() -> None:
    narrow = of_share(hat=0.1, red=0.1, wool=0.1).rates
    catalogue = replace(named(b="Tee", c="Tee"), rates=narrow)
    for falls, expected in (([0.5, 9.0, 1.0], "bfa"), ([9.0, 0.0, 1.0], "baf")):
        # red alone is a taste: a has as much of it as f, which is a red hat of wool as well
        (made,) = explain(
            FakeMllm(), catalogue, make_state("red"), place("abf"), [2], [None], [None], (), np.array([falls])
        )
        assert "".join(made.events) == expected


@given(
    st.lists(st.sampled_from(range(len(IDS))), min_size=1, max_size=4),
    st.text(IDS, min_size=1, max_size=6),
    st.lists(st.sampled_from(PARTS), max_size=4).map(" ".join),
    st.booleans(),
)
def test_reasons_cite_facts_of_the_item_and_events_of_the_history(
    items: list[int], history: str, written: str, known: bool
) -> None:
    events = place(history)
    other = [int(events[-1]) if known else None] * len(items)

    def say(prompt: Prompt) -> str:
        return written

    reasons = explain(FakeMllm(say=say), CATALOGUE, STATE, events, items, other, other[::-1])
    assert len(reasons) == len(items)
    for item, made in zip(items, reasons, strict=True):
        assert made.sentences
        for sentence in made.sentences:
            assert set(sentence.facts) <= set(CATALOGUE.facts[item])
            assert set(sentence.events) <= set(history)
            assert sentence.text.strip() and not sentence.text.endswith(("Yes", "No"))
            if sentence.by == "model":
                assert sentence.facts or sentence.events
                assert sentence.text in " ".join(written.split())
            for name in (*sentence.facts, *(f"{event} the title" for event in sentence.events)):
                assert name in sentence.text
            for event in sentence.events if sentence.facts else ():
                assert set(sentence.facts) & set(CATALOGUE.facts[IDS.index(event)])


# With a model


def test_a_model_of_transformers_gives_reasons_through_the_same_interface() -> None:
    from tiny_models import tiny_mllm

    made = explain(tiny_mllm(), CATALOGUE, STATE, HISTORY, [2], [None], [None])
    assert made == [Reason((SHARED,))]  # it writes noise
