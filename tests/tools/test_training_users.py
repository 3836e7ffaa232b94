"""What the embedded model learns of users is true of them, and shows nothing of the sample shop."""

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import training_users
from hypothesis import given, settings
from hypothesis import strategies as st
from test_training_data import pattern
from training_users import (
    ADJECTIVES,
    BRANDS,
    DOMAINS,
    FILLERS,
    LOOKS,
    NOUNS,
    PEOPLE,
    SHELVES,
    Simulated,
    next_choice,
    simulate,
    summary,
    window,
)

from mllm_srec.catalogue import Catalogue
from mllm_srec.data import sample
from mllm_srec.prompts.users import NO_TASTE
from mllm_srec.tastes import Rates
from mllm_srec.user_states import History, UserState, read_window

SEEDS = st.integers(0, 2**32 - 1)


def names(answer: str) -> tuple[list[str], list[str]]:
    """(tastes, dislikes) that an answer names, in lower case."""
    if answer == NO_TASTE:
        return [], []
    wanted, *against = answer.casefold().split("; not ")
    return re.split(r", also |, | and ", wanted.removeprefix("mostly ")), against


def windows_of(user: Simulated) -> list[tuple[int, int]]:
    """Every window of 1 to 10 events that ends with every third one."""
    ends = range(1, len(user.tastes) + 1, 3)
    return [(max(0, end - size), end) for end in ends for size in (1, 2, 4, 7, 10)]


# The truth


@settings(max_examples=40, deadline=None)
@given(SEEDS)
def test_an_answer_names_tastes_that_enough_liked_items_have_and_nothing_else(seed: int) -> None:
    user = simulate(np.random.default_rng(seed))
    facts = [user.catalogue.facts[item] for item in user.history.items]
    for start, stop in windows_of(user):
        read = read_window(user.history, start, stop, user.catalogue)
        liked = [at for at in range(start, stop) if not user.history.disliked[at]]
        low = [at for at in range(start, stop) if user.history.disliked[at]]
        # Worked out anew: how many liked items were chosen under a taste for a fact, and have it.
        had = {
            fact: sum(fact in user.tastes[at].values() and fact in facts[at] for at in liked)
            for at in range(start, stop)
            for fact in user.tastes[at].values()
        }
        answer = summary(user, read)
        wanted, against = names(answer)
        counts = [had[name] for name in wanted]
        assert counts == sorted(counts, reverse=True)
        assert all(count >= 2 or 2 * count >= len(liked) for count in counts)
        assert answer.startswith("mostly ") == bool(wanted and 3 * counts[0] >= 2 * len(liked))
        assert (", also " in answer) == (answer.startswith("mostly ") and len(wanted) > 1)
        assert len(wanted) == len(set(wanted)) <= 4 and len(against) <= 1
        instruction = read.prompt.casefold()
        assert all(name in instruction for name in [*wanted, *against])
        # What is left out is too rare, or the instruction does not name it.
        for fact, count in had.items():
            if count >= max(2, len(liked) / 2) and fact not in wanted:
                assert len(wanted) == 4 or not re.search(rf"(?<!\w){re.escape(fact)}(?!\w)", instruction)
        for name in against:
            assert sum(name in facts[at] for at in low) >= min(2, len(low)) > 0
            assert not any(name in facts[at] for at in liked)
            attributes = {attribute for at in range(start, stop) for attribute in user.tastes[at]}
            assert any(name in user.attributes[user.history.items[at]].get(a, ()) for at in low for a in attributes)


@settings(max_examples=60, deadline=None)
@given(SEEDS)
def test_no_answer_names_noise_and_each_name_stands_in_the_instruction(seed: int) -> None:
    instruction, answer = window(np.random.default_rng(seed))
    assert instruction.startswith("A person chose, oldest first:\n- ")
    wanted, against = names(answer)
    noise = {word.casefold() for word in (*FILLERS, *SHELVES, *BRANDS, *NOUNS, *ADJECTIVES, *PEOPLE)}
    assert not noise & {*wanted, *against}
    assert all(re.search(rf"(?<!\w){re.escape(name)}(?!\w)", instruction.casefold()) for name in [*wanted, *against])


