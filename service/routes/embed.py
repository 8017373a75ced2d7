"""POST /v1/embed/image, /v1/embed/spectrum: files in, unit vectors out."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from fastapi import APIRouter, Request
from starlette.responses import Response

from astroclip.errors import AstroClipError
from astroclip.types import Modality
from service.answer import quality_model, trust_models
from service.engine import Embedded, Engine
from service.errors import error_body
from service.routes.common import ERRORS, engine_of, json_answer, settings_of, table_meta
from service.schemas import EmbedAnswer, EmbedItem, ErrorModel, TrustModel
from service.trace import trace_of
from service.uploads import read_files, read_options

__all__ = ["router"]

_ARRAY: dict[int | str, dict[str, Any]] = {
    200: {"content": {"application/x-npy": {"schema": {"type": "string", "format": "binary"}}}}
}
router = APIRouter(prefix="/v1/embed", tags=["embed"], responses={**ERRORS, **_ARRAY})

_NPY = "application/x-npy"
_FEW = 16  # vectors written in the event loop, which 512 of them would hold for 20 ms and more


def _body(*types: str) -> dict[str, Any]:
    """OpenAPI's view of a body we read by hand."""
    binary = {"schema": {"type": "string", "format": "binary"}}
    files = {"type": "array", "items": binary["schema"]}
    form = {"type": "object", "properties": {"file": files}, "required": ["file"]}
    content = {**dict.fromkeys(types, binary), "multipart/form-data": {"schema": form}}
    return {"requestBody": {"required": True, "content": content}, "parameters": _parameters(types)}


def _parameters(types: Sequence[str]) -> list[dict[str, Any]]:
    image = (
        ("pixel_scale_arcsec", "number", "Side of a pixel, where the file does not say or is wrong."),
        ("bands", "string", "Names of the planes in file order, e.g. g,r,z."),
    )
    spectrum = (
        ("wave_unit", "string", "Unit of the wavelengths: Angstrom, nm, um, m, log10(Angstrom)."),
        ("medium", "string", "air or vacuum."),
        ("flux_unit", "string", "Unit of the flux, e.g. 1e-17 erg/s/cm2/A."),
        ("object", "string", "Id or index (from 0) of the one object wanted from a file of several."),
    )
    chosen = image if "image/png" in types else spectrum
    return [
        {"name": name, "in": "query", "required": False, "description": text, "schema": {"type": kind}}
        for name, kind, text in chosen
    ]


@router.post(
    "/image",
    response_model=EmbedAnswer,
    openapi_extra=_body("application/fits", "image/png", "image/jpeg", _NPY),
    summary="Embed galaxy images",
)
async def embed_image(request: Request) -> Response:
    """FITS cutouts (nanomaggies), PNG / JPEG pictures or .npy arrays; several objects give several items, in order.

    An item that cannot be used carries its `error`; the call fails only if no item could be embedded.
    `Accept: application/x-npy` gives the (N, D) float32 array, NaN rows for failed items (listed in `x-failed-items`).
    """
    return await _embed(request, "image")


@router.post(
    "/spectrum",
    response_model=EmbedAnswer,
    openapi_extra=_body("application/fits", "text/csv", _NPY),
    summary="Embed optical spectra",
)
async def embed_spectrum(request: Request) -> Response:
    """DESI, SDSS / BOSS or table FITS, CSV or .npy spectra; several targets of a file give several items, in order.

    Failures and `Accept` as for images.
    """
    return await _embed(request, "spectrum")


async def _embed(request: Request, modality: Modality) -> Response:
    engine, trace = engine_of(request), trace_of(request)
    files = await read_files(request, settings_of(request))
    vectors_alone = _NPY in request.headers.get("accept", "")
    prepared = await engine.prepare(files, modality, read_options(request), trace, judged=not vectors_alone)
    embedded = await engine.embed(prepared, trace)
    if all(e.vector is None for e in embedded):
        raise next(e.error for e in embedded if e.error is not None)
    if vectors_alone:
        return _array(engine, embedded, trace.request_id)
    trusts = await engine.search(trace, trust_models, engine, embedded)
    for e in embedded:
        if e.error is not None:
            engine.workers.metrics.item_refused(modality, e.error.code)
    if len(embedded) <= _FEW:
        return _answer(engine, embedded, trusts, trace.request_id)
    return await engine.workers.write(trace, 1, _answer, engine, embedded, trusts, trace.request_id)


def _answer(
    engine: Engine, embedded: Sequence[Embedded], trusts: Sequence[TrustModel | None], request_id: str
) -> Response:
    items = [_item(e, trust, request_id) for e, trust in zip(embedded, trusts, strict=True)]
    return json_answer(EmbedAnswer(request_id=request_id, items=items, **engine.provenance()))


def _item(embedded: Embedded, trust: TrustModel | None, request_id: str) -> EmbedItem:
    prepared = embedded.prepared
    source = prepared.grid or prepared.item
    return EmbedItem(
        name=prepared.name,
        object_id=prepared.item.object_id if prepared.item else None,
        modality=prepared.modality,
        embedding=None if embedded.vector is None else embedded.vector.tolist(),
        quality=quality_model(source.quality) if source else None,
        trust=trust,
        error=_error(embedded.error, request_id) if embedded.error else None,
    )


def _error(error: AstroClipError, request_id: str) -> ErrorModel:
    body = error_body(error.code, error.message, field=error.field, limit=error.limit, request_id=request_id)
    return ErrorModel(**body)


def _array(engine: Engine, embedded: Sequence[Embedded], request_id: str) -> Response:
    rows = np.full((len(embedded), engine.embedder.dim), np.nan, np.float32)
    failed = []
    for i, e in enumerate(embedded):
        if e.vector is None:
            failed.append(str(i))
        else:
            rows[i] = e.vector
    stream = io.BytesIO()
    np.save(stream, rows)
    headers = {f"x-{key.replace('_', '-')}": value for key, value in table_meta(engine, request_id).items()}
    return Response(stream.getvalue(), media_type=_NPY, headers={**headers, "x-failed-items": ",".join(failed)})
