"""Trust: is a query like the objects of the survey, or outside what the index can speak for?

The measure is the similarity of a query to its k-th nearest object of its own modality, k = `calibrate.KTH`. It is
compared with the same figure of the survey's own objects, each left out in turn, as a conformal p-value (Vovk et al.
2005; Bates et al. 2023, arXiv:2104.08279): p = (1 + #{survey objects less similar or as similar}) / (n + 1). Among
objects drawn as the survey's are, p < alpha happens with probability alpha.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from astroclip.types import Flag, Modality

if TYPE_CHECKING:
    from index.store import SurveyIndex

__all__ = ["OOD_ALPHA", "Trust", "assess", "conformal_p", "ood_p"]

OOD_ALPHA = 0.01  # below: flagged; one in a hundred of the survey's own kind is flagged wrongly


@dataclass(frozen=True)
class Trust:
    """ood_p: p-value of the query being like the survey, None where the index cannot say; `flags`: remarks."""

    ood_p: float | None
    flags: tuple[Flag, ...] = ()


def conformal_p(table: npt.NDArray[Any], scores: npt.ArrayLike) -> npt.NDArray[np.float64]:
    """p-values of `scores` against a sorted table of leave-one-out scores; small = unlike."""
    at_most = np.searchsorted(table, np.asarray(scores, table.dtype), side="right")
    return np.asarray((1.0 + at_most) / (len(table) + 1.0), np.float64)


def ood_p(index: SurveyIndex, modality: Modality, kth_score: float) -> float | None:
    """p-value of one query of `modality`, `kth_score` = its cosine with its k-th nearest object of that modality."""
    table = index.kth_table(modality)
    return float(conformal_p(table, kth_score)) if len(table) else None


def assess(index: SurveyIndex, queries: npt.NDArray[np.float32], modality: Modality, **search: Any) -> list[Trust]:
    """Trust in each of `queries` (Q, D) of one modality; `search` goes to `SurveyIndex.search` (e.g. exclude_rows)."""
    k = index.kth
    if not len(index.kth_table(modality)):
        return [Trust(None) for _ in queries]
    hits, _ = index.search(queries, target=modality, k=k, query_modality=modality, **search)
    return [_judge(index, modality, float(h.scores[k - 1])) if len(h.scores) >= k else Trust(None) for h in hits]


def _judge(index: SurveyIndex, modality: Modality, kth_score: float) -> Trust:
    p = ood_p(index, modality, kth_score)
    if p is None or p >= OOD_ALPHA:
        return Trust(p)
    message = (
        f"This {modality} is unlike the objects of {index.manifest.survey}: only {100 * p:.2g} % of them are as far "
        "from their neighbours. Estimates and neighbours may mean little."
    )
    return Trust(p, (Flag("out_of_distribution", message),))
