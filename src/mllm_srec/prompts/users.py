"""Stage 2: windows become summaries; summaries become a dynamic preference and a profile."""

from collections.abc import Sequence

VERSION = "users-3"

SUMMARY_ANSWER = "This person wants"
NOTHING = "shows no taste yet"
NO_TASTE = "nothing in particular"
SUMMARY_WORDS = (
    "nothing in particular mostly mainly especially also often sometimes lately recently both rather person wants "
    "seems likes prefers enjoys looking interested things items choices kinds styles such with without neither"
)
"""Words that a summary may use besides those it was given: they name nothing that could be invented."""

_MINUTE = 60_000
_UNITS = (("year", 525_600), ("month", 43_800), ("week", 10_080), ("day", 1_440), ("hour", 60), ("minute", 1))
"""Names and minutes; a month is a twelfth of a year."""


def duration(ms: float) -> str:
    """A length of time in its largest unit of which it holds at least two, or the smallest it holds: "10 days"."""
    minutes = ms / _MINUTE
    if minutes < 1:
        return "moments"
    for name, size in _UNITS:
        if minutes >= 2 * size or (minutes >= size and name == "minute"):
            count = int(minutes / size + 0.5)
            return f"{count} {name}{'s' if count > 1 else ''}"
    raise AssertionError  # the last unit takes the rest


def event(line: str, looks: str, wait: float | None, disliked: bool) -> str:
    """One choice as a window's prompt tells it; `wait` in ms since the choice before, None where it is short."""
    told = f"after {duration(wait)}: {line}" if wait is not None else line
    return "; ".join(part for part in (told, looks, "rated low" if disliked else "") if part)


def summarise(events: Sequence[str], tastes: Sequence[str]) -> str:
    """The instruction for one window; `tastes` are what its items share beyond the catalogue's base rate."""
    shared = f"\nShared more often than by chance: {', '.join(tastes)}." if tastes else ""
    chosen = "\n".join(f"- {told}" for told in events)
    return f"A person chose, oldest first:\n{chosen}{shared}\nIn one short sentence, what does this person want?"


def summary(tastes: Sequence[str]) -> str:
    """The window summary without a model: the tastes by name."""
    return ", ".join(tastes) if tastes else NO_TASTE


def preference(
    stays: Sequence[str],
    rises: Sequence[str],
    fades: Sequence[str],
    lately: Sequence[str],
    disliked: Sequence[str],
    summary: str,
) -> str:
    """The dynamic preference: what stays, rises and fades, what else shows lately, what was rated low, the newest text.

    What the summary names is not said twice.
    """
    named = {
        "stays with": stays,
        "newly turns to": rises,
        "turns away from": fades,
        "chooses": [name for name in lately if name.lower() not in summary.lower()],
        "rated low": disliked,
    }
    parts = [f"{verb} {', '.join(names)}" for verb, names in named.items() if names]
    if summary != NO_TASTE:
        parts.append(f"now wants {summary.rstrip('. ')}")
    return "; ".join(parts) if parts else NOTHING


def strongly(taste: str) -> str:
    """A taste of which there is no doubt."""
    return f"{taste} (strongly)"


ORIGINS = {
    "picture": "chooses by looks",
    "text": "chooses by what things are",
    "both": "chooses by looks and by what things are",
}
"""By which facts most choices that meet a taste can be explained."""


def profile(
    tastes: Sequence[str],
    hints: Sequence[str],
    dislikes: Sequence[str],
    origin: str,
    breadth: str,
    prices: tuple[float, float] | None,
    rhythm: str,
) -> str:
    """The slow profile: stable tastes (or hints of some), dislikes, what choices go by, range, rhythm."""
    likes = f"likes {', '.join(tastes)}" if tastes else f"perhaps likes {', '.join(hints)}" if hints else NOTHING
    parts = [likes]
    if dislikes:
        parts.append(f"dislikes {', '.join(dislikes)}")
    parts += [part for part in (ORIGINS.get(origin, ""), breadth) if part]
    if prices is not None:
        parts.append(f"pays {prices[0]:.0f} to {prices[1]:.0f}")
    return "; ".join([*parts, *([rhythm] if rhythm else [])])


def breadth(chosen: int, known: int) -> str:
    """Range of categories: "keeps to 2 of 18 categories"."""
    return f"{'keeps to' if chosen <= max(1, known / 4) else 'roams'} {chosen} of {known} categories"


def rhythm(typical: float, longest: float) -> str:
    """How often, and how long the breaks; ms between choices, the median and the longest."""
    often = f"a choice every {duration(typical)}" if typical >= 60 * _MINUTE else "several choices at a time"
    return f"{often}, breaks up to {duration(longest)}" if longest >= 24 * 60 * _MINUTE else often


def since(wait: float) -> str:
    """The time between the newest choice and the moment that is asked about, in ms."""
    return f"The last choice was {duration(wait)} ago."
