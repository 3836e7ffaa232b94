"""RecTools' own NDCG@10 and Recall@10 of every system's scores; `run.py` calls this in the peers' own environment.

    benchmarks/peers/.venv/bin/python benchmarks/peers/rectools_metrics.py FOLDER

FOLDER holds test.npz and scores.json (tie rule -> system -> file of scores). Beside every file comes one with the
metrics, float64 (2, T): `metrics_file`.
"""

import argparse
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
from exchange import SCORES, Asked, Part, metrics_file, read_json, write_array
from rectools import Columns
from rectools.metrics import NDCG, Recall

K = 10


def main() -> None:
    """Whatever is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    warnings.filterwarnings("ignore")
    asked = Part.read(folder / "test.npz").asked
    for rule, files in read_json(folder / SCORES).items():
        for name in files.values():
            place = metrics_file(folder / name)
            if not place.exists():
                write_array(place, of_targets(np.load(folder / name, mmap_mode="r"), asked[rule]))


def of_targets(scores: np.ndarray, asked: Asked) -> np.ndarray:
    """float64 (2, T): NDCG@10 and Recall@10 of each target, a user of its own with one relevant item."""
    listed = [best(row, history) for row, history in zip(scores, asked.histories(0, len(asked)), strict=True)]
    lengths = [len(items) for items in listed]
    reco = pd.DataFrame(
        {
            Columns.User: np.repeat(np.arange(len(asked)), lengths),
            Columns.Item: np.concatenate(listed),
            Columns.Rank: np.concatenate([np.arange(1, length + 1) for length in lengths]),
        }
    )
    wanted = pd.DataFrame({Columns.User: np.arange(len(asked)), Columns.Item: asked.target})
    found = [metric.calc_per_user(reco, wanted) for metric in (NDCG(k=K, divide_by_achievable=True), Recall(k=K))]
    return np.stack([values.reindex(np.arange(len(asked))).to_numpy(dtype=np.float64) for values in found])


def best(row: np.ndarray, history: np.ndarray) -> np.ndarray:
    """The best items (at most 10) outside the history, best first; ties by position."""
    order = np.argsort(-row, kind="stable")
    return order[~np.isin(order, history)][:K]


if __name__ == "__main__":
    main()