def test_noise_is_shared_by_chance_and_answers_of_every_form_occur() -> None:
    generator = np.random.default_rng(0)
    lessons = [window(generator) for _ in range(120)]
    flukes = 0
    for instruction, answer in lessons:
        shared = re.search(r"Shared more often than by chance: (.*)\.", instruction)
        wanted, _ = names(answer)
        flukes += bool(shared and {*shared[1].casefold().split(", ")} - {*wanted})
    assert flukes > 25
    answers = [answer for _, answer in lessons]
    assert 0.05 < np.mean([answer == NO_TASTE for answer in answers]) < 0.3
    for form in (
        r"mostly [^,]+",
        r"mostly [^,]+, also .+",
        r"[^,]+ and [^,]+",
        r"(?!mostly).+, .+ and .+",
        r".+; not .+",
    ):
        assert any(re.fullmatch(form, answer) for answer in answers), form


# By hand

FACTS = [{"jazz", "gift"}, {"jazz", "live", "gift"}, {"jazz", "live"}, {"folk", "gift"}, {"polka"}, {"polka", "gift"}]


def listener(
    chosen: Sequence[int], taste: dict[str, str], low: Sequence[int] = (), taste_before: Sequence[dict[str, str]] = ()
) -> Simulated:
    """A user of six records; `low` are the events rated low, `taste_before` the tastes of the first events."""
    facts = [dict.fromkeys(sorted(of_item), "text") for of_item in FACTS]
    base = {fact: sum(fact in of_item for of_item in FACTS) / 6 for of_item in FACTS for fact in of_item}
    catalogue = Catalogue(
        ids=[f"i{n}" for n in range(6)],
        lines=[f"Record {n} ({' / '.join(of_item)})" for n, of_item in enumerate(facts)],
        looks=[""] * 6,
        candidates=[""] * 6,
        facts=facts,  # type: ignore[arg-type]
        rates=Rates(base, base),
        categories=[[]] * 6,
        prices=np.full(6, np.nan, dtype=np.float32),
        embedding_texts=[""] * 6,
        pictures=[None] * 6,
    )
    disliked = np.isin(np.arange(len(chosen)), low)
    history = History("", np.array(chosen, dtype=np.int32), np.arange(len(chosen)) * 60_000, disliked)
    styles = [tuple(f for f in of_item if f not in ("gift", "live")) for of_item in facts]
    attributes = [{"style": style, "kind": ("live",) if "live" in f else ()} for style, f in zip(styles, facts)]  # noqa: B905
    return Simulated(catalogue, history, attributes, [*taste_before, *[taste] * (len(chosen) - len(taste_before))])


@pytest.mark.parametrize(
    ("user", "answer"),
    [
        (listener([0, 1, 2], {"style": "jazz"}), "mostly jazz"),
        (listener([0, 1, 2], {"style": "jazz", "kind": "live"}), "mostly jazz, also live"),  # 3 and 2 of 3
        (listener([0, 3, 1, 4], {"style": "jazz"}), "jazz"),  # 2 of 4 are no two thirds
        (listener([1, 2, 3, 4], {"style": "jazz", "kind": "live"}), "jazz and live"),  # as often: as they stand
        (listener([3, 0, 4], {"style": "jazz"}), NO_TASTE),  # 1 of 3 is no half
        (listener([3, 0], {"style": "jazz"}), "jazz"),  # 1 of 2 is
        (listener([0, 1, 3], {}), NO_TASTE),  # that all share "gift" is a fluke
        (listener([0, 1, 4], {"style": "jazz"}, low=[2]), "mostly jazz; not polka"),
        (listener([0, 1, 4, 5], {"style": "jazz"}, low=[2, 3]), "mostly jazz; not polka"),  # both share it
        (listener([0, 1, 3, 4], {"style": "jazz"}, low=[2, 3]), "mostly jazz"),  # each lacks it in its own way
        (listener([0, 1, 4, 5], {"style": "jazz"}, low=[3]), "mostly jazz"),  # a polka was liked as well
        (listener([4], {"style": "jazz"}, low=[0]), NO_TASTE),
        # A jazz record chosen while the taste was for something else does not count.
        (listener([0, 1, 4], {"style": "polka"}, taste_before=[{"style": "polka"}, {"style": "jazz"}]), NO_TASTE),
    ],
)
def test_answers_worked_out_by_hand(user: Simulated, answer: str) -> None:
    read = read_window(user.history, 0, len(user.tastes), user.catalogue)
    assert summary(user, read) == answer


