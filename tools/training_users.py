"""Simulated users that the embedded model learns stage 2 from: invented catalogues, histories, and the truth.

What a user is after is known, so a summary can be asked that names tastes and leaves flukes out: items share facts by
chance as well, and brands, shelves and filler words are never a taste. All goes through the library's own prompts,
counts and states. The sample shop's names, collections and templates do not occur here.
"""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import numpy as np

from mllm_srec.catalogue import Catalogue, count_names, fact_rates, spellings
from mllm_srec.config import UsersConfig
from mllm_srec.facts import Origin, category_facts, keyword_facts
from mllm_srec.items import Item
from mllm_srec.mllm.base import Prompt
from mllm_srec.prompts import items as item_prompts
from mllm_srec.prompts import ranking as ranking_prompts
from mllm_srec.prompts import users as prompts
from mllm_srec.records import ranking_request
from mllm_srec.user_states import NAMED, History, Window, build_state, read_window
from mllm_srec.vocabulary import COLOURS, PATTERNS
from mllm_srec.windows import DAY, HOUR, window_bounds

# Vocabulary


def listed(names: str) -> tuple[str, ...]:
    """The names of a list, separated by commas, or templates, separated by bars; in one line or several."""
    return tuple(" ".join(name.split()) for name in names.split("|" if "|" in names else ","))


FILLERS = listed("""gift, classic, favourite, popular, original, special, premium, everyday, limited, edition,
    bestseller, quality, exclusive, value, bonus, genuine, signature, essential, selected, ultimate, improved, trusted,
    famous, deluxe""")
SHELVES = listed("""new in, bestsellers, clearance, web only, members, staff picks, main shop, partner offers, back in
    stock, last chance, archive, spotlight, spring list, autumn list, imports, own label""")
STARTS = listed("Bra, Cor, Del, Fal, Gri, Hol, Kas, Lan, Mor, Nev, Pra, Rus, Sal, Tri, Vel, Wes, Yor, Zan")
ENDS = listed("bert, dahl, denko, fort, gate, lund, mere, nova, ridge, sen, stad, ton, vik, wick, zetti, quell")
BRANDS = tuple(start + end for start, end in product(STARTS, ENDS))
ADJECTIVES = listed("""Silent, Crimson, Hollow, Distant, Borrowed, Electric, Frozen, Gentle, Hidden, Iron, Invisible,
    Broken, Patient, Restless, Silver, Second, Stubborn, Tangled, Unfinished, Wandering, Glass, Midnight, Careless,
    Pale, Foreign""")
NOUNS = listed("""Ember, Harvest, Mirror, Compass, Raven, Thunder, Velvet, Orchid, Signal, Echo, Feather, Anchor,
    Pebble, Comet, Sparrow, Tide, Willow, Cinder, Meadow, Falcon, Needle, Bridge, Shadow, Crown, Winter, Ladder,
    River, Kettle, Ocean, Stranger, Letter, Promise, Alphabet, Garden, Machine, Horizon, Secret, Daughter,
    Clockmaker, Atlas""")
PEOPLE = listed("""Clara, Marcus, Priya, Oscar, Yusuf, Helen, Mateo, Nadia, Irene, Kofi, Tomas, Agnes, Boris, Chidi,
    Elena, Felix, Greta, Hugo, Imani, Jonas, Keiko, Leila, Miriam, Noor, Paula, Rafael, Simone, Theo, Ursula, Walter""")

SLOTS: dict[str, Sequence[str] | np.ndarray] = {
    "adjective": ADJECTIVES,
    "noun": NOUNS[::2],
    "other": NOUNS[1::2],
    "person": PEOPLE,
    "number": ("I", "II", "III", "IV", "V"),
    "year": [str(year) for year in range(1950, 2026)],
}
"""What templates hold besides attributes, brands and fillers."""


@dataclass(frozen=True)
class Domain:
    """What a catalogue may be made of; every name is in lower case.

    Attributes:
        kinds: group -> kinds.
        words: further attributes, of one word each, which only texts tell.
        titles: templates of titles.
        texts: templates of descriptions.
        several: an item may be of up to three kinds.
        looks: what a picture shows besides the kind; none: items have no pictures.
    """

    kinds: Mapping[str, tuple[str, ...]]
    words: Mapping[str, tuple[str, ...]]
    titles: tuple[str, ...]
    texts: tuple[str, ...]
    several: bool = False
    looks: tuple[str, ...] = ()


