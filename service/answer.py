"""Answers: a request searched, judged and written down. Everything here runs in the search workers.

request + embedded uploads -> Resolved -> hits (filter, exclusion) -> estimates -> trust -> answer model

What searches is a generator, so that equal searches of several requests are made together: see `service.searching`.
"""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from urllib.parse import quote

import numpy as np
import numpy.typing as npt

from astroclip.errors import InputError, NotFoundError
from astroclip.types import MODALITIES, Flag, Modality, Quality
from index import (
    Hits,
    How,
    SearchReport,
    SurveyIndex,
    Trust,
    assess,
    disagreement_flag,
    disagreement_p,
    head_estimate,
    head_histogram,
    neighbours_wanted,
    own_statistics,
)
from index.previews import colour_jpeg
from service.engine import Embedded, Engine
from service.neighbours import by_neighbours, density_model, query_pair
from service.query import Resolved, Target, resolve
from service.schemas import (
    EstimateAnswer,
    EstimateModel,
    EstimateRequest,
    FlagModel,
    Hit,
    ObjectModel,
    Previews,
    QualityModel,
    QueryEcho,
    SearchAnswer,
    SearchReportModel,
    SearchRequest,
    TrustModel,
)
from service.searching import Search, Searching

__all__ = ["estimate_answer", "filter_mask", "object_models", "quality_model", "search_answer", "trust_models"]

_OWN_COLUMNS = ("object_id", "ra", "dec", "has_image", "has_spectrum", "preview_image", "preview_spectrum", "source")
_PREVIEW_POINTS = 512
_EMPTY_FILTER = Flag("empty_filter", "No object of the index passes the filter.")


def search_answer(
    engine: Engine, request: SearchRequest, uploads: Mapping[Modality, Embedded], request_id: str
) -> Searching[SearchAnswer]:
    """The answer to a search; the default target is "either"."""
    _check_sizes(engine, request)
    target: Target = request.target or "either"
    resolved = resolve(engine, request.query, uploads, target, request.fuse)
    resolved, hits, report = yield from _find(engine, request, resolved, target)
    return SearchAnswer(**_common(engine, request, uploads, resolved, hits, report, request_id))


def estimate_answer(
    engine: Engine, request: EstimateRequest, uploads: Mapping[Modality, Embedded], request_id: str
) -> Searching[EstimateAnswer]:
    """The answer to an estimate. Without a target, neighbours are sought in the query's own modality, where the
    embedding is most precise; those of a fused query where the index's calibration found that they tell most. Without
    k, each property uses as many as the index chose for it, and as many hits are returned as the most of them. Method
    head reads the query's own vectors; the neighbours are returned all the same."""
    _check_density(engine, request)
    _limit_names(engine, request.properties, "properties")
    _check_sizes(engine, request)
    resolved = resolve(engine, request.query, uploads, request.target or "either", request.fuse)
    pair, target = query_pair(engine.index, request, resolved)
    k = request.k
    if k is None and request.method == "knn":
        wanted = neighbours_wanted(engine.index, request.properties, pair, request.density > 0)
        settings = engine.settings
        request = request.model_copy(update={"k": min(max(wanted, settings.default_k), settings.max_k)})
    resolved, hits, report = yield from _find(engine, request, resolved, target)
    with _unknown_is_unusable("properties"):
        if request.method == "head":
            models, flags = _by_head(engine, request, resolved)
        else:
            models, flags = by_neighbours(engine.index, request, hits, pair, k)
    common = _common(engine, request, uploads, resolved, hits, report, request_id)
    common["trust"].flags += flag_models(flags)
    return EstimateAnswer(estimates=models, method=request.method, **common)


def _by_head(engine: Engine, request: EstimateRequest, resolved: Resolved) -> tuple[list[EstimateModel], list[Flag]]:
    index = engine.index
    if not resolved.vectors:
        raise InputError(
            "The query combines several objects, and its vector is none of them; a head wants one object, its image, "
            "its spectrum or both. Ask for each, or with method knn.",
            code="no_heads",
            field="query",
        )
    estimates = head_estimate(index, resolved.vectors, request.properties, request.coverage)
    models = [EstimateModel(**vars(e)) for e in estimates]
    if request.density:
        names = [e.name for e in estimates]
        for model, found in zip(models, head_histogram(index, resolved.vectors, names, request.density), strict=True):
            model.density = density_model(found)
    flags = []
    if resolved.own_rows:
        flags.append(
            Flag(
                "trained_on",
                "The object is in the index, and the head may have been fitted on its catalogued properties: the "
                "intervals may be too narrow. k-NN leaves it out.",
            )
        )
    return models, flags


