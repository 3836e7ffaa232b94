"""Stage 1, item understanding: picture -> answers -> visual summary, + text -> description; and the catalogue's facts.

`describe` asks the model and stores one row per item; `Catalogue` is what the later stages read.
"""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from mllm_srec.config import ItemsConfig
from mllm_srec.errors import ModelError, StoreError
from mllm_srec.mllm.base import Mllm, Picture, Prompt
from mllm_srec.mllm.text_encoder import TextEncoder
from mllm_srec.prompts import items as prompts
from mllm_srec.prompts import ranking as ranking_prompts
from mllm_srec.workspace import Counts, Job, Table, Workspace, fingerprint

ITEM_TEXTS = Table(
    "item_texts",
    pa.schema(
        [("visual", pa.string()), ("description", pa.string()), ("fused_by", pa.string()), ("picture", pa.string())]
    ),
)

EMBEDDINGS = Table("item_embeddings", pa.schema([("vector", pa.list_(pa.float32()))]))

MIN_EVIDENCE, MIN_LOGLIK = 2.5, -2.0
"""Nats per token: by how much the picture must make an answer likelier than no picture does, and how likely it must be
then; else it was not seen. Set phrases gain less than 2, what is seen more than 3; what gains much from nearly nothing
is no word at all."""

CANDIDATE_WORDS = 20
"""Words of an item's own text in a composed description."""

_BREAK = re.compile(r"[.,;:\n!?()]|\b(?:who|which|that|with|from)\b")
_DANGLING = frozenset(("a", "an", "and", "in", "is", "it", "its", "of", "on", "or", "the", "this", "to", "was"))

_WORD = re.compile(r"[^\W\d_](?:[^\W\d_]|['-]){2,}")
_FUNCTION_WORDS = frozenset(
    re.findall(
        r"\w+",
        "the and for with from that this are was were has have had its his her their they them who which "
        "will not but can all one two out into when where what than then over under about after before "
        "between been being more most other only also very you your our any each both such while there "
        "here how why she him himself herself must does did get gets make makes made use used model size "
        "fit some own just new old one first last day days year years time times way back still again "
        "take takes find finds found come comes become becomes goes going gone keep keeps left right let "
        "against through because during without within around along across off down away yet even much many "
        "few several every another same like well good great los san mrs",
    )
)


@dataclass(frozen=True)
class Item:
    """One row of the catalogue as stage 1 reads it; `picture_state` is `ok` or why there is none."""

    item_id: str
    title: str
    description: str
    category: str
    picture_sha256: str | None
    picture_state: str


def first_words(text: str, count: int) -> str:
    """The first `count` words; a cut ends behind a sentence where that keeps at least half of it, else in "..."."""
    words = text.split()
    if len(words) <= count:
        return " ".join(words)
    cut = " ".join(words[:count])
    end = max(f"{cut} ".rfind(mark) for mark in (". ", "! ", "? "))
    return cut[: end + 1] if end >= len(cut) // 2 else f"{cut.rstrip(',;:')} ..."


def clean_answer(text: str) -> str:
    """What an answer names, in lower case: up to its first break or clause, without a dangling word at the end."""
    words = _BREAK.split(text.strip().lower(), maxsplit=1)[0].split()
    while words and words[-1] in _DANGLING:
        words.pop()
    return " ".join(words)


def unsupported_words(text: str, *sources: str) -> list[str]:
    """Content words of `text` (4 letters and more) that no source holds, compared by their first 5 letters."""
    known = {word[:5] for source in sources for word in _WORD.findall(source.lower())}
    content = [word for word in _WORD.findall(text.lower()) if len(word) >= 4 and word not in _FUNCTION_WORDS]
    return [word for word in content if word[:5] not in known]


def check_finite(values: np.ndarray, what: str) -> np.ndarray:
    """`values` as they are.

    Raises:
        ModelError: one of them is NaN or infinite, so that comparing it would silently decide something.
    """
    if not np.isfinite(values).all():
        raise ModelError(f"the model gave {what} that are not finite: try model.dtype=float32")
    return values


