"""A model behind an OpenAI-compatible server (vLLM, SGLang, llama.cpp)."""

import base64
import hashlib
import io
import json
import re
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property, partial
from itertools import groupby
from typing import Any, TypeVar

import numpy as np

from mllm_srec.data.images import PictureError, open_picture
from mllm_srec.errors import ModelError
from mllm_srec.mllm.base import Answer, Candidate, PartialFailure, Picture, Prompt, Question, Request
from mllm_srec.mllm.chat_server import ChatServer
from mllm_srec.mllm.rendering import MAX_SIDE
from mllm_srec.mllm.replies import Reply, RequestError, choice, log_odds, own_start, own_words
from mllm_srec.prompts import server as wording

TOP = 20
"""Likeliest tokens asked for in each place: the most that vLLM gives by default."""
OPTION_TOKENS = 16
"""New tokens of a reply that is to be one of the options, with room for words before it."""

_SPECIAL = re.compile(
    r"<(?=/?[|｜]?[\w.:/▁-]{1,40}[|｜]?>)|\[(?=/?(?:INST|SYSTEM_PROMPT|IMG(?:_[A-Z]+)?|[A-Z_]*TOOL[A-Z_]*)\])"
)
"""The server's special tokens are not known here, but their shapes are: <|im_end|>, </s>, <image>, [INST] ..."""

Content = list[dict[str, Any]]
Result = TypeVar("Result")
Row = TypeVar("Row")


