"""The ten users of a run's report: some whose next item the list held, some whom it missed, with all that was known.

They are drawn by the run's seed, not picked. What a person sees of them is what the model was given: the events before
the target, the windows' texts, profile and preference, the list and its reasons.
"""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from typing import Protocol

import numpy as np
import polars as pl
import pyarrow as pa

from mllm_srec import users
from mllm_srec.catalogue import Catalogue
from mllm_srec.data.dataset import Histories, Queries
from mllm_srec.data.images import PictureError, open_picture
from mllm_srec.data.split import Split, Targets
from mllm_srec.data.text import clean
from mllm_srec.evaluation.protocol import Places, histories_of, target_items
from mllm_srec.mllm.base import PartialFailure
from mllm_srec.mllm.local import LocalMllm
from mllm_srec.mllm.remote import RemoteMllm
from mllm_srec.prompts import ranking as prompts
from mllm_srec.reasons import explain
from mllm_srec.records import explain_questions, find_evidence, rationale, shared_information
from mllm_srec.user_states import UserState, disliked_events, low_rating
from mllm_srec.windows import window_bounds
from mllm_srec.workspace import Job, Table, Workspace, fingerprint

EACH = 5
"""Users whose target the list holds, and as many of the others."""
LISTED = 10
EVENTS_SHOWN = 8
WINDOWS_SHOWN = 3
REASONS_SHOWN = 3
SIDE = 96
"""Long side of a thumbnail in pixels."""
TITLE, TEXT = 90, 600
"""Characters shown of a title and of a model's text: data may hold any amount."""

REASONS = Table("report_reasons", pa.schema([("texts", pa.list_(pa.string())), ("by", pa.list_(pa.string()))]))
"""One row per user shown: reasons for the first items of the list."""

WITHOUT_PICTURE = {"none": "no picture given", "remote": "picture not fetched", "missing": "picture file missing"}


class Neighbours(Protocol):
    """What reasons need of a retriever."""

    def falls(self, asked: Queries, items: Sequence[int]) -> np.ndarray:
        """See `Retriever.falls`."""

    def nearest_events(
        self, history: np.ndarray, item: int, shared: np.ndarray, falls: np.ndarray
    ) -> tuple[int | None, int | None]:
        """See `Retriever.nearest_events`."""


@dataclass(frozen=True)
class Ranked:
    """What a run knows of its T test targets, in the order of metrics.json; K candidates each, H lists that were read.

    Attributes:
        items: int32 (T, K), candidates in retrieval order.
        retrieval: float32 (T, K), their scores.
        held: bool (T,), the target is among its candidates; H of them are.
        fused: float64 (T, K); zeros in rows that are not held, which the model did not read.
        odds: float32 (H, K), log-odds of "Yes" of the held lists, in order.
        places: per system the targets' places in the full catalogue.
    """

    targets: Targets
    items: np.ndarray
    retrieval: np.ndarray
    held: np.ndarray
    fused: np.ndarray
    odds: np.ndarray
    places: dict[str, Places]

    def order(self, target: int) -> np.ndarray:
        """int (K,): the list as it is shown; equal scores, and lists that the model did not read, as retrieval has
        them."""
        return np.argsort(-self.fused[target], kind="stable")


@dataclass(frozen=True)
class Shown:
    """An item as a person sees it: `picture` is a data URI, or "" and `without` says why."""

    title: str
    category: str
    picture: str
    without: str
    when: str = ""
    disliked: bool = False


@dataclass(frozen=True)
class Listed:
    """One place of a list; `fused` and `odds` are None where the model did not read the list."""

    item: Shown
    is_target: bool
    fused: float | None
    retrieval: float
    odds: float | None
    reason: str = ""
    reason_by: str = ""


@dataclass(frozen=True)
class WindowText:
    """A window of the history: its first and last event (from 1), their days, and its summary."""

    first: int
    last: int
    days: str
    summary: str
    written_by: str


@dataclass(frozen=True)
class Example:
    """One user with what was known before the target, the list, and what became of the target."""

    user_id: str
    outcome: str
    """"found", "lost in ranking" or "lost in retrieval"."""
    told: str
    read: bool
    target: Shown
    events: int
    newest: tuple[Shown, ...]
    """Oldest first."""
    windows: tuple[WindowText, ...]
    earlier_windows: int
    profile: str
    preference: str
    listed: tuple[Listed, ...]


