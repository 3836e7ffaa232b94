"""Signals of retrieval that need no training: what is chosen together, what is alike, what is chosen now.

Two of them are sparse: the newest items of a history name others with strengths. The third is the same for all who ask
at the same time.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from mllm_srec.data.dataset import Histories
from mllm_srec.retrieval.index import ItemIndex

LAST = 5
"""Newest history items whose company counts."""
POPULARITY_WEIGHT = 1e-6
"""Orders what co-occurrence says nothing about."""
COMPANY_LAST = 50
COMPANY_APART = 10
LIKE_LAST = 10
"""Newest history items whose likeness counts, the newest fully, each older one FADE times the next."""
FADE = 0.8
SHARPNESS = 5
"""Power of the cosine: one close item says more than many faint ones."""
NEIGHBOURS = 200
"""Likest items that are kept of each."""
DAY = 86_400_000
TREND_DAYS = 7.0
"""After so many days an event counts 1 / e."""
TREND_CELLS = 1 << 24
"""Bounds moments times items of the trend."""
BLOCK_CELLS = 1 << 24
"""Bounds rows times items of what is computed together."""


def rows_at_once(items: int) -> int:
    """Rows of the catalogue's width that are held in memory together."""
    return max(1, min(256, BLOCK_CELLS // max(items, 1)))


@dataclass(frozen=True)
class CoOccurrence:
    """Item pairs that stand close to each other in histories, as a sparse symmetric matrix in CSR form.

    starts int64 (I + 1,); neighbour int32 and strength float32 (P,); popularity float32 (I,).
    """

    starts: np.ndarray
    neighbour: np.ndarray
    strength: np.ndarray
    popularity: np.ndarray

    @classmethod
    def fit(cls, histories: Histories, seen: np.ndarray) -> "CoOccurrence":
        """Count pairs at most 10 apart among the last 50 seen events of each user.

        strength(i, j) = count(i, j) / sqrt(popularity(i) * popularity(j)), popularity = number of seen events.
        """
        count = len(histories.items)
        owner = np.repeat(np.arange(len(histories.users)), np.diff(histories.offsets))[seen]
        item = histories.item[seen].astype(np.int64)
        popularity = np.bincount(item, minlength=count).astype(np.float32)
        sizes = np.bincount(owner, minlength=len(histories.users))
        left = np.repeat(np.cumsum(sizes), sizes) - np.arange(len(item))  # events from here to the user's last
        owner, item = owner[left <= COMPANY_LAST], item[left <= COMPANY_LAST]
        keys = []
        for apart in range(1, COMPANY_APART + 1):
            a, b = item[:-apart], item[apart:]
            pair = (owner[:-apart] == owner[apart:]) & (a != b)
            keys += [a[pair] * count + b[pair], b[pair] * count + a[pair]]
        pairs, times = np.unique(np.concatenate(keys), return_counts=True)
        one, other = np.divmod(pairs, count)
        strength = times / np.sqrt(popularity[one] * popularity[other])
        starts = np.concatenate([[0], np.cumsum(np.bincount(one, minlength=count))])
        return cls(starts.astype(np.int64), other.astype(np.int32), strength.astype(np.float32), popularity)

    def scores(self, histories: Sequence[np.ndarray]) -> np.ndarray:
        """float32 (B, I): strength summed over each history's last five items, + 1e-6 * popularity."""
        scores = np.repeat(POPULARITY_WEIGHT * self.popularity[None], len(histories), 0)
        for row, history in zip(scores, histories, strict=True):
            for item in history[-LAST:]:
                company, strength = self.company(int(item))
                row[company] += strength
        return scores

    def named(self, history: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Items that occur with the last five of a history, each once, and the square root of their strengths' sum.

        The root keeps one strong pair from drowning all the rest of the mix.
        """
        parts = [self.company(int(item)) for item in history[-LAST:]]
        items, strengths = _summed(parts, len(self.popularity))
        return items, np.sqrt(strengths)

    def company(self, item: int) -> tuple[np.ndarray, np.ndarray]:
        """Positions of the items that occur with `item`, and their strengths."""
        own = slice(self.starts[item], self.starts[item + 1])
        return self.neighbour[own], self.strength[own]


class Likeness:
    """The 200 likest items of each item by content, itself among them; found when an item is first asked about.

    Exactly, or from an `index` over the vectors where the catalogue is large.
    """

    def __init__(self, vectors: np.ndarray, index: ItemIndex | None = None) -> None:
        """`vectors` float32 (I, D), L2-normalised."""
        self.vectors = vectors
        self.index = index
        count = len(vectors)
        self.kept = min(NEIGHBOURS, count)
        self._sizes = np.zeros(count, dtype=np.int64)
        self._neighbour = np.empty((count, self.kept), dtype=np.int32)
        self._cosine = np.empty((count, self.kept), dtype=np.float32)

    def neighbours(self, items: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
        """Of each item: the likest, int32 (n,), likest first, ties by position, and cosines >= 0, float32 (n,)."""
        missing = items[self._sizes[items] == 0]
        if len(missing):
            self._find(np.unique(missing))
        sizes = self._sizes[items].tolist()
        return [
            (self._neighbour[item, :size], self._cosine[item, :size])
            for item, size in zip(items.tolist(), sizes, strict=True)
        ]

    def _find(self, items: np.ndarray) -> None:
        step = rows_at_once(len(self.vectors))
        for start in range(0, len(items), step):
            rows = items[start : start + step]
            if self.index is None:
                near, cosine = best(self.vectors[rows] @ self.vectors.T, self.kept)
                self._neighbour[rows], self._cosine[rows] = near, cosine.clip(0)
                self._sizes[rows] = self.kept
                continue
            for row, pool in zip(rows, self.index.search(self.vectors[rows], self.kept), strict=True):
                size, pool = len(pool), np.sort(pool)  # an index may find fewer than it is asked for
                place, cosine = best((self.vectors[pool] @ self.vectors[row])[None], size)
                self._neighbour[row, :size], self._cosine[row, :size] = pool[place[0]], cosine[0].clip(0)
                self._sizes[row] = size

    def named(self, history: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Items like the last ten of a history, each once, and sum of .8^age * cosine^5 over them."""
        last = history[-LIKE_LAST:]
        fade = FADE ** np.arange(len(last) - 1, -1, -1, dtype=np.float32)
        parts = [
            (near, weight * cosine**SHARPNESS)
            for weight, (near, cosine) in zip(fade, self.neighbours(last), strict=True)
        ]
        return _summed(parts, len(self.vectors))

    def scores(self, histories: Sequence[np.ndarray]) -> np.ndarray:
        """float32 (B, I): what `named` says, 0 elsewhere."""
        scores = np.zeros((len(histories), len(self.vectors)), dtype=np.float32)
        self.prepare(histories)
        for row, history in zip(scores, histories, strict=True):
            items, values = self.named(history)
            row[items] = values
        return scores

    def prepare(self, histories: Sequence[np.ndarray]) -> None:
        """Find the neighbours that `named` will ask for in one go."""
        if len(histories):
            self.neighbours(np.concatenate([history[-LIKE_LAST:] for history in histories]))


@dataclass(frozen=True)
class Trend:
    """How much each item is chosen at some moments: sum of exp(-days since / 7) over earlier events.

    moments int64 (G,), ms UTC, ascending; values float32 (G, I), square roots of the sums, of events before each moment
    alone. Without times there is one moment and every event counts fully: popularity.
    """

    moments: np.ndarray
    values: np.ndarray

    @classmethod
    def fit(cls, histories: Histories, seen: np.ndarray) -> "Trend":
        """From the events of mask `seen` (N,), at moments with equally many events between them, and after the last."""
        count = len(histories.items)
        if histories.time is None:
            popularity = np.bincount(histories.item[seen], minlength=count)
            return cls(np.zeros(1, dtype=np.int64), np.sqrt(popularity)[None].astype(np.float32))
        order = np.argsort(histories.time[seen], kind="stable")
        time, item = histories.time[seen][order], histories.item[seen][order]
        inner = time[np.linspace(0, len(time) - 1, max(1, min(1024, TREND_CELLS // count) - 1)).astype(np.int64)]
        moments = np.unique(np.append(inner, time[-1] + 1))
        values = np.zeros((len(moments), count), dtype=np.float32)
        now = np.zeros(count)
        done, before = 0, int(moments[0])
        for row, moment in zip(values, moments.tolist(), strict=True):
            now *= np.exp((before - moment) / (TREND_DAYS * DAY))
            until = int(np.searchsorted(time, moment, side="left"))
            weights = np.exp((time[done:until] - moment) / (TREND_DAYS * DAY))
            now += np.bincount(item[done:until], weights=weights, minlength=count)
            row[:] = np.sqrt(now)
            done, before = until, moment
        return cls(moments, values)

    def at(self, now: np.ndarray | None, count: int) -> np.ndarray:
        """int64 (B,): the row of `values` for each of `count` queries: of the newest moment not after `now`, ms UTC
        (B,), the first if there is none; the last where it is not known when they ask."""
        if now is None:
            return np.full(count, len(self.moments) - 1)
        rows: np.ndarray = np.maximum(np.searchsorted(self.moments, now, side="right") - 1, 0)
        return rows


def best(scores: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Positions, int32 (B, k), and values of each row's largest, best first; among equals the first position."""
    # All that reach the k-th value, so that ties at the border are settled by position.
    border = torch.from_numpy(scores).topk(k, sorted=False).values.amin(1).numpy()
    items = np.zeros((len(scores), k), dtype=np.int32)
    for at, (row, least) in enumerate(zip(scores, border, strict=True)):
        reached = np.flatnonzero(row >= least)
        items[at] = reached[np.argsort(-row[reached], kind="stable")[:k]]
    return items, np.take_along_axis(scores, items, 1)


def _summed(parts: Sequence[tuple[np.ndarray, np.ndarray]], count: int) -> tuple[np.ndarray, np.ndarray]:
    """Items of all parts, each once in any order, and the float32 sums of their values.

    A part names no item twice; `count` is the size of the catalogue.
    """
    if not parts:
        return np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.float32)
    items = np.concatenate([items for items, _ in parts])
    # Sorting would cost more than all the rest: of what stands twice the last place is kept.
    place = np.empty(count, dtype=np.int64)
    order = np.arange(len(items))
    place[items] = order
    items = items[place[items] == order]
    sums = np.empty(count, dtype=np.float32)
    sums[items] = 0
    for part, values in parts:
        sums[part] += values
    return items.astype(np.int64), sums[items]
