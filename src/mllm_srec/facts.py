"""Facts of items: attribute, value, and where it can be known from: the picture, the text, or both."""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from mllm_srec.vocabulary import COLOURS, KINDS, NEAR_COLOURS, PATTERNS, Vocabulary, named

Origin = Literal["text", "picture", "both"]

VOCABULARIES = {"kind": KINDS, "colour": COLOURS, "pattern": PATTERNS}
"""Attributes for which picture and text can be compared, since their values have canonical names."""

_WORD = re.compile(r"[^\W\d_](?:[^\W\d_]|['-]){2,}")
_FUNCTION_WORDS = frozenset(
    re.findall(
        r"\w+",
        "the and for with from that this are was were has have had its his her their they them who which "
        "will not but can all one two out into when where what than then over under about after before "
        "between been being more most other only also very you your our any each both such while there "
        "here how why she him himself herself must does did get gets make makes made use used model size "
        "fit some own just new old one first last day days year years time times way back still again "
        "take takes find finds found come comes become becomes goes going gone keep keeps left right let "
        "against through because during without within around along across off down away yet even much many "
        "few several every another same like well good great los san mrs would could should may might shall "
        "really never always however thing things something someone everything everyone nothing together soon "
        "put try tries turn turns start starts begin begins tell tells know knows see sees look looks help "
        "helps need needs want wants meet meets best better",
    )
)


@dataclass(frozen=True)
class Fact:
    """One thing known of an item. `contradicted`: the other source names another value of the same attribute."""

    attribute: str
    value: str
    origin: Origin
    contradicted: bool = False


def said_in(title: str, category: str, description: str) -> dict[str, list[str]]:
    """What a text says of the attributes of `VOCABULARIES`, in canonical names.

    The kind is what the title names, else the category, else the description's first sentence: further down other
    things are named that the item is worn with. A title's thing is its last word before "with", "for" and the like:
    an orange mug is a mug.
    """
    sentence = re.split(r"[.;\n]", description, maxsplit=1)[0]
    thing = re.split(r"\b(?:with|for|in|of|from|and)\b|[,.;(]", title, maxsplit=1)[0]
    kinds = named(thing, KINDS)[-1:] or next(
        (k for text in (title, category, sentence) if (k := named(text, KINDS))), []
    )
    looks = f"{title}. {description}"
    return {"kind": kinds, "colour": named(looks, COLOURS), "pattern": named(looks, PATTERNS)}


def canonical(attribute: str, answer: str) -> str:
    """The value an answer stands for: "running shoe" -> "pair of shoes"; what no vocabulary knows stays as it is.

    Of several names the last counts, as in "apple juice".
    """
    return next(reversed(named(answer, VOCABULARIES.get(attribute, Vocabulary()))), answer)


def merge(seen: Mapping[str, str], said: Mapping[str, Sequence[str]], asked: Sequence[str]) -> list[Fact]:
    """The facts of one item: what the picture showed and what the text says of the attributes `asked`.

    A value that both know is one fact of origin "both"; of two near colours it is the text's, which knows the shade's
    name. Where they name different values both stay, marked as contradicted, but for a value that no vocabulary knows:
    it may be another word for the same. What the text says of
    other attributes is left out: a plot's "black" is no colour of a film.
    """
    facts = []
    for attribute in asked:
        value, of_text = canonical(attribute, seen.get(attribute, "")), said.get(attribute, ())
        if attribute == "colour" and value not in of_text:
            value = next((colour for colour in of_text if frozenset((colour, value)) in NEAR_COLOURS), value)
        comparable = value in VOCABULARIES.get(attribute, Vocabulary())
        against = bool(of_text) and comparable and value not in of_text
        if value:
            facts.append(Fact(attribute, value, "both" if value in of_text else "picture", against))
        facts += [Fact(attribute, other, "text", against) for other in of_text if other != value]
    return facts


def content_words(text: str) -> list[str]:
    """The words of a text, in lower case, that are more than grammar."""
    return [word for word in _WORD.findall(text.lower()) if word not in _FUNCTION_WORDS]


def unsupported_words(text: str, *sources: str) -> list[str]:
    """Content words of `text` (4 letters and more) that no source holds, compared by their first 5 letters.

    A short word's plural is the same word: "shoes" beside "shoe".
    """
    known = {word[:5] for source in sources for word in _WORD.findall(source.lower())}
    return [
        word
        for word in content_words(text)
        if len(word) >= 4 and known.isdisjoint((word[:5], f"{word}s"[:5], word.removesuffix("s")[:5]))
    ]


def category_facts(category: str) -> list[str]:
    """The parts of a category path, lower case, each once: "Animation, Comedy" -> ["animation", "comedy"]."""
    parts = [part.strip().lower() for part in re.split(r"[,|>/;]", category)]
    return list(dict.fromkeys(part for part in parts if len(part) > 1))


def keyword_facts(texts: Sequence[str], limit: int = 6) -> list[list[str]]:
    """Words that say something about an item: per text at most `limit`, the commonest first.

    A word counts when at least 3 and 0.3 % and at most a fifth of the catalogue's texts hold it: rarer ones are shared
    by too few items to show a taste, commoner ones tell nothing.
    """
    words = [list(dict.fromkeys(content_words(text))) for text in texts]
    frequency = Counter(word for of_item in words for word in of_item)
    low, high = max(3, 0.003 * len(texts)), max(3, 0.2 * len(texts))
    return [
        sorted((w for w in of_item if low <= frequency[w] <= high), key=lambda w: (-frequency[w], w))[:limit]
        for of_item in words
    ]
