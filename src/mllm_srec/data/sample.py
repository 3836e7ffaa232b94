"""The sample shop: drawn goods, simulated users whose tastes are known, and the truth behind every choice.

A good's colour and pattern stand only in its picture, its material and collection only in its text, its kind in both:
whoever reads one of the two alone misses half of what users choose by.
"""

import csv
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from mllm_srec.data.drawing import COLOURS, KINDS, PATTERNS, draw, in_shop
from mllm_srec.errors import UsageError
from mllm_srec.progress import Bar

__all__ = ["COLLECTIONS", "COLOURS", "KINDS", "PATTERNS", "write_sample"]

COLLECTIONS = ("retro", "minimal", "outdoor", "nordic", "coastal", "urban", "festival", "heritage")

WHERE = {"kind": "both", "colour": "picture", "pattern": "picture", "material": "text", "collection": "text"}
"""Where a fact of an item can be learnt."""

WEIGHTS = {
    "picture": {"kind": 1.8, "colour": 3.2, "pattern": 2.2, "material": 0.3, "collection": 0.4},
    "text": {"kind": 1.8, "colour": 0.4, "pattern": 0.3, "material": 2.2, "collection": 3.2},
    "both": {"kind": 1.8, "colour": 2.0, "pattern": 1.4, "material": 1.4, "collection": 2.0},
}
"""Utility of an item per fact that meets the taste, by what a user weighs."""

POPULARITY_SD = 0.4
"""Standard deviation of the part of an item's utility that is the same for all users."""

_GROUPS = ("natural", "classic", "technical")
MATERIALS = {
    "ball": {"natural": ("rubber", "cotton"), "classic": ("leather", "suede"), "technical": ("vinyl", "nylon")},
    "bag": {"natural": ("linen", "canvas"), "classic": ("leather", "suede"), "technical": ("nylon", "polyester")},
    "chair": {"natural": ("bamboo", "rattan"), "classic": ("walnut", "oak"), "technical": ("steel", "acrylic")},
    "clock": {"natural": ("bamboo", "cork"), "classic": ("brass", "walnut"), "technical": ("steel", "acrylic")},
    "dress": {"natural": ("cotton", "linen"), "classic": ("silk", "wool"), "technical": ("polyester", "viscose")},
    "guitar": {"natural": ("bamboo", "cedar"), "classic": ("maple", "walnut"), "technical": ("carbon", "acrylic")},
    "hat": {"natural": ("straw", "cotton"), "classic": ("wool", "felt"), "technical": ("nylon", "polyester")},
    "kite": {"natural": ("cotton", "paper"), "classic": ("silk", "satin"), "technical": ("nylon", "polyester")},
    "lamp": {"natural": ("bamboo", "linen"), "classic": ("brass", "porcelain"), "technical": ("steel", "acrylic")},
    "mug": {"natural": ("bamboo", "stoneware"), "classic": ("porcelain", "enamel"), "technical": ("steel", "melamine")},
    "shoe": {"natural": ("hemp", "canvas"), "classic": ("leather", "suede"), "technical": ("nylon", "neoprene")},
    "t-shirt": {"natural": ("cotton", "hemp"), "classic": ("silk", "wool"), "technical": ("polyester", "viscose")},
    "teapot": {"natural": ("clay", "stoneware"), "classic": ("porcelain", "enamel"), "technical": ("steel", "glass")},
    "umbrella": {"natural": ("cotton", "paper"), "classic": ("silk", "satin"), "technical": ("nylon", "polyester")},
}
"""Per kind, the materials of each group; a material is of the same group everywhere."""

CATEGORIES = {
    "ball": "Sports, Balls",
    "bag": "Fashion, Bags",
    "chair": "Home, Furniture",
    "clock": "Home, Clocks",
    "dress": "Fashion, Clothing",
    "guitar": "Leisure, Music",
    "hat": "Fashion, Accessories",
    "kite": "Sports, Kites",
    "lamp": "Home, Lighting",
    "mug": "Home, Kitchen",
    "shoe": "Fashion, Shoes",
    "t-shirt": "Fashion, Clothing",
    "teapot": "Home, Kitchen",
    "umbrella": "Fashion, Accessories",
}

