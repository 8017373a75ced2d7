"""k-nearest-neighbour search and regression over plain arrays of embeddings.

One search with the largest k serves every smaller k and every property, so tuning k costs nothing more.
Distances are Euclidean; on unit vectors that is the order of the cosine, d^2 = 2 - 2 cos. Brute force in
chunks: a benchmark must not carry the error of an approximate index. (The served index has its own search;
this one imports numpy alone.)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["Neighbours", "nearest", "standardise", "unit", "weighted_mean", "weighted_median", "weights"]

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Neighbours:
    """The k nearest rows of a table for each of Q queries, nearest first.

    rows:     (Q, k) int64 rows of the table.
    distance: (Q, k) float64, Euclidean.
    """

    rows: npt.NDArray[np.int64]
    distance: npt.NDArray[np.float64]

    def first(self, k: int) -> Neighbours:
        """The k nearest of them."""
        return Neighbours(self.rows[:, :k], self.distance[:, :k])


def unit(vectors: Array) -> npt.NDArray[np.float32]:
    """(N, D) scaled to unit norm, float32; a zero vector stays zero."""
    vectors = np.asarray(vectors, np.float32)
    norm = np.linalg.norm(vectors, axis=1, keepdims=True)
    scaled: npt.NDArray[np.float32] = (vectors / np.where(norm > 0, norm, 1.0)).astype(np.float32)
    return scaled


def standardise(table: Array, *others: Array) -> tuple[npt.NDArray[np.float64], ...]:
    """`table` and `others` less the table's mean, over its deviation, per feature, float64 (StandardScaler)."""
    table = np.asarray(table, np.float64)
    mean, spread = table.mean(axis=0), table.std(axis=0)
    spread = np.where(spread > 0, spread, 1.0)
    return tuple((np.asarray(a, np.float64) - mean) / spread for a in (table, *others))


def nearest(queries: Array, table: Array, k: int, chunk: int = 512) -> Neighbours:
    """The k nearest rows of `table` (N, D) for each of `queries` (Q, D); k is cut to N.

    Distances are sqrt(|q|^2 + |t|^2 - 2 q.t) with one matrix product in float64, as in scikit-learn: good to 1e-7 of
    the vectors' length, so that a query that is itself in the table stands at about that distance, not at 0.
    """
    queries, table = np.asarray(queries, np.float64), np.ascontiguousarray(table, np.float64)
    if queries.ndim != 2 or table.ndim != 2 or queries.shape[1] != table.shape[1] or not len(table):
        raise ValueError(f"queries {queries.shape} and table {table.shape}: wanted (Q, D) and (N > 0, D), one D")
    k = min(k, len(table))
    squared = np.einsum("nd,nd->n", table, table)
    rows = np.empty((len(queries), k), np.int64)
    distance = np.empty((len(queries), k))
    for start in range(0, len(queries), chunk):
        some = queries[start : start + chunk]
        apart = squared - 2.0 * (some @ table.T) + np.einsum("qd,qd->q", some, some)[:, None]
        best = np.argpartition(apart, k - 1, axis=1)[:, :k] if k < len(table) else np.tile(np.arange(k), (len(some), 1))
        d = np.sqrt(np.maximum(np.take_along_axis(apart, best, axis=1), 0))
        order = np.argsort(d, axis=1, kind="stable")
        rows[start : start + chunk] = np.take_along_axis(best, order, axis=1)
        distance[start : start + chunk] = np.take_along_axis(d, order, axis=1)
    return Neighbours(rows, distance)


def weights(found: Neighbours) -> Array:
    """(Q, k) weights 1/distance, rows summing to 1; neighbours at distance 0 count alone (as in sklearn)."""
    zero = found.distance == 0
    with np.errstate(divide="ignore"):
        raw = np.where(zero.any(axis=1, keepdims=True), zero.astype(np.float64), 1.0 / found.distance)
    return raw / raw.sum(axis=1, keepdims=True)


def weighted_mean(found: Neighbours, targets: Array) -> Array:
    """Distance-weighted mean of the neighbours' `targets` (N,) or (N, P): (Q,) or (Q, P) float64.

    It commutes with any scaling of the targets, so standardising them first (as upstream does) changes no R2.
    """
    return np.einsum("qk,qk...->q...", weights(found), np.asarray(targets, np.float64)[found.rows])


def weighted_median(found: Neighbours, targets: Array) -> Array:
    """Distance-weighted median of the neighbours' `targets` (N,): (Q,) float64.

    For a redshift, where a few neighbours matched on the wrong line sit far off and would drag a mean.
    """
    values = np.asarray(targets, np.float64)[found.rows]
    order = np.argsort(values, axis=1)
    cumulated = np.cumsum(np.take_along_axis(weights(found), order, axis=1), axis=1)
    middle = np.argmax(cumulated >= 0.5 - 1e-12, axis=1)
    return np.take_along_axis(values, np.take_along_axis(order, middle[:, None], axis=1), axis=1)[:, 0]
