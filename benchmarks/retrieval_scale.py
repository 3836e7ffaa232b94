"""Retrieval at scale, on generated logs: lists for 100,000 users of 50,000 items, and queries of an index of 1,000,000.

    python benchmarks/retrieval_scale.py [--section lists,index] [--users N --items N --indexed N] [--json]

Each section runs in a process of its own, so that the peak memory is the section's. Seconds are of one run on the wall.
Threads are those of the environment (OMP_NUM_THREADS). Other sizes give a quick look and no result.

A user likes three groups of 100 items, whose vectors lie around one centre, and has 5 to 35 events in a year: four of
five in those groups by Zipf's law, the others anywhere. So the weights are given, not chosen, and the encoder is fitted
for one epoch: what is measured is time, memory and what the index misses, not how good the lists are.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from common import SEED, Figure, at_most, figure, machine, report, shown

from mllm_srec.data.dataset import Histories, Queries
from mllm_srec.retrieval import CoOccurrence, Likeness, Mix, Retriever, Trend, sequence
from mllm_srec.retrieval.index import EXACT
from mllm_srec.retrieval.signals import LIKE_LAST, best, rows_at_once

USERS, ITEMS, INDEXED = 100_000, 50_000, 1_000_000
SHORTEST, LONGEST = 5, 35
"""Events of a user."""
GROUP, LIKED, AWAY = 100, 3, 0.2
"""Items of a group, groups of a user, and the share of events anywhere."""
START, YEAR = 1_700_000_000_000, 365 * 86_400_000
LIST_WIDTH, INDEX_WIDTH = 384, 64
"""Dimensions of the content vectors."""
MIX = Mix(content=1.0, sequence=1.0, trend=0.5, epochs=1)
K = 100
ASKED, WARM = 1000, 20
"""Users who ask the index one at a time, and others who ask before them, untimed."""
MOST_SECONDS, MOST_GB, MOST_MS, LEAST_RECALL = 60.0, 4.0, 20.0, 0.95


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--section", default=",".join(SECTIONS), help="which, comma-separated")
    parser.add_argument("--users", type=int, default=USERS, help="of lists; half as many are in the log of index")
    parser.add_argument("--items", type=int, default=ITEMS, help="of lists")
    parser.add_argument("--indexed", type=int, default=INDEXED, help="items of index")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    options = parser.parse_args()
    names = options.section.split(",")
    if not set(names) <= set(SECTIONS):
        parser.error(f"--section: of {', '.join(SECTIONS)}")
    if options.indexed <= EXACT:
        parser.error(f"--indexed: up to {EXACT:,} items there is no index")
    if options.items < 2 * GROUP or options.users < 2 * (WARM + 1):
        parser.error(f"--items must be at least {2 * GROUP}, --users at least {2 * (WARM + 1)}")
    sizes = {"lists": (options.users, options.items), "index": (options.users // 2, options.indexed)}
    sections = {name: (partial(in_process, name, *sizes[name]), lambda of: print(markdown(of))) for name in names}
    report({"machine": machine()}, {}, sections, names, options.json)


def in_process(name: str, users: int, items: int) -> dict[str, Any]:
    """The section's result, measured in another process."""
    command = [sys.executable, __file__, name, str(users), str(items)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    result: dict[str, Any] = json.loads(done.stdout)
    return result


# What is generated


def drawn_log(users: int, items: int, width: int) -> tuple[Histories, np.ndarray]:
    """A seeded log of `users` over at least 200 `items`, and the items' vectors, float32 (I, width), L2-normalised.

    The n-th group is every item of `order` at n, n + G, ... (G groups); what is left over is chosen only as "anywhere".
    """
    generator = np.random.default_rng(SEED)
    groups = items // GROUP
    order = generator.permutation(items)
    centres = generator.standard_normal((groups, width), dtype=np.float32)
    vectors = np.empty((items, width), dtype=np.float32)
    vectors[order] = generator.standard_normal((items, width), dtype=np.float32)
    vectors[order] += centres[np.arange(items) % groups]
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)

    sizes = generator.integers(SHORTEST, LONGEST + 1, users)
    owner = np.repeat(np.arange(users), sizes)
    liked = generator.integers(groups, size=(users, LIKED))
    group = liked[owner, generator.integers(LIKED, size=len(owner))]
    zipf = np.cumsum(1 / np.arange(1, GROUP + 1))
    rank = np.searchsorted(zipf / zipf[-1], generator.random(len(owner)), side="right")
    anywhere = generator.random(len(owner)) < AWAY
    item = order[np.where(anywhere, generator.integers(items, size=len(owner)), rank * groups + group)]
    when = START + generator.integers(YEAR, size=len(owner))
    histories = Histories(
        users=[f"u{number}" for number in range(users)],
        items=[f"i{number}" for number in range(items)],
        offsets=np.concatenate([[0], np.cumsum(sizes)]),
        item=item.astype(np.int32),
        time=when[np.lexsort((when, owner))],  # events are alike but for their times: only these are put in order
        rating=np.full(len(owner), np.nan, dtype=np.float32),
    )
    return histories, vectors


