"""Places and metrics agree with their definitions, ties included; intervals cover, and resample users."""

import itertools
import math
from collections.abc import Callable
from fractions import Fraction
from random import Random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mllm_srec import metrics
from mllm_srec.metrics import (
    auc,
    average_precision,
    bootstrap,
    hit_rate,
    mrr,
    ndcg,
    paired_bootstrap,
    places,
    recall,
    stratified_bootstrap,
)


def ints(*values: int) -> np.ndarray:
    return np.array(values, dtype=np.int64)


def at(greater: int, ties: int) -> tuple[np.ndarray, np.ndarray]:
    return ints(greater), ints(ties)


def discount(rank: int) -> float:
    return 1 / math.log2(1 + rank)


@st.composite
def cases(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, list[np.ndarray]]:
    """Scores with many ties, targets, and masks that never hold the target."""
    rows, items = draw(st.integers(1, 3)), draw(st.integers(1, 6))
    levels = st.sampled_from([-math.inf, -2.0, 0.0, 0.5, 3.0])
    scores = draw(st.lists(st.lists(levels, min_size=items, max_size=items), min_size=rows, max_size=rows))
    target = draw(st.lists(st.integers(0, items - 1), min_size=rows, max_size=rows))
    others = [[i for i in range(items) if i != t] for t in target]
    seen = [draw(st.lists(st.sampled_from(o), max_size=4)) if o else [] for o in others]
    return np.array(scores, dtype=np.float32), ints(*target), [ints(*s) for s in seen]


def possible_ranks(scores: np.ndarray, target: int, seen: np.ndarray) -> list[int]:
    """The target's rank in every order of the unmasked items that is sorted by score."""
    left = [i for i in range(len(scores)) if i not in seen]
    orders = [o for o in itertools.permutations(left) if all(scores[a] >= scores[b] for a, b in itertools.pairwise(o))]
    return [order.index(target) + 1 for order in orders]


# Places


def test_places_count_what_is_above_and_what_is_tied() -> None:
    scores = np.array([[3, 1, 2, 2, 2, 0], [0, 0, 0, 0, 0, 0], [5, 4, 3, 2, 1, 0]], dtype=np.float32)
    greater, ties = places(scores, ints(2, 5, 0))
    assert greater.tolist() == [1, 0, 0]
    assert ties.tolist() == [2, 5, 0]
    assert greater.dtype == ties.dtype == np.int64


def test_masked_items_do_not_compete() -> None:
    scores = np.array([[3, 1, 2, 2, 2, 0]] * 3, dtype=np.float32)
    greater, ties = places(scores, ints(2, 2, 2), [ints(), ints(0, 3, 3, 0), ints(1, 5)])
    assert greater.tolist() == [1, 0, 1]
    assert ties.tolist() == [2, 1, 2]


def test_a_masked_target_stands_behind_the_whole_catalogue() -> None:
    greater, ties = places(np.array([[9.0, 1, 1], [9.0, 1, 1]]), ints(0, 0), [ints(1, 0), ints(1)])
    assert greater.tolist() == [3, 0]
    assert ties.tolist() == [0, 0]


def test_minus_infinity_is_a_score_like_any_other() -> None:
    scores = np.array([[-np.inf, 0, -np.inf], [-np.inf, 0, np.inf]])
    greater, ties = places(scores, ints(0, 2))
    assert greater.tolist() == [1, 0]
    assert ties.tolist() == [1, 0]


def test_scores_stay_as_they_are() -> None:
    scores = np.array([[1.0, 2.0, 3.0]])
    scores.flags.writeable = False
    seen = [ints(2)]
    places(scores, ints(0), seen)
    assert scores.tolist() == [[1.0, 2.0, 3.0]]
    assert seen[0].tolist() == [2]


def test_nan_is_refused_with_its_row_even_where_it_is_masked() -> None:
    scores = np.array([[1.0, 2.0], [1.0, 2.0], [1.0, np.nan]])
    with pytest.raises(ValueError, match="row 2 hold NaN"):
        places(scores, ints(0, 0, 0))
    with pytest.raises(ValueError, match="row 2 hold NaN"):
        places(scores, ints(0, 0, 0), [ints(), ints(), ints(1)])


