"""Section `shop`: the sample shop, where it is known what every user goes by: what pictures and what order are worth.

All stages twice, with pictures and without any from before ingest on; and the test histories of users who changed their
taste in random order, with nothing trained anew. Item embeddings know what pictures showed, so that pictures reach
retrieval; summaries of windows are made by rule, for the model would write them for hours, and 100 rows are trained
on, for the head start comes from shops of this kind.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import polars as pl
from common import SAMPLES, SEED, Bench, Figure, figure, show, shown
from recommender_lists import Places, finished, queries_of, read_lists, states, systems
from users_common import Case, Log, sample, shop

from mllm_srec import metrics
from mllm_srec.config import load_config
from mllm_srec.data.readers import read
from mllm_srec.evaluation import protocol
from mllm_srec.pipeline import PLACES, RERANKED, RETRIEVED
from mllm_srec.user_states import History

SETTINGS = (
    "items.embedding=description",
    "users.summary=compose",
    "training.rows=100",
    "evaluation.honesty_lists=0",
)
CUTOFF = 10
SYSTEMS = {"retrieval": RETRIEVED, "odds": "MLLM odds alone", "fused": RERANKED}
"""By the name in a run's tables."""
WEIGHS = ("picture", "text", "both")
SHUFFLES = 3
"""Random orders per history, whose mean counts."""
PICTURES_MARK, ORDER_MARK = 0.3, 0.2


def lost(bench: Bench, _: Places) -> dict[str, Any]:
    """NDCG@10 with and without pictures by what users go by, and with and without order for users who changed."""
    truth = json.loads((shop(bench) / "truth.json").read_text(encoding="utf-8"))["users"]
    whole, blind = opened_shop(bench, pictures=True), opened_shop(bench, pictures=False)
    test = sample(bench, whole.pipeline.chosen.test, len(whole.pipeline.chosen.test))
    cases = whole.cases(test)
    seeing, unseeing = ndcg_of_run(whole, cases), ndcg_of_run(blind, blind.cases(test))
    people = [truth[case.history.user_id] for case in cases]
    changed = np.flatnonzero([person["change"] is not None for person in people])
    mixed = [
        ndcg_of(bench, whole, [shuffled(cases[at], turn) for at in changed], "shuffled") for turn in range(SHUFFLES)
    ]
    return {
        "users": len(cases),
        "pictures": {
            weighs: compared(
                seeing,
                unseeing,
                np.flatnonzero([person["weighs"] == weighs for person in people]),
                PICTURES_MARK if weighs == "picture" else None,
            )
            for weighs in WEIGHS
        },
        "order": compared(
            {name: values[changed] for name, values in seeing.items()},
            {name: np.mean([of[name] for of in mixed], axis=0) for name in SYSTEMS},
            np.arange(len(changed)),
            ORDER_MARK,
        ),
    }


@cache
def opened_shop(bench: Bench, pictures: bool) -> Log:
    """The shop's workspace with its run finished, with pictures or as if nobody had given any.

    Raises:
        ValueError: the workspace was not made from this shop.
    """
    dataset = read(shop(bench))
    if not pictures:
        dataset = replace(dataset, items=dataset.items.with_columns(image=pl.lit(None, pl.String)))
    config = load_config(overrides=SETTINGS)
    place = bench.work / ("shop_with_pictures" if pictures else "shop_without_pictures")
    log = finished(place, lambda: dataset, config)
    own = dataset.with_repeats(config.data.repeats).histories()
    if own.users != log.histories.users or not np.array_equal(own.item, log.histories.item):
        raise ValueError(f"{place} was not made from {shop(bench)}: move both away, or bring the other")
    return log


def ndcg_of_run(log: Log, cases: Sequence[Case]) -> dict[str, np.ndarray]:
    """float64 (B,) per system: NDCG@10 in the full catalogue of the users' test targets, as the run placed them."""
    table = pl.read_parquet(log.pipeline.folder / PLACES)
    users, found = [case.history.user_id for case in cases], {}
    for name, system in SYSTEMS.items():
        rows = table.filter(pl.col("system") == system)
        values = metrics.ndcg(rows["greater"].to_numpy(), rows["ties"].to_numpy(), CUTOFF)
        of_user = dict(zip(rows["user_id"].to_list(), values.tolist(), strict=True))
        found[name] = np.array([of_user[user] for user in users])
    return found


