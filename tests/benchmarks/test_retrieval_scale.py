"""The generated log of `retrieval_scale.py`, what it counts, and both sections at a small size."""

import json
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from mllm_srec.retrieval import retriever

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

import retrieval_scale as bench

USERS, ITEMS = 60, 600

LISTS = [
    "CoOccurrence.fit, s",
    "Trend.fit, s",
    "sequence.fit, one epoch, s",
    "users fitted per second: counts and trend",
    "users fitted per second: one epoch",
    "likest of the N items asked about, s",
    "100 best for all users, likest known, s",
    "100 best for all users, both, s",
    "lists per second, both",
    "peak memory, GB",
]
INDEX = [
    "sequence.fit, one epoch, s",
    "both indices built, s",
    "both indices on disk, GB",
    "dense part alone: p50, ms",
    "dense part alone: p99, ms",
    "dense part alone: recall@100",
    "whole list, user asked the first time: p50, ms",
    "whole list, user asked the first time: p99, ms",
    "whole list, likest known: p50, ms",
    "whole list, likest known: p99, ms",
    "whole list: recall@100",
    "peak memory, GB",
]


# The log


def test_a_log_is_sound_and_seeded() -> None:
    histories, vectors = bench.drawn_log(2000, 650, 8)
    sizes = np.diff(histories.offsets)
    assert len(histories.users) == len(sizes) == 2000 and len(histories.items) == 650
    assert (sizes.min(), sizes.max()) == (5, 35) and sizes.mean() == pytest.approx(20, abs=1)
    assert histories.offsets[0] == 0 and histories.offsets[-1] == len(histories.item) == len(histories.rating)
    assert histories.item.dtype == np.int32 and histories.item.min() == 0 and histories.item.max() == 649
    assert histories.time is not None and len(histories.time) == len(histories.item)
    inside = np.ones(len(histories.item), dtype=bool)
    inside[histories.offsets[:-1]] = False
    assert (np.diff(histories.time) >= 0)[inside[1:]].all()
    assert histories.time.min() >= bench.START and histories.time.max() < bench.START + bench.YEAR
    # From the first to the last of n even draws: (n - 1) / (n + 1) of the year.
    spans = histories.time[histories.offsets[1:] - 1] - histories.time[histories.offsets[:-1]]
    assert np.mean(spans / bench.YEAR) == pytest.approx(np.mean((sizes - 1) / (sizes + 1)), abs=0.02)
    assert vectors.shape == (650, 8) and vectors.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    again, same = bench.drawn_log(2000, 650, 8)
    np.testing.assert_array_equal(again.item, histories.item)
    np.testing.assert_array_equal(again.time, histories.time)
    np.testing.assert_array_equal(same, vectors)


def test_users_choose_by_zipf_within_their_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "AWAY", 0.0)
    monkeypatch.setattr(bench, "LIKED", 1)
    histories, vectors = bench.drawn_log(3000, 400, 32)
    # One group per user: the items that one user chose lie around one centre, those of two groups do not.
    cosine = vectors @ vectors.T
    own = np.concatenate([cosine[np.ix_(row, row)].ravel() for row in map(histories.of, range(200))])
    assert own.mean() > 0.5 and cosine.mean() < 0.25
    # Most chosen of a group of 100: 1 / (1 + 1/2 + ... + 1/100) = 0.193 of a quarter of all; the second half of that.
    share = np.sort(np.bincount(histories.item, minlength=400))[::-1] / len(histories.item)
    assert share[:4] == pytest.approx(np.full(4, 0.193 / 4), rel=0.1)
    assert share[4:8] == pytest.approx(np.full(4, 0.193 / 8), rel=0.1)


def test_a_share_of_events_is_anywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    # 200 items are two groups, the 99 left over belong to none: a third of what is chosen anywhere.
    histories, _ = bench.drawn_log(3000, 299, 4)
    counts = np.sort(np.bincount(histories.item, minlength=299)) / len(histories.item)
    assert counts[:99].sum() == pytest.approx(0.2 * 99 / 299, rel=0.1)
    monkeypatch.setattr(bench, "AWAY", 0.0)
    histories, _ = bench.drawn_log(3000, 299, 4)
    assert len(np.unique(histories.item)) == 200


