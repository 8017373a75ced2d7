"""GET /v1/lists: what `astroclip index lists` computed over the whole index, page by page."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Depends, Query, Request
from starlette.responses import Response

from astroclip.errors import InputError, NotFoundError
from astroclip.types import MODALITIES, Modality
from index.lists import KINDS, ListEntry, ListKind
from service.engine import Engine
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
from service.schemas import ListAnswer, ListInfo, ListsAnswer
from service.tables import chosen_format, table_response
from service.trace import trace_of

__all__ = ["router"]

router = APIRouter(prefix="/v1/lists", tags=["lists"], responses=ERRORS, dependencies=[Depends(known_parameters)])

_ROWS = 100  # of a page where none is asked for


@router.get("", response_model=ListsAnswer, summary="Survey-wide lists there are")
async def lists(request: Request) -> Response:
    """The lists computed for the served index, with their parameters; `note` says why there are none."""
    engine = engine_of(request)
    found = [_info(kind, entry) for kind, entry in engine.lists.entries.items()]
    note = None if found else _why_not(engine)
    answer = ListsAnswer(request_id=trace_of(request).request_id, **engine.provenance(), lists=found, note=note)
    return json_answer(answer)


@router.get(
    "/{kind}",
    response_model=ListAnswer,
    responses=TABLE,
    summary="Isolated objects, disagreeing pairs, or near-duplicates",
)
async def one_list(
    request: Request,
    kind: str,
    modality: Annotated[
        str | None,
        Query(
            description="image or spectrum; of isolated and duplicates.", json_schema_extra={"enum": list(MODALITIES)}
        ),
    ] = None,
    offset: Annotated[int, Query(ge=0, le=2**31, description="Rows to pass over.")] = 0,
    limit: Annotated[int | None, Query(ge=1, description="Rows wanted, 100 unless said; at most max_rows.")] = None,
    format: Annotated[str | None, FORMAT] = None,
) -> Response:
    """Rows of one list in the order of their rank, from `offset` on."""
    engine, trace = engine_of(request), trace_of(request)
    fmt = chosen_format(request)
    known = _kind(kind)
    chosen = _modality(modality, known)
    most = settings_of(request).max_rows
    if limit is not None and limit > most:
        raise InputError(
            f"limit is {limit}; wanted 1 to {most}. Ask for the rest with offset.",
            code="invalid_value",
            field="limit",
            limit=most,
        )
    if known not in engine.lists.entries:
        raise NotFoundError(f"There is no list {known!r}. {_why_not(engine)}", code="no_lists", field="kind")
    table = await engine.search(trace, engine.lists.select, known, chosen)
    info, part = _info(known, engine.lists.entries[known]), table.slice(offset, limit or min(_ROWS, most))

    def made() -> Response:
        rows = part.to_pylist()
        if fmt == "json":
            return json_answer(
                ListAnswer(
                    request_id=trace.request_id,
                    **engine.provenance(),
                    **info.model_dump(exclude={"rows"}),
                    modality=chosen,
                    offset=offset,
                    total=table.num_rows,
                    items=rows,
                )
            )
        meta = table_meta(engine, trace.request_id, list=known, list_created=info.created, total=str(table.num_rows))
        return table_response(rows, table.column_names, fmt, meta, {})

    written: Response = await engine.write(trace, part.num_rows, made)
    return written


def _kind(kind: str) -> ListKind:
    known = next((k for k in KINDS if k == kind), None)
    if known is None:
        raise NotFoundError(
            f"There is no list {kind[:60]!r}; wanted one of {', '.join(KINDS)}.", code="no_such_list", field="kind"
        )
    return known


def _modality(text: str | None, kind: ListKind) -> Modality | None:
    if text is None:
        return None
    known = next((m for m in MODALITIES if m == text), None)
    if known is None:
        raise InputError(
            f"modality is {text[:60]!r}; wanted image or spectrum.", code="invalid_value", field="modality"
        )
    if kind == "disagreeing":
        raise InputError(
            "Disagreeing pairs are of an image and a spectrum. Leave modality out.",
            code="invalid_value",
            field="modality",
        )
    return known


def _info(kind: ListKind, entry: ListEntry) -> ListInfo:
    parameters: dict[str, Any] = dict(entry.parameters)
    return ListInfo(kind=kind, rows=entry.rows, found=entry.found, created=entry.created, parameters=parameters)


def _why_not(engine: Engine) -> str:
    if engine.lists_problem is not None:
        return f"The lists beside the index are not used: {engine.lists_problem}."
    made = ", ".join(engine.lists.entries) or "none"
    return f"Computed for this index: {made}. The operator makes them with `astroclip index lists`."
