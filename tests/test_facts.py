"""Facts say where they come from, and what picture and text disagree on is kept from both, marked."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mllm_srec.facts import (
    VOCABULARIES,
    Fact,
    canonical,
    category_facts,
    content_words,
    keyword_facts,
    merge,
    said_in,
    unsupported_words,
)
from mllm_srec.vocabulary import NEAR_COLOURS

# What a text says


@pytest.mark.parametrize(
    ("title", "category", "description", "kinds"),
    [
        ("Wool hat", "Fashion, Shoes", "A dress.", ["hat"]),
        ("Model 7", "Fashion, Shoes", "A dress.", ["pair of shoes"]),
        ("Model 7", "New", "A dress for summer. Goes with a hat.", ["dress"]),
        ("Model 7", "New", "Soft; goes with any skirt", []),  # further down other things are named
        ("Model 7", "New", "Soft\nA skirt", []),
        ("T-shirt dress", "", "", ["dress"]),  # the last word is the thing
        ("Orange mug", "", "", ["mug"]),
        ("Mug with a lemon", "Hats", "", ["mug"]),
        ("For the skirt", "", "", ["skirt"]),
        ("", "", "", []),
    ],
)
def test_a_kind_is_what_the_title_names_else_the_category_else_the_first_sentence(
    title: str, category: str, description: str, kinds: list[str]
) -> None:
    assert said_in(title, category, description)["kind"] == kinds


def test_colours_and_patterns_are_read_in_title_and_description_and_not_in_the_category() -> None:
    said = said_in("Navy hat", "Red, Plaid", "Striped. Also in gray with stripes.")
    assert said == {"kind": ["hat"], "colour": ["blue", "grey"], "pattern": ["striped"]}


# What an answer stands for


@pytest.mark.parametrize(
    ("attribute", "answer", "value"),
    [
        ("kind", "running shoe", "pair of shoes"),
        ("kind", "apple juice", "juice"),  # of several names the last counts
        ("kind", "jacket or coat", "jacket or coat"),
        ("kind", "old letter", "old letter"),
        ("colour", "dark blue", "blue"),
        ("scene", "man with a hat", "man with a hat"),  # no vocabulary
        ("mood", "dark", "dark"),
        ("kind", "", ""),
    ],
)
def test_an_answer_stands_for_its_canonical_name(attribute: str, answer: str, value: str) -> None:
    assert canonical(attribute, answer) == value


# Both together


def test_facts_by_hand() -> None:
    seen = {"kind": "sun hat", "colour": "red", "pattern": "plain", "mood": "dark"}
    said = {"kind": ["hat"], "colour": ["blue", "green"], "pattern": []}
    assert merge(seen, said, ("kind", "colour", "pattern", "mood")) == [
        Fact("kind", "hat", "both"),
        Fact("colour", "red", "picture", contradicted=True),
        Fact("colour", "blue", "text", contradicted=True),
        Fact("colour", "green", "text", contradicted=True),
        Fact("pattern", "plain", "picture"),
        Fact("mood", "dark", "picture"),
    ]


def test_one_of_several_colours_in_the_text_is_no_contradiction() -> None:
    assert merge({"colour": "green"}, {"colour": ["blue", "green"]}, ["colour"]) == [
        Fact("colour", "green", "both"),
        Fact("colour", "blue", "text"),
    ]


def test_a_value_that_no_vocabulary_knows_contradicts_nothing() -> None:
    assert merge({"kind": "poncho"}, {"kind": ["jacket or coat"]}, ["kind"]) == [
        Fact("kind", "poncho", "picture"),
        Fact("kind", "jacket or coat", "text"),
    ]
    assert merge({"kind": "dress"}, {"kind": ["jacket or coat"]}, ["kind"])[0].contradicted


def test_what_is_not_asked_about_is_no_fact() -> None:
    assert merge({}, said_in("Night", "Drama", "A black car, a hat."), ("scene", "mood")) == []
    assert merge({"colour": "red"}, {"colour": ["black"]}, ("kind",)) == []


@pytest.mark.parametrize(
    ("looked", "told", "facts"),
    [
        ("black", ["blue"], [Fact("colour", "blue", "both")]),  # navy
        ("white", ["red", "beige"], [Fact("colour", "beige", "both"), Fact("colour", "red", "text")]),
        ("white", ["black"], [Fact("colour", "white", "picture", True), Fact("colour", "black", "text", True)]),
        ("blue", ["black", "blue"], [Fact("colour", "blue", "both"), Fact("colour", "black", "text")]),
    ],
)
def test_near_colours_agree_by_the_texts_name(looked: str, told: list[str], facts: list[Fact]) -> None:
    assert merge({"colour": looked}, {"colour": told}, ["colour"]) == facts


VALUES = {name: st.sampled_from(sorted(vocabulary)) for name, vocabulary in VOCABULARIES.items()}
SEEN = st.fixed_dictionaries({}, optional={name: v | st.sampled_from(["", "poncho"]) for name, v in VALUES.items()})
SAID = st.fixed_dictionaries(
    {}, optional={name: st.lists(value, max_size=3, unique=True) for name, value in VALUES.items()}
)


@given(SEEN, SAID, st.lists(st.sampled_from(sorted(VALUES)), unique=True))
def test_no_value_is_lost_and_both_means_both(
    seen: dict[str, str], said: dict[str, list[str]], asked: list[str]
) -> None:
    facts = merge(seen, said, asked)
    assert list(dict.fromkeys(fact.attribute for fact in facts)) == [a for a in asked if seen.get(a) or said.get(a)]
    for attribute in asked:
        of_attribute = [fact for fact in facts if fact.attribute == attribute]
        looked, told = seen.get(attribute, ""), said.get(attribute, [])
        if attribute == "colour" and looked not in told:  # a near colour counts as the text's
            looked = next((colour for colour in told if frozenset((looked, colour)) in NEAR_COLOURS), looked)
        assert len({fact.value for fact in of_attribute}) == len(of_attribute)
        assert {fact.value for fact in of_attribute} == {*told, *([looked] if looked else [])}
        for fact in of_attribute:
            sources = (fact.value == looked, fact.value in told)
            assert fact.origin == {(True, True): "both", (True, False): "picture", (False, True): "text"}[sources]
        against = {fact.origin for fact in of_attribute if fact.contradicted}
        differ = looked in VOCABULARIES[attribute] and bool(told) and looked not in told
        assert against == ({"picture", "text"} if differ else set())


# Words


def test_content_words_are_more_than_grammar() -> None:
    assert content_words("The Hat was made of Grandma's wool, t-shirt soft, 100 % xy") == [
        "hat",
        "grandma's",
        "wool",
        "t-shirt",
        "soft",
    ]


def test_words_that_no_source_holds_are_unsupported() -> None:
    assert unsupported_words("A red leather shoe", "Shoe, leathern", "red") == []
    assert unsupported_words("A golden leather shoe", "Leather shoe") == ["golden"]
    assert unsupported_words("shoes and bags", "shoe bag") == []
    assert unsupported_words("shoe bag", "shoes and bags") == []
    assert unsupported_words("shoed", "shoe") == ["shoed"]  # the first five letters decide
    assert unsupported_words("one of those", "") == ["those"]
    assert unsupported_words("This is with them about their", "") == []  # function words say nothing about an item
    assert unsupported_words("Золотой сапог", "сапог") == ["золотой"]
    assert unsupported_words("", "") == []


@pytest.mark.parametrize(
    ("category", "facts"),
    [
        ("Animation, Comedy", ["animation", "comedy"]),
        ("Women > Shoes|Boots/Shoes;  X", ["women", "shoes", "boots"]),
        ("", []),
    ],
)
def test_category_facts_are_the_parts_each_once(category: str, facts: list[str]) -> None:
    assert category_facts(category) == facts


def test_keywords_are_held_by_three_texts_and_at_most_a_fifth() -> None:
    texts = ["filler"] * 20
    texts[0] = "the rare wool, warm wool"
    for at, word in ((1, "warm wool"), (2, "warm wool"), (3, "warm rare")):
        texts[at] = word
    # of 20 texts: warm 4 (a fifth), wool 3, rare 2 (too few), filler 16 (too many), "the" is no content word
    assert keyword_facts(texts)[:5] == [["warm", "wool"], ["warm", "wool"], ["warm", "wool"], ["warm"], []]
    assert keyword_facts(texts, limit=1)[0] == ["warm"]
    assert keyword_facts([]) == []
