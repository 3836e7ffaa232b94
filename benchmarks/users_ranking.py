"""Section `ranking`: retrieval's candidates in the order of their likelihood, told the user's state or raw history.

NDCG@10 counts all test targets: one that is not among its candidates cannot be moved.
"""

from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

import numpy as np
from common import SEED, Bench, batches, difference, figure, not_below_zero, show, shown
from users_common import REAL, Case, Log, newest_within, opened, states_of, with_recent, without_words
from users_likelihood import choose_recent, in_words
from users_readings import logliks

from mllm_srec import metrics, ranking
from mllm_srec.evaluation import protocol
from mllm_srec.ranking import Candidates, Fusion
from mllm_srec.retrieval import Retriever, choose, sequence
from mllm_srec.user_states import NOBODY, UserState

LISTS, KEPT, PRIORS = 120, 16, 64
"""Lists read at most; lists kept together; items of the empty user read together."""
CUTOFF = 10
STATE, RAW, ONLY = "own state + n", "raw, tokens of own state + n", "own state only"
READINGS = {
    "likelihood": Fusion(0, 0, 1, False),
    "likelihood - nobody's": Fusion(0, 0, 1, True),
    "retrieval + likelihood": Fusion(1, 0, 1, False),
    "retrieval + likelihood - nobody's": Fusion(1, 0, 1, True),
}


def rank(bench: Bench, sets: Sequence[str]) -> dict[str, Any]:
    """Per real set: retrieval, and its lists reranked."""
    return {name: measure(bench, opened(bench, name)) for name in sets if name in REAL}


def measure(bench: Bench, log: Log) -> dict[str, Any]:
    """NDCG@10 per telling and reading, and paired differences."""
    histories, config, likeness = log.histories, log.pipeline.config.retrieval, log.pipeline.likeness
    mix = choose(histories, log.split.seen_validation, log.split.validation, likeness, config, SEED).mix
    seen, vectors = log.split.seen_test, likeness.vectors
    encoder = sequence.fit(histories, seen, vectors, mix.epochs, SEED) if mix.epochs else None
    retriever = Retriever.fit(histories, seen, likeness, mix, encoder)
    listed, scores = retriever.candidates(protocol.histories_of(histories, log.split.test), config.candidates)
    among = (listed == protocol.target_items(histories, log.split.test)[:, None]).any(1)
    rows = until_held(among, min(LISTS, bench.limit or LISTS))
    targets, listed, scores, held = log.split.test.take(rows), listed[rows], scores[rows], among[rows]
    wanted = protocol.target_items(histories, targets)
    retrieved = protocol.place_targets(histories, targets, retriever.scores)

    cases = log.cases(targets.take(np.flatnonzero(held)))
    chosen = choose_recent(bench, log)
    tellings = told(bench, log, cases, chosen["chosen"])
    priors = nobody(bench, log, np.unique(listed[held]))
    systems = {"retrieval": ndcg(retrieved)}
    for telling, states in tellings.items():
        requests = [log.request(state, of) for state, of in zip(states, listed[held], strict=True)]
        found = logliks(bench, log.mllm, requests, f"{log.name} lists, {telling}", KEPT)
        loglik = np.array(found, dtype=np.float32).reshape(-1, config.candidates)
        read = Candidates(listed[held], scores[held], np.zeros_like(loglik), loglik)
        for reading, fusion in READINGS.items():
            fused = np.zeros(listed.shape)
            fused[held] = ranking.fuse(read, priors, fusion)
            systems[f"{telling}: {reading}"] = ndcg(protocol.place_reranked(retrieved, listed, fused, wanted))
    return {
        "targets": len(targets),
        "lists": int(held.sum()),
        "candidates": config.candidates,
        "retrieval": asdict(mix),
        "recent": in_words(chosen["chosen"]),
        **compared(systems, targets.user),
    }


def until_held(among: np.ndarray, count: int) -> np.ndarray:
    """Rows of a seeded order of all targets up to that of the `count`th target that is among its candidates, sorted.

    So the share of such targets stays what it is among all.
    """
    order = np.random.default_rng(SEED).permutation(len(among))
    reached = np.flatnonzero(np.cumsum(among[order]) >= count)
    return np.sort(order[: reached[0] + 1] if len(reached) else order)


def told(bench: Bench, log: Log, cases: Sequence[Case], recent: int) -> dict[str, list[UserState]]:
    """What the model is told of every list's user."""
    states = states_of(bench, log, cases, f"{log.name} lists")
    own = [with_recent(log, state, case, recent) for state, case in zip(states, cases, strict=True)]
    raw = [
        newest_within(without_words(state), case.seen, log.tokens, log.tokens(state))
        for state, case in zip(own, cases, strict=True)
    ]
    return {STATE: own, RAW: raw, ONLY: [replace(state, recent=()) for state in own]}


def nobody(bench: Bench, log: Log, items: np.ndarray) -> np.ndarray:
    """float32 (I, 2) as `ranking.item_priors` gives them, of the likelihood alone."""
    requests = [log.request(NOBODY, batch) for batch in batches(items, PRIORS)]
    priors = np.zeros((len(log.catalogue.ids), 2), dtype=np.float32)
    priors[items, 1] = np.concatenate(logliks(bench, log.mllm, requests, f"{log.name} items, nobody", KEPT))
    return priors


def ndcg(places: protocol.Places) -> np.ndarray:
    """float64 (T,)."""
    return metrics.ndcg(places.greater, places.ties, CUTOFF)


def compared(systems: dict[str, np.ndarray], users: np.ndarray) -> dict[str, Any]:
    """Every system's mean; per reading the state against raw history and against the state alone, and all against
    retrieval."""
    differences = {}
    for reading in READINGS:
        state = systems[f"{STATE}: {reading}"]
        for other, mark in ((RAW, True), (ONLY, False)):
            found = difference(state, systems[f"{other}: {reading}"], users)
            differences[f"{reading}: ({STATE}) - ({other})"] = not_below_zero(found) if mark else found
    for name, values in systems.items():
        if name != "retrieval":
            differences[f"({name}) - retrieval"] = difference(values, systems["retrieval"], users)
    return {"systems": {name: figure(of, users.tolist()) for name, of in systems.items()}, "differences": differences}


def show_rank(result: dict[str, Any]) -> None:
    """Per set two tables."""
    for name, of in result.items():
        title = (
            f"ranking, {name}: {of['targets']} test targets, {of['lists']} among their {of['candidates']} candidates, "
            f"retrieval {', '.join(f'{what} {value:g}' for what, value in of['retrieval'].items())}, n {of['recent']}"
        )
        show(title, ("order", f"NDCG@{CUTOFF}"), [(label, shown(v, 4)) for label, v in of["systems"].items()])
        rows = [(label, shown(found, 4)) for label, found in of["differences"].items()]
        show(f"ranking, {name}: paired differences", ("difference", f"NDCG@{CUTOFF}"), rows)
