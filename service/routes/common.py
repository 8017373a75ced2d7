"""What the routes share: the engine of the application, and answers as JSON."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel
from starlette.requests import Request
from starlette.responses import Response

from astroclip.errors import NotReadyError
from service.engine import Engine
from service.schemas import ErrorAnswer
from service.settings import Settings

__all__ = ["ERRORS", "engine_of", "json_answer", "settings_of", "table_meta"]

# For the OpenAPI page: what every call may answer besides its own.
ERRORS: dict[int | str, dict[str, Any]] = {
    400: {"model": ErrorAnswer, "description": "The request is not what the contract says."},
    404: {"model": ErrorAnswer, "description": "No such object."},
    409: {"model": ErrorAnswer, "description": "Vector and index belong to different models."},
    413: {"model": ErrorAnswer, "description": "Too large; `limit` says by what measure."},
    415: {"model": ErrorAnswer, "description": "Bytes of a type that is not read here."},
    422: {"model": ErrorAnswer, "description": "Understood, but unusable: says what was found, wanted, and the mend."},
    429: {"model": ErrorAnswer, "description": "No capacity now; see Retry-After."},
    503: {"model": ErrorAnswer, "description": "Not ready yet; see Retry-After."},
}


def engine_of(request: Request) -> Engine:
    """The engine of this request: the application's as it was when first asked for, so that an answer is of one index
    even while it is replaced. Raises NotReadyError before it is loaded."""
    state = request.scope["state"]
    engine: Engine | None = state.setdefault("engine", request.app.state.engine)
    if engine is None:
        raise NotReadyError("The model and the index are still being loaded. Try again in a few seconds.")
    return engine


def settings_of(request: Request) -> Settings:
    settings: Settings = request.app.state.settings
    return settings


def json_answer(answer: BaseModel) -> Response:
    return Response(answer.model_dump_json(), media_type="application/json")


def table_meta(engine: Engine, request_id: str, **more: str) -> dict[str, str]:
    """The provenance a table carries."""
    provenance = engine.provenance()
    return {
        "request_id": request_id,
        "model": provenance["model"]["id"],
        "model_sha256": provenance["model"]["sha256"],
        "preprocess_version": provenance["model"]["preprocess_version"],
        "index": provenance["index"]["id"],
        "index_manifest_sha256": provenance["index"]["manifest_sha256"],
        **more,
    }
