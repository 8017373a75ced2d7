"""GET /livez: the process answers. GET /readyz: the model and the index do."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request

from service.routes.common import ERRORS, engine_of

__all__ = ["router"]

router = APIRouter(tags=["health"])


@router.get("/livez", summary="Alive")
async def livez() -> dict[str, str]:
    return {"status": "alive"}


@router.get("/readyz", summary="Ready", responses={503: ERRORS[503]})
async def readyz(request: Request) -> dict[str, Any]:
    """200 once the model has answered a known input and the index a search with it; asked anew as answers age.

    503 as soon as the service is told to stop, when a worker failed repeatedly or hangs. `warnings` says what does not
    keep it from answering: another version of the index that was refused, lists that are not served.
    """
    state = request.app.state
    state.life.check()
    engine = engine_of(request)
    await engine.check()
    warnings = [text for text in (state.swapper.problem, engine.lists_problem) if text]
    return {"status": "ready", **engine.provenance(), "warnings": warnings}
