"""Section `change`: what a state says of simulated users, against the truth that the sample shop was made from."""

import json
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from common import SAMPLES, SEED, Bench, Figure, at_most, derangement, figure, show, shown
from users_common import SAMPLE, Log, liked_facts, moved_names, newest_window, opened, shop
from users_readings import written

from mllm_srec import tastes
from mllm_srec.data.readers import read
from mllm_srec.facts import canonical
from mllm_srec.mllm.local import LocalMllm
from mllm_srec.user_states import NAMED, History, UserState, Window, build_state, movement_of, read_window
from mllm_srec.users import Summary
from mllm_srec.windows import window_bounds

WINDOWS = 100
"""Windows whose summaries are compared with the truth."""
SAYS_MARK, CLAIMS_MARK = 0.85, 0.1
ORIGINS = ("picture", "text", "both")

Taste = Mapping[str, Any]
"""As truth.json gives it: kinds, colour, pattern, material_group, collection."""


@dataclass(frozen=True)
class Person:
    """A simulated user: the log's history, and the truth."""

    history: History
    weighs: str
    taste: Taste
    change: Mapping[str, Any] | None

    @property
    def length(self) -> int:
        """Events."""
        return len(self.history.items)


@dataclass(frozen=True)
class Said:
    """What a state names: its parts by name, and the summary of the newest window in the model's words."""

    stays: tuple[str, ...] = ()
    rises: tuple[str, ...] = ()
    fades: tuple[str, ...] = ()
    lately: tuple[str, ...] = ()
    summary: str = ""


def change(bench: Bench, sets: Sequence[str]) -> dict[str, Any]:
    """Everything that the truth can judge; nothing if the sample shop is not among the sets."""
    if SAMPLE not in sets:
        return {}
    log = opened(bench, SAMPLE)
    truth = json.loads((shop(bench) / "truth.json").read_text(encoding="utf-8"))
    people = people_of(bench, log, truth)
    changed = bench.first([person for person in people if person.change])
    unchanged = bench.first([person for person in people if not person.change])
    return {
        "changed": said_of_change(bench, log, changed),
        "unchanged": said_of_unchanged(log, unchanged, truth["material_groups"]),
        "cross-modal": cross_modal(log, changed + unchanged),
        "summaries": quality(bench, log, unchanged, truth["material_groups"]),
    }


def people_of(bench: Bench, log: Log, truth: Mapping[str, Any]) -> list[Person]:
    """All users with their truth.

    Raises:
        ValueError: the workspace was not made from this shop.
    """
    own = read(shop(bench)).with_repeats(log.pipeline.dataset.repeats).histories()
    same = own.users == log.histories.users and own.items == log.histories.items
    if not same or not np.array_equal(own.item, log.histories.item):
        raise ValueError(f"{bench.work / SAMPLE} was not made from {shop(bench)}: move both away, or bring the other")
    rows = [truth["users"][user] for user in log.histories.users]
    return [Person(log.history(at), row["weighs"], row["taste"], row["change"]) for at, row in enumerate(rows)]


# Truth in the words of the catalogue


def true_to(taste: Taste) -> set[str]:
    """The facts of a taste that a change of taste changes."""
    return {taste["colour"], taste["pattern"], taste["collection"], *map(plain, taste["kinds"])}


def leading(taste: Taste, weighs: str) -> set[str]:
    """The facts that the user weighs most."""
    return {ORIGINS[0]: {taste["colour"]}, ORIGINS[1]: {taste["collection"]}}.get(
        weighs, {taste["colour"], taste["collection"]}
    )


def plain(name: str) -> str:
    """A name as truth and catalogue can be compared: "shoes" and "shoe" are a "pair of shoes"."""
    return canonical("kind", name).lower()


def named_in(text: str, facts: Iterable[str]) -> set[str]:
    """The facts that stand in a text as words of it."""
    return {fact for fact in facts if re.search(rf"\b{re.escape(fact)}(?:e?s)?\b", text, re.IGNORECASE)}


def meets(said: Said, wanted: Collection[str], facts: Iterable[str]) -> bool:
    """Whether the preference names one of the facts `wanted`; `facts` are all that the user's items have."""
    names = {*said.stays, *said.rises, *said.lately, *named_in(said.summary, facts)}
    return any(plain(name) in wanted for name in names)


def said_by(state: UserState, history: History, log: Log, summary: str = "") -> Said:
    """What a state names."""
    names = moved_names(state, history, log.catalogue)
    return Said(**{part: tuple(of) for part, of in names.items()}, summary=summary)


# Changed and unchanged tastes