# Invented; drawn without regard to any fact of the item.
_NAMES = (
    *("Alvo", "Benno", "Cleo", "Dario", "Edda", "Fenna", "Gustel", "Hedda", "Ilse", "Jorin", "Kivo", "Lumi", "Maro"),
    *("Nilo", "Odil", "Pelle", "Quint", "Runa", "Selma", "Tove", "Ulla", "Vero", "Wanda", "Xenia", "Yrsa", "Zeno"),
)
_TITLES = ("{name} {material} {kind}", "{name} {kind} in {material}", "{name} {collection} {kind}", "{kind} {name}")
_DESCRIPTIONS = (
    "Made of {material}, from our {collection} collection.",
    "{article} {kind} of the {collection} collection, made of {material}.",
    "This {kind} in {material} belongs to the {collection} collection.",
)
_CLOSINGS = ("", " Easy to care for.", " A gift that lasts.", " Ships within two days.", " Made to be used every day.")

_DAY = 24 * 60 * 60
_YEAR_START = 1_735_689_600
"""2025-01-01T00:00:00Z in unix seconds."""

_NOTE = (
    "What the sample shop was made from. Users are simulated. An event is drawn by softmax of utility over the items "
    "that its user has not had yet; utility is the item's popularity plus the weights (by what the user weighs) of the "
    "facts that meet the taste: kind in kinds, material in material_groups[material_group], else equality. From event "
    "number change.position (the first is 0) on, the user follows change.taste."
)

_README = """\
The sample shop of MLLM-SRec

The pictures in images/ are drawn by this project. The users are simulated. There is no real shop and no real person
behind any row; names of goods are invented.

interactions.csv  user_id, item_id, timestamp (unix seconds, UTC)
items.csv         item_id, title, description, category, image
images/           one picture per item
truth.json        what the shop was made from: every item's facts and where they stand (picture, text or both), every
                  user's taste, and where it changes. Not for models: it is what they have to find out.

Colour and pattern of a good stand only in its picture, material and collection only in its text.
Made with {users} users and seed {seed}.
"""


@dataclass(frozen=True)
class _Item:
    item_id: str
    kind: str
    colour: str
    pattern: str
    material_group: str
    material: str
    collection: str
    popularity: float
    title: str
    description: str


@dataclass(frozen=True)
class _Taste:
    kinds: tuple[str, ...]
    colour: str
    pattern: str
    material_group: str
    collection: str

    def utility(self, items: Sequence[_Item], weights: dict[str, float]) -> np.ndarray:
        """float64 (I,): popularity plus the weights of the facts that meet this taste."""
        return np.array(
            [
                item.popularity
                + weights["kind"] * (item.kind in self.kinds)
                + weights["colour"] * (item.colour == self.colour)
                + weights["pattern"] * (item.pattern == self.pattern)
                + weights["material"] * (item.material_group == self.material_group)
                + weights["collection"] * (item.collection == self.collection)
                for item in items
            ]
        )


@dataclass(frozen=True)
class _Change:
    position: int
    """Of the first event that follows `taste`."""
    taste: _Taste


@dataclass(frozen=True)
class _User:
    user_id: str
    weighs: str
    taste: _Taste
    change: _Change | None
    items: list[int]
    times: list[int]