def _check_density(engine: Engine, request: EstimateRequest) -> None:
    limit = engine.settings.max_density_bins
    if request.density > limit:
        raise InputError(
            f"density is {request.density} bins; wanted at most {limit}. Ask for fewer.",
            code="invalid_value",
            field="density",
            limit=limit,
        )


def _check_sizes(engine: Engine, request: SearchRequest) -> None:
    limit = engine.settings.max_k
    if request.k is not None and request.k > limit:
        raise InputError(
            f"k is {request.k}; wanted 1 to {limit}. Ask for fewer, or search in parts with a filter.",
            code="invalid_value",
            field="k",
            limit=limit,
        )
    _limit_names(engine, request.columns, "columns")


def _find(
    engine: Engine, request: SearchRequest, resolved: Resolved, target: Target
) -> Searching[tuple[Resolved, Hits, SearchReport]]:
    """The query with the remarks of its search, what was found, and how."""
    index = engine.index
    mask = filter_mask(engine, request.filter)
    if mask is not None and not mask.any():
        resolved = replace(resolved, flags=(*resolved.flags, _EMPTY_FILTER))
    how: How = {
        "target": target,
        "k": engine.settings.default_k if request.k is None else request.k,
        "mask": mask,
        "order": request.order,
        "score_threshold": request.score_threshold,
    }
    excluded = _excluded(index, resolved, request.exclude_arcsec)
    if resolved.examples is not None:
        how["exclude_rows"] = excluded
        hits, report = index.search_examples(resolved.examples, **how)
    else:
        hits, report = yield Search(resolved.vector, excluded, {**how, "query_modality": resolved.modality})
    return resolved, hits, report


def filter_mask(engine: Engine, expression: dict[str, Any] | None) -> npt.NDArray[np.bool_] | None:
    """(N,) bool over rows, the same array for the same filter; None without one. Raises InputError."""
    if expression is None:
        return None
    with _unknown_is_unusable("filter"):
        return engine.mask(json.dumps(expression, sort_keys=True))


def _excluded(index: SurveyIndex, resolved: Resolved, exclude_arcsec: float | None) -> npt.NDArray[np.int64]:
    """Rows never to return: the query's own objects, and all within the exclusion radius of its places."""
    rows = [np.asarray(resolved.own_rows, np.int64)]
    if exclude_arcsec:
        if not resolved.places:
            raise InputError(
                f"exclude_arcsec is {exclude_arcsec:g}, but the query has no position (a vector, or a file that says "
                "none). Leave it out, or ask by object or position.",
                code="no_position",
                field="exclude_arcsec",
            )
        rows += [index.catalog.cone(ra, dec, exclude_arcsec / 3600.0) for ra, dec in resolved.places]
    return np.unique(np.concatenate(rows))


def _common(
    engine: Engine,
    request: SearchRequest,
    uploads: Mapping[Modality, Embedded],
    resolved: Resolved,
    hits: Hits,
    report: SearchReport,
    request_id: str,
) -> dict[str, Any]:
    flags = list(resolved.flags)
    wanted = engine.settings.default_k if request.k is None else request.k
    if len(hits) < wanted:
        flags.append(Flag("fewer_hits", f"Only {len(hits)} of the {wanted} hits asked for pass filter and exclusions."))
    return {
        "request_id": request_id,
        **engine.provenance(),
        "hits": _hit_models(engine, hits, request.columns),
        "search": SearchReportModel(
            mode=report.mode, candidates=report.candidates, expected_recall=_finite(report.expected_recall)
        ),
        "trust": _trust(engine, uploads, resolved, flags),
        "query": _echo(request, uploads, resolved, engine),
    }


def _hit_models(engine: Engine, hits: Hits, columns: Sequence[str] | None) -> list[Hit]:
    names = list(dict.fromkeys(columns if columns is not None else engine.index.default_properties))
    catalog = engine.index.catalog
    links = _link_columns(engine.index)
    with _unknown_is_unusable("columns"):  # one look into the catalogue: each takes a tenth of a millisecond
        found = catalog.take(hits.rows, [*names, "ra", "dec", *links])
    rows = list(zip(*(column.to_pylist() for column in found.columns), strict=True))
    n = len(names)
    return [
        Hit(
            object_id=hits.object_ids[i],
            score=float(hits.scores[i]),
            percentile=None if hits.percentiles is None else _finite(hits.percentiles[i]),
            modality=hits.modalities[i],
            ra=row[n],
            dec=row[n + 1],
            properties=dict(zip(names, row[:n], strict=True)),
            previews=_links(hits.object_ids[i], dict(zip(links, row[n + 2 :], strict=True))),
        )
        for i, row in enumerate(rows)
    ]


