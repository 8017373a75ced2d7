"""Connections of strangers: how long a request's head may take and be, how many there may be, how long an answer waits.

What binds bodies (`service.limits`) begins with a request, and uvicorn bounds only the pause between two of them: a
client that sends a head byte by byte, or nothing, or one without end, or never reads its answer, would hold a
connection and memory for ever. uvicorn's own limit of connections, once reached, refuses every request on every one of
them, health included; here it is the connection too many that is refused.

What request smuggling lives from (Content-Length beside Transfer-Encoding or twice, bare line feeds, malformed chunks)
httptools refuses; tests/service/test_service_connections.py holds it to that.
"""

from __future__ import annotations

import asyncio
import http
import json
import select
from collections.abc import Callable
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from service.errors import error_body
from service.settings import Settings
from service.trace import new_request_id

__all__ = ["LINGER_S", "connection_options"]

LINGER_S = 1.0  # for a client to read why it was refused: closing on unread bytes resets the connection
_LEAST_READ = 1 << 16  # bytes of an answer that who reads it takes within write_timeout_s: 2 kB a second


def connection_options(settings: Settings, refused: Callable[[str], None] = lambda reason: None) -> dict[str, Any]:
    """Arguments of `uvicorn.Config` that bound connections. refused: told the code of each refusal, for metrics."""
    names = ("head_timeout_s", "write_timeout_s", "max_head_bytes", "max_connections")
    bounds = {name: getattr(settings, name) for name in names}
    return {
        "http": type(
            "BoundedProtocol", (BoundedProtocol,), {**bounds, "refused": staticmethod(refused), "lingering": [0]}
        ),
        "timeout_keep_alive": settings.keep_alive_s,
    }


class BoundedProtocol(HttpToolsProtocol):
    """uvicorn's protocol, with bounds for the head of a request, for a client that does not read, and for how many
    connections there are."""

    head_timeout_s: float
    write_timeout_s: float
    max_head_bytes: int
    max_connections: int
    refused: Callable[[str], None]
    lingering: list[int]  # how many are refused and not gone; one number for all connections
    _in_head = True  # none, or not all of one, has come
    _head_bytes = 0
    _closing = False  # refused, and lingering
    _unwritten = 0  # bytes of an answer that the client had not taken when it was last looked at
    _slow_head: asyncio.TimerHandle | None = None
    _slow_reader: asyncio.TimerHandle | None = None

    @property
    def idle(self) -> bool:
        """No request is at work, half received, or in the socket and not read yet."""
        half = self._in_head and self._head_bytes > 0
        return not half and (self.cycle is None or self.cycle.response_complete) and not self._unread()

    def _unread(self) -> bool:
        poll = select.poll()
        poll.register(self.transport.get_extra_info("socket").fileno(), select.POLLIN)
        return bool(poll.poll(0))

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if self.lingering[0] > self.max_connections:  # even those that were told so are too many
            transport.abort()
        elif len(self.connections) - self.lingering[0] > self.max_connections:
            self._refuse(
                503,
                "too_many_connections",
                f"{self.max_connections} connections are open, which is all this service takes. Try again in a few "
                "seconds, and keep connections for several requests.",
                self.max_connections,
            )
        else:
            self._slow_head = self.loop.call_later(self.head_timeout_s, self._too_slow)

    def data_received(self, data: bytes) -> None:
        if self._closing:
            return
        super().data_received(data)
        if not self._in_head or self.transport.is_closing():
            return
        self._head_bytes += len(data)
        if self._head_bytes > self.max_head_bytes:
            self._too_long()

    def on_message_begin(self) -> None:
        if self._closing:
            return
        super().on_message_begin()
        self._in_head, self._head_bytes = True, 0
        if self._slow_head is None:  # not the first request of the connection
            self._slow_head = self.loop.call_later(self.head_timeout_s, self._too_slow)

    def on_headers_complete(self) -> None:
        if self._closing:
            return
        self._in_head = False
        self._stop("_slow_head")
        if sum(len(name) + len(value) for name, value in self.headers) + len(self.url) > self.max_head_bytes:
            self._too_long()
            return
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        if not self._closing:
            super().on_body(body)

    def on_message_complete(self) -> None:
        if not self._closing:
            super().on_message_complete()

    def timeout_keep_alive_handler(self) -> None:
        """While one turn of the loop handles what came on many connections, the next request may come on this one:
        closing would reset it (seen under overload, a dozen in 100,000)."""
        if not self.transport.is_closing() and not self._unread():
            self.transport.close()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._watch_reader()

    def _watch_reader(self) -> None:
        self._unwritten = self.transport.get_write_buffer_size()
        self._slow_reader = self.loop.call_later(self.write_timeout_s, self._look_at_reader)

    def _look_at_reader(self) -> None:
        """Who takes a long answer slowly is waited for, who takes next to nothing is not."""
        if self._unwritten - self.transport.get_write_buffer_size() < _LEAST_READ:
            self.transport.abort()
        else:
            self._watch_reader()

    def resume_writing(self) -> None:
        super().resume_writing()
        self._stop("_slow_reader")

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop("_slow_head")
        self._stop("_slow_reader")
        self.lingering[0] -= self._closing
        super().connection_lost(exc)

    def _too_slow(self) -> None:
        seconds = self.head_timeout_s
        message = f"The head of the request had not arrived {seconds:g} s after it began. Send it faster."
        self._refuse(408, "head_timeout", message, seconds)

    def _too_long(self) -> None:
        most = self.max_head_bytes
        message = f"Request line and headers hold more than {most:,} bytes. Send long fields in a JSON body."
        self._refuse(431, "head_too_large", message, most)

    def _refuse(self, status: int, code: str, message: str, limit: float) -> None:
        """Answer what never became a request of the application, in the one shape of errors, and hang up."""
        if self._closing:
            return
        self._stop("_slow_head")
        self._closing = True
        self.lingering[0] += 1
        request_id = new_request_id()
        body = {"error": error_body(code, message, field=None, limit=limit, request_id=request_id)}
        text = json.dumps(body).encode()
        head = [
            f"HTTP/1.1 {status} {http.HTTPStatus(status).phrase}",
            "connection: close",
            "content-type: application/json",
            f"content-length: {len(text)}",
            f"x-request-id: {request_id}",
            "x-content-type-options: nosniff",
            *(["retry-after: 2"] if status == 503 else []),
        ]
        self.transport.write("\r\n".join([*head, "", ""]).encode() + text)
        self.loop.call_later(LINGER_S, self.transport.close)
        self.refused(code)

    def _stop(self, name: str) -> None:
        timer = getattr(self, name)
        if timer is not None:
            timer.cancel()
            setattr(self, name, None)