@pytest.mark.parametrize("target", [-1, 2])
def test_a_target_outside_the_catalogue_is_refused(target: int) -> None:
    with pytest.raises(ValueError, match=rf"target {target} of row 1 is not one of the 2 items"):
        places(np.zeros((2, 2)), ints(0, target))


@pytest.mark.parametrize(
    ("target", "seen", "message"),
    [
        (ints(0), None, r"scores are \(2, 3\), target \(1,\)$"),
        (ints(0, 1), [ints()], r"scores are \(2, 3\), target \(2,\), seen 1 histories"),
    ],
)
def test_lengths_that_differ_are_refused(target: np.ndarray, seen: list[np.ndarray] | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        places(np.zeros((2, 3)), target, seen)


def test_no_rows_have_no_places() -> None:
    for seen in (None, []):
        greater, ties = places(np.zeros((0, 3), np.float32), ints(), seen)
        assert greater.shape == ties.shape == (0,)
        assert recall(greater, ties, 3).shape == ndcg(greater, ties, 3).shape == mrr(greater, ties).shape == (0,)


@given(cases(), st.integers(-8, 8), st.sampled_from([0.25, 1.0, 3.0, 1024.0]))
def test_a_constant_and_a_positive_scale_change_nothing(
    case: tuple[np.ndarray, np.ndarray, list[np.ndarray]], constant: int, scale: float
) -> None:
    scores, target, seen = case
    for wanted, got in zip(places(scores, target, seen), places(scores * scale + constant, target, seen), strict=True):
        np.testing.assert_array_equal(got, wanted)


@pytest.mark.parametrize("transform", [np.exp, np.arctan, np.cbrt])
@given(case=cases())
def test_a_monotone_transform_changes_nothing(
    transform: Callable[[np.ndarray], np.ndarray], case: tuple[np.ndarray, np.ndarray, list[np.ndarray]]
) -> None:
    scores, target, seen = case
    for wanted, got in zip(places(scores, target, seen), places(transform(scores), target, seen), strict=True):
        np.testing.assert_array_equal(got, wanted)


@given(cases())
def test_the_order_of_the_users_changes_nothing(case: tuple[np.ndarray, np.ndarray, list[np.ndarray]]) -> None:
    scores, target, seen = case
    for wanted, got in zip(places(scores, target, seen), places(scores[::-1], target[::-1], seen[::-1]), strict=True):
        np.testing.assert_array_equal(got, wanted[::-1])


@given(cases(), st.randoms(use_true_random=False))
def test_the_order_of_the_items_changes_nothing(
    case: tuple[np.ndarray, np.ndarray, list[np.ndarray]], random: Random
) -> None:
    scores, target, seen = case
    order = list(range(scores.shape[1]))
    random.shuffle(order)
    moved = np.argsort(order)  # new position of each old item
    got = places(scores[:, order], moved[target], [moved[s] for s in seen])
    for wanted, value in zip(places(scores, target, seen), got, strict=True):
        np.testing.assert_array_equal(value, wanted)


# Metrics


def test_known_values_without_ties() -> None:
    greater, ties = ints(0, 1, 2, 3), ints(0, 0, 0, 0)
    assert recall(greater, ties, 3).tolist() == [1, 1, 1, 0]
    np.testing.assert_allclose(ndcg(greater, ties, 3), [1, 1 / math.log2(3), 1 / 2, 0], rtol=1e-14)
    np.testing.assert_allclose(mrr(greater, ties), [1, 1 / 2, 1 / 3, 1 / 4], rtol=1e-14)
    for metric in (mrr, average_precision):
        np.testing.assert_allclose(metric(greater, ties, 3), [1, 1 / 2, 1 / 3, 0], rtol=1e-14)
    np.testing.assert_allclose(auc(greater, ties, 4), [1, 2 / 3, 1 / 3, 0], rtol=1e-14, atol=1e-15)


def test_known_values_with_ties() -> None:
    # One item above, three tied with the target: its rank is 2, 3, 4 or 5, a quarter each.
    place = at(1, 3)
    assert [recall(*place, k)[0] for k in (1, 2, 3, 4, 5, 6)] == [0, 1 / 4, 1 / 2, 3 / 4, 1, 1]
    assert ndcg(*place, 3)[0] == pytest.approx((1 / math.log2(3) + 1 / 2) / 4, rel=1e-14)
    assert ndcg(*place, 10)[0] == pytest.approx(sum(map(discount, (2, 3, 4, 5))) / 4, rel=1e-14)
    # (1/2 + 1/3 + 1/4 + 1/5) / 4 = 77/240
    assert mrr(*place)[0] == pytest.approx(float(Fraction(77, 240)), rel=1e-14)
    # Of 9 others it beats the 5 below, and half of the 3 tied: 6.5 of 9.
    assert auc(*place, 10)[0] == pytest.approx(6.5 / 9, rel=1e-14)
    # Up to rank 3: (1/2 + 1/3) / 4 = 5/24; with one relevant item precision counts at its rank alone.
    for metric in (mrr, average_precision):
        assert [metric(*place, k)[0] for k in (1, 2)] == [0, 1 / 8]
        assert metric(*place, 3)[0] == pytest.approx(5 / 24, rel=1e-14)
        assert metric(*place, 5)[0] == metric(*place, 99)[0] == pytest.approx(77 / 240, rel=1e-14)
    assert [hit_rate(*place, k)[0] for k in (1, 2, 4, 5)] == [0, 1 / 4, 3 / 4, 1]


@given(cases(), st.integers(1, 8))
def test_metrics_are_means_over_all_orders_of_the_ties(
    case: tuple[np.ndarray, np.ndarray, list[np.ndarray]], k: int
) -> None:
    scores, target, seen = case
    greater, ties = places(scores, target, seen)
    candidates = ints(*(scores.shape[1] - len(set(s.tolist())) for s in seen))
    ranks = [possible_ranks(*row) for row in zip(scores, target, seen, strict=True)]

    def expected(value: Callable[[int, int], float]) -> list[float]:
        return [sum(value(r, n) for r in row) / len(row) for row, n in zip(ranks, candidates.tolist(), strict=True)]

    np.testing.assert_allclose(recall(greater, ties, k), expected(lambda r, _: float(r <= k)), rtol=1e-12)
    np.testing.assert_allclose(
        ndcg(greater, ties, k), expected(lambda r, _: discount(r) if r <= k else 0.0), rtol=1e-12
    )
    np.testing.assert_allclose(mrr(greater, ties), expected(lambda r, _: 1 / r), rtol=1e-12)
    for metric in (mrr, average_precision):
        np.testing.assert_allclose(
            metric(greater, ties, k), expected(lambda r, _: 1 / r if r <= k else 0.0), rtol=1e-12
        )
    np.testing.assert_allclose(
        auc(greater, ties, candidates),
        expected(lambda r, n: (n - r) / (n - 1) if n > 1 else 1.0),
        rtol=1e-12,
        atol=1e-12,
    )


@given(st.permutations(range(40)), st.integers(0, 39), st.integers(1, 45))
def test_without_ties_the_rank_is_that_of_a_sort(scores: list[int], target: int, k: int) -> None:
    rank = sorted(scores, reverse=True).index(scores[target]) + 1
    place = places(np.array([scores], dtype=np.float32), ints(target))
    assert recall(*place, k)[0] == (rank <= k)
    assert ndcg(*place, k)[0] == pytest.approx(discount(rank) if rank <= k else 0.0, rel=1e-12)
    assert mrr(*place)[0] == pytest.approx(1 / rank, rel=1e-12)
    assert auc(*place, 40)[0] == pytest.approx((40 - rank) / 39, rel=1e-12, abs=1e-15)


@given(st.integers(1, 12), st.integers(1, 50))
def test_a_perfect_scorer_gets_one(k: int, candidates: int) -> None:
    values = [metric(*at(0, 0), k) for metric in (recall, ndcg, mrr, average_precision)]
    values += [mrr(*at(0, 0)), auc(*at(0, 0), candidates)]
    assert [value.tolist() for value in values] == [[1.0]] * 6


@given(st.integers(1, 30), st.integers(0, 10), st.integers(1, 30))
def test_a_constant_scorer_gets_chance(items: int, masked: int, k: int) -> None:
    masked = min(masked, items - 1)
    left = items - masked
    target = np.arange(masked, items)  # every unmasked item in turn
    greater, ties = places(np.full((left, items), 0.3), target, [np.arange(masked)] * left)
    assert recall(greater, ties, k).mean() == pytest.approx(min(k / left, 1), rel=1e-12)
    assert ndcg(greater, ties, k).mean() == pytest.approx(
        sum(discount(r) for r in range(1, min(k, left) + 1)) / left, rel=1e-12
    )
    harmonic = sum(1 / r for r in range(1, min(k, left) + 1))
    assert average_precision(greater, ties, k).mean() == pytest.approx(harmonic / left, rel=1e-12)
    assert auc(greater, ties, left).mean() == pytest.approx(0.5 if left > 1 else 1.0, rel=1e-12)


@given(st.integers(0, 30), st.integers(0, 30), st.integers(1, 70))
def test_metrics_grow_with_the_cutoff_and_stay_between_0_and_1(greater: int, ties: int, k: int) -> None:
    place = at(greater, ties)
    for metric in (recall, ndcg, mrr, average_precision):
        assert 0 <= metric(*place, k)[0] <= metric(*place, k + 1)[0] + 1e-15 <= 1 + 1e-12
    assert mrr(*place, k)[0] <= ndcg(*place, k)[0] + 1e-15 <= recall(*place, k)[0] + 2e-15


def test_far_ranks_are_exact_enough() -> None:
    greater, ties = ints(99_999, 0, 50_000), ints(0, 99_999, 9)
    harmonic = math.fsum(1 / r for r in range(1, 100_001))
    block = math.fsum(1 / r for r in range(50_001, 50_011)) / 10
    np.testing.assert_allclose(mrr(greater, ties), [1e-5, harmonic / 100_000, block], rtol=1e-9)
    far = ndcg(greater, ties, 100_000)
    assert far[0] == pytest.approx(discount(100_000), rel=1e-9)
    assert far[1] == pytest.approx(math.fsum(map(discount, range(1, 100_001))) / 100_000, rel=1e-9)


def test_a_value_does_not_depend_on_the_block_it_is_computed_in() -> None:
    greater, ties = ints(2, 70_000), ints(1, 3)
    for metric in (lambda g, t: ndcg(g, t, 10), lambda g, t: ndcg(g, t, 90_000), mrr):
        assert metric(greater, ties)[0] == metric(greater[:1], ties[:1])[0]


def test_auc_of_a_masked_target_is_0_and_of_a_lone_one_1() -> None:
    greater, ties = places(np.array([[9.0, 1, 1, 1]] * 2), ints(0, 0), [ints(0, 1), ints(1, 2, 3)])
    assert auc(greater, ties, ints(2, 1)).tolist() == [0, 1]


@pytest.mark.parametrize("metric", [recall, ndcg, mrr, average_precision])
def test_a_cutoff_below_1_is_refused(metric: Callable[..., np.ndarray]) -> None:
    with pytest.raises(ValueError, match="cutoff k is 0"):
        metric(*at(0, 0), 0)


# Intervals


def test_equal_values_have_an_interval_of_no_width() -> None:
    got = bootstrap(np.full(30, 0.25), np.arange(30) % 7, 300, 0)
    assert (got.mean, got.low, got.high) == (0.25, 0.25, 0.25)


def test_one_user_has_an_interval_of_no_width() -> None:
    got = bootstrap(np.array([0.0, 0.5, 1.0, 1.0]), np.full(4, 17), 300, 0)
    assert (got.mean, got.low, got.high) == (0.625, 0.625, 0.625)


def test_two_users_give_the_three_means_that_are_possible() -> None:
    # Drawn: the first twice (1/4 of the time, mean -1), both (1/2, mean (3 - 1) / 4), the second twice (1/4, mean 1).
    values, users = np.array([-1.0, 1, 1, 1]), np.array([5, 2, 2, 2])
    interval = bootstrap(values, users, 4000, 1)
    assert (interval.mean, interval.low, interval.high) == (0.5, -1.0, 1.0)
    # Only the first case is <= 0; a mean of user means would make it three quarters, and p 1.
    assert paired_bootstrap(values, np.zeros(4), users, 4000, 1).p_value == pytest.approx(0.5, abs=0.05)


def test_the_interval_covers_the_truth_as_often_as_it_says() -> None:
    generator, covered = np.random.default_rng(0), 0
    for n in range(200):
        users = np.repeat(np.arange(80), generator.integers(1, 5, size=80))
        values = 0.3 + generator.normal(size=80)[users] + generator.normal(size=len(users))
        interval = bootstrap(values, users, 200, n)
        covered += interval.low <= 0.3 <= interval.high
    assert 0.88 <= covered / 200 <= 0.99


def test_more_targets_of_the_same_users_do_not_shrink_the_interval() -> None:
    generator = np.random.default_rng(1)
    values, users = generator.random(50), np.arange(50)
    many_values, many_users = np.tile(values, 9), np.tile(users, 9)
    once, many = bootstrap(values, users, 500, 3), bootstrap(many_values, many_users, 500, 3)
    assert (many.low, many.high) == pytest.approx((once.low, once.high), rel=1e-12)
    strangers = bootstrap(many_values, np.arange(450), 500, 3)
    assert strangers.high - strangers.low < 0.5 * (many.high - many.low)


def test_names_and_order_of_users_do_not_matter() -> None:
    generator = np.random.default_rng(2)
    values, users = generator.random(60), np.repeat(np.arange(20), 3)
    order = generator.permutation(60)
    wanted, got = bootstrap(values, users, 300, 4), bootstrap(values[order], users[order] * 1000 - 7, 300, 4)
    assert (got.mean, got.low, got.high) == pytest.approx((wanted.mean, wanted.low, wanted.high), rel=1e-12)


def test_a_seed_fixes_the_interval_and_another_moves_it() -> None:
    values, users = np.random.default_rng(3).random(40), np.arange(40)
    assert bootstrap(values, users, 300, 5) == bootstrap(values, users, 300, 5)
    assert bootstrap(values, users, 300, 5) != bootstrap(values, users, 300, 6)
    pair = values, np.zeros(40), users
    assert paired_bootstrap(*pair, 300, 5) == paired_bootstrap(*pair, 300, 5)
    assert paired_bootstrap(*pair, 300, 5) != paired_bootstrap(*pair, 300, 6)


def test_drawing_in_blocks_gives_the_same_interval(monkeypatch: pytest.MonkeyPatch) -> None:
    values, users = np.random.default_rng(4).random(40), np.arange(40) // 2
    wanted = bootstrap(values, users, 301, 5)
    for draws in (1, 60, 1000):
        monkeypatch.setattr(metrics, "DRAWS", draws)
        assert bootstrap(values, users, 301, 5) == wanted


def test_a_large_shift_is_significant_and_no_shift_is_not() -> None:
    generator = np.random.default_rng(5)
    a, users = generator.random(100), np.arange(100) // 2
    shifted = paired_bootstrap(a + 0.3, a + 0.01 * generator.random(100), users, 999, 0)
    assert shifted.p_value == pytest.approx(2 / 1000)
    assert 0.28 < shifted.low < shifted.mean < shifted.high < 0.31
    turned = paired_bootstrap(a, a + 0.3, users, 999, 0)
    assert turned.p_value == pytest.approx(2 / 1000)
    assert turned.mean == pytest.approx(-0.3)
    same = paired_bootstrap(a, a, users, 999, 0)
    assert (same.mean, same.low, same.high, same.p_value) == (0, 0, 0, 1)


def test_the_difference_is_paired() -> None:
    # Users differ wildly, the two systems hardly: unpaired intervals overlap, the paired one is clear of 0.
    generator = np.random.default_rng(6)
    a = generator.normal(scale=10, size=100)
    b, users = a - 0.1 - 0.01 * generator.random(100), np.arange(100)
    assert bootstrap(a, users, 500, 0).low < bootstrap(b, users, 500, 0).high
    assert paired_bootstrap(a, b, users, 500, 0).low > 0.1


def test_p_is_about_uniform_when_nothing_differs() -> None:
    generator = np.random.default_rng(7)
    users = np.arange(120) // 2
    p = np.array(
        [
            paired_bootstrap(generator.normal(size=120), generator.normal(size=120), users, 199, n).p_value
            for n in range(300)
        ]
    )
    for level in (0.05, 0.25, 0.5, 0.75):
        assert (p <= level).mean() == pytest.approx(level, abs=0.08)


def test_strata_count_alike_and_users_are_drawn_within_them() -> None:
    a = np.array([1.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0])
    users, strata = ints(0, 1, 0, 1, 2, 3, 4, 5), ints(7, 7, 3, 3, 3, 3, 3, 3)
    # Drawn over all users the mean would move; each stratum is constant, so no resample of it does.
    whole = stratified_bootstrap(a, np.zeros(8), users, strata, 200, 0)
    assert (whole.mean, whole.low, whole.high) == (0.5, 0.5, 0.5)
    assert whole.p_value == pytest.approx(2 / 201)
    assert paired_bootstrap(a, np.zeros(8), np.arange(8), 200, 0).low < 0.25


def test_one_stratum_is_the_paired_bootstrap() -> None:
    generator = np.random.default_rng(8)
    a, b, users = generator.random(60), generator.random(60), np.arange(60) // 3
    assert stratified_bootstrap(a, b, users, np.full(60, 4), 300, 5) == paired_bootstrap(a, b, users, 300, 5)


def test_independent_strata_narrow_the_interval() -> None:
    generator = np.random.default_rng(9)
    a, users = generator.normal(1.0, 1.0, 400), np.arange(400) % 200
    strata = np.arange(400) // 200
    alone = [paired_bootstrap(a[strata == at], np.zeros(200), users[:200], 2000, 0) for at in (0, 1)]
    whole = stratified_bootstrap(a, np.zeros(400), users, strata, 2000, 0)
    width = np.mean([one.high - one.low for one in alone])
    assert whole.mean == pytest.approx(np.mean([one.mean for one in alone]))
    assert whole.high - whole.low == pytest.approx(width / 2**0.5, rel=0.15)


def test_strata_of_another_length_are_refused() -> None:
    with pytest.raises(ValueError, match="strata has shape"):
        stratified_bootstrap(np.zeros(3), np.zeros(3), ints(0, 1, 2), ints(0, 1), 10, 0)


def test_nothing_to_resample_is_refused_by_name() -> None:
    none, no_users = np.zeros(0), ints()
    with pytest.raises(ValueError, match="values is empty"):
        bootstrap(none, no_users, 100, 0)
    with pytest.raises(ValueError, match="a is empty"):
        paired_bootstrap(none, none, no_users, 100, 0)


def test_lengths_that_differ_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"values has shape \(3,\), users \(2,\)"):
        bootstrap(np.zeros(3), ints(0, 1), 100, 0)
    with pytest.raises(ValueError, match=r"b has shape \(1,\), users \(2,\)"):
        paired_bootstrap(np.zeros(2), np.zeros(1), ints(0, 1), 100, 0)


def test_values_that_are_not_finite_are_refused_with_their_place() -> None:
    with pytest.raises(ValueError, match=r"values\[1\] is nan"):
        bootstrap(np.array([0.0, np.nan]), ints(0, 1), 100, 0)
    with pytest.raises(ValueError, match=r"b\[0\] is inf"):
        paired_bootstrap(np.zeros(2), np.array([np.inf, 0.0]), ints(0, 1), 100, 0)


def test_no_samples_are_refused() -> None:
    with pytest.raises(ValueError, match="samples is 0"):
        bootstrap(np.zeros(2), ints(0, 1), 0, 0)
