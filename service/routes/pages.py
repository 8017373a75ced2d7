"""GET /, /docs and their files: static pages without a build step and without any other host."""

from __future__ import annotations

from pathlib import Path

from fastapi import APIRouter, Request
from starlette.exceptions import HTTPException
from starlette.responses import FileResponse, Response

__all__ = ["router"]

router = APIRouter(include_in_schema=False)

PAGE = Path(__file__).resolve().parents[1] / "page"
_TYPES = {".html": "text/html", ".js": "text/javascript", ".css": "text/css", ".svg": "image/svg+xml"}
# Nothing but our own files, and pictures we make ourselves: the page works offline and cannot call out. What
# default-src does not cover is said: no other base for links, no form that sends a key anywhere. No
# Strict-Transport-Security: we speak plain HTTP, over which browsers ignore it (RFC 6797, 8.1); it belongs to the proxy
# that ends TLS.
_HEADERS = {
    "content-security-policy": "default-src 'self'; img-src 'self' data: blob:; object-src 'none'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'self'",
    "cross-origin-opener-policy": "same-origin",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",
}
_FILES = {path.relative_to(PAGE).as_posix(): path for path in PAGE.rglob("*") if path.suffix in _TYPES}


@router.get("/")
async def page(request: Request) -> Response:
    return _file("index.html")


@router.get("/docs")
async def docs(request: Request) -> Response:
    return _file("docs.html")


@router.get("/page/{name:path}")
async def asset(request: Request, name: str) -> Response:
    """One of the files found at start-up; a name is looked up, never joined to a path."""
    return _file(name)


def _file(name: str) -> Response:
    path = _FILES.get(name)
    if path is None:
        raise HTTPException(404)
    return FileResponse(path, media_type=_TYPES[path.suffix], headers=_HEADERS)
