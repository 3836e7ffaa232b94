"""Scores as chances: Platt scaling, and how far stated chances are from what happens."""

from dataclasses import dataclass

import numpy as np

from mllm_srec.newton import minimise

RIDGE = 1e-6
"""Per score, on the slope alone: where scores separate targets from all others, no finite slope is the best one."""


@dataclass(frozen=True)
class Calibration:
    """Platt scaling: the chance that a candidate with score s is the next item is sigmoid(slope * s + intercept)."""

    slope: float
    intercept: float

    def chances(self, scores: np.ndarray) -> np.ndarray:
        """float64 between 0 and 1, in the shape of `scores`."""
        return sigmoid(self.slope * scores.astype(np.float64) + self.intercept)


def sigmoid(odds: np.ndarray) -> np.ndarray:
    """float64 chances of log-odds of any shape and size."""
    chances: np.ndarray = np.exp(-np.logaddexp(0.0, -odds.astype(np.float64)))
    return chances


def fit(scores: np.ndarray, is_target: np.ndarray) -> Calibration:
    """The slope and intercept of the greatest likelihood, by Newton's method (Platt 1999; Lin et al., ML 2007).

    The chances of `scores` themselves then add up to the number of targets. Scores that are all equal get slope 0.

    Args:
        scores: any shape, usually (B, K), higher is better.
        is_target: bool, the same shape.

    Raises:
        ValueError: the shapes differ, a score is not finite, or there are only targets or none.
    """
    _check(scores, is_target)
    raw, true = scores.ravel().astype(np.float64), is_target.ravel().astype(np.float64)
    if not np.isfinite(raw).all():
        raise ValueError(f"{np.count_nonzero(~np.isfinite(raw))} of {raw.size} scores are not finite")
    if not 0 < true.sum() < true.size:
        raise ValueError(f"{int(true.sum())} of {true.size} candidates are targets: both kinds are needed")
    base = float(np.log(true.sum() / (true.size - true.sum())))
    # In deviations, so that the ridge and the start are the same whatever the scores' unit.
    centre, unit = float(raw.mean()), float(raw.std())
    if unit <= np.finfo(np.float64).eps * float(np.abs(raw).max()):
        return Calibration(0.0, base)
    inputs = np.stack([(raw - centre) / unit, np.ones(raw.size)], axis=1)
    ridge = np.array([RIDGE, 0.0])

    def loss(of: np.ndarray) -> float:
        margin = inputs @ of
        return float((np.logaddexp(0.0, margin) - true * margin).mean() + ridge @ of**2 / 2)

    def slopes(of: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        stated = sigmoid(inputs @ of)
        gradient = inputs.T @ (stated - true) / true.size + ridge * of
        return gradient, (inputs * (stated * (1 - stated))[:, None]).T @ inputs / true.size + np.diag(ridge)

    weights = minimise(loss, slopes, np.array([0.0, base]))
    slope = weights[0] / unit
    return Calibration(float(slope), float(weights[1] - slope * centre))


def equal_bins(chances: np.ndarray, is_target: np.ndarray, bins: int = 10) -> tuple[tuple[int, float, float], ...]:
    """Bins of about equal count, from the lowest chances to the highest; fewer bins where there are fewer values.

    Equal chances count by expectation over their orders, so that stating the base rate each time is without error.

    Args:
        chances: any shape.
        is_target: bool, the same shape.

    Returns:
        Per bin its count, the mean chance, and the share that are targets.

    Raises:
        ValueError: the shapes differ, or there is no value.
    """
    _check(chances, is_target)
    stated, true = chances.ravel().astype(np.float64), is_target.ravel().astype(np.float64)
    _, of, count = np.unique(stated, return_inverse=True, return_counts=True)
    expected = (np.bincount(of, weights=true) / count)[of]
    parts = np.array_split(np.argsort(stated, kind="stable"), min(bins, stated.size))
    return tuple((len(part), float(stated[part].mean()), float(expected[part].mean())) for part in parts)


def expected_error(chances: np.ndarray, is_target: np.ndarray, bins: int = 10) -> float:
    """Expected calibration error: the mean distance of stated and observed over `equal_bins`, by their counts.

    Raises:
        ValueError: the shapes differ, or there is no value.
    """
    made = equal_bins(chances, is_target, bins)
    return sum(count * abs(stated - observed) for count, stated, observed in made) / chances.size


def brier(chances: np.ndarray, is_target: np.ndarray) -> float:
    """Brier score: the mean squared distance of the chance from what happened, 1 or 0.

    Raises:
        ValueError: the shapes differ, or there is no value.
    """
    _check(chances, is_target)
    return float(((chances.astype(np.float64) - is_target) ** 2).mean())


def _check(values: np.ndarray, is_target: np.ndarray) -> None:
    if values.shape != is_target.shape:
        raise ValueError(f"lengths differ: values have shape {values.shape}, is_target {is_target.shape}")
    if values.size == 0:
        raise ValueError("there is no candidate: nothing to calibrate")