def choose(ranked: Ranked, wanted: np.ndarray, seed: int) -> list[int]:
    """At most `EACH` targets that their reranked list holds in its first ten, then as many others; one per user.

    Args:
        wanted: int (T,), the targets' catalogue positions.
    """
    order = np.random.default_rng(seed).permutation(len(wanted)).tolist()
    found: dict[bool, list[int]] = {True: [], False: []}
    taken: set[int] = set()
    for target in order:
        user = int(ranked.targets.user[target])
        place = _place_in_list(ranked, target, int(wanted[target]))
        of_kind = found[place is not None and place <= LISTED]
        if user not in taken and len(of_kind) < EACH:
            taken.add(user)
            of_kind.append(target)
    return found[True] + found[False]


def examples(
    workspace: Workspace,
    mllm: LocalMllm | RemoteMllm,
    catalogue: Catalogue,
    histories: Histories,
    split: Split,
    ranked: Ranked,
    systems: tuple[str, str],
    retriever: Neighbours,
) -> list[Example]:
    """The users to show. Windows, states and reasons are stored and reused; what is missing the model writes now.

    Args:
        mllm: as it ranked, with its adapter.
        systems: names in `ranked.places` of the system and of retrieval.

    Raises:
        StoreError: the store cannot be read or written.
    """
    wanted = target_items(histories, ranked.targets)
    chosen = choose(ranked, wanted, workspace.config.seed)
    gallery = _Gallery(workspace, catalogue, histories)
    states, windows = _comprehend(workspace, mllm, catalogue, histories, ranked.targets.take(np.array(chosen, int)))
    orders = [ranked.order(target)[:LISTED] for target in chosen]
    asked = histories_of(histories, ranked.targets.take(np.array(chosen, int)))
    low = [gallery.low_rated(int(ranked.targets.user[target]), int(ranked.targets.end[target])) for target in chosen]
    heads = [ranked.items[target, order[:REASONS_SHOWN]].tolist() for target, order in zip(chosen, orders, strict=True)]
    reasons = _reasons(workspace, mllm, catalogue, states, asked, low, heads, retriever)
    seen_before = np.zeros(len(histories.items), dtype=bool)
    seen_before[histories.item[split.seen_test]] = True
    shown = []
    for target, order, state, why in zip(chosen, orders, states, reasons, strict=True):
        user, end = int(ranked.targets.user[target]), int(ranked.targets.end[target])
        item = int(wanted[target])
        barred = not workspace.config.retrieval.repeats and item in histories.of(user, end)
        outcome, told = _became(ranked, target, item, systems, barred, bool(seen_before[item]))
        bounds = window_bounds(end, gallery.times(user), workspace.config.users)
        shown.append(
            Example(
                user_id=readable(histories.users[user], TITLE),
                outcome=outcome,
                told=told,
                read=bool(ranked.held[target]),
                target=gallery.event(user, int(ranked.targets.position[target])),
                events=end,
                newest=tuple(gallery.event(user, at) for at in range(max(0, end - EVENTS_SHOWN), end)),
                windows=tuple(gallery.window(user, windows[user, stop]) for _, stop in bounds[-WINDOWS_SHOWN:]),
                earlier_windows=max(0, len(bounds) - WINDOWS_SHOWN),
                profile=readable(state.profile, TEXT),
                preference=readable(state.preference, TEXT),
                listed=_list(ranked, target, order, item, why, gallery),
            )
        )
    return shown


def readable(text: str, limit: int) -> str:
    """`text` in one line of at most `limit` characters, without what cannot be printed."""
    line = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return line if len(line) <= limit else line[: limit - 1].rstrip() + "…"


