"""The state of a user after some events, from counts and one text: what stays, rises, fades, and the slow profile.

A state after `end` events is made of events [0, end) alone. How taste moves is counted (`tastes`); the model's part is
the newest window's summary (`users`), so nothing that a model wrote is ever fed back into it.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np

from mllm_srec import tastes
from mllm_srec.catalogue import Catalogue
from mllm_srec.config import UsersConfig
from mllm_srec.data.dataset import Histories
from mllm_srec.facts import Origin
from mllm_srec.prompts import users as prompts
from mllm_srec.tastes import Counts, Movement, Strengths
from mllm_srec.windows import HOUR, closed_until, window_bounds

NAMED = 4
"""Tastes that one line names at most."""
DISLIKED_NAMED = 2
PAUSE = HOUR
"""Shorter times between choices are not worth saying."""


@dataclass(frozen=True)
class History:
    """The events of one user, oldest first: items int32 (n,) catalogue positions, time int64 (n,) ms or None, disliked
    bool (n,)."""

    user_id: str
    items: np.ndarray
    time: np.ndarray | None
    disliked: np.ndarray

    @classmethod
    def of(cls, histories: Histories, user: int, low: float | None) -> "History":
        """User number `user` of the log; `low` is its `low_rating`."""
        span = histories.span(user)
        time = None if histories.time is None else histories.time[span]
        return cls(histories.users[user], histories.item[span], time, disliked_events(histories, user, low))

    @classmethod
    def outside(cls, items: np.ndarray, user_id: str = "") -> "History":
        """A history that no log holds: order only."""
        return cls(user_id, items, None, np.zeros(len(items), dtype=bool))


@dataclass(frozen=True)
class Window:
    """Events [start, stop) of one user as the model reads them, and the names of what its liked items share."""

    start: int
    stop: int
    events: tuple[str, ...]
    tastes: tuple[str, ...]

    @property
    def prompt(self) -> str:
        """The instruction."""
        return prompts.summarise(self.events, self.tastes)


@dataclass(frozen=True)
class UserState:
    """What ranking knows of a user after `end` events; `as_of` is the time (ms UTC) of the newest of them."""

    user_id: str
    end: int
    as_of: int | None
    profile: str
    preference: str
    movement: Movement
    stable: Strengths
    """Tastes over the closed windows."""
    by_origin: tuple[float, float, float]
    """Cross-modal preference: shares of the liked items that meet a taste by picture facts, by text facts, by both."""
    recent: tuple[int, ...]
    """Catalogue positions of the newest items, oldest first."""
    window_start: int = 0
    """First event of the newest window."""
    typical: int | None = None
    """Catalogue position of the liked item that meets the profile's tastes best, of equal ones the newest."""
    newest: int | None = None
    """Catalogue position of the newest liked item."""
    waited: int | None = None
    """ms from the newest event to the moment that is asked about; None where that is not known."""

    @property
    def phrases(self) -> tuple[str, ...]:
        """The current tastes by name: what rises, stays, shows in the newest window, is stable and does not fade."""
        moving = self.movement
        stable = [fact for fact in self.stable if fact not in moving.fades]  # what fades speaks for no item
        return tuple(dict.fromkeys([*moving.rises, *moving.stays, *moving.lately, *stable]))

    def asked_at(self, time: int) -> "UserState":
        """The same state at a later moment (ms UTC): how long ago the newest event was is all that it adds."""
        return self if self.as_of is None else replace(self, waited=time - self.as_of)


NOBODY = UserState("", 0, None, prompts.NOTHING, prompts.NOTHING, Movement({}, {}, {}, {}), {}, (0.0, 0.0, 0.0), ())
"""A user of whom nothing is known."""


def low_rating(histories: Histories) -> float | None:
    """The rating at or below which an event is a dislike: the lowest 30 % of the scale; None without a scale.

    The scale (lowest and highest rating anywhere in the log) is taken as a fact of the data set, like its catalogue.
    """
    rated = histories.rating[~np.isnan(histories.rating)]
    if len(rated) == 0 or rated.min() == rated.max():
        return None
    return float(rated.min() + 0.3 * (rated.max() - rated.min()))


def disliked_events(histories: Histories, user: int, low: float | None) -> np.ndarray:
    """bool (n,): the user's events rated `low_rating` or below."""
    ratings = histories.rating[histories.span(user)]
    if low is None:
        return np.zeros(len(ratings), dtype=bool)
    disliked: np.ndarray = np.nan_to_num(ratings, nan=np.inf) <= low
    return disliked


def read_window(history: History, start: int, stop: int, catalogue: Catalogue) -> Window:
    """Events [start, stop) in words, with the facts that its liked items share beyond the catalogue's base rate."""
    events = []
    for at in range(start, stop):
        item = history.items[at]
        wait = float(history.time[at] - history.time[at - 1]) if history.time is not None and at > 0 else 0.0
        told = wait if wait >= PAUSE else None
        events.append(prompts.event(catalogue.lines[item], catalogue.looks[item], told, bool(history.disliked[at])))
    liked = [catalogue.facts[history.items[at]] for at in range(start, stop) if not history.disliked[at]]
    found = tastes.strengths(tastes.count(liked), catalogue.rates, tastes.HINT)
    return Window(start, stop, tuple(events), tuple(_names(found, liked, catalogue)))


