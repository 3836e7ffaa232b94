"""Places of targets, alone and after reranking, agree with a ranking written out; tables say what they were made of."""

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mllm_srec import metrics
from mllm_srec.config import Config, EvaluationConfig, RetrievalConfig
from mllm_srec.data.dataset import Dataset, Histories
from mllm_srec.data.split import Targets, leave_last_out
from mllm_srec.evaluation import protocol
from mllm_srec.evaluation.protocol import (
    Places,
    compare,
    conditions,
    histories_of,
    per_target,
    place_reranked,
    place_targets,
    target_items,
)


def ints(*values: int) -> np.ndarray:
    return np.array(values, dtype=np.int64)


def both(places: Places) -> list[tuple[int, int]]:
    return list(zip(places.greater.tolist(), places.ties.tolist(), strict=True))


# Two users: 0 chose items 4, 1, 4, 2; 1 chose 0, 3, 1.
HISTORIES = Histories(
    users=["a", "b"],
    items=[f"i{n}" for n in range(6)],
    offsets=ints(0, 4, 7),
    item=np.array([4, 1, 4, 2, 0, 3, 1], dtype=np.int32),
    time=None,
    rating=np.full(7, np.nan, dtype=np.float32),
)
# The last event of each, the repeat of item 4, and an event whose neighbour before it is not visible.
TARGETS = Targets(user=ints(0, 0, 1, 1), position=ints(3, 2, 2, 2), end=ints(3, 2, 2, 1))
VISIBLE = [[4, 1, 4], [4, 1], [0, 3], [0]]
ROW = np.array([5, 1, 3, 3, 9, 1], dtype=np.float32)


# Targets in the full catalogue


def test_each_target_sees_the_events_before_its_end() -> None:
    assert [history.tolist() for history in histories_of(HISTORIES, TARGETS)] == VISIBLE
    assert target_items(HISTORIES, TARGETS).tolist() == [2, 4, 1, 1]
    assert HISTORIES.time is None and histories_of(HISTORIES, TARGETS).times is None
    timed = replace(HISTORIES, time=np.arange(len(HISTORIES.item), dtype=np.int64) * 10)
    asked = histories_of(timed, TARGETS)
    assert asked.times is not None and asked.now is not None
    for times, history, now, user, position in zip(
        asked.times, asked, asked.now, TARGETS.user, TARGETS.position, strict=True
    ):
        assert times.tolist() == (10 * (timed.offsets[user] + np.arange(len(history)))).tolist()
        assert now == 10 * (timed.offsets[user] + position)


@pytest.mark.parametrize("block", [1, 3, 256])
def test_targets_are_placed_among_the_items_not_seen(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol, "BLOCK", block)
    given_histories: list[list[int]] = []

    def scorer(histories: Sequence[np.ndarray]) -> np.ndarray:
        assert len(histories) <= block
        given_histories.extend(history.tolist() for history in histories)
        return np.repeat(ROW[None], len(histories), 0)

    # Item 2 (score 3) without 4 and 1: item 0 above, 3 tied. The repeat of item 4 is masked: behind all six items.
    # Item 1 (score 1) without 0 and 3: 2 and 4 above, 5 tied; without 0 alone also 3 above.
    assert both(place_targets(HISTORIES, TARGETS, scorer)) == [(1, 1), (6, 0), (2, 1), (3, 1)]
    assert given_histories == VISIBLE
    # Where repeats are allowed all six compete: 4 and 0 above 2, 3 tied with it; nothing above 4; four above 1, 5 tied.
    assert both(place_targets(HISTORIES, TARGETS, scorer, repeats=True)) == [(2, 1), (0, 0), (4, 1), (4, 1)]


def test_no_targets_have_no_places() -> None:
    def scorer(_: Sequence[np.ndarray]) -> np.ndarray:
        raise AssertionError("there is nothing to score")

    got = place_targets(HISTORIES, TARGETS.take(ints()), scorer)
    assert got.greater.shape == got.ties.shape == (0,)
    assert got.greater.dtype == got.ties.dtype == np.int64


def test_scores_that_are_not_numbers_are_refused() -> None:
    with pytest.raises(ValueError, match="row 0 hold NaN"):
        place_targets(HISTORIES, TARGETS, lambda histories: np.full((len(histories), 6), np.nan))


# Targets after reranking