def said_of_change(bench: Bench, log: Log, people: Sequence[Person]) -> dict[str, Any]:
    """Of the users whose taste changed: what their state says one window after it, and at their end."""
    config = log.config
    ends = [min(person.change["position"] + config.window, person.length) for person in people if person.change]
    windows = [newest_window(log, person.history, end) for person, end in zip(people, ends, strict=True)]
    summaries = written(bench, log.mllm, windows, config, "sample change")
    said, facts, fading = [], [], []
    for person, end, summary in zip(people, ends, summaries, strict=True):
        state = build_state(person.history, end, summary.text, log.catalogue, config)
        said.append(said_by(state, person.history, log, summary.text))
        facts.append(set().union(*liked_facts(person.history, 0, end, log.catalogue)))
        fading.append(fades(log, person))
    new = [person.change["taste"] for person in people if person.change]
    others = [new[at] for at in derangement(len(new), SEED)]
    triples = list(zip(said, facts, new, strict=True))
    found = {
        "names a fact of the new taste": figure([meets(s, true_to(t), f) for s, f, t in triples], mark=SAYS_MARK),
        "names the leading fact": figure(
            [
                meets(of, leading(taste, person.weighs), known)
                for (of, known, taste), person in zip(triples, people, strict=True)
            ]
        ),
        "names one of another user's new taste": figure(
            [meets(of, true_to(other), known) for of, known, other in zip(said, facts, others, strict=True)]
        ),
    }
    for name, parts in {
        "by counts alone: stays, rises or lately": ("stays", "rises", "lately"),
        "as what stays or rises, or in the summary": ("stays", "rises", "summary"),
        "rises only": ("rises",),
        "summary only": ("summary",),
    }.items():
        only = [Said(**{part: getattr(s, part) for part in parts}) for s in said]
        found[name] = figure([meets(s, true_to(t), f) for s, (_, f, t) in zip(only, triples, strict=True)])
    found["old taste fades, at the end"] = figure([of[-1] for of in fading])
    found["old taste fades, at some event by the end"] = figure([any(of) for of in fading])
    found["summary written by the model"] = figure([summary.by == "model" for summary in summaries])
    return found


def fades(log: Log, person: Person) -> list[bool]:
    """After each event from the change on: whether a fact of the old taste is said to fade."""
    assert person.change is not None
    old, said = true_to(person.taste), []
    for end in range(person.change["position"] + 1, person.length + 1):
        moved = movement_of(person.history, end, log.catalogue, log.config).fades
        names = tastes.distinct(moved, liked_facts(person.history, 0, end, log.catalogue), NAMED)
        said.append(any(plain(name) in old for name in names))
    return said


