"""Stage 1, item understanding: picture -> answers -> visual summary, + text -> description and facts."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

import pyarrow as pa

from mllm_srec.config import ItemsConfig
from mllm_srec.data.text import clean
from mllm_srec.facts import Fact, merge, said_in, unsupported_words
from mllm_srec.looking import Look, Looker
from mllm_srec.mllm.base import Mllm, PartialFailure, Picture, Prompt
from mllm_srec.progress import say
from mllm_srec.prompts import items as prompts
from mllm_srec.vocabulary import words
from mllm_srec.workspace import Counts, Job, Table, Workspace, fingerprint

FACTS = pa.list_(
    pa.struct(
        [("attribute", pa.string()), ("value", pa.string()), ("origin", pa.string()), ("contradicted", pa.bool_())]
    )
)

SEEN = pa.list_(pa.struct([("question", pa.string()), ("answer", pa.string())]))

ITEM_TEXTS = Table(
    "item_texts",
    pa.schema(
        [
            ("seen", SEEN),
            ("visual", pa.string()),
            ("description", pa.string()),
            ("fused_by", pa.string()),
            ("facts", FACTS),
            ("picture", pa.string()),
            ("cleaned", pa.string()),
        ]
    ),
)
"""`seen`: answers that the picture gave; `visual`: the same in words, without what the text contradicts; `picture`: its
state; `cleaned`: what was taken out of the item's own text (`data.text.REMOVALS`)."""

RULES = "1"
"""Raised when the rules of looking or fusing change, so that rows made by the old ones are made again."""

CANDIDATE_WORDS = 20
"""Words of an item's own text in a composed description."""


@dataclass(frozen=True)
class Item:
    """One row of the catalogue as stage 1 reads it; `picture_state` is `ok` or why there is none."""

    item_id: str
    title: str
    description: str
    category: str
    picture_sha256: str | None
    picture_state: str
    cleaned: str = ""
    """What `data.text.clean` took out of title, description and category, comma-separated."""


def first_words(text: str, count: int) -> str:
    """The first `count` words; a cut ends behind a sentence where that keeps at least half of it, else in "..."."""
    words = text.split()
    if len(words) <= count:
        return " ".join(words)
    cut = " ".join(words[:count])
    end = max(f"{cut} ".rfind(mark) for mark in (". ", "! ", "? "))
    return cut[: end + 1] if end >= len(cut) // 2 else f"{cut.rstrip(',;:')} ..."


def domain_of(category: str) -> str:
    """The domain of `prompts.DOMAINS` that a category path speaks of; "general" if none."""
    said = words(category)
    return next((name for name, known in prompts.DOMAIN_WORDS.items() if any(w in known for w in said)), "general")


def _questions(item: Item, config: ItemsConfig) -> tuple[str, ...]:
    domain = domain_of(item.category) if config.domain == "auto" else config.domain
    return tuple(name for name in prompts.DOMAINS[domain] if name in config.questions)


def _look(looker: Looker, workspace: Workspace, items: Sequence[Item], config: ItemsConfig) -> list[Look]:
    """What was seen of each item; items with the same questions are asked together."""
    looks = [Look() for _ in items]
    groups: dict[tuple[str, ...], list[int]] = {}
    for at, item in enumerate(items):
        if item.picture_sha256:
            groups.setdefault(_questions(item, config), []).append(at)
    for names, members in groups.items():
        hashes = [str(items[at].picture_sha256) for at in members]
        pictures = [Picture(sha256, workspace.picture(sha256)) for sha256 in hashes]
        for at, look in zip(members, looker.look(pictures, names), strict=True):
            looks[at] = look
    return looks


def visual_summary(seen: Mapping[str, str], facts: Sequence[Fact]) -> str:
    """What was seen, in words; a colour by the name that the text has for it.

    What the text contradicts stays in the facts alone: identity comes from the text, and of looks that two sources tell
    differently a description claims none.
    """
    shown = dict(seen)
    for fact in facts:
        if fact.origin == "picture" and fact.contradicted:
            shown[fact.attribute] = ""
        elif fact.origin != "text" and fact.attribute == "colour":
            shown["colour"] = fact.value
    return prompts.summary(shown)


@dataclass(frozen=True)
class _Fused:
    description: str
    by: str
    error: str = ""