def ndcg_of(bench: Bench, log: Log, cases: Sequence[Case], label: str) -> dict[str, np.ndarray]:
    """float64 (B,) per system: NDCG@10 in the full catalogue, retrieval and state from the cases' histories."""
    retriever, queries = log.pipeline._retriever("test"), queries_of(cases)
    wanted = np.array([case.target for case in cases], dtype=np.int64)
    retrieved = protocol.Places(*metrics.places(retriever.scores(queries), wanted, queries))
    items, scores = retriever.candidates(queries, log.pipeline.config.retrieval.candidates)
    held = np.flatnonzero((items == wanted[:, None]).any(1))
    told = states(bench, log, [cases[at] for at in held], label)
    read = systems(bench, log, read_lists(bench, log, told, items[held], scores[held], label))
    places = {"retrieval": retrieved}
    for name in ("odds", "fused"):
        reranked = np.zeros(items.shape)  # a target that its list does not hold stays where it is
        reranked[held] = read[name]
        places[name] = protocol.place_reranked(retrieved, items, reranked, wanted)
    return {name: metrics.ndcg(of.greater, of.ties, CUTOFF) for name, of in places.items()}


def shuffled(case: Case, seed: int) -> Case:
    """The case's history in random order; its times stay where they are."""
    history, end = case.history, case.end
    order = np.random.default_rng([seed, case.user]).permutation(end)
    time = None if history.time is None else history.time[:end]
    return replace(case, history=History(history.user_id, history.items[order], time, history.disliked[order]))


def compared(
    whole: Mapping[str, np.ndarray], less: Mapping[str, np.ndarray], rows: np.ndarray, mark: float | None
) -> dict[str, dict[str, Figure]]:
    """Per system both means over the users `rows`, and what is lost; the mark is for the fused lists."""
    return {
        name: {
            "whole": figure(whole[name][rows]),
            "less": figure(less[name][rows]),
            "loss": loss(whole[name][rows], less[name][rows], mark if name == "fused" else None),
        }
        for name in SYSTEMS
    }


def loss(whole: np.ndarray, less: np.ndarray, mark: float | None = None) -> Figure:
    """1 - mean of `less` (N,) / mean of `whole` (N,), paired by user, with its 95 % interval over users; no value where
    there was nothing to lose."""
    marked = {} if mark is None else {"mark": mark, "met": False}
    if not whole.any():
        return {"value": None, "n": len(whole), **marked}
    drawn = np.random.default_rng(SEED).integers(len(whole), size=(SAMPLES, len(whole)))
    kept = whole[drawn].mean(1) > 0
    shares = 1 - less[drawn][kept].mean(1) / whole[drawn][kept].mean(1)
    low, high = np.percentile(shares, (2.5, 97.5))
    value = float(1 - less.mean() / whole.mean())
    if mark is not None:
        marked = {"mark": mark, "met": value >= mark}
    return {"value": value, "low": float(low), "high": float(high), "n": len(whole), **marked}


def show_lost(result: dict[str, Any]) -> None:
    """Two tables."""
    for title, groups, columns in (
        ("what pictures are worth", result["pictures"], ("with pictures", "without")),
        (
            f"what order is worth, {SHUFFLES} random orders each",
            {"changed taste": result["order"]},
            ("in order", "shuffled"),
        ),
    ):
        rows = [
            (group, of[name]["whole"]["n"], name, *(shown(of[name][what]) for what in ("whole", "less", "loss")))
            for group, of in groups.items()
            for name in SYSTEMS
        ]
        head = ("users go by", "users", "order of", *columns, f"share of NDCG@{CUTOFF} lost")
        show(f"shop, {result['users']} users, summaries by rule: {title}", head, rows)
