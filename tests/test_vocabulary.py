"""Every name and synonym leads to one name, whatever stands around it."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mllm_srec.data import drawing
from mllm_srec.vocabulary import COLOURS, KINDS, PATTERNS, named, words

ALL = {"kinds": KINDS, "colours": COLOURS, "patterns": PATTERNS}
OWNERS = {
    which: {phrase: name for name, synonyms in vocabulary.items() for phrase in (name, *synonyms)}
    for which, vocabulary in ALL.items()
}


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("T-shirt", ["t-shirt"]),
        ("Off-white, women's  8-pack_of 2", ["off-white", "women's", "8-pack", "of", "2"]),
        ("Schöne Öljacke!", ["schöne", "öljacke"]),
        ("'quoted' -5- ", ["quoted", "5"]),
        ("", []),
    ],
)
def test_a_word_may_hold_hyphens_and_apostrophes_inside(text: str, found: list[str]) -> None:
    assert words(text) == found


@pytest.mark.parametrize(
    ("text", "kinds"),
    [
        ("Oat milk, 1 l", ["oat milk"]),
        ("Milk and oat milk", ["milk", "oat milk"]),
        ("Oat-milk", []),  # another word: no name has that hyphen
        ("T shirt with a shirt collar", ["T-shirt", "shirt"]),
        ("Sweet potato", ["potato"]),
        ("Jeans, trousers, PANTS", ["pair of trousers"]),
        ("Umbrella for a hat", ["umbrella", "hat"]),
        ("Hatstand, eggplants", ["aubergine"]),  # whole words only
        ("Orange juice", ["orange", "juice"]),
        ("Long-sleeved top", ["long-sleeved top"]),
        ("A clockwork", []),
        ("", []),
    ],
)
def test_kinds_are_named_by_whole_words_the_longer_first_each_once(text: str, kinds: list[str]) -> None:
    assert named(text, KINDS) == kinds


def test_colours_and_patterns_by_hand() -> None:
    assert named("Dark green stripes on off-white", COLOURS) == ["green", "white"]
    assert named("Navy blue polka dots", COLOURS) == ["blue"]
    assert named("Striped and polka-dot, not plaid", PATTERNS) == ["striped", "dotted", "checked"]


@pytest.mark.parametrize("which", ALL)
def test_every_name_and_synonym_stands_for_its_name_alone(which: str) -> None:
    for phrase, name in OWNERS[which].items():
        assert named(phrase, ALL[which]) == [name], phrase
        assert named(phrase.upper(), ALL[which]) == [name], phrase


@pytest.mark.parametrize("which", ALL)
def test_no_phrase_is_written_twice(which: str) -> None:
    phrases = [" ".join(words(p)) for name, synonyms in ALL[which].items() for p in (name, *synonyms)]
    assert len(set(phrases)) == len(phrases)
    assert all(phrases)


@given(st.sampled_from(sorted(ALL)), st.data())
def test_all_that_a_text_names_is_found_in_its_order(which: str, data: st.DataObject) -> None:
    phrases = data.draw(st.lists(st.sampled_from(sorted(OWNERS[which])), max_size=6))
    text = ", and ".join(phrases)
    assert named(text, ALL[which]) == list(dict.fromkeys(OWNERS[which][phrase] for phrase in phrases))


@given(st.text("tea shirt-'"), st.sampled_from(sorted(ALL)))
def test_only_names_are_found_and_each_once(text: str, which: str) -> None:
    found = named(text, ALL[which])
    assert len(set(found)) == len(found)
    assert set(found) <= set(ALL[which])


def test_what_the_project_draws_has_one_name_each() -> None:
    names = [named(kind, KINDS) for kind in drawing.KINDS]
    assert all(len(found) == 1 for found in names)
    assert len({found[0] for found in names}) == len(drawing.KINDS)
    assert {*drawing.COLOURS, *drawing.MORE_RGB} == set(COLOURS)
    assert tuple(PATTERNS) == drawing.PATTERNS