def _fuse(mllm: Mllm, items: Sequence[Item], visuals: Sequence[str], config: ItemsConfig) -> list[_Fused]:
    """The description per item, made by "model" or "rule"; a model's sentence with invented words is not kept."""
    texts = [first_words(item.description, CANDIDATE_WORDS) for item in items]
    composed = [prompts.compose(text, visual) for text, visual in zip(texts, visuals, strict=True)]
    if config.fusion == "compose":
        return [_Fused(description, "rule") for description in composed]
    given = [
        prompts.fuse(item.title, item.category, first_words(item.description, config.text_words), visual)
        if item.title or item.category or item.description or visual
        else ""  # with nothing to go by, whatever the model writes is invented
        for item, visual in zip(items, visuals, strict=True)
    ]
    asked = [at for at, text in enumerate(given) if text]
    errors: dict[int, str] = {}
    try:
        told = mllm.generate(
            [Prompt((given[at],), system=prompts.FUSE_SYSTEM) for at in asked], config.description_tokens
        )
    except PartialFailure as failure:
        told, errors = failure.results, {asked[row]: reason for row, reason in failure.errors.items()}
    written = {at: " ".join((text or "").split()) for at, text in zip(asked, told, strict=True)}
    fused = []
    for at, (item, visual, rule) in enumerate(zip(items, visuals, composed, strict=True)):
        sentence = written.get(at, "")
        invented = unsupported_words(sentence, item.title, item.category, item.description, visual)
        kept = sentence and not invented
        fused.append(_Fused(sentence if kept else rule, "model" if kept else "rule", errors.get(at, "")))
    return fused


def describe(workspace: Workspace, mllm: Mllm) -> Counts:
    """Make or renew `item_texts`: one row per item.

    `skipped` where an item has neither text nor a usable picture, `error` where the model failed on this item.
    """
    config = workspace.config.items
    settings = config.model_dump_json(exclude={"embedding"})
    jobs = []
    for item in load_items(workspace):
        made_of = (item.title, item.description, item.category, item.picture_sha256, item.picture_state, item.cleaned)
        mark = fingerprint(*made_of, RULES, prompts.VERSION, mllm.identity, settings)
        jobs.append(Job(item.item_id, mark, item))
    looker = Looker(mllm, config.answer_tokens)

    def compute(batch: list[Job]) -> list[dict[str, object]]:
        items: list[Item] = [job.payload for job in batch]
        looks = _look(looker, workspace, items, config)
        facts = [
            merge(look.seen, said_in(item.title, item.category, item.description), _questions(item, config))
            for item, look in zip(items, looks, strict=True)
        ]
        visuals = [visual_summary(look.seen, known) for look, known in zip(looks, facts, strict=True)]
        fused = _fuse(mllm, items, visuals, config)
        return [_row(*of_item) for of_item in zip(items, looks, facts, visuals, fused, strict=True)]

    counts = workspace.produce(ITEM_TEXTS, jobs, compute, batch=workspace.config.model.batch_size, label="describe")
    if counts.made:
        _report(workspace)
    return counts


def _row(item: Item, look: Look, facts: Sequence[Fact], visual: str, fused: _Fused) -> dict[str, object]:
    reason = look.error or fused.error
    status = "error" if reason else "ok"
    if not reason and not (item.title or item.category or fused.description):
        looked = "nothing seen in the picture" if item.picture_state == "ok" else f"picture {item.picture_state}"
        status, reason = "skipped", f"no text, {looked}"
    return {
        "status": status,
        "reason": reason,
        "seen": [{"question": name, "answer": answer} for name, answer in look.seen.items()],
        "visual": visual,
        "description": fused.description,
        "fused_by": fused.by,
        "facts": [asdict(fact) for fact in facts],
        "picture": item.picture_state,
        "cleaned": item.cleaned,
    }


def _report(workspace: Workspace) -> None:
    """Say what a reader of the descriptions should know of all of them."""
    rows = workspace.rows(ITEM_TEXTS).to_dicts()
    against = sum(any(fact["contradicted"] for fact in row["facts"]) for row in rows)
    cleaned = Counter(kind for row in rows for kind in row["cleaned"].split(", ") if kind)
    say(f"describe: picture and text contradict each other in {against:,} of {len(rows):,} items")
    if cleaned:
        say("describe: taken out of texts: " + ", ".join(f"{kind} ({n:,} items)" for kind, n in cleaned.most_common()))


def load_items(workspace: Workspace) -> list[Item]:
    """The catalogue's rows, their texts cleaned, with their picture's hash and state, in the dataset's order.

    Titles and categories come in one line with single spaces: an item is one line of a prompt.
    """
    states = {row["item_id"]: row for row in workspace.pictures().to_dicts()}
    items = []
    for row in workspace.dataset().items.iter_rows(named=True):
        (title, a), (description, b), (category, c) = (
            clean(row[name]) for name in ("title", "description", "category")
        )
        state = states[row["item_id"]]
        items.append(
            Item(
                row["item_id"],
                " ".join(title.split()),
                description,
                " ".join(category.split()),
                state["sha256"] if state["state"] == "ok" else None,
                state["state"],
                ", ".join(sorted({*a, *b, *c})),
            )
        )
    return items
