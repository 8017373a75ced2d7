"""GET /scs: IVOA Simple Cone Search 1.03, so that TOPCAT, Aladin and pyvo read the catalogue.

The standard answers errors with a VOTable as well: an INFO named "Error" and HTTP 200.
"""

from __future__ import annotations

from xml.sax.saxutils import quoteattr

from fastapi import APIRouter, Request
from starlette.responses import Response

from astroclip.errors import AstroClipError, InputError
from index.sky import check_position
from service.answer import object_models
from service.engine import Engine
from service.routes.common import engine_of, settings_of, table_meta
from service.routes.objects import cone, flat
from service.tables import FORMATS, votable
from service.trace import trace_of

__all__ = ["router"]

router = APIRouter(tags=["virtual observatory"])


@router.get("/scs", response_class=Response, summary="Cone search (RA, DEC, SR in degrees) as VOTable")
async def scs(request: Request) -> Response:
    """RA, DEC, SR in decimal degrees (ICRS); SR=0 returns the columns without rows. Parameter names in any case."""
    engine, trace = engine_of(request), trace_of(request)
    given = {name.upper(): value for name, value in request.query_params.items()}
    try:
        ra, dec, radius = (_number(given, name) for name in ("RA", "DEC", "SR"))
        check_position(ra, dec)
        document = await engine.search(
            trace, _document, engine, ra, dec, radius, settings_of(request).max_rows, trace.request_id
        )
    except AstroClipError as error:
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


def _document(engine: Engine, ra: float, dec: float, radius: float, most: int, request_id: str) -> bytes:
    index = engine.index
    rows, away = cone(index, ra, dec, 3600.0 * radius, 180.0 * 3600.0)
    overflow = len(rows) > most
    found = [flat(model) for model in object_models(index, rows[:most], away[:most])]
    if radius == 0.0:
        found = []
    columns = list(found[0]) if found else list(flat(object_models(index, index.catalog.cone(0, 0, 180)[:1], [0.0])[0]))
    meta = table_meta(engine, request_id, **({"overflow": f"only the nearest {most} rows"} if overflow else {}))
    title = f"Cone search of {index.manifest.survey}"
    return votable(found, columns, meta, index.catalog.properties, description=title)


def _error(message: str) -> bytes:
    return (
        '<?xml version="1.0" encoding="UTF-8"?>\n'
        '<VOTABLE version="1.4" xmlns="http://www.ivoa.net/xml/VOTable/v1.3"><RESOURCE type="results">'
        f'<INFO ID="Error" name="Error" value={quoteattr(message)}/></RESOURCE></VOTABLE>\n'
    ).encode("utf-8", "replace")
