"""The one interface of the model: prompts of text and pictures in; texts, scores, likelihoods and vectors out."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from mllm_srec.errors import ModelError
from mllm_srec.store_files import fingerprint


@dataclass(frozen=True)
class Picture:
    """A checked picture: its content hash and its raw bytes."""

    sha256: str
    data: bytes


Part = str | Picture
Candidate = str | tuple[Part, ...]
"""An item's text, or its texts and pictures in the order they are to be read."""


def told(content: Candidate) -> str:
    """Tells contents apart: a text is itself; texts and pictures are a hash of theirs, in order."""
    if isinstance(content, str):
        return content
    return fingerprint(*(f"picture {p.sha256}" if isinstance(p, Picture) else f"text {p}" for p in content))


@dataclass(frozen=True)
class Prompt:
    """One turn of the user, made of text and pictures; `answer` is what the assistant's turn already begins with."""

    parts: tuple[Part, ...]
    system: str = ""
    answer: str = ""


@dataclass(frozen=True)
class Request:
    """Candidates that share a prefix: each is read as `prefix` + candidate + its note + `question`, without seeing the
    others.

    Without a question only the candidates' likelihood is asked for; with `likelihood` false only the odds are, which
    saves the head over the whole vocabulary at every token. `notes`, one per candidate or none at all, are read and not
    foretold: no part of the likelihood.
    """

    prefix: Prompt
    candidates: tuple[Candidate, ...]
    question: str = ""
    likelihood: bool = True
    notes: tuple[str, ...] = ()

    def note(self, number: int) -> str:
        """What is read between candidate `number` and the question."""
        return self.notes[number] if self.notes else ""


@dataclass(frozen=True)
class Question:
    """One question behind a shared prefix; `answer` is what the assistant's turn begins with.

    `about` is read before the question, and made to tokens apart from it, as a `Request`'s candidate is. With `options`
    the model chooses: their likelihoods are read and nothing is generated. Without, it writes. No option may be the
    beginning of another one: it would always be the likelier.
    """

    ask: str
    answer: str = ""
    options: tuple[str, ...] = ()
    about: str = ""


@dataclass(frozen=True)
class Answer:
    """What a model answered to a `Question`."""

    text: str
    """Its own words, or the likeliest option."""
    loglik: float | None
    """Mean log-likelihood per token of its own words (0 if it wrote none), or the likeliest option's log-likelihood.

    None: the backend gives no likelihoods.
    """
    options: np.ndarray
    """float32 (O,): log-likelihood of each option, summed over its tokens; (0,) where the question has none."""


class PartialFailure(ModelError):  # noqa: N818 - the rows that did not fail are its content
    """Some rows of a batch failed for good: `results` is what the method returns, with None at those rows.

    `errors` says why, by row.
    """

    def __init__(self, results: Sequence[Any], errors: Mapping[int, str]) -> None:
        super().__init__(results, errors)  # all arguments, so that a copy sent by another process can be rebuilt
        self.results = list(results)
        self.errors = dict(errors)

    def __str__(self) -> str:
        first = min(self.errors)
        return f"{len(self.errors)} of {len(self.results)} rows failed, row {first}: {self.errors[first]}"


class Mllm(Protocol):
    """A multimodal large language model, batched. Every method keeps the order of its input."""

    @property
    def identity(self) -> str:
        """Content hash of weights and adapter with the data type: two equal identities give equal rows."""

    def generate(self, prompts: Sequence[Prompt], max_new_tokens: int) -> list[str]:
        """Greedy continuations, at most `max_new_tokens` tokens each, without special tokens."""

    def ask(self, prefixes: Sequence[Prompt], questions: Sequence[Question], max_new_tokens: int) -> list[list[Answer]]:
        """Every question to every prefix: one list of answers per prefix, in the questions' order.

        A prefix (pictures and text of the user's turn) is read once for all questions. Own words are greedy, at most
        `max_new_tokens` tokens per question.
        """

    def score(self, requests: Sequence[Request]) -> list[np.ndarray]:
        """float32 (C_i, 2) per request, from one packed pass.

        Column 0: log-odds of "Yes" over "No" as the answer's first token, NaN without a question. Column 1: mean
        log-likelihood of the tokens of the candidate's text given the prefix, NaN where it is not asked for.
        """

    def loglik(self, prompts: Sequence[Prompt], continuations: Sequence[str]) -> np.ndarray:
        """float32 (N,): mean log-likelihood per token of each continuation after its prompt."""

    def embed(self, prompts: Sequence[Prompt]) -> np.ndarray:
        """float32 (N, D), L2-normalised: mean of the last hidden states over the prompt's tokens."""


def check_finite(values: np.ndarray, what: str) -> np.ndarray:
    """`values` as they are.

    Raises:
        ModelError: one of them is NaN or infinite, so that comparing it would silently decide something.
    """
    if not np.isfinite(values).all():
        raise ModelError(f"the model gave {what} that are not finite: try model.dtype=float32")
    return values
