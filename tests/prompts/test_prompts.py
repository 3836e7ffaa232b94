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
from hypothesis import example, given
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
    "ranking-1": "9bdd1919dd4f195b",
    "server-1": "a4e2b36255d67e30",
    "users-1": "f12222dead9394b3",
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


@given(SOME, MANY)
def test_a_window_is_a_list_of_its_items(lines: list[str], phrases: list[str]) -> None:
    weighed, written = users.window(lines), users.summarise(lines, phrases)
    check(weighed, *lines)
    check(written, *lines, *phrases)
    assert ("share" in written) == bool(phrases)
    for text in (weighed, written):
        assert text.count("\n- ") == len(lines)
    check(users.rated_low(lines[0]), lines[0])
    assert users.window([]) != users.EMPTY_WINDOW


@given(MANY, MANY, MANY, MANY)
def test_a_preference_says_each_movement_or_that_nothing_is_known(
    stays: list[str], rises: list[str], fades: list[str], disliked: list[str]
) -> None:
    made = users.preference(stays, rises, fades, disliked)
    check(made, *stays, *rises, *fades, *disliked)
    parts = {"stays with": stays, "newly turns to": rises, "turns away from": fades, "rated low": disliked}
    assert [verb for verb in parts if verb in made] == [verb for verb, phrases in parts.items() if phrases]
    assert (made == users.NOTHING) == (not any(parts.values()))
    check(users.summary(stays), *stays)


@given(MANY, st.integers(0, 99), st.none() | st.floats(0, 5000))
@example(["wool"], 2, 0.5)
def test_a_profile_says_tastes_size_and_rhythm(stable: list[str], count: int, gap: float | None) -> None:
    made = users.profile(stable, count, gap)
    check(made)
    assert "0 day" not in re.sub(r"[1-9]\d*0 day", "", made)
    if count:
        check(made, *stable)
        assert f"{count} choice{'' if count == 1 else 's'} so far" in made
        assert ("typically" in made) == (gap is not None)
    else:
        assert made == users.NOTHING


@pytest.mark.parametrize(
    ("gap", "rhythm"),
    [
        (0.4, "several a day"),
        (0.5, "several a day"),
        (0.6, "one in 1 day"),
        (1.5, "one in 2 days"),
        (7, "one in 7 days"),
    ],
)
def test_a_rhythm_is_said_in_whole_days(gap: float, rhythm: str) -> None:
    assert users.profile([], 1, gap) == f"has a broad taste; 1 choice so far, typically {rhythm}"


@given(MANY, WORDS)
def test_the_models_own_words_end_the_preference(stays: list[str], summary: str) -> None:
    made = users.in_own_words(users.preference(stays, [], [], []), summary)
    check(made, *stays, summary)
    assert not made.endswith(".")  # the prompt sets the full stop


# Ranking


@given(MAYBE, MAYBE, MANY)
def test_the_prefix_holds_what_is_known_and_ends_where_the_item_begins(
    taste: str, movement: str, recent: list[str]
) -> None:
    made = ranking.prefix(taste or users.NOTHING, movement or users.NOTHING, recent)
    check(made, taste, movement, *recent)
    assert made.endswith("Will the user choose this item next?\nItem: ")
    assert ("oldest first" in made) == bool(recent)


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


@given(MANY, MANY, st.booleans())
def test_a_rationale_ends_with_the_answer(meets: list[str], like: list[str], chosen: bool) -> None:
    made = ranking.rationale(meets, like if meets else [], chosen)
    check(made.replace("None of its facts", "No fact"), *meets, *(like if meets else []))
    assert made.endswith(". Yes" if chosen else ". No")
    check(ranking.together("a hat"), "a hat")
    check(ranking.similar("a hat"), "a hat")


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