def queries_of(histories: Histories, users: Sequence[int]) -> Queries:
    """The whole histories of these users with their times; they ask after the end of the log."""
    assert histories.time is not None
    spans = [histories.span(user) for user in users]
    return Queries([histories.item[span] for span in spans], [histories.time[span] for span in spans])


# Sections


def lists(users: int, items: int) -> dict[str, Any]:
    """Seconds of fitting each signal, and of the best 100 for all users."""
    histories, vectors = drawn_log(users, items, LIST_WIDTH)
    seen = np.ones(len(histories.item), dtype=bool)
    counted, cooccurrence = timed(lambda: CoOccurrence.fit(histories, seen))
    moved, trend = timed(lambda: Trend.fit(histories, seen))
    trained, encoder = timed(lambda: sequence.fit(histories, seen, vectors, MIX.epochs, SEED))
    likeness = Likeness(vectors)
    retriever = Retriever(cooccurrence, likeness, trend, encoder, MIX)
    queries = queries_of(histories, range(users))
    newest = np.unique(np.concatenate([history[-LIKE_LAST:] for history in queries]))
    alike, _ = timed(lambda: likeness.neighbours(newest))
    listed, _ = timed(lambda: retriever.candidates(queries, K))
    return {
        "title": f"lists: {users:,} users, {items:,} items, {len(histories.item):,} events, vectors of {LIST_WIDTH}",
        "figures": {
            "CoOccurrence.fit, s": {"value": counted},
            "Trend.fit, s": {"value": moved},
            "sequence.fit, one epoch, s": {"value": trained},
            "users fitted per second: counts and trend": {"value": users / (counted + moved)},
            "users fitted per second: one epoch": {"value": users / trained},
            f"likest of the {len(newest):,} items asked about, s": {"value": alike},
            f"{K} best for all users, likest known, s": {"value": listed},
            f"{K} best for all users, both, s": at_most({"value": alike + listed}, MOST_SECONDS),
            "lists per second, both": {"value": users / (alike + listed)},
            "peak memory, GB": at_most({"value": peak_memory()}, MOST_GB),
        },
    }