# Users


def test_users_are_as_varied_as_they_are_said_to_be() -> None:
    generator = np.random.default_rng(3)
    users = [simulate(generator) for _ in range(100)]
    sizes = [len(user.tastes) for user in users]
    assert min(sizes) == 3 and max(sizes) == 24
    assert all(80 <= len(user.catalogue.ids) <= 150 for user in users)
    assert all(1 <= len(taste) <= 4 for user in users for taste in user.tastes)
    assert 0.2 < np.mean([user.tastes[0] != user.tastes[-1] for user in users]) < 0.47
    assert 0.02 < np.mean(np.concatenate([user.history.disliked for user in users])) < 0.2
    met = []
    for user in users:
        history = user.history
        assert history.time is not None and (np.diff(history.time) > 0).all()
        assert len(set(history.items.tolist())) == len(history.items)
        for at, taste in enumerate(user.tastes):
            facts = user.catalogue.facts[history.items[at]]
            if history.disliked[at]:
                continue
            met.append(any(fact in facts for fact in taste.values()))
    assert np.mean(met) > 0.6
    gaps = np.concatenate([np.diff(user.history.time) for user in users if user.history.time is not None]) / 3_600_000
    assert (gaps < 1).mean() > 0.1 and ((gaps > 1) & (gaps < 48)).mean() > 0.1 and (gaps > 168).mean() > 0.1


def test_what_is_disliked_lacks_the_taste() -> None:
    generator = np.random.default_rng(4)
    lacking = []
    for _ in range(100):
        user = simulate(generator)
        for at in np.flatnonzero(user.history.disliked):
            facts = user.catalogue.facts[user.history.items[at]]
            lacking.append(not any(fact in facts for fact in user.tastes[at].values()))
    assert len(lacking) > 50 and np.mean(lacking) > 0.98


def test_the_same_seed_gives_the_same_texts() -> None:
    for lesson in (window, next_choice):
        one, same, other = (lesson(np.random.default_rng(seed)) for seed in (5, 5, 6))
        assert one == same != other


# The next choice


def test_the_state_has_not_seen_the_next_item(monkeypatch: pytest.MonkeyPatch) -> None:
    users: list[Simulated] = []
    asked: list[tuple[UserState, int]] = []
    real_simulate, real_request = training_users.simulate, training_users.ranking_request

    def request(state: UserState, catalogue: Catalogue, items: Sequence[int]) -> Any:
        asked.append((state, items[0]))
        return real_request(state, catalogue, items)

    def keep(generator: np.random.Generator) -> Simulated:
        users.append(real_simulate(generator))
        return users[-1]

    monkeypatch.setattr(training_users, "simulate", keep)
    monkeypatch.setattr(training_users, "ranking_request", request)
    built = training_users.build_state
    monkeypatch.setattr(
        training_users,
        "build_state",
        # Were any later event read, this would fail: it is not there.
        lambda history, end, *rest: built(
            replace(history, **{n: getattr(history, n)[:end] for n in ("items", "time", "disliked")}), end, *rest
        ),
    )
    generator = np.random.default_rng(7)
    forms = []
    for _ in range(80):
        prefix, candidate = next_choice(generator)
        (state, item), user = asked[-1], users[-1]
        assert user.history.time is not None
        assert item == user.history.items[state.end] and not user.history.disliked[state.end]
        assert candidate == user.catalogue.candidates[item]
        assert state.as_of == user.history.time[state.end - 1]
        assert state.waited == user.history.time[state.end] - state.as_of > 0
        assert list(state.recent) == user.history.items[: state.end][-len(state.recent) or state.end :].tolist()
        assert item not in state.recent and len(state.recent) <= 12
        assert {state.typical, state.newest} <= {None, *user.history.items[: state.end].tolist()}
        said = str(prefix.parts[0])
        forms.append((said.startswith("The user "), "Last choices" in said))
        assert said.endswith("Item: ")
    shares = {form: forms.count(form) / len(forms) for form in set(forms)}
    assert shares.keys() == {(True, True), (True, False), (False, True)}
    assert min(shares.values()) > 0.1 and shares[True, True] > 0.3


