"""Stage 3: one instruction per user and candidate, in a direct and a chain-of-thought form (Sci Rep 2025, Table 1)."""

from collections.abc import Sequence

VERSION = "ranking-3"

SYSTEM = "You predict which item a user chooses next."
QUESTION = "\nYes or No?"
"""Short on purpose: it is read once per candidate, while `prefix`, which asks in full, is read once per user."""
QUESTION_COT = "\nWhich facts meet or miss the taste? Then Yes or No."

WITHOUT_TEXT = "item without text"


def prefix(
    profile: str, preference: str, recent: Sequence[str], since: str = "", typical: str = "", newest: str = ""
) -> str:
    """What all candidates of a user share: steps 1 and 2 of the chain of thought (what stays, what moves).

    `typical` and `newest` are choices told in full, as candidates are: they show what an item's text looks like, and
    profile and preference what to read in it. Without all four, the choices in short form alone speak.
    """
    parts = [
        f"The user {profile}." if profile else "",
        f"Typical choice: {typical}" if typical else "",
        f"Lately the user {preference}." if preference else "",
        f"Newest choice: {newest}" if newest else "",
        "Last choices, oldest first:\n" + "\n".join(f"- {line}" for line in recent) if recent else "",
        since,
        "Will the user choose this item next?\nItem: ",
    ]
    return "\n".join(part for part in parts if part)


def candidate(title: str, category: str, description: str) -> str:
    """An item as a candidate: short text, because a picture is paid for once, at fusion."""
    parts = [part.rstrip(". ") for part in (title, category, description)]
    return ". ".join(part for part in parts if part) + "." if any(parts) else f"{WITHOUT_TEXT}."


def line(title: str, category: str) -> str:
    """An item in raw short form, as it stands in histories."""
    return f"{title} ({category})" if title and category else title or category or WITHOUT_TEXT


def rationale(meets: Sequence[str], like: Sequence[str], chosen: bool) -> str:
    """Step 3 of the chain of thought and the answer: the facts that meet the taste, the events they remind of."""
    because = f"It meets the taste for {', '.join(meets)}" if meets else "None of its facts meets the known taste"
    events = f", like {' and '.join(like)}" if like else ""
    return f"{because}{events}. {'Yes' if chosen else 'No'}"


def together(event: str) -> str:
    """A reason from the log: users who chose `event` chose this item as well."""
    return f"Often chosen by those who chose {event}"


def similar(event: str) -> str:
    """A reason from content: the text is close to that of an item in the history."""
    return f"Close in content to {event}"


POPULAR = "Chosen by many users; no fact of it meets the known taste"
