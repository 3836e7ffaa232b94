"""Stage 3: one instruction per user and candidate, in a direct and a chain-of-thought form (Sci Rep 2025, Table 1)."""

from collections.abc import Sequence

VERSION = "ranking-5"

SYSTEM = "You predict which item a user chooses next."
QUESTION = "\nYes or No?"
"""Short on purpose: it is read once per candidate, while `prefix`, which asks in full, is read once per user."""
QUESTION_COT = "\nWhich facts meet or miss the taste? Then Yes or No."

PICTURE = "\nPicture: "
"""Between an item's text and its picture: the text is foretold without it."""

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


def note(
    shared: Sequence[str], count: int, of: int, near: int, last: int, meets: Sequence[str], fades: Sequence[str]
) -> str:
    """What an item has in common with what is known of the user, behind the item: step 3's facts before the answer.

    Args:
        shared: the most telling facts that it shares with the newest choice.
        count, of: how many it shares of how many that the newest choice has.
        near, last: how many of how many last choices it has two facts and more in common with.
        meets: tastes that it meets.
        fades: facts of it that the user turns away from.
    """
    parts = []
    if of:
        names = f": {', '.join(shared)}" if shared else ""
        parts.append(f"Shares {count} of {of} with the newest choice{names}")
    if last:
        parts.append(f"near {near} of the last {last}")
    if meets:
        parts.append(f"{'also ' if shared else ''}meets {', '.join(meets)}")
    if fades:
        parts.append(f"against it {', '.join(fades)}")
    return f"\n{'; '.join(parts)}." if parts else ""


def line(title: str, category: str) -> str:
    """An item in raw short form, as it stands in histories."""
    return f"{title} ({category})" if title and category else title or category or WITHOUT_TEXT


def meets(facts: Sequence[str], like: Sequence[str] = ()) -> str:
    """Step 3 of the chain of thought: facts of the item that meet the user's tastes, and choices that share them."""
    return f"It meets the taste for {_all(facts)}{f', like {_all(like)}' if like else ''}."


def shares(facts: Sequence[str], like: Sequence[str]) -> str:
    """Step 3 where no taste is met: what the item has in common with earlier choices."""
    return f"It shares {_all(facts)} with {_all(like)}."


def lacks(facts: Sequence[str]) -> str:
    """Tastes that no fact of the item meets."""
    return f"It lacks {_all(facts)}."


def against(facts: Sequence[str]) -> str:
    """Facts of the item that the user turns away from or dislikes."""
    return f"Against it: {_all(facts)}."


NOTHING_MET = "None of its facts meets the known taste."

RATIONALE_WORDS = (
    "user users person their taste tastes meets meeting matches matching fits suits likes liked loves prefers prefer "
    "preference preferences enjoys enjoyed wants interest interests interested current lately recent recently newly "
    "newest stays turns turning away fades faded known typical earlier before previous choice choices chose chosen "
    "chooses choosing history item items film films movie movies product products facts fact genre genres category "
    "type kind style colour color similar similarly alike close shares sharing shared common lacks lacking without "
    "instead rather against strong strongly clear clearly also especially while since because although though neither "
    "none these those above doesn't don't isn't aren't hasn't won't"
)
"""Words that a rationale or a reason may use besides those of the item and the user: they name nothing that could be
invented."""


def rationale(sentences: Sequence[str], chosen: bool) -> str:
    """Step 3 and the answer."""
    return f"{' '.join(sentences)} {'Yes' if chosen else 'No'}"


def ask_rationale(chosen: bool) -> str:
    """What a larger model is asked for behind an item: the why of an answer that it is told."""
    wanted = (
        "which facts of the item meet the user's taste, and which earlier choice it is like"
        if chosen
        else "what the user is after that the item lacks, or which of its facts the user turns away from"
    )
    return (
        f"\nThe right answer is {'Yes' if chosen else 'No'}. In one or two short sentences, say {wanted}. "
        "Use only what is told above, in its words, and do not repeat the answer."
    )


def version(event: str) -> str:
    """A reason from the names: this item is called as `event` is, and is another one."""
    return f"Another version of {event}, chosen before."


def together(event: str) -> str:
    """A reason from the log: users who chose `event` chose this item as well."""
    return f"Often chosen by those who chose {event}."


def similar(event: str, facts: Sequence[str] = ()) -> str:
    """A reason from content: the text is close to that of `event`, and both have `facts`."""
    return f"Close in content to {event}{f': both have {_all(facts)}' if facts else ''}."


POPULAR = "Chosen by many users; no fact of it meets the known taste."


def _all(names: Sequence[str]) -> str:
    """ "A, B and C"."""
    *first, last = names
    return f"{', '.join(first)} and {last}" if first else last
