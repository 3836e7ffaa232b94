"""Negatives of training rows: items that a user did not choose, of several kinds in fixed shares, seeded.

`hard` ones stand in the list that is reranked, so they look right to retrieval; `popular` ones are chosen by many
others, so popularity alone is no answer; `uniform` ones show what the rest of the catalogue is like; `disliked` ones
(task `liked`) are the user's own low ratings.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mllm_srec.data.dataset import Queries
from mllm_srec.errors import DataError
from mllm_srec.retrieval import Retriever
from mllm_srec.retrieval.signals import rows_at_once

KINDS = ("hard", "popular", "uniform", "disliked")
HARD, POPULAR, UNIFORM, DISLIKED = range(len(KINDS))
TURNS = (HARD, POPULAR, HARD, UNIFORM)
TURNS_WITH_DISLIKED = (HARD, DISLIKED, POPULAR, HARD, DISLIKED, UNIFORM)


@dataclass(frozen=True)
class Negatives:
    """items int32 (T, N) catalogue positions, each once per row and none in history or target; kinds int8 (T, N), which
    of `KINDS`; retrieval float32 (T, 1 + N), retrieval's scores of the target and of the negatives in standard
    deviations of the user's candidate list, its mean being 0."""

    items: np.ndarray
    kinds: np.ndarray
    retrieval: np.ndarray


def draw(
    retriever: Retriever,
    queries: Queries,
    targets: np.ndarray,
    count: int,
    depth: int,
    seed: int,
    disliked: Sequence[np.ndarray] | None = None,
) -> Negatives:
    """`count` negatives for each target, int (T,), from a `retriever` that has seen none of them.

    The kinds take turns as `TURNS` says: ranking tells hard ones from each other, so they are half. Disliked ones are
    drawn where `disliked` (per target the items that the user rated low and is not shown) are given. Where a kind has
    nothing left its turn goes to the next one.

    Args:
        depth: length of the candidate list that hard negatives are drawn from.

    Raises:
        DataError: the catalogue is too small.
    """
    generator = np.random.default_rng(seed)
    turns = TURNS if disliked is None else TURNS_WITH_DISLIKED
    items = np.zeros((len(targets), count), dtype=np.int32)
    kinds = np.zeros((len(targets), count), dtype=np.int8)
    retrieval = np.zeros((len(targets), 1 + count), dtype=np.float32)
    step = rows_at_once(len(retriever.popularity))
    for start in range(0, len(targets), step):
        block = queries[start : start + step]
        for at, (scores, history) in enumerate(zip(retriever.scores(block), block, strict=True), start=start):
            free = np.ones(len(scores), dtype=bool)
            if not retriever.repeats:
                free[history] = False
            listed = _best(scores, free, depth)
            free[history] = free[targets[at]] = False
            if free.sum() < count:
                raise DataError(
                    f"only {free.sum()} items can be negatives, {count} are asked for: lower training.negatives"
                )
            low = np.zeros(0, dtype=np.int32) if disliked is None else disliked[at]
            orders = _orders(retriever.popularity, free, listed, low, generator)
            items[at], kinds[at] = _take_turns(orders, turns, free, count)
            of_list = scores[listed]
            wanted = scores[[targets[at], *items[at]]]
            retrieval[at] = (wanted - of_list.mean()) / max(float(of_list.std()), 1e-9)
    return Negatives(items, kinds, retrieval)


def _best(scores: np.ndarray, free: np.ndarray, depth: int) -> np.ndarray:
    """The candidate list: the `depth` best of the free items, best first, ties by position."""
    open_items = np.flatnonzero(free)
    best: np.ndarray = open_items[np.argsort(-scores[open_items], kind="stable")[:depth]]
    return best


def _orders(
    popularity: np.ndarray, free: np.ndarray, listed: np.ndarray, low: np.ndarray, generator: np.random.Generator
) -> list[np.ndarray]:
    """Per kind all items that may be drawn, in the order in which they are."""
    open_items = np.flatnonzero(free)
    # Without replacement with chances proportional to popularity: the largest of log(popularity) + Gumbel noise.
    keys = np.log(np.maximum(popularity[open_items], 1e-9)) + generator.gumbel(size=len(open_items))
    return [
        generator.permutation(listed),
        open_items[np.argsort(-keys)],
        generator.permutation(open_items),
        generator.permutation(low),
    ]


def _take_turns(
    orders: Sequence[np.ndarray], turns: Sequence[int], free: np.ndarray, count: int
) -> tuple[list[int], list[int]]:
    left, queues = free.copy(), [iter(order.tolist()) for order in orders]
    items: list[int] = []
    kinds: list[int] = []
    while len(items) < count:
        for kind in turns:
            item = next((i for i in queues[kind] if left[i]), None)
            if item is not None and len(items) < count:
                left[item] = False
                items.append(item)
                kinds.append(kind)
    return items, kinds
