"""Why an item is shown: step 3 of the chain of thought in sentences, each tied to the facts and events that it names.

The model writes; a sentence that is not borne out is removed. Where none is left, the evidence speaks.
"""

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from mllm_srec.catalogue import Catalogue
from mllm_srec.facts import content_words, unsupported_words
from mllm_srec.mllm.base import Mllm
from mllm_srec.prompts import ranking as prompts
from mllm_srec.rationales import DENIAL, names_of, sentences
from mllm_srec.records import (
    FACTS_SHOWN,
    Evidence,
    explain_questions,
    find_evidence,
    in_common,
    mere_word,
    title,
)
from mllm_srec.user_states import UserState

REASON_TOKENS = 48
BROAD = 0.2
"""A fact that more of the catalogue has than this tells little of one item: "Drama", "Ladieswear"."""

_ANSWER = re.compile(r"(?:^|[\s.!?])(Yes|No)\b\W*$")
_TASTE = re.compile(r"\btastes?\b", re.IGNORECASE)
_WORD = re.compile(r"[^\W\d_]+")
_TWICE = re.compile(r"\b(\w+(?: \w+)*),? and \1\b", re.IGNORECASE)
_SHARED = re.compile(r"\bshar", re.IGNORECASE)
_COMPARED = re.compile(r"\b(?:shar|like\b)", re.IGNORECASE)
_NUMBER = re.compile(r"\(\d+\)")
"""A year or version beside a title of which it is no part."""


@dataclass(frozen=True)
class Sentence:
    """One sentence of a reason, by "model" or "evidence"."""

    text: str
    by: str
    facts: tuple[str, ...]
    """Facts of the item that it names."""
    events: tuple[str, ...]
    """Item ids of the history that it names."""


@dataclass(frozen=True)
class Reason:
    """Why an item is shown; at least one sentence."""

    sentences: tuple[Sentence, ...]

    @property
    def text(self) -> str:
        """All sentences."""
        return " ".join(sentence.text for sentence in self.sentences)

    @property
    def by(self) -> str:
        """ "model" where some of its own words passed the check, else "evidence"."""
        return "model" if any(sentence.by == "model" for sentence in self.sentences) else "evidence"

    @property
    def facts(self) -> tuple[str, ...]:
        """Facts of the item that the sentences name."""
        return tuple(dict.fromkeys(fact for sentence in self.sentences for fact in sentence.facts))

    @property
    def events(self) -> tuple[str, ...]:
        """Item ids of the history that the sentences name."""
        return tuple(dict.fromkeys(event for sentence in self.sentences for event in sentence.events))


def explain(
    mllm: Mllm,
    catalogue: Catalogue,
    state: UserState,
    history: np.ndarray,
    items: Sequence[int],
    together: Sequence[int | None],
    similar: Sequence[int | None],
    disliked: Sequence[int] | np.ndarray = (),
    falls: np.ndarray | None = None,
) -> list[Reason]:
    """A checked reason per shown item.

    Of what the model writes a sentence is kept if all in it is borne out (`_checked`), and none where its answer is
    "No". Otherwise the evidence gives the reason: tastes that are met, else the history item that is chosen `together`
    with it, else the one `similar` in content (catalogue positions or None; see `Retriever.nearest_events`). Tastes
    that tell little (`_weak`) come last, whoever names them.
    Before either it is said if the item is another version (colour, size, issue) of a choice: of the same title. That
    title is not named again.

    Args:
        history, disliked: the items that the user did not dislike and did, oldest first.
        falls: float (items, history), how far an item's score falls without an event (`Retriever.falls`): of events
            that say as much, that is named first which counts most.
    """
    if len(items) == 0:
        return []
    prefix, questions = explain_questions(state, catalogue, items)
    written = [answer.text for answer in mllm.ask([prefix], questions, REASON_TOKENS)[0]]
    calls = names_of(catalogue, history)
    reasons = []
    moved: Sequence[np.ndarray | None] = [None] * len(items) if falls is None else list(falls)
    for item, text, company, kin, falling in zip(items, written, together, similar, moved, strict=True):
        answer = _ANSWER.search(text)
        kept: list[Sentence] = []
        if answer is None or answer[1] == "Yes":
            kept = _checked(text[: answer.start(1)] if answer else text, catalogue, state, calls, item)
        version = _version(catalogue, item, history)
        others = history
        if version:  # log, content and tastes most often point to that very choice
            other = np.array([title(catalogue, event) != title(catalogue, item) for event in history.tolist()])
            others, falling = history[other], None if falling is None else falling[other]
            named = {catalogue.ids[event] for event in history[~other].tolist()}
            kept = [sentence for sentence in kept if named.isdisjoint(sentence.events)]
            company, kin = (None if event is None or event not in others else event for event in (company, kin))
        if version or company is not None or kin is not None:
            kept = [sentence for sentence in kept if not _weak(catalogue, sentence.facts)]
        found = find_evidence(state, catalogue, item, others, disliked, falling)
        why = kept or _from_evidence(catalogue, item, found, company, kin, bool(version))
        reasons.append(Reason((*version, *why)))
    return reasons


