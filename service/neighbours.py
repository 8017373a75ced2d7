"""Estimates from neighbours as answers: which calibration speaks for a query, and what is to be said against it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from astroclip.errors import InputError
from astroclip.types import Flag
from index import Estimate, Histogram, Hits, SurveyIndex, best_target, estimate, knn_histogram
from index.head_build import BOTH
from index.knn_conformal import LADDER, rung_of
from index.knn_files import Pair
from service.query import Resolved, Target
from service.schemas import CombineQuery, DensityModel, EstimateModel, EstimateRequest

__all__ = ["by_neighbours", "density_model", "query_pair"]

FEW_NEIGHBOURS = 3.0  # n_eff below which one neighbour can decide an estimate


def query_pair(index: SurveyIndex, request: EstimateRequest, resolved: Resolved) -> tuple[Pair | None, Target]:
    """What the query is and where its neighbours are sought, and the latter alone. No pair for a combination, nor for
    image and spectrum that weigh differently: it is no object such as the index was calibrated with."""
    if resolved.examples is not None:
        raise InputError(
            "The query combines its examples by best_score, which ranks objects and gives no distances to weigh them "
            "by. Estimate with the strategy average, or search.",
            code="no_estimate",
            field="query.combine.strategy",
        )
    one = resolved.modality or (BOTH if len(resolved.vectors) > 1 else None)
    best = best_target(index, BOTH) if one == BOTH else resolved.modality
    target: Target = request.target or best or "either"  # type: ignore[assignment]
    uneven = one == BOTH and request.fuse is not None and request.fuse.image != request.fuse.spectrum
    if one is None or uneven or isinstance(request.query, CombineQuery):
        return None, target
    return (one, target), target


def by_neighbours(
    index: SurveyIndex, request: EstimateRequest, hits: Hits, pair: Pair | None, k: int | None
) -> tuple[list[EstimateModel], list[Flag]]:
    """Estimates of one query from its hits, and remarks on them. k: as the caller gave it."""
    found = estimate(index, hits, request.properties, request.coverage, pair=pair, k=k)
    flags = _doubts(request, found, k, set(index.knn.get(pair, {}) if pair else ()))
    if request.filter is not None or request.score_threshold is not None:
        found = [replace(e, calibrated=False) for e in found]
    models = [EstimateModel(**vars(e)) for e in found]
    if request.density:
        names = [e.name for e in found]
        histograms = knn_histogram(index, hits, names, request.density, pair)
        for model, histogram in zip(models, histograms, strict=True):
            model.density = None if histogram is None else density_model(histogram)
        read = max((index.knn[pair][name].smoothing.k for name in names), default=0) if pair else 0
        if len(hits) < read:
            flags.append(
                Flag("density_of_few", f"The densities were calibrated on {read} neighbours; there are {len(hits)}.")
            )
    return models, flags


def _doubts(request: EstimateRequest, found: Sequence[Estimate], k: int | None, known: set[str]) -> list[Flag]:
    """Why the intervals may not hold what they say. known: properties that the index has a calibration of."""
    flags = []
    bare = [e for e in found if e.name not in known]
    short = [e for e in found if e.name in known and not e.calibrated]
    if bare:
        names = ", ".join(e.name for e in bare)
        flags.append(
            Flag(
                "uncalibrated_interval",
                f"The index has no calibration of {names} for such a query: the interval is the spread of the "
                "neighbours, and may hold the truth less often than it says.",
            )
        )
    if short:
        names = ", ".join(e.name for e in short)
        flags.append(
            Flag(
                "fewer_than_calibrated",
                f"The intervals of {names} were calibrated with more neighbours than were found; they may hold the "
                "truth less often than they say.",
            )
        )
    if 0 < max((e.n_eff or 0.0 for e in (*bare, *short)), default=0.0) < FEW_NEIGHBOURS:
        flags.append(
            Flag(
                "few_neighbours", "A neighbour or two carry the estimate; its intervals are too narrow to be believed."
            )
        )
    if len(bare) + len(short) < len(found):
        if request.filter is not None or request.score_threshold is not None:
            flags.append(
                Flag(
                    "calibrated_without_filter",
                    "The intervals were calibrated on searches without filter and threshold; behind one, neighbours "
                    "are others.",
                )
            )
        if k is not None and k not in LADDER:
            flags.append(
                Flag("calibrated_for_other_k", f"The intervals were calibrated for k = {LADDER[rung_of(k)]}, not {k}.")
            )
    return flags


def density_model(found: Histogram) -> DensityModel:
    """A histogram of the index as it is answered."""
    return DensityModel(edges=found.edges.tolist(), pdf=found.pdf.tolist())