def _read_pictures(
    mllm: Mllm, items: Sequence[Item], pictures: Sequence[Picture | None], config: ItemsConfig
) -> list[str]:
    """The visual summary of each item: the answers that the picture itself made likelier; "" without a picture."""
    seen: list[list[str]] = [[] for _ in items]
    with_picture = [i for i, picture in enumerate(pictures) if picture is not None]
    for name in config.questions:
        if not with_picture:
            break
        question = prompts.QUESTIONS[name]
        parts = [(prompts.PICTURE, pictures[i], prompts.ask(question.ask)) for i in with_picture]
        looking = [Prompt(tuple(p for p in part if p is not None), answer=question.answer) for part in parts]
        blind = Prompt((prompts.NO_PICTURE + prompts.ask(question.ask),), answer=question.answer)
        answers = [clean_answer(text) for text in mllm.generate(looking, config.answer_tokens)]
        said = [(i, prompt, answer) for i, prompt, answer in zip(with_picture, looking, answers, strict=True) if answer]
        if not said:
            continue
        looked = mllm.loglik([prompt for _, prompt, _ in said], [f" {answer}" for _, _, answer in said])
        distinct = sorted({answer for _, _, answer in said})
        without = mllm.loglik([blind] * len(distinct), [f" {answer}" for answer in distinct])
        unseen = dict(zip(distinct, check_finite(without, "likelihoods of answers without a picture"), strict=True))
        for (i, _, answer), likelihood in zip(said, check_finite(looked, "likelihoods of answers"), strict=True):
            evident = likelihood >= MIN_LOGLIK and likelihood - unseen[answer] >= MIN_EVIDENCE
            if evident and answer not in seen[i]:
                seen[i].append(answer)
    return [", ".join(answers) for answers in seen]


def _fuse(mllm: Mllm, items: Sequence[Item], visuals: Sequence[str], config: ItemsConfig) -> list[tuple[str, str]]:
    """(description, made by "model" or "rule") per item; a model's sentence with invented words is not kept."""
    texts = [first_words(item.description, CANDIDATE_WORDS) for item in items]
    composed = [prompts.compose(text, visual) for text, visual in zip(texts, visuals, strict=True)]
    if config.fusion == "compose":
        return [(description, "rule") for description in composed]
    given = [
        prompts.fuse(item.title, item.category, first_words(item.description, config.text_words), visual)
        if item.title or item.category or item.description or visual
        else ""  # with nothing to go by, whatever the model writes is invented
        for item, visual in zip(items, visuals, strict=True)
    ]
    asked = [Prompt((text,), system=prompts.FUSE_SYSTEM) for text in given if text]
    written = iter(mllm.generate(asked, config.description_tokens) if asked else [])
    fused = []
    for item, visual, rule, text in zip(items, visuals, composed, given, strict=True):
        sentence = " ".join(next(written).split()) if text else ""
        invented = unsupported_words(sentence, item.title, item.category, item.description, visual)
        fused.append((sentence, "model") if sentence and not invented else (rule, "rule"))
    return fused


def describe(workspace: Workspace, mllm: Mllm) -> Counts:
    """Make or renew `item_texts`: one row per item, `skipped` where an item has neither text nor a usable picture."""
    config = workspace.config.items
    settings = config.model_dump_json()
    jobs = []
    for item in load_items(workspace):
        made_of = (item.title, item.description, item.category, item.picture_sha256, item.picture_state)
        mark = fingerprint(*made_of, prompts.VERSION, mllm.identity, settings)
        jobs.append(Job(item.item_id, mark, item))

    def compute(batch: list[Job]) -> list[dict[str, object]]:
        items: list[Item] = [job.payload for job in batch]
        pictures = [
            Picture(item.picture_sha256, workspace.picture(item.picture_sha256)) if item.picture_sha256 else None
            for item in items
        ]
        visuals = _read_pictures(mllm, items, pictures, config)
        rows: list[dict[str, object]] = []
        for item, visual, (description, by) in zip(items, visuals, _fuse(mllm, items, visuals, config), strict=True):
            empty = not (item.title or item.category or description)
            looked = "nothing seen in the picture" if item.picture_state == "ok" else f"picture {item.picture_state}"
            rows.append(
                {
                    "status": "skipped" if empty else "ok",
                    "reason": f"no text, {looked}" if empty else "",
                    "visual": visual,
                    "description": description,
                    "fused_by": by,
                    "picture": item.picture_state,
                }
            )
        return rows

    return workspace.produce(ITEM_TEXTS, jobs, compute, batch=workspace.config.model.batch_size, label="describe")


