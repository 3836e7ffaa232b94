"""Section `faithful`: whether an item's score hangs on the event that its reason cites.

A reason is faithful if the item's score falls further without the cited event than without another event of about the
same age. Both times state, prompt and retrieval are made anew from what is left of the history. All states of this
section have summaries by rule: so the two differ in the event alone, not in what the model happens to write.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from common import SEED, Bench, Figure, batches, figure, show, shown
from recommender_lists import LISTS, Places, by_rule, opened, queries_of, read_lists, states, systems, told_of
from users_common import Case, Log

from mllm_srec import facts, rationales, reasons, records
from mllm_srec.prompts import ranking as prompts
from mllm_srec.reasons import explain
from mllm_srec.records import ranking_request, shared_information
from mllm_srec.retrieval import Retriever
from mllm_srec.user_states import History, UserState

PAIRS = 200
SHOWN = 3
"""Items of a list that get a reason."""
NEAR = 3
"""Events from the cited one to the other at most."""
MARK = 0.65
READINGS = ("odds", "likelihood", "fused")
MARKED = ("odds", "fused")
CHECK = "".join(Path(str(of.__file__)).read_text(encoding="utf-8") for of in (reasons, rationales, records, facts))
"""The code that says what a reason may hold: reasons are given again when it changes."""


@dataclass(frozen=True)
class Cited:
    """Item `item` is shown to case number `case`, and its reason cites `event`; `other` is of like recency, not cited.

    All three by catalogue position.
    """

    case: int
    item: int
    event: int
    other: int
    by_facts: bool
    """The reason names facts; else it says only that item and event go together."""


@dataclass
class Given:
    """What test users were shown, in order, and the citations of its reasons.

    items int (B, K): the lists; scores float (B, K) per reading. Of `reasons` reasons `citing` cite an event; `alone`
    citations have no other event near them and are left out.
    """

    cases: list[Case] = field(default_factory=list)
    items: list[np.ndarray] = field(default_factory=list)
    scores: dict[str, list[np.ndarray]] = field(default_factory=lambda: {reading: [] for reading in READINGS})
    cited: list[Cited] = field(default_factory=list)
    reasons: int = 0
    citing: int = 0
    alone: int = 0


def faithful(bench: Bench, places: Places) -> dict[str, Any]:
    """Per set: how often the cited event counts for more than another one."""
    return {name: measure(bench, opened(bench, place)) for name, place in places.items()}


def measure(bench: Bench, log: Log) -> dict[str, Any]:
    """Shares of pairs, and how far scores fall."""
    retriever = log.pipeline._retriever("test")
    given = shown_with_reasons(bench, log, retriever, min(PAIRS, bench.limit or PAIRS))
    row: dict[tuple[int, int], int] = {}  # an event that several reasons cite is taken out once
    for of in given.cited:
        for event in (of.event, of.other):
            row.setdefault((of.case, event), len(row))
    cases = [without(given.cases[case], event) for case, event in row]
    after = dict.fromkeys(READINGS, np.zeros((0, 0)))
    if cases:
        items = np.array([given.items[case] for case, _ in row])
        told = states(bench, log, cases, "", by_rule(log))
        after = scores_of(bench, log, retriever, cases, told, items, "less an event")
    return {
        "targets": len(given.cases),
        "reasons": given.reasons,
        "citing an event": given.citing,
        "no other event near": given.alone,
        "pairs": len(given.cited),
        "readings": {
            reading: judged(given, given.scores[reading], after[reading], row, MARK if reading in MARKED else None)
            for reading in READINGS
        },
    }


def judged(
    given: Given,
    before: Sequence[np.ndarray],
    after: np.ndarray,
    row: Mapping[tuple[int, int], int],
    mark: float | None,
) -> dict[str, Figure]:
    """One reading: the share of pairs in which the score is lower without the cited event, and how far scores fall.

    Args:
        before: float (K,) per case.
        after: float (R, K), each row of a case without an event.
        row: (case, event) -> its row of `after`.
    """
    of_item = [int(np.flatnonzero(given.items[of.case] == of.item)[0]) for of in given.cited]
    pairs = list(zip(given.cited, of_item, strict=True))
    whole = np.array([before[of.case][at] for of, at in pairs])
    cited = np.array([after[row[of.case, of.event], at] for of, at in pairs])
    other = np.array([after[row[of.case, of.other], at] for of, at in pairs])
    users, by_facts = np.array([of.case for of in given.cited]), np.array([of.by_facts for of in given.cited], bool)
    lower = lower_than(cited, other)
    return {
        "share": figure(lower, users.tolist(), mark),
        "share, reason names facts": figure(lower[by_facts], users[by_facts].tolist()),
        "share, reason names none": figure(lower[~by_facts], users[~by_facts].tolist()),
        "fall without the cited event": figure(whole - cited, users.tolist()),
        "fall without another event": figure(whole - other, users.tolist()),
    }


def lower_than(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """float64 (N,): 1 where `one` is lower than `other`, ties one half."""
    share: np.ndarray = (one < other) + 0.5 * (one == other)
    return share


def shown_with_reasons(bench: Bench, log: Log, retriever: Retriever, pairs: int) -> Given:
    """Lists of test users in a seeded order, with reasons for their first items, until there are `pairs` citations."""
    test, generator, given = log.pipeline.chosen.test, np.random.default_rng(SEED), Given()
    for rows in batches(generator.permutation(len(test)), LISTS):
        cases = log.cases(test.take(np.asarray(rows)))
        told = states(bench, log, cases, "", by_rule(log))
        items, _ = retriever.candidates(queries_of(cases), log.pipeline.config.retrieval.candidates)
        scores = scores_of(bench, log, retriever, cases, told, items, "lists")
        for at, (case, state) in enumerate(zip(cases, told, strict=True)):
            first = items[at][np.argsort(-scores["fused"][at], kind="stable")[:SHOWN]]
            for item, reason in zip(first.tolist(), reasons_of(bench, log, retriever, case, state, first), strict=True):
                cited = [log.catalogue.place[event] for event in reason["events"]]
                given.reasons, given.citing = given.reasons + 1, given.citing + bool(cited)
                for event in cited:
                    other = near(case.seen, event, cited, generator)
                    if other is None:
                        given.alone += 1
                    else:
                        given.cited.append(Cited(len(given.cases), item, event, other, bool(reason["facts"])))
            given.cases.append(case)
            given.items.append(items[at])
            for reading in READINGS:
                given.scores[reading].append(scores[reading][at])
        if len(given.cited) >= pairs:
            break
    given.cited = given.cited[:pairs]
    return given


def near(seen: np.ndarray, event: int, cited: Collection[int], generator: np.random.Generator) -> int | None:
    """A random item that was chosen at most `NEAR` events from the newest choice of item `event` and is not cited; None
    if there is none."""
    at = int(np.flatnonzero(seen == event)[-1])
    others = [item for item in seen[max(0, at - NEAR) : at + NEAR + 1].tolist() if item not in cited]
    return int(generator.choice(others)) if others else None


def without(case: Case, item: int) -> Case:
    """The case as if the user had never chosen `item` before."""
    history, kept = case.history, np.flatnonzero(case.seen != item)
    time = None if history.time is None else history.time[kept]
    left = History(history.user_id, history.items[kept], time, history.disliked[kept])
    return replace(case, history=left, end=len(kept))


def scores_of(
    bench: Bench,
    log: Log,
    retriever: Retriever,
    cases: Sequence[Case],
    told: Sequence[UserState],
    items: np.ndarray,
    label: str,
) -> dict[str, np.ndarray]:
    """(B, K) per reading of the lists `items`, as the cases' histories are; odds and likelihood as the model gives
    them: standardised within the list they would not tell where all fall."""
    scores = np.take_along_axis(retriever.scores(queries_of(cases)), items, axis=1)
    read = read_lists(bench, log, told, items, scores, label)
    return {"odds": read.odds, "likelihood": read.loglik, "fused": systems(bench, log, read)["fused"]}


def reasons_of(
    bench: Bench, log: Log, retriever: Retriever, case: Case, state: UserState, items: np.ndarray
) -> list[dict[str, Any]]:
    """facts and events (ids) of the reasons for `items` (n,), as the service gives them."""
    low = case.history.disliked[: case.end]
    liked, disliked = case.seen[~low], case.seen[low]
    falls = retriever.falls(queries_of([case]), items.tolist())[:, ~low]
    nearest = [
        retriever.nearest_events(liked, item, shared_information(log.catalogue, item, liked), falling)
        for item, falling in zip(items.tolist(), falls, strict=True)
    ]
    asked = told_of(ranking_request(state, log.catalogue, items))
    found: list[dict[str, Any]] = bench.kept(
        "recommender-reasons",
        __file__,
        [log.mllm.identity, prompts.VERSION, CHECK, *asked, liked.tolist(), disliked.tolist(), nearest, falls.tolist()],
        lambda: [
            {"facts": reason.facts, "events": reason.events}
            for reason in explain(
                log.mllm, log.catalogue, state, liked, items.tolist(), *zip(*nearest, strict=True), disliked, falls
            )
        ],
    )
    return found


def show_faithful(result: dict[str, Any]) -> None:
    """One table per set."""
    for name, of in result.items():
        title = (
            f"faithful, {name}: {of['targets']} test users, {of['reasons']} reasons, {of['citing an event']} cite an "
            f"event; {of['pairs']} citations, {of['no other event near']} more without another event within {NEAR}; "
            "summaries by rule"
        )
        columns = list(of["readings"]["odds"])
        rows = [(column, *(shown(of["readings"][reading][column]) for reading in READINGS)) for column in columns]
        show(title, ("lower without the cited event", *READINGS), rows)
