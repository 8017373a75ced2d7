"""POST /v1/search and /v1/estimate: a query in, neighbours (and what they say of the object) out."""

from __future__ import annotations

from functools import partial
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from astroclip.errors import InputError
from astroclip.types import Flag, Modality
from service.answer import estimate_answer, flag_models, search_answer
from service.engine import Embedded, Engine, Prepared
from service.explanation import check_explain, explain_answer
from service.query import named_uploads
from service.routes.common import ERRORS, TABLE, engine_of, json_answer, settings_of, table_meta
from service.schemas import EstimateAnswer, EstimateRequest, SearchAnswer, SearchRequest
from service.tables import FORMATS, chosen_format, table_response
from service.trace import Trace, trace_of
from service.uploads import OPTION_NAMES, ReadOptions, Upload, read_options, read_request

__all__ = ["router"]

router = APIRouter(prefix="/v1", tags=["search"], responses={**ERRORS, **TABLE})


_RAW_TYPES = ("application/fits", "image/png", "image/jpeg", "application/x-npy", "text/csv")


def _body(kind: type[SearchRequest]) -> dict[str, Any]:
    schema = {"$ref": f"#/components/schemas/{kind.__name__}"}
    binary = {"type": "string", "format": "binary"}
    form = {"type": "object", "properties": {"image": binary, "spectrum": binary, "request": schema}}
    content = {
        "application/json": {"schema": schema},
        "multipart/form-data": {"schema": form, "encoding": {"request": {"contentType": "application/json"}}},
        **dict.fromkeys(_RAW_TYPES, {"schema": binary}),
    }
    return {"requestBody": {"required": False, "content": content}, "parameters": _parameters(kind)}


def _parameters(kind: type[SearchRequest]) -> list[dict[str, Any]]:
    """What may stand in the URL beside the bytes of a file: the request's fields, and what the file does not say."""
    fields = {name: f"As in the body, as JSON: {name}." for name in kind.model_fields}
    fields["modality"] = "What the file is, image or spectrum; else by its content."
    fields |= dict.fromkeys(OPTION_NAMES, "As for /v1/embed.")
    made = [
        {"name": name, "in": "query", "required": False, "description": text, "schema": {"type": "string"}}
        for name, text in fields.items()
    ]
    table = {"type": "string", "enum": list(FORMATS)}
    return [
        *made,
        {"name": "format", "in": "query", "required": False, "description": "Else by Accept.", "schema": table},
    ]


@router.post("/search", response_model=SearchAnswer, openapi_extra=_body(SearchRequest), summary="Similar objects")
async def search(request: Request) -> Response:
    """The most similar objects of the index, in either modality or one.

    JSON; or multipart with `image` and / or `spectrum` file parts and the JSON as the part `request` (both files of
    one object are fused); or the bytes of one file, the request's fields being query parameters.
    """
    engine, trace = engine_of(request), trace_of(request)
    asked, embedded, extra = await _read(request, engine, trace, SearchRequest)
    answer = await engine.search(trace, search_answer, engine, asked, embedded, trace.request_id)
    answer.trust.flags = [*flag_models(extra), *answer.trust.flags]
    if asked.explain:
        answer.explanation = await explain_answer(engine, trace, asked, embedded, answer)
    fmt = chosen_format(request)
    if fmt == "json":
        return json_answer(answer)
    table: Response = await engine.write(trace, len(answer.hits), _hits_table, answer, fmt, engine)
    return table


@router.post(
    "/estimate", response_model=EstimateAnswer, openapi_extra=_body(EstimateRequest), summary="Physical properties"
)
async def estimate(request: Request) -> Response:
    """Properties of an object with intervals, from its neighbours (method knn) or by the index's heads (method head).

    The body is as for search, plus `properties`, `coverage`, `method` and `density`. As a table (CSV, VOTable ...) the
    answer is its estimates.
    """
    engine, trace = engine_of(request), trace_of(request)
    asked, embedded, extra = await _read(request, engine, trace, EstimateRequest)
    answer = await engine.search(trace, estimate_answer, engine, asked, embedded, trace.request_id)
    answer.trust.flags = [*flag_models(extra), *answer.trust.flags]
    if asked.explain:
        answer.explanation = await explain_answer(engine, trace, asked, embedded, answer)
    fmt = chosen_format(request)
    if fmt == "json":
        return json_answer(answer)
    rows = [item.model_dump() for item in answer.estimates]
    columns = ["name", "unit", "value", "lo", "hi", "coverage", "n_eff", "k", "calibrated"]
    meta = {**_meta(answer, engine), "method": answer.method}
    table: Response = await engine.write(trace, len(rows), table_response, rows, columns, fmt, meta, {})
    return table


