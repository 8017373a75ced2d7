"""Admission: whether a request is let in, decided before its body is read.

A server that takes every request answers none in time once more arrive than it can do: they all wait, until their
senders have gone. So a request is refused at once (429, with the time after which it is worth coming back) when it is
predicted to wait longer than `max_wait_s`: items ahead of it, times the measured time an item, at the place that fair
queueing gives its sender (`service.waiting`). The prediction counts what is admitted and not yet read, too: those
bodies become items a moment later.

Here a request also gets its deadline and its lane, and is ended when its client has gone.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable
from typing import Literal

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from astroclip.errors import InputError, OverloadError
from service.access import ADMIN, path_of
from service.errors import from_astroclip
from service.settings import Settings
from service.trace import Trace
from service.waiting import Lane
from service.workers import Workers, longest_wait

__all__ = ["Admission"]

_DECLARE_A_BODY = {b"content-length", b"transfer-encoding"}
_NEWEST = 0.05  # weight of the newest request in the mean number of objects
_VECTORS, _INFO = "/v1/search/vectors", "/v1/info"
_PREVIEWS = ("/image.jpg", "/spectrum.json")  # files beside the index

_Asks = Literal["model", "vectors", "index"]


class Admission:
    """ASGI middleware, see the module. Who only searches or looks up waits for no file and not for the model, and is
    judged by the searches alone; who brings vectors, by the reading of files, too. Health, metrics, the page, and what
    asks neither model nor index are let in; so are admin calls, without a deadline: they are what an operator has when
    nothing else is."""

    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        self.app, self.settings = app, settings
        self.in_flight: Counter[str] = Counter()  # by caller
        self.unread = 0  # admitted, and their objects not yet in any queue
        self.objects = 1.0  # that a request brings, on the average

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or path_of(scope).startswith(ADMIN):
            await self.app(scope, receive, send)
            return
        trace: Trace = scope["state"]["trace"]
        engine, headers, posted = scope["app"].state.engine, Headers(scope=scope), scope["method"] == "POST"
        path = path_of(scope)
        asks = _asks(path, posted, headers)
        try:
            self._prepare(trace, headers)
            if engine is not None:
                if posted:
                    self._admit_one_more(trace)
                if asks is not None:
                    self._admit(trace, engine.workers, asks, _file_bytes(headers))
        except (InputError, OverloadError) as error:
            await from_astroclip(error, trace.request_id)(scope, receive, send)
            return
        if not posted:
            await _while_connected(self.app, scope, receive, send)
            return
        self.in_flight[trace.caller] += 1
        if asks == "model":
            self.unread += 1
            trace.on_read = _Once(self._read)
        try:
            await _while_connected(self.app, scope, receive, send)
        finally:
            trace.on_read(0)
            self.in_flight[trace.caller] -= 1
            if not self.in_flight[trace.caller]:
                del self.in_flight[trace.caller]

    def _prepare(self, trace: Trace, headers: Headers) -> None:
        """Lane and deadline as the client wishes. Raises InputError."""
        priority = headers.get("x-priority", "interactive")
        if priority not in ("interactive", "batch"):
            raise InputError(
                f"X-Priority is {priority[:40]!r}; wanted interactive or batch.",
                code="invalid_value",
                field="X-Priority",
            )
        trace.batch = priority == "batch"
        most, patient = self.settings.deadline_s, self.settings.batch_deadline_s
        wished = headers.get("x-deadline-ms")
        if wished is not None:
            if not wished.isascii() or not wished.isdigit() or len(wished) > 9 or int(wished) == 0:
                raise InputError(
                    f"X-Deadline-Ms is {wished[:40]!r}; wanted a whole number of milliseconds, 1 or more.",
                    code="invalid_value",
                    field="X-Deadline-Ms",
                )
            most, patient = min(most, int(wished) / 1000.0), min(patient, int(wished) / 1000.0)
        now = time.monotonic()
        trace.deadline, trace.patient_deadline = now + most, now + patient
        if trace.batch:
            trace.be_patient()

    def _admit_one_more(self, trace: Trace) -> None:
        """Raises OverloadError for a request more than are worked at once, from who has his share of them."""
        settings, own, total = self.settings, self.in_flight[trace.caller], self.in_flight.total()
        share = settings.max_in_flight / (len(self.in_flight) + (own == 0))
        if total >= settings.max_in_flight and own >= share / 2:
            raise OverloadError(
                f"{total} requests are at work, which is all this service takes. Try again in 1 s.", retry_after_s=1.0
            )

    def _admit(self, trace: Trace, workers: Workers, asks: _Asks = "model", size: int = 0) -> None:
        """Raises OverloadError for a request that would wait too long; size: bytes of its file."""
        lane = Lane.patient if trace.batch else Lane.interactive
        if asks == "model":
            arriving = self.objects * min(self.unread, self.in_flight[trace.caller] * len(self.in_flight))
            wait = workers.predicted_wait(lane, trace.caller, arriving, size)
        else:
            wait = workers.search.predicted_wait(lane, trace.caller)
            wait += workers.reading.predicted_wait(lane, trace.caller, size) if asks == "vectors" else 0.0
        allowed = longest_wait(self.settings, trace)
        if wait > allowed:
            retry = max(1.0, wait - allowed)
            raise OverloadError(
                f"The request would wait about {wait:.1f} s; at most {allowed:.1f} s is waited here. Try again in "
                f"{retry:.0f} s.",
                retry_after_s=retry,
            )

    def _read(self, count: int) -> None:
        """The objects of a request, `count` of them, are in their queue; or it ended without any."""
        self.unread -= 1
        self.objects += _NEWEST * (count - self.objects)


def _asks(path: str, posted: bool, headers: Headers) -> _Asks | None:
    """Whose answer a request waits for; None: neither the model's nor the index's, as what the service is, or the
    pictures and curves beside the index."""
    if posted:
        media_type = headers.get("content-type", "").partition(";")[0].strip().lower()
        return "vectors" if path == _VECTORS else "index" if media_type == "application/json" else "model"
    looks_up = path == "/scs" or (path.startswith("/v1/") and path != _INFO and not path.endswith(_PREVIEWS))
    return "index" if looks_up else None


def _file_bytes(headers: Headers) -> int:
    """Of the file that a request says it brings; 0 where it does not say, or brings several in a form."""
    declared = headers.get("content-length", "")
    form = headers.get("content-type", "").startswith("multipart/")
    return int(declared) if declared.isdigit() and len(declared) < 19 and not form else 0


class _Once:
    """Calls `function` the first time only."""

    def __init__(self, function: Callable[[int], None]) -> None:
        self._function: Callable[[int], None] | None = function

    def __call__(self, count: int) -> None:
        function, self._function = self._function, None
        if function is not None:
            function(count)


async def _while_connected(app: ASGIApp, scope: Scope, receive: Receive, send: Send) -> None:
    """Run `app`, and cancel it when the client goes away, so that nothing is computed for nobody.

    The body is handed through; once it is complete, only a disconnect can come, and it is waited for here. A GET
    without one is complete from the start, since who expects none does not ask for it.
    """
    complete, gone, answered = asyncio.Event(), asyncio.Event(), False
    first: list[Message] = []
    if scope["method"] in ("GET", "HEAD") and not {name for name, _ in scope["headers"]} & _DECLARE_A_BODY:
        first.append({"type": "http.request", "body": b"", "more_body": False})
        complete.set()

    async def handed() -> Message:
        if first:
            return first.pop()
        if complete.is_set():
            await gone.wait()
            return {"type": "http.disconnect"}
        message = await receive()
        if message["type"] == "http.disconnect":
            gone.set()
        if gone.is_set() or not message.get("more_body", False):
            complete.set()
        return message

    async def sent(message: Message) -> None:
        nonlocal answered
        await send(message)
        answered = message["type"] == "http.response.body" and not message.get("more_body", False)

    async def watch() -> None:
        await complete.wait()
        while not gone.is_set():
            if (await receive())["type"] == "http.disconnect":
                gone.set()
        if not answered:  # servers say disconnect after a whole answer, too
            work.cancel()

    work = asyncio.ensure_future(app(scope, handed, sent))
    watching = asyncio.ensure_future(watch())
    try:
        await work
    except asyncio.CancelledError:
        if not gone.is_set():  # not ours: the server is stopping
            work.cancel()
            raise
    finally:
        watching.cancel()
