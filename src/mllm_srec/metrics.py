"""Ranking metrics for one relevant item among the full catalogue, metrics of lists, and bootstrap intervals over users.

Full catalogue: every item the user has not seen competes, none is sampled (sampled metrics can order systems wrongly,
Krichene & Rendle, KDD 2020). Ties count by expectation over random orders: a metric is its mean over all orders of the
items tied with the target (McSherry & Najork, ECIR 2008), so a constant scorer gets exactly chance.

The ranking metrics start from a target's place, (greater, ties): with g items strictly above it and t others tied with
it, its rank is uniform on g + 1 .. g + t + 1. The metrics of lists take what is shown, as it is shown.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

DRAWS = 1 << 22
"""Users drawn at a time by the bootstrap; bounds its memory."""
BLOCK = 1024
"""Lists at a time; bounds the memory of the metrics of lists."""


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


def places_in_lists(items: np.ndarray, target: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where each target stands in a list that is all that is known, for the metrics with a cutoff up to K.

    A target outside its list counts as right behind it, out of reach of those cutoffs. What was tied has been put in
    order by whoever cut the list: where the scores are known, `places` is exact.

    Args:
        items: int (B, K), item positions, best first.
        target: int (B,), item positions.

    Returns:
        greater: int64 (B,), items above the target; K for a target outside its list.
        ties: int64 (B,), all 0.

    Raises:
        ValueError: the lengths differ, lists of no items, or a list that holds its target twice.
    """
    _check_shape(items)
    if target.shape != items.shape[:1]:
        raise ValueError(f"lengths differ: items are {items.shape}, target {target.shape}")
    inside = items == target[:, None]
    times = np.count_nonzero(inside, axis=1)
    twice = np.flatnonzero(times > 1)
    if len(twice):
        raise ValueError(f"list {twice[0]} holds its target {target[twice[0]]} more than once")
    greater = np.where(times, inside.argmax(1), items.shape[1])
    return greater.astype(np.int64), np.zeros(len(items), dtype=np.int64)


def recall(greater: np.ndarray, ties: np.ndarray, k: int) -> np.ndarray:
    """float64 (B,): Recall@k (with one relevant item also the hit rate), the chance that rank <= k.

    min(max(k - g, 0), t + 1) / (t + 1) for g = greater, t = ties.

    Raises:
        ValueError: k < 1.
    """
    _check_cutoff(k)
    chance: np.ndarray = np.clip(k - greater, 0, ties + 1) / (ties + 1)
    return chance


hit_rate = recall
"""HR@k: with one relevant item the same number as Recall@k."""


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


def mrr(greater: np.ndarray, ties: np.ndarray, k: int | None = None) -> np.ndarray:
    """float64 (B,): MRR@k, the reciprocal rank up to rank k and 0 behind it; without `k` no rank is too far.

    (H(min(g + t + 1, k)) - H(min(g, k))) / (t + 1) with the harmonic numbers H(n) = sum of 1 / r over r = 1 .. n
    (Voorhees, TREC-8 1999).

    Raises:
        ValueError: k < 1.
    """
    start, stop = greater, greater + ties + 1
    if k is not None:
        _check_cutoff(k)
        start, stop = np.minimum(start, k), np.minimum(stop, k)
    mean: np.ndarray = _gain_between(np.reciprocal, start, stop) / (ties + 1)
    return mean


def average_precision(greater: np.ndarray, ties: np.ndarray, k: int) -> np.ndarray:
    """float64 (B,): AP@k, whose mean over targets is MAP@k.

    The precision at the rank of each relevant item up to k, over their number. The one relevant item at rank r has
    precision 1 / r, so this is MRR@k.

    Raises:
        ValueError: k < 1.
    """
    return mrr(greater, ties, k)


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


def coverage(items: np.ndarray, catalogue: int) -> float:
    """Catalogue coverage@k: the share of the catalogue that at least one list shows (Ge et al., RecSys 2010).

    Args:
        items: int (B, k), recommended item positions.
        catalogue: number of items in the catalogue.

    Raises:
        ValueError: there is no list, lists of no items, or an item that is not in the catalogue.
    """
    return float(np.count_nonzero(_exposure(items, catalogue)) / catalogue)


