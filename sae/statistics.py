"""Uncertainty of numbers: intervals by the bootstrap, Wilson's interval of a share, and AUROC with its interval.

r rounds of a bootstrap · n things that are resampled (texts, prompts, documents, directions) · k columns
"""

import math
from typing import Any

import numpy as np

ROUNDS = 2000
ENDS = (0.025, 0.975)
"""of a 95 % interval, as quantiles"""
Z = 1.959963984540054
"""the upper end of a standard normal's 95 % interval"""

Estimate = dict[str, Any]
"""{"value", "low", "high"}: a number and the ends of its 95 % interval; None for numbers that are not finite, which JSON does not have"""


def ratio(a: np.ndarray | float, b: np.ndarray | float) -> np.ndarray:
    """a / b, NaN if b is 0: a constant has no variance to explain, and a feature that never fires no precision."""
    return np.divide(a, b, out=np.full(np.shape(b), np.nan), where=np.asarray(b) != 0)[()]


def resamples(n: int, rounds: int, rng: np.random.Generator) -> np.ndarray:
    """How often each of `n` things is drawn in each round when `n` are drawn with replacement, int64 [r, n]."""
    return rng.multinomial(n, np.full(n, 1 / n), rounds)


def data_and_resamples(n: int, rng: np.random.Generator, rounds: int = ROUNDS) -> np.ndarray:
    """`resamples` with a first row of ones for the original data, float64 [1 + r, n]: the weights for `estimate`."""
    return np.concatenate([np.ones((1, n)), resamples(n, rounds, rng)])


def percentile_interval(value_r: np.ndarray) -> tuple[float, float]:
    """Ends of the 95 % percentile interval (Efron and Tibshirani 1993) of the rounds that are finite; NaN if none is."""
    finite_r = value_r[np.isfinite(value_r)]
    low, high = np.quantile(finite_r, ENDS) if len(finite_r) else (math.nan, math.nan)
    return float(low), float(high)


def estimate(value_r: np.ndarray) -> Estimate:
    """The value of the data, which is the first round, and the percentile interval of the other rounds."""
    low, high = percentile_interval(value_r[1:])
    return {key: float(x) if math.isfinite(x) else None for key, x in (("value", value_r[0]), ("low", low), ("high", high))}


def mean_estimate(value_n: np.ndarray, seed: int = 0) -> Estimate:
    """The mean and its percentile interval; equal seeds and numbers of things draw the same samples, so that differences can be paired."""
    drawn_rn = np.random.default_rng(seed).integers(0, len(value_n), (ROUNDS, len(value_n)))
    low, high = percentile_interval(value_n[drawn_rn].mean(1))
    return {"value": float(value_n.mean()), "low": low, "high": high}


def ratio_interval(above_n: np.ndarray, below_n: np.ndarray, seed: int, rounds: int = 1000) -> tuple[float, float]:
    """Percentile interval of Σ above / Σ below, a sum below 1 counting as 1; (0, 0) where there is nothing."""
    if not len(above_n):
        return 0.0, 0.0
    drawn_rn = np.random.default_rng(seed).integers(0, len(above_n), (rounds, len(above_n)))
    above_r, below_r = (np.asarray(x, dtype=np.float64)[drawn_rn].sum(1) for x in (above_n, below_n))
    return percentile_interval(above_r / np.maximum(below_r, 1))


def wilson_interval(count: int, n: int) -> tuple[float, float]:
    """95 % interval of a share, `count` of `n` (Wilson 1927)."""
    if n == 0:
        return 0.0, 1.0
    p, z2n = count / n, Z * Z / n
    centre, half = (p + z2n / 2) / (1 + z2n), Z * math.sqrt(p * (1 - p) / n + z2n / (4 * n)) / (1 + z2n)
    return max(0.0, centre - half), min(1.0, centre + half)


def auroc(positive_nk: np.ndarray, negative_nk: np.ndarray) -> np.ndarray:
    """Probability that a positive scores above a negative, a tie counting half, for each column, [k]; NaN if one side is empty."""
    from scipy.stats import rankdata

    n_pos, n_neg = len(positive_nk), len(negative_nk)
    rank_k = rankdata(np.concatenate([positive_nk, negative_nk]), axis=0)[:n_pos].sum(0)
    return (rank_k - n_pos * (n_pos + 1) / 2) / (n_pos * n_neg or math.nan)


def auroc_estimate(positive_n: np.ndarray, negative_n: np.ndarray, seed: int = 0) -> Estimate:
    """AUROC of one score with its percentile interval, resampling positives and negatives."""
    wins_nn = (positive_n[:, None] > negative_n).astype(np.float64) + 0.5 * (positive_n[:, None] == negative_n)
    rng = np.random.default_rng(seed)
    share_rp, share_rn = (resamples(n, ROUNDS, rng) / n for n in wins_nn.shape)
    low, high = percentile_interval(((share_rp @ wins_nn) * share_rn).sum(1))
    return {"value": float(wins_nn.mean()), "low": low, "high": high}
