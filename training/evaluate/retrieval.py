"""Finding the partner: an image's own spectrum among a pool of spectra, and the other way round.

The test objects are shuffled and cut into disjoint pools, several times; an object's rank is that of its
partner in its own pool. The pools follow from the number of objects, the pool's size and the seed alone, so two
encoders search the same pools, and a result shows by `pools_sha256` that they were those of the release.
Intervals resample objects, each with the mean over its shuffles, so repeating the shuffles narrows the noise of
the pools without pretending to more objects than there are.
"""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import numpy.typing as npt

from training.evaluate.metrics import bootstrap_interval, median_rank, partner_ranks, recall_at_k
from training.evaluate.neighbours import unit

__all__ = ["POOL_SIZE", "SHUFFLES", "draw_pools", "pool_ranks", "pools_sha256", "retrieval"]

Array = npt.NDArray[Any]

POOL_SIZE = 1000
SHUFFLES = 5
RECALL_AT = (1, 5, 10)


def draw_pools(n: int, pool_size: int = POOL_SIZE, shuffles: int = SHUFFLES, seed: int = 0) -> npt.NDArray[np.int64]:
    """(shuffles, pools, size) rows of `n` objects; pools of one shuffle are disjoint, the rest of it is left out.

    With fewer objects than `pool_size` there is one pool of them all, and one shuffle says everything.
    """
    size = min(pool_size, n)
    rng = np.random.default_rng(seed)
    orders = [rng.permutation(n) for _ in range(shuffles if size < n else 1)]
    return np.stack([order[: n // size * size].reshape(-1, size) for order in orders]).astype(np.int64)


def pools_sha256(pools: npt.NDArray[np.int64]) -> str:
    """Digest of shape and rows."""
    return hashlib.sha256(f"{pools.shape}".encode() + pools.astype("<i8").tobytes()).hexdigest()


def pool_ranks(
    queries: Array, candidates: Array, pool_size: int = POOL_SIZE, shuffles: int = SHUFFLES, seed: int = 0
) -> npt.NDArray[np.float64]:
    """(shuffles, N) ranks, 1 = best; NaN where an object fell into the incomplete last pool of a shuffle.

    queries, candidates: (N, D); row i of one belongs to row i of the other.
    """
    if len(queries) != len(candidates) or len(queries) < 2:
        raise ValueError(f"{len(queries)} queries and {len(candidates)} candidates: wanted equally many, two or more")
    queries, candidates = unit(queries), unit(candidates)
    pools = draw_pools(len(queries), pool_size, shuffles, seed)
    ranks = np.full((len(pools), len(queries)), np.nan)
    for row, shuffle in zip(ranks, pools, strict=True):
        for pool in shuffle:
            row[pool] = partner_ranks(queries[pool], candidates[pool])
    return ranks


def retrieval(
    image: Array,
    spectrum: Array,
    *,
    pool_size: int = POOL_SIZE,
    shuffles: int = SHUFFLES,
    n_bootstrap: int = 500,
    seed: int = 0,
) -> dict[str, dict[str, Any]]:
    """recall@1/5/10, median rank both ways: {"image->spectrum": {"recall@1": {"value", "lo", "hi"}, ..}}."""
    out: dict[str, dict[str, Any]] = {}
    pools = draw_pools(len(image), pool_size, shuffles, seed)
    for name, (queries, candidates) in {
        "image->spectrum": (image, spectrum),
        "spectrum->image": (spectrum, image),
    }.items():
        ranks = pool_ranks(queries, candidates, pool_size, shuffles, seed)
        ranks = ranks[:, np.isfinite(ranks).any(axis=0)]
        entry: dict[str, Any] = {
            "pool_size": pools.shape[2],
            "pools": pools.shape[0] * pools.shape[1],
            "pools_sha256": pools_sha256(pools),
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
