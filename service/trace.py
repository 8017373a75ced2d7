"""The trace of one request: its id and where its milliseconds went.

`TraceMiddleware` is the outermost layer we own. It gives every request a `Trace` (``request.state.trace``),
writes the answer's headers, and turns an exception nobody expected into the one error shape, logged with the
request id and without a traceback in the answer.
"""

from __future__ import annotations

import logging
import math
import re
import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from starlette.datastructures import MutableHeaders
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

__all__ = ["STAGES", "Trace", "TraceMiddleware", "trace_of"]

log = logging.getLogger("astroclip.service")

STAGES = ("queue", "decode", "inference", "search")
_CROCKFORD = "0123456789ABCDEFGHJKMNPQRSTVWXYZ"
_CALLERS_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")


def new_request_id() -> str:
    """A ULID (48 bits of milliseconds, 80 random bits, Crockford base 32): unique, and sorts by time."""
    number = (int(time.time() * 1000) << 80) | secrets.randbits(80)
    return "".join(_CROCKFORD[(number >> shift) & 31] for shift in range(125, -1, -5))


@dataclass
class Trace:
    """`request_id`, who asks, and milliseconds per stage, summed over the parts of the request.

    caller: id of the API key, or "anonymous": whose share of the service this request is.
    batch: it is patient, and gives way to those that are not.
    deadline: `time.monotonic()` after which nobody waits for the answer any more.
    on_read: to be told how many objects the request brings, once they are read (`service.admission`).
    """

    request_id: str = field(default_factory=new_request_id)
    caller: str = "anonymous"
    batch: bool = False
    deadline: float = math.inf
    on_read: Callable[[int], None] = field(default=lambda count: None, repr=False)
    ms: dict[str, float] = field(default_factory=lambda: dict.fromkeys(STAGES, 0.0))
    extra_headers: dict[str, str] = field(default_factory=dict)

    def add(self, stage: str, seconds: float) -> None:
        self.ms[stage] += 1000.0 * seconds

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.add(stage, time.perf_counter() - start)

    def headers(self) -> dict[str, str]:
        times = {f"x-{stage}-time": f"{self.ms[stage]:.2f}" for stage in STAGES}
        return {"x-request-id": self.request_id, **times, **self.extra_headers}


def trace_of(request: Request) -> Trace:
    return request.state.trace


class TraceMiddleware:
    """Adds the trace; a request id sent by the caller is kept when it is a plain short word."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        trace = Trace()
        sent = dict(scope["headers"]).get(b"x-request-id", b"").decode("latin-1")
        if _CALLERS_ID.fullmatch(sent):
            trace.request_id = sent
        scope.setdefault("state", {})["trace"] = trace
        started = False

        async def send_traced(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                MutableHeaders(scope=message).update(trace.headers())
            await send(message)

        try:
            await self.app(scope, receive, send_traced)
        except Exception:
            log.exception("unexpected error in request %s %s", trace.request_id, scope.get("path"))
            if started:  # the status line is out: all we can do is cut the connection
                raise
            from service.errors import error_response  # errors needs trace_of

            response = error_response(
                500,
                "internal_error",
                "The service failed on this request. It is a fault on our side; please report the request id.",
                request_id=trace.request_id,
            )
            await response(scope, receive, send_traced)
