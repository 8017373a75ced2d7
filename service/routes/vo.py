"""GET /scs: IVOA Simple Cone Search 1.03, so that TOPCAT, Aladin and pyvo read the catalogue.

The standard answers errors with a VOTable as well: an INFO named "Error" and HTTP 200.
"""

from __future__ import annotations

from typing import Any
from xml.sax.saxutils import quoteattr

import numpy as np
import numpy.typing as npt
from fastapi import APIRouter, Request
from starlette.responses import Response

from astroclip.errors import AstroClipError, InputError, NotReadyError, OverloadError
from index.sky import check_position
from service.answer import object_models
from service.engine import Engine
from service.routes.common import ERRORS, engine_of, settings_of, table_meta
from service.routes.objects import cone, flat
from service.tables import FORMATS, votable
from service.trace import trace_of

__all__ = ["router"]

router = APIRouter(tags=["virtual observatory"])


_EXTRA = {
    "parameters": [
        {"name": name, "in": "query", "required": False, "description": text, "schema": {"type": "string"}}
        for name, text in (("RA", "Degrees, ICRS."), ("DEC", "Degrees, ICRS."), ("SR", "Radius in degrees."))
    ]
}
_ANSWER: dict[int | str, dict[str, Any]] = {
    200: {"content": {FORMATS["votable"]: {"schema": {"type": "string"}}}, "description": "A VOTable; errors too."},
    503: ERRORS[503],
}


@router.get(
    "/scs",
    response_class=Response,
    responses=_ANSWER,
    openapi_extra=_EXTRA,
    summary="Cone search (RA, DEC, SR in degrees) as VOTable",
)
async def scs(request: Request) -> Response:
    """RA, DEC, SR in decimal degrees (ICRS); SR=0 returns the columns without rows. Parameter names in any case."""
    engine, trace = engine_of(request), trace_of(request)
    given = {name.upper(): value for name, value in request.query_params.items()}
    try:
        ra, dec, radius = (_number(given, name) for name in ("RA", "DEC", "SR"))
        check_position(ra, dec)
        settings, arcsec = settings_of(request), 3600.0 * radius
        rows, away = await engine.search(trace, cone, engine.index, ra, dec, arcsec, settings.max_radius_arcsec)
        rows, most = rows[:0] if radius == 0.0 else rows, settings.max_rows
        count = min(len(rows), most)
        document = await engine.write(trace, count, _document, engine, rows, away, most, trace.request_id)
    except (OverloadError, NotReadyError):
        raise  # of the service, not of the question: with the status that says when to come back
    except AstroClipError as error:
        error.without_frames()
        document = _error(error.message)
        trace.error = error.code  # the status does not say it
    return Response(document, media_type=FORMATS["votable"])


def _number(given: dict[str, str], name: str) -> float:
    try:
        return float(given[name])
    except KeyError:
        raise InputError(f"{name} is missing; wanted RA, DEC and SR in decimal degrees.") from None
    except ValueError:
        raise InputError(f"{name}={given[name][:40]!r} is not a number of decimal degrees.") from None


def _document(
    engine: Engine, rows: npt.NDArray[np.int64], away: npt.NDArray[np.float64], most: int, request_id: str
) -> bytes:
    index = engine.index
    overflow = len(rows) > most
    found = [flat(model) for model in object_models(index, rows[:most], away[:most])]
    columns = list(found[0] if found else flat(object_models(index, np.arange(1), np.zeros(1))[0]))
    meta = table_meta(engine, request_id, **({"overflow": f"only the nearest {most} rows"} if overflow else {}))
    title = f"Cone search of {index.manifest.survey}"
    return votable(found, columns, meta, index.catalog.properties, description=title)


def _error(message: str) -> bytes:
    return (
        '<?xml version="1.0" encoding="UTF-8"?>\n'
        '<VOTABLE version="1.4" xmlns="http://www.ivoa.net/xml/VOTable/v1.3"><RESOURCE type="results">'
        f'<INFO ID="Error" name="Error" value={quoteattr(message)}/></RESOURCE></VOTABLE>\n'
    ).encode("utf-8", "replace")
