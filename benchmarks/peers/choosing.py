"""Every system, ours or a peer, goes the same way: chosen on validation by our metric, refitted, asked for the test.

What is finished lies in the folder under the hash of what it depends on, so a killed run goes on where it was.
"""

import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from exchange import PARTS, Asked, Part, named, read_json, write_array, write_json

from mllm_srec import metrics

CUTOFF = 10
BLOCK = 256

Settings = dict[str, Any]
Scorer = Callable[[Asked], np.ndarray]
"""Targets (at least one) -> float32 (T, I) scores of the whole catalogue; -inf for what a system does not list."""


@dataclass(frozen=True)
class System:
    """One row of the table.

    grid: the settings to choose from; of equally good ones the first. fit: fits on a part's seen events and gives
    scorers with the settings that each stands for, to be used one after the other: several where one fit passes through
    several (epochs), exactly one for settings that were given in this way. made_of: what the scores depend on besides
    data and settings.
    """

    grid: Sequence[Settings]
    fit: Callable[[Part, Settings], Iterator[tuple[Settings, Scorer]]]
    made_of: str


def places(scores: np.ndarray, asked: Asked) -> tuple[np.ndarray, np.ndarray]:
    """`metrics.places` of the targets among what they have not seen: greater and ties, int64 (T,)."""
    found = [
        metrics.places(
            scores[start : start + BLOCK],
            asked.target[start : start + BLOCK],
            asked.histories(start, start + BLOCK),
        )
        for start in range(0, len(asked), BLOCK)
    ]
    greater, ties = zip(*found, strict=True)
    return np.concatenate(greater), np.concatenate(ties)


def quality(scorer: Scorer, asked: Asked) -> float:
    """Mean NDCG@10; 0 without targets, so that the first settings are chosen."""
    return float(metrics.ndcg(*places(scorer(asked), asked), CUTOFF).mean()) if len(asked) else 0.0


def choose_and_refit(name: str, system: System, parts: Mapping[str, Part], folder: Path) -> dict[str, dict[str, Any]]:
    """Choose on parts["validation"], each tie rule by its own targets; refit on parts["test"] and score its targets.

    Returns:
        Per tie rule with test targets: file (the scores, (T, I), below `folder`), settings, validation (NDCG@10),
        seconds (of the refit) and choosing_seconds (of the whole grid).
    """
    tried: list[dict[str, Any]] = []
    choosing_seconds = 0.0
    for settings in system.grid:
        stem = named(f"{name} validation", system.made_of, parts["validation"].mark(), settings)
        file = folder / f"{stem}.json"
        if not file.exists():
            write_json(file, _try(name, system, parts["validation"], settings))
        found = read_json(file)
        tried += found["results"]
        choosing_seconds += found["seconds"]

    result: dict[str, dict[str, Any]] = {}
    refitted: dict[str, tuple[Scorer, float]] = {}  # both tie rules may choose the same
    for rule, asked in parts["test"].asked.items():
        if len(asked) == 0:
            continue
        best = tried[int(np.argmax([round(of["ndcg"][rule], 9) for of in tried]))]
        settings = best["settings"]
        stem = named(f"{name} {rule}", system.made_of, parts["test"].mark(), settings)
        done = folder / f"{stem}.json"  # written after the scores
        if not done.exists():
            key = json.dumps(settings)
            if key not in refitted:
                started = time.perf_counter()
                ((_, scorer),) = system.fit(parts["test"], settings)
                refitted[key] = scorer, time.perf_counter() - started
                say(f"  {name}: refitted ({words(settings) or 'nothing to choose'}), {refitted[key][1]:.1f} s")
            scorer, seconds = refitted[key]
            write_array(folder / f"{stem}.npy", scorer(asked))
            write_json(done, {"seconds": seconds})
        result[rule] = {
            "file": f"{stem}.npy",
            "settings": settings,
            "validation": best["ndcg"][rule],
            "seconds": read_json(done)["seconds"],
            "choosing_seconds": choosing_seconds,
        }
    return result


def _try(name: str, system: System, part: Part, settings: Settings) -> dict[str, Any]:
    """One fit, given up as soon as what it passes through is better than what came before for no tie rule."""
    results: list[dict[str, Any]] = []
    started = time.perf_counter()
    for stands_for, scorer in system.fit(part, settings):
        ndcg = {rule: quality(scorer, asked) for rule, asked in part.asked.items()}
        given_up = bool(results) and all(ndcg[rule] <= of for rule, of in results[-1]["ndcg"].items())
        results.append({"settings": stands_for, "ndcg": ndcg})
        values = ", ".join(f"{value:.4f} ({rule})" for rule, value in ndcg.items())
        seconds = time.perf_counter() - started
        say(f"  {name} ({words(stands_for) or 'nothing to choose'}): NDCG@{CUTOFF} {values}, {seconds:.1f} s")
        if given_up:
            break
    return {"results": results, "seconds": time.perf_counter() - started}


def read_parts(folder: Path) -> dict[str, Part]:
    """Validation and test of the split that lies in `folder`."""
    return {name: Part.read(folder / f"{name}.npz") for name in PARTS}


def words(settings: Settings) -> str:
    """{"factors": 64, "epochs": [60]} -> "factors 64, epochs 60"."""
    shown = {name: value if isinstance(value, list) else [value] for name, value in settings.items()}
    return ", ".join(f"{name} {'/'.join(map(str, values))}" for name, values in shown.items())


def say(line: str) -> None:
    """One line of progress on stderr."""
    print(line, file=sys.stderr, flush=True)
