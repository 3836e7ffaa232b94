"""Instruction records: a user's prefix with candidates, in the direct and the chain-of-thought form, and the evidence.

A record may hold nothing newer than its target: `training_record` refuses a state that has seen it.
"""

import math
import re
from collections.abc import Container, Sequence
from dataclasses import dataclass

import numpy as np

from mllm_srec import tastes
from mllm_srec.catalogue import Catalogue
from mllm_srec.errors import MllmSrecError
from mllm_srec.items import first_words
from mllm_srec.mllm.base import Prompt, Question, Request
from mllm_srec.prompts import ranking as prompts
from mllm_srec.prompts import users as user_prompts
from mllm_srec.user_states import UserState

FACTS_SHOWN = 3
EVENTS_SHOWN = 2
MISSES_SHOWN = 2
NEAR = 2
"""Facts in common from which on two items are near each other."""
TITLE_WORDS = 8
LAST_BRACKET = re.compile(r" \([^()]*\)$")
"""The category behind a title, or the year."""
COMMON = 0.5
"""What more of the catalogue's items have than lack tells no two of them apart."""


@dataclass(frozen=True)
class Evidence:
    """What speaks for an item, and what against it."""

    meets: tuple[str, ...]
    """Facts of it that meet the user's tastes."""
    like: tuple[int, ...]
    """History items (catalogue positions) that have most of these facts; without such facts, those that have all of
    `shares`."""
    shares: tuple[str, ...] = ()
    """Where no taste is met: what it has in common with the history item that is closest to it."""
    lacks: tuple[str, ...] = ()
    """The user's sure tastes that neither its facts nor its text meet."""
    clash: tuple[str, ...] = ()
    """Facts of it that fade from the user's choices, or that the user's disliked items share."""


@dataclass(frozen=True)
class TrainingRecord:
    """One packed training row: `request` with the positive first, and rationales for two of its candidates."""

    request: Request
    cot: tuple[tuple[int, str], ...]
    """(index of the candidate, step 3 and the answer)."""
    retrieval: tuple[float, ...] = ()
    """Retrieval's scores of the candidates, in standard deviations of the user's candidate list; none: not told."""


def ranking_request(state: UserState, catalogue: Catalogue, items: Sequence[int] | np.ndarray) -> Request:
    """All candidates of a user in one request, direct form."""
    recent, shown = [catalogue.lines[i] for i in state.recent], catalogue.shown
    since = user_prompts.since(state.waited) if state.waited is not None else ""
    typical, newest = ("" if i is None else catalogue.candidates[i] for i in (state.typical, state.newest))
    newest = newest if shown.preference else ""
    typical = typical if shown.profile and typical != newest else ""
    profile, preference = state.profile if shown.profile else "", state.preference if shown.preference else ""
    told = prompts.prefix(profile, preference, recent, since, typical, newest)
    prefix = Prompt((told,), system=prompts.SYSTEM)
    notes = tuple(facts_note(state, catalogue, int(i)) for i in items) if shown.facts else ()
    candidates = tuple(catalogue.candidate(int(i)) for i in items)
    return Request(prefix, candidates, prompts.QUESTION, notes=notes if any(notes) else ())


def facts_note(state: UserState, catalogue: Catalogue, item: int) -> str:
    """What of an item's facts meets or misses the state, in words and counts; "" where nothing is known of the user."""
    facts, fades = catalogue.facts[item], state.movement.fades
    newest = [] if state.newest is None else catalogue.facts[state.newest].keys()
    shared = [] if state.newest is None else in_common(catalogue, item, state.newest)
    near = sum(len(facts.keys() & catalogue.facts[i].keys()) >= NEAR for i in state.recent)
    shared = shared[:FACTS_SHOWN]
    meets = _surest([fact for fact in state.phrases if fact in facts and fact not in shared], (), catalogue)
    told = [
        [catalogue.name(fact) for fact in names]
        for names in (shared, meets[:FACTS_SHOWN], [fact for fact in facts if fact in fades][:MISSES_SHOWN])
    ]
    count = len(facts.keys() & newest)
    return prompts.note(told[0], count, len(newest), near, len(state.recent), told[1], told[2])


def find_evidence(
    state: UserState,
    catalogue: Catalogue,
    item: int,
    history: np.ndarray,
    disliked: Sequence[int] | np.ndarray = (),
    falls: np.ndarray | None = None,
) -> Evidence:
    """What the facts of `item` say to what is known of the user.

    `history` holds the items that the user did not dislike: nobody wants more of what they rated low. `disliked` are
    the others. Of facts, the surest kind alone is told: tastes beyond doubt, else hints of some, else words of texts.
    Of events that have as many of these facts, that comes first which is closest to the item; with `falls`, float as
    long as the history, that of the greatest closeness times how far the item's score falls without it.
    """
    facts, told = catalogue.facts[item], catalogue.candidates[item].lower()
    moving = state.movement
    strength: dict[str, float] = {}
    for found in (moving.rises, moving.stays, moving.lately, state.stable):
        for fact, value in found.items():
            strength[fact] = max(value, strength.get(fact, -math.inf))
    against = tastes.strengths(tastes.count([catalogue.facts[i] for i in disliked]), catalogue.rates)
    wanted = [fact for fact in state.phrases if strength[fact] >= against.get(fact, -math.inf)]
    sure = [fact for fact in wanted if strength[fact] >= 0 and not mere_word(catalogue, fact)]
    meets = _surest([fact for fact in wanted if fact in facts], sure, catalogue)[:FACTS_SHOWN]
    unwanted = [fact for fact in dict.fromkeys([*moving.fades, *against]) if fact in facts and fact not in wanted]
    clash = _surest(unwanted, unwanted, catalogue)[:MISSES_SHOWN]
    lacks = _distinct([fact for fact in sure if fact not in facts and fact not in told])[:MISSES_SHOWN]

    closeness = shared_information(catalogue, item, history, unwanted)
    moved = closeness if falls is None else closeness * falls.clip(0)
    ordered = [
        (len(set(meets).intersection(catalogue.facts[other])), moved[at], closeness[at], at, int(other))
        for at, other in enumerate(history)
    ]
    near = list(dict.fromkeys(other for *_, other in sorted(ordered, reverse=True) if other != item))
    shares: list[str] = []
    if not meets and near:
        shares = [fact for fact in in_common(catalogue, item, near[0]) if fact not in unwanted][:FACTS_SHOWN]
    like: dict[str, int] = {}
    for other in near:
        if _like(catalogue.facts[other], meets, shares):
            like.setdefault(title(catalogue, other), other)  # one thing in two colours is no second event
    shown = tuple(like.values())[:EVENTS_SHOWN]
    return Evidence(tuple(meets), shown, tuple(shares), tuple(lacks), tuple(clash))