class _Gallery:
    """Items and events of one log as a person sees them."""

    def __init__(self, workspace: Workspace, catalogue: Catalogue, histories: Histories) -> None:
        self._workspace, self._catalogue, self._histories = workspace, catalogue, histories
        self._rows = workspace.dataset().items
        self._low = low_rating(histories)
        self._made: dict[int, tuple[str, str]] = {}

    @cached_property
    def _pictures(self) -> pl.DataFrame:
        return self._workspace.pictures()

    def item(self, item: int, when: str = "", disliked: bool = False) -> Shown:
        title, category = (readable(clean(str(self._rows[name][item]))[0], TITLE) for name in ("title", "category"))
        title = title or readable(self._catalogue.ids[item], TITLE)
        if item not in self._made:
            self._made[item] = self._picture(item)
        picture, without = self._made[item]
        return Shown(title, category, picture, without, when, disliked)

    def event(self, user: int, at: int) -> Shown:
        """Event `at` of a user."""
        place = int(self._histories.offsets[user]) + at
        disliked = bool(disliked_events(self._histories, user, self._low)[at])
        return self.item(int(self._histories.item[place]), self._day(user, at), disliked)

    def window(self, user: int, row: dict[str, object]) -> WindowText:
        start, stop = int(str(row["start"])), int(str(row["stop"]))
        days = list(dict.fromkeys(day for day in (self._day(user, start), self._day(user, stop - 1)) if day))
        return WindowText(
            start + 1, stop, " to ".join(days), readable(str(row["summary"]), TEXT), str(row["written_by"])
        )

    def times(self, user: int) -> np.ndarray | None:
        time = self._histories.time
        return None if time is None else time[self._histories.span(user)]

    def low_rated(self, user: int, end: int) -> np.ndarray:
        """bool (end,): which of the first `end` events of a user are disliked items."""
        return disliked_events(self._histories, user, self._low)[:end]

    def _day(self, user: int, at: int) -> str:
        times = self.times(user)
        return "" if times is None else f"{datetime.fromtimestamp(int(times[at]) / 1000, UTC):%Y-%m-%d}"

    def _picture(self, item: int) -> tuple[str, str]:
        """(data URI, "") or ("", why there is none)."""
        row = self._pictures.row(item, named=True)
        if row["state"] != "ok":
            return "", WITHOUT_PICTURE.get(row["state"], f"picture {row['state'].replace('_', ' ')}")
        try:
            image = open_picture(self._workspace.picture(row["sha256"]), SIDE)
        except PictureError as error:
            return "", f"picture {error.state.replace('_', ' ')}"
        stream = io.BytesIO()
        image.save(stream, "JPEG", quality=75)
        return f"data:image/jpeg;base64,{base64.b64encode(stream.getvalue()).decode()}", ""


def _comprehend(
    workspace: Workspace,
    mllm: LocalMllm | RemoteMllm,
    catalogue: Catalogue,
    histories: Histories,
    targets: Targets,
) -> tuple[list[UserState], dict[tuple[int, int], dict[str, object]]]:
    """The state that each target sees, and rows of its newest windows by (user, stop)."""
    config = workspace.config.users
    keys: dict[tuple[int, int], str] = {}
    pairs = set()
    for user, end in zip(targets.user.tolist(), targets.end.tolist(), strict=True):
        time = None if histories.time is None else histories.time[histories.span(user)]
        for start, stop in window_bounds(end, time, config)[-WINDOWS_SHOWN:]:
            # A closed window was the newest one of the state after its last event: that state brings its text.
            pairs.add((user, stop))
            keys[user, stop] = users.window_key(histories.users[user], start, stop)
    with mllm.without_adapter():  # it has learnt to rank, not to summarise
        users.comprehend(workspace, mllm, catalogue, pairs)
    rows = {row["key"]: row for row in workspace.rows(users.WINDOWS).iter_rows(named=True)}
    stored = users.load_states(workspace, catalogue)
    states = []
    for user, position, end in zip(targets.user, targets.position, targets.end, strict=True):
        state = users.state_of(stored, histories.users[user], int(end))
        if histories.time is not None:
            state = state.asked_at(int(histories.time[histories.offsets[user] + position]))
        states.append(state)
    return states, {pair: rows[key] for pair, key in keys.items()}


