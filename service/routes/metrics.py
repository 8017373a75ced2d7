"""GET /metrics: what Prometheus scrapes."""

from __future__ import annotations

from fastapi import APIRouter, Request
from starlette.responses import Response

from service.metrics import Metrics

__all__ = ["router"]

router = APIRouter(tags=["health"])


@router.get("/metrics", summary="Metrics for Prometheus", response_class=Response)
def metrics(request: Request) -> Response:
    """Prometheus' text format, or OpenMetrics where `Accept` names it. There before the model is loaded as well."""
    found: Metrics = request.app.state.metrics
    # Not `async`: the page takes milliseconds to write, which belong into a thread.
    page, media_type = found.exposition(request.headers.get("accept", ""))
    return Response(page, headers={"content-type": media_type, "cache-control": "no-store"})
