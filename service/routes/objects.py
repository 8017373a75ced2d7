"""GET /v1/objects: the catalogue, by id, by place or at random, and the previews of an object."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
from fastapi import APIRouter, Depends, Query, Request
from starlette.responses import Response

from astroclip.errors import NotFoundError
from index import SurveyIndex
from index.sky import separation_deg
from service.answer import object_models
from service.engine import Engine
from service.errors import MalformedRequest
from service.query import object_row, position_of
from service.routes.common import (
    ERRORS,
    FORMAT,
    TABLE,
    engine_of,
    json_answer,
    known_parameters,
    settings_of,
    table_meta,
)
from service.schemas import ObjectAnswer, ObjectModel, ObjectsAnswer, SpectrumPreview
from service.tables import chosen_format, table_response
from service.trace import trace_of

__all__ = ["cone", "flat", "router"]

router = APIRouter(prefix="/v1/objects", tags=["objects"], responses=ERRORS, dependencies=[Depends(known_parameters)])

# An index never changes under its manifest hash; private, lest a shared cache hands on what was asked with a key.
_PREVIEW_CACHE = {"cache-control": "private, max-age=86400"}
_MAX_RANDOM = 100

# Ids may hold slashes (a survey's own, or "file#row"), so they are paths, and the previews' routes come first.


@router.get("", response_model=ObjectsAnswer, responses=TABLE, summary="Objects of a place, or at random")
async def objects(
    request: Request,
    ra: Annotated[str | None, Query(max_length=64, description="Degrees, or sexagesimal hours: 12:34:56.7")] = None,
    dec: Annotated[str | None, Query(max_length=64, description="Degrees, or sexagesimal: -00:12:34")] = None,
    radius_arcsec: Annotated[float, Query(gt=0, allow_inf_nan=False)] = 5.0,
    limit: Annotated[int | None, Query(ge=1, description="Rows wanted, nearest first.")] = None,
    random: Annotated[int | None, Query(ge=1, le=_MAX_RANDOM, description="So many objects drawn at random.")] = None,
    seed: Annotated[int | None, Query(ge=0, lt=2**63, description="Makes the random draw repeatable.")] = None,
    format: Annotated[str | None, FORMAT] = None,
) -> Response:
    """Catalogue rows within `radius_arcsec` of a position, nearest first; or `random` rows."""
    engine, trace = engine_of(request), trace_of(request)
    fmt = chosen_format(request)
    if random is not None and (ra is not None or dec is not None):
        raise MalformedRequest("Give a position or random=N, not both.", field="random")
    truncated, separations = False, None
    if random is not None:
        rows = await engine.search(trace, _draw, len(engine.index), random, seed)
    elif ra is None or dec is None:
        raise MalformedRequest("Give ra, dec and radius_arcsec, or random=N.", field="ra" if ra is None else "dec")
    else:
        place = position_of(ra, dec)
        settings = settings_of(request)
        rows, separations = await engine.search(
            trace, cone, engine.index, *place, radius_arcsec, settings.max_radius_arcsec
        )
        most = min(limit or settings.max_rows, settings.max_rows)
        truncated, rows, separations = len(rows) > most, rows[:most], separations[:most]
    listed: Response = await engine.write(
        trace, len(rows), _listed, engine, rows, separations, truncated, fmt, trace.request_id
    )
    return listed


def _listed(
    engine: Engine,
    rows: npt.NDArray[np.int64],
    separations: npt.NDArray[np.float64] | None,
    truncated: bool,
    fmt: str,
    request_id: str,
) -> Response:
    models = object_models(engine.index, rows, separations)
    if fmt == "json":
        return json_answer(
            ObjectsAnswer(request_id=request_id, **engine.provenance(), objects=models, truncated=truncated)
        )
    return _table(engine, models, fmt, request_id)


@router.get(
    "/{object_id:path}/image.jpg",
    response_class=Response,
    responses={200: {"content": {"image/jpeg": {"schema": {"type": "string", "format": "binary"}}}}},
    summary="Thumbnail of an object",
)
async def image(request: Request, object_id: str) -> Response:
    """A small colour JPEG (z, r, g as red, green, blue; Legacy Surveys arcsinh stretch)."""
    engine = engine_of(request)
    row = object_row(engine.index, object_id)
    jpeg = engine.index.previews.image_jpeg(row) if engine.index.previews else None
    if jpeg is None:
        raise _no_preview(object_id, "image")
    return Response(jpeg, media_type="image/jpeg", headers=_PREVIEW_CACHE)


@router.get("/{object_id:path}/spectrum.json", response_model=SpectrumPreview, summary="Small spectrum of an object")
async def spectrum(request: Request, object_id: str) -> SpectrumPreview:
    """`wave` (Angstrom, vacuum, observed) and `flux` (1e-17 erg/s/cm2/A), rebinned; null where unknown."""
    engine = engine_of(request)
    row = object_row(engine.index, object_id)
    found = engine.index.previews.spectrum(row) if engine.index.previews else None
    if found is None:
        raise _no_preview(object_id, "spectrum")
    trace_of(request).extra_headers.update(_PREVIEW_CACHE)
    wave, flux = found
    return SpectrumPreview(
        object_id=object_id,
        wave=[round(float(w), 2) for w in wave],
        flux=[float(f"{f:.5g}") if np.isfinite(f) else None for f in flux],
    )


@router.get("/{object_id:path}", response_model=ObjectAnswer, responses=TABLE, summary="One object")
async def one_object(request: Request, object_id: str, format: Annotated[str | None, FORMAT] = None) -> Response:
    """The catalogue row of an object, with links to its previews."""
    engine, trace = engine_of(request), trace_of(request)
    fmt = chosen_format(request)
    row = object_row(engine.index, object_id)
    model = (await engine.search(trace, object_models, engine.index, np.array([row])))[0]
    if fmt == "json":
        return json_answer(ObjectAnswer(request_id=trace.request_id, **engine.provenance(), object=model))
    table: Response = await engine.write(trace, 1, _table, engine, [model], fmt, trace.request_id)
    return table


def cone(
    index: SurveyIndex, ra: float, dec: float, radius_arcsec: float, largest_arcsec: float
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
    """Rows in a cone, nearest first, and their distances (arcsec). Raises InputError beyond the largest radius."""
    from astroclip.errors import InputError

    if radius_arcsec > largest_arcsec:
        raise InputError(
            f"radius_arcsec is {radius_arcsec:g}; at most {largest_arcsec:g} is looked up here. For a larger region "
            "use /v1/search with a cone filter.",
            code="invalid_value",
            field="radius_arcsec",
            limit=largest_arcsec,
        )
    rows = index.catalog.cone(ra, dec, radius_arcsec / 3600.0)
    place = index.catalog.take(rows, ["ra", "dec"])
    away = separation_deg(place.column(0).to_numpy(), place.column(1).to_numpy(), ra, dec)
    return rows, 3600.0 * away


def flat(model: ObjectModel) -> dict[str, Any]:
    """An object as one row of a table."""
    plain = model.model_dump(include={"object_id", "ra", "dec", "separation_arcsec", "has_image", "has_spectrum"})
    return {**plain, **model.properties, **{k: v for k, v in model.columns.items() if not isinstance(v, list | dict)}}


def _table(engine: Engine, models: Sequence[ObjectModel], fmt: str, request_id: str) -> Response:
    rows = [flat(model) for model in models]
    columns = list(rows[0]) if rows else ["object_id", "ra", "dec"]
    units = engine.index.catalog.properties
    return table_response(rows, columns, fmt, table_meta(engine, request_id), units)


def _draw(count: int, wanted: int, seed: int | None) -> npt.NDArray[np.int64]:
    return np.random.default_rng(seed).choice(count, size=min(wanted, count), replace=False)


def _no_preview(object_id: str, kind: str) -> NotFoundError:
    return NotFoundError(
        f"The index keeps no {kind} preview of {object_id[:80]!r}. Its row may say whether it has a {kind} at all.",
        code="no_preview",
        field="object_id",
    )
