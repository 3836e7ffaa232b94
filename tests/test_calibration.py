"""Platt scaling and calibration error by hand, and as properties."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mllm_srec.calibration import Calibration, brier, equal_bins, expected_error, fit, sigmoid

# Chances


def test_the_chance_of_a_score_by_hand() -> None:
    found = Calibration(slope=2.0, intercept=-np.log(3.0)).chances(np.array([[0.0, np.log(3.0)]], np.float32))
    assert found.shape == (1, 2) and found.dtype == np.float64
    assert found[0] == pytest.approx([1 / 4, 3 / 4])


def test_scores_without_bound_are_certain_and_warn_of_nothing() -> None:
    with np.errstate(over="raise", invalid="raise", divide="raise"):
        assert sigmoid(np.array([-1e4, 0.0, 1e4])).tolist() == [0.0, 0.5, 1.0]


# Fitting


def test_two_scores_get_the_shares_that_were_observed() -> None:
    # Two unknowns, two shares: one of four at score 0, three of four at score 2.
    scores = np.array([[0.0, 0, 0, 0], [2, 2, 2, 2]])
    found = fit(scores, np.array([[True, False, False, False], [True, True, True, False]]))
    assert found.intercept == pytest.approx(-np.log(3.0), abs=1e-4)
    assert found.slope == pytest.approx(np.log(3.0), abs=1e-4)


def test_drawn_outcomes_give_back_what_they_were_drawn_with() -> None:
    generator = np.random.default_rng(0)
    scores = generator.normal(3.0, 2.0, (2000, 20))
    true = Calibration(slope=0.7, intercept=-5.0)
    found = fit(scores, generator.random(scores.shape) < true.chances(scores))
    assert (found.slope, found.intercept) == (pytest.approx(0.7, abs=0.03), pytest.approx(-5.0, abs=0.15))


def test_scores_that_run_the_wrong_way_get_a_negative_slope() -> None:
    assert fit(np.array([1.0, 2, 3, 4]), np.array([True, True, False, True])).slope < 0


def test_scores_that_tell_nothing_get_the_base_rate() -> None:
    found = fit(np.full((2, 4), 7.5), np.array([[True, False, False, False]] * 2))
    assert (found.slope, found.intercept) == (0.0, pytest.approx(-np.log(3.0)))


def test_scores_that_separate_get_a_finite_slope_and_the_right_side() -> None:
    scores = np.array([-1.0, -0.5, 0.5, 1.0])
    found = fit(scores, scores > 0)
    assert np.isfinite([found.slope, found.intercept]).all()
    assert found.chances(scores) == pytest.approx([0, 0, 1, 1], abs=0.02)


outcomes = st.lists(
    st.tuples(st.floats(-1e3, 1e3), st.booleans()), min_size=2, max_size=60
).filter(lambda pairs: 0 < sum(target for _, target in pairs) < len(pairs))  # fmt: skip


@given(outcomes)
def test_stated_chances_add_up_to_the_targets_and_beat_the_base_rate(pairs: list[tuple[float, bool]]) -> None:
    scores, true = np.array([score for score, _ in pairs]), np.array([target for _, target in pairs])
    chances = fit(scores, true).chances(scores)
    assert chances.sum() == pytest.approx(true.sum(), rel=1e-3, abs=1e-3)

    def loss(of: np.ndarray) -> float:
        return float(-np.log(np.where(true, of, 1 - of).clip(1e-300)).mean())

    assert loss(chances) <= loss(np.full(len(true), true.mean())) + 1e-6


@given(outcomes, st.floats(0.01, 100), st.floats(-100, 100))
def test_the_unit_of_scores_does_not_move_a_chance(pairs: list[tuple[float, bool]], unit: float, start: float) -> None:
    scores, true = np.round([score for score, _ in pairs], 3), np.array([target for _, target in pairs])
    moved = unit * scores + start
    assert fit(moved, true).chances(moved) == pytest.approx(fit(scores, true).chances(scores), abs=1e-3)


@pytest.mark.parametrize(
    ("scores", "is_target", "said"),
    [
        (np.zeros((2, 3)), np.zeros(6, bool), r"\(2, 3\)"),
        (np.array([0.0, np.nan, np.inf]), np.array([True, False, False]), "2 of 3 scores are not finite"),
        (np.arange(3.0), np.zeros(3, bool), "0 of 3 candidates are targets"),
        (np.arange(3.0), np.ones(3, bool), "3 of 3 candidates are targets"),
        (np.zeros((0, 5)), np.zeros((0, 5), bool), "there is no candidate"),
    ],
)
def test_what_cannot_be_fitted_is_refused(scores: np.ndarray, is_target: np.ndarray, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        fit(scores, is_target)


# Error and Brier score


def test_error_and_brier_score_by_hand() -> None:
    chances, true = np.array([[0.8, 0.2], [0.6, 0.1]]), np.array([[True, False], [False, False]])
    assert [count for count, _, _ in equal_bins(chances, true, bins=2)] == [2, 2]
    assert np.array(equal_bins(chances, true, bins=2))[:, 1:] == pytest.approx(np.array([[0.15, 0.0], [0.7, 0.5]]))
    assert expected_error(chances, true, bins=2) == pytest.approx((0.15 + 0.2) / 2)
    assert brier(chances, true) == pytest.approx((0.04 + 0.04 + 0.36 + 0.01) / 4)


@given(st.lists(st.booleans(), min_size=1, max_size=40), st.integers(1, 10))
def test_the_base_rate_is_without_error_in_whatever_order_targets_stand(true: list[bool], bins: int) -> None:
    is_target = np.array(true)
    chances = np.full(len(true), is_target.mean())
    assert expected_error(chances, is_target, bins) == pytest.approx(0.0, abs=1e-12)
    assert brier(chances, is_target) == pytest.approx(is_target.mean() * (1 - is_target.mean()))


@given(outcomes, st.integers(1, 10))
def test_bins_hold_all_values_in_order_and_bound_the_error(pairs: list[tuple[float, bool]], bins: int) -> None:
    chances = sigmoid(np.array([score for score, _ in pairs]))
    true = np.array([target for _, target in pairs])
    made = equal_bins(chances, true, bins)
    counts, stated, observed = (np.array(column) for column in zip(*made, strict=True))
    assert counts.sum() == len(pairs) and np.ptp(counts) <= 1 and len(made) == min(bins, len(pairs))
    assert (np.diff(stated) >= -1e-12).all()
    assert counts @ observed == pytest.approx(true.sum())
    assert abs(chances.mean() - true.mean()) - 1e-9 <= expected_error(chances, true, bins) <= 1


def test_nothing_and_other_shapes_are_refused() -> None:
    for measure in (equal_bins, expected_error, brier):
        with pytest.raises(ValueError, match=r"\(2, 3\)"):
            measure(np.zeros((2, 3)), np.zeros(6, bool))
        with pytest.raises(ValueError, match="there is no candidate"):
            measure(np.zeros(0), np.zeros(0, bool))
