"""Sections `eyes` and `embeddings`: what the embedded model sees in pictures that it did not learn from."""

import csv
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from common import SEED, TOKENS, Bench, batches, derangement, figure, png, read_pictures, show, shown

from mllm_srec import metrics
from mllm_srec.data.drawing import COLOURS, KINDS, PATTERNS, draw, in_shop
from mllm_srec.looking import Looker
from mllm_srec.mllm.base import Picture, Prompt, Question
from mllm_srec.mllm.local import LocalMllm
from mllm_srec.progress import Bar
from mllm_srec.prompts import items as prompts
from mllm_srec.vocabulary import KINDS as NAMES
from mllm_srec.vocabulary import named

FIRST_SEED = 10_000
"""Of the drawn pictures' generators."""
OPEN_MARKS = {"clothing": 0.75, "grocery": 0.5}
CLOSED_MARKS = {"clothing": 0.85, "grocery": 0.6}
DRAWN_MARKS = {"kind": 0.9, "colour": 0.9, "pattern": 0.8}
OTHERS = 100
"""Texts that a drawn picture's own one stands among."""


@dataclass(frozen=True)
class Case:
    """A picture and what is true of it."""

    picture: Picture
    truth: dict[str, str]
    text: str
    unit: str
    """Pictures of one unit, the same product, are no independent cases."""


def photos(bench: Bench, source: str) -> list[Case]:
    """The test pictures of `clothing` or `grocery`."""
    folder = bench.data / "captioned"
    with (folder / "captions.csv").open(encoding="utf-8", newline="") as file:
        rows = [r for r in csv.DictReader(file) if r["split"] == "test" and r["image"].startswith(f"{source}/")]
    rows = bench.first(rows)
    return [
        Case(
            picture,
            {"kind": row["name"] if source == "clothing" else row["kind"]},
            f"{row['name']}. {row['description']}",
            row["image"] if source == "clothing" else row["name"],
        )
        for row, picture in zip(rows, read_pictures(folder, [row["image"] for row in rows]), strict=True)
    ]


def drawn_goods(bench: Bench) -> list[Case]:
    """The sample shop's combinations, drawn as the shop draws them, which training never does."""
    every = [(k, c, p) for k in KINDS for c in COLOURS for p in PATTERNS if in_shop(k, c, p)]
    return [
        Case(
            png(draw(kind, colour, pattern, np.random.default_rng(FIRST_SEED + number))),
            {"kind": named(kind, NAMES)[0], "colour": colour, "pattern": pattern},
            f"a {colour} {pattern} {kind}",
            str(number),
        )
        for number, (kind, colour, pattern) in bench.first(list(enumerate(every)))
    ]


# Eyes


def eyes(bench: Bench) -> dict[str, Any]:
    """Kinds of photos; kinds, colours and patterns of drawn goods; trained, untrained, and with pictures shuffled."""
    result: dict[str, Any] = {}
    for source in ("clothing", "grocery", "drawn"):
        cases = drawn_goods(bench) if source == "drawn" else photos(bench, source)
        told = {
            name: bench.kept(
                f"eyes-{source}-{name}",
                __file__,
                [mllm.identity, len(cases), TOKENS],
                lambda mllm=mllm, cases=cases, source=source: answers(mllm, cases, source),
            )
            for name, mllm in bench.models.items()
        }
        # A picture's answer does not depend on whose it is: shuffled pictures bring their answers along.
        told["shuffled"] = [told["trained"][at] for at in derangement(len(cases), SEED)]
        result[source] = {name: judged(source, cases, of_role) for name, of_role in told.items()}
    return result


def answers(mllm: LocalMllm, cases: Sequence[Case], source: str) -> list[dict[str, Any]]:
    """Per picture: the open answer on its kind, the choices, and what counts as seen."""
    questions = {"kind": Question(prompts.ask(prompts.QUESTIONS["kind"].ask), prompts.QUESTIONS["kind"].answer)}
    if source == "drawn":
        for name in ("colour", "pattern"):
            asked = prompts.QUESTIONS[name]
            questions[name] = Question(prompts.ask(asked.ask), asked.answer, asked.options)
    else:
        questions["closed"] = replace(questions["kind"], options=tuple(sorted({s.truth["kind"] for s in cases})))
    looker = Looker(mllm, TOKENS)
    seen = ("kind", "colour", "pattern") if source == "drawn" else ("kind",)
    rows: list[dict[str, Any]] = []
    with Bar(f"eyes: {source}", len(cases)) as bar:
        for batch in batches(cases, mllm.batch_size):
            told = mllm.ask([Prompt((prompts.PICTURE, s.picture)) for s in batch], list(questions.values()), TOKENS)
            looks = looker.look([s.picture for s in batch], seen)
            for of_picture, look in zip(told, looks, strict=True):
                texts = {name: answer.text for name, answer in zip(questions, of_picture, strict=True)}
                rows.append({"told": texts, "seen": look.seen})
            bar.advance(len(batch))
    return rows


def names_kind(answer: str, kind: str) -> bool:
    """Whether an answer in own words names the kind."""
    return kind in named(answer, NAMES)