def _weak(catalogue: Catalogue, facts: Sequence[str]) -> bool:
    """Whether `facts` tell less than the log or the content does: all of them broad, or mere words."""
    weak = (mere_word(catalogue, fact) or catalogue.rates.base[fact] > BROAD for fact in facts)
    return bool(facts) and all(weak)


def _version(catalogue: Catalogue, item: int, history: np.ndarray) -> tuple[Sentence, ...]:
    """That the newest event with the item's title is another version of it, if there is one."""
    name = title(catalogue, item)
    for event in history[::-1].tolist():
        if event != item and title(catalogue, event) == name:
            return (Sentence(prompts.version(name), "evidence", (), (catalogue.ids[event],)),)
    return ()


def _checked(
    text: str, catalogue: Catalogue, state: UserState, calls: Mapping[str, list[int]], item: int
) -> list[Sentence]:
    """The sentences of `text` in which all is borne out, each tied to what it names.

    A sentence is kept if it is whole, denies nothing and says nothing twice, its words are the item's, it names a met
    taste or an event and does more than that, no fact that the item has not, nothing but tastes as tastes, and only
    events that share what it says, by names that the item has not.
    """
    facts, own, tastes = catalogue.facts[item], catalogue.candidates[item], state.phrases
    tellable = {fact for fact in facts if fact in tastes or not mere_word(catalogue, fact)}
    # Words of three letters are too short to be looked up: "red", "fur".
    short = [fact for fact in catalogue.rates.base if len(fact) < 4 and content_words(fact)]
    possible = {*facts, *tastes, *short}
    true = {*facts, *_named(own, possible)}
    # A title that is but a fact's name ("Dress") names no event.
    own_names = names_of(catalogue, [item])
    names = own_names | {name: of for name, of in calls.items() if name.lower() not in possible}
    kept = []
    for sentence, rest, called in sentences(text, names):
        said = _named(rest, possible)
        named = [fact for fact in said if fact in tellable]
        whole = _SHARED.search(rest) is not None
        events = [_meant(names[name], catalogue, item, named or tellable, whole) for name in called]
        titles = {title(catalogue, event) for event in events if event is not None}
        sound = (
            sentence.endswith((".", "!", "?"))
            and not DENIAL.search(rest)
            and not _TWICE.search(rest)
            and not unsupported_words(rest, own, *facts, prompts.RATIONALE_WORDS)
            and true.issuperset(said)
            and (not _TASTE.search(rest) or set(said) <= set(tastes))
            and None not in events
            and len(titles) == len(called)  # likened to one title twice
            and not any(name in own_names and name in calls for name in called)  # the item, or the choice?
            and not _NUMBER.search(rest)
            and (set(events) != {item} or not _COMPARED.search(rest))  # likened to itself
        )
        cited = tuple(catalogue.ids[event] for event in dict.fromkeys(events) if event is not None and event != item)
        more = len(_WORD.findall(rest)) - sum(len(_WORD.findall(fact)) for fact in said)
        if sound and more >= 2 and (cited or not set(tastes).isdisjoint(named)):
            kept.append(Sentence(sentence, "model", tuple(named), cited))
    return kept


def _meant(called: Sequence[int], catalogue: Catalogue, item: int, facts: Collection[str], whole: bool) -> int | None:
    """The newest of the items `called` by one name that has some of `facts`, all of them with `whole`; None without
    any: what is said of it is not so."""
    enough = all if whole else any
    for event in reversed(called):
        if event == item or enough(fact in catalogue.facts[event] for fact in facts):
            return event
    return None


def _named(text: str, facts: Iterable[str]) -> list[str]:
    """The facts that `text` names, in its order; "jersey fancy" is not "jersey" as well."""
    found = []
    for fact in sorted(facts, key=lambda fact: (-len(fact), fact)):
        pattern = re.compile(rf"(?<!\w){re.escape(fact)}(?:e?s)?(?!\w)", re.IGNORECASE)
        match = pattern.search(text)
        if match:
            found.append((match.start(), fact))
            text = pattern.sub(lambda match: " " * len(match[0]), text)
    return [fact for _, fact in sorted(found)]


def _from_evidence(
    catalogue: Catalogue, item: int, found: Evidence, company: int | None, kin: int | None, told: bool
) -> list[Sentence]:
    """One sentence; none where a reason is `told` already and there is no better one."""
    weak = _weak(catalogue, found.meets) and (told or company is not None or kin is not None)
    if found.meets and not weak:
        like = [title(catalogue, event) for event in found.like]
        text = prompts.meets([catalogue.name(fact) for fact in found.meets], like)
        return [Sentence(text, "evidence", found.meets, tuple(catalogue.ids[event] for event in found.like))]
    if company is not None:
        return [Sentence(prompts.together(title(catalogue, company)), "evidence", (), (catalogue.ids[company],))]
    if kin is not None:
        both = [fact for fact in in_common(catalogue, item, kin) if fact not in found.clash][:FACTS_SHOWN]
        text = prompts.similar(title(catalogue, kin), [catalogue.name(fact) for fact in both])
        return [Sentence(text, "evidence", tuple(both), (catalogue.ids[kin],))]
    return [] if told else [Sentence(prompts.POPULAR, "evidence", (), ())]