def write_sample(folder: str | Path, users: int = 60, seed: int = 0) -> None:
    """Write the sample shop in the table layout, with truth.json and README.txt beside it.

    The same arguments give the same bytes (under the same versions of numpy and Pillow). interactions.csv is written
    last.

    Args:
        folder: a new or empty folder.
        users: simulated users, at least 3; the catalogue has min(all combinations of kind, colour and pattern,
            max(120, 4 * users)) items.
        seed: not negative.

    Raises:
        UsageError: `users` or `seed` is too small, or `folder` is a file or not empty.
    """
    folder = Path(folder)
    if users < 3:
        raise UsageError(f"users is {users}: the sample shop needs at least 3, so that a third can change taste")
    if seed < 0:
        raise UsageError(f"seed is {seed}: choose 0 or more")
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"{folder} is a file: choose a new or empty folder for the sample shop")
    if folder.exists() and any(folder.iterdir()):
        raise UsageError(f"{folder} is not empty: choose a new or empty folder for the sample shop")

    items = _make_items(max(120, 4 * users), np.random.default_rng([seed, 0]))
    people = _make_users(users, items, np.random.default_rng([seed, 1]))

    (folder / "images").mkdir(parents=True, exist_ok=True)
    _write_text(folder / "README.txt", _README.format(users=users, seed=seed))
    with Bar("sample: pictures", len(items)) as bar:
        for number, item in enumerate(items):
            picture = draw(item.kind, item.colour, item.pattern, np.random.default_rng([seed, 2, number]))
            picture.save(folder / _image(item))
            bar.advance(1)
    truth = json.dumps(_truth(items, people, seed), indent=1, sort_keys=True)
    _write_text(folder / "truth.json", truth + "\n")
    _write_csv(
        folder / "items.csv",
        ("item_id", "title", "description", "category", "image"),
        ((i.item_id, i.title, i.description, CATEGORIES[i.kind], _image(i)) for i in items),
    )
    # Sorted by time as a shop's log is; the sort is stable, so a user's ties keep their order.
    log = [(u.user_id, items[i].item_id, time) for u in people for i, time in zip(u.items, u.times, strict=True)]
    log.sort(key=lambda event: event[2])
    _write_csv(folder / "interactions.csv", ("user_id", "item_id", "timestamp"), log)


