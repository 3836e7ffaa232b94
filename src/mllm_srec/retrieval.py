"""Retrieval over the whole catalogue: co-occurrence in the log plus content, mixed by a weight chosen on validation.

Scores are float32 (B, I) over the catalogue for B histories (item positions, oldest first); masking what was seen is
the caller's business in `scores`, and done in `candidates` and `negatives`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mllm_srec import metrics
from mllm_srec.data.dataset import Histories
from mllm_srec.data.split import Split
from mllm_srec.errors import DataError

LAST = 5
"""Newest history items that both signals look at."""
CONTENT_WEIGHTS = np.array([0.2, 0.4, 0.6, 0.8, 1.0], dtype=np.float32)
"""Weights of the last five items, oldest first."""
COMPANY_LAST = 50
COMPANY_APART = 10
POPULARITY_WEIGHT = 1e-6
"""Orders what co-occurrence says nothing about."""
NEAR = 0.3
"""Cosine from which a history item may be named as close in content."""
BLOCK = 256


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

    def company(self, item: int) -> tuple[np.ndarray, np.ndarray]:
        """Positions of the items that occur with `item`, and their strengths."""
        own = slice(self.starts[item], self.starts[item + 1])
        return self.neighbour[own], self.strength[own]


@dataclass(frozen=True)
class Content:
    """Closeness of texts; vectors float32 (I, D), L2-normalised."""

    vectors: np.ndarray

    def scores(self, histories: Sequence[np.ndarray]) -> np.ndarray:
        """float32 (B, I): sum over the last five items of weight * cosine cubed, newer items weighing more."""
        scores = np.zeros((len(histories), len(self.vectors)), dtype=np.float32)
        for row, history in zip(scores, histories, strict=True):
            last = history[-LAST:]
            if len(last):
                row += CONTENT_WEIGHTS[-len(last) :] @ (self.vectors[last] @ self.vectors.T) ** 3
        return scores


@dataclass(frozen=True)
class Retriever:
    """score = co-occurrence + weight * content."""

    cooccurrence: CoOccurrence
    content: Content
    weight: float

    @classmethod
    def fit(cls, histories: Histories, seen: np.ndarray, vectors: np.ndarray, weight: float) -> "Retriever":
        """Fit on the events of mask `seen` (N,).

        Raises:
            DataError: the mask holds no event.
        """
        if not seen.any():
            raise DataError("no event is left to fit the retriever on: give a longer log")
        return cls(CoOccurrence.fit(histories, seen), Content(vectors), weight)

    @property
    def popularity(self) -> np.ndarray:
        """float32 (I,): seen events per item."""
        return self.cooccurrence.popularity

    def scores(self, histories: Sequence[np.ndarray]) -> np.ndarray:
        """float32 (B, I)."""
        return self.cooccurrence.scores(histories) + np.float32(self.weight) * self.content.scores(histories)

    def candidates(self, histories: Sequence[np.ndarray], k: int) -> tuple[np.ndarray, np.ndarray]:
        """The best items outside each history, int32 (B, k), best first, ties by position; and their scores, float32.

        Raises:
            DataError: fewer than `k` items are left for some history.
        """
        items = np.zeros((len(histories), k), dtype=np.int32)
        values = np.zeros((len(histories), k), dtype=np.float32)
        for start in range(0, len(histories), BLOCK):
            block = histories[start : start + BLOCK]
            scores = self.scores(block)
            for at, (row, history) in enumerate(zip(scores, block, strict=True), start=start):
                left = len(row) - len(np.unique(history))
                if left < k:
                    raise DataError(
                        f"only {left} items are left to recommend, {k} are asked for: lower retrieval.candidates"
                    )
                row[history] = -np.inf
                best = np.argsort(-row, kind="stable")[:k]
                items[at], values[at] = best, row[best]
        return items, values

    def negatives(self, histories: Sequence[np.ndarray], targets: np.ndarray, count: int, seed: int) -> np.ndarray:
        """int32 (B, count): items outside history and target, each once; half from the best candidates, half uniform.

        The hard half is drawn from the 4 * count best, so that one list of look-alikes does not stand for all.

        Raises:
            DataError: the catalogue is too small.
        """
        generator = np.random.default_rng(seed)
        hard = (count + 1) // 2
        negatives = np.zeros((len(histories), count), dtype=np.int32)
        for start in range(0, len(histories), BLOCK):
            block = histories[start : start + BLOCK]
            for at, (row, history) in enumerate(zip(self.scores(block), block, strict=True), start=start):
                free = np.ones(len(row), dtype=bool)
                free[history] = False
                free[targets[at]] = False
                open_items = np.flatnonzero(free)
                if len(open_items) < count:
                    raise DataError(
                        f"only {len(open_items)} items can be negatives, {count} are asked for: "
                        "lower training.negatives"
                    )
                best = open_items[np.argsort(-row[open_items], kind="stable")[: 4 * count]]
                chosen = generator.permutation(best)[:hard]
                free[chosen] = False
                rest = generator.choice(np.flatnonzero(free), count - len(chosen), replace=False)
                negatives[at] = np.concatenate([chosen, rest])
        return negatives

    def nearest_events(self, history: np.ndarray, item: int) -> tuple[int | None, int | None]:
        """The history item that occurs most with `item`, and the one closest to it in content; None where none does."""
        if len(history) == 0:
            return None, None
        company, strength = self.cooccurrence.company(item)
        known = dict(zip(company.tolist(), strength.tolist(), strict=True))
        newest_first = history[::-1].tolist()
        together = max(newest_first, key=lambda i: known.get(i, 0.0))
        cosine = self.content.vectors[newest_first] @ self.content.vectors[item]
        kin = int(cosine.argmax())
        return (
            together if known.get(together, 0.0) > 0 else None,
            newest_first[kin] if cosine[kin] >= NEAR else None,
        )


def choose_content_weight(
    histories: Histories, split: Split, vectors: np.ndarray, weights: Sequence[float], cutoff: int = 10
) -> float:
    """The weight with the best NDCG@`cutoff` on all validation targets, fitted before validation; ties: the smaller.

    Without validation targets there is nothing to choose by: 1.0, or the weight closest to it.
    """
    targets = split.validation
    if len(targets) == 0:
        return min(weights, key=lambda weight: (abs(weight - 1.0), weight))
    retriever = Retriever.fit(histories, split.seen_validation, vectors, 1.0)
    total = dict.fromkeys(sorted(weights), 0.0)
    for start in range(0, len(targets), BLOCK):
        block = targets.take(np.arange(start, min(start + BLOCK, len(targets))))
        seen = [histories.of(int(u), int(e)) for u, e in zip(block.user, block.end, strict=True)]
        wanted = histories.item[histories.offsets[block.user] + block.position]
        company, content = retriever.cooccurrence.scores(seen), retriever.content.scores(seen)
        for weight in total:
            greater, ties = metrics.places(company + np.float32(weight) * content, wanted, seen)
            total[weight] += float(metrics.ndcg(greater, ties, cutoff).sum())
    return max(total, key=lambda weight: (round(total[weight], 9), -weight))
