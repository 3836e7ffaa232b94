"""Metrics of lists: worked by hand, equal to their definitions, blind to what must not matter, strict."""

import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mllm_srec import metrics
from mllm_srec.metrics import (
    average_precision,
    coverage,
    exposure_gini,
    intra_list_diversity,
    mrr,
    ndcg,
    novelty,
    places,
    places_in_lists,
    popularity_lift,
    recall,
)


def ints(*values: int) -> np.ndarray:
    return np.array(values, dtype=np.int64)


def random_lists(lists: int, k: int, catalogue: int, seed: int) -> np.ndarray:
    """Lists of k different items."""
    scores = np.random.default_rng(seed).random((lists, catalogue))
    items: np.ndarray = np.argsort(scores, axis=1)[:, :k].astype(np.int32)
    return items


SHAPES = st.tuples(st.integers(1, 6), st.integers(2, 5), st.integers(5, 9), st.integers(0, 99))
"""Number of lists, k, items of the catalogue, seed."""


# Places in lists


def test_a_target_stands_at_its_place_in_the_list_or_right_behind_it() -> None:
    greater, ties = places_in_lists(np.array([[3, 1, 2], [0, 1, 2], [4, 0, 1]]), ints(2, 4, 4))
    assert greater.tolist() == [2, 3, 0]
    assert ties.tolist() == [0, 0, 0]
    assert greater.dtype == ties.dtype == np.int64
    assert recall(greater, ties, 2).tolist() == [0, 0, 1]
    assert recall(greater, ties, 3).tolist() == [1, 0, 1]
    np.testing.assert_allclose(mrr(greater, ties, 3), [1 / 3, 0, 1], rtol=1e-14)


@given(st.permutations(range(12)), st.integers(0, 11), st.integers(1, 12), st.integers(1, 12))
def test_a_list_gives_the_metrics_of_its_scores_up_to_its_length(
    scores: list[int], target: int, length: int, k: int
) -> None:
    k = min(k, length)
    row = np.array([scores], dtype=np.float32)
    whole = places(row, ints(target))
    listed = places_in_lists(np.argsort(-row, axis=1)[:, :length], ints(target))
    for metric in (recall, ndcg, mrr, average_precision):
        assert metric(*listed, k) == metric(*whole, k)


def test_lists_that_cannot_be_read_are_refused() -> None:
    good = np.array([[0, 1], [2, 3]])
    assert places_in_lists(good, ints(1, 1))[0].tolist() == [1, 2]
    with pytest.raises(ValueError, match="list 1 holds its target 2 more than once"):
        places_in_lists(np.array([[0, 1], [2, 2]]), ints(1, 2))
    with pytest.raises(ValueError, match=r"items are \(2, 2\), target \(1,\)"):
        places_in_lists(good, ints(1))
    for shape in ((2,), (2, 0)):
        with pytest.raises(ValueError, match="items has shape"):
            places_in_lists(np.zeros(shape, dtype=np.int64), ints(0, 0))


# Coverage and Gini


def test_coverage_and_gini_by_hand() -> None:
    # Shown 1, 2, 1, 0, 0 times: 3 of 5 items. Ascending 0, 0, 1, 1, 2 with weights -4, -2, 0, 2, 4: 10 / (4 * 4).
    lists = np.array([[0, 1], [1, 2]])
    assert coverage(lists, 5) == 3 / 5
    assert exposure_gini(lists, 5) == 10 / 16


def test_one_item_in_every_place_has_gini_1_and_equal_exposure_0() -> None:
    assert exposure_gini(np.full((7, 1), 2), 5) == 1
    assert coverage(np.full((7, 1), 2), 5) == 1 / 5
    assert exposure_gini(np.array([[0, 1], [2, 3], [1, 0], [3, 2]]), 4) == 0
    assert coverage(np.array([[0, 1], [2, 3]]), 4) == 1
    assert (exposure_gini(np.zeros((3, 1), dtype=np.int64), 1), coverage(np.zeros((3, 1), dtype=np.int64), 1)) == (0, 1)


@given(SHAPES)
def test_gini_is_half_the_relative_mean_difference(shape: tuple[int, int, int, int]) -> None:
    catalogue = shape[2]
    items = random_lists(*shape)
    shown = [items.ravel().tolist().count(item) for item in range(catalogue)]
    differences = sum(abs(a - b) for a, b in itertools.product(shown, repeat=2))
    assert exposure_gini(items, catalogue) == pytest.approx(differences / (2 * (catalogue - 1) * sum(shown)), rel=1e-12)
    assert coverage(items, catalogue) == sum(times > 0 for times in shown) / catalogue


