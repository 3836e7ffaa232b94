"""Section `likelihood`: how likely the next item's text is, told who the user is in one way or another.

Every condition is asked at the target's own time, also where it tells of another user.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from common import SEED, Bench, above_zero, derangement, difference, figure, not_below_zero, show, shown
from users_common import (
    SAMPLE,
    Case,
    Log,
    newest_within,
    opened,
    sample,
    states_of,
    with_recent,
    without_words,
)
from users_readings import logliks

from mllm_srec.user_states import NOBODY, History, UserState

ALL = 1 << 30
RECENT = (0, 1, 3, 5, 10)
"""What validation chooses from; the whole history is a control: its prompts are ten times as long."""
CHOOSING, TARGETS, CONTROLS, LONG = 150, 300, 100, 50
"""Targets of validation, of the main conditions, of all others (a seeded part of these), and of the whole history."""
KEPT = 50
"""Requests kept together."""
STRANGERS = 8
"""Other users that every user of the shop is compared with: its texts come from a few templates, and whether a choice
that is shown happens to be of the target's template is most of what one comparison tells."""

OWN, RAW, OTHER = "own state + n", "raw, tokens of own state + n", "another's state + n"
STATE, RAW_STATE, OTHER_STATE = "own state only", "raw, tokens of own state only", "another's state only"
WHOLE = "raw, all"
CHOICES = "own choices in full + n, no words"
MAIN = (OWN, RAW, OTHER, STATE, RAW_STATE, OTHER_STATE)
PAIRS = (
    (OWN, OTHER, above_zero),
    (OWN, RAW, not_below_zero),
    (OWN, "another's state, own last n", None),
    (OWN, CHOICES, None),
    (OWN, "own words + n", None),
    (OWN, STATE, None),
    (OWN, "raw, last n", None),
    (OWN, WHOLE, None),
    (OWN, "windows shuffled, own last n", None),
    (OWN, "summaries by rule", None),
    (OWN, "nobody", None),
    (STATE, OTHER_STATE, None),
    (STATE, RAW_STATE, None),
    (STATE, "profile alone", None),
    (STATE, "preference alone", None),
    (STATE, "nobody", None),
)
"""(one, other, mark of one - other)."""


def likelihood(bench: Bench, sets: Sequence[str]) -> dict[str, Any]:
    """Per set: n by validation, then every condition on the same test targets."""
    return {name: measure(bench, opened(bench, name)) for name in sets}


def choose_recent(bench: Bench, log: Log) -> dict[str, Any]:
    """users.recent by the likelihood of seeded validation targets."""
    cases = log.cases(sample(bench, log.split.validation, CHOOSING))
    states = states_of(bench, log, cases, f"{log.name} validation")
    found = {}
    for recent in RECENT:
        told = [with_recent(log, state, case, recent) for state, case in zip(states, cases, strict=True)]
        found[recent] = read(bench, log, told, cases, f"{log.name} validation, n {in_words(recent)}")
    return {
        "targets": len(cases),
        "loglik": {in_words(recent): figure(values) for recent, values in found.items()},
        "chosen": best({recent: float(values.mean()) for recent, values in found.items()}),
    }


def best(means: Mapping[int, float]) -> int:
    """The n of the highest mean; ties go to the smaller n."""
    return max(means, key=lambda recent: (means[recent], -recent))


def in_words(recent: int) -> str:
    """The number of newest items."""
    return "all" if recent == ALL else str(recent)


def read(bench: Bench, log: Log, states: Sequence[UserState], cases: Sequence[Case], label: str) -> np.ndarray:
    """float64 (T,): mean log-likelihood per token of every target's text."""
    requests = [log.request(state, [case.target]) for state, case in zip(states, cases, strict=True)]
    return np.array([values[0] for values in logliks(bench, log.mllm, requests, label, KEPT)])


def measure(bench: Bench, log: Log) -> dict[str, Any]:
    """Means and prompt tokens of all conditions, and their paired differences."""
    chosen = choose_recent(bench, log)
    cases = log.cases(sample(bench, log.split.test, TARGETS))
    users = np.array([case.user for case in cases])
    part = np.sort(np.random.default_rng(SEED + 1).permutation(len(cases))[:CONTROLS])
    values, result = {}, {}
    for name, states in conditions(bench, log, cases, chosen["chosen"]).items():
        rows = np.arange(len(cases)) if name in MAIN else part[:LONG] if name == WHOLE else part
        told, asked = [states[row] for row in rows], [cases[row] for row in rows]
        values[name] = np.full(len(cases), np.nan)
        values[name][rows] = read(bench, log, told, asked, f"{log.name} {name}")
        tokens = float(np.mean([log.tokens(state) for state in told]))
        result[name] = {"loglik": figure(values[name][rows]), "tokens": tokens}
    differences = {}
    for one, other, mark in PAIRS:
        known = ~np.isnan(values[one]) & ~np.isnan(values[other])
        found = difference(values[one][known], values[other][known], users[known])
        differences[f"({one}) - ({other})"] = mark(found) if mark else found
    return {
        "targets": len(cases),
        "recent": in_words(chosen["chosen"]),
        "validation": chosen,
        "shuffled": int(sum(case.end > log.config.step for case in cases)),
        "conditions": result,
        "differences": differences,
        "strangers": strangers(bench, log, chosen["chosen"]) if log.name == SAMPLE else None,
    }