def test_queries_are_whole_histories_with_their_times() -> None:
    histories, _ = bench.drawn_log(20, 200, 4)
    queries = bench.queries_of(histories, [3, 0])
    assert len(queries) == 2 and queries.now is None
    assert queries.times is not None and histories.time is not None
    np.testing.assert_array_equal(queries[0], histories.of(3))
    np.testing.assert_array_equal(queries.times[1], histories.time[: histories.length(0)])
    alone = bench.single(queries)[1]
    np.testing.assert_array_equal(alone[0], histories.of(0))
    assert len(alone) == 1 and alone.times is not None and len(alone.times) == 1


# What is counted


def test_recall_by_hand() -> None:
    exact = np.array([[1, 2, 3, 4], [5, 6, 7, 8]])
    found = [np.array([4, 9, 2, 10]), np.array([8, 7])]
    assert bench.recalls(found, exact).tolist() == [0.5, 0.5]
    assert bench.recalls([exact[0][::-1], np.array([], dtype=np.int64)], exact).tolist() == [1, 0]


def test_exact_lists_are_those_of_the_whole_product(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "K", 3)
    monkeypatch.setattr(bench, "rows_at_once", lambda items: 2)  # five queries: blocks of two and what is left
    generator = np.random.default_rng(0)
    queries, items = generator.normal(size=(5, 4)), generator.normal(size=(30, 4))
    found = bench.exact_best(queries, items)
    np.testing.assert_array_equal(found, np.argsort(-(queries @ items.T), axis=1)[:, :3])
    assert bench.recalls(list(found), found).tolist() == [1] * 5


def test_queries_are_asked_one_at_a_time_after_the_warm_ones() -> None:
    asked: list[int] = []

    def ask(query: int) -> np.ndarray:
        asked.append(query)
        time.sleep(0.02 if query == 3 else 0.0)
        return np.array([query])

    seconds, answers = bench.one_by_one(ask, [3, 4], [7])
    assert asked == [7, 3, 4]
    assert [answer.item() for answer in answers] == [3, 4]
    assert seconds[0] >= 0.02 > seconds[1] > 0


@pytest.mark.parametrize(("slowest", "met"), [(20.0, True), (40.0, False)])
def test_the_mark_is_that_of_the_99th_percentile(slowest: float, met: bool) -> None:
    seconds = np.array([0.001] * 90 + [slowest / 1000] * 10)
    of = bench.milliseconds("a", seconds, marked=True)
    assert of["a: p50, ms"] == {"value": pytest.approx(1)}
    assert of["a: p99, ms"]["value"] == pytest.approx(slowest)
    assert of["a: p99, ms"]["met"] is met
    assert "mark" not in bench.milliseconds("a", seconds)["a: p99, ms"]


def test_peak_memory_is_told_in_gigabytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrusage", lambda who: SimpleNamespace(ru_maxrss=2_000_000))  # KiB
    assert bench.peak_memory() == pytest.approx(2.048)


def test_the_table_by_hand() -> None:
    figures = {
        "a, s": {"value": 61.25, "mark": "at most 60", "met": False},
        "b per second": {"value": 1234.5},
        "recall": {"value": 0.96, "low": 0.95, "high": 0.97, "n": 9, "mark": 0.95, "met": True},
    }
    assert bench.markdown({"title": "lists: few", "figures": figures}).splitlines() == [
        "lists: few",
        "",
        "| figure | value |",
        "|---|---|",
        "| a, s | 61.250  misses at most 60 |",
        "| b per second | 1234 |",
        "| recall | 0.960 (0.950 to 0.970)  meets 0.95 |",
    ]


# Sections


def without_counts(figures: dict[str, Any]) -> list[str]:
    return ["likest of the N items asked about, s" if name.startswith("likest") else name for name in figures]


