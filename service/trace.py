"""The trace of one request: its id and where its milliseconds went.

`TraceMiddleware` is the outermost layer we own. It gives every request a `Trace` (``request.state.trace``, and
`current_trace` wherever no request is at hand), writes the answer's headers, turns an exception nobody expected into
the one error shape, logged with the request id and without a traceback in the answer, and at the end hands the trace
to those who count, log and export.
"""

from __future__ import annotations

import asyncio
import logging
import math
import random
import re
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field

from starlette.requests import ClientDisconnect, Request
from starlette.routing import BaseRoute, Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from astroclip.errors import OverloadError
from service.metrics import Metrics
from service.telemetry import Telemetry

__all__ = ["CLIENT_LEFT", "STAGES", "UNMATCHED", "Trace", "TraceMiddleware", "current_trace", "too_late", "trace_of"]

log = logging.getLogger("astroclip.service")

STAGES = ("queue", "decode", "inference", "search")
UNMATCHED = "unmatched"  # the route of a path that is none of ours
CLIENT_LEFT = 499  # the status of an answer that nobody waited for; nginx's number, sent to no one
_MOST_MARKS = 64  # stage intervals kept of one request; an explanation is hundreds of passes
_CROCKFORD = "0123456789ABCDEFGHJKMNPQRSTVWXYZ"
_PAIRS = tuple(first + second for first in _CROCKFORD for second in _CROCKFORD)  # of ten bits
_CALLERS_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
_random = random.Random()  # seeded by the system; its own calls for randomness give Python's lock away each time
_METHODS = frozenset(("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"))

_current: ContextVar[Trace | None] = ContextVar("trace", default=None)


def new_request_id() -> str:
    """A ULID (48 bits of milliseconds, 80 random bits, Crockford base 32): unique, and sorts by time."""
    number = (int(time.time() * 1000) << 80) | _random.getrandbits(80)
    return "".join([_PAIRS[number >> shift & 1023] for shift in range(120, -1, -10)])


@dataclass
class Trace:
    """`request_id`, who asks, and milliseconds per stage, summed over the parts of the request.

    caller: id of the API key, or the client's address: whose share of the service this request is.
    key_id: id of the API key, None without one: what may be logged of who asked.
    batch: it is patient, and gives way to those that are not.
    deadline: `time.monotonic()` after which nobody waits for the answer any more; patient_deadline: the same where the
    request turns out to be a patient one (`be_patient`).
    on_read: to be told how many objects the request brings, once they are read (`service.admission`).
    error: code of the error it was answered with.
    method, route, status, seconds, bytes_in, bytes_out: what became of it; route is a template (or `UNMATCHED`), method
    one of HTTP's own (or OTHER), so that neither holds anything a caller made up; status is None before the headers.
    marks: None, or (stage, when it ended in `time.time_ns()`, seconds) for those who export spans.
    """

    request_id: str = field(default_factory=new_request_id)
    caller: str = "anonymous"
    key_id: str | None = None
    batch: bool = False
    deadline: float = math.inf
    patient_deadline: float = math.inf
    on_read: Callable[[int], None] = field(default=lambda count: None, repr=False)
    ms: dict[str, float] = field(default_factory=lambda: dict.fromkeys(STAGES, 0.0))
    extra_headers: dict[str, str] = field(default_factory=dict)
    error: str | None = None
    method: str = "OTHER"
    route: str = UNMATCHED
    status: int | None = None
    started: float = field(default_factory=time.perf_counter)
    seconds: float = 0.0
    bytes_in: int = 0
    bytes_out: int = 0
    marks: list[tuple[str, int, float]] | None = None

    def be_patient(self) -> None:
        """The request is larger than a person waits for: it gives way to others, and has the time that takes."""
        self.batch, self.deadline = True, max(self.deadline, self.patient_deadline)

    def add(self, stage: str, seconds: float, ended_ago: float = 0.0) -> None:
        """`seconds` were spent in `stage`, which ended `ended_ago` seconds before now."""
        self.ms[stage] += 1000.0 * seconds
        if self.marks is not None and len(self.marks) < _MOST_MARKS:
            self.marks.append((stage, time.time_ns() - int(1e9 * ended_ago), seconds))

    @asynccontextmanager
    async def in_time(self) -> AsyncIterator[None]:
        """What is waited for within, until the deadline. Raises OverloadError at it."""
        left = None if self.deadline == math.inf else self.deadline - time.monotonic()
        try:
            async with asyncio.timeout(left) as limit:
                yield
        except TimeoutError:
            if not limit.expired():  # somebody else's
                raise
            raise too_late() from None

    def headers(self) -> dict[str, str]:
        """Headers of the answer: the contract's, and the same as Server-Timing, which browsers draw."""
        times = {stage: f"{self.ms[stage]:.2f}" for stage in STAGES}
        shown = [f"{stage};dur={ms}" for stage, ms in times.items() if ms != "0.00"]
        shown.append(f"total;dur={1000.0 * (time.perf_counter() - self.started):.2f}")
        return {
            "x-request-id": self.request_id,
            # On every answer, errors too: what a caller uploaded or a survey named is never taken for a script.
            "x-content-type-options": "nosniff",
            **{f"x-{stage}-time": ms for stage, ms in times.items()},
            "server-timing": ", ".join(shown),
            **self.extra_headers,
        }


