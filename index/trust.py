"""Trust: is a query like the objects of the survey, and do an object's image and spectrum belong together?

`assess` gives the conformal p-values of `index.typical`: among objects drawn as the survey's are, p <= alpha happens
with probability alpha. An index without those tables (an older one) compares the similarity to the k-th nearest object
alone, with that of its own objects, each left out in turn.

`disagreement_p` compares the cosine of an object's image and spectrum with those of the index's own pairs. It is a
score of anomaly: a small value says that the two are no usual pair, because they show different objects, one of them
is spoilt, or the object is a strange one. Cosines adjusted for the difficulty of either side (z-score or rank among
unrelated objects, Gaussian likelihood ratio) told exchanged partners less well than the cosine as it is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from astroclip.preprocess.statistics import STATISTICS
from astroclip.types import Flag, Modality
from index.typical import Typicality, conformal_p

if TYPE_CHECKING:
    from index.store import SurveyIndex

__all__ = [
    "DISAGREEMENT_LEVEL",
    "OOD_LEVEL",
    "Trust",
    "assess",
    "disagreement_flag",
    "disagreement_p",
    "own_statistics",
]

OOD_LEVEL = 0.05  # flagged at or below it; one in twenty of the survey's own kind is flagged wrongly
# To say that two files do not belong together weighs more than to say that one is unusual; at this level nine in ten
# exchanged partners are still found.
DISAGREEMENT_LEVEL = 0.01

_WHY = {
    ("image", "input"): "Its pixels are not like those of a galaxy on the sky.",
    ("spectrum", "input"): "Its level, noise and shape do not go together as a galaxy's do.",
}


@dataclass(frozen=True)
class Trust:
    """ood_p: p-value of the query being like the survey, None where the index cannot say. measures: the p-values it
    is made of, by the names of `index.typical`. flags: remarks."""

    ood_p: float | None
    flags: tuple[Flag, ...] = ()
    measures: Mapping[str, float] = field(default_factory=dict)


def assess(
    index: SurveyIndex,
    queries: npt.NDArray[np.float32],
    modality: Modality,
    *,
    statistics: Sequence[tuple[float, ...]] | None = None,
    exclude_rows: Sequence[int] | npt.NDArray[np.int64] = (),
    level: float = OOD_LEVEL,
) -> list[Trust]:
    """Trust in each of `queries` (Q, D), unit vectors of one modality.

    statistics: of each one's input, `Quality.statistics`, empty where unknown; without them the embedding alone is
    judged. exclude_rows: not compared with (the query's own objects). level: p-value from which a query is flagged.
    """
    typical = index.trust.typical.get(modality)
    if typical is None:
        return _assess_by_search(index, queries, modality, exclude_rows, level)
    found = typical.p_values(queries, _as_array(typical, modality, statistics), exclude_rows)
    columns = {name: p.tolist() for name, p in found.items()}
    return [
        _judge(index, modality, level, {name: p[q] for name, p in columns.items() if p[q] == p[q]})  # NaN: unknown
        for q in range(len(queries))
    ]


def own_statistics(index: SurveyIndex, row: int, modality: Modality) -> tuple[float, ...]:
    """The input statistics the index keeps of one of its objects, in the order `assess` takes; () where it has none."""
    measured, slot = index.trust.measured[modality], index.tables[modality].slot(row)
    if slot is None or measured.names != STATISTICS[modality]:
        return ()
    return tuple(float(value) for value in measured.values[slot])


def disagreement_p(
    index: SurveyIndex, image: npt.NDArray[np.float32], spectrum: npt.NDArray[np.float32]
) -> float | None:
    """p-value of two unit vectors (D,) being image and spectrum of one object; None where the index has no pairs."""
    pairs = index.trust.pairs
    return float(conformal_p(pairs, image @ spectrum)) if len(pairs) else None


def disagreement_flag(index: SurveyIndex, p: float | None, level: float = DISAGREEMENT_LEVEL) -> tuple[Flag, ...]:
    """The flag of a pair as unusual as `level`, or none."""
    if p is None or p > level:
        return ()
    return (
        Flag(
            "modalities_disagree",
            f"Image and spectrum disagree: only {100 * p:.2g} % of the pairs of {index.manifest.survey} fit together "
            "as badly. They may show different objects, or something unusual.",
        ),
    )


def _as_array(
    typical: Typicality, modality: Modality, statistics: Sequence[tuple[float, ...]] | None
) -> npt.NDArray[np.float32] | None:
    """(Q, P), NaN rows where unknown; None where the index measured other numbers, or none are given."""
    if statistics is None or not any(statistics) or typical.names != STATISTICS[modality]:
        return None
    unknown = (np.nan,) * len(typical.names)
    return np.array([row or unknown for row in statistics], np.float32)


def _assess_by_search(
    index: SurveyIndex,
    queries: npt.NDArray[np.float32],
    modality: Modality,
    exclude_rows: Sequence[int] | npt.NDArray[np.int64],
    level: float,
) -> list[Trust]:
    """By the k-th neighbour of the whole index: what an index without `index.typical` has."""
    k, table = index.kth, index.kth_table(modality)
    if not len(table):
        return [Trust(None) for _ in queries]
    hits, _ = index.search(queries, target=modality, k=k, query_modality=modality, exclude_rows=exclude_rows)
    return [
        _judge(index, modality, level, {"ood": float(conformal_p(table, h.scores[k - 1]))} if len(h) >= k else {})
        for h in hits
    ]


def _judge(index: SurveyIndex, modality: Modality, level: float, found: dict[str, float]) -> Trust:
    p = found.pop("ood", None)
    if p is None or p > level:
        return Trust(p, (), found)
    least = min(found, key=lambda name: found[name], default="distance")
    why = _WHY.get((modality, least), "Its embedding lies apart from theirs.")
    flag = Flag(
        "out_of_distribution",
        f"This {modality} is unlike the objects of {index.manifest.survey}: only {100 * p:.2g} % of them are as "
        f"unusual. {why} Estimates and neighbours may mean little.",
    )
    return Trust(p, (flag,), found)
