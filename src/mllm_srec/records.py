"""Instruction records: a user's prefix with candidates, in the direct and the chain-of-thought form, and the evidence.

A record may hold nothing newer than its target: `training_record` refuses a state that has seen it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mllm_srec.catalogue import Catalogue
from mllm_srec.errors import MllmSrecError
from mllm_srec.mllm.base import Prompt, Question, Request
from mllm_srec.prompts import ranking as prompts
from mllm_srec.prompts import users as user_prompts
from mllm_srec.user_states import UserState

FACTS_SHOWN = 3
EVENTS_SHOWN = 2


@dataclass(frozen=True)
class Evidence:
    """What speaks for an item: facts of it that meet the user's tastes, and history items that share them."""

    meets: tuple[str, ...]
    like: tuple[int, ...]
    """Catalogue positions."""


@dataclass(frozen=True)
class TrainingRecord:
    """One packed training row: `request` with the positive first, and rationales for two of its candidates."""

    request: Request
    cot: tuple[tuple[int, str], ...]
    """(index of the candidate, step 3 and the answer)."""


def ranking_request(state: UserState, catalogue: Catalogue, items: Sequence[int] | np.ndarray) -> Request:
    """All candidates of a user in one request, direct form."""
    recent = [catalogue.lines[i] for i in state.recent]
    since = user_prompts.since(state.waited) if state.waited is not None else ""
    typical, newest = ("" if i is None else catalogue.candidates[i] for i in (state.typical, state.newest))
    told = prompts.prefix(state.profile, state.preference, recent, since, typical if typical != newest else "", newest)
    prefix = Prompt((told,), system=prompts.SYSTEM)
    return Request(prefix, tuple(catalogue.candidates[i] for i in items), prompts.QUESTION)


def find_evidence(state: UserState, catalogue: Catalogue, item: int, history: np.ndarray) -> Evidence:
    """Facts of `item` among the user's tastes, and the newest history items that share most of them.

    `history` holds the items that the user did not dislike: nobody wants more of what they rated low.
    """
    facts = set(catalogue.facts[item])
    meets = [phrase for phrase in state.phrases if phrase in facts][:FACTS_SHOWN]
    shared = [(len(set(catalogue.facts[i]).intersection(meets)), at, int(i)) for at, i in enumerate(history)]
    like = [i for count, _, i in sorted(shared, reverse=True) if count > 0 and i != item]
    return Evidence(tuple(meets), tuple(dict.fromkeys(like))[:EVENTS_SHOWN])


def rationale(evidence: Evidence, catalogue: Catalogue, chosen: bool) -> str:
    """Step 3 in words, from the evidence alone."""
    return prompts.rationale(evidence.meets, [catalogue.lines[i] for i in evidence.like], chosen)


def explain_questions(
    state: UserState, catalogue: Catalogue, items: Sequence[int]
) -> tuple[Prompt, tuple[Question, ...]]:
    """The chain-of-thought form: the user's prefix, and the question after each item, in the tokens of training."""
    prefix = ranking_request(state, catalogue, ()).prefix
    return prefix, tuple(Question(prompts.QUESTION_COT, about=catalogue.candidates[item]) for item in items)


def training_record(
    state: UserState, catalogue: Catalogue, position: int, positive: int, negatives: Sequence[int], history: np.ndarray
) -> TrainingRecord:
    """The positive (first) and its negatives, with rationales for the positive and the first negative.

    Raises:
        MllmSrecError: the state or the history reaches the target's position: it would know the answer.
    """
    if state.end > position or len(history) > position:
        raise MllmSrecError(
            f"user {state.user_id!r}: the state after {max(state.end, len(history))} events "
            f"has seen its target at position {position}"
        )
    items = [positive, *negatives]
    cot = tuple(
        (at, rationale(find_evidence(state, catalogue, items[at], history), catalogue, chosen=at == 0))
        for at in range(min(2, len(items)))
    )
    return TrainingRecord(ranking_request(state, catalogue, items), cot)