def too_late() -> OverloadError:
    return OverloadError(
        "The request's deadline passed while it waited for its turn. Try again, with fewer objects or a later one.",
        code="deadline_passed",
        retry_after_s=1.0,
    )


def trace_of(request: Request) -> Trace:
    return request.state.trace


def current_trace() -> Trace | None:
    """The trace of the request being handled; in a thread of a pool, where the context was passed along."""
    return _current.get()


class TraceMiddleware:
    """Adds the trace; a request id sent by the caller is kept when it is a plain short word.

    routes: those of the application, so that a request refused before it was routed counts for its route as well.
    ended: told of every request's trace after its answer is out.
    """

    def __init__(
        self,
        app: ASGIApp,
        metrics: Metrics,
        telemetry: Telemetry,
        routes: Sequence[BaseRoute] = (),
        ended: Sequence[Callable[[Trace], None]] = (),
    ) -> None:
        self.app = app
        self.metrics, self.telemetry = metrics, telemetry
        self.routes, self.ended = tuple(r for r in routes if isinstance(r, Route)), tuple(ended)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        trace = Trace()
        sent = dict(scope["headers"]).get(b"x-request-id", b"").decode("latin-1")
        if _CALLERS_ID.fullmatch(sent):
            trace.request_id = sent
        if scope["method"] in _METHODS:
            trace.method = scope["method"]
        scope.setdefault("state", {})["trace"] = trace

        async def receive_counted() -> Message:
            message = await receive()
            trace.bytes_in += len(message.get("body", b""))
            return message

        async def send_traced(message: Message) -> None:
            if message["type"] == "http.response.start":
                trace.status = message["status"]
                if self.telemetry.on:
                    self.telemetry.answered(trace)
                ours = {name.encode(): value.encode("latin-1") for name, value in trace.headers().items()}
                kept = [header for header in message.get("headers", ()) if header[0] not in ours]
                message["headers"] = [*kept, *ours.items()]
            else:
                trace.bytes_out += len(message.get("body", b""))
            await send(message)

        token = _current.set(trace)
        self.metrics.begin()
        if self.telemetry.on:
            self.telemetry.began(trace)
        try:
            await self.app(scope, receive_counted, send_traced)
        except ClientDisconnect:
            trace.error = "client_left"
        except Exception:
            log.exception("unexpected error in request %s", trace.request_id)
            if trace.status is not None:  # the status line is out: all we can do is cut the connection
                trace.error = "internal_error"
                raise
            from service.errors import error_response  # errors needs trace_of

            response = error_response(
                500,
                "internal_error",
                "The service failed on this request. It is a fault on our side; please report the request id.",
                request_id=trace.request_id,
            )
            await response(scope, receive, send_traced)
        finally:
            trace.seconds = time.perf_counter() - trace.started
            trace.route = self._route(scope)
            self._count(trace)
            if self.telemetry.on:
                self.telemetry.ended(trace)
            for tell in self.ended:
                tell(trace)
            _current.reset(token)

    def _count(self, trace: Trace) -> None:
        status = CLIENT_LEFT if trace.status is None else trace.status
        self.metrics.request(trace.route, status, trace.seconds, trace.ms)
        if trace.error is not None or status >= 400:
            self.metrics.rejected(trace.error or ("client_left" if status == CLIENT_LEFT else "other"))

    def _route(self, scope: Scope) -> str:
        """The template of the route that a request was for."""
        route = scope.get("route")
        if route is None:
            route = next((r for r in self.routes if r.path_regex.match(scope["path"])), None)
        return getattr(route, "path_format", UNMATCHED)
