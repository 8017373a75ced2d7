"""Properties of an object estimated from its neighbours: distance-weighted k-NN, with spread.

Weights are 1/d of the Euclidean distance between unit vectors, d = sqrt(2 - 2 cos), as scikit-learn's
`weights="distance"` and the zero-shot protocol of AstroCLIP (Parker et al. 2024, MNRAS 531, 4990, section 6); d is
not let below `MIN_DISTANCE`, so an identical neighbour takes nearly all the weight and n_eff tells it.

    value = sum w x / sum w        n_eff = (sum w)^2 / sum w^2       (Kish 1965)
    lo, hi = weighted quantiles at (1 -+ coverage)/2, midpoint rule p_i = (sum_{j<=i} w_j - w_i/2) / sum w

widened where needed to include `value`. Neighbours without the property are left out of all three. These intervals are
the neighbours' own spread: nothing says that they hold the truth as often as they claim. `index.knn_conformal` has
those that do; these are what an index without a calibration answers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from astroclip.errors import InputError, NotFoundError

if TYPE_CHECKING:
    from index.store import SurveyIndex

__all__ = [
    "DEFAULT_K",
    "MIN_DISTANCE",
    "Estimate",
    "Regression",
    "check_coverage",
    "distances",
    "knn_regress",
    "unit_of",
    "weighted_quantiles",
]

DEFAULT_K = 16  # the paper's; `k` neighbours are what the caller searches for
MIN_DISTANCE = 1e-6  # below float32 resolution of the cosine

Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Estimate:
    """One property: `value` in [lo, hi], `coverage` the wanted probability of that interval.

    n_eff: effective number of neighbours behind it, None where it comes from a head (`index.head_estimate`); None
    values (n_eff 0) where no neighbour has the property. k: how many of the nearest hits it looked at, None from a
    head. calibrated: whether `coverage` was measured for such intervals, see `index.knn_conformal`.
    """

    name: str
    unit: str
    value: float | None
    lo: float | None
    hi: float | None
    coverage: float
    n_eff: float | None
    k: int | None = None
    calibrated: bool = True


@dataclass(frozen=True)
class Regression:
    """(Q,) float64 arrays; NaN (and n_eff 0) for a query none of whose neighbours has a value."""

    value: Array
    lo: Array
    hi: Array
    n_eff: Array


def knn_regress(neighbour_values: npt.NDArray[Any], distances: npt.NDArray[Any], coverage: float = 0.68) -> Regression:
    """Regression for a batch: values and distances (Q, k), NaN where a neighbour lacks the property or is absent."""
    check_coverage(coverage)
    values, d = np.asarray(neighbour_values, np.float64), np.asarray(distances, np.float64)
    if values.shape != d.shape or values.ndim != 2:
        raise ValueError(f"values {values.shape} and distances {d.shape} must both be (Q, k)")
    known = np.isfinite(values) & np.isfinite(d)
    weights = np.where(known, 1.0 / np.maximum(d, MIN_DISTANCE, where=known, out=np.ones_like(d)), 0.0)
    total = weights.sum(axis=1)
    with np.errstate(invalid="ignore", divide="ignore"):
        value = np.sum(weights * np.where(known, values, 0.0), axis=1) / total
        n_eff = np.where(total > 0, total**2 / np.sum(weights**2, axis=1), 0.0)
    tail = (1.0 - coverage) / 2.0
    lo, hi = weighted_quantiles(values, weights, (tail, 1.0 - tail))
    return Regression(value, np.fmin(lo, value), np.fmax(hi, value), n_eff)


def distances(scores: npt.NDArray[Any]) -> Array:
    """Euclidean distance of unit vectors with these cosines, not below `MIN_DISTANCE`; infinite for -inf."""
    return np.sqrt(np.maximum(2.0 - 2.0 * np.asarray(scores, np.float64), MIN_DISTANCE**2))


def check_coverage(coverage: float) -> None:
    """Raises InputError unless it is a probability between 0 and 1, both excluded."""
    if not 0.0 < coverage < 1.0:
        raise InputError(
            f"coverage {coverage}; wanted a probability between 0 and 1, such as 0.68",
            code="bad_coverage",
            field="coverage",
        )


def unit_of(index: SurveyIndex, name: str) -> str:
    """The unit of a property the index estimates. Raises NotFoundError."""
    try:
        return index.catalog.properties[name]
    except KeyError:
        raise NotFoundError(
            f"the index {index.index_id!r} estimates no property {name[:80]!r}; wanted one of "
            f"{', '.join(index.catalog.properties) or '(it has none)'}; mend the name",
            code="unknown_property",
            field="properties",
        ) from None


def weighted_quantiles(values: Array, weights: Array, levels: Sequence[float]) -> list[Array]:
    """Weighted quantiles along axis 1 by linear interpolation between midpoints; NaN for rows without weight.

    Absent values carry no weight and are sorted to the end; their midpoints equal the last one's upper edge, so the
    interpolation is ended at the last known value.
    """
    if not values.shape[1]:
        return [np.full(len(values), np.nan) for _ in levels]
    order = np.argsort(np.where(weights > 0, values, np.inf), axis=1, kind="stable")
    x, w = np.take_along_axis(values, order, axis=1), np.take_along_axis(weights, order, axis=1)
    count = np.count_nonzero(w > 0, axis=1)
    total = np.cumsum(w, axis=1)
    with np.errstate(invalid="ignore", divide="ignore"):
        p = (total - w / 2.0) / total[:, -1:]
    rows, last = np.arange(len(x)), np.maximum(count - 1, 0)
    out = []
    for level in levels:
        upper = np.clip(np.sum((p < level) & (w > 0), axis=1), 0, last)
        lower = np.maximum(upper - 1, 0)
        gap = p[rows, upper] - p[rows, lower]
        with np.errstate(invalid="ignore", divide="ignore"):
            t = np.where(gap > 0, np.clip((level - p[rows, lower]) / gap, 0.0, 1.0), 1.0)
        found = x[rows, lower] + t * (x[rows, upper] - x[rows, lower])
        out.append(np.where(count > 0, found, np.nan))
    return out