def _link_columns(index: SurveyIndex) -> list[str]:
    """The catalogue's columns that say of which objects there are previews."""
    names = ("preview_image", "preview_spectrum")
    return [] if index.previews is None else [name for name in names if name in index.catalog.columns]


def _links(object_id: str, there: Mapping[str, Any]) -> Previews:
    base = f"/v1/objects/{quote(object_id, safe='')}"
    return Previews(
        image=f"{base}/image.jpg" if there.get("preview_image") else None,
        spectrum=f"{base}/spectrum.json" if there.get("preview_spectrum") else None,
    )


# --- trust and quality -----------------------------------------------------------------------------------------------


def _trust(
    engine: Engine, uploads: Mapping[Modality, Embedded], resolved: Resolved, flags: Sequence[Flag]
) -> TrustModel:
    """Every modality that entered is judged, the survey's own object without itself. Two are twice the chance of a
    false alarm, so each is held to half the level and `ood_p` is twice the smaller (Bonferroni)."""
    index, settings = engine.index, engine.settings
    count = max(1, len(resolved.vectors))
    judged = {
        modality: assess(
            index,
            vector[None],
            modality,
            statistics=[_statistics(index, uploads, resolved, modality)],
            exclude_rows=resolved.own_rows,
            level=settings.ood_level / count,
        )[0]
        for modality, vector in resolved.vectors.items()
    }
    _count_judged(engine, judged.items())
    known = [trust.ood_p for trust in judged.values() if trust.ood_p is not None]
    p = _disagreement(index, uploads, resolved)
    every = (*flags, *(flag for trust in judged.values() for flag in trust.flags))
    return TrustModel(
        ood_p=min(1.0, count * min(known)) if known else None,
        measures={modality: dict(trust.measures) for modality, trust in judged.items()},
        disagreement_p=p,
        flags=flag_models((*every, *disagreement_flag(index, p, settings.disagreement_level))),
    )


def _count_judged(engine: Engine, judged: Iterable[tuple[Modality, Trust]]) -> None:
    """The OOD rate of the metrics; where nothing could be judged, nothing is counted."""
    for modality, trust in judged:
        if trust.ood_p is not None:
            engine.workers.metrics.judged(modality, any(flag.code == "out_of_distribution" for flag in trust.flags))


def _uploaded(uploads: Mapping[Modality, Embedded], resolved: Resolved, modality: Modality) -> Quality | None:
    """The quality of the upload whose vector stands in the query as it is."""
    upload, vector = uploads.get(modality), resolved.vectors.get(modality)
    if upload is None or vector is None or upload.vector is not vector or upload.prepared.grid is None:
        return None
    return upload.prepared.grid.quality


def _own_row(uploads: Mapping[Modality, Embedded], resolved: Resolved) -> int | None:
    """The row of the one object of the index that a query stands for with the index's own vectors."""
    named = resolved.object_id is not None and len(set(resolved.own_rows)) == 1
    return resolved.own_rows[0] if named and not any(_uploaded(uploads, resolved, m) for m in MODALITIES) else None


def _statistics(
    index: SurveyIndex, uploads: Mapping[Modality, Embedded], resolved: Resolved, modality: Modality
) -> tuple[float, ...]:
    """Of the input a vector was made of: an upload's, an object's of the index; a bare vector has none."""
    quality, row = _uploaded(uploads, resolved, modality), _own_row(uploads, resolved)
    if quality is not None:
        return quality.statistics
    return () if row is None else own_statistics(index, row, modality)


def _disagreement(index: SurveyIndex, uploads: Mapping[Modality, Embedded], resolved: Resolved) -> float | None:
    """Of the image and the spectrum asked with, or of both that the index has of the object asked for."""
    row = _own_row(uploads, resolved)
    vectors = [resolved.vectors.get(m) if row is None else index.vector(row, m) for m in MODALITIES]
    image, spectrum = vectors
    return None if image is None or spectrum is None else disagreement_p(index, image, spectrum)


def trust_models(engine: Engine, embedded: Sequence[Embedded]) -> list[TrustModel | None]:
    """Trust in each embedded item (one modality), None for those without a vector."""
    good = [(e, e.prepared.grid) for e in embedded if e.vector is not None and e.prepared.grid is not None]
    if not good:
        return [None] * len(embedded)
    vectors = np.stack([e.vector for e, _ in good])  # type: ignore[misc]
    statistics = [grid.quality.statistics for _, grid in good]
    modality, level = good[0][0].prepared.modality, engine.settings.ood_level
    trusts = assess(engine.index, vectors, modality, statistics=statistics, level=level)
    _count_judged(engine, ((modality, trust) for trust in trusts))
    judged = iter(trusts)
    out: list[TrustModel | None] = []
    for e in embedded:
        if e.vector is None or e.prepared.grid is None:
            out.append(None)
            continue
        trust = next(judged)
        flags = (*e.prepared.grid.quality.flags, *trust.flags)
        out.append(TrustModel(ood_p=trust.ood_p, measures={modality: dict(trust.measures)}, flags=flag_models(flags)))
    return out


