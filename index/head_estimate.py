"""Properties of an object read off its own vectors by the index's heads, instead of from its neighbours."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from astroclip.errors import InputError
from astroclip.types import MODALITIES, Modality
from index.density import cdf, quantiles
from index.head_build import BOTH
from index.heads import PropertyDensity
from index.regress import Estimate, check_coverage, unit_of

if TYPE_CHECKING:
    from index.store import SurveyIndex

__all__ = ["SHOWN", "Histogram", "head_estimate", "head_histogram"]

SHOWN = (0.0005, 0.9995)  # quantiles between which a histogram lies


@dataclass(frozen=True)
class Histogram:
    """A density as a histogram. edges: (G + 1,) values of the property; pdf: (G,) mean density per unit of it between
    neighbouring edges, so that sum(pdf * width) is 0.999 however sharp the density is."""

    name: str
    edges: npt.NDArray[np.float64]
    pdf: npt.NDArray[np.float64]


def head_estimate(
    index: SurveyIndex,
    vectors: Mapping[Modality, npt.NDArray[np.float32]],
    properties: Sequence[str] | None = None,
    coverage: float = 0.68,
) -> list[Estimate]:
    """Properties of one object: the median of its density, and the conformal interval of `coverage`.

    vectors: its unit vectors (D,) by modality; with two, the head for both answers. properties: default
    the index's standard ones that have a head. n_eff is None: no neighbours are behind it. Raises InputError (code
    "no_heads") where the index has no head for these modalities, NotFoundError for a property without one.
    """
    check_coverage(coverage)
    out = []
    for name, entry, vector in _entries(index, vectors, properties):
        levels = entry.calibrated(np.array([(1.0 - coverage) / 2.0, 0.5, (1.0 + coverage) / 2.0]))
        lo, value, hi = quantiles(entry.axis, entry.probabilities(vector[None]), levels)[0]
        out.append(Estimate(name, unit_of(index, name), float(value), float(lo), float(hi), coverage, None))
    return out


def head_histogram(
    index: SurveyIndex,
    vectors: Mapping[Modality, npt.NDArray[np.float32]],
    properties: Sequence[str] | None,
    bins: int,
) -> list[Histogram]:
    """The densities of the same properties as `head_estimate`, in `bins` bins of equal width on their axes."""
    out = []
    for name, entry, vector in _entries(index, vectors, properties):
        p, axis = entry.probabilities(vector[None]), entry.axis
        lo, hi = axis.to_unit(quantiles(axis, p, np.array(SHOWN))[0])
        edges = axis.from_unit(np.linspace(lo, hi, bins + 1))
        reached = cdf(axis, p, edges[None])[0]
        out.append(Histogram(name, edges, np.diff(reached) / np.diff(edges)))
    return out


def _entries(
    index: SurveyIndex, vectors: Mapping[Modality, npt.NDArray[np.float32]], properties: Sequence[str] | None
) -> list[tuple[str, PropertyDensity, npt.NDArray[np.float32]]]:
    """(name, density, vector) of every property to estimate."""
    present = [m for m in MODALITIES if m in vectors]
    head = index.heads.get(BOTH if len(present) > 1 else "".join(present))
    if head is None:
        raise InputError(
            f"the index {index.index_id!r} has no head for a query by {' and '.join(present)}; wanted one; build the "
            "index again with `astroclip index build --heads`, or estimate with method knn",
            code="no_heads",
            field="method",
        )
    if properties is None:
        properties = [name for name in index.default_properties if name in head.names] or list(head.names)
    vector = np.concatenate([vectors[m] for m in present])
    for name in properties:
        unit_of(index, name)
    return [(name, head.entry(name), vector) for name in properties]