LOOKS = {"colour": tuple(COLOURS), "pattern": tuple(PATTERNS)}
"""The names that eyes can give."""
STORIES = listed("""The {adjective} {noun} | {noun} of the {other} | {person}'s {noun} | A {noun} for {person} |
    {noun}, {year} | {noun} & {other} | Before the {noun} | {adjective} {noun}: Part {number} | {noun} {number}""")

DOMAINS = {
    "films": Domain(
        kinds=dict.fromkeys(
            listed("feature film, short film, series, miniseries, tv special, concert film, anthology"),
            listed("""thriller, heist, slapstick, space opera, ghost story, courtroom drama, road movie, whodunit,
                biopic, martial arts, screwball comedy, disaster, spy story, samurai, zombie, vampire, family saga,
                satire, period drama, buddy story, survival, mockumentary, creature feature, swashbuckler, time
                travel, cyberpunk, fairy tale, nature film, prison break, gangster, comedy, horror, romance,
                western, war film"""),
        ),
        words={
            "mood": listed("""bleak, whimsical, tense, tender, gritty, dreamy, hopeful, sardonic, eerie, melancholy,
                playful, sombre, feverish, wistful, raucous, stately, quirky, brooding, sunny, absurd"""),
            "place": listed("""lighthouse, monastery, submarine, orchard, casino, hospital, circus, prairie, harbour,
                embassy, newsroom, vineyard, railway, boarding-school, skyscraper, jungle, glacier, swamp, castle,
                suburb, subway"""),
            "craft": listed("""subtitled, monochrome, dubbed, restored, handheld, widescreen, stop-motion, rotoscoped,
                improvised, hand-drawn, one-take, found-footage, split-screen, nonlinear, puppetry"""),
        },
        titles=STORIES,
        texts=listed("""{mood} tale around a {place}, {craft} | {filler}: {place}, {mood} |
            {craft} and {mood}; {filler} | """),
        several=True,
    ),
    "books": Domain(
        kinds=dict.fromkeys(
            listed("paperback, hardback, audiobook, e-book, pocket edition, large print, boxed set"),
            listed("""cosy mystery, epic fantasy, memoir, cookery, popular science, sea stories, travel writing,
                poetry, true crime, philosophy, gardening, legal thriller, family history, gothic novel, nature
                writing, essays, hard science fiction, picture book, folk tales, economics, self-help, art history,
                military history, love story, dystopia, spy novel, psychology, comic strip, astronomy, language
                course, puzzles, theatre"""),
        ),
        words={
            "voice": listed("""lyrical, terse, chatty, scholarly, epistolary, sprawling, understated, acerbic,
                confessional, unreliable, ornate, deadpan, polyphonic, meditative, breezy, fragmentary, rhapsodic,
                caustic"""),
            "theme": listed("""exile, inheritance, grief, friendship, ambition, motherhood, betrayal, migration, faith,
                forgery, solitude, revenge, apprenticeship, sisters, rivalry, illness, espionage, childhood, debt,
                obsession"""),
            "extra": listed("""illustrated, annotated, bilingual, abridged, gilt-edged, clothbound, indexed, signed,
                slipcased, foldout, facsimile, unabridged, pop-up, watercoloured, linocut, mapped"""),
        },
        titles=STORIES,
        texts=listed("""A {voice} book of {theme}, {extra} | {extra}, {voice}: {theme} | On {theme}; {filler}, {extra} |
            """),
        several=True,
    ),
    "music": Domain(
        kinds=dict.fromkeys(
            listed("album, single, live recording, reissue, mixtape, soundtrack, vinyl"),
            listed("""delta blues, bossa nova, shoegaze, drum'n'bass, string quartet, afrobeat, synthpop, bluegrass, dub
                reggae, hard bop, baroque opera, post-punk, trip-hop, flamenco, doom metal, gospel, qawwali, chamber
                pop, klezmer, techno, salsa, ambient, ska, krautrock, madrigal, boom bap, fado, surf rock, ragtime, math
                rock, highlife, calypso, zydeco"""),
        ),
        words={
            "sound": listed("""fuzzy, crystalline, lo-fi, orchestral, stripped-back, brassy, hypnotic, reverberant,
                percussive, twangy, polyrhythmic, distorted, breathy, droning, glitchy, acoustic, symphonic,
                nocturnal"""),
            "lead": listed("""accordion, saxophone, theremin, cello, trumpet, harmonica, piano, sitar, falsetto, organ,
                banjo, clarinet, marimba, harpsichord, oud, choir, turntables, vibraphone, bagpipes, kora"""),
        },
        titles=STORIES,
        texts=listed("{sound} {lead} | {lead} up front, {sound} | {filler} {sound} pieces for {lead} | With {lead}"),
        several=True,
    ),
    "games": Domain(
        kinds=dict.fromkeys(
            listed("console, handheld, browser, tabletop, mobile, arcade cabinet, pc download"),
            listed("""roguelike, city builder, visual novel, kart racer, tower defence, deck builder, stealth, flight
                simulator, rhythm, point-and-click, battle royale, worker placement, dungeon crawler, football manager,
                metroidvania, word game, pinball, trivia, tactics, life simulation, survival craft, beat 'em up, escape
                room, match three, farming, hidden object, social deduction, bullet hell, sandbox, monster taming"""),
        ),
        words={
            "world": listed("""steampunk, undersea, medieval, lunar, post-apocalyptic, prehistoric, haunted,
                mythological, feudal, subterranean, robotic, piratical, alpine, insectoid, dreamlike, viking, galactic,
                victorian, desert"""),
            "play": listed("""co-op, solitary, turn-based, real-time, competitive, asynchronous, split-screen,
                open-world, branching, permadeath, procedural, narrated, moddable, cross-platform, party, hotseat"""),
            "art": listed("""pixelated, cel-shaded, isometric, voxel, papercraft, photorealistic, claymation,
                hand-painted, wireframe, neon, sketched, low-poly, woodcut, pastel, silhouetted"""),
        },
        titles=STORIES,
        texts=listed("{world}, {play}, {art} | {art} {world} setting; {filler} | {play} in a {world} world | "),
        several=True,
    ),
    "clothing": Domain(
        kinds={
            "dresses & skirts": listed("dress, skirt, pinafore, kaftan, sarong, tutu"),
            "upper wear": listed("blouse, shirt, t-shirt, polo, vest, tunic, bodysuit, camisole, henley"),
            "knits": listed("cardigan, jumper, hoodie, poncho, turtleneck, slipover, shrug"),
            "legwear": listed("jeans, chinos, shorts, leggings, culottes, dungarees, tights, joggers"),
            "coats": listed("parka, raincoat, blazer, anorak, cape, bomber, gilet, overcoat"),
            "extras": listed("scarf, beanie, belt, gloves, socks, tie, beret, headband, mittens"),
            "footwear": listed("boots, sandals, loafers, slippers, trainers, clogs, moccasins, espadrilles"),
        },
        words={
            "fabric": listed("""corduroy, velour, jersey, fleece, chiffon, tweed, lace, cashmere, seersucker, mohair,
                flannel, tulle, crepe, poplin, lyocell, twill, sherpa, crochet, alpaca, organza, merino"""),
            "fit": listed("""slim, oversized, cropped, pleated, high-waisted, tailored, flared, wrap, boxy, asymmetric,
                petite, longline, relaxed, ruffled, fitted, drawstring, quilted, sleeveless"""),
            "wearer": listed("women, men, girls, boys, toddlers, teens, maternity, babies, unisex, seniors"),
        },
        titles=listed("""{fit} {kind} by {brand} | {brand} – {fit} {kind} | {kind}, {fabric}, {fit} |
            {brand}: {kind} {filler} | {colour} {kind} – {brand} | {filler} {fabric} {kind} by {brand} |
            {kind} no. {year}, {brand}"""),
        texts=listed("""{fabric}, {wearer} | {fit}, soft {fabric}, {filler} | For {wearer}: {fabric} |
            {filler}. {wearer}"""),
        looks=("colour", "pattern"),
    ),
    "groceries": Domain(
        kinds={
            "greengrocer": listed("apples, leeks, spinach, plums, radishes, lettuce, grapes, fennel, kale, figs"),
            "dairy counter": listed("yoghurt, butter, cheddar, kefir, ricotta, cream, quark, feta, custard"),
            "bread & cakes": listed("bagels, rye loaf, brioche, crackers, scones, muffins, pitta, oatcakes"),
            "pantry": listed("lentils, pasta, rice, chutney, honey, olives, passata, noodles, granola, peanut butter"),
            "hot drinks": listed("espresso, cocoa, matcha, chai, rooibos, herbal tea, decaf, instant coffee"),
            "cold drinks": listed("lemonade, kombucha, cider, tonic, squash, sparkling water, iced tea, nectar"),
            "frozen food": listed("peas, pizza, fish fingers, sorbet, dumplings, waffles, berries, gnocchi"),
            "sweets & nibbles": listed("truffles, crisps, popcorn, nougat, pretzels, liquorice, fudge, cashews"),
        },
        words={
            "diet": listed("""vegan, organic, gluten-free, lactose-free, low-salt, wholegrain, sugar-free, kosher,
                halal, high-protein, raw, unsweetened, additive-free, keto, fairtrade, low-fat, biodynamic"""),
            "taste": listed("""smoky, tangy, spicy, salted, malty, bitter, zesty, nutty, buttery, peppery, caramelised,
                fruity, herby, garlicky, vanilla, cinnamon, ginger, truffled, minty, sour"""),
            "pack": listed("""multipack, jar, tin, pouch, refill, bottle, carton, tub, sachet, loose, family-size, tray,
                crate, net, snack-size, resealable"""),
        },
        titles=listed("""{taste} {kind}, {brand} | {brand} {filler} {kind} | {kind} – {diet}, {pack} |
            {brand}: {taste} {kind} | {diet} {taste} {kind} | {kind} by {brand} | {pack} {kind}, {filler}"""),
        texts=listed("{diet}, {pack} | {filler} {taste} choice, {diet} | Comes as {pack}; {taste} | "),
        looks=("colour",),
    ),
    "household": Domain(
        kinds={
            "cooking": listed("saucepan, colander, whisk, wok, casserole, grater, spatula, skillet, ladle, peeler"),
            "tableware": listed("bowl, plate, carafe, tumbler, napkin, cutlery set, mug, tureen, coaster, jug"),
            "bedroom": listed("duvet, pillowcase, blanket, nightstand, mattress, wardrobe, bedspread, headboard"),
            "bathroom": listed("towel, soap dish, bath mat, shower curtain, laundry basket, hook, stool, shelf"),
            "lamps & candles": listed("lantern, floor lamp, chandelier, candle, night light, uplighter, sconce"),
            "seating": listed("armchair, bench, pouffe, rocking chair, sofa, footstool, deckchair, cushion"),
            "storage": listed("trunk, bookcase, crate, cabinet, coat rack, magazine rack, drawer unit, hamper"),
        },
        words={
            "substance": listed("""terracotta, pewter, rosewood, slate, wicker, marble, copper, ash, jute, beech, resin,
                zinc, concrete, granite, velveteen, teak, silicone, aluminium, seagrass, earthenware, onyx"""),
            "style": listed("""rustic, baroque, industrial, art-deco, farmhouse, mid-century, bohemian, futuristic,
                colonial, shabby-chic, japandi, gothic, tropical, country, contemporary, brutalist, mediterranean"""),
            "virtue": listed("""foldable, stackable, dishwasher-safe, handmade, child-safe, space-saving, scented,
                cordless, recycled, non-slip, weatherproof, extendable, washable, unbreakable, adjustable"""),
        },
        titles=listed("""{style} {kind} by {brand} | {brand} – {kind}, {substance} | {virtue} {kind}, {brand} |
            {kind}: {style} | {filler} {substance} {kind} by {brand} | {colour} {kind}, {brand} |
            {brand} {year} {style} {kind}"""),
        texts=listed("{virtue}, {style} | {substance}; {filler}, {virtue} | A {style} piece, {substance} | {filler}"),
        looks=("colour", "pattern"),
    ),
}