def quality_model(quality: Quality) -> QualityModel:
    return QualityModel(
        masked_fraction=_finite(quality.masked_fraction) or 0.0,
        snr=_finite(quality.snr),
        coverage=_finite(quality.coverage),
        flags=flag_models(quality.flags),
    )


def flag_models(flags: Sequence[Flag]) -> list[FlagModel]:
    """Each flag once, in order; two of one code may speak of the image and of the spectrum."""
    unique = dict.fromkeys((flag.code, flag.message) for flag in flags)
    return [FlagModel(code=code, message=message) for code, message in unique]


# --- the query, shown back -------------------------------------------------------------------------------------------


def _echo(
    request: SearchRequest, uploads: Mapping[Modality, Embedded], resolved: Resolved, engine: Engine
) -> QueryEcho:
    used = {m: e.prepared for m, e in uploads.items() if e.prepared.grid is not None}
    one_object = resolved.object_id is not None or len(resolved.places) == 1
    ra, dec = resolved.places[0] if resolved.places and one_object else (None, None)
    echo = QueryEcho(
        modalities=list(resolved.modalities),
        object_id=resolved.object_id,
        ra=ra,
        dec=dec,
        quality={m: quality_model(p.grid.quality) for m, p in used.items() if p.grid is not None},
    )
    if request.preview:
        if "image" in used:
            echo.image = _image_url(used["image"].grid, engine)
        if "spectrum" in used:
            echo.spectrum = _small_spectrum(used["spectrum"].grid, engine)
    return echo


def _image_url(grid: Any, engine: Engine) -> str:
    """What the model saw, as a colour JPEG in a data URL."""
    jpeg = colour_jpeg(grid.pixels, engine.embedder.image_grid.bands, 192, 85)
    return "data:image/jpeg;base64," + base64.b64encode(jpeg).decode()


def _small_spectrum(grid: Any, engine: Engine) -> dict[str, list[float | None]]:
    """The spectrum on the model's grid, ivar-averaged to at most 512 points; null where nothing is known."""
    step = max(1, len(grid.flux) // _PREVIEW_POINTS)
    length = len(grid.flux) // step * step
    flux, ivar = grid.flux[:length].reshape(-1, step), grid.ivar[:length].reshape(-1, step)
    total = ivar.sum(axis=1)
    mean = np.divide((flux * ivar).sum(axis=1), total, out=np.full(len(total), np.nan), where=total > 0)
    wave = engine.embedder.spectrum_grid.wave[:length].reshape(-1, step).mean(axis=1)
    return {"wave": [round(float(w), 2) for w in wave], "flux": [_finite(f) for f in mean]}


# --- objects ---------------------------------------------------------------------------------------------------------


def object_models(
    index: SurveyIndex, rows: npt.NDArray[np.int64], separations_arcsec: npt.NDArray[np.float64] | None = None
) -> list[ObjectModel]:
    """Catalogue rows as answers: properties (those with units) apart from the survey's other columns."""
    links = _link_columns(index)
    properties = index.catalog.properties
    out = []
    for i, record in enumerate(index.catalog.take(rows).to_pylist()):
        rest = {name: value for name, value in record.items() if name not in _OWN_COLUMNS}
        out.append(
            ObjectModel(
                object_id=record["object_id"],
                ra=record["ra"],
                dec=record["dec"],
                separation_arcsec=None if separations_arcsec is None else float(separations_arcsec[i]),
                has_image=bool(record["has_image"]),
                has_spectrum=bool(record["has_spectrum"]),
                properties={name: value for name, value in rest.items() if name in properties},
                columns={name: value for name, value in rest.items() if name not in properties},
                previews=_links(record["object_id"], {name: record[name] for name in links}),
            )
        )
    return out


def _limit_names(engine: Engine, names: Sequence[str] | None, field: str) -> None:
    limit = engine.settings.max_columns
    if names is not None and len(names) > limit:
        raise InputError(
            f"{field} has {len(names)} names; at most {limit} are taken. Ask for fewer.",
            code="invalid_value",
            field=field,
            limit=limit,
        )


@contextmanager
def _unknown_is_unusable(field: str) -> Iterator[None]:
    """A name inside a request that the catalogue lacks is a fault of the request (422), not of the address (404)."""
    try:
        yield
    except NotFoundError as error:
        raise InputError(error.message, code=error.code, field=field) from error


def _finite(value: Any) -> float | None:
    return float(value) if value is not None and math.isfinite(value) else None