# Nothing of the shop


def values(domain: str) -> dict[str, set[str]]:
    """Attribute -> all names that it may have in a domain."""
    of = DOMAINS[domain]
    kinds = {kind for kinds in of.kinds.values() for kind in kinds}
    return {"group": {*of.kinds}, "kind": kinds} | {
        a: {*v} for a, v in (of.words | {n: LOOKS[n] for n in of.looks}).items()
    }


@pytest.mark.parametrize("domain", list(DOMAINS))
def test_a_name_stands_for_one_attribute_and_is_no_noise(domain: str) -> None:
    every = [name for names in values(domain).values() for name in names]
    assert len(every) == len(set(every))
    noise = {
        word.casefold() for text in (*FILLERS, *SHELVES, *NOUNS, *ADJECTIVES, *PEOPLE, *BRANDS) for word in text.split()
    }
    assert not noise & set(every)
    assert all(name == name.casefold() and not re.search(r"[,;|/>]| and | also |not ", name) for name in every)


def test_no_text_is_made_like_the_shops() -> None:
    titles = [pattern(template) for template in sample._TITLES]
    descriptions = [pattern(template) for template in sample._DESCRIPTIONS]
    closings = [closing.strip() for closing in sample._CLOSINGS if closing]
    collections = re.compile(rf"\b(?:{'|'.join(sample.COLLECTIONS)})\b", re.IGNORECASE)
    generator = np.random.default_rng(8)
    texts: list[str] = []
    for _ in range(20):
        catalogue = simulate(generator).catalogue
        texts += [*catalogue.lines, *catalogue.candidates, *catalogue.embedding_texts]
    for _ in range(100):
        prefix, candidate = next_choice(generator)
        texts += [*window(generator), str(prefix.parts[0]), candidate]
    assert len(texts) > 1000
    for text in texts:
        assert not any(of.search(text) for of in descriptions), text
        assert not any(closing in text for closing in closings), text
        assert not any(category in text for category in sample.CATEGORIES.values()), text
        assert not any(name in text for name in sample._NAMES), text
        assert not collections.search(text), text
        for title in re.split(r" \(|\. |\n- ", text):  # of a line, a candidate, a list
            assert not any(of.fullmatch(title) for of in titles), text


def test_no_word_is_one_of_the_shops() -> None:
    said = {name.title() for domain in DOMAINS for names in values(domain).values() for name in names}
    said |= {*BRANDS, *NOUNS, *ADJECTIVES, *PEOPLE, *(word.title() for word in (*FILLERS, *SHELVES))}
    assert not any(name in word for word in said for name in sample._NAMES)
    assert not {word.casefold() for text in said for word in text.split()} & {*sample.COLLECTIONS}
    assert all(len(value) >= 10 for domain in DOMAINS for value in DOMAINS[domain].words.values())


def test_no_category_is_written_like_those_of_known_data_sets() -> None:
    generator = np.random.default_rng(9)
    for _ in range(30):
        for line in simulate(generator).catalogue.lines:
            category = line.partition(" (")[2].rstrip(")")
            assert "," not in category and not re.search(r"\S\|\S", category), line
