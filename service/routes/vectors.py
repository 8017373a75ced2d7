"""POST /v1/search/vectors: neighbours of many vectors in one call."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from service.engine import Engine
from service.routes.common import ERRORS, TABLE, engine_of, settings_of, table_meta
from service.schemas import VectorsAnswer, VectorsRequest
from service.tables import arrow_response, chosen_format
from service.trace import trace_of
from service.uploads import read_parameters
from service.vectors import VectorHits, read_vectors, search_vectors

__all__ = ["router"]

router = APIRouter(prefix="/v1/search", tags=["search"], responses={**ERRORS, **TABLE})

_A_SEARCH = 32  # vectors of one call that take as long as a request with its answer: 1.5 ms on an index of 10,000
_PARAMETERS = [
    {"name": name, "in": "query", "required": name == "modality", "description": text, "schema": schema}
    for name, text, schema in (
        ("modality", "What the vectors are embeddings of.", {"enum": ["image", "spectrum"]}),
        ("target", "Which embeddings to search.", {"enum": ["image", "spectrum", "either"], "default": "either"}),
        ("k", "Hits of each vector.", {"type": "integer", "minimum": 1}),
        ("filter", "As for /v1/search, as JSON.", {"type": "string"}),
        ("score_threshold", "As for /v1/search.", {"type": "number", "minimum": -1, "maximum": 1}),
        ("order", "As for /v1/search.", {"enum": ["most_similar", "least_similar"], "default": "most_similar"}),
    )
]
_EXTRA: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {"application/x-npy": {"schema": {"type": "string", "format": "binary"}}},
    },
    "parameters": _PARAMETERS,
}


@router.post("/vectors", response_model=VectorsAnswer, openapi_extra=_EXTRA, summary="Neighbours of many vectors")
async def vectors(request: Request) -> Response:
    """The body is a .npy array (Q, D) of floats: vectors of this service's model, scaled to unit length here.

    The answer has one list a vector, in order; as a table (Arrow, Parquet, CSV, VOTable) one row a hit, with the place
    of its vector in the column `query`. Nothing is left out of the hits: an object finds itself.
    """
    engine, trace, settings = engine_of(request), trace_of(request), settings_of(request)
    asked, upload = await read_parameters(request, VectorsRequest)
    fmt = chosen_format(request)
    found_in = await engine.workers.decode(
        trace, read_vectors, upload, engine.index.dim, settings.max_vectors, size=len(upload.data)
    )
    if len(found_in) > settings.max_interactive_items:
        trace.be_patient()
    weight = -(-len(found_in) // _A_SEARCH)
    hits = await engine.search(trace, search_vectors, engine, asked, found_in, weight=weight)
    written: Response = await engine.write(trace, len(hits.ids), _written, engine, hits, fmt, trace.request_id)
    return written


def _written(engine: Engine, hits: VectorHits, fmt: str, request_id: str) -> Response:
    if fmt == "json":
        return Response(hits.json(request_id, engine.provenance()), media_type="application/json")
    return arrow_response(hits.arrow(), fmt, table_meta(engine, request_id, search_mode=hits.report.mode))