def index(users: int, items: int) -> dict[str, Any]:
    """Single queries of an index: milliseconds, and the share of the exact 100 best that is found."""
    histories, vectors = drawn_log(users, items, INDEX_WIDTH)
    seen = np.ones(len(histories.item), dtype=bool)
    trained, encoder = timed(lambda: sequence.fit(histories, seen, vectors, MIX.epochs, SEED))
    exact = Retriever.fit(histories, seen, Likeness(vectors), MIX, encoder)
    who = np.random.default_rng(SEED).permutation(users)[: WARM + ASKED].tolist()
    queries, warm = queries_of(histories, who[WARM:]), queries_of(histories, who[:WARM])
    with tempfile.TemporaryDirectory() as name:
        built, retriever = timed(lambda: exact.indexed(Path(name)))
        size = sum(file.stat().st_size for file in Path(name).rglob("*") if file.is_file())
        dense = retriever._dense_queries(queries)
        alone, found = one_by_one(partial(searched, retriever), dense, retriever._dense_queries(warm))
        first, listed = one_by_one(partial(listed_for, retriever), single(queries), single(warm))
        again, _ = one_by_one(partial(listed_for, retriever), single(queries), [])
    peak = peak_memory()  # exact lists are no part of retrieval with an index
    best_dense = exact_best(dense, retriever._dense_items)
    best_lists, _ = exact.candidates(queries, K)
    return {
        "title": f"index: {items:,} items, {len(queries):,} queries, {users:,} users in the log, "
        f"vectors of {INDEX_WIDTH}",
        "figures": {
            "sequence.fit, one epoch, s": {"value": trained},
            "both indices built, s": {"value": built},
            "both indices on disk, GB": {"value": size / 1e9},
            **milliseconds("dense part alone", alone, marked=True),
            f"dense part alone: recall@{K}": figure(recalls(found, best_dense), mark=LEAST_RECALL),
            **milliseconds("whole list, user asked the first time", first),
            **milliseconds("whole list, likest known", again),
            f"whole list: recall@{K}": figure(recalls(listed, best_lists)),
            "peak memory, GB": {"value": peak},
        },
    }


def searched(retriever: Retriever, dense: np.ndarray) -> np.ndarray:
    """The dense part's best for one query."""
    return retriever.dense_best(dense, K)


def listed_for(retriever: Retriever, query: Queries) -> np.ndarray:
    """The list of one user."""
    items: np.ndarray = retriever.candidates(query, K)[0][0]
    return items


def single(queries: Queries) -> list[Queries]:
    """Each alone."""
    return [queries[at : at + 1] for at in range(len(queries))]


def one_by_one(
    ask: Callable[[Any], np.ndarray], queries: Sequence[Any], warm: Sequence[Any]
) -> tuple[np.ndarray, list[np.ndarray]]:
    """Seconds (Q,) and answer of each query, after those of `warm`."""
    for query in warm:
        ask(query)
    answered = [timed(partial(ask, query)) for query in queries]
    return np.array([seconds for seconds, _ in answered]), [answer for _, answer in answered]


def exact_best(queries: np.ndarray, items: np.ndarray) -> np.ndarray:
    """int32 (Q, 100): the largest inner products of queries (Q, D) and items (I, D), in blocks."""
    step = rows_at_once(len(items))
    return np.concatenate([best(queries[at : at + step] @ items.T, K)[0] for at in range(0, len(queries), step)])


def recalls(found: Sequence[np.ndarray], exact: np.ndarray) -> np.ndarray:
    """float64 (Q,): the share of each row of `exact` (Q, k) that was found, wherever."""
    return np.array([np.isin(of, items).mean() for items, of in zip(found, exact, strict=True)])


# Figures


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds on the wall, and the result."""
    started = time.perf_counter()
    result = work()
    return time.perf_counter() - started, result


def peak_memory() -> float:
    """GB (1e9 bytes) that this process had resident at most; Linux, which counts in KiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def milliseconds(what: str, seconds: np.ndarray, marked: bool = False) -> dict[str, Figure]:
    """Median and 99th percentile; the mark is the latter's."""
    middle, high = np.percentile(seconds * 1000, [50, 99])
    slow = {"value": float(high)}
    return {
        f"{what}: p50, ms": {"value": float(middle)},
        f"{what}: p99, ms": at_most(slow, MOST_MS) if marked else slow,
    }


def markdown(result: dict[str, Any]) -> str:
    """A section's table."""
    rows = [(name, shown(of, 0 if of["value"] >= 100 else 3)) for name, of in result["figures"].items()]
    lines = [f"{result['title']}", "", "| figure | value |", "|---|---|"]
    return "\n".join([*lines, *(f"| {name} | {value} |" for name, value in rows), ""])


SECTIONS: dict[str, Callable[[int, int], dict[str, Any]]] = {"lists": lists, "index": index}


if __name__ == "__main__":
    if sys.argv[1:2] and sys.argv[1] in SECTIONS:  # the measured process
        print(json.dumps(SECTIONS[sys.argv[1]](int(sys.argv[2]), int(sys.argv[3]))))
    else:
        main()
