"""Every text for a model reads well whatever is missing, has a version, and lives in one place."""

import ast
import hashlib
import importlib
import itertools
import pkgutil
import re
from pathlib import Path
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

import mllm_srec
from mllm_srec import prompts
from mllm_srec.config import ItemsConfig, Questions
from mllm_srec.prompts import items, ranking, server, users
from mllm_srec.vocabulary import words

NAMES = [module.name for module in pkgutil.iter_modules(prompts.__path__)]

WORDS = st.sampled_from(["red shoe", "Hat.", "Mr. Ü", "a, b", "wool", "100 % silk ..."])
MAYBE = st.just("") | WORDS
MANY = st.lists(WORDS, max_size=3)
SOME = st.lists(WORDS, min_size=1, max_size=3)


def check(text: str, *parts: str) -> None:
    """A text without traces of what was empty, in which each part stands."""
    assert text.strip()
    assert not text.startswith((" ", "\n"))
    for trace in ("  ", "\n\n", " \n", "None", "nan", "()", "[]", " ,", ";;", ", ."):
        assert trace not in text, (trace, text)
    for part in parts:
        assert part.rstrip(". ") in text


PRINTED = {
    "items-3": "ae2bd2668a4c7155",
    "ranking-5": "308a4994535da8c6",
    "server-1": "a4e2b36255d67e30",
    "users-3": "af78423e6485b564",
}
"""Version -> hash of the module's text without the line of its version."""


def text_of(name: str) -> str:
    lines = Path(prompts.__path__[0], f"{name}.py").read_text(encoding="utf-8").splitlines(keepends=True)
    return hashlib.sha256("".join(line for line in lines if not line.startswith("VERSION")).encode()).hexdigest()[:16]


@pytest.mark.parametrize("name", NAMES)
def test_a_changed_text_raises_its_version(name: str) -> None:
    version = importlib.import_module(f"mllm_srec.prompts.{name}").VERSION
    assert PRINTED.get(version) == text_of(name), (
        f"prompts/{name}.py is not what {version} was: raise its VERSION, so that rows made with the old texts are "
        f"made again, and enter {text_of(name)!r} above"
    )


def test_every_module_has_a_version_of_its_own() -> None:
    assert NAMES == ["items", "ranking", "server", "users"]
    versions = [importlib.import_module(f"mllm_srec.prompts.{name}").VERSION for name in NAMES]
    assert len(set(versions)) == len(NAMES)
    for name, version in zip(NAMES, versions, strict=True):
        assert re.fullmatch(rf"{name}-\d+", version)


def test_no_prompt_is_written_outside_the_prompts() -> None:
    root = Path(mllm_srec.__file__).parent
    found, asked = [], 0
    for path in sorted(set(root.rglob("*.py")) - set(root.glob("prompts/*"))):
        for call in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id in ("Prompt", "Request"):
                asked += 1
                texts = [node.value for node in ast.walk(call) if isinstance(node, ast.Constant)]
                found += [f"{path.name}: {text}" for text in texts if isinstance(text, str) and text.strip()]
    assert found == []
    assert asked >= 8


# Items


@given(MAYBE, MAYBE, MAYBE, MAYBE)
def test_the_fusion_instruction_names_only_what_is_given(title: str, category: str, text: str, visual: str) -> None:
    made = items.fuse(title, category, text, visual)
    check(made, title, category, text, visual)
    labels = {"Title: ": title, "Category: ": category, "Text: ": text, "Seen in the picture: ": visual}
    for label, value in labels.items():
        assert (label in made) == bool(value)


@given(MAYBE, MAYBE)
def test_a_composed_description_is_the_text_and_what_was_seen(text: str, visual: str) -> None:
    made = items.compose(text, visual)
    if text or visual:
        check(made, text, visual)
    else:
        assert made == ""
    assert ("Picture" in made) == bool(visual)


@pytest.mark.parametrize("name", items.QUESTIONS)
def test_a_question_follows_the_picture_and_the_answer_has_begun(name: str) -> None:
    question = items.QUESTIONS[name]
    check(items.PICTURE + "x" + items.ask(question.ask))
    check(items.NO_PICTURE + items.ask(question.ask))
    assert question.ask.endswith("?")
    assert question.answer and question.answer == question.answer.strip()  # the answer's own space follows
    for option in (*question.options, "red shoe"):
        space = "" if question.answer.endswith('"') else " "
        check(question.answer + space + option)
        check(question.say.format(option), option)


@pytest.mark.parametrize("name", items.QUESTIONS)
def test_no_option_is_the_beginning_of_another(name: str) -> None:
    options = items.QUESTIONS[name].options
    assert len(options) != 1
    for one, other in itertools.permutations(options, 2):
        assert not other.startswith(one)


