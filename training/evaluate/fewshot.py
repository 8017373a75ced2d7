"""Galaxy properties by a small network on frozen embeddings, fitted on few labels and on all.

The network is `index.heads` in its published form (upstream's few-shot MLP). Every modality is standardised by its own
training vectors, so a head fitted on one can be asked with the other: the crossings carry the modality gap's shape, not
its offset. With fewer labels than there are, several draws of the labels are fitted; the value is the mean R2 over the
draws, the interval that of the test objects.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from index.heads import fit_head
from training.evaluate.metrics import r2, with_interval
from training.evaluate.neighbours import standardise
from training.evaluate.zeroshot import DIRECTIONS, Parts

__all__ = ["LABELS", "few_shot"]

Array = npt.NDArray[Any]
# Number of labels (0 = all of the table) -> draws.
LABELS = {"all": (0, 1), "1000": (1000, 3), "100": (100, 5)}


def few_shot(
    embeddings: Mapping[str, Parts],
    targets: Parts,
    names: Sequence[str],
    *,
    labels: Mapping[str, tuple[int, int]] = LABELS,
    directions: Sequence[tuple[str, str]] = DIRECTIONS,
    n_bootstrap: int = 500,
    seed: int = 0,
) -> dict[str, dict[str, dict[str, dict[str, float]]]]:
    """R2: {"all": {"query->table": {property: {"value", "lo", "hi", "labels", "draws"}}}}.

    query->table: the head is fitted on the table's training vectors and asked with the query's test vectors. A number
    of labels that the table does not have is left out.
    """
    placed = {name: standardise(parts.train, parts.test) for name, parts in embeddings.items()}
    wanted = [(q, t) for q, t in directions if q in embeddings and t in embeddings]
    out: dict[str, dict[str, dict[str, dict[str, float]]]] = {}
    for label, (count, draws) in labels.items():
        n = count or len(targets.train)
        if n > len(targets.train):
            continue
        predicted: dict[tuple[str, str], list[Array]] = {way: [] for way in wanted}
        for draw in range(draws):
            rows = np.random.default_rng([seed, n, draw]).permutation(len(targets.train))[:n]
            for table in {t for _, t in wanted}:
                vectors = placed[table][0][rows].astype(np.float32)
                head = fit_head(vectors, targets.train[rows], names, seed=seed + draw, kind="point")
                for query, other in wanted:
                    if other == table:
                        predicted[query, table].append(head.predict(placed[query][1].astype(np.float32)))
        out[label] = {
            f"{query}->{table}": _numbers(targets.test, found, names, n, n_bootstrap, seed)
            for (query, table), found in predicted.items()
        }
    return out


def _numbers(
    truth: Array, predicted: list[Array], names: Sequence[str], labels: int, n_bootstrap: int, seed: int
) -> dict[str, dict[str, float]]:
    def mean_r2(true: Array, *found: Array) -> float:
        return float(np.mean([r2(true, values) for values in found]))

    out = {}
    for i, name in enumerate(names):
        columns = [found[:, i] for found in predicted]
        numbers = with_interval(mean_r2, truth[:, i], *columns, n=n_bootstrap, seed=seed)
        out[name] = {**numbers, "labels": float(labels), "draws": float(len(columns))}
    return out
