"""The words by which kinds, colours and patterns are known: one canonical name each, with the words that mean the same.

Words with several common meanings (a check, cream, gold) are left out, however often they mean a look.
They compare what a picture showed with what a text says, and decide whether an answer names the right kind.
"""

import re
from functools import cached_property


class Vocabulary(dict[str, tuple[str, ...]]):
    """Canonical name -> words that mean the same."""

    @cached_property
    def phrases(self) -> dict[str, list[tuple[list[str], str]]]:
        """First word -> (words, canonical name) of all names and synonyms that begin with it, the longest first."""
        found: dict[str, list[tuple[list[str], str]]] = {}
        for name, synonyms in self.items():
            for phrase in (name, *synonyms):
                found.setdefault(words(phrase)[0], []).append((words(phrase), name))
        return {first: sorted(of_first, key=lambda pair: -len(pair[0])) for first, of_first in found.items()}


KINDS = Vocabulary(
    {
        # clothing
        "dress": ("dresses", "gown", "sundress"),
        "hat": ("hats", "cap", "beanie", "bonnet", "sun hat", "cowboy hat", "baseball cap"),
        "jacket or coat": (
            "jacket",
            "jackets",
            "coat",
            "coats",
            "blazer",
            "parka",
            "anorak",
            "trench coat",
            "outerwear",
        ),
        "pair of shorts": ("shorts",),
        "pair of shoes": (
            *("shoe", "shoes", "sneaker", "sneakers", "trainers", "boot", "boots", "sandal", "sandals", "loafer"),
            *("loafers", "slipper", "slippers", "running shoe", "pumps", "ballerinas", "clog"),
        ),
        "shirt": ("shirts", "blouse", "blouses"),
        "pair of trousers": (
            "trousers",
            "trouser",
            "pants",
            "jeans",
            "leggings",
            "chinos",
            "joggers",
            "sweatpants",
            "jean",
        ),
        "long-sleeved top": (
            *(
                "long sleeved top",
                "long sleeve",
                "longsleeve",
                "long sleeves",
                "sweater",
                "sweaters",
                "jumper",
                "jumpers",
            ),
            *("sweatshirt", "sweatshirts", "hoodie", "hoodies", "cardigan", "cardigans", "pullover", "turtleneck"),
        ),
        "skirt": ("skirts", "miniskirt", "mini skirt"),
        "T-shirt": ("t-shirts", "t shirt", "t shirts", "tee", "tee shirt", "tees"),
        # groceries
        "apple": ("apples",),
        "asparagus": (),
        "aubergine": ("aubergines", "eggplant", "eggplants"),
        "avocado": ("avocados",),
        "banana": ("bananas",),
        "cabbage": ("cabbages", "head cabbage"),
        "carrots": ("carrot",),
        "cucumber": ("cucumbers", "cuke"),
        "garlic": (),
        "ginger": ("ginger root",),
        "juice": ("juices",),
        "kiwi": ("kiwis", "kiwi fruit", "kiwifruit"),
        "leek": ("leeks",),
        "lemon": ("lemons",),
        "lime": ("limes",),
        "mango": ("mangos", "mangoes"),
        "melon": ("melons", "watermelon", "cantaloupe", "honeydew melon", "galia melon"),
        "milk": (),
        "mushroom": ("mushrooms",),
        "nectarine": ("nectarines",),
        "oat milk": ("oat drink",),
        "oatghurt": ("oat yoghurt", "oat yogurt"),
        "onion": ("onions",),
        "orange": ("oranges",),
        "papaya": ("papayas",),
        "passion fruit": ("passionfruit", "passion fruits"),
        "peach": ("peaches",),
        "pear": ("pears",),
        "pepper": ("peppers", "bell pepper", "bell peppers", "paprika"),
        "pineapple": ("pineapples", "ananas"),
        "plum": ("plums",),
        "pomegranate": ("pomegranates",),
        "potato": ("potatoes", "sweet potato"),
        "red beet": ("beet", "beets", "beetroot", "red beets"),
        "red grapefruit": ("grapefruit", "grapefruits"),
        "satsumas": ("satsuma", "mandarin", "mandarins", "tangerine", "tangerines", "clementine", "clementines"),
        "sour cream": (),
        "sour milk": ("soured milk",),
        "soy milk": ("soy drink", "soya milk"),
        "soyghurt": ("soy yoghurt", "soy yogurt"),
        "tomato": ("tomatoes",),
        "yoghurt": ("yoghurts", "yogurt", "yogurts"),
        "zucchini": ("zucchinis", "courgette", "courgettes"),
        # goods that the project draws
        "ball": ("balls", "beach ball"),
        "bag": ("bags", "handbag", "purse", "tote bag"),
        "chair": ("chairs", "folding chair"),
        "clock": ("clocks", "alarm clock", "analog clock", "wall clock"),
        "guitar": ("guitars", "acoustic guitar", "electric guitar"),
        "kite": ("kites",),
        "lamp": ("lamps", "table lamp", "lampshade"),
        "mug": ("mugs", "coffee mug", "cup"),
        "teapot": ("teapots",),
        "umbrella": ("umbrellas",),
    }
)
"""Canonical kind -> synonyms. Not all kinds there are: a word outside is no contradiction of one inside."""

