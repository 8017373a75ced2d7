"""The OpenAPI document: FastAPI's own, plus the request bodies that routes read by hand."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic.json_schema import models_json_schema

from service.access import declare_keys
from service.schemas import EstimateRequest, SearchRequest

__all__ = ["install"]

_TEMPLATE = "#/components/schemas/{model}"


def install(app: FastAPI) -> None:
    """Make `app.openapi` complete; built once, on the first call."""

    def document() -> dict[str, Any]:
        if app.openapi_schema is None:
            found = get_openapi(title=app.title, version=app.version, summary=app.summary, routes=app.routes)
            _, bodies = models_json_schema(
                [(SearchRequest, "validation"), (EstimateRequest, "validation")], ref_template=_TEMPLATE
            )
            schemas = found.setdefault("components", {}).setdefault("schemas", {})
            schemas.update(bodies["$defs"])
            declare_keys(found, app.state.settings)
            app.openapi_schema = found
        return app.openapi_schema

    app.openapi = document  # type: ignore[method-assign]