def exposure_gini(items: np.ndarray, catalogue: int) -> float:
    """Gini index of how often the lists show each item: 0 all equally often, 1 a single item in every place.

    sum over j = 1 .. I of (2 j - I - 1) x_j / ((I - 1) * sum of x) with x_1 <= .. <= x_I the times that each of the I
    items of the catalogue is shown (Shani & Gunawardana, Recommender Systems Handbook, 2011, ch. 8). Lists of k
    different items cannot reach 1; a catalogue of one item has 0.

    Args:
        items: int (B, k), recommended item positions.
        catalogue: number of items in the catalogue.

    Raises:
        ValueError: there is no list, lists of no items, or an item that is not in the catalogue.
    """
    shown = np.sort(_exposure(items, catalogue))
    weights = 2 * np.arange(1, catalogue + 1) - catalogue - 1
    return float(weights @ shown / (max(catalogue - 1, 1) * shown.sum()))


def novelty(items: np.ndarray, popularity: np.ndarray) -> np.ndarray:
    """float64 (B,): Novelty@k in bits, the mean over a list of -log2((p_i + 1) / (sum of p + I)).

    Mean self-information (Zhou et al., PNAS 2010; Vargas & Castells, RecSys 2011). One is added to every count, so that
    an item that nobody has chosen has a finite value.

    Args:
        items: int (B, k), recommended item positions.
        popularity: (I,), seen events per item.

    Raises:
        ValueError: lists of no items, an item that is not in the catalogue, or a count that is negative or not finite.
    """
    counts = _counts(popularity)
    _check_lists(items, len(counts))
    information = np.log2(counts.sum() + len(counts)) - np.log2(counts + 1)
    means = np.empty(len(items))
    for block in _blocks(len(items)):
        means[block] = information[items[block]].mean(1)
    return means


def intra_list_diversity(items: np.ndarray, vectors: np.ndarray) -> np.ndarray:
    """float64 (B,): intra-list diversity@k, the mean of 1 - cosine over a list's pairs (Smyth & McClave, ICCBR 2001).

    From 0, one direction, to 2, two opposite ones. An item without content, a vector of zeros, has cosine 0 with all.

    Args:
        items: int (B, k), recommended item positions, k >= 2.
        vectors: (I, D), the items' content vectors, of any length.

    Raises:
        ValueError: lists of fewer than two items, an item that is not in the catalogue, or a vector that is not finite.
    """
    _check_lists(items, len(vectors))
    k = items.shape[1]
    if k < 2:
        raise ValueError("lists of one item have no pair: diversity needs k >= 2")
    squares = np.einsum("id,id->i", vectors, vectors, dtype=np.float64)
    broken = np.flatnonzero(~np.isfinite(squares))
    if len(broken):
        raise ValueError(f"the vector of item {broken[0]} is not finite")
    inverse = np.divide(1.0, np.sqrt(squares), out=np.zeros(len(squares)), where=squares > 0)
    diversity = np.empty(len(items))
    for block in _blocks(len(items)):
        rows = items[block]
        # Of unit vectors u, the cosines of all ordered pairs sum to |sum of u|^2 - sum of |u|^2: no pair is visited.
        total = np.zeros((len(rows), vectors.shape[1]))
        for column in rows.T:
            total += vectors[column] * inverse[column, None]
        pairs = np.einsum("bd,bd->b", total, total) - np.count_nonzero(inverse[rows], axis=1)
        diversity[block] = 1 - pairs / (k * (k - 1))
    bounded: np.ndarray = np.maximum(diversity, 0.0)  # rounding alone goes below
    return bounded


