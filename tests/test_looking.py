"""An answer counts as seen only where the picture gave it, and nothing is asked twice."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fakes import FakeMllm, shown
from mllm_srec.errors import ModelError
from mllm_srec.looking import MIN_EVIDENCE, MIN_LOGLIK, MIN_ODDS_RATIO, MIN_SHARE, Look, Looker, clean_answer, shares
from mllm_srec.mllm.base import Answer, PartialFailure, Picture, Prompt, Question
from mllm_srec.prompts import items as prompts

HAT, MUG, BALL = (Picture(name, b"") for name in ("hat", "mug", "ball"))
PATTERNS = prompts.QUESTIONS["pattern"].options
NONE = np.zeros(0, np.float32)


def written(text: str, loglik: float | None = -0.5) -> Answer:
    return Answer(text, loglik, NONE)


def chosen(share: float, option: int = 0) -> Answer:
    """A choice among the patterns: `option` has this share, the others the rest in equal parts."""
    logliks = np.full(len(PATTERNS), np.log((1 - share) / (len(PATTERNS) - 1)), np.float32)
    logliks[option] = np.log(share)
    best = int(logliks.argmax())
    return Answer(PATTERNS[best], float(logliks[best]), logliks)


@dataclass
class Told(FakeMllm):
    """Answers every question before a picture with `looking`, before none with `blind`."""

    looking: Answer = field(default_factory=lambda: written("red hat"))
    blind: Answer = field(default_factory=lambda: written("thing"))

    def _answer(self, prefix: Prompt, question: Question, max_new_tokens: int) -> Answer:
        return self.looking if any(isinstance(part, Picture) for part in prefix.parts) else self.blind


def seen(mllm: FakeMllm, name: str) -> str:
    (look,) = Looker(mllm, 8).look([HAT], [name])
    assert look.error == ""
    return look.seen.get(name, "")


# Words


@pytest.mark.parametrize(
    ("said", "answer"),
    [
        (" A Red shoe. It is on the floor", "red shoe"),
        ("pair of white", ""),
        ("pair of pair of shoes", ""),
        ("orange", "orange"),  # the fruit
        ("blood orange", "blood orange"),
        ("woman with a hat", "woman"),
        ("cat in  the sun", "cat"),
        ("poster of the", "poster"),
        ("t-shirt (cotton)", "t-shirt"),
        ("withered rose", "withered rose"),
        ("inflatable ball", "inflatable ball"),
        ('SALE" in red letters', "sale"),
        ("an the old hat", "old hat"),
        ("hat\nWhat colour is it?", "hat"),
        ("the", ""),
        ("\n?", ""),
        ("", ""),
        ("Unknown.", ""),
        ("not visible", ""),
        ("a photo", ""),
        ("photo album", "photo album"),
        ("white background", ""),
        ("hat © getty", ""),
        ("www", ""),
        ("logotype", "logotype"),
    ],
)
def test_an_answer_is_what_it_names_first(said: str, answer: str) -> None:
    assert clean_answer(said) == answer


@given(st.lists(st.sampled_from(["A", "the", "hat", " in", " ", "an", ". ", "\n", "of ", "with", "logo", "photo"])))
def test_a_clean_answer_is_clean(parts: list[str]) -> None:
    answer = clean_answer("".join(parts))
    assert clean_answer(answer) == answer
    assert answer == " ".join(answer.split()).lower()
    assert answer.split()[:1] not in (["a"], ["an"], ["the"])
    assert answer.split()[-1:] not in (["of"], ["the"], ["in"])


# Shares


def test_shares_by_hand() -> None:
    np.testing.assert_allclose(shares(np.log(np.array([1, 3], np.float32))), [0.25, 0.75], rtol=1e-6)
    np.testing.assert_allclose(shares(np.array([-2000, -2000, -9000], np.float32)), [0.5, 0.5, 0])


@given(st.lists(st.floats(-500, 0, width=32), min_size=1, max_size=9))
def test_shares_add_up_and_keep_the_order(values: list[float]) -> None:
    found = shares(np.array(values, np.float32))
    assert found.sum() == pytest.approx(1)
    assert (np.diff(found[np.argsort(values)]) >= 0).all()


# Own words


@pytest.mark.parametrize(
    ("loglik", "unseen", "answer"),
    [
        (-0.5, -0.5 - MIN_EVIDENCE, "red hat"),
        (-0.5, -0.49 - MIN_EVIDENCE, ""),
        (-0.5, -0.5, ""),  # as likely without the picture
        (-0.5, -0.1, ""),
        (MIN_LOGLIK, -9.0, "red hat"),
        (MIN_LOGLIK - 0.01, -9.0, ""),  # unlikely even with the picture
    ],
)
def test_own_words_must_be_likely_and_much_likelier_than_without_the_picture(
    loglik: float, unseen: float, answer: str
) -> None:
    assert seen(Told(looking=written("A red hat.", loglik), likelihood=lambda *_: unseen), "kind") == answer


@pytest.mark.parametrize("said", ["", "the", "white background"])
def test_an_answer_that_names_nothing_was_not_seen_and_is_not_weighed(said: str) -> None:
    mllm = Told(looking=written(said, 0.0), likelihood=lambda *_: -9.0)
    assert seen(mllm, "kind") == ""
    assert mllm.weighed == []


def test_words_are_weighed_as_they_were_written_behind_the_same_question() -> None:
    mllm = Told(looking=written("A red hat."), likelihood=lambda *_: -9.0)
    assert seen(mllm, "kind") == "red hat"
    assert mllm.weighed == [("Picture: none\nWhat is in the picture?The picture shows a", " A red hat.")]
    quoted = Told(looking=written("Sale"), likelihood=lambda *_: -9.0)
    assert seen(quoted, "text") == "sale"
    before, words = quoted.weighed[0]
    assert (before[-1], words) == ('"', "Sale")  # no space stands behind a quotation mark


# Options

EVEN = 4 / MIN_ODDS_RATIO / (1 + 4 / MIN_ODDS_RATIO)
"""The share without a picture that a share of 0.8, odds of 4, just makes up for."""


@pytest.mark.parametrize(
    ("share", "blind", "answer"),
    [
        (MIN_SHARE + 0.001, 0.25, "plain"),
        (MIN_SHARE - 0.001, 0.25, ""),
        (0.8, EVEN - 0.001, "plain"),
        (0.8, EVEN + 0.001, ""),
        (0.99, 0.9, "plain"),  # however likely it was, the picture can make it surer
        (0.9, 0.9, ""),  # as likely without the picture
        (0.9, 0.1, "plain"),
    ],
)
def test_an_option_must_have_most_and_much_more_than_without_the_picture(
    share: float, blind: float, answer: str
) -> None:
    mllm = Told(looking=chosen(share), blind=chosen(blind))
    assert seen(mllm, "pattern") == answer
    assert mllm.weighed == []


def test_the_option_is_compared_with_itself() -> None:
    """Without the picture another option is the likeliest: that says nothing against this one."""
    assert seen(Told(looking=chosen(0.8, 2), blind=chosen(0.8, 1)), "pattern") == PATTERNS[2]


# Backends without likelihoods


@pytest.mark.parametrize(
    ("name", "looking", "blind", "answer"),
    [
        ("kind", "A red hat", "Thing", "red hat"),
        ("kind", "A red hat", "red hat.", ""),  # it says so blind, too
        ("kind", "white background", "thing", ""),
        ("pattern", "striped", "plain", "striped"),
        ("pattern", "plain", "plain", ""),
        ("pattern", "", "plain", ""),
        ("pattern", "striped", "", "striped"),
    ],
)
def test_without_likelihoods_what_is_also_said_blind_was_not_seen(
    name: str, looking: str, blind: str, answer: str
) -> None:
    nothing = NONE if name == "kind" else np.full(len(PATTERNS), -np.inf, np.float32)
    mllm = Told(looking=Answer(looking, None, nothing), blind=Answer(blind, None, nothing))
    assert seen(mllm, name) == answer
    assert mllm.weighed == []


# How often is asked


def test_nothing_is_asked_without_pictures_or_without_questions() -> None:
    mllm = FakeMllm()
    assert Looker(mllm, 8).look([], ["kind"]) == []
    assert Looker(mllm, 8).look([HAT, MUG], []) == [Look(), Look()]
    assert mllm.calls() == 0


def test_each_picture_is_asked_its_questions_and_the_answers_keep_the_order() -> None:
    mllm = FakeMllm(sees={"hat": "red hat", "mug": "mug", ("mug", "It is"): "dotted"}, likelihood=lambda *_: -9.0)
    looks = Looker(mllm, 8).look([HAT, BALL, MUG], ["pattern", "kind"])
    assert looks == [Look({"kind": "red hat"}), Look(), Look({"pattern": "dotted", "kind": "mug"})]
    assert list(looks[2].seen) == ["pattern", "kind"]
    questions = [prompts.QUESTIONS[name] for name in ("pattern", "kind")]
    assert [(shown(prefix), q) for prefix, q in mllm.asked] == [
        (before, Question("\n" + question.ask, question.answer, question.options))
        for before in ("Picture: <hat>", "Picture: <ball>", "Picture: <mug>", "Picture: none")
        for question in questions
    ]


def test_the_picture_free_prompt_is_asked_once_and_each_distinct_answer_is_weighed_once() -> None:
    mllm = FakeMllm(sees={"hat": "hat", "mug": "mug", "ball": "hat"}, likelihood=lambda *_: -9.0)
    looker = Looker(mllm, 8)
    looker.look([HAT, BALL, MUG], ["kind"])
    looker.look([HAT, BALL], ["kind", "pattern"])
    looker.look([MUG], ["pattern", "kind"])
    blind = [question.answer for prefix, question in mllm.asked if shown(prefix) == prompts.NO_PICTURE]
    assert blind == [prompts.QUESTIONS[name].answer for name in ("kind", "pattern")]
    assert [text for _, text in mllm.weighed] == [" hat", " mug"]
    looker.look([HAT], ["scene"])  # the same words to another question are another matter
    assert [text for _, text in mllm.weighed] == [" hat", " mug", " hat"]


def test_at_most_the_configured_tokens_are_written() -> None:
    mllm = FakeMllm(sees={"hat": "red hat of wool"}, likelihood=lambda *_: -9.0)
    assert Looker(mllm, 2).look([HAT], ["kind"]) == [Look({"kind": "red hat"})]


# What goes wrong


class Failing(FakeMllm):
    """Fails for the hat."""

    def ask(self, prefixes: Sequence[Prompt], questions: Sequence[Question], max_new_tokens: int) -> list[list[Answer]]:
        answers = super().ask(prefixes, questions, max_new_tokens)
        failed = [row for row, prefix in enumerate(prefixes) if HAT in prefix.parts]
        if failed:
            results = [None if row in failed else answer for row, answer in enumerate(answers)]
            raise PartialFailure(results, dict.fromkeys(failed, "HTTP 500"))
        return answers


def test_a_failed_picture_says_why_and_the_others_are_read() -> None:
    mllm = Failing(sees={"mug": "mug", "hat": "hat"}, likelihood=lambda *_: -9.0)
    assert Looker(mllm, 8).look([MUG, HAT, BALL], ["kind", "pattern"]) == [
        Look({"kind": "mug"}),
        Look(error="HTTP 500"),
        Look(),
    ]
    assert " hat" not in [text for _, text in mllm.weighed]
    assert Looker(mllm, 8).look([HAT], ["kind"]) == [Look(error="HTTP 500")]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("where", ["words", "words unseen", "options", "options unseen"])
def test_a_likelihood_that_is_not_finite_stops_with_the_fix(where: str, bad: float) -> None:
    options = np.array([-1, bad, -1, -1], np.float32)
    mllm, name = {
        "words": (Told(looking=written("hat", bad)), "kind"),
        "words unseen": (Told(looking=written("hat", -0.1), likelihood=lambda *_: bad), "kind"),
        "options": (Told(looking=Answer("plain", -1.0, options), blind=chosen(0.3)), "pattern"),
        "options unseen": (Told(looking=chosen(0.9), blind=Answer("plain", -1.0, options)), "pattern"),
    }[where]
    with pytest.raises(ModelError, match=r"likelihoods.*not finite: try model.dtype=float32"):
        seen(mllm, name)
