"""Texts that the embedded model learns from: simulated goods for the fusion prompt, in phrasings of their own.

The sample shop's titles and descriptions are made from other templates; none of them occurs here.
"""

import numpy as np

from mllm_srec.data.drawing import COLOURS, MORE_RGB, PATTERNS
from mllm_srec.prompts import items as prompts
from mllm_srec.vocabulary import KINDS

BRANDS = ("Norvik", "Halden", "Bruma", "Castell", "Ostrava", "Pinewood", "Larkin", "Mirabel", "Sorrel", "Tamsin")
MATERIALS = ("cotton", "wool", "leather", "oak", "steel", "ceramic", "linen", "plastic", "denim", "glass", "bamboo")
USES = ("for everyday use", "for the weekend", "for travelling", "for the kitchen", "for cold days", "for guests")
CATEGORIES = ("Home & Living", "Outdoor", "Basics", "New arrivals", "Kids", "Market hall", "Wardrobe", "Studio")


def fusion(generator: np.random.Generator) -> tuple[str, str]:
    """(instruction, sentence that fuses it): identity from the text, looks from the picture, contradictions named."""
    pick = lambda values: str(values[int(generator.integers(len(values)))])  # noqa: E731
    kind = pick(list(KINDS))
    colours = [*COLOURS, *MORE_RGB]
    colour, pattern, material, use, brand = pick(colours), pick(PATTERNS), pick(MATERIALS), pick(USES), pick(BRANDS)
    has_text, has_picture = generator.random(2) < 0.85
    has_picture = has_picture or not has_text
    said_colour = pick(colours) if generator.random() < 0.15 else ""
    title = f"{brand} {kind}" if has_text else ""
    text = f"{material.capitalize()}, {use}." + (f" Colour: {said_colour}." if said_colour else "") if has_text else ""
    category = pick(CATEGORIES) if has_text and generator.random() < 0.7 else ""
    visual = prompts.summary({"kind": kind, "colour": colour, "pattern": pattern}) if has_picture else ""

    looks = f"{colour} {pattern} {kind}" if has_picture else kind
    sentence = f"{brand}: {looks} made of {material}, {use}" if has_text else looks
    if has_text and has_picture and said_colour and said_colour != colour:
        sentence += f"; the text says {said_colour}"
    return prompts.fuse(title, category, text, visual), f"{sentence[0].upper()}{sentence[1:]}."