COLOURS = Vocabulary(
    {
        "black": (),
        "white": ("off-white", "ivory", "natural white"),
        "grey": ("gray", "charcoal", "light grey", "dark grey"),
        "brown": ("dark brown", "light brown"),
        "beige": ("ecru", "light beige", "off-beige"),
        "red": ("burgundy", "dark red", "crimson"),
        "orange": ("dark orange", "light orange"),
        "yellow": ("mustard yellow",),
        "green": ("khaki", "olive", "dark green", "khaki green", "mint"),
        "turquoise": ("teal", "aqua"),
        "blue": ("navy", "dark blue", "light blue", "denim blue", "navy blue"),
        "purple": ("violet", "lilac"),
        "pink": ("light pink", "fuchsia"),
    }
)

NEAR_COLOURS = frozenset(
    frozenset((colour, near))
    for colour, others in {
        "grey": ("black", "white", "beige", "brown", "blue", "green"),
        "black": ("blue", "brown"),
        "white": ("beige", "yellow", "pink"),
        "beige": ("brown", "yellow", "pink", "orange"),
        "brown": ("red", "orange", "green"),
        "red": ("pink", "orange", "purple"),
        "yellow": ("orange", "green"),
        "turquoise": ("green", "blue"),
        "purple": ("blue", "pink"),
    }.items()
    for near in others
)
"""Colours that a photo's light, or the name of a shade, moves into each other: navy and black, khaki and brown."""

PATTERNS = Vocabulary(
    {
        "plain": ("solid", "solid-coloured", "plain-coloured", "unpatterned"),
        "striped": ("stripe", "stripes", "pinstriped", "stripy"),
        "dotted": ("dots", "spotted", "polka dot", "polka dots", "polka-dot"),
        "checked": ("checkered", "chequered", "plaid", "tartan", "gingham"),
    }
)

_WORD = re.compile(r"[^\W_]+(?:['-][^\W_]+)*")


def words(text: str) -> list[str]:
    """The words of a text in lower case; "T-shirt" is one word."""
    return _WORD.findall(text.lower())


def named(text: str, vocabulary: Vocabulary) -> list[str]:
    """The canonical names whose name or synonym stands in `text` as whole words, each once, in the text's order.

    Of two phrases that begin together the longer counts: "oat milk" does not name "milk".
    """
    said = words(text)
    found: dict[str, None] = {}
    at = 0
    while at < len(said):
        fitting = (pair for pair in vocabulary.phrases.get(said[at], ()) if said[at : at + len(pair[0])] == pair[0])
        phrase, name = next(fitting, ([said[at]], ""))
        if name:
            found[name] = None
        at += len(phrase)
    return list(found)