# Novelty


def test_novelty_by_hand() -> None:
    # With one added: 8, 4, 2, 2 of 16, so 1, 2, 3 and 3 bits.
    values = novelty(np.array([[0, 1], [2, 3], [3, 0]]), np.array([7, 3, 1, 1]))
    np.testing.assert_allclose(values, [3 / 2, 3, 2], rtol=1e-14)


def test_items_that_nobody_has_chosen_are_the_most_novel() -> None:
    np.testing.assert_allclose(novelty(np.array([[0], [1], [2]]), np.array([5, 0, 1])), np.log2([9 / 6, 9, 9 / 2]))
    np.testing.assert_allclose(novelty(np.array([[0, 1, 2]]), np.zeros(8, dtype=np.float32)), [3], rtol=1e-14)


# Diversity

VECTORS = np.array([[1, 0], [0, 2], [-3, 0], [1, 1], [5, 0], [0, 0]], dtype=np.float32)


def test_diversity_by_hand() -> None:
    def of(*items: int) -> float:
        return float(intra_list_diversity(np.array([items]), VECTORS)[0])

    assert of(0, 1) == pytest.approx(1, rel=1e-14)
    assert of(0, 2) == pytest.approx(2, rel=1e-14)
    assert of(0, 4) == pytest.approx(0, abs=1e-14)
    # Pairs: 1, 2 and 1.
    assert of(0, 1, 2) == pytest.approx(4 / 3, rel=1e-14)
    # Pairs: 1 and twice 1 - 1 / sqrt(2).
    assert of(0, 3, 1) == pytest.approx(1 - math.sqrt(2) / 3, rel=1e-12)
    # A vector of zeros has nothing in common with any: pairs 1, 1 and 0.
    assert of(5, 0, 4) == pytest.approx(2 / 3, rel=1e-14)


@given(SHAPES, st.sampled_from([1e-3, 1.0, 700.0]))
def test_diversity_is_the_mean_over_pairs_of_any_lengths(shape: tuple[int, int, int, int], scale: float) -> None:
    _, k, catalogue, seed = shape
    items = random_lists(*shape)
    vectors = np.random.default_rng(seed + 1).normal(size=(catalogue, 3))
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    pairs = list(itertools.combinations(range(k), 2))
    expected = [sum(1 - unit[row[a]] @ unit[row[b]] for a, b in pairs) / len(pairs) for row in items]
    np.testing.assert_allclose(intra_list_diversity(items, vectors * scale), expected, rtol=1e-9, atol=1e-12)


def test_equal_content_is_never_below_0() -> None:
    vectors = np.random.default_rng(0).normal(size=(1, 384)).repeat(60, 0).astype(np.float32)
    values = intra_list_diversity(random_lists(50, 10, 60, 0), vectors)
    assert (values >= 0).all()
    np.testing.assert_allclose(values, 0, atol=1e-13)


# Popularity lift


def test_popularity_lift_by_hand() -> None:
    # Lists: means 3 and 1/2. Histories: 1 and (2 + 2 + 4) / 3. So 7/2 over 11/3.
    lift = popularity_lift(np.array([[0, 1], [2, 3]]), [ints(2), ints(1, 1, 0)], np.array([4, 2, 1, 0]))
    assert lift == pytest.approx(21 / 22, rel=1e-14)


@given(SHAPES, st.sampled_from([0.25, 3.0, 1e6]))
def test_lists_like_the_histories_have_lift_1_and_the_scale_does_not_matter(
    shape: tuple[int, int, int, int], scale: float
) -> None:
    items = random_lists(*shape)
    popularity = np.random.default_rng(shape[3]).integers(1, 50, size=shape[2])
    assert popularity_lift(items, list(items[:, ::-1]), popularity) == pytest.approx(1, rel=1e-12)
    histories = [np.arange(n % shape[2] + 1) for n in range(shape[0])]
    wanted = popularity_lift(items, histories, popularity)
    assert popularity_lift(items, histories, popularity * scale) == pytest.approx(wanted, rel=1e-12)


def test_lists_of_the_most_popular_lift_and_of_the_least_popular_sink() -> None:
    popularity, histories = np.array([9, 5, 2, 1]), [ints(1, 2), ints(0, 3)]
    assert popularity_lift(np.array([[0, 1]] * 2), histories, popularity) > 1
    assert popularity_lift(np.array([[2, 3]] * 2), histories, popularity) < 1