def said_of_unchanged(log: Log, people: Sequence[Person], groups: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    """Of the users whose taste did not change: changes that are claimed, and how true the names are."""
    generator = np.random.default_rng(SEED)
    least = log.config.window + 1  # before, there is no past to change from
    anywhere = [int(generator.integers(min(least, person.length), person.length + 1)) for person in people]
    at_end, somewhere = [], []
    right: dict[str, list[tuple[bool, int]]] = {"stays": [], "lately": [], "stays or lately": []}
    for number, (person, end) in enumerate(zip(people, anywhere, strict=True)):
        state = build_state(person.history, person.length, "", log.catalogue, log.config)
        at_end.append(claims(state.movement.rises, state.movement.fades))
        moved = movement_of(person.history, end, log.catalogue, log.config)
        somewhere.append(claims(moved.rises, moved.fades))
        true, said = whole_truth(person.taste, groups), said_by(state, person.history, log)
        for part in ("stays", "lately"):
            judged = [(plain(name) in true, number) for name in getattr(said, part)]
            right[part] += judged
            right["stays or lately"] += judged
    return {
        "claims a change, at the end": at_most(figure(at_end), CLAIMS_MARK),
        "claims a change, at a random event": figure(somewhere),
        **{f"true names, {part}": precision(judged) for part, judged in right.items()},
    }


def claims(rises: Collection[str], fades: Collection[str]) -> bool:
    """Whether a change is claimed."""
    return bool(rises or fades)


def whole_truth(taste: Taste, groups: Mapping[str, Sequence[str]]) -> set[str]:
    """All facts that a taste is for; a category is none, though it may follow from a kind."""
    return true_to(taste) | set(groups[taste["material_group"]])


def precision(judged: Sequence[tuple[bool, int]]) -> Figure:
    """The share of (true, user) pairs that are true, by users."""
    return figure([float(true) for true, _ in judged], [user for _, user in judged])


# Cross-modal preference


def cross_modal(log: Log, people: Sequence[Person]) -> dict[str, Any]:
    """Shares of choices explained by picture, text and both, against what the user weighs."""
    shares = [build_state(person.history, person.length, "", log.catalogue, log.config).by_origin for person in people]
    of_group = {
        weighs: np.array([of for of, person in zip(shares, people, strict=True) if person.weighs == weighs])
        for weighs in ORIGINS
    }
    lean = {weighs: of[:, 0] - of[:, 1] for weighs, of in of_group.items() if len(of)}
    return {
        "shares": {
            weighs: {origin: figure(of[:, at]) for at, origin in enumerate(ORIGINS)}
            for weighs, of in of_group.items()
            if len(of)
        },
        "auc": separation(lean.get(ORIGINS[0], np.zeros(0)), lean.get(ORIGINS[1], np.zeros(0))),
    }


def separation(high: np.ndarray, low: np.ndarray) -> Figure:
    """AUC: how often one of `high` (N,) is above one of `low` (M,), ties one half; both resampled for the interval."""
    if not len(high) or not len(low):
        return figure([])
    wins = (high[:, None] > low) + 0.5 * (high[:, None] == low)
    generator = np.random.default_rng(SEED)
    means = [
        wins[generator.integers(len(high), size=len(high))][:, generator.integers(len(low), size=len(low))].mean()
        for _ in range(SAMPLES)
    ]
    least, most = np.percentile(means, (2.5, 97.5))
    return {"value": float(wins.mean()), "low": float(least), "high": float(most), "n": len(high) + len(low)}


# Summaries


def quality(
    bench: Bench, log: Log, people: Sequence[Person], groups: Mapping[str, Sequence[str]]
) -> dict[str, dict[str, Any]]:
    """The same windows of unchanged users summarised by the model, by the untrained one and by rule."""
    places = [
        (number, start, stop)
        for number, person in enumerate(people)
        for start, stop in window_bounds(person.length, person.history.time, log.config)
    ]
    chosen = np.sort(np.random.default_rng(SEED).permutation(len(places))[: min(WINDOWS, bench.limit or WINDOWS)])
    places = [places[at] for at in chosen]
    windows = [read_window(people[n].history, start, stop, log.catalogue) for n, start, stop in places]
    facts = [set().union(*liked_facts(people[n].history, a, b, log.catalogue)) for n, a, b in places]
    true = [whole_truth(people[n].taste, groups) for n, _, _ in places]
    composed = log.config.model_copy(update={"summary": "compose"})
    writers: dict[str, tuple[LocalMllm, Any]] = {
        "trained": (bench.trained, log.config),
        "untrained": (bench.untrained, log.config),
        "rule": (bench.trained, composed),
    }
    users = [number for number, _, _ in places]
    return {
        name: judged(windows, written(bench, mllm, windows, config, f"sample quality {name}"), facts, true, users)
        for name, (mllm, config) in writers.items()
    }


def judged(
    windows: Sequence[Window],
    summaries: Sequence[Summary],
    facts: Sequence[set[str]],
    true: Sequence[set[str]],
    users: Sequence[int],
) -> dict[str, Any]:
    """How true and how complete the summaries are.

    Args:
        facts: per window all facts of its items: names are these, where they stand in the summary.
        true: per window the facts of its user's taste.
    """
    names, shown_tastes = [], []
    for window, summary, known, wanted, user in zip(windows, summaries, facts, true, users, strict=True):
        named = {plain(name) for name in named_in(summary.text, known)}
        names += [(name in wanted, user) for name in sorted(named)]
        told = {plain(name) for name in window.tastes} & wanted
        shown_tastes += [(name in named, user) for name in sorted(told)]
    return {
        "names that are true": precision(names),
        "true tastes of the prompt that are named": precision(shown_tastes),
        "written by the model": figure([float(summary.by == "model") for summary in summaries], list(users)),
        "examples": [{"tastes": w.tastes, "summary": s.text} for w, s in zip(windows[:5], summaries[:5], strict=True)],
    }


def show_change(result: dict[str, Any]) -> None:
    """One table per part."""
    if not result:
        print("change: no sample shop among the sets\n")
        return
    for part, words in (("changed", "one window after the change"), ("unchanged", "taste without change")):
        rows = [(name, shown(of), of["n"]) for name, of in result[part].items()]
        show(f"change: {part} users, {words}", ("share", "value", "cases"), rows)
    crossed = result["cross-modal"]
    rows = [(weighs, *(shown(of[origin]) for origin in ORIGINS)) for weighs, of in crossed["shares"].items()]
    show("change: choices explained by", ("user weighs", *ORIGINS), rows)
    print(f"AUC of by_picture - by_text, picture- against text-weighing users: {shown(crossed['auc'])}\n")
    columns = ("names that are true", "true tastes of the prompt that are named", "written by the model")
    rows = [(name, *(shown(of[column]) for column in columns)) for name, of in result["summaries"].items()]
    show("change: summaries of windows", ("writer", *columns), rows)
