"""k-NN regression with intervals that hold what they claim: split-conformal, weighted by the neighbours' spread.

Everything is on the property's axis (`density.Axis`: ln(1 + z) for a redshift), u in [0, 1] over the values of the
index. For a query with neighbours (x_i, d_i), i <= k, and weights w = 1/d as in `index.regress`,

    value     = weighted mean or median of x                 sigma = a + b spread + c distance,  a, b, c >= 0
    spread    = sum w |x - value| / sum w                    distance = mean d
    interval  = value -+ q(coverage) sigma, cut at the ends of the axis

q is the ceil((n + 1) coverage)-th smallest of n scores |truth - value| / sigma of labelled objects that nothing was
chosen on (locally weighted split-conformal: Papadopoulos, Vovk & Gammerman 2011, JAIR 40, 815, for k-NN; Lei et al.
2018, JASA 113, 1094). The scores are kept apart in three bins of `distance` (Mondrian: Vovk et al. 2005), so that
far and near queries are each covered. For an object drawn as the labelled ones, the interval of its bin holds the truth
with probability `coverage` at least; for one kind of object, or one drawn otherwise, it may be off.

A rung is all that for one k; `LADDER` says which are calibrated. Mean or median, and the k of an index's own choice,
are those of the least continuous ranked probability score of the intervals on validation objects: it is robust, and
weighs both the value and its interval.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.optimize import nnls

from index.regress import MIN_DISTANCE, weighted_quantiles

__all__ = [
    "LADDER",
    "LEVELS",
    "OWN_UP_TO",
    "Neighbourhood",
    "Rung",
    "Rungs",
    "fit_rung",
    "intervals",
    "neighbourhood",
    "rung_of",
]

LADDER = (1, 2, 4, 8, 16, 32, 64)
OWN_UP_TO = 32  # the largest k an index chooses: 64 was never 1 % better, and hits are there to be looked at
BINS = 3
BIN_SCORES = 60  # scores from which a bin stands alone; with fewer it takes those of all bins
# Coverages whose quantiles are kept; one asked for between two is answered with the wider. The last, 1, is the axis.
LEVELS = np.concatenate([np.arange(1, 100) / 100, np.arange(991, 1000) / 1000, [0.9995, 0.9999, 1.0]])
_ROUNDS = 8  # of reweighting; coefficients move by less than a per cent after five
_LEAST_SIGMA = 1e-3  # of the mean residual: a query whose neighbours agree exactly keeps some width
_TAUS = (np.arange(10) + 0.5) / 10  # coverages over which the score is summed

Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Neighbourhood:
    """(Q, P) arrays of Q queries and P properties, see the module's text; NaN where no neighbour has the property."""

    value: Array
    spread: Array
    distance: Array
    n_eff: Array


@dataclass(frozen=True)
class Rung:
    """One k of one property. scale: (3,) a, b, c. edges: (2,) of the bins of distance. scores: (3, len(LEVELS))
    quantiles of the scores in each bin at `LEVELS`, infinite where there are too few scores for a level."""

    median: bool
    scale: Array
    edges: Array
    scores: Array


class Rungs:
    """One rung for each of P properties: arrays of k (P,) and of what `Rung` holds; median: the properties with one."""

    def __init__(self, k: Sequence[int], rungs: Sequence[Rung]) -> None:
        self.k = np.array(k)
        self.median = np.flatnonzero([rung.median for rung in rungs])
        self.scale = np.array([rung.scale for rung in rungs])
        self.edges = np.array([rung.edges for rung in rungs])
        self.scores = np.array([rung.scores for rung in rungs])


def rung_of(k: int) -> int:
    """Place in `LADDER` of the calibration that speaks for k neighbours: the largest not above it."""
    return max(bisect_right(LADDER, k) - 1, 0)


def neighbourhood(x: Array, d: Array, k: npt.ArrayLike, median: Sequence[int] | npt.NDArray[np.int64]) -> Neighbourhood:
    """Sums over the first k[p] neighbours of each query, those without the property left out.

    x: (Q, P, K) values, NaN where unknown; d: (Q, K) distances, infinite where there is no neighbour. median: the
    properties whose value is the median.
    """
    present = np.isfinite(d)
    near = np.where(present, d, 0.0)
    w = present / np.maximum(d, MIN_DISTANCE)
    counted = np.isfinite(x) & (np.arange(d.shape[1]) < np.asarray(k)[:, None])
    x = np.where(counted, x, 0.0)
    # one product for all sums over the neighbours that count: this is most of what an estimate adds to a search
    sums = counted.astype(np.float64) @ np.stack([w, w * w, present, near], axis=2)
    total, squares, count, distance = (sums[:, :, i] for i in range(4))
    with np.errstate(invalid="ignore", divide="ignore"):
        value = (x @ w[:, :, None])[:, :, 0] / total
        if len(median):
            reach = min(int(np.asarray(k)[median].max()), x.shape[2])
            some, weights = x[:, median, :reach], (counted[:, median] * w[:, None])[:, :, :reach]
            middle = weighted_quantiles(some.reshape(-1, reach), weights.reshape(-1, reach), (0.5,))[0]
            value[:, median] = middle.reshape(len(x), -1)
        off = np.abs(x - value[:, :, None], where=counted, out=np.zeros_like(x))
        return Neighbourhood(
            value,
            spread=(off @ w[:, :, None])[:, :, 0] / total,
            distance=distance / count,
            n_eff=np.where(count > 0, total**2 / squares, 0.0),
        )


