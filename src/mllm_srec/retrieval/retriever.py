"""Retrieval over the whole catalogue: four signals, each in its deviations within the user, added by chosen weights.

    score(u, i) = together / d1 + content * alike / d2 + sequence * encoder / d3 + trend * now / d4

with each signal's standard deviation over the catalogue for this user. Deviations are known without the catalogue's
row: of the sparse signals from what they name, of the encoder's inner product from the items' covariance. So the dense
part is one inner product per item, and an index over the encoder's side of it serves large catalogues (`index.py`).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np

from mllm_srec.data.dataset import Histories, Queries
from mllm_srec.errors import DataError
from mllm_srec.retrieval.index import EXACT, ItemIndex
from mllm_srec.retrieval.sequence import LENGTH, SequenceEncoder
from mllm_srec.retrieval.signals import LAST, LIKE_LAST, CoOccurrence, Likeness, Trend, best, rows_at_once

NEAR = 0.3
"""Cosine from which a history item may be named as close in content."""
STATIC = 2
"""Dimensions of the dense part that no history changes: trend and order."""
STRONG = 5000
"""Items by trend, and as many by bias, that are looked at beside what an index finds."""
REACH = max(LAST, LIKE_LAST, LENGTH)
"""Newest events of a history that any signal reads: what is older moves no score."""
ORDER = 1e-4
"""Of a deviation: what the most popular item gets, so that popularity orders what nothing else does."""


@dataclass(frozen=True)
class Mix:
    """What validation chose: weights beside co-occurrence, and the epochs of the encoder (0: there is none)."""

    content: float
    sequence: float
    trend: float
    epochs: int


@dataclass(frozen=True)
class Retriever:
    """Scores are float32 (B, I) over the catalogue for B histories (item positions, oldest first).

    `repeats`: items of the history may be recommended again.
    """

    cooccurrence: CoOccurrence
    likeness: Likeness
    trend: Trend
    encoder: SequenceEncoder | None
    mix: Mix
    repeats: bool = False
    index: ItemIndex | None = None
    """Over the encoder's item vectors, where the catalogue is too large to be scored whole."""

    @classmethod
    def fit(
        cls,
        histories: Histories,
        seen: np.ndarray,
        likeness: Likeness,
        mix: Mix,
        encoder: SequenceEncoder | None = None,
        repeats: bool = False,
    ) -> "Retriever":
        """Count the events of mask `seen` (N,); `encoder` must have been fitted on no others.

        Raises:
            DataError: the mask holds no event.
        """
        if not seen.any():
            raise DataError("no event is left to fit the retriever on: give a longer log")
        return cls(CoOccurrence.fit(histories, seen), likeness, Trend.fit(histories, seen), encoder, mix, repeats)

    def mixed(self, mix: Mix) -> "Retriever":
        """The same signals with other weights."""
        return replace(self, mix=mix)

    def indexed(self, folder: Path) -> "Retriever":
        """The same over indices in `folder` if the catalogue has more than 100,000 items; `scores` still scores all.

        Candidates then are the best of what the index finds, of the strongest by trend and by bias, and of what the
        history names. An item that no history names is among the best only by its dense part, so what `dense_best`
        and the index of the likest miss is all that is lost.
        """
        if len(self.popularity) <= EXACT:
            return self
        likeness = Likeness(self.likeness.vectors, ItemIndex(folder, self.likeness.vectors))
        encoder = self.encoder is not None and self.mix.sequence
        return replace(self, likeness=likeness, index=ItemIndex(folder, self._items) if encoder else None)

    @property
    def popularity(self) -> np.ndarray:
        """float32 (I,): seen events per item."""
        return self.cooccurrence.popularity

    def scores(self, histories: Sequence[np.ndarray]) -> np.ndarray:
        """float32 (B, I); plain histories are read without times, as of the end of the log."""
        of = Queries.of(histories)
        scores: np.ndarray = self._dense_queries(of) @ self._dense_items.T
        moments = self.trend.at(of.now, len(of))
        earlier = np.flatnonzero(moments < len(self._trend) - 1)
        scores[earlier] += self._trend[moments[earlier]] - self._trend[-1]
        if self.mix.content:
            self.likeness.prepare(of)
        for row, history in zip(scores, of, strict=True):
            for items, values in self.named(history):
                row[items] += values
        return scores

    def encoder_scores(self, histories: Sequence[np.ndarray]) -> np.ndarray:
        """float32 (B, I): what the sequence encoder says alone, 0 without one."""
        if self.encoder is None:
            return np.zeros((len(histories), len(self.popularity)), dtype=np.float32)
        scores: np.ndarray = self.encoder.queries(Queries.of(histories)) @ self._items.T
        return scores

    def encoded(self, queries: Queries) -> np.ndarray:
        """float32 (B, W): what the encoder's item vectors are multiplied by, weight and deviation in it."""
        assert self.encoder is not None
        vectors = self.encoder.queries(queries)
        deviation = np.sqrt(np.einsum("bw,wv,bv->b", vectors, self._covariance, vectors).clip(0))
        scale = np.divide(self.mix.sequence, deviation, out=np.zeros_like(deviation), where=deviation > 1e-9)
        scaled: np.ndarray = vectors * scale[:, None].astype(np.float32)
        return scaled

    def named(self, history: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Per sparse signal that counts: the items it names for this history, each once, and what they get."""
        for signal, weight in ((self.cooccurrence, 1.0), (self.likeness, self.mix.content)):
            if weight:
                items, values = signal.named(history)
                deviation = _deviation(values, len(self.popularity))
                if deviation > 0:
                    yield items, np.float32(weight / deviation) * values

    @cached_property
    def _items(self) -> np.ndarray:
        assert self.encoder is not None
        return self.encoder.items()

    @cached_property
    def _covariance(self) -> np.ndarray:
        """float64 (W, W) of the items' vectors: the variance of q . item over the catalogue is q' C q."""
        covariance: np.ndarray = np.cov(self._items.astype(np.float64).T, bias=True)
        return covariance

    @cached_property
    def _order(self) -> np.ndarray:
        order: np.ndarray = np.float32(ORDER) * self.popularity / max(float(self.popularity.max()), 1.0)
        return order

    @cached_property
    def _trend(self) -> np.ndarray:
        values = self.trend.values
        deviation = values.std(1, keepdims=True)
        scale = np.divide(self.mix.trend, deviation, out=np.zeros_like(deviation), where=deviation > 0)
        scaled: np.ndarray = values * scale.astype(np.float32)
        return scaled

    def _blocks(self, histories: Sequence[np.ndarray]) -> Iterator[tuple[int, Queries]]:
        of, step = Queries.of(histories), rows_at_once(len(self.popularity))
        for start in range(0, len(of), step):
            yield start, of[start : start + step]

    def candidates(self, histories: Sequence[np.ndarray], k: int) -> tuple[np.ndarray, np.ndarray]:
        """The best items (outside each history unless `repeats`), int32 (B, k), best first, ties by position; and their
        scores, float32.

        Raises:
            DataError: fewer than `k` items are left for some history.
        """
        items = np.zeros((len(histories), k), dtype=np.int32)
        values = np.zeros((len(histories), k), dtype=np.float32)
        for start, block in self._blocks(histories):
            for history in block:
                if len(self.popularity) - len(history) >= k:
                    continue
                left = len(self.popularity) - len(self._barred(history))
                if left < k:
                    raise DataError(
                        f"only {left} items are left to recommend, {k} are asked for: lower retrieval.candidates"
                    )
            found = self._found(block, k) if self.likeness.index else self._best(block, k)
            items[start : start + len(block)], values[start : start + len(block)] = found
        return items, values

    def _barred(self, history: np.ndarray) -> np.ndarray:
        return history[:0] if self.repeats else np.unique(history)

    def _best(self, block: Queries, k: int) -> tuple[np.ndarray, np.ndarray]:
        scores = self.scores(block)
        if not self.repeats:
            for row, history in zip(scores, block, strict=True):
                row[history] = -np.inf
        return best(scores, k)

    def _found(self, block: Queries, k: int) -> tuple[np.ndarray, np.ndarray]:
        """As `_best`, of what the index finds, what is strong for everybody, and what histories name."""
        items = np.zeros((len(block), k), dtype=np.int32)
        values = np.zeros((len(block), k), dtype=np.float32)
        dense, moments = self._dense_queries(block), self.trend.at(block.now, len(block))
        for at, history in enumerate(block):
            barred, named = self._barred(history), list(self.named(history))
            found = self.dense_best(dense[at], k + len(barred))
            pool = np.setdiff1d(np.concatenate([found, *(of for of, _ in named)]), barred)
            if len(pool) < k:  # more than the partitions hold that are looked into
                items[at : at + 1], values[at : at + 1] = self._best(block[at : at + 1], k)
                continue
            scores = self._trend[moments[at], pool] + self._order[pool]
            scores += self._dense_items[pool, :-STATIC] @ dense[at, :-STATIC]
            for of, gains in named:
                open_items = ~np.isin(of, barred)
                scores[np.searchsorted(pool, of[open_items])] += gains[open_items]
            place, values[at] = (of[0] for of in best(scores[None], k))
            items[at] = pool[place]
        return items, values

    def dense_best(self, query: np.ndarray, count: int) -> np.ndarray:
        """int64 (at most `count`,): items with the largest inner product of `_dense_items` and `query` (W + 2,), nearly
        always: of those that the index finds by the encoder's part and those that are strong for everybody."""
        strong = (self._always_items @ query)[None]
        kept = self._always[best(strong, min(count, strong.shape[1]))[0][0]]
        found = [] if self.index is None else self.index.search(query[None, :-STATIC], count)
        pool = np.unique(np.concatenate([kept, *found]))
        items: np.ndarray = pool[np.argsort(-(self._dense_items[pool] @ query), kind="stable")[:count]]
        return items

    @cached_property
    def _always(self) -> np.ndarray:
        """int64 (N,), ascending: the items with the largest trend, and those with the largest bias of the encoder. An
        index of directions misses what is strong by one number alone."""
        strong = [self._dense_items[:, -STATIC:].sum(1)]
        if self.index is not None:
            strong.append(self._items[:, -1])
        kept = min(STRONG, len(self.popularity))
        positions: np.ndarray = np.unique(np.concatenate([best(values[None], kept)[0][0] for values in strong]))
        return positions

    @cached_property
    def _always_items(self) -> np.ndarray:
        items: np.ndarray = self._dense_items[self._always]
        return items

    def _dense_queries(self, queries: Queries) -> np.ndarray:
        """float32 (B, W + 2): inner products with `_dense_items` are the score but for what histories name."""
        encoder = self.encoder is not None and self.mix.sequence
        encoded = self.encoded(queries) if encoder else np.zeros((len(queries), 0), dtype=np.float32)
        return np.concatenate([encoded, np.ones((len(queries), STATIC), dtype=np.float32)], axis=1)

    @cached_property
    def _dense_items(self) -> np.ndarray:
        """float32 (I, W + 2): the encoder's side, the newest trend, and popularity's order."""
        encoder = self.encoder is not None and self.mix.sequence
        items = self._items if encoder else np.zeros((len(self.popularity), 0), dtype=np.float32)
        return np.concatenate([items, self._trend[-1][:, None], self._order[:, None]], axis=1)

    def falls(self, asked: Queries, items: Sequence[int]) -> np.ndarray:
        """float32 (K, n): how far the score of each of `items` falls if the user asked about, one with n events, had
        never chosen the item of one event; of all events with it where it was chosen more than once."""
        history, now = asked[0], asked.now
        of = np.asarray(items, dtype=np.int64)
        first = max(0, len(history) - REACH)
        kept = [history != item for item in history[first:].tolist()]
        times = None if asked.times is None else [asked.times[0][rows] for rows in kept]
        less = Queries([history[rows] for rows in kept], times, None if now is None else np.repeat(now, len(kept)))
        falls = np.zeros((len(of), len(history)), dtype=np.float32)
        whole = self.scores(asked)[0, of]
        for start, block in self._blocks(less):
            falls[:, first + start : first + start + len(block)] = whole[:, None] - self.scores(block)[:, of].T
        return falls

    def nearest_events(
        self, history: np.ndarray, item: int, shared: np.ndarray, falls: np.ndarray
    ) -> tuple[int | None, int | None]:
        """The history item that stands for those that occur with `item`, and the one that stands for those close to it
        in content; None where none does.

        Of those that occur with it the first one is that without which its score would fall furthest, times what the
        two have in common: what is chosen by many occurs with everything. Where no such event moves the score the
        strength of the pair stands in for the fall; without anything in common it is the fall alone, then the strength.
        The second one is that of the greatest fall times cosine, else of the greatest cosine.

        Args:
            shared, falls: float (n,), as long as the history: what each event has in common with the item, and how far
                the item's score falls without it (`falls`).
        """
        if len(history) == 0:
            return None, None
        company, strength = self.cooccurrence.company(item)
        known = dict(zip(company.tolist(), strength.tolist(), strict=True))
        newest_first, common, moved = history[::-1].tolist(), shared[::-1], falls[::-1].clip(0)
        strengths = np.array([known.get(event, 0.0) for event in newest_first])
        moves = np.where(strengths > 0, moved, 0)
        together = int(np.lexsort((-strengths, -moves, -strengths * common, -moves * common))[0])
        cosine = self.likeness.vectors[newest_first] @ self.likeness.vectors[item]
        near = np.where(cosine >= NEAR, cosine, 0)
        kin = int(np.lexsort((-near, -moved * near))[0])
        return (
            newest_first[together] if strengths[together] > 0 else None,
            newest_first[kin] if near[kin] > 0 else None,
        )


def _deviation(values: np.ndarray, count: int) -> float:
    """Standard deviation of a row of `count` numbers that is 0 but for `values`."""
    total, squares = float(values.sum(dtype=np.float64)), float(np.square(values, dtype=np.float64).sum())
    return float(np.sqrt(max(squares / count - (total / count) ** 2, 0.0)))
