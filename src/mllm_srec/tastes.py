"""Tastes: which facts of items a user is after, how sure that is, and how it moves. Counts alone, no model.

A fact is a taste where the chosen items have it more often than the catalogue does. With n of m chosen items having a
fact whose share of the catalogue is b, its strength is the log odds (nats)

    ln BF + ln(prior odds),   BF = B(n + 1, m - n + 1) / (b^n * (1 - b)^(m - n)),

B the Beta function: the Bayes factor of a rate of its own (uniform prior) against the catalogue's rate. The prior odds
are b, since a rare fact is a rare taste, and less for words that merely stand in a text. So one item proves nothing,
and in a shop of black clothes "black" is no taste.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

HINT = -1.4
"""Nats; what only the newest window shows is worth saying from odds of 1 to 4 on."""
CHANGED = 2.0
"""Nats by which two rates must explain past and newest window better than one rate before a change is claimed."""
MEMORY = 0.7
"""Share of the past's weight that survives each window."""
STRONG = 3.0
"""Log odds from which on a taste is called strong: 20 to 1."""

Strengths = dict[str, float]
"""Fact -> log odds in nats, strongest first."""


@dataclass(frozen=True)
class Counts:
    """Of `size` chosen items, how many have each fact; real numbers, since the past fades."""

    size: float = 0.0
    of: Mapping[str, float] = field(default_factory=dict)

    def add(self, later: "Counts", memory: float = 1.0) -> "Counts":
        """memory * these + `later`."""
        names = self.of.keys() | later.of.keys()
        of = {name: memory * self.of.get(name, 0.0) + later.of.get(name, 0.0) for name in names}
        return Counts(memory * self.size + later.size, of)


@dataclass(frozen=True)
class Movement:
    """The dynamic preference after a window.

    Attributes:
        stays: tastes known from before that the newest window does not speak against.
        rises: tastes of the newest window that were clearly rarer before.
        fades: tastes from before that are clearly rarer in the newest window.
        lately: what else the newest window shows; no change is claimed.
    """

    stays: Strengths
    rises: Strengths
    fades: Strengths
    lately: Strengths


def count(facts: Sequence[Iterable[str]]) -> Counts:
    """Counts of whole items; `facts` per item, each at most once."""
    of: dict[str, float] = {}
    for of_item in facts:
        for fact in of_item:
            of[fact] = of.get(fact, 0.0) + 1.0
    return Counts(float(len(facts)), of)


@dataclass(frozen=True)
class Rates:
    """What is known of each fact beforehand."""

    base: Mapping[str, float]
    """Share of the catalogue's items that have it."""
    prior: Mapping[str, float]
    """Prior odds that it is a taste."""


def strengths(counts: Counts, rates: Rates, least: float = 0.0) -> Strengths:
    """Facts whose log odds of being a taste are above `least`; only those commoner than in the catalogue."""
    found = {}
    for fact, n in counts.of.items():
        m, b = counts.size, rates.base[fact]
        if n > m * b:  # never what all items have
            value = _log_beta(n, m - n) - n * math.log(b) - (m - n) * math.log1p(-b) + math.log(rates.prior[fact])
            if value > least:
                found[fact] = value
    return _ordered(found)


def change(past: Counts, newest: Counts, fact: str) -> float:
    """Nats by which two rates of `fact` explain past and newest window better than one; negative where it is rarer now.

    ln [B(n0 + 1, m0 - n0 + 1) B(n1 + 1, m1 - n1 + 1) / B(n0 + n1 + 1, m0 + m1 - n0 - n1 + 1)], at least 0.
    """
    n0, m0, n1, m1 = past.of.get(fact, 0.0), past.size, newest.of.get(fact, 0.0), newest.size
    value = max(0.0, _log_beta(n0, m0 - n0) + _log_beta(n1, m1 - n1) - _log_beta(n0 + n1, m0 + m1 - n0 - n1))
    return value if n1 * m0 >= n0 * m1 else -value


def movement(past: Counts, newest: Counts, rates: Rates) -> Movement:
    """How the newest window moves the belief; `past` is what remains of the windows before it, faded."""
    before = strengths(past, rates)
    together = strengths(past.add(newest), rates)
    shown = strengths(newest, rates, HINT)
    facts = {*before, *together, *shown}
    # One event is no movement, however much it surprises.
    moved = {fact: change(past, newest, fact) if newest.size >= 2 else 0.0 for fact in facts}
    rises = {fact: value for fact, value in shown.items() if moved[fact] > CHANGED}
    fades = {fact: value for fact, value in before.items() if moved[fact] < -CHANGED}
    stays = {
        fact: value for fact, value in together.items() if fact in before and fact not in rises and fact not in fades
    }
    lately = {fact: value for fact, value in shown.items() if not (fact in rises or fact in stays or fact in fades)}
    return Movement(_ordered(stays), _ordered(rises), _ordered(fades), _ordered(lately))


def distinct(found: Strengths, facts: Sequence[Iterable[str]], limit: int) -> list[str]:
    """The strongest facts by name, leaving out what says the same: of the same items ("kitchen" beside "mug"), or in
    the same words ("basic" beside "basics").

    Args:
        found: facts and strengths.
        facts: facts per item that they were found in.
        limit: names at most.
    """
    names: list[str] = []
    known: set[frozenset[int]] = set()
    said: set[str] = set()
    sets = [set(of_item) for of_item in facts]
    for fact in found:
        where = frozenset(at for at, of_item in enumerate(sets) if fact in of_item)
        stems = {word[:5] for word in fact.split()}
        if where not in known and not stems <= said:
            names.append(fact)
            known.add(where)
            said |= stems
        if len(names) == limit:
            break
    return names


def explained(facts: Sequence[Mapping[str, str]], tastes: Iterable[str]) -> tuple[float, float, float]:
    """Shares of the chosen items that meet a taste by what only the picture, only the text, or both tell.

    An item that meets one taste by its picture and another one by its text counts as both; the rest to 1 meets none.

    Args:
        facts: per item fact -> origin ("picture", "text", "both").
        tastes: the user's tastes.
    """
    wanted, found = set(tastes), {"picture": 0, "text": 0, "both": 0}
    for of_item in facts:
        origins = {origin for fact, origin in of_item.items() if fact in wanted}
        if origins:
            found[origins.pop() if len(origins) == 1 else "both"] += 1
    size = max(len(facts), 1)
    return round(found["picture"] / size, 4), round(found["text"] / size, 4), round(found["both"] / size, 4)


def _log_beta(hits: float, misses: float) -> float:
    """ln B(hits + 1, misses + 1)."""
    return math.lgamma(hits + 1) + math.lgamma(misses + 1) - math.lgamma(hits + misses + 2)


def _ordered(found: Mapping[str, float]) -> Strengths:
    return {fact: round(value, 4) for fact, value in sorted(found.items(), key=lambda p: (-round(p[1], 4), p[0]))}
