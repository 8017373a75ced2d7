"""Connections of strangers: how long a request's head may take and be, how many there may be, how long an answer waits.

What binds bodies (`service.limits`) begins with a request, and uvicorn bounds only the pause between two of them: a
client that sends a head byte by byte, or nothing, or one without end, or never reads its answer, would hold a
connection and memory for ever. What request smuggling lives from (Content-Length beside Transfer-Encoding or twice,
bare line feeds, malformed chunks) httptools refuses; tests/service/test_service_connections.py holds it to that.
"""

from __future__ import annotations

import asyncio
import select
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from service.settings import Settings

__all__ = ["connection_options"]

_SLOW, _LONG = b"408 Request Timeout", b"431 Request Header Fields Too Large"


def connection_options(settings: Settings) -> dict[str, Any]:
    """Arguments of `uvicorn.Config` that bound connections."""
    names = ("head_timeout_s", "write_timeout_s", "max_head_bytes")
    bounds = {name: getattr(settings, name) for name in names}
    return {
        "http": type("BoundedProtocol", (BoundedProtocol,), bounds),
        "limit_concurrency": settings.max_connections,
        "timeout_keep_alive": settings.keep_alive_s,
    }


class BoundedProtocol(HttpToolsProtocol):
    """uvicorn's protocol, with bounds for the head of a request and for a client that does not read."""

    head_timeout_s: float
    write_timeout_s: float
    max_head_bytes: int
    _in_head = True  # none, or not all of one, has come
    _head_bytes = 0
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
        self._slow_head = self.loop.call_later(self.head_timeout_s, self._refuse, _SLOW)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if not self._in_head or self.transport.is_closing():
            return
        self._head_bytes += len(data)
        if self._head_bytes > self.max_head_bytes:
            self._refuse(_LONG)

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._in_head, self._head_bytes = True, 0
        if self._slow_head is None:  # not the first request of the connection
            self._slow_head = self.loop.call_later(self.head_timeout_s, self._refuse, _SLOW)

    def on_headers_complete(self) -> None:
        self._in_head = False
        self._stop("_slow_head")
        if sum(len(name) + len(value) for name, value in self.headers) + len(self.url) > self.max_head_bytes:
            self._refuse(_LONG)
            return
        super().on_headers_complete()

    def timeout_keep_alive_handler(self) -> None:
        """While one turn of the loop handles what came on many connections, the next request may come on this one:
        closing would reset it (seen under overload, a dozen in 100,000)."""
        if not self.transport.is_closing() and not self._unread():
            self.transport.close()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._slow_reader = self.loop.call_later(self.write_timeout_s, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._stop("_slow_reader")

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop("_slow_head")
        self._stop("_slow_reader")
        super().connection_lost(exc)

    def _refuse(self, status: bytes) -> None:
        self._stop("_slow_head")
        self.transport.write(b"HTTP/1.1 " + status + b"\r\nconnection: close\r\ncontent-length: 0\r\n\r\n")
        self.transport.close()

    def _stop(self, name: str) -> None:
        timer = getattr(self, name)
        if timer is not None:
            timer.cancel()
            setattr(self, name, None)