def test_lists_of_few_users_have_every_figure() -> None:
    result = bench.lists(USERS, ITEMS)
    figures = result["figures"]
    assert without_counts(figures) == LISTS
    assert all(of["value"] > 0 for of in figures.values())
    marked = {name: of["met"] for name, of in figures.items() if "mark" in of}
    assert list(marked) == ["100 best for all users, both, s", "peak memory, GB"] and marked[LISTS[7]]
    parts = [of["value"] for name, of in figures.items() if name.startswith(("likest", "100 best"))]
    assert parts[0] + parts[1] == pytest.approx(parts[2])
    assert figures["lists per second, both"]["value"] == pytest.approx(USERS / parts[2])
    assert figures["users fitted per second: one epoch"]["value"] == pytest.approx(USERS / figures[LISTS[2]]["value"])


def exhaustive(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every partition is looked into, and every item compared by its full vector."""
    monkeypatch.setattr(retriever, "EXACT", ITEMS - 1)
    monkeypatch.setattr("mllm_srec.retrieval.index.REFINE", ITEMS)


def test_an_index_that_looks_at_everything_misses_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    exhaustive(monkeypatch)
    monkeypatch.setattr(bench, "ASKED", 10)
    monkeypatch.setattr(bench, "WARM", 2)
    result = bench.index(USERS, ITEMS)
    figures = result["figures"]
    assert list(figures) == INDEX
    assert all(of["value"] > 0 for of in figures.values())
    assert "10 queries, 60 users" in result["title"]
    dense, whole = figures[INDEX[5]], figures[INDEX[10]]
    assert dense["value"] == whole["value"] == 1 and dense["n"] == 10
    assert dense["met"] and "mark" not in whole
    assert [name for name, of in figures.items() if "mark" in of] == [INDEX[4], INDEX[5]]


def test_what_the_index_misses_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    exhaustive(monkeypatch)
    monkeypatch.setattr(bench, "ASKED", 4)
    monkeypatch.setattr(bench, "WARM", 1)
    right = bench.searched
    monkeypatch.setattr(bench, "searched", lambda of, dense: right(of, dense)[:60])
    figures = bench.index(USERS, ITEMS)["figures"]
    assert figures[INDEX[5]]["value"] == pytest.approx(0.6) and not figures[INDEX[5]]["met"]
    assert figures[INDEX[10]]["value"] == 1


# The program


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["retrieval_scale.py", *arguments])
    bench.main()


def stub(calls: list[tuple[str, int, int]]) -> Callable[[str, int, int], dict[str, Any]]:
    def in_process(name: str, users: int, items: int) -> dict[str, Any]:
        calls.append((name, users, items))
        return {"title": f"title of {name}", "figures": {"a, s": {"value": 2.0}}}

    return in_process


def test_sections_get_their_sizes(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    calls: list[tuple[str, int, int]] = []
    monkeypatch.setattr(bench, "in_process", stub(calls))
    run(monkeypatch)
    assert calls == [("lists", 100_000, 50_000), ("index", 50_000, 1_000_000)]
    out = capsys.readouterr().out
    assert "title of lists" in out and "title of index" in out and "| a, s | 2.000 |" in out and "processor" in out
    run(monkeypatch, "--section", "index", "--users", "4000", "--indexed", "200000", "--json")
    assert calls[2:] == [("index", 2000, 200_000)]
    result = json.loads(capsys.readouterr().out)
    assert list(result["sections"]) == ["index"] and result["machine"]["cores"] >= 1


@pytest.mark.parametrize(
    "arguments",
    [("--section", "lists,indices"), ("--indexed", "100000"), ("--items", "199"), ("--users", "41")],
)
def test_sizes_that_measure_nothing_are_refused(
    arguments: tuple[str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench, "in_process", stub([]))
    with pytest.raises(SystemExit):
        run(monkeypatch, *arguments)
    assert arguments[0] in capsys.readouterr().err


def test_a_section_runs_in_a_process_of_its_own() -> None:
    assert without_counts(bench.in_process("lists", USERS, ITEMS)["figures"]) == LISTS