def popularity_lift(items: np.ndarray, histories: Sequence[np.ndarray], popularity: np.ndarray) -> float:
    """How much more popular the lists are than the histories: 1 as popular, above 1 the system favours the popular.

    mean over users of the mean popularity of their list / mean over users of the mean popularity of their history
    (group average popularity; Abdollahpouri et al., RecSys 2020, whose lift is this ratio - 1).

    Args:
        items: int (B, k), recommended item positions.
        histories: B int arrays of item positions, none empty; an item counts as often as it was chosen.
        popularity: (I,), seen events per item; their scale does not matter.

    Raises:
        ValueError: lengths that differ, lists of no items, an empty history, an item that is not in the catalogue, a
            count that is negative or not finite, or histories of items that nobody has chosen.
    """
    counts = _counts(popularity)
    _check_lists(items, len(counts))
    if len(histories) != len(items):
        raise ValueError(f"lengths differ: {len(items)} lists, {len(histories)} histories")
    lengths = np.array([len(history) for history in histories], dtype=np.int64)
    empty = np.flatnonzero(lengths == 0)
    if len(empty):
        raise ValueError(f"history {empty[0]} is empty: it has no mean popularity")
    of_lists = of_histories = 0.0
    for block in _blocks(len(items)):
        chosen = np.concatenate(histories[block])
        _check_positions(chosen, len(counts), "histories")
        starts = np.concatenate([[0], np.cumsum(lengths[block])[:-1]])
        of_histories += float((np.add.reduceat(counts[chosen], starts) / lengths[block]).sum())
        of_lists += float(counts[items[block]].mean(1).sum())
    if of_histories == 0:
        raise ValueError("the histories hold no item that anybody has chosen: there is no popularity to divide by")
    return of_lists / of_histories


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
    return _paired(float(np.mean(difference)), _resampled_means(difference, users, samples, seed))


def stratified_bootstrap(
    a: np.ndarray, b: np.ndarray, users: np.ndarray, strata: np.ndarray, samples: int, seed: int
) -> Paired:
    """`paired_bootstrap` over several data sets together: users are drawn within each stratum (Davison & Hinkley 1997,
    3.2), and the mean is that over strata of their means of a - b, so that a large one counts no more than a small one.

    Args:
        a: (T,), one value per target.
        b: (T,), the other system's value of the same target.
        users: int (T,), whose target it is; the same number in two strata is two users.
        strata: int (T,), the target's stratum.
        samples: number of resamples.

    Raises:
        ValueError: as `paired_bootstrap`, or `strata` has another shape.
    """
    _check_resampling(users, samples, a=a, b=b, strata=strata)
    difference = np.asarray(a, dtype=np.float64) - b
    means, resampled = [], []
    for number, stratum in enumerate(np.unique(strata)):
        rows = strata == stratum
        means.append(difference[rows].mean())
        resampled.append(_resampled_means(difference[rows], users[rows], samples, seed + number))
    return _paired(float(np.mean(means)), np.mean(resampled, axis=0))


def _paired(mean: float, means: np.ndarray) -> Paired:
    low, high = np.percentile(means, (2.5, 97.5))
    tail = min(np.count_nonzero(means <= 0), np.count_nonzero(means >= 0))
    return Paired(mean, float(low), float(high), min(1.0, 2 * (1 + tail) / (len(means) + 1)))


def _check_cutoff(k: int) -> None:
    if k < 1:
        raise ValueError(f"cutoff k is {k}: it must be at least 1")


def _check_shape(items: np.ndarray) -> None:
    if items.ndim != 2 or items.shape[1] == 0:
        raise ValueError(f"items has shape {items.shape}: one row of at least one item per list")


def _check_positions(items: np.ndarray, catalogue: int, what: str) -> None:
    wrong = items[(items < 0) | (items >= catalogue)]
    if len(wrong):
        raise ValueError(f"{what} hold {wrong[0]}, which is not one of the {catalogue} items")


def _check_lists(items: np.ndarray, catalogue: int) -> None:
    _check_shape(items)
    _check_positions(items, catalogue, "lists")


def _exposure(items: np.ndarray, catalogue: int) -> np.ndarray:
    """int64 (I,): how often each item of the catalogue is shown."""
    _check_lists(items, catalogue)
    if len(items) == 0:
        raise ValueError("there is no list: nothing is shown")
    return np.bincount(items.ravel(), minlength=catalogue)


def _counts(popularity: np.ndarray) -> np.ndarray:
    """float64 (I,): `popularity`, checked."""
    counts = np.asarray(popularity, dtype=np.float64)
    wrong = np.flatnonzero(~(np.isfinite(counts) & (counts >= 0)))
    if len(wrong):
        raise ValueError(f"the popularity of item {wrong[0]} is {counts[wrong[0]]}: it must be a count")
    return counts


def _blocks(rows: int) -> Iterator[slice]:
    for start in range(0, rows, BLOCK):
        yield slice(start, start + BLOCK)


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
