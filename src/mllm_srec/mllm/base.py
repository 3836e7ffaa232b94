"""The one interface of the model: prompts of text and pictures in; texts, scores, likelihoods and vectors out."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np


@dataclass(frozen=True)
class Picture:
    """A checked picture: its content hash and its raw bytes."""

    sha256: str
    data: bytes


Part = str | Picture


@dataclass(frozen=True)
class Prompt:
    """One turn of the user, made of text and pictures; `answer` is what the assistant's turn already begins with."""

    parts: tuple[Part, ...]
    system: str = ""
    answer: str = ""


@dataclass(frozen=True)
class Request:
    """Candidates that share a prefix: each is read as `prefix` + candidate + `question`, without seeing the others.

    Without a question only the candidates' likelihood is asked for.
    """

    prefix: Prompt
    candidates: tuple[str, ...]
    question: str = ""


class Mllm(Protocol):
    """A multimodal large language model, batched. Every method keeps the order of its input."""

    @property
    def identity(self) -> str:
        """Content hash of weights and adapter with the data type: two equal identities give equal rows."""

    def generate(self, prompts: Sequence[Prompt], max_new_tokens: int) -> list[str]:
        """Greedy continuations, at most `max_new_tokens` tokens each, without special tokens."""

    def score(self, requests: Sequence[Request]) -> list[np.ndarray]:
        """float32 (C_i, 2) per request, from one packed pass.

        Column 0: log-odds of "Yes" over "No" as the answer's first token, NaN without a question. Column 1: mean
        log-likelihood of the candidate's own tokens given the prefix.
        """

    def loglik(self, prompts: Sequence[Prompt], continuations: Sequence[str]) -> np.ndarray:
        """float32 (N,): mean log-likelihood per token of each continuation after its prompt."""

    def embed(self, prompts: Sequence[Prompt]) -> np.ndarray:
        """float32 (N, D), L2-normalised: mean of the last hidden states over the prompt's tokens."""
