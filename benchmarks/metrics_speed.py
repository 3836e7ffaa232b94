"""Our ranking metrics against RecTools' and ranx's, of the same lists in one run: seconds, and how far they differ.

    python benchmarks/metrics_speed.py [--json]

`make bench-metrics` also makes the peers' environment. 100,000 users, one target each, half of them in the user's list
of 100 different items of 50,000; everything is seeded. All start from two arrays, lists and targets. A metric that
differs from ours by more than 1e-9 is an error. Only ours also take scores of the whole catalogue, a block of users
after the other.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

sys.path.append(str(Path(__file__).resolve().parent / "peers"))

from common import machine, section
from exchange import read_json, write_array, write_json
from items_speed import spread

from mllm_srec import metrics

HERE = Path(__file__).resolve().parent / "peers"
PYTHON = HERE / ".venv" / "bin" / "python"
USERS, ITEMS, K = 100_000, 50_000, 100
ROUNDS, SEED = 3, 0
CHECKED = 10_000
"""Users whose own values are compared at the least; means are compared over all."""
BLOCK = 256
"""Users whose scores of the catalogue are in memory."""
AGREE = 1e-9
ONE_CORE = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS"), "1")
"""Ours are on one core too: what they use of numpy has no threads."""
CUTOFFS = (10, 20, 50, 100)
METRICS = [(name, k) for name in ("HR", "Recall", "NDCG") for k in CUTOFFS] + [("MRR", K), ("MAP", K)]
OURS: dict[str, Callable[[np.ndarray, np.ndarray, int], np.ndarray]] = {
    "HR": metrics.hit_rate,
    "Recall": metrics.recall,
    "NDCG": metrics.ndcg,
    "MRR": metrics.mrr,
    "MAP": metrics.average_precision,
}
COLUMNS = (
    "system", "metrics, s", "making its input, s", "together, s", "times ours", "users compared", "greatest difference",
)  # fmt: skip
LISTS, FULL = "ours, lists", "ours, scores of the whole catalogue"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    result = measured()
    print(json.dumps(result, indent=2) if options.json else markdown(result))


def measured() -> dict[str, Any]:
    """Every system's seconds, and its differences from ours.

    Raises:
        ValueError: a metric of another system is not ours.
    """
    items, target = drawn_lists()
    section("ours")
    # The first pass makes the tables of discounts: not timed, like numba's compilation.
    values = of_places(*metrics.places_in_lists(items, target))
    seconds = [timed(lambda: means(of_places(*metrics.places_in_lists(items, target)))) for _ in range(ROUNDS)]
    rows = [row(LISTS, [{"making": 0.0, "metrics": of} for of in seconds], 0, None)]
    section("the others")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_array(folder / "items.npy", items)
        write_array(folder / "target.npy", target)
        write_json(folder / "wanted.json", {"metrics": METRICS, "rounds": ROUNDS, "checked": CHECKED})
        call("metrics_of_others.py", str(folder))
        for system, rounds in read_json(folder / "others.json").items():
            theirs = np.load(folder / f"{system}.npy")
            far = max(difference(system, theirs, np.array(of["means"]), values) for of in rounds)
            rows.append(row(system, rounds, theirs.shape[1], far))
    section("ours, scores of the whole catalogue")
    rows.append(row(FULL, [{"making": 0.0, "metrics": of} for of in whole_catalogue()], 0, None))
    return {
        "machine": machine(),
        "users": USERS,
        "items": ITEMS,
        "list_length": K,
        "rounds": ROUNDS,
        "metrics": [f"{name}@{k}" for name, k in METRICS],
        "means": dict(zip([f"{name}@{k}" for name, k in METRICS], means(values), strict=True)),
        "rows": rows,
        "faster_than_all": all(rows[0]["together"]["value"] < of["metrics"]["value"] for of in rows[1:-1]),
    }


def call(program: str, folder: str) -> None:
    """Run one of the peers' programs in their environment, on one core.

    Raises:
        SystemExit: the environment has not been made.
    """
    if not PYTHON.exists():
        raise SystemExit(f"{PYTHON} is missing: `make bench-metrics` makes the peers' environment")
    subprocess.run([str(PYTHON), str(HERE / program), folder], check=True, env=os.environ | ONE_CORE)


def drawn_lists() -> tuple[np.ndarray, np.ndarray]:
    """Lists int32 (U, K) of different items and targets int32 (U,), half of them in their list, at any place alike."""
    generator = np.random.default_rng(SEED)
    drawn = generator.integers(ITEMS, size=(USERS, K + 1), dtype=np.int32)
    twice = np.arange(USERS)
    while len(twice):
        ordered = np.sort(drawn[twice], axis=1)
        twice = twice[(ordered[:, 1:] == ordered[:, :-1]).any(1)]
        drawn[twice] = generator.integers(ITEMS, size=(len(twice), K + 1), dtype=np.int32)
    place = np.minimum(generator.integers(2 * K, size=USERS), K)  # the last item drawn is in no list
    return np.ascontiguousarray(drawn[:, :K]), drawn[np.arange(USERS), place]


def of_places(greater: np.ndarray, ties: np.ndarray) -> list[np.ndarray]:
    """M metrics, float64 (U,) each."""
    return [OURS[name](greater, ties, k) for name, k in METRICS]


def means(values: list[np.ndarray]) -> list[float]:
    """M means."""
    return [float(of.mean()) for of in values]


def timed(work: Callable[[], object]) -> float:
    """Seconds on the wall."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def difference(system: str, theirs: np.ndarray, their_means: np.ndarray, ours: list[np.ndarray]) -> float:
    """The greatest one of the first users' values and of all means.

    Args:
        theirs: (M, N), of the first N users.
        their_means: (M,), of all users.
        ours: M arrays (U,).

    Raises:
        ValueError: it is greater than 1e-9, or not a number.
    """
    of_values = np.abs(theirs - np.stack(ours)[:, : theirs.shape[1]]).max(1)
    far = np.maximum(of_values, np.abs(their_means - means(ours)))
    worst = int(far.argmax())  # NaN counts as the greatest
    if not far[worst] <= AGREE:
        name, k = METRICS[worst]
        raise ValueError(f"{system}: {name}@{k} differs from ours by {far[worst]:g}, more than {AGREE:g}")
    return float(far[worst])


