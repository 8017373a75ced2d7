"""Properties of objects estimated from their neighbours, with the index's own calibration where it has one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from astroclip.errors import InputError
from index.density import Axes
from index.head_estimate import SHOWN, Histogram
from index.knn_conformal import Rungs, intervals, neighbourhood, rung_of
from index.knn_files import Pair, PropertyCalibration
from index.regress import DEFAULT_K, Estimate, check_coverage, distances, knn_regress, unit_of

if TYPE_CHECKING:
    from index.store import Hits, SurveyIndex

__all__ = [
    "Estimates",
    "best_target",
    "estimate",
    "estimate_many",
    "knn_histogram",
    "neighbours_wanted",
    "stacked",
]

Array = npt.NDArray[np.float64]
Rows = npt.NDArray[np.int64]
Scores = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Estimates:
    """One property of Q queries: (Q,) float64, NaN (n_eff 0) where no neighbour has it; k, calibrated as `Estimate`."""

    name: str
    unit: str
    value: Array
    lo: Array
    hi: Array
    n_eff: Array
    k: int
    calibrated: bool


def estimate(
    index: SurveyIndex,
    hits: Hits,
    properties: Sequence[str] | None = None,
    coverage: float = 0.68,
    *,
    pair: Pair | None = None,
    k: int | None = None,
) -> list[Estimate]:
    """Properties of one query from its hits (`SurveyIndex.search`); arguments as for `estimate_many`."""
    found = estimate_many(index, *stacked([hits]), properties, coverage, pair=pair, k=k)
    return [
        Estimate(
            e.name,
            e.unit,
            _plain(e.value[0]),
            _plain(e.lo[0]),
            _plain(e.hi[0]),
            coverage,
            float(e.n_eff[0]),
            e.k,
            e.calibrated,
        )
        for e in found
    ]


def estimate_many(
    index: SurveyIndex,
    rows: Rows,
    scores: Scores,
    properties: Sequence[str] | None = None,
    coverage: float = 0.68,
    *,
    pair: Pair | None = None,
    k: int | None = None,
) -> list[Estimates]:
    """Properties of Q queries from their neighbours: rows (Q, K), -1 where there are no more, scores (Q, K) cosines.

    properties: names; default the index's standard ones. pair: what the queries are ("image", "spectrum" or "both") and
    where their neighbours were sought ("image", "spectrum" or "either"): where the index has a calibration for it, the
    intervals hold the truth with probability `coverage`; else they are the spread of the neighbours
    (`index.regress.knn_regress`), and `calibrated` says so. k: neighbours to use; None = the index's choice for each
    property, `DEFAULT_K` where it has none (see `neighbours_wanted`); fewer, and `calibrated` False, where there are
    fewer. With a k that is not in `knn_conformal.LADDER` the interval is calibrated for the next smaller one that is.
    Raises InputError (coverage, k), NotFoundError for a name the index does not estimate.
    """
    check_coverage(coverage)
    if k is not None and k < 1:
        raise InputError(f"k is {k}; wanted at least 1; ask for more neighbours", code="bad_k", field="k")
    names = list(index.default_properties if properties is None else properties)
    units = {name: unit_of(index, name) for name in names}
    known = index.knn.get(pair, {}) if pair else {}
    width = rows.shape[1]
    if not width:  # nobody: one neighbour that is none
        rows, scores = np.full((len(rows), 1), -1, np.int64), np.full((len(rows), 1), -np.inf, np.float32)
    d, rows = distances(np.where(rows >= 0, scores, -np.inf)), np.maximum(rows, 0)
    out: dict[str, Estimates] = {}
    chosen = [name for name in units if name in known]
    if chosen:
        axes, rungs = _prepared(tuple(known[name] for name in chosen), k)
        reach = int(rungs.k.max())
        values = np.stack([index.catalog.values(name)[rows[:, :reach]] for name in chosen], axis=1)
        found = neighbourhood(axes.to_unit(values), d[:, :reach], rungs.k, rungs.median)
        ends = axes.from_unit(np.stack([found.value, *intervals(found, rungs, coverage)], axis=2))
        for i, name in enumerate(chosen):
            value, lo, hi = ends[:, i].T
            used, enough = min(int(rungs.k[i]), width), bool(rungs.k[i] <= width)
            out[name] = Estimates(name, units[name], value, lo, hi, found.n_eff[:, i], used, enough)
    for name in units:
        if name not in out:
            used = min(k or DEFAULT_K, width)
            raw = knn_regress(index.catalog.values(name)[rows[:, : max(used, 1)]], d[:, : max(used, 1)], coverage)
            out[name] = Estimates(name, units[name], raw.value, raw.lo, raw.hi, raw.n_eff, used, False)
    return [out[name] for name in names]


@lru_cache(maxsize=64)  # stacking the numbers takes a third of the time of one query
def _prepared(entries: tuple[PropertyCalibration, ...], k: int | None) -> tuple[Axes, Rungs]:
    """Of P properties together, each with its own k where None is given."""
    ks = [entry.k if k is None else k for entry in entries]
    chosen = [entry.rungs[rung_of(used)] for entry, used in zip(entries, ks, strict=True)]
    return Axes([entry.axis for entry in entries]), Rungs(ks, chosen)


def knn_histogram(
    index: SurveyIndex, hits: Hits, properties: Sequence[str], bins: int, pair: Pair | None
) -> list[Histogram | None]:
    """Densities of the properties of one query from its hits, in `bins` bins of equal width on their axes.

    None where no neighbour that is read has the property. Raises InputError (code "no_density") for a property that the
    index has no calibration of, NotFoundError for one it does not estimate.
    """
    rows, scores = stacked([hits])
    d = distances(scores)
    out: list[Histogram | None] = []
    for name in properties:
        unit_of(index, name)
        entry = index.knn.get(pair, {}).get(name) if pair else None
        if entry is None:
            asked = f"a query by {pair[0]} among {pair[1]}" if pair else "such a query"
            raise InputError(
                f"the index {index.index_id!r} has no calibration of {name} for {asked}; wanted one for a density from "
                "neighbours; ask with method head, build the index again, or leave density out",
                code="no_density",
                field="density",
            )
        x, smoothing = entry.axis.to_unit(index.catalog.values(name)[rows]), entry.smoothing
        if not np.isfinite(x[:, : smoothing.k]).any():
            out.append(None)
            continue
        lo, hi = smoothing.quantiles(x, d, np.array(SHOWN))[0]
        u = np.linspace(lo, hi, bins + 1)
        edges = entry.axis.from_unit(u)
        out.append(Histogram(name, edges, np.diff(smoothing.cdf(x, d, u[None])[0]) / np.diff(edges)))
    return out


def neighbours_wanted(
    index: SurveyIndex, properties: Sequence[str] | None, pair: Pair | None, density: bool = False
) -> int:
    """How many neighbours the index's own choices of k read for these properties, its densities included if asked."""
    known = index.knn.get(pair, {}) if pair else {}
    names = index.default_properties if properties is None else properties
    entries = [known[name] for name in names if name in known]
    ks = [entry.k for entry in entries] + [entry.smoothing.k for entry in entries if density]
    return max(ks + [DEFAULT_K] * (len(entries) < len(names)), default=DEFAULT_K)


def best_target(index: SurveyIndex, query: str) -> str | None:
    """Where neighbours tell most about a query of this kind: the target whose densities had the least score (mean of
    its logarithm over the default properties) when the index was built. None where the index has not measured it."""
    pairs = index.manifest.calibration.get("knn", {}).get("pairs", [])
    reports = {pair["target"]: pair["properties"] for pair in pairs if pair["query"] == query}
    names = [name for name in index.default_properties if all(name in report for report in reports.values())]
    if not reports or not names:
        return None
    return min(reports, key=lambda t: float(np.mean([np.log(max(reports[t][n]["crps"], 1e-12)) for n in names])))


def stacked(hits: Sequence[Hits]) -> tuple[Rows, Scores]:
    """Rows and scores of many hits as (Q, K), K those of the longest; -1 and -inf where there are no more."""
    counts = np.array([len(found) for found in hits])
    rows = np.full((len(hits), int(counts.max(initial=0))), -1, np.int64)
    scores = np.full(rows.shape, -np.inf, np.float32)
    if len(hits):
        present = np.arange(rows.shape[1]) < counts[:, None]
        rows[present] = np.concatenate([found.rows for found in hits])
        scores[present] = np.concatenate([found.scores for found in hits])
    return rows, scores


def _plain(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None