def strangers(bench: Bench, log: Log, recent: int) -> dict[str, Any]:
    """All test targets under the own state + n, minus their mean under the same of `STRANGERS` other users each.

    A user's prompt is read once, with the own target and those of others behind it; so another's prompt tells the wait
    of its own target.
    """
    cases = log.cases(sample(bench, log.split.test, len(log.split.test)))
    states = states_of(bench, log, cases, f"{log.name} all")
    own = [with_recent(log, state, case, recent) for state, case in zip(states, cases, strict=True)]
    moved = derangement(len(cases), SEED)
    asked = [[at] for at in range(len(cases))]
    for at, case in enumerate(cases):
        other = at
        for _ in range(min(STRANGERS, len(cases) - 1)):
            other = stranger(own, moved, other, case.target)
            if other == at:  # round the whole cycle
                break
            asked[other].append(at)
    requests = [
        log.request(state, [cases[at].target for at in wanted]) for state, wanted in zip(own, asked, strict=True)
    ]
    found = logliks(bench, log.mllm, requests, f"{log.name} own and others' states", KEPT)
    of_others: list[list[float]] = [[] for _ in cases]
    for wanted, values in zip(asked, found, strict=True):
        for at, value in zip(wanted[1:], values[1:], strict=True):
            of_others[at].append(float(value))
    compared = [at for at, values in enumerate(of_others) if values]
    mine = np.array([found[at][0] for at in compared])
    users = np.array([cases[at].user for at in compared])
    apart = difference(mine, np.array([np.mean(of_others[at]) for at in compared]), users)
    return {"targets": len(compared), "others": STRANGERS, "own - others": above_zero(apart)}


def conditions(bench: Bench, log: Log, cases: Sequence[Case], recent: int) -> dict[str, list[UserState]]:
    """Condition -> what is told of the user of every target."""
    states = states_of(bench, log, cases, f"{log.name} test")
    own = [with_recent(log, state, case, recent) for state, case in zip(states, cases, strict=True)]
    only = [replace(state, recent=()) for state in own]
    raw = [without_words(state) for state in own]
    moved = derangement(len(cases), SEED)
    other = [
        replace(own[stranger(own, moved, at, case.target)], waited=own[at].waited) for at, case in enumerate(cases)
    ]
    composed = log.config.model_copy(update={"summary": "compose"})
    by_rule = states_of(bench, log, cases, f"{log.name} by rule", composed)
    turned = [replace(case, history=shuffled(case.history, case.end, log.config.step, case.user)) for case in cases]
    out_of_order = states_of(bench, log, turned, f"{log.name} shuffled")

    def last_of(states: Sequence[UserState]) -> list[UserState]:
        """These states with every target's own last n."""
        return [replace(state, recent=mine.recent) for state, mine in zip(states, own, strict=True)]

    def as_long_as(states: Sequence[UserState]) -> list[UserState]:
        """Raw history of as many tokens."""
        triples = zip(raw, cases, states, strict=True)
        return [newest_within(bare, case.seen, log.tokens, log.tokens(told)) for bare, case, told in triples]

    return {
        OWN: own,
        OTHER: other,
        "another's state, own last n": last_of(other),
        CHOICES: [replace(state, profile="", preference="") for state in own],
        "own words + n": [replace(state, typical=None, newest=None) for state in own],
        RAW: as_long_as(own),
        "raw, last n": raw,
        WHOLE: [with_recent(log, bare, case, ALL) for bare, case in zip(raw, cases, strict=True)],
        "windows shuffled, own last n": last_of(out_of_order),
        "summaries by rule": last_of(by_rule),
        STATE: only,
        OTHER_STATE: [replace(state, recent=()) for state in other],
        RAW_STATE: as_long_as(only),
        "profile alone": [replace(state, preference="", newest=None) for state in only],
        "preference alone": [replace(state, profile="", typical=None) for state in only],
        "nobody": [NOBODY] * len(cases),
    }


def stranger(states: Sequence[UserState], moved: np.ndarray, at: int, target: int) -> int:
    """The next of the other users, in the cycle `moved`, who is shown no choice of item `target`.

    The target's own user never is, since repeats are dropped; copying it would be an answer, not a taste.
    """
    other = int(moved[at])
    while other != at and target in (*states[other].recent, states[other].typical, states[other].newest):
        other = int(moved[other])
    return other


def shuffled(history: History, end: int, step: int, seed: int) -> History:
    """Events [0, end) with their runs of `step` in another order, none in its old place; the times stay where they are.

    A history of one run stays as it is.
    """
    runs = [np.arange(start, min(start + step, end)) for start in range(0, end, step)]
    order = np.concatenate([runs[at] for at in derangement(len(runs), seed)]) if len(runs) > 1 else np.arange(end)
    time = None if history.time is None else history.time[:end]
    return History(history.user_id, history.items[order], time, history.disliked[order])


def show_likelihood(result: dict[str, Any]) -> None:
    """Per set: the choice of n, all conditions, all differences."""
    for name, of in result.items():
        chosen = of["validation"]
        rows = [(recent, shown(found)) for recent, found in chosen["loglik"].items()]
        title = f"likelihood, {name}: n by {chosen['targets']} validation targets, chosen {of['recent']}"
        show(title, ("n", "log-likelihood per token"), rows)
        rows = [(label, shown(c["loglik"]), f"{c['tokens']:.0f}") for label, c in of["conditions"].items()]
        title = f"likelihood, {name}: {of['targets']} test targets, {of['shuffled']} of them with runs to shuffle"
        show(title, ("told", "log-likelihood per token", "prompt tokens"), rows)
        rows = [(label, shown(found, 4)) for label, found in of["differences"].items()]
        if apart := of["strangers"]:
            label = f"(own state + n) - (those of {apart['others']} others), {apart['targets']} targets"
            rows.append((label, shown(apart["own - others"], 4)))
        show(f"likelihood, {name}: paired differences", ("difference", "nats per token"), rows)
