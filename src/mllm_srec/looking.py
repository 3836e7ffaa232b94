"""Reading pictures: questions, answers, and which of them the picture itself gave.

An answer counts as seen only if the picture makes it likelier than no picture does: what a model answers without
looking it did not see.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from mllm_srec.errors import ModelError
from mllm_srec.mllm.base import Answer, Mllm, PartialFailure, Picture, Prompt, Question, check_finite
from mllm_srec.prompts import items as prompts
from mllm_srec.vocabulary import COLOURS, KINDS

MIN_EVIDENCE, MIN_LOGLIK = 1.5, -0.6
"""Nats per token of an answer in the model's own words: by how much the picture must make it likelier than no picture
does, and how likely it must be then."""
MIN_SHARE, MIN_ODDS_RATIO = 0.7, 2.0
"""Of a chosen option: its share among the options with the picture, and its odds then over those without a picture."""

_BREAK = re.compile(
    r"[.,;:\n!?()\"]|\b(?:who|which|that|with|from|on|against|behind|beside|near|next\s+to|in\s+(?:front|the|an?))\b"
)
_DANGLING = frozenset(("a", "an", "and", "in", "is", "it", "its", "of", "on", "or", "the", "this", "to", "was"))
_NOISE = re.compile(
    r"\b(?:background|backdrop|watermark|shutterstock|getty|alamy|istock|copyright|www|https?|logo)\b|[©®]"
)
_NOTHING = frozenset(("unknown", "none", "nothing", "no", "not visible", "unclear", "picture", "image", "photo"))


@dataclass(frozen=True)
class Look:
    """What was seen in one picture: question name -> answer; `error` says why it could not be read."""

    seen: dict[str, str] = field(default_factory=dict)
    error: str = ""


def clean_answer(text: str) -> str:
    """What an answer names, in lower case: up to its first break or clause, without article and dangling words.

    What stands around the main thing is no part of it. An answer about background, watermark or nothing is "", and so
    is one that says a word twice or ends in a colour: a model that does not know the thing stammers so.
    """
    words = _BREAK.split(text.strip().lower(), maxsplit=1)[0].split()
    while words and words[-1] in _DANGLING:
        words.pop()
    while words and words[0] in ("a", "an", "the"):
        words.pop(0)
    answer = " ".join(words)
    long = [word for word in words if len(word) > 3]  # "and" may stand twice
    colour = bool(words) and words[-1] in COLOURS and words[-1] not in KINDS
    stammers = colour or len(set(long)) < len(long)
    return "" if stammers or answer in _NOTHING or _NOISE.search(answer) else answer


def shares(logliks: np.ndarray) -> np.ndarray:
    """float64 (O,): the options' probabilities among themselves.

    Raises:
        ModelError: the likelihoods are not finite.
    """
    check_finite(logliks, "likelihoods of options")
    likely = np.exp(logliks.astype(np.float64) - logliks.max())
    found: np.ndarray = likely / likely.sum()
    return found


class Looker:
    """Asks about pictures; what the model says without any is asked once and remembered."""

    def __init__(self, mllm: Mllm, answer_tokens: int) -> None:
        self._mllm, self._tokens = mllm, answer_tokens
        self._blind: dict[str, Answer] = {}
        self._unseen: dict[tuple[str, str], float] = {}

    def look(self, pictures: Sequence[Picture], names: Sequence[str]) -> list[Look]:
        """Ask the questions `names` of `prompts.QUESTIONS` about every picture.

        Raises:
            ModelError: the model gave likelihoods that are not finite, or does not answer without a picture.
        """
        if not pictures or not names:
            return [Look() for _ in pictures]
        asked = [self._question(name) for name in names]
        errors: dict[int, str] = {}
        try:
            told = self._mllm.ask([Prompt((prompts.PICTURE, picture)) for picture in pictures], asked, self._tokens)
        except PartialFailure as failure:
            told, errors = failure.results, failure.errors
        self._ask_blind(names)
        columns = {}
        for at, name in enumerate(names):
            columns[name] = self._judge(
                name, [None if row in errors else told[row][at] for row in range(len(pictures))]
            )
        looks = []
        for row in range(len(pictures)):
            seen = {name: columns[name][row] for name in names if columns[name][row]}
            looks.append(Look(seen, errors.get(row, "")))
        return looks

    def _question(self, name: str) -> Question:
        question = prompts.QUESTIONS[name]
        return Question(prompts.ask(question.ask), question.answer, question.options)

    def _ask_blind(self, names: Sequence[str]) -> None:
        new = [name for name in names if name not in self._blind]
        if new:
            asked = [self._question(name) for name in new]
            try:
                answers = self._mllm.ask([Prompt((prompts.NO_PICTURE,))], asked, self._tokens)
            except PartialFailure as failure:
                raise ModelError(
                    "the questions could not be asked without a picture, which every answer is compared with: "
                    f"{failure.errors[0]}; run the same command again"
                ) from failure
            self._blind.update(zip(new, answers[0], strict=True))

    def _judge(self, name: str, answers: Sequence[Answer | None]) -> list[str]:
        """Per row the answer that counts as seen, or ""."""
        blind = self._blind[name]
        if prompts.QUESTIONS[name].options:
            return [answer.text if answer and _chosen(answer, blind) else "" for answer in answers]
        texts = [clean_answer(answer.text) if answer else "" for answer in answers]
        known = [(row, a) for row, a in enumerate(answers) if a and texts[row] and a.loglik is not None]
        unseen = dict(zip((row for row, _ in known), self._without(name, [a.text for _, a in known]), strict=True))
        found = []
        for row, answer in enumerate(answers):
            if answer is None or not texts[row]:
                found.append("")
            elif answer.loglik is None:
                found.append(texts[row] if texts[row] != clean_answer(blind.text) else "")
            else:
                check_finite(np.array([answer.loglik, unseen[row]]), "likelihoods of answers")
                evident = answer.loglik >= MIN_LOGLIK and answer.loglik - unseen[row] >= MIN_EVIDENCE
                found.append(texts[row] if evident else "")
        return found

    def _without(self, name: str, texts: Sequence[str]) -> list[float]:
        """Mean log-likelihood per token of each text as the answer without a picture."""
        new = sorted({text for text in texts if (name, text) not in self._unseen})
        if new:
            question = prompts.QUESTIONS[name]
            blind = Prompt((prompts.NO_PICTURE + prompts.ask(question.ask),), answer=question.answer)
            space = "" if question.answer.endswith('"') else " "  # as the model's own words follow
            values = self._mllm.loglik([blind] * len(new), [f"{space}{text}" for text in new])
            self._unseen.update({(name, text): float(v) for text, v in zip(new, values, strict=True)})
        return [self._unseen[name, text] for text in texts]


def _chosen(looked: Answer, blind: Answer) -> bool:
    if looked.loglik is None or blind.loglik is None:
        return bool(looked.text) and looked.text != blind.text
    with_picture, without = shares(looked.options), shares(blind.options)
    best = int(with_picture.argmax())
    share, prior = with_picture[best], without[best]
    # share / (1 - share) >= ratio * prior / (1 - prior), which also holds where one of them is 1
    return bool(share >= MIN_SHARE and share * (1 - prior) >= MIN_ODDS_RATIO * prior * (1 - share))