def test_a_reranked_target_is_placed_inside_or_behind_its_list() -> None:
    scores = np.array([[9, 8, 7, 7, 7, 7, 1]] * 4, dtype=np.float32)
    target = ints(1, 2, 5, 6)
    retrieved = Places(*metrics.places(scores, target))
    assert both(retrieved) == [(1, 0), (2, 3), (2, 3), (6, 0)]
    items, fused = np.array([[0, 1, 2, 3]] * 4), np.array([[0.1, 0.5, 0.5, 0.9]] * 4)
    # In the list, the list alone counts: 3 above, the other 0.5 tied. Item 5 is left with 4 of the four sevens, behind
    # the list; item 6 stands where it stood.
    assert both(place_reranked(retrieved, items, fused, target)) == [(1, 1), (1, 1), (4, 1), (6, 0)]
    assert both(retrieved) == [(1, 0), (2, 3), (2, 3), (6, 0)]


@st.composite
def reranked_cases(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, list[np.ndarray], np.ndarray, np.ndarray]:
    """Retrieval scores and fused scores with many ties, masks that leave at least K items, and targets anywhere."""
    rows, count = draw(st.integers(1, 4)), draw(st.integers(2, 9))
    k = draw(st.integers(1, count))
    scores = draw(st.lists(st.lists(st.integers(0, 3), min_size=count, max_size=count), min_size=rows, max_size=rows))
    fused = draw(st.lists(st.lists(st.integers(0, 2), min_size=k, max_size=k), min_size=rows, max_size=rows))
    target = draw(st.lists(st.integers(0, count - 1), min_size=rows, max_size=rows))
    seen = [ints(*draw(st.lists(st.integers(0, count - 1), max_size=count - k))) for _ in range(rows)]
    listed = []
    for row, masked in zip(scores, seen, strict=True):
        left = [i for i in range(count) if i not in masked]
        listed.append(sorted(left, key=lambda i: -row[i])[:k])  # a stable sort cuts ties by position
    return np.array(scores, dtype=np.float32), ints(*target), seen, np.array(listed), np.array(fused, dtype=np.float64)


@given(reranked_cases())
def test_reranked_places_are_those_of_the_whole_ranking(
    case: tuple[np.ndarray, np.ndarray, list[np.ndarray], np.ndarray, np.ndarray],
) -> None:
    scores, target, seen, items, fused = case
    expected = []
    for row, wanted, masked, listed, new in zip(scores, target, seen, items, fused, strict=True):
        # The list by its new scores, then the other items by retrieval, as keys to sort by.
        key = {i: (1, score) for i, score in zip(listed.tolist(), new.tolist(), strict=True)}
        for i in range(len(row)):
            if i not in key and i not in masked:
                key[i] = (0, float(row[i]))
        if wanted in masked:
            expected.append((len(row), 0))
        else:
            own = key[int(wanted)]
            expected.append((sum(other > own for other in key.values()), list(key.values()).count(own) - 1))
    retrieved = Places(*metrics.places(scores, target, seen))
    assert both(place_reranked(retrieved, items, fused, target)) == expected


def test_reranking_by_retrieval_itself_changes_nothing_but_the_cut_of_ties() -> None:
    scores = np.random.default_rng(0).permutation(40).reshape(1, 40).repeat(40, 0).astype(np.float32)
    retrieved = Places(*metrics.places(scores, np.arange(40)))
    items = np.argsort(-scores, axis=1)[:, :10]
    got = place_reranked(retrieved, items, np.take_along_axis(scores, items, 1), np.arange(40))
    assert both(got) == both(retrieved)


def test_fused_scores_that_are_not_numbers_are_refused() -> None:
    retrieved, items = Places(ints(0, 0), ints(0, 0)), np.array([[0, 1], [0, 1]])
    with pytest.raises(ValueError, match="row 1 hold NaN"):
        place_reranked(retrieved, items, np.array([[1.0, 2.0], [np.nan, 2.0]]), ints(0, 0))


# Tables


def test_each_target_has_every_metric_at_every_cutoff() -> None:
    values = per_target(Places(ints(0, 2), ints(0, 1)), (1, 3))
    assert list(values) == ["Recall@1", "NDCG@1", "Recall@3", "NDCG@3", "MRR"]
    expected = {
        "Recall@1": [1, 0],
        "NDCG@1": [1, 0],
        "Recall@3": [1, 1 / 2],
        "NDCG@3": [1, 1 / math.log2(4) / 2],
        "MRR": [1, (1 / 3 + 1 / 4) / 2],
    }
    for name, wanted in expected.items():
        np.testing.assert_allclose(values[name], wanted, rtol=1e-14)


