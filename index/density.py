"""Densities of one property: an exponential family of waves, whose coefficients a network gives.

    log p(u | x) = sum_m a_m(x) cos(2 pi f_m u) + b_m(x) sin(2 pi f_m u) - log Z(x),        u in [0, 1]

u is the property on its axis (`Axis`): ln(1 + z) for a redshift, the value itself otherwise. Several modes are as easy
as one, and the width is bounded by the highest frequency alone: 150 cycles over ln(1 + z) < 1 resolve 3e-4 in
redshift with 10,000 labels, where an MLP that regresses the value reaches 0.02. Which frequencies there are is found
by `index.head_fit` in the vectors. Embeddings that hold a redshift's phases (this project's spectrum tower writes its
characteristic function into them) give high ones, others few.

Everything is on a grid of equal cells; within a cell the density is constant, hence the distribution function linear.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["MAX_CELLS", "Axes", "Axis", "cdf", "pdf", "probabilities", "quantiles"]

MAX_CELLS = 4096  # of a fit; what a batch of 64 over all of them costs is what a fit costs
CELLS_PER_CYCLE = 10  # of the highest frequency; the sum over cells then equals the integral to rounding
FINER = 4  # cells of an answer for one of the fit: a quantile is read off between edges

Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Axis:
    """The axis of one property. lo, hi: its ends, in ln(1 + value) where `log1p`, else in the property's unit.

    frequencies: (M,) cycles over the axis, ascending. Values beyond the ends count as lying at them.
    """

    name: str
    lo: float
    hi: float
    log1p: bool
    frequencies: tuple[float, ...]

    @property
    def outputs(self) -> int:
        """Coefficients a network must give: cosines, then sines."""
        return 2 * len(self.frequencies)

    @property
    def cells(self) -> int:
        """Cells of a fit: a power of two, at least 128."""
        return int(min(MAX_CELLS, max(128, 2 ** np.ceil(np.log2(CELLS_PER_CYCLE * max(self.frequencies))))))

    @property
    def width(self) -> float:
        return self.hi - self.lo

    def to_unit(self, values: npt.ArrayLike) -> Array:
        """u in [0, 1] of values in the property's own unit; NaN stays NaN."""
        v = np.asarray(values, np.float64)
        if self.log1p:
            v = np.log1p(np.maximum(v, np.expm1(self.lo)))
        return np.asarray(np.clip((v - self.lo) / self.width, 0.0, 1.0), np.float64)

    def from_unit(self, u: npt.ArrayLike) -> Array:
        v = self.lo + np.asarray(u, np.float64) * self.width
        return np.asarray(np.expm1(v) if self.log1p else v, np.float64)

    def basis(self, u: npt.ArrayLike) -> Array:
        """(len(u), outputs) waves at u."""
        phase = 2.0 * np.pi * np.outer(np.asarray(u, np.float64), self.frequencies)
        return np.concatenate([np.cos(phase), np.sin(phase)], axis=1)

    def centres(self, cells: int) -> Array:
        """(cells,) u of the middles of equal cells."""
        return (np.arange(cells) + 0.5) / cells


class Axes:
    """Axes of P properties, to move values of all of them at once: arrays (Q, P, M)."""

    def __init__(self, axes: Sequence[Axis]) -> None:
        self._lo = np.array([axis.lo for axis in axes])[:, None]
        self._width = np.array([axis.width for axis in axes])[:, None]
        self._logs = [(i, float(np.expm1(axis.lo))) for i, axis in enumerate(axes) if axis.log1p]

    def to_unit(self, values: Array) -> Array:
        """As `Axis.to_unit`; overwrites `values`."""
        for i, least in self._logs:
            values[:, i] = np.log1p(np.maximum(values[:, i], least))
        return np.minimum(np.maximum((values - self._lo) / self._width, 0.0), 1.0)

    def from_unit(self, u: Array) -> Array:
        """As `Axis.from_unit`."""
        values = self._lo + u * self._width
        for i, _ in self._logs:
            values[:, i] = np.expm1(values[:, i])
        return np.asarray(values, np.float64)


def probabilities(axis: Axis, coefficients: Array) -> Array:
    """(Q, cells) probability of every cell, rows summing to 1, for coefficients (Q, outputs)."""
    logits = coefficients @ _waves(axis).T
    logits -= logits.max(axis=1, keepdims=True)
    p = np.exp(logits)
    return np.asarray(p / p.sum(axis=1, keepdims=True), np.float64)


@lru_cache(maxsize=32)  # 7 MB for a redshift of the demo's spectra, and most of an answer's time if made each time
def _waves(axis: Axis) -> Array:
    """(cells, outputs) the waves in the cells of an answer."""
    return axis.basis(axis.centres(FINER * axis.cells))


def quantiles(axis: Axis, p: Array, levels: Array) -> Array:
    """(Q, L) values at which the distribution function of each row of `p` reaches levels (L,) or (Q, L)."""
    edges = np.linspace(0.0, 1.0, p.shape[1] + 1)
    wanted = np.broadcast_to(levels, (len(p), np.shape(levels)[-1]))
    found = [np.interp(level, steps, edges) for level, steps in zip(wanted, _cumulative(p), strict=True)]
    return axis.from_unit(np.asarray(found, np.float64).reshape(wanted.shape))


def cdf(axis: Axis, p: Array, values: npt.ArrayLike) -> Array:
    """Distribution function of each row of `p` at its own values, (Q,) or (Q, V): the PIT where that is the truth."""
    edges = np.linspace(0.0, 1.0, p.shape[1] + 1)
    found = [np.interp(u, edges, steps) for u, steps in zip(axis.to_unit(values), _cumulative(p), strict=True)]
    return np.asarray(found, np.float64)


def pdf(axis: Axis, p: Array, grid: npt.NDArray[Any]) -> Array:
    """(Q, G) density per unit of the property at values (G,); zero beyond the axis."""
    v = np.asarray(grid, np.float64)
    with np.errstate(invalid="ignore", divide="ignore"):
        w = np.log1p(v) if axis.log1p else v
        slope = 1.0 / (1.0 + v) if axis.log1p else np.ones_like(v)
    u = (w - axis.lo) / axis.width
    inside = (u >= 0.0) & (u <= 1.0)
    cell = np.where(inside, np.minimum(np.nan_to_num(u) * p.shape[1], p.shape[1] - 1), 0).astype(np.int64)
    per_unit = np.where(inside, slope, 0.0) * (p.shape[1] / axis.width)
    return np.asarray(p[:, cell] * per_unit, np.float64)


def _cumulative(p: Array) -> Array:
    """(Q, cells + 1) from 0 to 1."""
    steps = np.cumsum(p, axis=1)
    return np.concatenate([np.zeros((len(p), 1)), steps / steps[:, -1:]], axis=1)
