"""A small shop whose pictures alone tell colours, described, with lists that a model without weights has read."""

import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np

from fakes import Event, make_shop, png
from hand_made_run import AdaptedMllm
from mllm_srec.catalogue import Catalogue
from mllm_srec.config import load_config
from mllm_srec.data.dataset import Histories
from mllm_srec.data.split import Targets
from mllm_srec.evaluation.honesty import ReadLists
from mllm_srec.items import describe
from mllm_srec.mllm.local import LocalMllm
from mllm_srec.ranking import Fusion, item_priors, score_lists
from mllm_srec.user_states import History, low_rating
from mllm_srec.users import comprehend_history
from mllm_srec.workspace import Workspace

ITEMS = 8
DAY = 86_400_000
COLOURS = ["blue"] * 6 + ["red"] * 2
"""What the pictures of items 0 to 7 show."""
ODDS = Fusion(0.0, 1.0, 0.0, False)
"""The odds alone."""
SAID = "Its main colour is"
"""What the answer to the question for the colour begins with."""
SETTINGS = ("model.dtype=float32", "evaluation.bootstrap=100", "users.window=2", "users.step=2", "users.recent=3")

Odds = Callable[[str, str], float]
"""(prefix, candidate) -> log-odds of Yes."""


def photo(number: int) -> bytes:
    return png(f"#{20 + number:02x}4060")


def sha(number: int) -> str:
    return hashlib.sha256(photo(number)).hexdigest()


def number_in(text: str) -> int:
    """Of the item that a text begins with, -1 for none."""
    found = re.match(r"thing (\d)", text)
    return int(found[1]) if found else -1


def likes(word: str) -> Odds:
    """Items whose text holds `word`, of others the ones with low numbers."""
    return lambda prefix, candidate: 5.0 * (word in candidate) - number_in(candidate) / 100


@dataclass
class Read:
    """All that the checks ask for."""

    workspace: Workspace
    mllm: Any
    catalogue: Catalogue
    histories: Histories
    lists: ReadLists

    @property
    def given(self) -> tuple[Workspace, Any, Catalogue, Histories, ReadLists]:
        return self.workspace, self.mllm, self.catalogue, self.histories, self.lists


def fake(odds: Odds, colours: Sequence[str] = COLOURS, **changes: Any) -> AdaptedMllm:
    """A model that sees the colours of the shop's pictures."""
    return AdaptedMllm(odds=odds, sees={(sha(n), SAID): colour for n, colour in enumerate(colours)}, **changes)


def read_lists(
    folder: Path,
    mllm: AdaptedMllm | LocalMllm,
    histories: Sequence[Sequence[int]],
    candidates: Sequence[Sequence[int]],
    *settings: str,
    fusion: Fusion = ODDS,
    titles: Mapping[int, str] | None = None,
    pictures: bool = True,
) -> Read:
    """User n chose the items of `histories[n]`, then `candidates[n][0]`, and has that list of candidates.

    Args:
        titles: of items, by number; the others are called "thing N".
        pictures: whether the items have any.
    """
    items = [
        {
            "item_id": f"i{n}",
            "title": (titles or {}).get(n, f"thing {n}"),
            "image": f"{n}.png" if pictures else None,
        }
        for n in range(ITEMS)
    ]
    log: dict[str, list[Event]] = {
        f"u{user}": [(f"i{n}", DAY * at, None) for at, n in enumerate([*events, row[0]])]
        for user, (events, row) in enumerate(zip(histories, candidates, strict=True))
    }
    config = load_config(overrides=(*SETTINGS, *settings))
    photos = {f"{n}.png": photo(n) for n in range(ITEMS)} if pictures else {}
    workspace = make_shop(folder, items, log, config, photos)
    ours = cast(LocalMllm, mllm)
    with ours.without_adapter():
        describe(workspace, ours)
    catalogue, seen = Catalogue.load(workspace), workspace.dataset().histories()
    low = low_rating(seen)
    states = [
        comprehend_history(ours, catalogue, History.of(seen, user, low), config.users, len(events), workspace).asked_at(
            DAY * len(events)
        )
        for user, events in enumerate(histories)
    ]
    ends = np.array([len(events) for events in histories], dtype=np.int64)
    rows = np.array(candidates, dtype=np.int32)
    retrieval = np.tile(np.arange(rows.shape[1], 0, -1, dtype=np.float32), (len(rows), 1))
    scores = score_lists(workspace, ours, catalogue, states, rows, retrieval, "test")
    priors = item_priors(workspace, ours, catalogue, np.unique(rows))
    targets = Targets(np.arange(len(rows), dtype=np.int64), ends, ends.copy())
    return Read(workspace, mllm, catalogue, seen, ReadLists(targets, states, scores, priors, fusion))