async def _read(
    request: Request, engine: Engine, trace: Trace, kind: type[Any]
) -> tuple[Any, dict[Modality, Embedded], list[Flag]]:
    """The request, its uploads as vectors, and remarks on them."""
    asked, uploads = await read_request(request, kind, settings_of(request), partial(engine.workers.decode, trace))
    fmt = chosen_format(request)  # a wrong one is refused before the work is done
    options = read_options(request)
    embedded: dict[Modality, Embedded] = {}
    flags: list[Flag] = []
    wanted = named_uploads(asked.query, tuple(uploads), engine.settings)
    check_explain(engine, asked, dict.fromkeys(wanted), fmt)
    for modality in wanted:
        embedded[modality], notes = await _one(engine, uploads[modality], modality, options, trace)
        flags += notes
    for modality in set(uploads) - set(wanted):
        flags.append(Flag("upload_not_used", f"The query does not name the uploaded {modality}; it was not used."))
    return asked, embedded, flags


async def _one(
    engine: Engine, upload: Upload, modality: Modality, options: ReadOptions, trace: Trace
) -> tuple[Embedded, list[Flag]]:
    """The one object an upload asks with: the first usable of its file. Raises the file's error when none is."""
    prepared = await engine.prepare([upload], modality, options, trace)
    usable = [p for p in prepared if p.grid is not None]
    if not usable:
        error = next(p.error for p in prepared if p.error is not None)
        raise _about(error, modality) if len(prepared) == 1 else _none_usable(prepared, error)
    embedded = (await engine.embed(usable[:1], trace))[0]
    if len(prepared) == 1:
        return embedded, []
    item = usable[0].item
    name = item.object_id if item and item.object_id else f"index {prepared.index(usable[0])}"
    first = Flag(
        "several_objects", f"Of {len(prepared)} objects in the file {name} asks; choose with ?object=ID or index."
    )
    return embedded, [first]


def _about(error: Exception, modality: Modality) -> Exception:
    """The error, its field naming the file part where the reader did not name anything nearer."""
    if isinstance(error, InputError) and error.field is None:
        error.field = modality
    return error


def _none_usable(prepared: list[Prepared], first: Exception) -> InputError:
    return InputError(
        f"None of the {len(prepared)} objects of the file can be used. The first: {first}",
        code=getattr(first, "code", "unusable_input"),
        field=prepared[0].modality,
    )


def _hits_table(answer: SearchAnswer, fmt: str, engine: Engine) -> Response:
    names = list(answer.hits[0].properties) if answer.hits else list(engine.index.default_properties)
    plain = ["object_id", "score", "percentile", "modality", "ra", "dec"]
    rows = [
        {**{name: getattr(hit, name) for name in plain}, **{n: hit.properties.get(n) for n in names}}
        for hit in answer.hits
    ]
    columns = plain + [name for name in names if name not in plain]
    return table_response(rows, columns, fmt, _meta(answer, engine), engine.index.catalog.properties)


def _meta(answer: SearchAnswer, engine: Engine) -> dict[str, str]:
    """Provenance and trust: a table must carry the reasons not to believe it as well."""
    return table_meta(
        engine,
        answer.request_id,
        search_mode=answer.search.mode,
        expected_recall=str(answer.search.expected_recall),
        ood_p=str(answer.trust.ood_p),
        disagreement_p=str(answer.trust.disagreement_p),
        trust_flags=" ".join(flag.code for flag in answer.trust.flags),
    )