# Simulation

FORMS = (
    *(("group", "kind"), ("kind",), ("shelf", "kind"), ("group",), ("shelf", "group", "kind"), ("kind", "group")),
    *(("group", "kind", "word"), ("word", "kind"), ("kind", "shelf"), ("group", "word"), ()),
)
"""What category paths consist of; "word" stands for one of the domain's further attributes."""
SEPARATORS = (" > ", " / ", " | ", "; ", ">", "/")
"""Neither commas nor bare bars, which real logs have."""
CASES = (str, str, str.title, str.capitalize, str.upper)
LEAST, MOST = 4, 0.4
"""Items, and share of the catalogue, that must have a fact and may have it for it to be a taste."""
GAPS = (HOUR / 6, HOUR, 8 * HOUR, 2 * DAY, 12 * DAY, 40 * DAY)
"""Mean times in ms between events, by a user's habits."""

Taste = dict[str, str]  # attribute -> fact


@dataclass(frozen=True)
class Simulated:
    """A user whose truth is known.

    Attributes:
        attributes: per item attribute -> facts; all other facts are noise.
        tastes: per event the taste that it was drawn from.
    """

    catalogue: Catalogue
    history: History
    attributes: list[dict[str, tuple[str, ...]]]
    tastes: list[Taste]


def simulate(generator: np.random.Generator) -> Simulated:
    """One catalogue of 80 to 150 items, and one user with 3 to 24 events; a third change their taste midway."""
    domain = DOMAINS[_pick(tuple(DOMAINS), generator)]
    attributes = _attributes(domain, int(generator.integers(80, 151)), generator)
    catalogue = _catalogue(domain, attributes, generator)
    taste, size = _taste(catalogue, attributes, {}, generator), int(generator.integers(3, 25))
    if not taste:  # the texts tell nothing that a user could be after
        return simulate(generator)
    tastes = [taste] * size
    if generator.random() < 1 / 3:
        position = int(generator.integers(size // 3, 2 * size // 3 + 1))
        tastes[position:] = [_taste(catalogue, attributes, taste, generator)] * (size - position)
    disliked = generator.random(size) < (generator.uniform(0.1, 0.3) if generator.random() < 0.5 else 0.0)
    disliked[-1] = False  # every user has a choice to foretell
    gaps = generator.exponential(generator.choice(GAPS, size=2)[generator.integers(0, 2, size)])
    time = np.cumsum(60_000 + gaps).astype(np.int64) + int(generator.integers(10**12, 17 * 10**11))
    history = History("", _choose(catalogue, tastes, disliked, generator), time, disliked)
    return Simulated(catalogue, history, attributes, tastes)


def _attributes(domain: Domain, count: int, generator: np.random.Generator) -> list[dict[str, tuple[str, ...]]]:
    """Per item attribute -> values; a catalogue knows some values of each attribute, some of them more often."""

    def drawn(values: Sequence[str], most: int) -> list[str]:
        known = generator.permutation(values)[: generator.integers(min(4, len(values)), most + 1)]
        return [str(v) for v in generator.choice(known, count, p=generator.dirichlet(np.full(len(known), 2.0)))]

    groups = drawn(tuple(domain.kinds), 6)
    of_group = {group: drawn(domain.kinds[group], 7) for group in dict.fromkeys(groups)}
    further = [*of_group.values()][:2]
    more = generator.integers(0, 3, count) if domain.several else np.zeros(count, dtype=int)
    columns = {name: drawn(values, 12) for name, values in domain.words.items()}
    columns |= {name: drawn(LOOKS[name], 10) for name in domain.looks}
    return [
        {
            "group": (groups[i],),
            "kind": tuple(dict.fromkeys([of_group[groups[i]][i], *(column[i] for column in further[: more[i]])])),
            **{name: (column[i],) for name, column in columns.items()},
        }
        for i in range(count)
    ]


def _catalogue(
    domain: Domain, attributes: Sequence[Mapping[str, tuple[str, ...]]], generator: np.random.Generator
) -> Catalogue:
    """The items in words, and their facts as `Catalogue.load` finds them."""
    form, outer, inner = _pick(FORMS, generator), _pick(SEPARATORS, generator), _pick(SEPARATORS, generator)
    word = _pick(tuple(domain.words), generator)
    titles, text = generator.permutation(domain.titles)[: generator.integers(1, 4)], _pick(domain.texts, generator)
    case, title_case = _pick(CASES, generator), _pick((str, _sentence, str.title), generator)
    shelves = generator.permutation(SHELVES)[: generator.integers(1, 5)]
    slots = SLOTS | {"brand": generator.permutation(BRANDS)[:10], "filler": generator.permutation(FILLERS)[:6]}
    pictured = 0.9 if domain.looks and generator.random() < 0.8 else 0.0
    items: list[Item] = []
    looks: list[str] = []
    candidates: list[str] = []
    for of_item in attributes:
        one = {name: values[0] for name, values in of_item.items()}
        parts = {**one, "shelf": _pick(shelves, generator), "word": one[word]}
        kinds = inner.join(case(kind) for kind in of_item["kind"])
        filled = one | {slot: _pick(of, generator) for slot, of in slots.items()}
        title = title_case(_pick(titles, generator).format(**filled))
        category = outer.join(kinds if name == "kind" else case(parts[name]) for name in form)
        told = f"{_sentence(text.format(**filled))}." if text else ""
        items.append(Item(f"i{len(items)}", title, told, category, None, "missing"))
        shown = {"kind": one["kind"], **{name: one[name] for name in domain.looks}}
        looks.append(item_prompts.summary(shown) if generator.random() < pictured else "")
        candidates.append(ranking_prompts.candidate(title, category, item_prompts.compose(told, looks[-1])))
    facts: list[dict[str, Origin]] = []
    named: set[str] = set()
    words = keyword_facts([f"{item.title} {item.description}" for item in items])
    for item, of_item, of_text, visual in zip(items, attributes, words, looks, strict=True):
        known: dict[str, Origin] = dict.fromkeys(category_facts(item.category) + of_text, "text")
        seen = [of_item[name][0] for name in ("kind", *domain.looks)] if visual else []
        named.update(seen, category_facts(item.category))
        facts.append(known | {fact: "both" if fact in known else "picture" for fact in seen})
    return Catalogue(
        ids=[item.item_id for item in items],
        lines=[ranking_prompts.line(item.title, item.category) for item in items],
        looks=looks,
        candidates=candidates,
        facts=facts,
        rates=fact_rates(facts, named),
        categories=[category_facts(item.category) for item in items],
        prices=np.full(len(items), np.nan, dtype=np.float32),
        embedding_texts=[". ".join(part for part in (i.title, i.category, i.description) if part) for i in items],
        pictures=[None] * len(items),
        spelling=spellings(count_names(items), {fact for of_item in facts for fact in of_item}),
    )


def _taste(
    catalogue: Catalogue,
    attributes: Sequence[Mapping[str, tuple[str, ...]]],
    former: Taste,
    generator: np.random.Generator,
) -> Taste:
    """A taste for 1 to 4 facts of different attributes; of a `former` one each fact stays by a chance of one third.

    Most tastes are for what titles, categories and looks tell; the rest shows in what the chosen items share.
    """
    size, told = len(catalogue.facts), "\n".join([*catalogue.lines, *catalogue.looks]).casefold()
    values: dict[str, list[str]] = {}
    for name, fact in sorted({(name, v) for of_item in attributes for name, of in of_item.items() for v in of}):
        if LEAST <= round(size * catalogue.rates.base.get(fact, 0.0)) <= MOST * size and fact not in former.values():
            values.setdefault(name, []).append(fact)
    taste = {name: fact for name, fact in former.items() if generator.random() < 1 / 3}
    if len(taste) == len(former):
        taste = {}
    wanted = max(int(generator.integers(1, 5)), len(taste) + 1)
    rank = {name: generator.random() + 0.6 * (told.count(found[0]) < LEAST) for name, found in values.items()}
    for name in sorted(rank, key=rank.__getitem__):
        # A group with one of its kinds would say the same twice.
        if len(taste) < wanted and name not in taste and not {name, *taste} >= {"group", "kind"}:
            taste[name] = _pick(values[name], generator)
    return taste or former


def _choose(
    catalogue: Catalogue, tastes: Sequence[Taste], disliked: np.ndarray, generator: np.random.Generator
) -> np.ndarray:
    """int32 (n,): one item per event, none twice, by softmax of utility; what is disliked meets no taste."""
    weight = generator.uniform(2, 5)
    left = np.ones(len(catalogue.facts), dtype=bool)
    chosen = []
    for taste, low in zip(tastes, disliked, strict=True):
        met = np.array([sum(fact in of_item for fact in taste.values()) for of_item in catalogue.facts])
        odds = left * ((met == met[left].min()) if low else np.exp(weight * met))
        chosen.append(int(generator.choice(len(odds), p=odds / odds.sum())))
        left[chosen[-1]] = False
    return np.array(chosen, dtype=np.int32)


# Lessons


def window(generator: np.random.Generator) -> tuple[str, str]:
    """(instruction of a window of 1 to 10 events, what truly follows "This person wants")."""
    simulated = simulate(generator)
    stop = int(generator.integers(1, len(simulated.tastes) + 1))
    start = max(0, stop - int(generator.integers(1, 11)))
    read = read_window(simulated.history, start, stop, simulated.catalogue)
    return read.prompt, summary(simulated, read)


def summary(simulated: Simulated, read: Window) -> str:
    """The true summary of a window: the facts of the taste that its liked items have, and what is disliked instead.

    A fact is named where two liked items, or half of them, have it while it is a taste, and where the instruction
    names it. The most frequent comes first, then the one that "shared more often than by chance" names first.
    """
    history, name, told = simulated.history, simulated.catalogue.name, " ".join([*read.events, *read.tastes])
    events = range(read.start, read.stop)
    facts = [simulated.catalogue.facts[item] for item in history.items]
    liked, low = ([at for at in events if history.disliked[at] == side] for side in (False, True))
    had = Counter(fact for at in liked for fact in simulated.tastes[at].values() if fact in facts[at])
    enough = [fact for fact, n in had.items() if (n >= 2 or 2 * n >= len(liked)) and _place(fact, told) >= 0]
    shared = [taste.casefold() for taste in read.tastes]
    wanted = sorted(enough, key=lambda fact: (-had[fact], [*shared, fact].index(fact), _place(fact, told)))[:NAMED]
    if not wanted:
        return prompts.NO_TASTE
    attribute_of = {fact: attribute for at in events for attribute, fact in simulated.tastes[at].items()}
    known = {*attribute_of, *(fact for at in liked for fact in facts[at])}
    against = Counter(
        fact
        for attribute in dict.fromkeys(attribute_of[fact] for fact in [*wanted, *attribute_of])
        for at in low
        for fact in simulated.attributes[history.items[at]].get(attribute, ())
        if fact in facts[at] and _place(fact, told) >= 0 and fact not in known
    )
    disliked = [name(fact) for fact, n in against.items() if n >= min(2, len(low))][:1]
    first, *others = map(name, wanted)
    text = _and([first, *others])
    if 3 * had[wanted[0]] >= 2 * len(liked):
        text = f"mostly {first}" + (f", also {_and(others)}" if others else "")
    return text + "".join(f"; not {fact}" for fact in disliked)


def next_choice(generator: np.random.Generator) -> tuple[Prompt, str]:
    """(what ranking knows of a user, the item that was chosen next, as a candidate)."""
    simulated = simulate(generator)
    history, catalogue = simulated.history, simulated.catalogue
    end = int(generator.choice(np.flatnonzero(~history.disliked[1:]) + 1))
    size = int(generator.integers(3, 11))
    shown = generator.random()
    recent = int(generator.integers(4, 13)) if shown < 0.25 else 0 if shown < 0.5 else int(generator.integers(1, 7))
    config = UsersConfig(window=size, step=int(generator.integers(1, size + 1)), recent=recent)
    newest = read_window(history, *window_bounds(end, history.time, config)[-1], catalogue)
    state = build_state(history, end, summary(simulated, newest), catalogue, config)
    if shown < 0.25:
        state = replace(state, profile="", preference="", typical=None, newest=None)
    request = ranking_request(state.asked_at(int(history.time[end])), catalogue, [int(history.items[end])])
    return request.prefix, request.candidates[0]


def _place(fact: str, told: str) -> int:
    """Where `told` names a fact in whole words; -1 if nowhere."""
    found = re.search(rf"(?<!\w){re.escape(fact)}(?!\w)", told, re.IGNORECASE)
    return found.start() if found else -1


def _and(names: Sequence[str]) -> str:
    return " and ".join(part for part in (", ".join(names[:-1]), names[-1]) if part)


def _pick(values: Sequence[Any] | np.ndarray, generator: np.random.Generator) -> Any:
    return values[int(generator.integers(len(values)))]


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:]
