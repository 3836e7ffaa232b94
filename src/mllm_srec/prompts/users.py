"""Stage 2: windows become summaries; summaries become a dynamic preference and a profile."""

from collections.abc import Sequence

VERSION = "users-1"

EMPTY_WINDOW = "A person of whom nothing is known yet.\nThis person wants: "
SUMMARY_ANSWER = "This person wants"
NOTHING = "shows no taste yet"
NO_TASTE = "no common taste"


def window(lines: Sequence[str]) -> str:
    """The prefix under which phrases are weighed; `lines` are the window's items in short form, oldest first."""
    return (
        "A person chose these items, oldest first:\n"
        + "\n".join(f"- {line}" for line in lines)
        + "\nThis person wants: "
    )


def rated_low(line: str) -> str:
    """An item of the history that the user rated low."""
    return f"{line}, rated low"


def summarise(lines: Sequence[str], phrases: Sequence[str]) -> str:
    """The instruction for models that can write a summary themselves."""
    shared = f"\nWhat these items share more than others do: {', '.join(phrases)}." if phrases else ""
    chosen = "\n".join(f"- {line}" for line in lines)
    asked = "In one short sentence, what does this person want?"
    return f"A person chose these items, oldest first:\n{chosen}{shared}\n{asked}"


def summary(phrases: Sequence[str]) -> str:
    """The window summary made of the phrases the model found likely."""
    return ", ".join(phrases) if phrases else NO_TASTE


def preference(stays: Sequence[str], rises: Sequence[str], fades: Sequence[str], disliked: Sequence[str]) -> str:
    """The dynamic preference: what stays, what rises, what fades, and what was rated low lately."""
    named = {"stays with": stays, "newly turns to": rises, "turns away from": fades, "rated low": disliked}
    parts = [f"{verb} {', '.join(phrases)}" for verb, phrases in named.items() if phrases]
    return "; ".join(parts) if parts else NOTHING


def in_own_words(preference: str, summary: str) -> str:
    """The dynamic preference with what the model itself wrote about the newest window."""
    return f"{preference}. {SUMMARY_ANSWER} {summary.rstrip('. ')}"


def profile(stable: Sequence[str], events: int, gap_days: float | None) -> str:
    """The slow profile: stable tastes, size of the history, rhythm (median days between choices)."""
    if events == 0:
        return NOTHING
    taste = f"likes {', '.join(stable)}" if stable else "has a broad taste"
    size = f"{events} choice{'s' if events != 1 else ''} so far"
    if gap_days is None:
        return f"{taste}; {size}"
    rhythm = "several a day" if gap_days <= 0.5 else f"one in {gap_days:.0f} day{'s' if round(gap_days) != 1 else ''}"
    return f"{taste}; {size}, typically {rhythm}"
