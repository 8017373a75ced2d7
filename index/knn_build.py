"""Calibration of an index's k-NN estimates, when it is built: its own objects asked for, each left out in turn.

For every pair of what a query may be (image, spectrum, both: the mean of the two unit vectors, as the service fuses
them) and where neighbours may be sought (image, spectrum, either), a sample of the objects looks its neighbours up, its
own row excluded. A quarter of the sample, drawn by the seed, chooses k, mean or median, the scale of the intervals and
the smoothing of the densities; the rest calibrates them: a few numbers are chosen well enough on fewer objects than
fix a coverage to half a per cent. What the manifest reports was measured on one half of that rest, with a calibration
on the other half alone; the stored one uses both.

Queries drawn as the index's objects are what this speaks for. Objects that are in the index twice, or that the model
was trained on, lie nearer to their neighbours than a new one would: then intervals come out too narrow.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from scipy.stats import kstest

from astroclip.types import MODALITIES
from index.backends.exact import ExactBackend
from index.calibrate import ScoreTable, sample_slots
from index.density import Axis
from index.head_build import BOTH
from index.knn_conformal import LADDER, OWN_UP_TO, Rungs, fit_rung, intervals, neighbourhood
from index.knn_density import choose_smoothing
from index.knn_files import PropertyCalibration, write_knn
from index.regress import distances
from index.vectors import VectorTable

__all__ = ["KNN_FILE", "KNN_FROM", "KNN_SAMPLE", "calibrate_knn"]

KNN_FILE = "calibration/knn.safetensors"
KNN_FROM = 500  # labels from which a property is calibrated: 125 choose, 125 stand in each bin of distance
KNN_SAMPLE = 20_000  # objects asked for at most; coverage is then known to 0.5 %
_PAIRS = 10**10  # query-vector pairs of one search at most: 10,000 objects at a million vectors, about a minute
_LEAST = 4096
_CHOOSING = 0.25
_COVERAGES = (0.68, 0.90, 0.95)
_JUDGED = 500  # objects that the score of the densities is measured on
_TAUS = (np.arange(25) + 0.5) / 25
EITHER = "either"

Array = npt.NDArray[np.float64]
Rows = npt.NDArray[np.int64]
Scores = npt.NDArray[np.float32]
Report = dict[str, Any]


def calibrate_knn(
    folder: Path,
    tables: Mapping[str, VectorTable],
    catalog: pa.Table,
    properties: Mapping[str, str],
    percentiles: Mapping[tuple[str, str], ScoreTable],
    *,
    seed: int,
    say: Callable[[str], None] = lambda _: None,
) -> Report:
    """Write `KNN_FILE`; returns the manifest's record, {} where no property has `KNN_FROM` labels in any pair.

    percentiles: the score tables of the index, by which a search of "either" ranks (`SurveyIndex.search`).
    """
    values = {name: _values(catalog, name) for name in properties}
    axes = {name: axis for name in properties if (axis := _axis(name, values[name])) is not None}
    units = {name: axis.to_unit(values[name]) for name, axis in axes.items()}
    rng = np.random.default_rng(seed)
    done: dict[tuple[str, str], dict[str, PropertyCalibration]] = {}
    pairs: list[Report] = []
    for query in (*MODALITIES, BOTH) if axes else ():
        rows, vectors = _asked(query, tables, rng)
        if len(rows) < KNN_FROM:
            continue
        say(f"neighbours by {query}")
        found = {m: _nearest(vectors, rows, table) for m, table in tables.items() if len(table) > LADDER[-1]}
        tails = {m: percentiles.get((query, m)) for m in found}
        every = {**found, EITHER: _merged(found, tails)} if len(found) > 1 else found
        for target, (near, scores) in every.items():
            fitted = {name: _calibrated(name, axes[name], u, rows, near, scores, rng) for name, u in units.items()}
            present = {name: pair for name, pair in fitted.items() if pair is not None}
            if present:
                done[query, target] = {name: calibration for name, (calibration, _) in present.items()}
                reports = {name: report for name, (_, report) in present.items()}
                pairs.append({"query": query, "target": target, "objects": len(rows), "properties": reports})
    if not done:
        return {}
    write_knn(folder / KNN_FILE, done)
    return {"knn": {"file": KNN_FILE, "seed": seed, "pairs": pairs}}


# --- neighbours -------------------------------------------------------------------------------------------------------


def _asked(query: str, tables: Mapping[str, VectorTable], rng: np.random.Generator) -> tuple[Rows, Scores]:
    """Catalogue rows asked for, ascending, and their unit vectors."""
    parts = [tables[m] for m in (MODALITIES if query == BOTH else (query,))]
    rows = parts[0].rows if len(parts) == 1 else np.intersect1d(parts[0].rows, parts[1].rows)
    largest = max(len(table) for table in tables.values())
    rows = rows[sample_slots(len(rows), min(KNN_SAMPLE, max(_LEAST, _PAIRS // max(largest, 1))), rng)]
    total = sum(table.take(np.searchsorted(table.rows, rows)) for table in parts)
    return rows, np.asarray(total / np.linalg.norm(total, axis=1, keepdims=True), np.float32)


def _nearest(queries: Scores, own: Rows, table: VectorTable) -> tuple[Rows, Scores]:
    """(n, LADDER[-1]) rows and cosines of the nearest other objects, best first."""
    count = LADDER[-1]
    slots = ExactBackend(table).search(queries, count + 1)
    rows = table.rows[slots]
    scores = table.scores(queries, np.where(rows == own[:, None], -1, slots))
    order = np.argsort(-scores, axis=1, kind="stable")[:, :count]
    return np.take_along_axis(rows, order, axis=1), np.take_along_axis(scores, order, axis=1)


def _merged(found: Mapping[str, tuple[Rows, Scores]], tails: Mapping[str, ScoreTable | None]) -> tuple[Rows, Scores]:
    """The hits of a search of both tables: each object once, ranked as `SurveyIndex.search` ranks them."""
    rows = np.concatenate([rows for rows, _ in found.values()], axis=1)
    scores = np.concatenate([scores for _, scores in found.values()], axis=1)
    key = -scores.astype(np.float64)
    known = [table for table in tails.values() if table is not None]
    if len(known) == len(found):
        parts = [table.upper_tail(s) for table, (_, s) in zip(known, found.values(), strict=True)]
        key = np.concatenate(parts, axis=1)
    order = np.lexsort((rows, -scores, key), axis=1)
    rows, scores = np.take_along_axis(rows, order, axis=1), np.take_along_axis(scores, order, axis=1)
    again = np.zeros(rows.shape, bool)
    by_row = np.argsort(rows, axis=1, kind="stable")
    same = np.diff(np.take_along_axis(rows, by_row, axis=1), axis=1) == 0
    np.put_along_axis(again, by_row[:, 1:], same, axis=1)
    first = np.argsort(again, axis=1, kind="stable")[:, : LADDER[-1]]
    return np.take_along_axis(rows, first, axis=1), np.take_along_axis(scores, first, axis=1)


# --- one property of one pair -----------------------------------------------------------------------------------------


def _calibrated(
    name: str, axis: Axis, u: Array, rows: Rows, near: Rows, scores: Scores, rng: np.random.Generator
) -> tuple[PropertyCalibration, Report] | None:
    """u: (N,) the property of the whole catalogue on its axis."""
    x, d, y = u[near], distances(scores), u[rows]
    known = np.isfinite(y) & np.isfinite(x).any(axis=1)
    if np.count_nonzero(known) < KNN_FROM:
        return None
    x, d, y = x[known], d[known], y[known]
    choosing, calibrating = np.split(rng.permutation(len(y)), [int(_CHOOSING * len(y))])
    fitted = [fit_rung(x, d, y, k, choosing, calibrating) for k in LADDER]
    own = int(np.argmin([crps for k, (_, crps) in zip(LADDER, fitted, strict=True) if k <= OWN_UP_TO]))
    smoothing = choose_smoothing(x[choosing], d[choosing], y[choosing])
    entry = PropertyCalibration(
        axis,
        LADDER[own],
        tuple(rung for rung, _ in fitted),
        smoothing.calibrated(x[calibrating], d[calibrating], y[calibrating]),
    )
    return entry, _report(entry, x, d, y, choosing, calibrating)


def _report(entry: PropertyCalibration, x: Array, d: Array, y: Array, choosing: Rows, calibrating: Rows) -> Report:
    """What the own choice of k and the density do on one half of `calibrating`, calibrated on the other half alone.

    coverage: share of truths in the interval. pit_ks: Kolmogorov-Smirnov distance of the densities' distribution
    functions at the truth from uniform. crps: of the densities, in the property's unit.
    """
    one, other = np.array_split(calibrating, 2)
    rung, _ = fit_rung(x, d, y, entry.k, choosing, one)
    rungs = Rungs([entry.k], [rung])
    found = neighbourhood(x[other, None], d[other], [entry.k], rungs.median)
    other = other[np.isfinite(found.value[:, 0])]
    found = neighbourhood(x[other, None], d[other], [entry.k], rungs.median)
    coverage = {}
    for wanted in _COVERAGES:
        lo, hi = intervals(found, rungs, wanted)
        coverage[f"{wanted:.2f}"] = round(float(np.mean((lo[:, 0] <= y[other]) & (y[other] <= hi[:, 0]))), 4)
    smoothing = entry.smoothing.calibrated(x[one], d[one], y[one])
    reached = smoothing.cdf(x[other], d[other], y[other, None])[:, 0]
    known = np.isfinite(reached)
    some = other[known][:_JUDGED]
    quantiles = entry.axis.from_unit(smoothing.quantiles(x[some], d[some], _TAUS))
    off = entry.axis.from_unit(y[some])[:, None] - quantiles
    crps = 2.0 * float(np.mean(np.maximum(_TAUS * off, (_TAUS - 1.0) * off)))
    return {
        "labels": len(y),
        "k": entry.k,
        "statistic": "median" if rung.median else "mean",
        "coverage": coverage,
        "pit_ks": round(float(kstest(reached[known], "uniform").statistic), 4),
        "crps": float(f"{crps:.4g}"),
    }


def _values(catalog: pa.Table, name: str) -> Array:
    column = catalog.column(name).combine_chunks().cast(pa.float64(), safe=False)
    values = np.asarray(column.to_numpy(zero_copy_only=False), np.float64)
    return np.where(np.isfinite(values), values, np.nan)


def _axis(name: str, values: Array) -> Axis | None:
    """From the least to the largest value of the index; None where there are too few, or nearly all are the same."""
    known = values[np.isfinite(values)]
    log1p = name == "redshift"
    known = np.log1p(np.maximum(known, -0.5)) if log1p else known
    if len(known) < KNN_FROM or not np.subtract(*np.quantile(known, [0.75, 0.25])) > 0:
        return None
    return Axis(name, float(known.min()), float(known.max()), log1p, ())
