"""The numbers of the evaluation, each a function of plain arrays.

Redshift errors are dz = (z_predicted - z_true) / (1 + z_true) throughout. Definitions:

* `sigma_nmad`         1.4826 median|dz - median(dz)|: the form that takes the bias out first. (Brammer et
                       al. 2008, ApJ 686, 1503, eq. 5, subtracts the median before dividing by 1 + z; some
                       papers leave the median out.)
* `outlier_fraction`   share of |dz| > threshold; 0.15 is the custom of photometric redshifts, 0.05
                       that of the spectra here.
* `recall_at_k`        share of queries whose partner is among the k best; rank 1 is best.
* `bootstrap_interval` percentile interval over resampled objects (Efron 1979).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = [
    "bias",
    "bootstrap_interval",
    "detection_rate",
    "median_rank",
    "outlier_fraction",
    "partner_ranks",
    "r2",
    "recall_at_k",
    "redshift_error",
    "redshift_numbers",
    "roc_auc",
    "sigma_nmad",
    "with_interval",
]

Array = npt.NDArray[Any]
Statistic = Callable[..., float]


def r2(truth: Array, predicted: Array) -> float:
    """Coefficient of determination, 1 - sum(residual^2) / sum((truth - mean)^2).

    NaN for fewer than two objects or a constant truth, where it means nothing.
    """
    truth, predicted = np.asarray(truth, np.float64), np.asarray(predicted, np.float64)
    spread = float(np.sum((truth - truth.mean()) ** 2)) if truth.size else 0.0
    return 1.0 - float(np.sum((truth - predicted) ** 2)) / spread if spread > 0 else float("nan")


def redshift_error(truth: Array, predicted: Array) -> Array:
    """dz = (predicted - truth) / (1 + truth), float64."""
    truth = np.asarray(truth, np.float64)
    return (np.asarray(predicted, np.float64) - truth) / (1.0 + truth)


def sigma_nmad(truth: Array, predicted: Array) -> float:
    """1.4826 median|dz - median(dz)|; NaN for no objects."""
    dz = redshift_error(truth, predicted)
    return 1.4826 * float(np.median(np.abs(dz - np.median(dz)))) if dz.size else float("nan")


def bias(truth: Array, predicted: Array) -> float:
    """median(dz): robust against the outliers counted apart; NaN for no objects."""
    dz = redshift_error(truth, predicted)
    return float(np.median(dz)) if dz.size else float("nan")


def outlier_fraction(truth: Array, predicted: Array, threshold: float = 0.05) -> float:
    """Share of objects with |dz| above `threshold`; NaN for no objects."""
    dz = redshift_error(truth, predicted)
    return float(np.mean(np.abs(dz) > threshold)) if dz.size else float("nan")


def partner_ranks(queries: Array, candidates: Array) -> npt.NDArray[np.int64]:
    """Rank (1 = best) of candidate i for query i among all candidates by dot product; (N, D) both, unit norm.

    A tie counts against the query, so that vectors which are all alike come last, not first.
    """
    similarity = np.asarray(queries, np.float32) @ np.asarray(candidates, np.float32).T
    return np.sum(similarity >= np.diag(similarity)[:, None], axis=1).astype(np.int64)


def recall_at_k(ranks: Array, k: int) -> float:
    """Share of ranks (1 = best) that are at most k; NaN for none."""
    ranks = np.asarray(ranks)
    return float(np.mean(ranks <= k)) if ranks.size else float("nan")


def median_rank(ranks: Array) -> float:
    """Median of the ranks; 1 is perfect, (pool + 1) / 2 is chance."""
    return float(np.median(ranks)) if np.size(ranks) else float("nan")


def roc_auc(inside: Array, outside: Array) -> float:
    """Probability that an outside score is above an inside one; ties count half (Mann-Whitney U / n m)."""
    inside, outside = np.sort(np.asarray(inside, np.float64)), np.asarray(outside, np.float64)
    if not inside.size or not outside.size:
        return float("nan")
    below = np.searchsorted(inside, outside, side="left")
    up_to = np.searchsorted(inside, outside, side="right")
    return float(np.mean((below + up_to) / 2.0) / inside.size)


def detection_rate(inside: Array, outside: Array, false_alarm: float = 0.05) -> float:
    """Share of outside scores above the threshold that a share `false_alarm` of the inside scores passes."""
    if not np.size(inside) or not np.size(outside):
        return float("nan")
    threshold = np.quantile(np.asarray(inside, np.float64), 1.0 - false_alarm, method="higher")
    return float(np.mean(np.asarray(outside, np.float64) > threshold))


def bootstrap_interval(
    statistic: Statistic, *arrays: Array, n: int = 500, coverage: float = 0.95, seed: int = 0
) -> tuple[float, float]:
    """Percentile interval of statistic(*arrays) over `n` resamples of the objects (first axis, kept
    together).

    (NaN, NaN) for fewer than two objects. Resamples in which the statistic is undefined are left out.
    """
    arrays = tuple(np.asarray(array) for array in arrays)
    size = len(arrays[0])
    if size < 2:
        return float("nan"), float("nan")
    rng = np.random.default_rng(seed)
    draws = (rng.integers(0, size, size) for _ in range(n))
    values = np.array([statistic(*(array[rows] for array in arrays)) for rows in draws])
    values = values[np.isfinite(values)]
    if not values.size:
        return float("nan"), float("nan")
    tail = (1.0 - coverage) / 2.0
    lo, hi = np.quantile(values, [tail, 1.0 - tail])
    return float(lo), float(hi)


def redshift_numbers(truth: Array, predicted: Array, n: int = 500, seed: int = 0) -> dict[str, dict[str, float]]:
    """sigma_NMAD, bias, R2 and the outliers above 0.05 and 0.15, each with its interval."""
    statistics: dict[str, Statistic] = {
        "sigma_nmad": sigma_nmad,
        "bias": bias,
        "r2": r2,
        "outliers_0.05": lambda a, b: outlier_fraction(a, b, 0.05),
        "outliers_0.15": lambda a, b: outlier_fraction(a, b, 0.15),
    }
    return {name: with_interval(statistic, truth, predicted, n=n, seed=seed) for name, statistic in statistics.items()}


def with_interval(statistic: Statistic, *arrays: Array, n: int = 500, seed: int = 0) -> dict[str, float]:
    """{"value", "lo", "hi"}: the statistic with its 95 % bootstrap interval, as it stands in the report."""
    lo, hi = bootstrap_interval(statistic, *arrays, n=n, seed=seed)
    return {"value": float(statistic(*arrays)), "lo": lo, "hi": hi}
