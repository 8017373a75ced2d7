"""Calibration: what a cosine means in this index, from tables measured when it is built.

Two kinds of table:

* scores of random pairs, for each (query modality, target modality): cosines of one pair are not on the scale of
  another's (the modality gap, Liang et al. 2022, arXiv:2203.02053), their percentiles are. Beyond the last knot the
  upper tail is continued as an exponential with the mean excess of the sample (Pickands 1975 with shape 0), so that
  percentiles stay strictly increasing and can rank hits of two pairs against one another.
* the similarity of each sampled object to its k-th nearest other object, per modality: for lists of isolated objects,
  and for `index.trust` in an index without `index.typical`.

Sampling is seeded; an object is never paired with itself, in either modality.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from index.backends.exact import ExactBackend
from index.vectors import VectorTable

__all__ = ["KTH", "ScoreTable", "kth_scores", "sample_scores", "sample_slots"]

KTH = 16  # neighbour whose similarity measures how usual an object is
_LEVELS = np.concatenate([np.linspace(0.0, 0.99, 100), 1.0 - np.logspace(-2, -5, 31)[1:]])
_TAIL = 1e-3  # fraction of the sample the exponential is fitted to and from where it takes over
_QUERIES, _TARGETS = 4096, 1024  # 4 million pairs: the 1e-5 level rests on 40 of them
_KTH_SAMPLE = 4096  # resolves p-values to 2.4e-4

Scores = npt.NDArray[np.float64]


@dataclass(frozen=True)
class ScoreTable:
    """Distribution of the cosine of unrelated pairs. On disk: (3, L) float64 rows level, score, tail scale (repeated).

    levels, scores: (L,) increasing, fraction of pairs below a score. tail_scale: of the exponential beyond
    `scores[-1]`.
    """

    levels: Scores
    scores: Scores
    tail_scale: float

    @classmethod
    def from_sample(cls, sample: npt.NDArray[np.float32]) -> ScoreTable:
        sample = np.sort(sample.ravel().astype(np.float64))
        levels = _LEVELS[_LEVELS <= 1.0 - 1.0 / len(sample)]  # no level finer than the sample
        start = np.quantile(sample, max(1.0 - _TAIL, 0.5))
        excess = sample[sample > start] - start
        scale = float(excess.mean()) if len(excess) else 1e-3
        return cls(levels, np.quantile(sample, levels), max(scale, 1e-6))

    @classmethod
    def from_array(cls, array: npt.NDArray[np.float64]) -> ScoreTable:
        return cls(array[0], array[1], float(array[2, 0]))

    def to_array(self) -> Scores:
        return np.stack([self.levels, self.scores, np.full_like(self.levels, self.tail_scale)])

    def upper_tail(self, scores: npt.ArrayLike) -> Scores:
        """Fraction of unrelated pairs that score higher; non-increasing, strictly falling beyond the last knot."""
        s = np.asarray(scores, np.float64)
        inside = 1.0 - np.interp(s, self.scores, self.levels)
        beyond = (1.0 - self.levels[-1]) * np.exp(-np.maximum(s - self.scores[-1], 0.0) / self.tail_scale)
        return np.where(s > self.scores[-1], beyond, inside)

    def percentiles(self, scores: npt.ArrayLike) -> npt.NDArray[np.float32]:
        """0..100: per cent of unrelated pairs that score lower."""
        return np.asarray(100.0 * (1.0 - self.upper_tail(scores)), np.float32)


def sample_slots(n: int, count: int, rng: np.random.Generator) -> npt.NDArray[np.int64]:
    """At most `count` of `n` slots, ascending, each once."""
    return np.arange(n) if n <= count else np.sort(rng.choice(n, count, replace=False))


def sample_scores(queries: VectorTable, targets: VectorTable, rng: np.random.Generator) -> ScoreTable | None:
    """The table of one (query, target) pair; None where there are no two different objects."""
    q, t = sample_slots(len(queries), _QUERIES, rng), sample_slots(len(targets), _TARGETS, rng)
    different = queries.rows[q][:, None] != targets.rows[t][None, :]
    sample = (queries.take(q) @ targets.take(t).T)[different]
    return ScoreTable.from_sample(sample) if len(sample) > 1 else None


def kth_scores(table: VectorTable, rng: np.random.Generator, k: int = KTH) -> npt.NDArray[np.float32]:
    """Sorted cosines of (a sample of) the objects with their k-th nearest other object; empty if there are too few."""
    if len(table) <= k:
        return np.empty(0, np.float32)
    slots = sample_slots(len(table), _KTH_SAMPLE, rng)
    queries = table.take(slots)
    found = ExactBackend(table).search(queries, k + 1)
    scores = table.scores(queries, np.where(found == slots[:, None], -1, found))  # leave the object itself out
    return np.sort(np.sort(scores, axis=1)[:, -k])