def test_only_what_an_item_is_or_shows_and_what_is_written_is_answered_in_own_words() -> None:
    assert [name for name, question in items.QUESTIONS.items() if not question.options] == ["kind", "scene", "text"]
    for names in items.DOMAINS.values():
        assert sum(not items.QUESTIONS[name].options for name in names) <= 2


def test_domains_are_made_of_the_questions_and_the_settings_know_both() -> None:
    fields = ItemsConfig.model_fields
    assert set(get_args(Questions)) == set(items.QUESTIONS)
    assert get_args(fields["domain"].annotation) == ("auto", *items.DOMAINS)
    for domain, names in items.DOMAINS.items():
        assert set(names) <= set(items.QUESTIONS)
        assert len(set(names)) == len(names)
        assert len({"kind", "scene"} & set(names)) == 1  # what the summary is built around
        assert bool(set(names) & set(fields["questions"].default)) == (domain != "films")  # the config says why
    assert {name for names in items.DOMAINS.values() for name in names} == set(items.QUESTIONS)


def test_a_word_leads_to_one_domain() -> None:
    assert set(items.DOMAIN_WORDS) == set(items.DOMAINS) - {"general"}
    known = [word for of_domain in items.DOMAIN_WORDS.values() for word in of_domain]
    assert len(set(known)) == len(known)
    assert all(words(word) == [word] for word in known)  # as the words of a category are cut


@pytest.mark.parametrize(
    ("answers", "text"),
    [
        ({"kind": "t-shirt", "colour": "red", "pattern": "striped"}, "red striped t-shirt"),
        ({"pattern": "striped", "colour": "red", "kind": "t-shirt"}, "red striped t-shirt"),
        ({"kind": "red t-shirt", "colour": "red", "pattern": "plain"}, "plain red t-shirt"),
        ({"kind": "coloured pencil", "colour": "red"}, "red coloured pencil"),  # "red" is no word of it
        ({"colour": "red"}, "red"),
        ({"scene": "man on a horse", "mood": "dark", "setting": "nature"}, "man on a horse, dark mood, set in nature"),
        ({"kind": "hat", "material": "knit", "whom": "men"}, "hat, made of knit, for men"),
        ({"kind": "hat", "style": "casual"}, "hat, casual style"),
        ({"kind": "milk", "package": "in a carton", "text": "oat"}, 'milk, in a carton, with the words "oat"'),
        ({"kind": "", "mood": "tense"}, "tense mood"),
        ({"kind": "", "colour": ""}, ""),
        ({}, ""),
    ],
)
def test_a_visual_summary_by_hand(answers: dict[str, str], text: str) -> None:
    assert items.summary(answers) == text


@given(
    st.fixed_dictionaries(
        {},
        optional={name: st.sampled_from(("", *(q.options or ("sun hat",)))) for name, q in items.QUESTIONS.items()},
    )
)
def test_a_visual_summary_says_all_that_was_seen(answers: dict[str, str]) -> None:
    made = items.summary(answers)
    if answers.get("kind"):
        answers.pop("scene", None)
    seen = [answer for answer in answers.values() if answer]
    if seen:
        check(made, *seen)
        assert not made.endswith((",", " "))
    else:
        assert made == ""


# Users

MINUTE, HOUR, DAY = 60_000, 3_600_000, 86_400_000


@pytest.mark.parametrize(
    ("ms", "text"),
    [
        (0, "moments"),
        (MINUTE - 1, "moments"),
        (MINUTE, "1 minute"),
        (1.5 * MINUTE, "2 minutes"),
        (2 * HOUR - MINUTE, "119 minutes"),
        (2 * HOUR, "2 hours"),
        (2.5 * HOUR, "3 hours"),
        (2 * DAY - HOUR, "47 hours"),
        (2 * DAY, "2 days"),
        (13 * DAY, "13 days"),
        (14 * DAY, "2 weeks"),
        (21 * DAY, "3 weeks"),
        (60 * DAY, "9 weeks"),
        (61 * DAY, "2 months"),
        (365 * DAY, "12 months"),
        (730 * DAY, "2 years"),
        (10_000 * DAY, "27 years"),
    ],
)
def test_a_duration_is_told_in_the_largest_unit_that_it_holds_twice(ms: float, text: str) -> None:
    assert users.duration(ms) == text