def _like(facts: Container[str], meets: Sequence[str], shares: Sequence[str]) -> bool:
    return any(fact in facts for fact in meets) or (bool(shares) and all(fact in facts for fact in shares))


def in_common(catalogue: Catalogue, one: int, other: int) -> list[str]:
    """What two items share that has a name and tells items apart, rarest first."""
    base = catalogue.rates.base
    both = catalogue.facts[one].keys() & catalogue.facts[other].keys()
    telling = [fact for fact in both if base[fact] < COMMON and not mere_word(catalogue, fact)]
    return _distinct(sorted(telling, key=lambda fact: (base[fact], fact)))


def shared_information(
    catalogue: Catalogue, item: int, events: Sequence[int] | np.ndarray, unwanted: Container[str] = ()
) -> np.ndarray:
    """float64 (N,): what each of `events` has in common with `item`, the information in nats of those facts that are
    not `unwanted`."""
    base = catalogue.rates.base
    shared = ([fact for fact in in_common(catalogue, item, int(e)) if fact not in unwanted] for e in events)
    return np.array([math.fsum(-math.log(base[fact]) for fact in facts) for facts in shared])


def mere_word(catalogue: Catalogue, fact: str) -> bool:
    """Whether a fact is but a word that stands in texts: no category, kind or look."""
    return catalogue.rates.prior[fact] < catalogue.rates.base[fact]


def _surest(facts: Sequence[str], sure: Container[str], catalogue: Catalogue) -> list[str]:
    """The facts that are `sure`; without any, those that have a name and tell items apart; without any, words."""
    named = [fact for fact in facts if not mere_word(catalogue, fact)]
    hints = [fact for fact in named if catalogue.rates.base[fact] < COMMON]
    words = [fact for fact in facts if fact not in named]
    return _distinct([fact for fact in named if fact in sure] or hints or words)


def _distinct(facts: Sequence[str]) -> list[str]:
    """Without what says the same in the same words: no "pair of trousers" beside "trousers"."""
    kept: dict[frozenset[str], str] = {}
    for fact in facts:
        stems = frozenset(word[:5] for word in fact.split())
        if not any(stems < other or other < stems for other in kept):
            kept[stems] = max(kept.get(stems, ""), fact, key=len)  # "underwear" rather than "under-"
    return list(kept.values())


def title(catalogue: Catalogue, item: int) -> str:
    """An item's title, or what stands for it in histories; a long one is cut."""
    line = catalogue.lines[item]
    return first_words(LAST_BRACKET.sub("", line) if catalogue.categories[item] else line, TITLE_WORDS)


def rationale(evidence: Evidence, catalogue: Catalogue, chosen: bool) -> str:
    """Step 3 in words and the answer, from the evidence alone; what a chosen item lacks is not told, nor more than one
    event that another is like: it is a long text as it is."""
    like = [title(catalogue, i) for i in evidence.like[: EVENTS_SHOWN if chosen else 1]]
    meets, shares, lacks, clash = (
        [catalogue.name(fact) for fact in facts]
        for facts in (evidence.meets, evidence.shares, evidence.lacks, evidence.clash)
    )
    told = [prompts.meets(meets, like)] if meets else [prompts.shares(shares, like)] if shares else []
    told += [prompts.lacks(lacks)] if lacks and not chosen else []
    told += [prompts.against(clash)] if clash else []
    return prompts.rationale(told or [prompts.NOTHING_MET], chosen)


def explain_questions(
    state: UserState, catalogue: Catalogue, items: Sequence[int]
) -> tuple[Prompt, tuple[Question, ...]]:
    """The chain-of-thought form: the user's prefix, and the question after each item, in the tokens of training."""
    prefix = ranking_request(state, catalogue, ()).prefix
    return prefix, tuple(Question(prompts.QUESTION_COT, about=catalogue.candidates[item]) for item in items)


def training_record(
    state: UserState,
    catalogue: Catalogue,
    position: int,
    items: Sequence[int],
    rationales: Sequence[str] = (),
    retrieval: tuple[float, ...] = (),
) -> TrainingRecord:
    """The positive (first of `items`) and its negatives, with rationales for the first of them.

    Raises:
        MllmSrecError: the state reaches the target's position: it would know the answer.
    """
    if state.end > position:
        raise MllmSrecError(
            f"user {state.user_id!r}: the state after {state.end} events has seen its target at position {position}"
        )
    return TrainingRecord(ranking_request(state, catalogue, items), tuple(enumerate(rationales)), retrieval)
