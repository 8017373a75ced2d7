"""The neighbours' distribution as a probability density: p(z), or p of any property.

Each neighbour, weighted by 1/d, is spread out by a Student t kernel of two degrees of freedom, whose distribution
function needs no special function and whose tails allow for neighbours that are all wrong:

    F(u) = sum w_i T((u - x_i) / h) / sum w,   T(t) = (1 + t / sqrt(2 + t^2)) / 2,   h = floor + share * spread

cut to [0, 1] on the property's axis. How many neighbours, `floor` and `share` are those of the largest likelihood on
validation objects. F is then calibrated: the quantiles of its values at the truth of other labelled objects (the
probability integral transform) are mapped to those of a uniform distribution, so that on average over objects like them
the truth lies below the p-quantile with probability p (recalibration: Dey et al. 2022, arXiv:2205.14568, with
one map for all objects in place of one that depends on them).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import product

import numpy as np
import numpy.typing as npt

from index.knn_conformal import neighbourhood
from index.regress import MIN_DISTANCE

__all__ = ["KNOTS", "SMOOTHED", "Smoothing", "choose_smoothing"]

SMOOTHED = (8, 16, 32)  # neighbours tried
KNOTS = 65  # of the map; steps of 1/64 with 4,000 labels are known to a seventh of themselves
_FLOORS = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)  # of the interquartile range of the property
_SHARES = (0.0, 0.3, 0.6)
_TRIED_ON = 2000  # validation objects a likelihood is taken over
_HALVINGS = 40  # of the axis: 1e-12 of it
_EVEN = np.linspace(0.0, 1.0, KNOTS)

Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Smoothing:
    """k: neighbours read. floor, share: of the width h. pit: (KNOTS,) ascending from 0 to 1, values of the uncalibrated
    F that calibrated probabilities 0, 1/64, ... 1 belong to."""

    k: int
    floor: float
    share: float
    pit: Array

    def cdf(self, x: Array, d: Array, u: Array) -> Array:
        """(Q, V) calibrated distribution function at u (Q, V), of neighbours' values (Q, K) and distances (Q, K)."""
        return np.asarray(np.interp(self._cut(*self._kernels(x, d), u), self.pit, _EVEN))

    def quantiles(self, x: Array, d: Array, levels: Array) -> Array:
        """(Q, L) values of u where the calibrated distribution function is `levels` (L,), by bisection."""
        kernels = self._kernels(x, d)
        wanted = np.interp(levels, _EVEN, self.pit)
        lo, hi = np.zeros((len(x), len(levels))), np.ones((len(x), len(levels)))
        for _ in range(_HALVINGS):
            middle = (lo + hi) / 2.0
            below = self._cut(*kernels, middle) < wanted
            lo, hi = np.where(below, middle, lo), np.where(below, hi, middle)
        return np.asarray((lo + hi) / 2.0, np.float64)

    def calibrated(self, x: Array, d: Array, y: Array) -> Smoothing:
        """The same, its map set on other labelled objects: (n, K), (n, K), (n,)."""
        reached = replace(self, pit=_EVEN).cdf(x, d, y[:, None])[:, 0]
        pit = np.quantile(reached[np.isfinite(reached)], _EVEN)
        pit[0], pit[-1] = 0.0, 1.0
        return replace(self, pit=np.maximum.accumulate(pit))

    def _kernels(self, x: Array, d: Array) -> tuple[Array, Array, Array]:
        """Centres (Q, k), weights (Q, k) summing to 1, widths (Q, 1)."""
        x, d = x[:, : self.k], d[:, : self.k]
        spread = neighbourhood(x[:, None], d, [self.k], [0]).spread
        known = np.isfinite(x) & np.isfinite(d)
        w = np.where(known, 1.0 / np.maximum(d, MIN_DISTANCE), 0.0)
        with np.errstate(invalid="ignore"):
            return np.where(known, x, 0.0), w / w.sum(axis=1, keepdims=True), self.floor + self.share * spread

    def _cut(self, x: Array, w: Array, h: Array, u: Array) -> Array:
        """The uncalibrated F, 0 at u = 0 and 1 at u = 1."""
        below, above = _mixed(x, w, h, np.zeros((1, 1))), _mixed(x, w, h, np.ones((1, 1)))
        return np.asarray((_mixed(x, w, h, u) - below) / (above - below), np.float64)


def choose_smoothing(x: Array, d: Array, y: Array) -> Smoothing:
    """The uncalibrated smoothing of the largest likelihood: x (n, K) and d (n, K) of the neighbours, y (n,) truths."""
    known = np.isfinite(x[:, : SMOOTHED[0]]).any(axis=1)
    x, d, y = x[known][:_TRIED_ON], d[known][:_TRIED_ON], y[known][:_TRIED_ON]
    unit = float(np.subtract(*np.quantile(y, [0.75, 0.25])))
    trials = []
    for k, share in product(SMOOTHED, _SHARES):
        centres, w, width = Smoothing(k, 0.0, share, _EVEN)._kernels(x, d)
        away = y[:, None] - centres
        for floor in _FLOORS:
            h = width + floor * unit
            likelihood = np.sum(w * (2.0 + (away / h) ** 2) ** -1.5, axis=1) / h[:, 0]
            trials.append((-float(np.mean(np.log(likelihood))), k, floor * unit, share))
    _, k, floor, share = min(trials)
    return Smoothing(k, floor, share, _EVEN)


def _mixed(x: Array, w: Array, h: Array, u: Array) -> Array:
    """(Q, V) mixture of the kernels, a neighbour at a time: (Q, V, k) at once would not stay in the cache."""
    out = np.zeros(np.broadcast_shapes(u.shape, (len(x), 1)))
    for i in range(x.shape[1]):
        t = (u - x[:, i, None]) / h
        out += w[:, i, None] * (0.5 + 0.5 * t / np.sqrt(2.0 + t * t))
    return out
