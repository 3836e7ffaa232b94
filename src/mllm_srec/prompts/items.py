"""Stage 1: questions about a picture, and the fusion of the answers with the item's text."""

from collections.abc import Mapping
from dataclasses import dataclass

from mllm_srec.vocabulary import COLOURS, PATTERNS

VERSION = "items-3"


@dataclass(frozen=True)
class VisualQuestion:
    """One question about a picture and the words its answer begins with (they keep a small model on the subject).

    With `options` one is chosen, without them the model writes. `say` puts an answer into the visual summary.
    """

    ask: str
    answer: str
    options: tuple[str, ...] = ()
    say: str = "{}"


QUESTIONS: dict[str, VisualQuestion] = {
    "kind": VisualQuestion("What is in the picture?", "The picture shows a"),
    "scene": VisualQuestion("What is in the picture?", "The picture shows a"),
    "colour": VisualQuestion(
        "Which colour does the main thing in the picture have?", "Its main colour is", tuple(COLOURS)
    ),
    "pattern": VisualQuestion("Which pattern does the main thing in the picture have?", "It is", tuple(PATTERNS)),
    "material": VisualQuestion(
        "What is the main thing in the picture made of?",
        "It is made of",
        ("cotton", "denim", "knit", "leather", "lace", "metal", "wood", "glass", "plastic", "paper"),
        "made of {}",
    ),
    "style": VisualQuestion(
        "What is the style of the main thing in the picture?",
        "Its style is",
        ("casual", "elegant", "sporty", "classic", "modern", "romantic", "playful"),
        "{} style",
    ),
    "whom": VisualQuestion(
        "For whom is the main thing in the picture?", "It is for", ("women", "men", "children", "everyone"), "for {}"
    ),
    "setting": VisualQuestion(
        "Where was the picture taken?",
        "The setting is",
        ("a studio", "a home", "a city", "nature", "the sea", "outer space", "a battlefield"),
        "set in {}",
    ),
    "mood": VisualQuestion(
        "Which mood does the picture have?",
        "The mood is",
        ("cheerful", "dark", "romantic", "tense", "dreamy", "serious"),
        "{} mood",
    ),
    "package": VisualQuestion(
        "How is the food in the picture packed?",
        "It comes",
        ("loose", "in a bottle", "in a carton", "in a cup", "in a bag", "in a box"),
        "{}",
    ),
    "text": VisualQuestion("Which words are written in the picture?", 'The words are "', (), 'with the words "{}"'),
}
"""`kind` asks what an item is, `scene` what the picture of something else shows. Only these and `text` are answered in
the model's own words: at most two times `items.answer_tokens` per item."""

DOMAINS: dict[str, tuple[str, ...]] = {
    "general": ("kind", "colour", "pattern", "material", "style", "setting", "text"),
    "goods": ("kind", "colour", "pattern", "material", "style", "whom", "text"),
    "fashion": ("kind", "colour", "pattern", "material", "style", "whom"),
    "films": ("scene", "setting", "mood", "text"),
    "food": ("kind", "colour", "package", "text"),
}
"""What is worth asking, by what a catalogue holds."""

DOMAIN_WORDS: dict[str, tuple[str, ...]] = {
    "fashion": (
        *(
            "fashion",
            "clothing",
            "clothes",
            "apparel",
            "shoes",
            "accessories",
            "dress",
            "trousers",
            "garment",
            "sweater",
        ),
        *("ladieswear", "menswear", "jacket", "top", "t-shirt", "underwear", "socks", "bags", "jewellery", "swimwear"),
    ),
    "films": (
        *("film", "films", "movie", "movies", "drama", "comedy", "thriller", "horror", "animation", "documentary"),
        *("action", "adventure", "crime", "fantasy", "mystery", "war", "film-noir"),
        *("romance", "western", "sci-fi", "noir", "musical", "video", "dvd"),
    ),
    "food": ("food", "grocery", "groceries", "fruit", "vegetables", "dairy", "drinks", "beverages", "bakery", "snacks"),
    "goods": (
        *("home", "kitchen", "sports", "sport", "toys", "electronics", "beauty", "tools", "garden", "office", "baby"),
        *("leisure", "music", "pet", "automotive", "furniture", "gift"),
    ),
}
"""Words of a category path by which `items.domain: auto` knows the domain; none of them: general."""

_LOOKS = ("colour", "pattern", "kind", "scene")

PICTURE = "Picture: "
NO_PICTURE = "Picture: none"

FUSE_SYSTEM = "You describe items of a catalogue from what is given, and add nothing."


def ask(question: str) -> str:
    """The words between the picture and the model's answer."""
    return f"\n{question}"


def summary(answers: Mapping[str, str]) -> str:
    """The visual summary: question -> answer becomes "red striped T-shirt, made of cotton"; unknowns are left out.

    Colour and pattern stand before the kind, unless it says them itself, the rest behind it.
    """
    kind = answers.get("kind") or answers.get("scene") or ""
    looks = [answers.get(name, "") for name in ("colour", "pattern")]
    main = " ".join([*(look for look in looks if look and look not in kind.split()), *([kind] if kind else [])])
    rest = [QUESTIONS[name].say.format(value) for name, value in answers.items() if value and name not in _LOOKS]
    return ", ".join(part for part in (main, *rest) if part)


def seen(visual: str) -> str:
    """What the picture showed, in a sentence; "" if nothing."""
    return f"Picture: {visual}." if visual else ""


def represent(text: str, behind_picture: bool) -> str:
    """An item's text as it is embedded, alone or behind its picture."""
    return f"\n{text}" if behind_picture and text else text


def fuse(title: str, category: str, description: str, visual: str) -> str:
    """The instruction that fuses picture and text. Identity comes from the text, looks from the picture."""
    lines = [f"Title: {title}", f"Category: {category}", f"Text: {description}", f"Seen in the picture: {visual}"]
    given = [line for line in lines if not line.endswith(": ")]
    asked = (
        "Write one sentence that describes this item: what it is comes from the text, "
        "what it looks like comes from the picture."
    )
    return "\n".join([*given, asked])


def compose(text: str, visual: str) -> str:
    """The fused description without a generating call: the item's own words, then what the picture showed."""
    return " ".join(part for part in (text, seen(visual)) if part)
