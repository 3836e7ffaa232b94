"""Full-catalogue evaluation of several systems on the same targets, with intervals over users.

A target's place is counted among all items the user has not chosen before; a tied block counts as the expectation
over its random orders.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from mllm_srec import metrics
from mllm_srec.config import Config
from mllm_srec.data.dataset import Dataset, Histories, Queries
from mllm_srec.data.split import Split, Targets
from mllm_srec.data.split import histories_of as histories_of
from mllm_srec.data.split import target_items as target_items
from mllm_srec.retrieval.signals import rows_at_once
from mllm_srec.store_files import atomic_write

Scorer = Callable[[Queries], np.ndarray]
"""Queries -> float32 (B, I) scores of the whole catalogue."""

BLOCK = 256


@dataclass(frozen=True)
class Places:
    """Per target: items strictly above it and items tied with it, int64 (T,)."""

    greater: np.ndarray
    ties: np.ndarray


@dataclass(frozen=True)
class Chosen:
    """The targets that a run looks at, seeded samples: two halves of the validation users, which both choose the
    weights and calibrate, and the test. The first half also says during a training how good an adapter is."""

    choosing: Targets
    calibrating: Targets
    test: Targets

    @classmethod
    def of(cls, split: Split, config: Config) -> "Chosen":
        """At most evaluation.choosing_users, half as many, and evaluation.users targets."""
        generator, evaluation = np.random.default_rng(config.seed), config.evaluation
        people = generator.permutation(np.unique(split.validation.user))
        choosers = people[: max(1, len(people) // 2)] if len(people) else people
        half = np.isin(split.validation.user, choosers)
        first, second = (split.validation.take(np.flatnonzero(rows)) for rows in (half, ~half))
        return cls(
            choosing=_sample(first, evaluation.choosing_users, generator),
            calibrating=_sample(second, max(1, evaluation.choosing_users // 2), generator),
            test=_sample(split.test, evaluation.users, generator),
        )

    @property
    def parts(self) -> dict[str, Targets]:
        """The targets by the name of what their lists are read for."""
        return {"validation": self.choosing, "calibration": self.calibrating, "test": self.test}


def _sample(targets: Targets, limit: int | None, generator: np.random.Generator) -> Targets:
    if limit is None or len(targets) <= limit:
        return targets
    return targets.take(np.sort(generator.permutation(len(targets))[:limit]))


def place_targets(histories: Histories, targets: Targets, scorer: Scorer, repeats: bool = False) -> Places:
    """Where `scorer` puts each target in the full catalogue, items of its own history masked unless `repeats`."""
    greater, ties = [], []
    seen, wanted = histories_of(histories, targets), target_items(histories, targets)
    step = min(BLOCK, rows_at_once(len(histories.items)))
    for start in range(0, len(seen), step):
        block = seen[start : start + step]
        above, equal = metrics.places(scorer(block), wanted[start : start + step], None if repeats else block)
        greater.append(above)
        ties.append(equal)
    if not greater:
        return Places(np.zeros(0, np.int64), np.zeros(0, np.int64))
    return Places(np.concatenate(greater), np.concatenate(ties))


def place_reranked(retrieved: Places, items: np.ndarray, fused: np.ndarray, target: np.ndarray) -> Places:
    """Where a list of K, reranked by `fused` (T, K) and followed by the rest in retrieval order, puts each target.

    A target outside its list stays behind all K: its tied items inside the list have gone before it.
    """
    inside = items == target[:, None]
    held = inside.any(1)
    k = items.shape[1]
    greater, ties = retrieved.greater.copy(), retrieved.ties.copy()
    cut_off = ~held & (greater < k)
    ties[cut_off] = greater[cut_off] + ties[cut_off] - k
    greater[cut_off] = k
    above, equal = metrics.places(fused, inside.argmax(1))
    greater[held], ties[held] = above[held], equal[held]
    return Places(greater, ties)


def write_places(file: Path, systems: dict[str, Places], histories: Histories, targets: Targets) -> None:
    """A parquet table with a row per system and target: whose it is, which item, and its place in the full catalogue
    (`greater` items stand above it, `ties` beside it), for comparisons that the report does not make.

    Raises:
        StoreError: the file cannot be written.
    """
    users = [histories.users[user] for user in targets.user.tolist()]
    wanted = [histories.items[item] for item in target_items(histories, targets).tolist()]
    rows = pl.concat(
        pl.DataFrame(
            {
                "system": [name] * len(users),
                "user_id": users,
                "position": targets.position,
                "item_id": wanted,
                "greater": places.greater,
                "ties": places.ties,
            }
        )
        for name, places in systems.items()
    )
    table = BytesIO()
    rows.write_parquet(table)
    atomic_write(file, table.getvalue())


def per_target(places: Places, cutoffs: Sequence[int]) -> dict[str, np.ndarray]:
    """{"Recall@k", "NDCG@k" for each cutoff, "MRR"}: float64 (T,)."""
    values = {}
    for k in cutoffs:
        values[f"Recall@{k}"] = metrics.recall(places.greater, places.ties, k)
        values[f"NDCG@{k}"] = metrics.ndcg(places.greater, places.ties, k)
    values["MRR"] = metrics.mrr(places.greater, places.ties)
    return values


def compare(
    systems: dict[str, Places], reference: str, users: np.ndarray, config: Config
) -> dict[str, dict[str, dict[str, float]]]:
    """Per system and metric: mean, low, high (95 % bootstrap over users) and, against `reference`, the paired
    difference with its interval and p-value.
    """
    values = {name: per_target(places, config.evaluation.cutoffs) for name, places in systems.items()}
    table: dict[str, dict[str, dict[str, float]]] = {}
    samples, seed = config.evaluation.bootstrap, config.seed
    for name, of_system in values.items():
        table[name] = {}
        for metric, per in of_system.items():
            interval = metrics.bootstrap(per, users, samples, seed)
            row = {"mean": interval.mean, "low": interval.low, "high": interval.high}
            if name != reference:
                paired = metrics.paired_bootstrap(per, values[reference][metric], users, samples, seed)
                row |= {"gain": paired.mean, "gain_low": paired.low, "gain_high": paired.high, "p": paired.p_value}
            table[name][metric] = row
    return table


def conditions(dataset: Dataset, split: Split, targets: Targets, config: Config) -> dict[str, Any]:
    """What a figure depends on, to stand beside it."""
    return {
        "data": dataset.name,
        "users": len(np.unique(targets.user)),
        "items": dataset.items.height,
        "targets": len(targets),
        "protocol": split.protocol,
        "tie_rule": split.tie_rule,
        "repeats": dataset.repeats,
        "repeats_dropped": dataset.repeats_dropped,
        "min_history": split.min_history,
        "users_too_short": split.users_too_short,
        "targets_without_history": split.targets_without_history,
        "catalogue": "full" if config.retrieval.repeats else "full, items of the user's history masked",
        "ties": "expectation over random orders",
        "reranked": config.retrieval.candidates,
        "intervals": f"95 %, bootstrap over users, {config.evaluation.bootstrap} samples",
        "model": config.model.name,
        "seed": config.seed,
    }
