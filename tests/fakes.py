"""Stand-ins without weights: a model that answers as told, a text encoder, pictures, small catalogues and shops."""

import hashlib
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

import numpy as np
import polars as pl
from PIL import Image

from mllm_srec.catalogue import Catalogue, fact_rates
from mllm_srec.config import Config, UsersConfig
from mllm_srec.data.dataset import Dataset
from mllm_srec.facts import Origin, category_facts
from mllm_srec.mllm.base import Answer, Candidate, Picture, Prompt, Question, Request
from mllm_srec.prompts import ranking as prompts
from mllm_srec.tastes import Movement
from mllm_srec.user_states import UserState
from mllm_srec.workspace import Workspace


def shown(prompt: Prompt) -> str:
    """All that the prompt tells the model, pictures by their hash."""
    parts = [part if isinstance(part, str) else f"<{part.sha256}>" for part in prompt.parts]
    return "".join([prompt.system, *parts, prompt.answer])


def draw(*texts: str) -> float:
    """A number between -8 and 0 that depends on the texts alone."""
    digest = hashlib.sha256("\0".join(texts).encode()).digest()
    return -8 * int.from_bytes(digest[:3], "big") / (1 << 24)


@dataclass
class FakeMllm:
    """Follows `Mllm`; the functions say what it answers, the lists hold what it was asked."""

    identity: str = "fake-1"
    say: Callable[[Prompt], str] = lambda prompt: ""
    likelihood: Callable[[str, str], float] = draw
    """Of a continuation or candidate, given all that stands before it."""
    odds: Callable[[str, str], float] = lambda prefix, candidate: draw(prefix, candidate, "odds")
    sees: Mapping[str | tuple[str, str], str] = field(default_factory=dict)
    """What `ask` answers to a picture, by (its hash, the answer's first words), by these words or by its hash."""
    generated: list[Prompt] = field(default_factory=list)
    weighed: list[tuple[str, str]] = field(default_factory=list)
    scored: list[Request] = field(default_factory=list)
    asked: list[tuple[Prompt, Question]] = field(default_factory=list)

    def generate(self, prompts: Sequence[Prompt], max_new_tokens: int) -> list[str]:
        self.generated += prompts
        return [" ".join(self.say(prompt).split(" ")[:max_new_tokens]) for prompt in prompts]

    def ask(self, prefixes: Sequence[Prompt], questions: Sequence[Question], max_new_tokens: int) -> list[list[Answer]]:
        self.asked += [(prefix, question) for prefix in prefixes for question in questions]
        return [[self._answer(prefix, question, max_new_tokens) for question in questions] for prefix in prefixes]

    def _answer(self, prefix: Prompt, question: Question, max_new_tokens: int) -> Answer:
        """Sure of what it sees; without a picture or before a strange one every option alike, and "a thing".

        Of what a question is about it says what `generate` would say to the whole prompt.
        """
        if question.about:
            whole = Prompt((*prefix.parts, question.about + question.ask), prefix.system)
            return Answer(self.generate([whole], max_new_tokens)[0], -0.5, np.zeros(0, np.float32))
        hashes = [part.sha256 for part in prefix.parts if isinstance(part, Picture)]
        keys = [key for sha in hashes for key in ((sha, question.answer), question.answer, sha)]
        seen = next((self.sees[key] for key in keys if key in self.sees), None)
        if not question.options:
            words = "a thing" if seen is None else seen
            text = " ".join(words.split(" ")[:max_new_tokens])
            return Answer(text, (-4.0 if seen is None else -0.5) if text else 0.0, np.zeros(0, np.float32))
        count = len(question.options)
        told = np.full(count, -np.log(count), np.float32)
        if seen in question.options:
            told[:] = -9
            told[question.options.index(seen)] = -0.1
        best = int(told.argmax())
        return Answer(question.options[best], float(told[best]), told)

    def score(self, requests: Sequence[Request]) -> list[np.ndarray]:
        self.scored += requests
        return [np.array([self._pair(request, c) for c in request.candidates], np.float32) for request in requests]

    def _pair(self, request: Request, candidate: Candidate) -> tuple[float, float]:
        assert isinstance(candidate, str)
        before = shown(request.prefix)
        odds = self.odds(before, candidate) if request.question else float("nan")
        return odds, self.likelihood(before, candidate)

    def loglik(self, prompts: Sequence[Prompt], continuations: Sequence[str]) -> np.ndarray:
        asked = [(shown(prompt), text) for prompt, text in zip(prompts, continuations, strict=True)]
        self.weighed += asked
        return np.array([self.likelihood(*pair) for pair in asked], np.float32)

    def embed(self, prompts: Sequence[Prompt]) -> np.ndarray:
        return vectors([shown(prompt) for prompt in prompts])

    def calls(self) -> int:
        """Prompts, requests and answered questions so far."""
        return len(self.generated) + len(self.weighed) + len(self.scored) + len(self.asked)


