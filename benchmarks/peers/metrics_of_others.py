"""RecTools' and ranx's metrics of given lists, timed; `metrics_speed.py` calls this in the peers' own environment.

    benchmarks/peers/.venv/bin/python benchmarks/peers/metrics_of_others.py FOLDER

FOLDER holds items.npy, int (U, K), lists of different items, best first; target.npy, int (U,), the relevant items;
and wanted.json: "metrics", M pairs of name and cutoff, "rounds" and "checked". Beside them are written others.json, by
system and round the seconds of making its input from the arrays, the seconds of the metrics, and their means; and for
every system a file NAME.npy, float64 (M, N), the metrics of the first N users: `checked`, or all where it costs little.

Everything is done once for a few users before it is timed, so that numba's compilation does not count.
"""

import argparse
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from exchange import read_json, write_array, write_json
from ranx import Qrels, Run, evaluate
from rectools import Columns
from rectools.metrics import MAP, MRR, NDCG, HitRate, Recall, calc_metrics

WARMING = 100
"""Users of the round that is not timed."""
IN_RECTOOLS = {
    "HR": HitRate,
    "Recall": Recall,
    "NDCG": partial(NDCG, divide_by_achievable=True),  # else a perfect list does not get 1
    "MRR": MRR,
    "MAP": MAP,
}
IN_RANX = {"HR": "hit_rate", "Recall": "recall", "NDCG": "ndcg", "MRR": "mrr", "MAP": "map"}

Wanted = Sequence[tuple[str, int]]
"""Names and cutoffs of the metrics."""
Given = tuple[Any, Any]
"""Lists and targets as a system takes them, in its own order."""


class System(NamedTuple):
    """make: arrays -> its own input. means: (M,). values: of the first users, (M, N) with N >= `checked`."""

    make: Callable[[np.ndarray, np.ndarray], Given]
    means: Callable[[Given, Wanted], list[float]]
    values: Callable[[Given, Wanted, int], np.ndarray]


def main() -> None:
    """Warm up, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    warnings.filterwarnings("ignore")
    asked = read_json(folder / "wanted.json")
    wanted: Wanted = [(name, k) for name, k in asked["metrics"]]
    items, target = np.load(folder / "items.npy"), np.load(folder / "target.npy")
    found: dict[str, list[dict[str, Any]]] = {}
    for name, system in SYSTEMS.items():
        say(f"{name}: warming up")
        few = system.make(items[:WARMING], target[:WARMING])
        system.means(few, wanted)
        system.values(few, wanted, WARMING)
        found[name] = []
    for number in range(asked["rounds"]):
        for name, system in SYSTEMS.items():
            say(f"{name}: round {number + 1} of {asked['rounds']}")
            started = time.perf_counter()
            given = system.make(items, target)
            made = time.perf_counter()
            means = system.means(given, wanted)
            seconds = {"making": made - started, "metrics": time.perf_counter() - made}
            found[name].append(seconds | {"means": [float(mean) for mean in means]})
            if number == 0:
                write_array(folder / f"{name}.npy", system.values(given, wanted, asked["checked"]))
            del given  # one system's input at a time in memory
    write_json(folder / "others.json", found)


# RecTools


def frames(items: np.ndarray, target: np.ndarray) -> Given:
    """Recommendations and interactions."""
    count, k = items.shape
    reco = {
        Columns.User: np.repeat(np.arange(count), k),
        Columns.Item: items.ravel(),
        Columns.Rank: np.tile(np.arange(1, k + 1), count),
    }
    return pd.DataFrame(reco), pd.DataFrame({Columns.User: np.arange(count), Columns.Item: target})


def rectools_means(given: Given, wanted: Wanted) -> list[float]:
    """All metrics in one call, so that what they share is done once."""
    means = calc_metrics({f"{name}@{k}": IN_RECTOOLS[name](k=k) for name, k in wanted}, *given)
    return [means[f"{name}@{k}"] for name, k in wanted]


def rectools_values(given: Given, wanted: Wanted, checked: int) -> np.ndarray:
    """Each metric by itself, which takes seconds for many users: of the first ones only."""
    reco, interactions = (frame[frame[Columns.User] < checked] for frame in given)
    users = interactions[Columns.User].to_numpy()
    found = [IN_RECTOOLS[name](k=k).calc_per_user(reco, interactions) for name, k in wanted]
    return np.stack([values.reindex(users).to_numpy(dtype=np.float64) for values in found])


# ranx


def names(count: int) -> np.ndarray:
    """object (count,): ranx knows users and items by strings. Padded, so that it keeps the users' order."""
    return np.array([f"{number:08d}" for number in range(count)], dtype=object)


def qrels_and_run(items: np.ndarray, target: np.ndarray) -> Given:
    """ranx's own types, from DataFrames."""
    count, k = items.shape
    user, item = names(count), names(1 + max(items.max(), target.max()))
    qrels = pd.DataFrame({"q_id": user, "doc_id": item[target], "score": np.ones(count, dtype=np.int64)})
    run = pd.DataFrame({"q_id": np.repeat(user, k), "doc_id": item[items.ravel()], "score": np.tile(falling(k), count)})
    return Qrels.from_df(qrels), Run.from_df(run)


def plain_arrays(items: np.ndarray, target: np.ndarray) -> Given:
    """The arrays that ranx takes as well, its fastest way: (U, n, 2), an item's number and its relevance or score."""
    count, k = items.shape
    qrels = np.stack([target, np.ones(count)], axis=1)[:, None]
    return qrels, np.stack([items, np.broadcast_to(falling(k), (count, k))], axis=2)


def falling(k: int) -> np.ndarray:
    """float64 (k,): scores without ties."""
    return np.arange(k, 0, -1, dtype=np.float64)


def ranx_means(given: Given, wanted: Wanted) -> list[float]:
    """Not stored in the run, user by user, as is the default: that takes longer."""
    means = evaluate(*given, [f"{IN_RANX[name]}@{k}" for name, k in wanted], save_results_in_run=False)
    return list(means.values())


def ranx_values(given: Given, wanted: Wanted, checked: int) -> np.ndarray:
    """Of all users."""
    asked = [f"{IN_RANX[name]}@{k}" for name, k in wanted]
    values = evaluate(*given, asked, return_mean=False, save_results_in_run=False)
    return np.stack([values[name] for name in asked])


def say(line: str) -> None:
    """One line of progress on stderr."""
    print(line, file=sys.stderr, flush=True)


SYSTEMS = {
    "RecTools, DataFrames": System(frames, rectools_means, rectools_values),
    "ranx, Qrels and Run": System(qrels_and_run, ranx_means, ranx_values),
    "ranx, arrays": System(plain_arrays, ranx_means, ranx_values),
}

if __name__ == "__main__":
    main()