def test_places_are_written_for_whoever_compares_further(tmp_path: Path) -> None:
    systems = {"one": Places(ints(0, 1, 2, 3), ints(1, 1, 2, 1)), "two": Places(ints(4, 0, 0, 1), ints(1, 1, 1, 3))}
    protocol.write_places(tmp_path / "places.parquet", systems, HISTORIES, TARGETS)
    table = pl.read_parquet(tmp_path / "places.parquet")
    assert table.columns == ["system", "user_id", "position", "item_id", "greater", "ties"]
    assert table["system"].to_list() == ["one"] * 4 + ["two"] * 4
    wanted = protocol.target_items(HISTORIES, TARGETS)
    for name, places in systems.items():
        rows = table.filter(pl.col("system") == name)
        assert rows["user_id"].to_list() == [HISTORIES.users[user] for user in TARGETS.user]
        assert rows["position"].to_list() == TARGETS.position.tolist()
        assert rows["item_id"].to_list() == [HISTORIES.items[item] for item in wanted]
        assert (rows["greater"].to_list(), rows["ties"].to_list()) == (places.greater.tolist(), places.ties.tolist())


CONFIG = Config(evaluation=EvaluationConfig(cutoffs=(2,), bootstrap=200), seed=5)


def test_systems_are_compared_with_the_reference_on_the_same_targets() -> None:
    users = np.arange(60) // 2
    systems = {
        "good": Places(np.zeros(60, np.int64), np.zeros(60, np.int64)),
        "half": Places(np.arange(60) % 2 * 8, np.zeros(60, np.int64)),
        "twin": Places(np.arange(60) % 2 * 8, np.zeros(60, np.int64)),
    }
    table = compare(systems, "half", users, CONFIG)
    assert list(table) == ["good", "half", "twin"]
    assert all(list(rows) == ["Recall@2", "NDCG@2", "MRR"] for rows in table.values())
    assert set(table["half"]["MRR"]) == {"mean", "low", "high"}
    assert set(table["good"]["MRR"]) == {"mean", "low", "high", "gain", "gain_low", "gain_high", "p"}
    # Each user has one target at rank 1 and one at rank 9: resampling users moves nothing.
    assert table["half"]["Recall@2"] == {"mean": 0.5, "low": 0.5, "high": 0.5}
    assert table["half"]["MRR"]["mean"] == pytest.approx((1 + 1 / 9) / 2)
    good = table["good"]["Recall@2"]
    assert [good[key] for key in ("mean", "gain", "gain_low", "gain_high")] == [1, 0.5, 0.5, 0.5]
    assert good["p"] == pytest.approx(2 / 201)
    twin = table["twin"]["NDCG@2"]
    assert [twin[key] for key in ("gain", "gain_low", "gain_high", "p")] == [0, 0, 0, 1]


def test_a_comparison_takes_samples_and_seed_from_the_configuration() -> None:
    generator = np.random.default_rng(0)
    places = Places(generator.integers(0, 9, 50), generator.integers(0, 3, 50))
    other = Places(generator.integers(0, 9, 50), generator.integers(0, 3, 50))
    users = np.arange(50)
    got = compare({"a": places, "b": other}, "b", users, CONFIG)["a"]["MRR"]
    per, reference = per_target(places, (2,))["MRR"], per_target(other, (2,))["MRR"]
    interval, paired = (
        metrics.bootstrap(per, users, 200, 5),
        metrics.paired_bootstrap(per, reference, users, 200, 5),
    )
    assert got == {
        "mean": interval.mean,
        "low": interval.low,
        "high": interval.high,
        "gain": paired.mean,
        "gain_low": paired.low,
        "gain_high": paired.high,
        "p": paired.p_value,
    }
    assert got["gain"] == pytest.approx(per.mean() - reference.mean())


def test_conditions_name_all_that_a_figure_depends_on() -> None:
    log = [("u1", "abcb"), ("u2", "dabc"), ("u3", "ab")]
    interactions = pl.DataFrame([(u, i) for u, items in log for i in items], ["user_id", "item_id"], orient="row")
    dataset = Dataset.build(
        "small shop", pl.DataFrame({"item_id": list("abcde")}), interactions, has_time=False, root=None
    ).with_repeats("first")
    split = leave_last_out(dataset.histories(), "file_order", 3)
    config = Config(evaluation=EvaluationConfig(bootstrap=150), retrieval=RetrievalConfig(candidates=4), seed=9)
    targets = Targets(ints(0, 1, 1), ints(2, 3, 2), ints(2, 3, 2))
    assert conditions(dataset, split, targets, config) == {
        "data": "small shop",
        "users": 2,
        "items": 5,
        "targets": 3,
        "protocol": "leave_last_out",
        "tie_rule": "file_order",
        "repeats": "first",
        "repeats_dropped": 1,
        "min_history": 3,
        "users_too_short": 1,
        "targets_without_history": 0,
        "catalogue": "full, items of the user's history masked",
        "ties": "expectation over random orders",
        "reranked": 4,
        "intervals": "95 %, bootstrap over users, 150 samples",
        "model": config.model.name,
        "seed": 9,
    }