@given(st.floats(MINUTE, 1e13))
def test_a_duration_is_off_by_half_a_unit_at_most(ms: float) -> None:
    number, unit = users.duration(ms).split()
    sizes = {"minute": MINUTE, "hour": HOUR, "day": DAY, "week": 7 * DAY, "month": 730 * HOUR, "year": 365 * DAY}
    size = sizes[unit.removesuffix("s")]
    assert (int(number) > 1) == unit.endswith("s")
    assert abs(int(number) * size - ms) <= size / 2 * 1.001
    assert size == MINUTE or ms >= 2 * size


@given(WORDS, MAYBE, st.none() | st.just(3.0 * DAY), st.booleans())
def test_an_event_tells_what_is_known_of_it(line: str, looks: str, wait: float | None, disliked: bool) -> None:
    made = users.event(line, looks, wait, disliked)
    check(made, line, looks)
    assert (users.duration(3 * DAY) in made) == (wait is not None)
    assert made.endswith("rated low") == disliked


@given(SOME, MANY)
def test_a_window_is_a_list_of_its_events(told: list[str], tastes: list[str]) -> None:
    made = users.summarise(told, tastes)
    check(made, *told, *tastes)
    assert ("hared" in made) == bool(tastes)
    assert made.count("\n- ") == len(told)
    assert made.endswith("?")
    assert users.summary(tastes) == (", ".join(tastes) or users.NO_TASTE)


@given(MANY, MANY, MANY, MANY, MANY, st.just(users.NO_TASTE) | WORDS)
def test_a_preference_says_each_movement_or_that_nothing_is_known(
    stays: list[str], rises: list[str], fades: list[str], lately: list[str], disliked: list[str], summary: str
) -> None:
    made = users.preference(stays, rises, fades, lately, disliked, summary)
    known = [] if summary == users.NO_TASTE else [summary]
    more = [name for name in lately if name.lower() not in summary.lower()]  # what the summary names is not said twice
    check(made, *stays, *rises, *fades, *more, *disliked, *known)
    parts = {
        "stays with": stays,
        "newly turns to": rises,
        "turns away from": fades,
        "chooses": more,
        "rated low": disliked,
    }
    assert [verb for verb in parts if verb in made] == [verb for verb, names in parts.items() if names]
    assert (made == users.NOTHING) == (not any(parts.values()) and not known)
    if known:
        assert made.endswith(summary.rstrip(". "))  # the prompt sets the full stop


PRICES, RHYTHM, BREADTH = (17.4, 32.6), users.rhythm(3 * DAY, 90 * DAY), users.breadth(2, 18)


@given(
    MANY,
    MANY,
    MANY,
    st.sampled_from(["", *users.ORIGINS]),
    st.sampled_from(["", BREADTH]),
    st.none() | st.just(PRICES),
    st.sampled_from(["", RHYTHM]),
)
def test_a_profile_says_what_is_known_and_hints_only_without_a_taste(
    tastes: list[str],
    hints: list[str],
    dislikes: list[str],
    origin: str,
    breadth: str,
    prices: tuple[float, float] | None,
    rhythm: str,
) -> None:
    made = users.profile(tastes, hints, dislikes, origin, breadth, prices, rhythm)
    check(made, *(tastes or hints), *dislikes, users.ORIGINS.get(origin, ""), breadth, rhythm)
    assert ("perhaps" in made) == (not tastes and bool(hints))
    assert ("dislikes" in made) == bool(dislikes)
    assert ("17 to 33" in made) == (prices is not None)
    assert made.startswith(users.NOTHING) == (not tastes and not hints)
    assert users.strongly("wool") != "wool" and "wool" in users.strongly("wool")


@pytest.mark.parametrize(("chosen", "known", "keeps"), [(1, 1, True), (1, 3, True), (2, 8, True), (3, 8, False)])
def test_few_of_many_categories_are_kept_to(chosen: int, known: int, keeps: bool) -> None:
    made = users.breadth(chosen, known)
    check(made, f"{chosen} of {known}")
    assert made.startswith("keeps to") == keeps


@pytest.mark.parametrize(
    ("typical", "longest", "told"),
    [
        (0, 0, []),
        (HOUR - 1, DAY - 1, []),
        (HOUR, HOUR, ["60 minutes"]),
        (3 * DAY, 90 * DAY, ["3 days", "3 months"]),
        (0, DAY, ["24 hours"]),
    ],
)
def test_a_rhythm_tells_the_typical_wait_and_long_breaks(typical: float, longest: float, told: list[str]) -> None:
    made = users.rhythm(typical, longest)
    check(made, *told)
    assert len(re.findall(r"\d+", made)) == len(told)


