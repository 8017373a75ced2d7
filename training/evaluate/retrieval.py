"""Finding the partner: an image's own spectrum among a pool of spectra, and the other way round.

The test objects are shuffled and cut into disjoint pools, several times; an object's rank is that of its
partner in its own pool. Intervals resample objects, each with the mean over its shuffles, so repeating the
shuffles narrows the noise of the pools without pretending to more objects than there are.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from training.evaluate.metrics import bootstrap_interval, median_rank, partner_ranks, recall_at_k
from training.evaluate.neighbours import unit

__all__ = ["POOL_SIZE", "pool_ranks", "retrieval"]

Array = npt.NDArray[Any]

POOL_SIZE = 1000
RECALL_AT = (1, 5, 10)


def pool_ranks(
    queries: Array, candidates: Array, pool_size: int = POOL_SIZE, shuffles: int = 5, seed: int = 0
) -> npt.NDArray[np.float64]:
    """(shuffles, N) ranks, 1 = best; NaN where an object fell into the incomplete last pool of a shuffle.

    queries, candidates: (N, D); row i of one belongs to row i of the other. With fewer objects than
    `pool_size` there is one pool of them all, and one shuffle says everything.
    """
    if len(queries) != len(candidates) or len(queries) < 2:
        raise ValueError(f"{len(queries)} queries and {len(candidates)} candidates: wanted equally many, two or more")
    n, size = len(queries), min(pool_size, len(queries))
    queries, candidates = unit(queries), unit(candidates)
    rng = np.random.default_rng(seed)
    ranks = np.full((shuffles if size < n else 1, n), np.nan)
    for row in ranks:
        order = rng.permutation(n)
        for start in range(0, n - size + 1, size):
            pool = order[start : start + size]
            row[pool] = partner_ranks(queries[pool], candidates[pool])
    return ranks


def retrieval(
    image: Array,
    spectrum: Array,
    *,
    pool_size: int = POOL_SIZE,
    shuffles: int = 5,
    n_bootstrap: int = 500,
    seed: int = 0,
) -> dict[str, dict[str, Any]]:
    """recall@1/5/10, median rank both ways: {"image->spectrum": {"recall@1": {"value", "lo", "hi"}, ..}}."""
    out: dict[str, dict[str, Any]] = {}
    for name, (queries, candidates) in {
        "image->spectrum": (image, spectrum),
        "spectrum->image": (spectrum, image),
    }.items():
        ranks = pool_ranks(queries, candidates, pool_size, shuffles, seed)
        ranks = ranks[:, np.isfinite(ranks).any(axis=0)]
        entry: dict[str, Any] = {
            "pool_size": min(pool_size, len(queries)),
            "pools": int(len(ranks) * (len(queries) // min(pool_size, len(queries)))),
            "objects": int(ranks.shape[1]),
        }
        for k in RECALL_AT:
            hit = np.where(np.isfinite(ranks), ranks <= k, np.nan)
            share = np.nanmean(hit, axis=0)
            lo, hi = bootstrap_interval(np.mean, share, n=n_bootstrap, seed=seed)
            entry[f"recall@{k}"] = {"value": recall_at_k(ranks[np.isfinite(ranks)], k), "lo": lo, "hi": hi}
        lo, hi = bootstrap_interval(np.median, np.nanmedian(ranks, axis=0), n=n_bootstrap, seed=seed)
        entry["median_rank"] = {"value": median_rank(ranks[np.isfinite(ranks)]), "lo": lo, "hi": hi}
        out[name] = entry
    return out
