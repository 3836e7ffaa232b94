"""Newton's method for the smooth convex losses that few weights are fitted by."""

from collections.abc import Callable

import numpy as np

STEPS = 100
"""At most; with a ridge that small and separable data it needs some thirty."""
CLOSE = 1e-10
"""It ends with the step that promises the loss to fall by less."""
SMALLEST = 1e-6
"""Share of a step that is still tried."""


def minimise(
    loss: Callable[[np.ndarray], float],
    slopes: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]],
    start: np.ndarray,
) -> np.ndarray:
    """float64 (M,): the weights of the smallest loss.

    Args:
        loss: of weights (M,), strictly convex.
        slopes: of weights (M,), the loss's gradient (M,) and Hessian (M, M).
        start: float64 (M,).
    """
    weights, now = start, loss(start)
    for _ in range(STEPS):
        gradient, hessian = slopes(weights)
        step, share = np.linalg.solve(hessian, gradient), 1.0
        while loss(weights - share * step) > now and share > SMALLEST:  # a whole step can overshoot
            share /= 2
        weights = weights - share * step
        now = loss(weights)
        if gradient @ step < CLOSE:
            break
    return weights
