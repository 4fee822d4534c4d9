"""Measures of matrices, activations and draws, as functions of arrays; `analysis.py` explains them."""

import math
from typing import Any

import numpy as np


def singular_values(w: np.ndarray) -> np.ndarray:
    """The singular values of a matrix, the largest first."""
    return np.linalg.svd(np.asarray(w, np.float64), compute_uv=False)


def _energy(s: np.ndarray) -> np.ndarray:
    """The share of each singular value in `|W|_F²`; zeros for a matrix of zeros."""
    squares = np.square(s)
    total = squares.sum()
    return squares / total if total > 0 else squares


def stable_rank(s: np.ndarray) -> float:
    """`|W|_F² / |W|_2²`, of the singular values: 1 for rank one, the number of them if all are equal."""
    energy = _energy(s)
    return float(1 / energy.max()) if energy.any() else 0.0


def uniformity(s: np.ndarray) -> float:
    """`exp(H) / min(m, n)`, where `H` is the entropy of `σ² / Σσ²`: 1 if all singular values are equal."""
    energy = _energy(s)
    present = energy[energy > 0]
    return float(np.exp(-np.sum(present * np.log(present))) / len(s)) if len(present) else 0.0


def tail_share(s: np.ndarray) -> float:
    """The share of `|W|_F²` beyond the first quarter of the singular values: 3/4 if all are equal."""
    return float(_energy(s)[math.ceil(len(s) / 4) :].sum())


def quantiles(s: np.ndarray, points: int) -> np.ndarray:
    """Singular values over the largest, at `points` places from the first to the last."""
    places = np.linspace(0, len(s) - 1, points).round().astype(int)
    return s[places] / s[0] if s[0] > 0 else s[places]


def excess_kurtosis(x: Any) -> Any:
    """`E(x - μ)⁴ / (E(x - μ)²)² - 3` over all numbers of an array of NumPy or JAX: 0 for normal numbers."""
    squares = (x - x.mean()) ** 2
    return (squares**2).mean() / squares.mean() ** 2 - 3


def max_over_rms(x: Any) -> Any:
    """The largest absolute value over the root mean square, of an array of NumPy or JAX."""
    return abs(x).max() / (x**2).mean() ** 0.5


def places_in_period(refreshes: np.ndarray) -> np.ndarray:
    """The number of steps since the last refresh at each step, from the count of refreshes at each step."""
    is_first = np.concatenate([[True], refreshes[1:] != refreshes[:-1]])
    steps = np.arange(len(refreshes))
    return steps - np.maximum.accumulate(np.where(is_first, steps, 0))


def mean_by(keys: np.ndarray, values: np.ndarray) -> np.ndarray:
    """The mean of the values of each key `0, 1, …`."""
    return np.bincount(keys, values) / np.bincount(keys)


def binomial_interval(trials: int, probability: float, level: float = 0.95) -> tuple[int, int]:
    """Quantiles `(1 - level) / 2` and `(1 + level) / 2` of a binomial count.

    At least `level` of the counts lie between them, both included.
    """
    masses = [
        math.comb(trials, k) * probability**k * (1 - probability) ** (trials - k) for k in range(trials + 1)
    ]
    below = np.cumsum(masses)
    low, high = (int(np.searchsorted(below, quantile)) for quantile in ((1 - level) / 2, (1 + level) / 2))
    return low, min(high, trials)
