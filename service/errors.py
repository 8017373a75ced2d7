"""Errors at the HTTP border: one shape, ``{"error": {"code", "message", "field", "limit", "request_id"}}``.

what went wrong                                        status
the request is not what the contract says              400
no API key, or not a good one                          401 with WWW-Authenticate
a key without the scope                                403
no such route, object, index                           404
method not offered                                     405
model and index (or vector) do not belong together     409
too large                                              413
bytes of a type we do not read                         415
understood but unusable (value out of range, bad file) 422
no capacity now                                        429 with Retry-After
not ready                                              503 with Retry-After
"""

from __future__ import annotations

import http
import math
from typing import Any

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError
from pydantic_core import to_json
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from astroclip.errors import (
    AccessError,
    AstroClipError,
    ForbiddenError,
    IndexFileError,
    InputError,
    LimitError,
    MediaTypeError,
    NotFoundError,
    NotReadyError,
    OverloadError,
    ProvenanceError,
)
from service.trace import current_trace, trace_of

__all__ = ["MalformedRequest", "error_body", "error_response", "install", "status_of", "validation_error"]

# Most specific first: MediaTypeError is an InputError, ForbiddenError an AccessError.
_STATUS: tuple[tuple[type[AstroClipError], int], ...] = (
    (MediaTypeError, 415),
    (InputError, 422),
    (LimitError, 413),
    (NotFoundError, 404),
    (ForbiddenError, 403),
    (AccessError, 401),
    (ProvenanceError, 409),
    (OverloadError, 429),
    (NotReadyError, 503),
    (IndexFileError, 503),
)

# Pydantic's error types that speak of a value, not of the form of the request.
_VALUE_ERRORS = (
    "greater_than",
    "less_than",
    "finite_number",
    "too_long",
    "too_short",
    "string_too",
    "value_error",
    "multiple_of",
    "literal_error",
    "enum",
)

_MESSAGE_CHARS = 600  # a message never echoes a whole upload


class MalformedRequest(InputError):
    """The request itself is not what the contract says: 400."""

    default_code = "malformed_request"


def status_of(error: AstroClipError) -> int:
    if isinstance(error, MalformedRequest):
        return 400
    return next((status for kind, status in _STATUS if isinstance(error, kind)), 500)


def error_body(
    code: str, message: str, *, field: str | None, limit: float | int | None, request_id: str
) -> dict[str, Any]:
    """The inside of the one shape; text is cut and made encodable, limits are finite numbers."""
    text = _encodable(message)
    if len(text) > _MESSAGE_CHARS:
        text = text[:_MESSAGE_CHARS] + " ..."
    if limit is not None and not math.isfinite(limit):
        limit = None
    field = None if field is None else _encodable(field)
    return {"code": code, "message": text, "field": field, "limit": limit, "request_id": request_id}


def _encodable(text: str) -> str:
    """Without lone surrogates."""
    return text.encode("utf-8", "replace").decode("utf-8")


def error_response(
    status: int,
    code: str,
    message: str,
    *,
    field: str | None = None,
    limit: float | int | None = None,
    request_id: str,
    headers: dict[str, str] | None = None,
) -> Response:
    """An answer in the one shape; the trace learns its code, for metrics and the access line."""
    if (trace := current_trace()) is not None:
        trace.error = code
    body = error_body(code, message, field=field, limit=limit, request_id=request_id)
    return Response(to_json({"error": body}), status, headers, media_type="application/json")


def from_astroclip(error: AstroClipError, request_id: str) -> Response:
    error.without_frames()
    headers = {}
    if isinstance(error, OverloadError):
        headers["Retry-After"] = str(max(1, math.ceil(error.retry_after_s)))
    elif status_of(error) == 503:
        headers["Retry-After"] = "2"
    elif status_of(error) == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return error_response(
        status_of(error),
        error.code,
        error.message,
        field=error.field,
        limit=error.limit,
        request_id=request_id,
        headers=headers,
    )


def validation_error(error: ValidationError | RequestValidationError) -> InputError:
    """Pydantic's first complaint as one of ours: form -> `MalformedRequest`, value -> `InputError`."""
    first = error.errors(include_url=False)[0] if isinstance(error, ValidationError) else error.errors()[0]
    kind = first["type"]
    field = ".".join(str(part) for part in first["loc"] if not _pydantics_word(str(part))) or None
    text = first["msg"].removeprefix("Value error, ")
    found = first.get("input")
    shown = f" Found {_short(found)}." if not isinstance(found, dict) and kind != "missing" else ""
    context = first.get("ctx") or {}
    limit = next((context[key] for key in ("le", "lt", "ge", "gt", "max_length", "min_length") if key in context), None)
    limit = limit if isinstance(limit, int | float) else None
    if kind.startswith(_VALUE_ERRORS):
        return InputError(f"{field or 'request'}: {text}.{shown}", code="invalid_value", field=field, limit=limit)
    if kind == "extra_forbidden":
        message = f"{field}: there is no such field. Remove it; /docs lists the fields of this call."
        return MalformedRequest(message, code="unknown_field", field=field)
    return MalformedRequest(f"{field or 'request'}: {text}.{shown} /docs shows the form wanted.", field=field)


def _pydantics_word(part: str) -> bool:
    """Union members in a location are pydantic's words ("kind:vector", "float"), not the caller's."""
    return part.startswith(("kind:", "constrained-", "function-")) or part in ("float", "int", "str", "finite-float")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def install(app: FastAPI) -> None:
    """Handlers for every exception a route or the framework can raise."""

    @app.exception_handler(AstroClipError)
    async def ours(request: Request, error: AstroClipError) -> Response:
        return from_astroclip(error, trace_of(request).request_id)

    @app.exception_handler(RequestValidationError)
    async def framework(request: Request, error: RequestValidationError) -> Response:
        return from_astroclip(validation_error(error), trace_of(request).request_id)

    @app.exception_handler(HTTPException)
    async def routing(request: Request, error: HTTPException) -> Response:
        status = http.HTTPStatus(error.status_code)
        code = status.phrase.lower().replace(" ", "_")
        messages = {
            404: f"There is nothing at {request.url.path}. /docs lists the calls.",
            405: f"{request.method} is not offered at {request.url.path}. /docs lists the calls.",
        }
        message = messages.get(error.status_code, str(error.detail))
        headers = dict(error.headers) if error.headers else None
        request_id = trace_of(request).request_id
        return error_response(error.status_code, code, message, request_id=request_id, headers=headers)
