"""Search by examples, best-score strategy: near any one of the positives rather than near their mean.

After Qdrant's `recommend` (strategy best_score). For a vector x with cosines to the examples

    p = max over positives i of 1 - (1 - cos(x, p_i)) / w_i          n = the same over negatives
    score(x) = p  where p > n or there are no negatives,  else  -n^2

A weight divides the cosine distance: 1 leaves it, smaller ones make an example count from nearer only. Weights are
scaled so that the largest of each list is 1; an example of weight 0 is left out. Qdrant has no weights; with equal ones
the formula is Qdrant's. Scores are cut to [-1, 1].

No index ranks by this, so it is exact: one pass over the survivors.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from index.vectors import VectorTable

__all__ = ["Examples"]

Vectors = npt.NDArray[np.float32]
Slots = npt.NDArray[np.int64]

_CHUNK = 32_768
_MARGIN = 8  # beyond k, so that rounding of the pass cannot cost a hit


@dataclass(frozen=True)
class Examples:
    """positive (P, D), negative (M, D): float32 of unit norm; weights (P,) and (M,), not negative."""

    positive: Vectors
    negative: Vectors
    positive_weights: npt.NDArray[np.float64]
    negative_weights: npt.NDArray[np.float64]

    def score(self, positive: npt.NDArray[np.floating], negative: npt.NDArray[np.floating]) -> Vectors:
        """(n,) best scores from cosines (n, P) and (n, M)."""
        p, n = _best(positive, self.positive_weights), _best(negative, self.negative_weights)
        return np.asarray(np.where(p > n, p, -(n * n)), np.float32)

    def best(self, table: VectorTable, slots: Slots, k: int, *, farthest: bool) -> Slots:
        """About k of `slots` with the highest (farthest: lowest) score, in any order."""
        sign = -1.0 if farthest else 1.0
        scores = np.empty(len(slots), np.float32)
        for start in range(0, len(slots), _CHUNK):
            vectors = table.take(slots[start : start + _CHUNK])
            scores[start : start + len(vectors)] = self.score(vectors @ self.positive.T, vectors @ self.negative.T)
        wanted = min(len(slots), k + _MARGIN)
        if wanted == len(slots):
            return slots
        return slots[np.argpartition(-sign * scores, wanted)[:wanted]]

    def rescored(self, table: VectorTable, slots: Slots) -> Vectors:
        """(k,) scores of slots, from one dot product a pair."""

        def cosines(examples: Vectors) -> Vectors:
            return table.scores(examples, np.broadcast_to(slots, (len(examples), len(slots)))).T

        return self.score(cosines(self.positive), cosines(self.negative))


def _best(cosines: npt.NDArray[np.floating], weights: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """(n,) weighted cosine of the nearest example; -inf where there is none."""
    used = weights > 0
    if not used.any():
        return np.full(len(cosines), -np.inf)
    relative = np.maximum(weights[used] / weights[used].max(), 1e-12)  # a ratio may underflow
    return np.asarray((1.0 - (1.0 - cosines[:, used].astype(np.float64)) / relative).max(axis=1), np.float64)
