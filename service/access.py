"""Who may call: API keys and their scopes, asked of every request before anything else is done with it.

Without a key file the service is open, except for admin calls, which are then refused: who can reach the port is not
therefore who runs the service. With one, every call wants a key with the scope

    admin   /v1/admin/...
    read    everything else: embed, search, estimate, objects, lists, info, cone search, /metrics

but for what says nothing of the survey: health, the page and its files, /docs and /openapi.json. What is not named open
is closed, so a new route needs no line here. Plain ASGI: 3 microseconds a request, measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from astroclip.errors import AccessError, ForbiddenError
from service.audit import audit
from service.errors import from_astroclip
from service.keys import Key, KeyRing
from service.settings import Settings
from service.trace import Trace

__all__ = ["ADMIN", "METRICS", "Access", "cross_origin", "declare_keys", "key_of", "needed_scope", "path_of"]

OPEN = frozenset({"/", "/docs", "/openapi.json", "/livez", "/readyz"})
PAGE = "/page/"
ADMIN = "/v1/admin"
METRICS = "/metrics"

_ADMIN_OFF = (
    "Admin calls are off, since this service has no API keys. Make one with `astroclip keys create --scope admin "
    "--file keys.json`, and start the service with ASTROCLIP_KEYS_FILE=keys.json."
)
_HOW = "Send it as `Authorization: Bearer KEY` or `X-API-Key: KEY`; whoever runs this service makes keys."


def path_of(scope: Scope) -> str:
    """The path as the router sees it: without the prefix under which a server may mount the application."""
    path, root = scope["path"], scope.get("root_path", "")
    return path[len(root) :] if root and path.startswith(root + "/") else path


def needed_scope(path: str) -> str | None:
    """The scope that a call of `path` wants where there are keys; None: open."""
    if path in OPEN or path.startswith(PAGE):
        return None
    return "admin" if path == ADMIN or path.startswith(ADMIN + "/") else "read"


def key_of(scope: Scope) -> Key | None:
    """The key that this request was let in with."""
    key: Key | None = scope["state"].get("key")
    return key


class Access:
    """401 without a good key, 403 for a key without the scope; else `trace.caller` and `key_of(scope)` are set."""

    def __init__(self, app: ASGIApp, keys: KeyRing | None, metrics_open: bool = False) -> None:
        self.app = app
        self.keys = keys
        self.metrics_open = metrics_open

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        trace: Trace = scope["state"]["trace"]
        needed = needed_scope(path_of(scope))
        try:
            if needed is not None:
                self._let_in(scope, trace, needed)
        except AccessError as error:
            if needed == "admin":
                audit(Request(scope), "admin_call", "refused", reason=error.code)
            await from_astroclip(error, trace.request_id)(scope, receive, send)
            return
        if needed != "admin":
            await self.app(scope, receive, send)
            return
        try:
            await self.app(scope, receive, send)
        finally:  # whatever became of it: over a limit, no such call, cut by the end of the service
            if not scope["state"].get("audited"):
                done = trace.status is not None and trace.status < 400
                outcome, why = ("done", {}) if done else ("refused", {"reason": trace.error or "interrupted"})
                audit(Request(scope), "admin_call", outcome, **why)

    def _let_in(self, scope: Scope, trace: Trace, needed: str) -> None:
        """Raises AccessError, ForbiddenError."""
        if self.keys is None:
            if needed == "admin":
                raise ForbiddenError(_ADMIN_OFF, code="admin_off")
            return
        if self.metrics_open and path_of(scope) == "/metrics":
            return
        presented = _presented(Headers(scope=scope))
        if presented is None:
            raise AccessError(f"This call wants an API key and none was sent. {_HOW}", code="key_missing")
        key = self.keys.holder(presented)
        if key is None:
            raise AccessError(
                f"The API key sent is not known here; is it whole, and not revoked? {_HOW}", code="key_unknown"
            )
        trace.caller = trace.key_id = key.id
        if key.expired():
            raise AccessError(f"The API key {key.id} expired on {key.expires}. Ask for a new one.", code="key_expired")
        if needed not in key.scopes:
            has = " and ".join(sorted(key.scopes))
            raise ForbiddenError(
                f"The API key {key.id} has the scope {has}; this call wants {needed}.", code="key_scope"
            )
        scope["state"]["key"] = key


def _presented(headers: Headers) -> str | None:
    """The key sent, of either header; another scheme of Authorization (a proxy's own) is not ours to judge."""
    scheme, _, key = headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer" and key.strip():
        return key.strip()
    return headers.get("x-api-key", "").strip() or None


def cross_origin(origins: Sequence[str]) -> dict[str, Any]:
    """Arguments of Starlette's CORSMiddleware. No credentials: keys travel in a header that a script sets, never by
    cookie, so a page that holds no key gains nothing."""
    return {
        "allow_origins": list(origins),
        "allow_methods": ["GET", "POST"],
        "allow_headers": ["authorization", "x-api-key", "content-type", "x-request-id", "x-priority", "x-deadline-ms"],
        "expose_headers": ["x-request-id", "retry-after"],
        "max_age": 600,
    }


def declare_keys(document: dict[str, Any], settings: Settings) -> None:
    """Into an OpenAPI document: the two ways to send a key, where one is wanted, and the answers without."""
    described = "A key as `astroclip keys create` prints it."
    document.setdefault("components", {})["securitySchemes"] = {
        "bearer": {"type": "http", "scheme": "bearer", "description": described},
        "api_key": {"type": "apiKey", "in": "header", "name": "X-API-Key", "description": described},
    }
    error = {"application/json": {"schema": {"$ref": "#/components/schemas/ErrorAnswer"}}}
    for path, methods in document["paths"].items():
        needed = needed_scope(path) or "none"
        keyed = settings.keys_file is not None and needed != "none" and not (path == METRICS and settings.metrics_open)
        for call in methods.values():
            answers = call.setdefault("responses", {})
            if keyed:
                call["security"] = [{"bearer": []}, {"api_key": []}]
                answers.setdefault("401", {"description": "No API key, or none that is good here.", "content": error})
            if keyed or needed == "admin":
                answers.setdefault("403", {"description": f"The key lacks the scope {needed}.", "content": error})
            if needed != "none":
                answers.setdefault("429", {"description": "No capacity now; see Retry-After.", "content": error})