def load_items(workspace: Workspace) -> list[Item]:
    """The catalogue's rows with their picture's hash and state, in the dataset's order.

    Titles and categories come in one line with single spaces: an item is one line of a prompt.
    """
    states = {row["item_id"]: row for row in workspace.pictures().to_dicts()}
    return [
        Item(
            row["item_id"],
            " ".join(row["title"].split()),
            row["description"],
            " ".join(row["category"].split()),
            states[row["item_id"]]["sha256"] if states[row["item_id"]]["state"] == "ok" else None,
            states[row["item_id"]]["state"],
        )
        for row in workspace.dataset().items.iter_rows(named=True)
    ]


def category_facts(category: str) -> list[str]:
    """The parts of a category path, lower case, each once: "Animation, Comedy" -> ["animation", "comedy"]."""
    parts = [part.strip().lower() for part in re.split(r"[,|>/;]", category)]
    return list(dict.fromkeys(part for part in parts if len(part) > 1))


def keyword_facts(texts: Sequence[str], limit: int = 6) -> list[list[str]]:
    """Words that say something about an item: per text at most `limit`, the commonest first.

    A word counts when at least 3 and 0.3 % and at most a fifth of the catalogue's texts hold it: rarer ones are shared
    by too few items to show a taste, commoner ones tell nothing.
    """
    words = [[w for w in dict.fromkeys(_WORD.findall(text.lower())) if w not in _FUNCTION_WORDS] for text in texts]
    frequency = Counter(word for of_item in words for word in of_item)
    low, high = max(3, 0.003 * len(texts)), max(3, 0.2 * len(texts))
    return [
        sorted((w for w in of_item if low <= frequency[w] <= high), key=lambda w: (-frequency[w], w))[:limit]
        for of_item in words
    ]


@dataclass(frozen=True)
class Catalogue:
    """What the later stages know of the items; all lists are in the order of `Dataset.items`."""

    ids: list[str]
    lines: list[str]
    """Raw short form, for histories."""
    candidates: list[str]
    """Title, category and fused description, for ranking."""
    facts: list[list[str]]
    base_rate: dict[str, float]
    """Share of the catalogue's items that have a fact."""
    embedding_texts: list[str]
    """What content retrieval embeds: "title. category. description", or the fused description where there is none."""

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
        made = [texts[item.item_id] for item in items]
        words = keyword_facts([f"{i.title} {first_words(i.description, 30)}" for i in items])
        facts = []
        for item, row, of_text in zip(items, made, words, strict=True):
            looks = [part.lower() for part in row["visual"].split(", ") if part]
            facts.append(list(dict.fromkeys(category_facts(item.category) + of_text + looks)))
        count = Counter(fact for of_item in facts for fact in of_item)
        full = [". ".join(p for p in (i.title, i.category, i.description) if p) for i in items]
        return cls(
            ids=[item.item_id for item in items],
            lines=[ranking_prompts.line(i.title, i.category) for i in items],
            candidates=[
                ranking_prompts.candidate(i.title, i.category, row["description"])
                for i, row in zip(items, made, strict=True)
            ],
            facts=facts,
            base_rate={fact: n / len(items) for fact, n in count.items()},
            embedding_texts=[text or row["description"] for text, row in zip(full, made, strict=True)],
        )


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


def load_embeddings(workspace: Workspace, catalogue: Catalogue) -> np.ndarray:
    """float32 (I, D) as stored by `embed`.

    Raises:
        StoreError: some item has no embedding yet.
    """
    rows = {row["key"]: row["vector"] for row in workspace.rows(EMBEDDINGS).iter_rows(named=True)}
    missing = [item_id for item_id in catalogue.ids if item_id not in rows]
    if missing:
        raise StoreError(f"{len(missing)} items have no embedding (first: {missing[0]!r}): run `mllm-srec retrieve`")
    return np.array([rows[item_id] for item_id in catalogue.ids], dtype=np.float32)