class RemoteMllm:
    """`generate`, `ask` and `score` over a server; see `mllm.base.Mllm` for the contract.

    Requests run `concurrency` at a time; what may pass is tried again. Where single rows fail for good,
    `PartialFailure` carries the others' results; where all do because of the server, the key or the model's name, a
    `ModelError` says so. A server does not continue a turn that has begun: the beginning is asked for in words
    (`prompts.server`), and taken off the reply. Pictures are sent as JPEG, reduced to `MAX_SIDE`.
    """

    has_adapter = False
    """An adapter that the server adds is part of the model it serves."""

    def __init__(
        self,
        url: str,
        name: str,
        key: str = "",
        concurrency: int = 8,
        timeout: float = 120,
        sleep: Callable[[float], object] = time.sleep,
    ) -> None:
        """Nothing is sent yet; `name` is what the server calls the model, the rest as for `ChatServer`.

        Raises:
            ModelError: the key cannot stand in a header.
        """
        self.name = name
        self._server = ChatServer(url, key, concurrency, timeout, sleep)
        self._pool = ThreadPoolExecutor(concurrency)

    @cached_property
    def identity(self) -> str:
        """The model's name, and a hash of what the server says of it and of the words it is asked in.

        Raises:
            ModelError: the server does not answer, refuses the key, or does not serve the model.
        """
        served = self._server.models()
        known = [entry for entry in served if self.name == entry["id"] or self.name in (entry.get("aliases") or ())]
        if not known:
            raise ModelError(f"{self._server.url} does not serve {self.name!r}: {_choice_of_names(served)}")
        about = {key: known[0].get(key) for key in ("id", "root", "parent", "meta")}
        if isinstance(about["meta"], dict):  # the context length is the server's setting, not the model's
            about["meta"] = {key: value for key, value in about["meta"].items() if key != "n_ctx"}
        text = json.dumps([about, wording.VERSION], sort_keys=True)
        return f"server:{self.name}:{hashlib.sha256(text.encode()).hexdigest()[:16]}"

    def drop_adapter(self) -> None:
        """There is none to drop."""

    def without_adapter(self) -> AbstractContextManager[None]:
        """The model as it is served."""
        return nullcontext()

    # -- the contract -------------------------------------------------------------------------------------------------

    def generate(self, prompts: Sequence[Prompt], max_new_tokens: int) -> list[str]:
        """Greedy continuations, at most `max_new_tokens` tokens each.

        Raises:
            PartialFailure: some rows failed for good; `results` holds str or None.
            ModelError: all failed because of the server, the key or the model's name.
        """

        def write(prompt: Prompt) -> str:
            reply = self._chat(prompt.system, _content(prompt), _begun(prompt.answer), max_new_tokens)
            return reply.text[own_start(reply, prompt.answer) :].strip()

        written = self._each([partial(write, prompt) for prompt in prompts])
        return self._whole([[text] for text in written], lambda row: row[0])

    def ask(self, prefixes: Sequence[Prompt], questions: Sequence[Question], max_new_tokens: int) -> list[list[Answer]]:
        """Every question to every prefix, one request each. A question with options has no beginning asked for.

        Own words have no `loglik`: the server gives none of any text to compare it with. Options: the whole reply, but
        for punctuation at its ends, must be one of them, in upper or lower case; one that is none has text "", no
        `loglik` and options of -inf. An option's log-likelihood is that of the tokens which tell it from the others,
        among the reply's and the `TOP` likeliest in each place; tokens behind them are not counted. Where no token
        does, the least log-probability that was given, an upper bound, stands for it. Without logprobs in the reply
        there is no `loglik` and the options are NaN.

        Raises:
            PartialFailure: some rows failed for good; `results` holds a list of answers, or None, per prefix.
            ModelError: all failed because of the server, the key or the model's name.
        """
        contents = self._contents(prefixes)

        def answer(prefix: Prompt, content: Content | RequestError, question: Question) -> Answer:
            if isinstance(content, RequestError):
                raise content
            if question.options:
                behind = question.about + question.ask + wording.choose(question.options)
                return choice(self._chat(prefix.system, content, behind, OPTION_TOKENS, TOP), question)
            behind = question.about + question.ask + _begun(question.answer)
            return own_words(self._chat(prefix.system, content, behind, max_new_tokens), question)

        pairs = [(*of_prefix, q) for of_prefix in zip(prefixes, contents, strict=True) for q in questions]
        flat = iter(self._each([partial(answer, *pair) for pair in pairs]))
        return self._whole([[next(flat) for _ in questions] for _ in prefixes], list)

    def score(self, requests: Sequence[Request]) -> list[np.ndarray]:
        """float32 (C_i, 2) per request; the server is asked once per candidate.

        Column 0: log-odds of "Yes" over "No", in upper or lower case, as the reply's first token. Where one of the two
        is not among the `TOP` likeliest, the least of their log-probabilities, its upper bound, stands for it.
        Column 1, the candidate's likelihood, is NaN: servers do not give it.

        Raises:
            PartialFailure: some requests failed for good; `results` holds an array, or None, per request.
            ModelError: a request has no question, the server gives no logprobs, or all failed because of the server.
        """
        if not all(request.question for request in requests):
            raise _cannot("likelihoods of given texts", "set users.summary=generate")
        contents = self._contents([request.prefix for request in requests])

        def odds(request: Request, content: Content | RequestError, candidate: Candidate, note: str) -> float:
            if isinstance(content, RequestError):
                raise content
            if isinstance(candidate, str):
                behind = candidate + note + request.question
            else:
                content = _content(Prompt((*request.prefix.parts, *candidate)))
                behind = note + request.question
            return log_odds(self._chat(request.prefix.system, content, behind, 1, TOP))

        tasks = [
            partial(odds, request, content, candidate, request.note(number))
            for request, content in zip(requests, contents, strict=True)
            for number, candidate in enumerate(request.candidates)
        ]
        flat = iter(self._each(tasks))
        rows = [[next(flat) for _ in request.candidates] for request in requests]
        return self._whole(rows, lambda row: np.array([(value, np.nan) for value in row], np.float32).reshape(-1, 2))

    def loglik(self, prompts: Sequence[Prompt], continuations: Sequence[str]) -> np.ndarray:
        """A server does not read given texts for their likelihood.

        Raises:
            ModelError: always.
        """
        raise _cannot("likelihoods of given texts", "`ask` for its own words or options, or a model in this process")

    def embed(self, prompts: Sequence[Prompt]) -> np.ndarray:
        """A chat server gives no hidden states.

        Raises:
            ModelError: always.
        """
        raise _cannot("embeddings", "use a model in this process")

    # -- batches ------------------------------------------------------------------------------------------------------

    def _each(self, tasks: Sequence[Callable[[], Result]]) -> list[Result | RequestError]:
        """Results in the order of the tasks, which run `concurrency` at a time."""

        def caught(task: Callable[[], Result]) -> Result | RequestError:
            try:
                return task()
            except RequestError as failure:
                return failure
            except PictureError as error:
                return RequestError(f"picture {error.state}: {error}")

        futures = [self._pool.submit(caught, task) for task in tasks]
        try:
            return [future.result() for future in futures]
        finally:
            for future in futures:  # after an interrupt those that still wait are not sent
                future.cancel()

    def _contents(self, prefixes: Sequence[Prompt]) -> list[Content | RequestError]:
        if any(prefix.answer for prefix in prefixes):
            raise ModelError("a shared prefix cannot begin the answer")
        return self._each([partial(_content, prefix) for prefix in prefixes])

    def _whole(self, rows: Sequence[Sequence[Result | RequestError]], make: Callable[[list[Result]], Row]) -> list[Row]:
        """One result per row of results, or a PartialFailure."""
        made: list[Row | None] = []
        errors: dict[int, str] = {}
        failed: list[RequestError] = []
        for i, row in enumerate(rows):
            good = [result for result in row if not isinstance(result, RequestError)]
            bad = [result for result in row if isinstance(result, RequestError)]
            made.append(None if bad else make(good))
            if bad:
                errors[i] = str(bad[0])
                failed += bad
        if failed and len(failed) == sum(map(len, rows)):
            self._blame_server({failure.of for failure in failed}, failed[0])
        if errors:
            raise PartialFailure(made, errors)
        return [row for row in made if row is not None]

    def _blame_server(self, kinds: set[str], first: RequestError) -> None:
        """Raise a ModelError where it is not by the rows that all failed."""
        if kinds == {"connection"}:
            self._server.models(tries=1)  # one that answers is up: then the rows are what it fails on
        elif kinds == {"server"}:
            advice = first.advice or _choice_of_names(self._server.models(tries=1))
            raise ModelError(f"{self._server.url}: {first}: {advice}")

    def _chat(self, system: str, content: Content, behind: str, limit: int, top: int = 0) -> Reply:
        """One reply of at most `limit` tokens, with the logprobs of the `top` likeliest in each place."""
        if behind and content and content[-1]["type"] == "text":
            *content, last = content
            behind = last["text"] + behind
        parts = [*content, {"type": "text", "text": _neutral(behind)}] if behind else content
        # Templates made for text alone may know no parts.
        user = parts[0]["text"] if len(parts) == 1 and parts[0]["type"] == "text" else parts
        messages = [{"role": "system", "content": _neutral(system)}] if system else []
        body = {"model": self.name, "messages": [*messages, {"role": "user", "content": user}]}
        logprobs = {"logprobs": True, "top_logprobs": top} if top else {}
        return self._server.chat(body | {"max_tokens": limit, "temperature": 0} | logprobs)