def whole_catalogue() -> list[float]:
    """Seconds of each round: places and metrics from scores float32 (U, I) without ties, a block of users at a time.

    One block's scores serve all blocks, each with its own targets; making them is not timed, whose ranks are known.

    Raises:
        ValueError: a place is not the known one.
    """
    generator = np.random.default_rng(SEED)
    order = generator.permuted(np.tile(np.arange(ITEMS, dtype=np.float32), (BLOCK, 1)), axis=1)
    target = generator.integers(ITEMS, size=USERS, dtype=np.int32)
    starts = range(0, USERS, BLOCK)

    def places() -> tuple[np.ndarray, np.ndarray]:
        found = [metrics.places(order[: USERS - at], target[at : at + BLOCK]) for at in starts]
        return np.concatenate([greater for greater, _ in found]), np.concatenate([ties for _, ties in found])

    greater, ties = places()
    known = ITEMS - 1 - order[np.arange(USERS) % BLOCK, target]  # a score is how many items are below it
    if (greater != known).any() or ties.any():
        raise ValueError("the places of scores without ties are not those of their order")
    return [timed(lambda: means(of_places(*places()))) for _ in range(ROUNDS)]


def row(system: str, rounds: list[dict[str, Any]], compared: int, far: float | None) -> dict[str, Any]:
    """Medians of the rounds, with the least and the most."""
    seconds = {name: np.array([of[name] for of in rounds]) for name in ("metrics", "making")}
    seconds["together"] = seconds["metrics"] + seconds["making"]
    return {
        "system": system,
        **{name: spread(of) for name, of in seconds.items()},
        "compared": compared,
        "difference": far,
    }


def markdown(result: dict[str, Any]) -> str:
    """One table, and what it was measured on."""
    rows = result["rows"]
    ours = rows[0]
    lines = ["| " + " | ".join(COLUMNS) + " |", "|" + "---|" * len(COLUMNS)]
    for of in rows:
        times = [of[name]["value"] / ours[name]["value"] for name in ("metrics", "together")]
        cells = [
            of["system"],
            in_words(of["metrics"]),
            in_words(of["making"]) if of["making"]["value"] else "none",
            in_words(of["together"]),
            "" if of["difference"] is None else f"{times[0]:.0f}, with its input {times[1]:.0f}",
            f"{of['compared']:,}" if of["compared"] else "",
            "" if of["difference"] is None else f"{of['difference']:.1e}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    lines += [
        "",
        f"{result['users']:,} users with one target, lists of {result['list_length']} of {result['items']:,} items; "
        f"{', '.join(result['metrics'])}: {len(result['metrics'])} means.",
        f"Medians of {result['rounds']} rounds (least to most) on the wall, one core each, "
        f"{result['machine']['processor']}; numba's compilation is not in them.",
        f"Values of the users compared and means of all users are ours to {AGREE:g}. "
        f"Ours {'are' if result['faster_than_all'] else 'are not'} faster than every other, its input given to it.",
    ]
    return "\n".join(lines)


def in_words(of: dict[str, float]) -> str:
    """0.031 (0.030 to 0.035)"""
    return f"{of['value']:.3f} ({of['least']:.3f} to {of['most']:.3f})"


if __name__ == "__main__":
    main()
