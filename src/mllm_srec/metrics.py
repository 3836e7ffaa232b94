"""Ranking metrics for one relevant item among the full catalogue, and bootstrap intervals over users.

Full catalogue: every item the user has not seen competes, none is sampled (sampled metrics can order systems wrongly,
Krichene & Rendle, KDD 2020). Ties count by expectation over random orders: a metric is its mean over all orders of the
items tied with the target (McSherry & Najork, ECIR 2008), so a constant scorer gets exactly chance.

Everything starts from a target's place, (greater, ties): with g items strictly above the target and t others tied with
it, the target's rank is uniform on g + 1 .. g + t + 1.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

DRAWS = 1 << 22
"""Users drawn at a time by the bootstrap; bounds its memory."""


@dataclass(frozen=True)
class Interval:
    """A mean with its 95 % interval."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class Paired:
    """A mean difference with its 95 % interval and two-sided p-value."""

    mean: float
    low: float
    high: float
    p_value: float


def places(
    scores: np.ndarray, target: np.ndarray, seen: Sequence[np.ndarray] | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Where each target stands among the items that are not masked.

    A target that is itself masked (possible where repeats are kept) cannot be recommended, so it stands behind the
    whole catalogue: greater = I, ties = 0, out of reach of every cutoff k <= I.

    Args:
        scores: (B, I), higher is better; -inf is allowed. Not modified.
        target: int (B,), item positions.
        seen: B int arrays of item positions to mask, repeats allowed; None masks nothing.

    Returns:
        greater: int64 (B,), unmasked items strictly above the target.
        ties: int64 (B,), unmasked other items tied with it.

    Raises:
        ValueError: a score is NaN, a target is not a position of the catalogue, or the lengths differ.
    """
    if scores.ndim != 2 or target.shape != scores.shape[:1] or (seen is not None and len(seen) != len(scores)):
        masks = "" if seen is None else f", seen {len(seen)} histories"
        raise ValueError(f"lengths differ: scores are {scores.shape}, target {target.shape}{masks}")
    count = scores.shape[1]
    wrong = np.flatnonzero((target < 0) | (target >= count))
    if len(wrong):
        raise ValueError(f"target {target[wrong[0]]} of row {wrong[0]} is not one of the {count} items")
    broken = np.flatnonzero(np.isnan(scores).any(1))
    if len(broken):
        raise ValueError(f"scores of row {broken[0]} hold NaN: a scorer gives every item a number, -inf at the least")
    rows = np.arange(len(scores))
    own = scores[rows, target][:, None]
    above, equal = scores > own, scores == own
    masked = np.zeros(len(scores), dtype=bool)
    for row, items in enumerate(seen or ()):
        above[row, items] = False
        equal[row, items] = False
        masked[row] = not equal[row, target[row]]
    greater = np.where(masked, count, np.count_nonzero(above, axis=1))
    ties = np.where(masked, 0, np.count_nonzero(equal, axis=1) - 1)
    return greater.astype(np.int64), ties.astype(np.int64)


def recall(greater: np.ndarray, ties: np.ndarray, k: int) -> np.ndarray:
    """float64 (B,): Recall@k (with one relevant item also the hit rate), the chance that rank <= k.

    min(max(k - g, 0), t + 1) / (t + 1) for g = greater, t = ties.

    Raises:
        ValueError: k < 1.
    """
    _check_cutoff(k)
    chance: np.ndarray = np.clip(k - greater, 0, ties + 1) / (ties + 1)
    return chance


def ndcg(greater: np.ndarray, ties: np.ndarray, k: int) -> np.ndarray:
    """float64 (B,): NDCG@k with gain 1 / log2(1 + rank) up to rank k; one relevant item, so the ideal DCG is 1.

    (D(min(g + t + 1, k)) - D(min(g, k))) / (t + 1) with D(n) = sum of 1 / log2(1 + r) over r = 1 .. n
    (Järvelin & Kekäläinen, TOIS 2002).

    Raises:
        ValueError: k < 1.
    """
    _check_cutoff(k)
    end = np.minimum(greater + ties + 1, k)
    mean: np.ndarray = _gain_between(_discount, np.minimum(greater, k), end) / (ties + 1)
    return mean


def mrr(greater: np.ndarray, ties: np.ndarray) -> np.ndarray:
    """float64 (B,): reciprocal rank without a cutoff.

    (H(g + t + 1) - H(g)) / (t + 1) with the harmonic numbers H(n) = sum of 1 / r over r = 1 .. n.
    """
    mean: np.ndarray = _gain_between(np.reciprocal, greater, greater + ties + 1) / (ties + 1)
    return mean


def auc(greater: np.ndarray, ties: np.ndarray, candidates: int | np.ndarray) -> np.ndarray:
    """float64 (B,): the chance that the target stands above a random other candidate, a tie counting one half.

    1 - (g + t / 2) / (candidates - 1), never below 0: a masked target stands behind more items than compete. A target
    without competitors gets 1.

    Args:
        candidates: unmasked items, the target included; one number, or int (B,).
    """
    others = np.maximum(np.asarray(candidates) - 1, 1)
    chance: np.ndarray = np.maximum(1 - (greater + ties / 2) / others, 0.0)
    return chance


def bootstrap(values: np.ndarray, users: np.ndarray, samples: int, seed: int) -> Interval:
    """95 % percentile bootstrap of the mean that resamples users, so that a user's targets stay together.

    A resample draws as many users as there are, with replacement; its mean is the sum of its values over its number of
    targets (cluster bootstrap: Davison & Hinkley, Bootstrap Methods and their Application, 1997, 3.8). The same users
    and seed give the same resamples, whatever the values.

    Args:
        values: (T,), one per target.
        users: int (T,), whose target it is.
        samples: number of resamples.

    Raises:
        ValueError: nothing to resample, lengths that differ, a value that is not finite, or samples < 1.
    """
    _check_resampling(users, samples, values=values)
    means = _resampled_means(values, users, samples, seed)
    low, high = np.percentile(means, (2.5, 97.5))
    return Interval(float(np.mean(values)), float(low), float(high))


def paired_bootstrap(a: np.ndarray, b: np.ndarray, users: np.ndarray, samples: int, seed: int) -> Paired:
    """`bootstrap` of the mean of a - b, two systems on the same targets, with a two-sided p-value.

    p = min(1, 2 min((1 + #{mean <= 0}) / (n + 1), (1 + #{mean >= 0}) / (n + 1))) over the n resampled means, so it is
    never 0 (Davison & Hinkley 1997, 4.2).

    Args:
        a: (T,), one value per target.
        b: (T,), the other system's value of the same target.
        users: int (T,), whose target it is.
        samples: number of resamples, n.

    Raises:
        ValueError: nothing to resample, lengths that differ, a value that is not finite, or samples < 1.
    """
    _check_resampling(users, samples, a=a, b=b)
    difference = np.asarray(a, dtype=np.float64) - b
    means = _resampled_means(difference, users, samples, seed)
    low, high = np.percentile(means, (2.5, 97.5))
    tail = min(np.count_nonzero(means <= 0), np.count_nonzero(means >= 0))
    p_value = min(1.0, 2 * (1 + tail) / (samples + 1))
    return Paired(float(np.mean(difference)), float(low), float(high), p_value)


def _check_cutoff(k: int) -> None:
    if k < 1:
        raise ValueError(f"cutoff k is {k}: it must be at least 1")


def _discount(ranks: np.ndarray) -> np.ndarray:
    gain: np.ndarray = 1 / np.log2(1 + ranks)
    return gain


def _gain_between(gain: Callable[[np.ndarray], np.ndarray], start: np.ndarray, stop: np.ndarray) -> np.ndarray:
    """float64 (B,): the sum of gain(rank) over the ranks start + 1 .. stop."""
    # Lengths are powers of two, so that few tables serve all calls; a shorter table is a prefix of a longer one.
    sums = _cumulated(gain, 1 << int(stop.max(initial=0)).bit_length())
    between: np.ndarray = sums[stop] - sums[start]
    return between


@lru_cache(maxsize=64)
def _cumulated(gain: Callable[[np.ndarray], np.ndarray], length: int) -> np.ndarray:
    """float64 (length,): at index n the sum of gain(rank) over the ranks 1 .. n."""
    sums = np.concatenate([[0.0], np.cumsum(gain(np.arange(1, length, dtype=np.float64)))])
    sums.flags.writeable = False
    return sums


def _check_resampling(users: np.ndarray, samples: int, **named: np.ndarray) -> None:
    for name, values in named.items():
        if values.ndim != 1 or values.shape != users.shape:
            raise ValueError(f"{name} has shape {values.shape}, users {users.shape}: one value and one user per target")
        if len(values) == 0:
            raise ValueError(f"{name} is empty: there is no target to resample")
        broken = np.flatnonzero(~np.isfinite(values))
        if len(broken):
            raise ValueError(f"{name}[{broken[0]}] is {values[broken[0]]}: a mean needs finite values")
    if samples < 1:
        raise ValueError(f"samples is {samples}: it must be at least 1")


def _resampled_means(values: np.ndarray, users: np.ndarray, samples: int, seed: int) -> np.ndarray:
    """float64 (samples,): mean per target of each resample of users."""
    _, user = np.unique(users, return_inverse=True)
    sums, counts = np.bincount(user, weights=values), np.bincount(user)
    generator = np.random.default_rng(seed)
    step = max(1, DRAWS // len(sums))
    means = np.empty(samples)
    for start in range(0, samples, step):
        size = (min(step, samples - start), len(sums))
        drawn = generator.integers(len(sums), size=size, dtype=np.int32)
        means[start : start + step] = sums[drawn].sum(1) / counts[drawn].sum(1)
    return means