def judged(source: str, cases: Sequence[Case], told: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Figures of one set of pictures from its answers."""
    units = [s.unit for s in cases]

    def share(right: Sequence[bool], mark: float | None = None) -> dict[str, Any]:
        return figure([float(r) for r in right], units, mark)

    def among_seen(name: str) -> dict[str, Any]:
        rows = [(s, t["seen"][name]) for s, t in zip(cases, told, strict=True) if name in t["seen"]]
        right = [names_kind(a, s.truth[name]) if name == "kind" else a == s.truth[name] for s, a in rows]
        return {
            "seen": share([name in t["seen"] for t in told]),
            "right_if_seen": figure([float(r) for r in right], [s.unit for s, _ in rows]),
        }

    kind_mark = DRAWN_MARKS["kind"] if source == "drawn" else OPEN_MARKS[source]
    open_answers = [t["told"]["kind"] for t in told]
    named_right = [names_kind(a, s.truth["kind"]) for s, a in zip(cases, open_answers, strict=True)]
    result: dict[str, Any] = {
        "pictures": len(cases),
        "kind, open": share(named_right, kind_mark),
        "kind, more than one named": share([len(named(a, NAMES)) > 1 for a in open_answers]),
        "kind, as looked": among_seen("kind"),
    }
    for name in ("colour", "pattern") if source == "drawn" else ():
        right = [t["told"][name] == s.truth[name] for s, t in zip(cases, told, strict=True)]
        result[f"{name}, options"] = share(right, DRAWN_MARKS[name])
        result[f"{name}, as looked"] = among_seen(name)
    if source != "drawn":
        right = [t["told"]["closed"] == s.truth["kind"] for s, t in zip(cases, told, strict=True)]
        options = len({s.truth["kind"] for s in cases})
        result["kind, closed"] = share(right, CLOSED_MARKS[source]) | {"chance": 1 / options}
    return result


def show_eyes(result: dict[str, Any]) -> None:
    """One table per set of pictures."""
    for source, roles in result.items():
        rows = []
        for measure in roles["trained"]:
            if measure == "pictures":
                continue
            parts = ("seen", "right_if_seen") if measure.endswith("as looked") else (None,)
            for part in parts:
                cells = [roles[role][measure] if part is None else roles[role][measure][part] for role in roles]
                label = measure if part is None else f"{measure}: {part.replace('_', ' ')}"
                label += f" (chance {cells[0]['chance']:.3f})" if "chance" in cells[0] else ""
                # The marks are for the trained model.
                texts = [
                    shown(cell if role == "trained" else {k: v for k, v in cell.items() if k != "mark"})
                    + (f" of {cell['n']}" if part == "right_if_seen" else "")
                    for role, cell in zip(roles, cells, strict=True)
                ]
                rows.append((label, *texts))
        show(f"eyes: {source}, {roles['trained']['pictures']} pictures", ("measure", *roles), rows)


# Embeddings


def embeddings(bench: Bench) -> dict[str, Any]:
    """Picture -> its own text among others, by the models' vectors."""
    result: dict[str, Any] = {}
    for source in ("grocery", "drawn"):
        cases = drawn_goods(bench) if source == "drawn" else photos(bench, source)
        texts = sorted({s.text for s in cases})
        own = np.array([texts.index(s.text) for s in cases])
        units = [s.unit for s in cases]
        allowed = candidates(own, len(texts), OTHERS) if source == "drawn" else np.ones((len(own), len(texts)), bool)
        size = int(allowed[0].sum())
        result[source] = {
            "pictures": len(cases),
            "candidates": size,
            "chance": {f"Recall@{k}": min(1, k / size) for k in (1, 10)},
        }
        for name, mllm in bench.models.items():
            both = bench.kept(
                f"embeddings-{source}-{name}",
                __file__,
                [mllm.identity, len(cases)],
                lambda mllm=mllm, cases=cases, texts=texts, source=source: {
                    "picture": _embed(mllm, [Prompt((prompts.PICTURE, s.picture)) for s in cases], source),
                    "text": _embed(mllm, [Prompt((text,)) for text in texts], source),
                },
            )
            pictures, vectors = np.array(both["picture"]), np.array(both["text"])
            for way, (a, b) in {
                "cosine": (pictures, vectors),
                "centred": (centred(pictures), centred(vectors)),
            }.items():
                scores = np.where(allowed, a @ b.T, -np.inf)
                greater, ties = metrics.places(scores, own)
                result[source][f"{name}, {way}"] = {
                    f"Recall@{k}": figure(metrics.recall(greater, ties, k), units) for k in (1, 10)
                }
    return result


def candidates(own: np.ndarray, count: int, others: int) -> np.ndarray:
    """bool (N, count): each row its own text and `others` further ones, or as many as there are, drawn with a seed."""
    generator = np.random.default_rng(SEED)
    allowed = np.zeros((len(own), count), dtype=bool)
    for row, text in enumerate(own):
        rest = np.delete(np.arange(count), text)
        allowed[row, [text, *generator.permutation(rest)[:others]]] = True
    return allowed


def centred(vectors: np.ndarray) -> np.ndarray:
    """Vectors (N, D) minus their mean, of length 1 again."""
    moved = vectors - vectors.mean(0)
    return moved / np.maximum(np.linalg.norm(moved, axis=1, keepdims=True), 1e-12)


def _embed(mllm: LocalMllm, asked: Sequence[Prompt], label: str) -> list[list[float]]:
    rows: list[list[float]] = []
    with Bar(f"embeddings: {label}", len(asked)) as bar:
        for batch in batches(asked, mllm.batch_size):
            rows += mllm.embed(batch).tolist()
            bar.advance(len(batch))
    return rows


def show_embeddings(result: dict[str, Any]) -> None:
    """One table per set of pictures."""
    for source, of_source in result.items():
        rows = [
            (name, *map(shown, values.values()))
            for name, values in of_source.items()
            if name not in ("pictures", "candidates", "chance")
        ]
        rows.append(("chance", *(f"{value:.3f}" for value in of_source["chance"].values())))
        title = f"embeddings: {source}, {of_source['pictures']} pictures, each among {of_source['candidates']} texts"
        show(title, ("vectors", "Recall@1", "Recall@10"), rows)
