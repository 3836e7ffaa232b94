"""Our rows: retrieval as the project does it, and the cheap rows that it has to beat.

The cheap rows are co-occurrence, closeness of texts to the last item or the last five, and a sum of the two with a
weight on content; "retrieval" is `mllm_srec.retrieval`, chosen and refitted like every other system.
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
from choosing import BLOCK, Scorer, Settings, System
from common import cubes_of_last_five
from exchange import Asked, Part

from mllm_srec.config import load_config
from mllm_srec.data.dataset import Histories, Queries
from mllm_srec.evaluation.protocol import Scorer as OfQueries
from mllm_srec.retrieval import CoOccurrence, Likeness, Mix, Retriever, choosing, retriever, sequence, signals
from mllm_srec.store_files import fingerprint

WEIGHTS = (0.0, 0.5, 1.0, 2.0)
"""Of content in the mix."""
SEED = 0


def systems(vectors: np.ndarray) -> dict[str, System]:
    """By name; `vectors` float32 (I, D), L2-normalised, of the items' texts."""
    modules = (choosing, retriever, sequence, signals)
    code = [Path(str(file)).read_text(encoding="utf-8") for file in (__file__, *(of.__file__ for of in modules))]
    made_of = fingerprint(*code, vectors.tobytes())
    likeness = Likeness(vectors)

    def company(part: Part, settings: Settings) -> Iterator[tuple[Settings, Scorer]]:
        yield settings, in_blocks(cooccurrence(part).scores)

    def last_item(part: Part, settings: Settings) -> Iterator[tuple[Settings, Scorer]]:
        yield settings, in_blocks(lambda histories: cosine_of_last(vectors, histories))

    def last_five(part: Part, settings: Settings) -> Iterator[tuple[Settings, Scorer]]:
        yield settings, in_blocks(lambda histories: cubes_of_last_five(vectors, histories))

    def mix(part: Part, settings: Settings) -> Iterator[tuple[Settings, Scorer]]:
        fitted, weight = cooccurrence(part), np.float32(settings["weight"])
        yield settings, in_blocks(lambda of: fitted.scores(of) + weight * cubes_of_last_five(vectors, of))

    def retrieval(part: Part, settings: Settings) -> Iterator[tuple[Settings, Scorer]]:
        yield from retrieved(part, settings, likeness)

    return {
        "co-occurrence": System([{}], company, made_of),
        "content, last item": System([{}], last_item, made_of),
        "content, last 5": System([{}], last_five, made_of),
        "mix": System([{"weight": weight} for weight in WEIGHTS], mix, made_of),
        "retrieval (ours)": System([{}], retrieval, made_of),
    }


def retrieved(part: Part, settings: Settings, likeness: Likeness) -> Iterator[tuple[Settings, Scorer]]:
    """Without settings: the mix that each tie rule's targets choose, of an encoder whose epochs the first rule's chose.
    With a mix: that mix."""
    log, config = histories_of(part), load_config().retrieval
    seen = np.ones(len(log.item), dtype=bool)
    if settings:
        mix = Mix(**settings)
        encoder = sequence.fit(log, seen, likeness.vectors, mix.epochs, SEED) if mix.epochs else None
        yield settings, in_blocks(Retriever.fit(log, seen, likeness, mix, encoder).scores)
        return
    rules = {
        rule: choosing.Asked(queries_of(asked, 0, len(asked)), asked.target, False)
        for rule, asked in part.asked.items()
        if len(asked)
    }
    first = next(iter(rules.values()))
    encoder, curve = choosing.train(log, seen, likeness.vectors, config.epochs, first, SEED)
    whole = Retriever.fit(log, seen, likeness, Mix(0.0, 0.0, 0.0, 0), encoder)
    mixes = {choosing.weigh(whole, asked, config.weights): None for asked in rules.values()}
    for mix in mixes:
        epochs = choosing.best_epoch(curve) if mix.sequence else 0
        yield {**asdict(mix), "epochs": epochs}, in_blocks(whole.mixed(mix).scores)


def histories_of(part: Part) -> Histories:
    """The part's seen events as a log."""
    sizes = np.bincount(part.seen_user)
    return Histories(
        users=[str(user) for user in range(len(sizes))],
        items=[str(item) for item in range(part.items)],
        offsets=np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64),
        item=part.seen_item,
        time=part.seen_time,
        rating=np.full(len(part.seen_item), np.nan, dtype=np.float32),
    )


def cooccurrence(part: Part) -> CoOccurrence:
    """Fitted on the part's seen events."""
    return CoOccurrence.fit(histories_of(part), np.ones(len(part.seen_item), dtype=bool))


def cosine_of_last(vectors: np.ndarray, histories: Sequence[np.ndarray]) -> np.ndarray:
    """float32 (B, I): how close each item's text is to that of each history's last item."""
    last = np.array([history[-1] for history in histories], dtype=np.int64)
    closeness: np.ndarray = vectors[last] @ vectors.T
    return closeness


def queries_of(asked: Asked, start: int, stop: int) -> Queries:
    """The targets [start, stop) as queries."""
    return Queries(asked.histories(start, stop), asked.times(start, stop), asked.now[start:stop])


def in_blocks(scores: OfQueries) -> Scorer:
    """A scorer of targets (at least one) from one of queries."""

    def of_targets(asked: Asked) -> np.ndarray:
        starts = range(0, len(asked), BLOCK)
        return np.concatenate([scores(queries_of(asked, start, start + BLOCK)) for start in starts])

    return of_targets
