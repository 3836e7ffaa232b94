"""The measures of the recommender that a run's own report does not hold, on the real sets and the sample shop.

    python benchmarks/recommender.py --data ../shared/data [--sections together,sampled] [--sets hm_sample]
                                     [--real build/real] [--work build/bench_recommender] [--json]

REAL/SET is the workspace that `make real` finishes; it is made and run where it is missing, and else used as it is.
What the model says is kept in WORK under the hash of what it was asked, so a killed run goes on where it was.
`--limit N` looks at N users, lists or pairs only: a quick look, no result. Threads are those of the environment
(OMP_NUM_THREADS).
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from common import (
    SAMPLES,
    SEED,
    Bench,
    Figure,
    above_zero,
    at_least,
    difference,
    figure,
    machine,
    report,
    show,
    shown,
)
from recommender_faithful import faithful, show_faithful
from recommender_lists import Places, opened, queries_of, read_lists, states, systems
from recommender_shop import lost, show_lost
from users_common import REAL, Case, Log, sample

from mllm_srec import metrics
from mllm_srec.metrics import ndcg, stratified_bootstrap
from mllm_srec.pipeline import PLACES, RERANKED, RETRIEVED

TARGETS = 300
"""Test targets of each set."""
NEGATIVES = 20
CUTOFF = 5
GAIN_MARK = 0.05


# Reranked lists against retrieval alone, over the sets together


def together(bench: Bench, places: Places) -> dict[str, Any]:
    """NDCG@10 of the fused lists less retrieval's, as a share of retrieval's, per set and over the sets (alike)."""
    ours, theirs, users, strata = [], [], [], []
    found: dict[str, Figure] = {}
    for number, (name, place) in enumerate(places.items()):
        pipeline = opened(bench, place).pipeline
        table = pl.read_parquet(pipeline.folder / PLACES)
        rows = {system: table.filter(pl.col("system") == system) for system in (RERANKED, RETRIEVED)}
        values = {of: ndcg(row["greater"].to_numpy(), row["ties"].to_numpy(), 10) for of, row in rows.items()}
        mean = values[RETRIEVED].mean()
        ours.append(values[RERANKED] / mean)
        theirs.append(values[RETRIEVED] / mean)
        users.append(np.unique(rows[RETRIEVED]["user_id"].to_numpy(), return_inverse=True)[1])
        strata.append(np.full(len(users[-1]), number))
        found[name] = at_least(difference(ours[-1], theirs[-1], users[-1]), GAIN_MARK)
    paired = stratified_bootstrap(*map(np.concatenate, (ours, theirs, users, strata)), SAMPLES, SEED)
    whole = {"value": paired.mean, "low": paired.low, "high": paired.high, "p": paired.p_value}
    return found | {"together": above_zero(whole | {"n": sum(map(len, ours))})}


def show_together(result: dict[str, Any]) -> None:
    """One table."""
    rows = [(name, of["n"], shown(of)) for name, of in result.items()]
    show("fused lists over retrieval alone: NDCG@10, as a share of retrieval's", ("set", "targets", "gain"), rows)


# One positive and 20 uniform negatives


def sampled(bench: Bench, places: Places) -> dict[str, Any]:
    """Per set: AUC, HR@5, MRR@5 of the target among `NEGATIVES` uniform negatives.

    For comparison with tables that are made so. Among sampled negatives systems can stand in another order than in the
    full catalogue (Krichene & Rendle, KDD 2020).
    """
    return {name: measure_sampled(bench, opened(bench, place)) for name, place in places.items()}


def measure_sampled(bench: Bench, log: Log) -> dict[str, Any]:
    """All systems on the same lists."""
    cases = log.cases(sample(bench, log.pipeline.chosen.test, TARGETS))
    generator = np.random.default_rng(SEED)
    items = np.array([[case.target, *negatives(case, len(log.catalogue.ids), generator)] for case in cases])
    scores = np.take_along_axis(log.pipeline._retriever("test").scores(queries_of(cases)), items, axis=1)
    read = read_lists(bench, log, states(bench, log, cases, "test"), items, scores, "uniform negatives")
    of_systems = {"chance": np.zeros(items.shape), **systems(bench, log, read)}
    users = [case.user for case in cases]
    return {"targets": len(cases), "systems": {name: placed(of, users) for name, of in of_systems.items()}}


def negatives(case: Case, count: int, generator: np.random.Generator) -> np.ndarray:
    """int (NEGATIVES,): items of a catalogue of `count` that the user has not chosen, before the target or after, each
    as likely as the other, none twice.

    Raises:
        ValueError: there are not as many.
    """
    free = np.setdiff1d(np.arange(count), [*case.history.items.tolist(), case.target])
    if len(free) < NEGATIVES:
        raise ValueError(f"user {case.history.user_id!r} has left {len(free)} items: {NEGATIVES} negatives are needed")
    return generator.choice(free, NEGATIVES, replace=False)


def placed(scores: np.ndarray, users: Sequence[int]) -> dict[str, Figure]:
    """The metrics of lists (B, K) whose target stands first in `scores`, ties by expectation."""
    greater, ties = metrics.places(scores, np.zeros(len(scores), dtype=np.int64))
    return {
        "AUC": figure(metrics.auc(greater, ties, scores.shape[1]), users),
        f"HR@{CUTOFF}": figure(metrics.hit_rate(greater, ties, CUTOFF), users),
        f"MRR@{CUTOFF}": figure(metrics.mrr(greater, ties, CUTOFF), users),
    }


def show_sampled(result: dict[str, Any]) -> None:
    """One table per set."""
    for name, of in result.items():
        title = f"sampled, {name}: {of['targets']} test targets, each among {NEGATIVES} uniform negatives"
        columns = list(of["systems"]["chance"])
        rows = [(system, *(shown(row[column]) for column in columns)) for system, row in of["systems"].items()]
        show(title, ("system", *columns), rows)


SECTIONS = {
    "together": (together, show_together),
    "sampled": (sampled, show_sampled),
    "faithful": (faithful, show_faithful),
    "shop": (lost, show_lost),
}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with ml100k_posters/ and hm_sample/")
    parser.add_argument("--sections", default=",".join(SECTIONS), help="comma-separated, default: all")
    parser.add_argument("--sets", default=",".join(REAL), help="real sets, comma-separated, default: all")
    parser.add_argument("--real", type=Path, default=Path("build/real"), help="folder of the sets' workspaces")
    parser.add_argument("--work", type=Path, default=Path("build/bench_recommender"))
    parser.add_argument("--limit", type=int, default=0, help="0: everything")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    options = parser.parse_args()
    names, sets = options.sections.split(","), options.sets.split(",")
    for what, given, known in (("section", names, SECTIONS), ("set", sets, REAL)):
        if unknown := [name for name in given if name not in known]:
            parser.error(f"unknown {what} {unknown[0]!r}: choose from {', '.join(known)}")
    bench = Bench(options.data, options.work, options.limit)
    places = {name: options.real / name for name in sets}
    opened_sets = places if set(names) - {"shop"} else {}
    models = {name: opened(bench, place).mllm.identity for name, place in opened_sets.items()}
    head = {"machine": machine(), "models": models, "limit": options.limit}
    report(head, models, SECTIONS, names, options.json, bench, places)


if __name__ == "__main__":
    main()