def test_the_wait_is_a_sentence_of_its_own() -> None:
    check(users.since(3 * DAY), "3 days")
    assert users.since(0).endswith(".") and users.since(0) != users.since(MINUTE)


# Ranking


@given(MAYBE, MAYBE, MANY)
def test_the_prefix_holds_what_is_known_and_ends_where_the_item_begins(
    taste: str, movement: str, recent: list[str]
) -> None:
    made = ranking.prefix(taste or users.NOTHING, movement or users.NOTHING, recent)
    check(made, taste, movement, *recent)
    assert made.endswith("Will the user choose this item next?\nItem: ")
    assert ("oldest first" in made) == bool(recent)
    wait = users.since(3 * DAY)
    told = ranking.prefix(taste or users.NOTHING, movement or users.NOTHING, recent, wait)
    assert made == told.replace(f"{wait}\n", "") != told
    full = ranking.prefix(taste or users.NOTHING, movement or users.NOTHING, recent, wait, "tea.", "oat milk.")
    assert told == full.replace("Typical choice: tea.\n", "").replace("Newest choice: oat milk.\n", "")
    assert full.index("Typical choice: tea.") < full.index("Newest choice: oat milk.") < full.index(wait)
    assert ranking.prefix("", "", recent) == made[made.index("Last choices" if recent else "Will the user") :]


@given(MAYBE, MAYBE, MAYBE)
def test_an_item_has_a_short_and_a_long_form_whatever_it_lacks(title: str, category: str, description: str) -> None:
    long, short = ranking.candidate(title, category, description), ranking.line(title, category)
    check(long, title, category, description)
    check(short, title, category)
    assert re.search(r"[^. ]\.$", long)
    for asked in (ranking.QUESTION, ranking.QUESTION_COT):
        check(long + asked)
    if not (title or category or description):
        assert (long, short) == ("item without text.", "item without text")


@pytest.mark.parametrize(
    ("parts", "text"),
    [
        (("Hat", "Wool", "warm ..."), "Hat. Wool. warm."),
        (("Hat.", "", ""), "Hat."),
        (("...", "", "warm"), "warm."),
    ],
)
def test_a_candidate_by_hand(parts: tuple[str, str, str], text: str) -> None:
    assert ranking.candidate(*parts) == text


@given(SOME, MANY, SOME, st.booleans())
def test_a_rationale_ends_with_the_answer(facts: list[str], like: list[str], other: list[str], chosen: bool) -> None:
    told = [ranking.meets(facts, like), ranking.shares(facts, other), ranking.lacks(facts), ranking.against(facts)]
    for sentence, named in zip(told, ([*facts, *like], [*facts, *other], facts, facts), strict=True):
        check(sentence, *named)
        assert sentence.endswith(".")
    made = ranking.rationale(told, chosen)
    check(made, *told)
    assert made.endswith(". Yes" if chosen else ". No")


@pytest.mark.parametrize(
    ("facts", "like", "text"),
    [
        (["a"], [], "It meets the taste for a."),
        (["a", "b"], ["x"], "It meets the taste for a and b, like x."),
        (["a", "b", "c"], ["x", "y"], "It meets the taste for a, b and c, like x and y."),
    ],
)
def test_names_are_joined_as_in_speech(facts: list[str], like: list[str], text: str) -> None:
    assert ranking.meets(facts, like) == text


def test_reasons_from_the_log_and_from_content_name_the_event() -> None:
    check(ranking.together("a hat"), "a hat")
    assert ranking.similar("a hat") == "Close in content to a hat."
    assert ranking.similar("a hat", ["red", "wool"]) == "Close in content to a hat: both have red and wool."
    check(ranking.NOTHING_MET.replace("None of", "No part of"))
    check(ranking.POPULAR)


def test_a_larger_model_is_told_the_answer_and_asked_for_the_other_side_of_it() -> None:
    yes, no = ranking.ask_rationale(True), ranking.ask_rationale(False)
    check("x" + yes, "The right answer is Yes.")
    check("x" + no, "The right answer is No.")
    assert yes.startswith("\n") and no.startswith("\n")
    assert ("lacks" in yes, "lacks" in no) == (False, True)


# Server


@given(SOME, WORDS)
def test_what_a_server_is_told_ends_the_question_in_a_line_of_its_own(options: list[str], answer: str) -> None:
    for question in (items.ask("What is it?"), ranking.QUESTION):
        asked = "x" + question + server.choose(options)
        check(asked, *options)
        assert asked.endswith(f"\nAnswer with one of: {', '.join(options)}.")
        begun = "x" + question + server.begin(answer)
        check(begun, answer)
        assert begun.splitlines()[-1] == f"Begin your answer with: {answer}"
