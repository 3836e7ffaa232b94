"""The catalogue: what the later stages know of the items, and their embeddings."""

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Container, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import pyarrow as pa

from mllm_srec.config import RankingConfig
from mllm_srec.errors import StoreError
from mllm_srec.facts import Origin, category_facts, keyword_facts
from mllm_srec.items import ITEM_TEXTS, Item, first_words, load_items
from mllm_srec.mllm.base import Candidate, Mllm, Picture, Prompt
from mllm_srec.mllm.text_encoder import TextEncoder
from mllm_srec.prompts import items as prompts
from mllm_srec.prompts import ranking as ranking_prompts
from mllm_srec.tastes import Rates
from mllm_srec.workspace import Job, Table, Workspace, fingerprint

EMBEDDINGS = Table("item_embeddings", pa.schema([("vector", pa.list_(pa.float32()))]))

WORD = 0.25
"""A word of a text is that much less likely a taste than a category, a kind or a look of the same frequency."""
KEYWORD_TEXT = 30
"""Words of an item's own description that keywords are taken from."""


@dataclass(frozen=True)
class Catalogue:
    """What the later stages know of the items; all lists are in the order of `Dataset.items`."""

    ids: list[str]
    lines: list[str]
    """Raw short form, for histories."""
    looks: list[str]
    """What the picture showed, without what the text contradicts; "" where nothing was seen."""
    candidates: list[str]
    """Title, category and fused description, for ranking."""
    facts: list[dict[str, Origin]]
    """Facts of the item in lower case, and where each can be known from."""
    rates: Rates
    """Per fact the share of the catalogue's items that have it, and the prior odds that it is a taste."""
    categories: list[list[str]]
    """Parts of the category path."""
    prices: np.ndarray
    """float32 (I,), NaN where not known."""
    embedding_texts: list[str]
    """What content retrieval embeds: "title. category. description", or the fused description where there is none or
    where the configuration asks for both."""
    pictures: list[str | None]
    """Hash of the usable picture."""
    shown: RankingConfig = field(default_factory=RankingConfig)
    """What `candidates` hold, and what a ranking prompt tells beside them."""
    open_picture: Callable[[str], bytes] | None = None
    """The bytes of a picture by its hash; only needed where a ranking prompt shows it."""
    spelling: dict[str, str] = field(default_factory=dict)
    """Fact -> how the catalogue's texts mostly write it: a model that has read "Drama" says "Drama", not "drama"."""

    @cached_property
    def mark(self) -> str:
        """Fingerprint of all that stage 2 reads: a changed item text can change every base rate."""
        return fingerprint(
            *self.lines,
            *self.looks,
            json.dumps([self.facts, self.rates.base, self.rates.prior, self.categories, self.spelling], sort_keys=True),
            self.prices.tobytes().hex(),
        )

    @cached_property
    def place(self) -> dict[str, int]:
        """Item id -> position."""
        return {item_id: i for i, item_id in enumerate(self.ids)}

    @classmethod
    def load(cls, workspace: Workspace) -> "Catalogue":
        """Read items and their texts.

        Raises:
            StoreError: `describe` has not been run for every item.
        """
        items = load_items(workspace)
        texts = {row["key"]: row for row in workspace.rows(ITEM_TEXTS).iter_rows(named=True)}
        missing = [item.item_id for item in items if item.item_id not in texts]
        if missing:
            raise StoreError(
                f"{len(missing)} of {len(items)} items have no description (first: {missing[0]!r}): "
                "run `mllm-srec describe`"
            )
        made, telling = [texts[item.item_id] for item in items], workspace.config.ranking
        words = keyword_facts([f"{i.title} {first_words(i.description, KEYWORD_TEXT)}" for i in items])
        facts: list[dict[str, Origin]] = []
        named: set[str] = set()
        for item, row, of_text in zip(items, made, words, strict=True):
            known: dict[str, Origin] = dict.fromkeys(category_facts(item.category) + of_text, "text")
            for fact in row["facts"]:
                if fact["contradicted"] and fact["origin"] == "picture":
                    continue
                value = fact["value"].lower()
                said = value in known or fact["origin"] != "picture"
                shown = known.get(value) in ("picture", "both") or fact["origin"] != "text"
                known[value] = "both" if said and shown else "text" if said else "picture"
                named.add(value)
            named.update(category_facts(item.category))
            facts.append(known)
        full = [". ".join(p for p in (i.title, i.category, i.description) if p) for i in items]
        both = workspace.config.items.embedding == "description"
        seen = [prompts.seen(row["visual"]) if both else "" for row in made]
        return cls(
            ids=[item.item_id for item in items],
            lines=[ranking_prompts.line(i.title, i.category) for i in items],
            looks=[row["visual"] for row in made],
            candidates=[
                ranking_prompts.candidate(i.title, i.category, _told(telling, row["description"], row["visual"]))
                for i, row in zip(items, made, strict=True)
            ],
            facts=facts,
            rates=fact_rates(facts, named),
            categories=[category_facts(item.category) for item in items],
            prices=np.array([_price(extra) for extra in workspace.dataset().items["extra"]], dtype=np.float32),
            embedding_texts=[
                (f"{text.rstrip('. ')}. {more}" if text and more else text or more) or row["description"]
                for text, more, row in zip(full, seen, made, strict=True)
            ],
            pictures=[item.picture_sha256 for item in items],
            shown=telling,
            open_picture=workspace.picture,
            spelling=spellings(count_names(items), {fact for of_item in facts for fact in of_item}),
        )

    def candidate(self, item: int) -> Candidate:
        """An item as a ranking prompt shows it: its text, and its picture behind it where that is asked for."""
        sha256, text = self.pictures[item], self.candidates[item]
        if not self.shown.picture or sha256 is None or self.open_picture is None:
            return text
        return (text, ranking_prompts.PICTURE, Picture(sha256, self.open_picture(sha256)))

    def name(self, fact: str) -> str:
        """A fact as texts write it."""
        return self.spelling.get(fact, fact)