# -- what is sent -----------------------------------------------------------------------------------------------------


def _content(prompt: Prompt) -> Content:
    content: Content = []
    for picture, parts in groupby(prompt.parts, lambda part: isinstance(part, Picture)):
        if picture:
            urls = [_data_url(part) for part in parts if isinstance(part, Picture)]
            content += [{"type": "image_url", "image_url": {"url": url}} for url in urls]
        else:  # joined first: a special token may be spread over two parts
            content.append({"type": "text", "text": _neutral("".join(map(str, parts)))})
    return content


def _data_url(picture: Picture) -> str:
    """The picture decoded and encoded again: no unchecked byte leaves this process."""
    stream = io.BytesIO()
    open_picture(picture.data, MAX_SIDE).save(stream, "JPEG", quality=95)
    return "data:image/jpeg;base64," + base64.b64encode(stream.getvalue()).decode()


def _neutral(text: str) -> str:
    """`text` in which nothing has the shape of a special token: each loses its first character."""
    found = 1
    while found:  # what is left of one may complete another
        text, found = _SPECIAL.subn("", text)
    return text


def _begun(answer: str) -> str:
    return wording.begin(answer) if answer else ""


def _cannot(what: str, instead: str) -> ModelError:
    return ModelError(f"the server backend gives no {what}: {instead}")


def _choice_of_names(served: Sequence[dict[str, Any]]) -> str:
    names = ", ".join(entry["id"] for entry in served)
    return f"set model.name to one that it serves ({names})" if names else "it serves no model"