def _make_items(count: int, generator: np.random.Generator) -> list[_Item]:
    """Kinds in equal parts; each kind has all colours before one comes twice, and never a combination twice."""
    order: list[tuple[str, str, str]] = []
    shuffled = {kind: (generator.permutation(COLOURS), generator.permutation(PATTERNS)) for kind in KINDS}
    for turn in range(2 * len(COLOURS)):
        for kind, (colours, patterns) in shuffled.items():
            colour = str(colours[turn % len(COLOURS)])
            own = [str(pattern) for pattern in patterns if in_shop(kind, colour, pattern)]
            # The other pattern comes in the second round of colours, so that all are met.
            order.append((kind, colour, own[(turn + turn // len(COLOURS)) % 2]))
    combinations = order[:count]
    items: list[_Item] = []
    titles: set[str] = set()
    # An item's number must not tell its kind.
    for number, at in enumerate(generator.permutation(len(combinations)), 1):
        kind, colour, pattern = combinations[at]
        group = _pick(_GROUPS, generator)
        material = _pick(MATERIALS[kind][group], generator)
        collection = _pick(COLLECTIONS, generator)
        words = {"kind": kind, "material": material, "collection": collection}
        title = ""
        while not title or title in titles:
            title = _sentence(_pick(_TITLES, generator).format(name=_pick(_NAMES, generator), **words))
        titles.add(title)
        article = "An" if kind[0] in "aeiou" else "A"
        description = _pick(_DESCRIPTIONS, generator).format(article=article, **words) + _pick(_CLOSINGS, generator)
        popularity = round(float(generator.normal(0, POPULARITY_SD)), 3)
        items.append(
            _Item(f"i{number:04}", kind, colour, pattern, group, material, collection, popularity, title, description)
        )
    return items


def _make_users(count: int, items: Sequence[_Item], generator: np.random.Generator) -> list[_User]:
    """A third each weighs picture, text, both; exactly count // 3 change their taste."""
    weighs = [list(WEIGHTS)[group] for group in generator.permutation(np.arange(count) % len(WEIGHTS))]
    changing = set(generator.permutation(count)[: count // 3].tolist())
    width = max(3, len(str(count)))
    users = []
    for number in range(count):
        events = int(generator.integers(8, 25))
        taste, change = _draw_taste(None, generator), None
        tastes = [taste] * events
        if number in changing:
            # Between 40 % and 70 % of the history, both ends included.
            position = int(generator.integers(-(-2 * events // 5), 7 * events // 10 + 1))
            change = _Change(position, _draw_taste(taste, generator))
            tastes[position:] = [change.taste] * (events - position)
        users.append(
            _User(
                f"u{number + 1:0{width}}",
                weighs[number],
                taste,
                change,
                _choose(tastes, items, WEIGHTS[weighs[number]], generator),
                _draw_times(events, change, generator),
            )
        )
    return users


def _draw_taste(former: _Taste | None, generator: np.random.Generator) -> _Taste:
    """A taste; after a `former` one, all but the material group differs from it."""
    kinds = [kind for kind in KINDS if not former or kind not in former.kinds]
    return _Taste(
        kinds=tuple(sorted(generator.permutation(kinds)[: generator.integers(2, 4)].tolist())),
        colour=_pick([colour for colour in COLOURS if not former or colour != former.colour], generator),
        pattern=_pick([pattern for pattern in PATTERNS if not former or pattern != former.pattern], generator),
        material_group=former.material_group if former else _pick(_GROUPS, generator),
        collection=_pick([name for name in COLLECTIONS if not former or name != former.collection], generator),
    )


def _choose(
    tastes: Sequence[_Taste], items: Sequence[_Item], weights: dict[str, float], generator: np.random.Generator
) -> list[int]:
    """One item per taste, none twice, by softmax of utility."""
    odds = {taste: np.exp(taste.utility(items, weights)) for taste in set(tastes)}
    left = np.ones(len(items))
    chosen = []
    for taste in tastes:
        share = odds[taste] * left
        item = int(generator.choice(len(items), p=share / share.sum()))
        left[item] = 0
        chosen.append(item)
    return chosen


def _draw_times(events: int, change: _Change | None, generator: np.random.Generator) -> list[int]:
    """Unix seconds within 2025, ascending: gaps of days, a quarter of minutes to hours, few of none."""
    haste = generator.random(events - 1)
    haste[0] = 1  # at least one gap of days carries the span
    days = haste >= 0.25
    gaps = np.where(days, generator.exponential(1, events - 1), 0)
    gaps *= generator.uniform(60, 300) * _DAY / gaps.sum()
    gaps = np.where(days, gaps, generator.uniform(60, _DAY / 6, events - 1))
    gaps[haste < 0.03] = 0
    if change is not None:
        # The time of the change tells the events of the two tastes apart.
        gaps[change.position - 1] = max(gaps[change.position - 1], 60)
    after = np.concatenate([[0], np.cumsum(np.ceil(gaps).astype(np.int64))])
    first = _YEAR_START + int(generator.integers(365 * _DAY - int(after[-1])))
    return [first + int(seconds) for seconds in after]


def _truth(items: Sequence[_Item], users: Sequence[_User], seed: int) -> dict[str, object]:
    groups: dict[str, set[str]] = {}
    for of_kind in MATERIALS.values():
        for group, materials in of_kind.items():
            groups.setdefault(group, set()).update(materials)
    return {
        "note": _NOTE,
        "seed": seed,
        "weights": WEIGHTS,
        "material_groups": {group: sorted(materials) for group, materials in groups.items()},
        "items": {
            item.item_id: {fact: getattr(item, fact) for fact in WHERE}
            | {"popularity": item.popularity, "where": WHERE}
            for item in items
        },
        "users": {
            user.user_id: {
                "taste": asdict(user.taste),
                "weighs": user.weighs,
                "change": user.change and asdict(user.change) | {"timestamp": user.times[user.change.position]},
            }
            for user in users
        },
    }


def _pick(values: Sequence[str], generator: np.random.Generator) -> str:
    return values[int(generator.integers(len(values)))]


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:]


def _image(item: _Item) -> str:
    return f"images/{item.item_id}.png"


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8", newline="\n")


def _write_csv(path: Path, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(columns)
        writer.writerows(rows)