def _told(shown: RankingConfig, description: str, visual: str) -> str:
    """What a candidate says behind title and category."""
    return {"title": "", "visual": prompts.seen(visual), "description": description}[shown.item]


def count_names(items: Sequence[Item]) -> Counter[str]:
    """How often each word of titles and descriptions and each part of categories is written in which way."""
    written: Counter[str] = Counter()
    for item in items:
        written.update(re.findall(r"[^\W\d_][^\W_]*(?:['-][^\W_]+)*", f"{item.title} {item.description}"))
        written.update(part.strip() for part in re.split(r"[,|>/;]", item.category))
    return written


def spellings(written: Counter[str], facts: Container[str]) -> dict[str, str]:
    """Fact -> its commonest way of writing, where that is not the fact itself."""
    best: dict[str, str] = {}
    for name, _ in sorted(written.items(), key=lambda pair: (-pair[1], pair[0])):
        best.setdefault(name.lower(), name)
    return {fact: name for fact, name in best.items() if fact in facts and name != fact}


def fact_rates(facts: Sequence[Iterable[str]], named: Container[str]) -> Rates:
    """Rates of the catalogue's facts (per item); those not `named` are words that merely stand in texts."""
    count = Counter(fact for of_item in facts for fact in of_item)
    base = {fact: n / len(facts) for fact, n in count.items()}
    return Rates(base, {fact: b if fact in named else WORD * b for fact, b in base.items()})


def _price(extra: str) -> float:
    """The number in an item's further column `price`, with or without a currency sign; NaN if there is none."""
    value = json.loads(extra)
    price = value.get("price") if isinstance(value, dict) else None
    try:
        digits = re.sub(r",(\d\d)$", r".\1", str(price).strip(" $€£"))  # "12,50" is no twelve hundred
        number = float(digits.replace(",", ""))
    except ValueError:
        return math.nan
    return number if math.isfinite(number) and number > 0 else math.nan


def embed(workspace: Workspace, encoder: TextEncoder, catalogue: Catalogue) -> np.ndarray:
    """float32 (I, D), L2-normalised: the items' text embeddings, stored and reused."""
    jobs = [
        Job(item_id, fingerprint(text, encoder.identity), text)
        for item_id, text in zip(catalogue.ids, catalogue.embedding_texts, strict=True)
    ]

    def compute(batch: list[Job]) -> list[dict[str, object]]:
        return [{"status": "ok", "reason": "", "vector": v} for v in encoder.encode([job.payload for job in batch])]

    workspace.produce(EMBEDDINGS, jobs, compute, batch=256, label="retrieve: embeddings")
    return load_embeddings(workspace, catalogue)


def embed_fused(workspace: Workspace, mllm: Mllm, catalogue: Catalogue) -> np.ndarray:
    """float32 (I, D), L2-normalised: the multimodal model's vectors of picture and text together, stored and reused."""
    jobs = [
        Job(item_id, fingerprint(text, sha256, prompts.VERSION, mllm.identity), (text, sha256))
        for item_id, text, sha256 in zip(catalogue.ids, catalogue.embedding_texts, catalogue.pictures, strict=True)
    ]

    def compute(batch: list[Job]) -> list[dict[str, object]]:
        asked = []
        for text, sha256 in (job.payload for job in batch):
            picture = (prompts.PICTURE, Picture(sha256, workspace.picture(sha256))) if sha256 else ()
            asked.append(Prompt((*picture, prompts.represent(text, bool(sha256)))))
        return [{"status": "ok", "reason": "", "vector": vector} for vector in mllm.embed(asked)]

    batch = workspace.config.model.batch_size
    workspace.produce(EMBEDDINGS, jobs, compute, batch=batch, label="retrieve: embeddings")
    return load_embeddings(workspace, catalogue)


def load_embeddings(workspace: Workspace, catalogue: Catalogue) -> np.ndarray:
    """float32 (I, D), L2-normalised, as stored by `embed` or `embed_fused`.

    The multimodal model's vectors are centred on the catalogue's mean: what all prompts share says nothing, and is most
    of them.

    Raises:
        StoreError: some item has no embedding yet.
    """
    rows = {row["key"]: row["vector"] for row in workspace.rows(EMBEDDINGS).iter_rows(named=True)}
    missing = [item_id for item_id in catalogue.ids if item_id not in rows]
    if missing:
        raise StoreError(f"{len(missing)} items have no embedding (first: {missing[0]!r}): run `mllm-srec retrieve`")
    stored = np.array([rows[item_id] for item_id in catalogue.ids], dtype=np.float32)
    if workspace.config.items.embedding != "model":
        return stored
    centred = stored - stored.mean(0)
    return np.asarray(centred / np.maximum(np.linalg.norm(centred, axis=1, keepdims=True), 1e-12), dtype=np.float32)
