"""The cheap rows of our own: co-occurrence, closeness of texts to the last item or the last five, and the mix.

Co-occurrence and content of the last five are those of `retrieval.py`; the mix is their sum with a weight on content.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from choosing import BLOCK, Scorer, Settings, System
from exchange import Asked, Part

from mllm_srec import retrieval
from mllm_srec.data.dataset import Histories
from mllm_srec.evaluation.protocol import Scorer as OfHistories
from mllm_srec.retrieval import Content, CoOccurrence
from mllm_srec.store_files import fingerprint

WEIGHTS = (0.0, 0.5, 1.0, 2.0)
"""Of content in the mix."""


def systems(vectors: np.ndarray) -> dict[str, System]:
    """By name; `vectors` float32 (I, D), L2-normalised, of the items' texts."""
    code = [Path(str(file)).read_text(encoding="utf-8") for file in (__file__, retrieval.__file__)]
    made_of = fingerprint(*code, vectors.tobytes())
    content = Content(vectors)

    def company(part: Part, settings: Settings) -> Iterator[tuple[Settings, Scorer]]:
        yield settings, in_blocks(cooccurrence(part).scores)

    def last_item(part: Part, settings: Settings) -> Iterator[tuple[Settings, Scorer]]:
        yield settings, in_blocks(lambda histories: cosine_of_last(vectors, histories))

    def last_five(part: Part, settings: Settings) -> Iterator[tuple[Settings, Scorer]]:
        yield settings, in_blocks(content.scores)

    def mix(part: Part, settings: Settings) -> Iterator[tuple[Settings, Scorer]]:
        fitted, weight = cooccurrence(part), np.float32(settings["weight"])
        yield settings, in_blocks(lambda histories: fitted.scores(histories) + weight * content.scores(histories))

    return {
        "co-occurrence": System([{}], company, made_of),
        "content, last item": System([{}], last_item, made_of),
        "content, last 5": System([{}], last_five, made_of),
        "mix": System([{"weight": weight} for weight in WEIGHTS], mix, made_of),
    }


def cooccurrence(part: Part) -> CoOccurrence:
    """Fitted on the part's seen events."""
    sizes = np.bincount(part.seen_user)
    log = Histories(
        users=[str(user) for user in range(len(sizes))],
        items=[str(item) for item in range(part.items)],
        offsets=np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64),
        item=part.seen_item,
        time=None,
        rating=np.full(len(part.seen_item), np.nan, dtype=np.float32),
    )
    return CoOccurrence.fit(log, np.ones(len(part.seen_item), dtype=bool))


def cosine_of_last(vectors: np.ndarray, histories: Sequence[np.ndarray]) -> np.ndarray:
    """float32 (B, I): how close each item's text is to that of each history's last item."""
    last = np.array([history[-1] for history in histories], dtype=np.int64)
    closeness: np.ndarray = vectors[last] @ vectors.T
    return closeness


def in_blocks(scores: OfHistories) -> Scorer:
    """A scorer of targets (at least one) from one of histories."""

    def of_targets(asked: Asked) -> np.ndarray:
        starts = range(0, len(asked), BLOCK)
        return np.concatenate([scores(asked.histories(start, start + BLOCK)) for start in starts])

    return of_targets