def movement_of(history: History, end: int, catalogue: Catalogue, config: UsersConfig) -> Movement:
    """The dynamic preference after `end` events.

    Recurrently over windows: past <- MEMORY * past + events up to the next window's start; the newest window moves it.
    """
    bounds = window_bounds(end, history.time, config)
    past = Counts()
    for (start, _), (following, _) in pairwise(bounds):
        past = past.add(tastes.count(_liked(history, start, following, catalogue)), tastes.MEMORY)
    newest = tastes.count(_liked(history, bounds[-1][0], end, catalogue)) if bounds else Counts()
    return tastes.movement(past, newest, catalogue.rates)


def build_state(history: History, end: int, summary: str, catalogue: Catalogue, config: UsersConfig) -> UserState:
    """The state after `end` events; `summary` is the newest window's text."""
    if end == 0:
        return UserState(
            history.user_id, 0, None, NOBODY.profile, NOBODY.preference, NOBODY.movement, {}, NOBODY.by_origin, ()
        )
    bounds = window_bounds(end, history.time, config)
    moving = movement_of(history, end, catalogue, config)
    liked = _liked(history, 0, end, catalogue)
    low = [catalogue.lines[history.items[at]] for at in range(bounds[-1][0], end) if history.disliked[at]]
    named = {
        name: _names(getattr(moving, name), liked, catalogue, strong=name == "stays")
        for name in ("stays", "rises", "fades", "lately")
    }
    settled = closed_until(bounds, config) or end
    profile, stable, by_origin = _profile(history, settled, catalogue)
    return UserState(
        user_id=history.user_id,
        end=end,
        as_of=None if history.time is None else int(history.time[end - 1]),
        profile=profile,
        preference=prompts.preference(**named, disliked=low[-DISLIKED_NAMED:], summary=summary),
        movement=moving,
        stable=stable,
        by_origin=by_origin,
        recent=tuple(int(i) for i in history.items[max(0, end - config.recent) : end]) if config.recent else (),
        window_start=bounds[-1][0],
        typical=_typical(history, settled, stable, catalogue),
        newest=_typical(history, end, {}, catalogue),
    )


def _typical(history: History, end: int, wanted: Strengths, catalogue: Catalogue) -> int | None:
    """Of the liked items of events [0, end) the one whose facts meet the `wanted` tastes best by the sum of their
    strengths; of equal ones the newest. None where nothing is liked."""
    liked = [int(history.items[at]) for at in range(end) if not history.disliked[at]]
    met = {item: sum(wanted.get(fact, 0.0) for fact in catalogue.facts[item]) for item in liked}
    return max(reversed(liked), key=met.__getitem__, default=None)


def _profile(history: History, settled: int, catalogue: Catalogue) -> tuple[str, Strengths, tuple[float, float, float]]:
    """The slow profile of events [0, settled), its tastes, and by which facts they were chosen."""
    liked = _liked(history, 0, settled, catalogue)
    known = tastes.count(liked)
    stable = tastes.strengths(known, catalogue.rates)
    hints = {} if stable else tastes.strengths(known, catalogue.rates, tastes.HINT)
    low = [catalogue.facts[history.items[at]] for at in range(settled) if history.disliked[at]]
    against = tastes.strengths(tastes.count(low), catalogue.rates)
    against = {fact: value for fact, value in against.items() if fact not in stable}
    shares = tastes.explained(liked, stable)
    seen = sum("picture" in of_item.values() for of_item in liked)
    origin = ("picture", "text", "both")[int(np.argmax(shares))]
    # Where pictures tell nothing of their own, that all is chosen by text says nothing.
    telling = seen >= len(liked) / 2 and round(max(shares) * len(liked)) >= 3 and max(shares) >= sum(shares) / 2
    bought = history.items[:settled][~history.disliked[:settled]]
    parts = {part for item in bought for part in catalogue.categories[item]}
    categories = {part for of_item in catalogue.categories for part in of_item}
    prices = catalogue.prices[bought]
    prices = prices[~np.isnan(prices)]
    waits = np.diff(history.time[:settled]) if history.time is not None else np.zeros(0)
    text = prompts.profile(
        _names(stable, liked, catalogue, strong=True),
        _names(hints, liked, catalogue),
        _names(against, low, catalogue)[:DISLIKED_NAMED],
        origin if telling else "",
        prompts.breadth(len(parts), len(categories)) if parts else "",
        (float(np.quantile(prices, 0.25)), float(np.quantile(prices, 0.75))) if len(prices) >= 3 else None,
        prompts.rhythm(float(np.median(waits)), float(waits.max())) if len(waits) else "",
    )
    return text, stable, shares


def _names(found: Strengths, facts: Sequence[Iterable[str]], catalogue: Catalogue, strong: bool = False) -> list[str]:
    """The strongest facts as texts write them; with `strong`, those beyond doubt are said to be so."""
    names = [(fact, catalogue.name(fact)) for fact in tastes.distinct(found, facts, NAMED)]
    return [prompts.strongly(name) if strong and found[fact] >= tastes.STRONG else name for fact, name in names]


def _liked(history: History, start: int, stop: int, catalogue: Catalogue) -> list[dict[str, Origin]]:
    return [catalogue.facts[history.items[at]] for at in range(start, stop) if not history.disliked[at]]
