"""Stage 1: questions about a picture, and the fusion of the answers with the item's text."""

from dataclasses import dataclass

VERSION = "items-2"


@dataclass(frozen=True)
class Question:
    """One visual question and the words the answer begins with (they keep a small model on the subject)."""

    ask: str
    answer: str


QUESTIONS = {
    "kind": Question("What is in the picture?", "The picture shows a"),
    "colours": Question("Which colours does the main thing in the picture have?", "Its colours are"),
    "pattern": Question("Which pattern or material does the main thing in the picture have?", "It is"),
    "style": Question("What is the style of the main thing in the picture, and whom is it for?", "It is"),
}

PICTURE = "Picture: "
NO_PICTURE = "Picture: none"

FUSE_SYSTEM = "You describe items of a catalogue from what is given, and add nothing."


def ask(question: str) -> str:
    """The words between the picture and the model's answer."""
    return f"\n{question}"


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
    seen = f"Picture: {visual}." if visual else ""
    return " ".join(part for part in (text, seen) if part)
