"""POST /v1/admin/index/reload: serve the version of the index that was published last."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from fastapi import APIRouter, Request

from astroclip.errors import AstroClipError
from service.audit import audit
from service.routes.common import ERRORS
from service.swap import Swapper
from service.trace import trace_of

__all__ = ["router"]

router = APIRouter(prefix="/v1/admin", tags=["admin"])


@router.post(
    "/index/reload",
    summary="Swap to the index that the served directory names now",
    responses={code: ERRORS[code] for code in (409, 503)},
)
async def reload(request: Request) -> dict[str, Any]:
    """Loads, verifies and tries the version that CURRENT names, then serves it; requests at work finish with the old.

    Takes no path: the directory is the one the service was started with. `outcome` is swapped, lists (the same index,
    with new survey-wide lists) or unchanged. 409 when the index was built with another model, 503 when a file of it is
    damaged; the old one goes on serving.
    """
    swapper: Swapper = request.app.state.swapper
    try:
        swap = await swapper.reload()
    except AstroClipError as error:
        audit(request, "reload_index", "refused", reason=error.code, message=error.message)
        raise
    audit(request, "reload_index", swap.outcome, before=swap.before_sha256, now=swap.manifest_sha256)
    return {"request_id": trace_of(request).request_id, **asdict(swap)}
