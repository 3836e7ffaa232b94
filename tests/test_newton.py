"""Newton's method finds the one minimum of a convex loss, also where whole steps overshoot."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from mllm_srec.newton import minimise

NUMBERS = st.floats(-5, 5, allow_subnormal=False)


@given(arrays(np.float64, (3, 3), elements=NUMBERS), arrays(np.float64, 3, elements=NUMBERS))
def test_a_quadratic_is_solved(square: np.ndarray, target: np.ndarray) -> None:
    curved = square @ square.T + np.eye(3)  # positive definite

    def loss(weights: np.ndarray) -> float:
        return float((weights - target) @ curved @ (weights - target) / 2)

    found = minimise(loss, lambda weights: (curved @ (weights - target), curved), np.zeros(3))
    np.testing.assert_allclose(found, target, atol=1e-6)


@pytest.mark.parametrize("start", [-30.0, -3.0, 0.0, 3.0, 30.0])
def test_steps_that_overshoot_are_shortened(start: float) -> None:
    # log cosh is flat far out: the whole step from 3 goes to about -98, from 30 beyond all bounds.
    def loss(weights: np.ndarray) -> float:
        return float(np.logaddexp(weights, -weights)[0] + 1e-3 * (weights[0] - 1) ** 2)

    def slopes(weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        slope = np.tanh(weights)
        return slope + 2e-3 * (weights - 1), np.diag(1 - slope**2 + 2e-3)

    (found,) = minimise(loss, slopes, np.array([start]))
    assert found == pytest.approx(2e-3 / 1.002, abs=1e-6)  # where tanh x = 0.002 (1 - x)


def test_it_begins_at_the_start_and_a_minimum_stays() -> None:
    asked: list[float] = []

    def loss(weights: np.ndarray) -> float:
        asked.append(float(weights[0]))
        return float(weights[0] ** 2)

    assert minimise(loss, lambda weights: (2 * weights, np.array([[2.0]])), np.array([0.0])).tolist() == [0.0]
    assert set(asked) == {0.0}
