"""What stands in a server's reply: text, own words behind a beginning, a chosen option, the odds of Yes."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from mllm_srec.mllm.base import Answer, Question
from mllm_srec.mllm.rendering import LABELS

LOWEST = -9999.0
"""Log-probabilities below count as this one, which is vLLM's for minus infinity."""

_EDGES = " \t\r\n\"'`*_.,;:!?()[]“”‘’"


class RequestError(Exception):
    """A request that failed for good: by what it asked, without an answer, or as any other request would."""

    def __init__(self, reason: str, of: Literal["row", "connection", "server"] = "row", advice: str = "") -> None:
        super().__init__(reason)
        self.of, self.advice = of, advice


@dataclass(frozen=True)
class Token:
    """One token of a reply."""

    text: str
    size: int
    """Bytes of UTF-8: a token may hold part of a character."""
    loglik: float
    top: tuple[tuple[str, float], ...]
    """The likeliest tokens in its place with their log-probabilities."""


@dataclass(frozen=True)
class Reply:
    """What the model wrote; `tokens` is empty where the server gives no logprobs."""

    text: str
    tokens: tuple[Token, ...]


def read_reply(reply: dict[str, Any]) -> Reply:
    """Text and logprobs of a chat completion.

    Raises:
        RequestError: it is none.
    """
    try:
        choice = reply["choices"][0]
        text = choice["message"]["content"] or ""
        given: Sequence[dict[str, Any]] = (choice.get("logprobs") or {}).get("content") or ()
        return Reply(text.encode("utf-8", "replace").decode(), tuple(_token(entry) for entry in given))
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        raise RequestError(f"the reply is no chat completion ({type(error).__name__}: {error})") from None


def _token(entry: dict[str, Any]) -> Token:
    size = len(entry["bytes"]) if entry.get("bytes") else len(entry["token"].encode("utf-8", "replace"))
    top = tuple((str(other["token"]), _logprob(other)) for other in entry.get("top_logprobs") or ())
    return Token(str(entry["token"]), size, _logprob(entry), top)


def _logprob(entry: dict[str, Any]) -> float:
    value = float(entry["logprob"])
    if not value < 0.01:  # rounding may lift a certain token above 0
        raise ValueError(f"a logprob of {value}")
    return max(value, LOWEST)


def own_start(reply: Reply, beginning: str) -> int:
    """Where the reply's own words start: behind the beginning, where it repeats that ("a" may have become "an").

    Raises:
        RequestError: there is no text at all.
    """
    if not reply.text.strip():
        raise RequestError("the reply holds no text")
    if not beginning:
        return 0
    end = r"n?(?!\w)" if re.search(r"\ba$", beginning) else r"(?!\w)" if beginning[-1].isalnum() else ""
    found = re.match(r"\s*" + re.escape(beginning) + end, reply.text, re.IGNORECASE)
    return found.end() if found else 0


def _own_tokens(reply: Reply, start: int) -> list[Token]:
    """The tokens of reply.text[start:]; an end token behind the text is none of them."""
    first, last = len(reply.text[:start].encode()), len(reply.text.encode())
    kept, at = [], 0
    for token in reply.tokens:
        if at < last and at + token.size > first:
            kept.append(token)
        at += token.size
    return kept


def own_words(reply: Reply, question: Question) -> Answer:
    """The reply without the beginning it repeats; no likelihood, since there would be none to compare it with."""
    return Answer(reply.text[own_start(reply, question.answer) :].strip(), None, np.zeros(0, np.float32))


def choice(reply: Reply, question: Question) -> Answer:
    """The option that was replied, and what the tokens say of each; see `RemoteMllm.ask`."""
    options = [option.lower() for option in question.options]
    start = own_start(reply, question.answer)
    said = reply.text[start:].strip(_EDGES).lower()
    if said not in options:
        return Answer("", None, np.full(len(options), -np.inf, np.float32))

    def begins(text: str) -> list[int]:
        text = text.lstrip(_EDGES).lower()
        return [i for i, option in enumerate(options) if text and option.startswith(text)]

    mass = np.zeros(len(options))
    so_far, before, bound = "", 0.0, 0.0
    for token in _own_tokens(reply, start):
        for text, loglik in dict.fromkeys((*token.top, (token.text, token.loglik))):
            bound = min(bound, before + loglik)
            if len(told := begins(so_far + text)) == 1:
                mass[told[0]] += np.exp(before + loglik)
        so_far, before = so_far + token.text, before + token.loglik
        if len(begins(so_far)) == 1:
            break
    best = options.index(said)
    if not mass[best]:
        return Answer(question.options[best], None, np.full(len(options), np.nan, np.float32))
    with np.errstate(divide="ignore"):
        logliks = np.maximum(np.log(mass), bound).astype(np.float32)
    best = int(logliks.argmax())
    return Answer(question.options[best], float(logliks[best]), logliks)


def log_odds(reply: Reply) -> float:
    """Log-odds of "Yes" over "No" as the reply's first token; see `RemoteMllm.score`.

    Raises:
        RequestError: there are no logprobs, or neither is among the likeliest tokens.
    """
    top = reply.tokens[0].top if reply.tokens else ()
    if not top:
        raise RequestError("the reply has no logprobs", "server", "ranking needs a server that gives top_logprobs")
    found = [[loglik for text, loglik in top if text.strip().lower() == label.lower()] for label in LABELS]
    if not any(found):
        raise RequestError(
            f"neither {' nor '.join(LABELS)} is among the {len(top)} likeliest first tokens of the reply"
        )
    bound = min(loglik for _, loglik in top)
    yes, no = (float(np.logaddexp.reduce(values)) if values else bound for values in found)
    return yes - no