def test_a_lift_without_histories_is_refused() -> None:
    items, popularity = np.array([[0], [1]]), np.array([1, 2, 0])
    assert popularity_lift(items, [ints(1), ints(0)], popularity) == 1
    for histories, message in (
        ([ints(1)], "2 lists, 1 histories"),
        ([ints(1), ints()], "history 1 is empty"),
        ([ints(1), ints(3)], "histories hold 3, which is not one of the 3 items"),
        ([ints(2), ints(2)], "no popularity to divide by"),
    ):
        with pytest.raises(ValueError, match=message):
            popularity_lift(items, histories, popularity)


# All of them

POPULARITY = np.array([7.0, 3, 1, 0, 2, 2])
HISTORIES = [ints(0, 4), ints(1), ints(2, 2, 5), ints(3, 0)]
LISTS = np.array([[0, 1, 4], [1, 2, 3], [5, 0, 1], [4, 2, 0]])


def per_list(items: np.ndarray) -> list[np.ndarray]:
    return [novelty(items, POPULARITY), intra_list_diversity(items, VECTORS)]


def of_all(items: np.ndarray, histories: list[np.ndarray]) -> list[float]:
    return [coverage(items, 6), exposure_gini(items, 6), popularity_lift(items, histories, POPULARITY)]


@given(st.permutations(range(4)), st.permutations(range(3)))
def test_the_order_of_users_and_of_a_list_changes_nothing(users: list[int], order: list[int]) -> None:
    moved = LISTS[users][:, order]
    for got, wanted in zip(per_list(moved), per_list(LISTS), strict=True):
        np.testing.assert_allclose(got, wanted[users], rtol=1e-12)
    assert of_all(moved, [HISTORIES[u] for u in users]) == pytest.approx(of_all(LISTS, HISTORIES), rel=1e-12)


@pytest.mark.parametrize("block", [1, 3, 4])
def test_blocks_change_nothing(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted, wanted_of_all = per_list(LISTS), of_all(LISTS, HISTORIES)
    monkeypatch.setattr(metrics, "BLOCK", block)
    for got, expected in zip(per_list(LISTS), wanted, strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-14)
    assert of_all(LISTS, HISTORIES) == pytest.approx(wanted_of_all, rel=1e-14)


@pytest.mark.parametrize(
    "metric",
    [
        lambda items: coverage(items, 6),
        lambda items: exposure_gini(items, 6),
        lambda items: novelty(items, POPULARITY),
        lambda items: intra_list_diversity(items, VECTORS),
        lambda items: popularity_lift(items, HISTORIES[: len(items)], POPULARITY),
    ],
)
def test_items_outside_the_catalogue_and_lists_of_nothing_are_refused(metric: Callable[[np.ndarray], object]) -> None:
    assert np.isfinite(metric(np.array([[0, 5], [5, 1]]))).all()
    for item in (-1, 6):
        with pytest.raises(ValueError, match=f"lists hold {item}, which is not one of the 6 items"):
            metric(np.array([[0, 5], [item, 1]]))
    for shape in ((2,), (2, 0)):
        with pytest.raises(ValueError, match="items has shape"):
            metric(np.zeros(shape, dtype=np.int64))


def test_no_lists_have_no_values_per_list_and_none_of_all() -> None:
    none = np.zeros((0, 3), dtype=np.int64)
    assert [values.shape for values in per_list(none)] == [(0,), (0,)]
    for metric in (coverage, exposure_gini):
        with pytest.raises(ValueError, match="there is no list"):
            metric(none, 6)
    with pytest.raises(ValueError, match="no popularity to divide by"):
        popularity_lift(none, [], POPULARITY)


@pytest.mark.parametrize("count", [-1.0, math.nan, math.inf])
def test_popularity_that_is_no_count_is_refused(count: float) -> None:
    popularity = np.array([1.0, 2.0, count])
    with pytest.raises(ValueError, match=f"popularity of item 2 is {count}"):
        novelty(np.array([[0, 1]]), popularity)
    with pytest.raises(ValueError, match=f"popularity of item 2 is {count}"):
        popularity_lift(np.array([[0, 1]]), [ints(0)], popularity)


def test_diversity_needs_a_pair_and_finite_vectors() -> None:
    with pytest.raises(ValueError, match="needs k >= 2"):
        intra_list_diversity(np.array([[0]]), VECTORS)
    broken = VECTORS.copy()
    broken[3, 1] = np.nan
    with pytest.raises(ValueError, match="the vector of item 3 is not finite"):
        intra_list_diversity(np.array([[0, 1]]), broken)