def _reasons(
    workspace: Workspace,
    mllm: LocalMllm | RemoteMllm,
    catalogue: Catalogue,
    states: Sequence[UserState],
    asked: Queries,
    disliked: Sequence[np.ndarray],
    heads: Sequence[list[int]],
    retriever: Neighbours,
) -> list[list[tuple[str, str]]]:
    """(text, by whom) for the first items of each list."""
    jobs = []
    for at, (state, low, items) in enumerate(zip(states, disliked, heads, strict=True)):
        history, falls = asked[at][~low], retriever.falls(asked[at : at + 1], items)[:, ~low]
        near = [
            retriever.nearest_events(history, item, shared_information(catalogue, item, history), falling)
            for item, falling in zip(items, falls, strict=True)
        ]
        prefix, questions = explain_questions(state, catalogue, items)
        told = [prefix.system, *(str(part) for part in prefix.parts), *(question.about for question in questions)]
        found = [
            rationale(find_evidence(state, catalogue, item, history, asked[at][low], falling), catalogue, True)
            for item, falling in zip(items, falls, strict=True)
        ]
        kin = [None if i is None else catalogue.lines[i] for pair in near for i in pair]
        mark = fingerprint(mllm.identity, prompts.VERSION, *told, *found, *kin)
        jobs.append(
            Job(users.state_key(state.user_id, state.end), mark, (state, history, asked[at][low], items, near, falls))
        )

    def write(batch: list[Job]) -> list[dict[str, object]]:
        return [_row(*job.payload) for job in batch]

    def _row(
        state: UserState,
        history: np.ndarray,
        low: np.ndarray,
        items: list[int],
        near: list[tuple[int | None, int | None]],
        falls: np.ndarray,
    ) -> dict[str, object]:
        try:
            company, kin = [one for one, _ in near], [one for _, one in near]
            why = explain(mllm, catalogue, state, history, items, company, kin, low, falls)
        except PartialFailure as failure:
            return {"status": "error", "reason": str(failure), "texts": [], "by": []}
        return {"status": "ok", "reason": "", "texts": [one.text for one in why], "by": [one.by for one in why]}

    workspace.produce(REASONS, jobs, write, batch=1, label="report: reasons")
    rows = {row["key"]: row for row in workspace.rows(REASONS).iter_rows(named=True)}
    made = [rows[job.key] for job in jobs]
    return [list(zip(row["texts"], row["by"], strict=True)) for row in made]


def _list(
    ranked: Ranked, target: int, order: np.ndarray, wanted: int, why: list[tuple[str, str]], gallery: _Gallery
) -> tuple[Listed, ...]:
    read = bool(ranked.held[target])
    row = int(np.count_nonzero(ranked.held[:target]))
    listed = []
    for place, at in enumerate(order.tolist()):
        item = int(ranked.items[target, at])
        text, by = why[place] if place < len(why) else ("", "")
        listed.append(
            Listed(
                item=gallery.item(item),
                is_target=item == wanted,
                fused=float(ranked.fused[target, at]) if read else None,
                retrieval=float(ranked.retrieval[target, at]),
                odds=float(ranked.odds[row, at]) if read else None,
                reason=readable(text, TEXT),
                reason_by=by,
            )
        )
    return tuple(listed)


def _place_in_list(ranked: Ranked, target: int, wanted: int) -> int | None:
    """1 for the first of the list as it is shown; None where the target is not among its candidates."""
    if not ranked.held[target]:
        return None
    return int(np.flatnonzero(ranked.items[target, ranked.order(target)] == wanted)[0]) + 1


def _became(
    ranked: Ranked, target: int, wanted: int, systems: tuple[str, str], barred: bool, seen_before: bool
) -> tuple[str, str]:
    """What became of a target, in a word and in a sentence."""
    ours, retrieval = systems
    candidates = ranked.items.shape[1]
    first = ranked.places[retrieval]
    greater, ties = int(first.greater[target]), int(first.ties[target])
    at = f"place {greater + 1:,}" + (f" to {greater + ties + 1:,} (tied)" if ties else "")
    place = _place_in_list(ranked, target, wanted)
    if place is not None and place <= LISTED:
        return "found", f"{ours} has the next item at place {place}, {retrieval} alone at {at}."
    if place is not None:
        return (
            "lost in ranking",
            f"The next item is among the {candidates} candidates ({retrieval} alone: {at}), but {ours} has it at place "
            f"{place}, behind the first {LISTED}.",
        )
    if barred:
        why = "it was in the history, and what was chosen before is not recommended again"
    elif not seen_before:
        why = f"{retrieval} has it at {at}; no event that it may have seen holds this item (a cold item)"
    else:
        why = f"{retrieval} has it at {at}"
    return "lost in retrieval", f"The next item is not among the {candidates} candidates: {why}."
