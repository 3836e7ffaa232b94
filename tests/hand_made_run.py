"""A run made by hand, for reports of it: twelve people, twenty items, twelve candidates each, no weights.

Person n chose items n, n + 1, n + 2 and then n + 3, the target. People 0 to 5 have it at places 1 to 6 of their lists,
6 and 7 at places 11 and 12, the others not at all; item 14, the target of person 11, stands in no other event.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np

from fakes import FakeMllm, make_catalogue, make_shop, png
from mllm_srec.catalogue import Catalogue
from mllm_srec.config import load_config
from mllm_srec.data.dataset import Histories, Queries
from mllm_srec.data.split import Split, Targets, leave_last_out
from mllm_srec.evaluation import protocol, slices
from mllm_srec.evaluation.protocol import Places
from mllm_srec.evaluation.report import Ranked, write_report
from mllm_srec.mllm.local import LocalMllm
from mllm_srec.workspace import Workspace

PEOPLE, ITEMS, CANDIDATES = 12, 20, 12
HELD = 8
PLACES = (1, 2, 3, 4, 5, 6, 11, 12)
"""Of the targets in the reranked lists."""
DAY = 86_400_000
START = 1_700_006_400_000
"""Midnight of 2023-11-15, UTC."""
OURS, REFERENCE = "MLLM-SRec", "retrieval"
HOSTILE = "<script>alert(1)</script> & \"hat\" 'x' $a_b$"
"""Nothing in a title, where tags are taken out of texts, but whole in an id."""
SETTINGS = ("evaluation.bootstrap=100", "users.window=2", "users.step=2", "retrieval.candidates=12")


@dataclass
class AdaptedMllm(FakeMllm):
    """A stand-in with an adapter that can be taken off, as `LocalMllm` has one."""

    identity: str = "fake-1:adapter"
    taken_off: int = 0
    words: list[str] = field(default_factory=list)
    """Identity at each prompt that was written to."""

    @contextmanager
    def without_adapter(self) -> Iterator[None]:
        self.identity, before = "fake-1", self.identity
        self.taken_off += 1
        try:
            yield
        finally:
            self.identity = before

    def generate(self, *arguments: Any) -> list[str]:
        self.words.append(self.identity)
        return super().generate(*arguments)


class Neighbours:
    """The newest event stands for what was chosen together with the item."""

    def falls(self, asked: Queries, items: Sequence[int]) -> np.ndarray:
        return np.zeros((len(items), len(asked[0])))

    def nearest_events(
        self, history: np.ndarray, item: int, shared: np.ndarray, falls: np.ndarray
    ) -> tuple[int | None, int | None]:
        return (int(history[-1]), None) if len(history) else (None, None)


@dataclass
class Run:
    """All that `write_report` asks for."""

    workspace: Workspace
    histories: Histories
    split: Split
    catalogue: Catalogue
    result: dict[str, Any]
    ranked: Ranked
    mllm: AdaptedMllm

    def write(self) -> str:
        """The page."""
        neighbours, mllm = Neighbours(), cast(LocalMllm, self.mllm)
        path = write_report(
            self.workspace, mllm, self.histories, self.split, self.catalogue, self.result, self.ranked, neighbours
        )
        return path.read_text(encoding="utf-8")

    @property
    def folder(self) -> Path:
        return self.workspace.run("main")


def person(number: int) -> str:
    return f"u{number:02}"


def make_run(folder: Path, titles: Mapping[int, str] | None = None, suffix: str = "", **changes: Any) -> Run:
    """The run in a workspace in `folder`; items 16 to 18 have no picture that can be shown.

    Args:
        titles: of items, by number; the others are called "item N the title".
        suffix: what ends the id of every person and item.
        changes: of the result.
    """
    pictures = {f"{n}.png": png(f"#{n * 12:02x}4060") for n in range(16)} | {"18.png": b"no picture"}
    named = [f"{n}.png" if n != 16 else None for n in range(ITEMS - 1)] + ["0.png"]
    ids = [f"i{n}{suffix}" for n in range(ITEMS)]
    called = [(titles or {}).get(n, f"item {n} the title") for n in range(ITEMS)]
    items = [
        {"item_id": item_id, "title": title, "category": "Things", "image": image}
        for item_id, title, image in zip(ids, called, named, strict=True)
    ]
    log = {
        person(n) + suffix: [(ids[(n + step) % ITEMS], START + step * DAY, None) for step in range(4)]
        for n in range(PEOPLE)
    }
    workspace = make_shop(folder, items, log, load_config(overrides=SETTINGS), pictures)
    histories = workspace.dataset().histories()
    split = leave_last_out(histories, "file_order", 3)
    ranked = rank()
    return Run(
        workspace,
        histories,
        split,
        make_catalogue(None, None, None, **{one: f"{('blue', 'red')[n % 2]} thing" for n, one in enumerate(ids)}),
        measured(workspace, histories, split, ranked) | changes,
        ranked,
        AdaptedMllm(),
    )


def rank() -> Ranked:
    """The lists: retrieval has every held target first, and what it does not hold at place 16 of the catalogue.

    Place p of person n's list has the fused score -p and the log-odds (n - p) / 4.
    """
    people = np.arange(PEOPLE, dtype=np.int64)
    held = people < HELD
    shift = np.where(held, 3, 4)
    items = (people[:, None] + shift[:, None] + np.arange(CANDIDATES)) % ITEMS
    fused = np.zeros((PEOPLE, CANDIDATES))
    for row, place in enumerate(PLACES):
        order = np.arange(1, CANDIDATES)  # places of the others, the target's left out
        order[place - 1 :] += 1
        fused[row] = -np.concatenate([[place], order])
    first = Places(np.where(held, 0, 15), np.zeros(PEOPLE, np.int64))
    ours = Places(np.where(held, np.resize(np.array(PLACES), PEOPLE) - 1, 15), np.zeros(PEOPLE, np.int64))
    return Ranked(
        targets=_targets(),
        items=items.astype(np.int32),
        retrieval=np.tile(np.linspace(2, 1, CANDIDATES, dtype=np.float32), (PEOPLE, 1)),
        held=held,
        fused=fused,
        odds=((fused[:HELD] + people[:HELD, None]) / 4).astype(np.float32),
        places={"popularity": Places(np.full(PEOPLE, 9), np.full(PEOPLE, 1)), REFERENCE: first, OURS: ours},
    )


def _targets() -> Targets:
    last = np.full(PEOPLE, 3, np.int64)
    return Targets(np.arange(PEOPLE, dtype=np.int64), last, last.copy())


def measured(workspace: Workspace, histories: Histories, split: Split, ranked: Ranked) -> dict[str, Any]:
    """What metrics.json would hold."""
    config, targets = workspace.config, ranked.targets
    ours, theirs = (protocol.per_target(ranked.places[name], (10,))["NDCG@10"] for name in (OURS, REFERENCE))
    cuts = (slices.cold_items(histories, split.seen_test, targets), slices.history_length(targets))
    return {
        "version": "0.1.0",
        "conditions": protocol.conditions(workspace.dataset(), split, targets, config),
        "choices": {"content_weight": 0.5, "fusion": {"retrieval": 1.0, "odds": 0.25}},
        "choosing_targets": 4,
        "choosing_targets_among_candidates": 3,
        "training_rows": 0,
        "targets_among_candidates": float(ranked.held.mean()),
        "reference": REFERENCE,
        "systems": protocol.compare(ranked.places, REFERENCE, targets.user, config),
        "slices": {"system": OURS, "metric": "NDCG@10"}
        | {of.cut: slices.by_slice(ours, of, targets.user, 100, 0, theirs) for of in cuts},
    }