def vectors(texts: Sequence[str], size: int = 4) -> np.ndarray:
    """float32 (N, size), L2-normalised, from the texts alone."""
    found = np.array([[draw(text, str(axis)) for axis in range(size)] for text in texts], np.float32)
    unit: np.ndarray = found / np.linalg.norm(found, axis=1, keepdims=True)
    return unit


class FakeEncoder:
    """Stands in for `TextEncoder`; remembers the texts."""

    def __init__(self, identity: str = "encoder-1") -> None:
        self.identity = identity
        self.encoded: list[str] = []

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        self.encoded += texts
        return vectors(texts)


def png(colour: str) -> bytes:
    """A small picture of one colour."""
    stream = io.BytesIO()
    Image.new("RGB", (8, 8), colour).save(stream, "PNG")
    return stream.getvalue()


def make_catalogue(
    looks: Mapping[str, str] | None = None,
    categories: Mapping[str, str] | None = None,
    prices: Mapping[str, float] | None = None,
    **facts: str,
) -> Catalogue:
    """Items by id with their facts in one string each; title "ID the title", facts as description.

    A fact is known from the text, or from where its ending says: "shoe red:picture wool:both". What the pictures
    showed, category paths and prices are by item id; all facts are named ones, so a fact's prior odds are its share.
    """
    split = [[word.partition(":") for word in words.split()] for words in facts.values()]
    of_items: list[dict[str, Origin]] = [
        {fact: cast(Origin, origin or "text") for fact, _, origin in of_item} for of_item in split
    ]
    titles = [f"{item_id} the title" for item_id in facts]
    return Catalogue(
        ids=list(facts),
        lines=[prompts.line(title, "") for title in titles],
        looks=[(looks or {}).get(item_id, "") for item_id in facts],
        candidates=[prompts.candidate(title, "", " ".join(w)) for title, w in zip(titles, of_items, strict=True)],
        facts=of_items,
        rates=fact_rates(of_items, {fact for of_item in of_items for fact in of_item}),
        categories=[category_facts((categories or {}).get(item_id, "")) for item_id in facts],
        prices=np.array([(prices or {}).get(item_id, np.nan) for item_id in facts], np.float32),
        embedding_texts=titles,
        pictures=[None] * len(titles),
    )


def make_state(*phrases: str) -> UserState:
    """A user after four events, of whom these tastes are known by name."""
    movement = Movement({}, dict.fromkeys(phrases, 1.0), {}, {})
    return UserState("u", 4, 7, "likes red", "newly turns to hat", movement, {}, (0.0, 0.0, 0.0), (0, 1))


Event = tuple[str, int | None, float | None]
"""(item id, time in ms, rating)."""


def make_dataset(
    folder: Path, items: Sequence[Mapping[str, str | None]], log: Mapping[str, Sequence[Event]]
) -> Dataset:
    """`items` by column, `log` by user; pictures are files in `folder`."""
    columns = dict.fromkeys(("item_id", "title", "description", "category", "image", "extra"), pl.String)
    rows = [(user, *event) for user, events in log.items() for event in events]
    schema = {"user_id": pl.String, "item_id": pl.String, "timestamp": pl.Int64, "rating": pl.Float32}
    return Dataset.build(
        "shop",
        pl.DataFrame([dict(row) for row in items], schema=columns),
        pl.DataFrame(rows, schema=schema, orient="row"),
        has_time=all(row[2] is not None for row in rows),
        root=folder,
    )


def make_shop(
    folder: Path,
    items: Sequence[Mapping[str, str | None]],
    log: Mapping[str, Sequence[Event]],
    config: Config | None = None,
    pictures: Mapping[str, bytes] | None = None,
) -> Workspace:
    """A workspace in `folder`/ws over `make_dataset`; `pictures` are files that items name as `image`."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in (pictures or {}).items():
        (folder / name).write_bytes(data)
    return Workspace.create(folder / "ws", config or Config(), make_dataset(folder, items, log))


CATALOGUE = make_catalogue(
    a="red shoe", b="red hat", c="red scarf", d="blue shoe", e="blue hat", f="wool", g="wool hat", h="green", i="green"
)
IDS = "".join(CATALOGUE.ids)


def place(items: str) -> np.ndarray:
    return np.array([IDS.index(item) for item in items], dtype=np.int32)


def users_config(**changes: object) -> UsersConfig:
    return UsersConfig.model_validate({"window": 4, "step": 4, "recent": 3, **changes})