def intervals(found: Neighbourhood, rungs: Rungs, coverage: float) -> tuple[Array, Array]:
    """(lo, hi) of (Q, P)."""
    level = int(np.searchsorted(LEVELS, coverage - 1e-9))
    q = rungs.scores[np.arange(len(rungs.k)), _bins(found.distance, rungs.edges), level]
    half = _sigma(found, rungs.scale) * q
    return np.maximum(found.value - half, 0.0), np.minimum(found.value + half, 1.0)


def fit_rung(
    x: Array, d: Array, y: Array, k: int, choosing: npt.NDArray[np.int64], calibrating: npt.NDArray[np.int64]
) -> tuple[Rung, float]:
    """The rung of one property, and its continuous ranked probability score on the objects it was chosen on.

    x: (n, K) neighbours' values, d: (n, K), y: (n,) truths; choosing, calibrating: rows of these, disjoint. Those
    without a neighbour that has the property are left out, as they are left without an answer.
    """
    known = np.asarray(np.isfinite(x[:, :k]).any(axis=1))
    choosing, calibrating = choosing[known[choosing]], calibrating[known[calibrating]]
    if len(choosing) < BIN_SCORES:  # a rare property: nothing to say with so few neighbours
        nothing = np.full((BINS, len(LEVELS)), np.inf)
        return Rung(False, np.array([1.0, 0.0, 0.0]), np.zeros(BINS - 1), nothing), np.inf
    trials = []
    for median in (False, True)[: 1 if k == 1 else 2]:
        found = neighbourhood(x[choosing, None, :k], d[choosing, :k], [k], [0] * median)
        residual = np.abs(y[choosing] - found.value[:, 0])
        scale = _fit_scale(found, residual)
        sigma = _sigma(found, scale[None])[:, 0]
        trials.append((_crps(y[choosing], found.value[:, 0], sigma), median, scale, found.distance[:, 0]))
    crps, median, scale, distance = min(trials, key=lambda trial: trial[0])
    edges = np.quantile(distance, [1 / BINS, 2 / BINS])
    found = neighbourhood(x[calibrating, None, :k], d[calibrating, :k], [k], [0] * median)
    scores = np.abs(y[calibrating] - found.value[:, 0]) / _sigma(found, scale[None])[:, 0]
    bins = _bins(found.distance, edges[None])[:, 0]
    parts = [scores[bins == i] for i in range(BINS)]
    table = np.stack([_quantiles(part if len(part) >= BIN_SCORES else scores) for part in parts])
    return Rung(median, scale, edges, table), crps


def _sigma(found: Neighbourhood, scale: Array) -> Array:
    return np.asarray(scale[:, 0] + scale[:, 1] * found.spread + scale[:, 2] * found.distance, np.float64)


def _bins(distance: Array, edges: Array) -> npt.NDArray[np.int64]:
    return np.asarray(np.sum(distance[:, :, None] > edges, axis=2), np.int64)


def _fit_scale(found: Neighbourhood, residual: Array) -> Array:
    """a, b, c of |residual| = sigma + noise in proportion to sigma, by reweighted non-negative least squares."""
    features = np.stack([np.ones_like(residual), found.spread[:, 0], found.distance[:, 0]], axis=1)
    mean = max(float(residual.mean()), 1e-12)
    sigma = np.full_like(residual, mean)
    scale = np.array([mean, 0.0, 0.0])
    for _ in range(_ROUNDS):
        scale, _ = nnls(features / sigma[:, None], residual / sigma)
        scale[0] = max(scale[0], _LEAST_SIGMA * mean)
        sigma = features @ scale
    return np.asarray(scale, np.float64)


def _crps(y: Array, value: Array, sigma: Array) -> float:
    """Continuous ranked probability score of the intervals of all coverages: twice the mean pinball loss."""
    off = y - value
    total = 0.0
    for coverage, q in zip(_TAUS, np.quantile(np.abs(off) / sigma, _TAUS), strict=True):
        half = q * sigma
        total += float(np.mean((1.0 - coverage) * half + np.maximum(np.abs(off) - half, 0.0)))  # of both ends
    return total / len(_TAUS)


def _quantiles(scores: Array) -> Array:
    """The ceil((n + 1) level)-th smallest score at each of `LEVELS`, infinite beyond the n-th."""
    n = len(scores)
    rank = np.ceil((n + 1) * LEVELS - 1e-9).astype(np.int64)
    return np.concatenate([np.sort(scores), [np.inf]])[np.minimum(rank, n + 1) - 1]
