"""Galaxy properties from neighbours: R2 without any training on labels, within one modality and across two.

Three protocols, all over the training objects as the table and the test objects as queries:

* `upstream`: features standardised by the table's mean and deviation, k = 64, distance weights, Euclidean
  (AstroCLIP v2's evaluation; its targets are standardised too, which changes no R2). Across modalities each
  side is standardised by its own training set, which takes out the constant offset between the two clouds
  (the modality gap).
* `upstream_16`: the same with k = 16, which the reproductions quote as the paper's.
* `tuned`: unit vectors (cosine order), distance weights, k chosen per property on the validation objects.

Rows with a property that is not finite count nowhere; how many is reported by the caller.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from training.data import PROPERTIES
from training.evaluate.metrics import r2, with_interval
from training.evaluate.neighbours import nearest, standardise, unit, weighted_mean

__all__ = ["DIRECTIONS", "K_GRID", "UPSTREAM_K", "Parts", "zero_shot"]

Array = npt.NDArray[Any]

UPSTREAM_K = {"upstream": 64, "upstream_16": 16}
K_GRID = (1, 2, 4, 8, 16, 32, 64, 128)
DIRECTIONS = (("image", "image"), ("spectrum", "spectrum"), ("image", "spectrum"), ("spectrum", "image"))


@dataclass(frozen=True)
class Parts:
    """One array per part of the split: embeddings (N, D), or properties (N, P)."""

    train: Array
    val: Array
    test: Array


def zero_shot(
    embeddings: Mapping[str, Parts],
    targets: Parts,
    *,
    names: Sequence[str] = PROPERTIES,
    directions: Sequence[tuple[str, str]] = DIRECTIONS,
    k_grid: Sequence[int] = K_GRID,
    n_bootstrap: int = 500,
    seed: int = 0,
) -> dict[str, dict[str, dict[str, dict[str, float]]]]:
    """R2 of every property: {protocol: {"query->table": {property: {"value", "lo", "hi", "k"}}}}.

    embeddings: modality -> Parts of (N, D); directions whose modalities are not both given are left out.
    targets:    Parts of (N, P), columns in the order of `names`.
    """
    out: dict[str, dict[str, dict[str, dict[str, float]]]] = {"upstream": {}, "upstream_16": {}, "tuned": {}}
    for query, table in directions:
        if query not in embeddings or table not in embeddings:
            continue
        name = f"{query}->{table}"
        options: dict[str, Any] = {"names": names, "n": n_bootstrap, "seed": seed}
        for protocol, table_numbers in _upstream(embeddings[query], embeddings[table], targets, **options).items():
            out[protocol][name] = table_numbers
        out["tuned"][name] = _tuned(embeddings[query], embeddings[table], targets, k_grid=k_grid, **options)
    return out


def _upstream(
    query: Parts, table: Parts, targets: Parts, *, names: Sequence[str], n: int, seed: int
) -> dict[str, dict[str, dict[str, float]]]:
    """One search with the largest k serves both numbers of neighbours."""
    features = standardise(table.train)[0]
    queries = standardise(query.train, query.test)[1]
    found = nearest(queries, features, max(UPSTREAM_K.values()))
    out = {}
    for protocol, k in UPSTREAM_K.items():
        k = min(k, len(features))
        predicted = weighted_mean(found.first(k), targets.train)
        out[protocol] = {
            name: {**with_interval(r2, targets.test[:, i], predicted[:, i], n=n, seed=seed), "k": float(k)}
            for i, name in enumerate(names)
        }
    return out


def _tuned(
    query: Parts,
    table: Parts,
    targets: Parts,
    *,
    names: Sequence[str],
    k_grid: Sequence[int],
    n: int,
    seed: int,
) -> dict[str, dict[str, float]]:
    features = unit(table.train)
    grid = [k for k in k_grid if k <= len(features)]
    on_val = nearest(unit(query.val), features, grid[-1])
    scores = np.array([_r2_all(targets.val, weighted_mean(on_val.first(k), targets.train)) for k in grid])
    best = [grid[row] for row in np.nanargmax(scores, axis=0)]
    on_test = nearest(unit(query.test), features, max(best))
    predicted = {k: weighted_mean(on_test.first(k), targets.train) for k in set(best)}
    return {
        name: {
            **with_interval(r2, targets.test[:, i], predicted[best[i]][:, i], n=n, seed=seed),
            "k": float(best[i]),
        }
        for i, name in enumerate(names)
    }


def _r2_all(truth: Array, predicted: Array) -> list[float]:
    return [r2(truth[:, i], predicted[:, i]) for i in range(truth.shape[1])]
