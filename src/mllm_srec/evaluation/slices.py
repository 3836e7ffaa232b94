"""Slices of the targets: for whom, and for which items, a system works; a mean over all of them hides it.

Labels come from what models may have seen (cold items, popularity), from what a target sees (the length of its history)
or from outside (taste, pictures). They never depend on the systems, so that all are compared on the same slices.
"""

from dataclasses import dataclass

import numpy as np

from mllm_srec import metrics
from mllm_srec.data.dataset import Histories
from mllm_srec.data.split import Targets
from mllm_srec.evaluation.protocol import target_items


@dataclass(frozen=True)
class Labels:
    """One way to cut the targets: target t belongs to the slice names[of[t]], of int (T,)."""

    cut: str
    names: tuple[str, ...]
    of: np.ndarray


def cold_items(histories: Histories, seen: np.ndarray, targets: Targets) -> Labels:
    """cold: the target's item stands in none of the events of mask `seen` (N,), those that models may have seen."""
    known = np.zeros(len(histories.items), dtype=bool)
    known[histories.item[seen]] = True
    return _halves("item", ~known[target_items(histories, targets)], "cold", "warm")


def item_popularity(histories: Histories, seen: np.ndarray, targets: Targets) -> Labels:
    """head, mid, tail: the target's item by its number of events in mask `seen` (N,); each holds a third of the events.

    head: all items that are more popular hold less than a third of the seen events; mid: less than two thirds; tail:
    the rest, cold items among them. So an item across a border belongs to the more popular side, and equally popular
    items always to the same slice; where all are equally popular, all are head.
    """
    popularity = np.bincount(histories.item[seen], minlength=len(histories.items))
    ascending = np.sort(popularity)
    held = np.concatenate([[0], np.cumsum(ascending)])  # events of the n least popular items
    total = held[-1]
    own = popularity[target_items(histories, targets)]
    above = total - held[np.searchsorted(ascending, own, side="right")]
    border = np.array([total, 2 * total])
    return Labels("item popularity", ("head", "mid", "tail"), np.searchsorted(border, 3 * above, side="right"))


def history_length(targets: Targets) -> Labels:
    """short, medium, long: the number of events a target sees, cut at the terciles of these targets.

    The cut points are the ceil(T / 3)-th and ceil(2 T / 3)-th shortest history and stand in the names. Ties stay
    together, so the slices need not be equally large.

    Raises:
        ValueError: there is no target.
    """
    count = len(targets)
    if count == 0:
        raise ValueError("there is no target, so there are no terciles of the histories")
    ascending = np.sort(targets.end)
    low, high = (int(ascending[-(-part * count // 3) - 1]) for part in (1, 2))
    names = (f"short (events <= {low})", f"medium ({low} < events <= {high})", f"long (events > {high})")
    return Labels("history length", names, np.searchsorted([low, high], targets.end, side="left"))


def changed_taste(changed: np.ndarray) -> Labels:
    """changed: the user's preference claims a change, bool (T,).

    Raises:
        ValueError: `changed` does not hold one bool per target.
    """
    return _halves("taste", changed, "changed", "steady")


def target_picture(histories: Histories, targets: Targets, missing: np.ndarray) -> Labels:
    """missing: the target's item has no picture that can be read, by `missing`, bool (I,).

    Raises:
        ValueError: `missing` does not hold one bool per item.
    """
    if missing.shape != (len(histories.items),):
        raise ValueError(f"missing has shape {missing.shape}, the catalogue {len(histories.items)} items")
    return _halves("picture of the item", missing[target_items(histories, targets)], "missing", "present")


def minded(pictures: np.ndarray) -> Labels:
    """picture-minded against text-minded: whether pictures tell more of the user's choices than texts, bool (T,).

    Raises:
        ValueError: `pictures` does not hold one bool per target.
    """
    return _halves("user", pictures, "picture-minded", "text-minded")


def by_slice(
    values: np.ndarray,
    labels: Labels,
    users: np.ndarray,
    samples: int,
    seed: int,
    reference: np.ndarray | None = None,
) -> dict[str, dict[str, float]]:
    """Per slice: n (its targets), users, mean, low, high (95 % bootstrap over users) and, where a reference is given,
    the paired difference from it as gain, gain_low, gain_high, p.

    A slice without targets has n and users, both 0, and nothing else. An interval of few users says little, of one user
    nothing. The p-values are each slice's own: with many slices some are small by chance.

    Args:
        values: (T,), a metric of one system per target.
        users: int (T,), whose target it is.
        samples: number of resamples.
        reference: (T,), the metric of another system on the same targets.

    Raises:
        ValueError: lengths that differ, a value that is not finite, or samples < 1.
    """
    systems = {"values": values} if reference is None else {"values": values, "reference": reference}
    for name, array in (systems | {"users": users, "labels": labels.of}).items():
        if array.shape != (len(values),):
            raise ValueError(f"{name} has shape {array.shape}: one per target, and there are {len(values)} values")
    for name, array in systems.items():
        broken = np.flatnonzero(~np.isfinite(array))
        if len(broken):
            raise ValueError(f"{name}[{broken[0]}] is {array[broken[0]]}: a mean needs finite values")
    table: dict[str, dict[str, float]] = {}
    for number, name in enumerate(labels.names):
        inside = labels.of == number
        own, people = values[inside], users[inside]
        row: dict[str, float] = {"n": len(own), "users": len(np.unique(people))}
        if len(own):
            interval = metrics.bootstrap(own, people, samples, seed)
            row |= {"mean": interval.mean, "low": interval.low, "high": interval.high}
            if reference is not None:
                paired = metrics.paired_bootstrap(own, reference[inside], people, samples, seed)
                row |= {"gain": paired.mean, "gain_low": paired.low, "gain_high": paired.high, "p": paired.p_value}
        table[name] = row
    return table


def _halves(cut: str, mask: np.ndarray, yes: str, no: str) -> Labels:
    if mask.dtype != np.bool_ or mask.ndim != 1:
        raise ValueError(f"{cut}: {yes} or {no} is one bool per target, not {mask.dtype} of shape {mask.shape}")
    return Labels(cut, (yes, no), np.where(mask, 0, 1))
