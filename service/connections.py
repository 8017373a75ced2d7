"""Connections of strangers: how long a request's head may take and be, how many there may be, how long an answer waits.

What binds bodies (`service.limits`) begins with a request, and uvicorn bounds only the pause between two of them, and
not even that once a byte has come: a client that sends a head byte by byte, or nothing, or one without end, or trailers
without end, or requests far ahead of their answers, or never reads these, would hold a connection and memory for ever.
uvicorn's own limit of connections, once reached, refuses every request on every one of them, health included; here it
is the connection too many that is refused.

A refusal is the last answer of its connection: those owed to earlier requests come first, and what the client sends
after is not looked at.

What request smuggling lives from (Content-Length beside Transfer-Encoding or twice, bare line feeds, malformed chunks)
httptools refuses; tests/service/test_service_connections.py holds it to that.
"""

from __future__ import annotations

import asyncio
import http
import json
import logging
import resource
import select
from collections.abc import Callable
from typing import Any

import httptools
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from service.errors import error_body
from service.settings import Settings
from service.trace import new_request_id

__all__ = ["LINGER_S", "allow_files", "connection_options"]

log = logging.getLogger("astroclip.service")

LINGER_S = 1.0  # for a client to read why it was refused: closing on unread bytes resets the connection
_OTHER_FILES = 256  # than connections: the index's, uploads beyond a megabyte, pipes, those of libraries
_UNREAD_S = 0.1  # after which it is looked again whether what came at the end of an idle time began a request
_LEAST_READ = 1 << 16  # bytes of an answer that who reads it takes within write_timeout_s: 2 kB a second; and that who
# sends a body nobody waits for sends within keep_alive_s


def connection_options(settings: Settings, refused: Callable[[str], None] = lambda reason: None) -> dict[str, Any]:
    """Arguments of `uvicorn.Config` that bound connections. refused: told the code of each refusal, for metrics."""
    names = ("head_timeout_s", "write_timeout_s", "max_head_bytes", "max_pipelined", "max_connections")
    bounds = {name: getattr(settings, name) for name in names}
    return {
        "http": type(
            "BoundedProtocol", (BoundedProtocol,), {**bounds, "refused": staticmethod(refused), "lingering": [0]}
        ),
        "timeout_keep_alive": settings.keep_alive_s,
        "ws": "none",
    }


def allow_files(max_connections: int) -> None:
    """Have the system allow as many open files as there may be connections, those that are being refused counted, and
    some: a service out of files can neither accept nor read. Many shells allow 1,024. Where it may not be, it is
    logged."""
    wanted = 2 * max_connections + _OTHER_FILES
    now, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    if now == resource.RLIM_INFINITY or now >= wanted:
        return
    allowed = wanted if most == resource.RLIM_INFINITY else min(wanted, most)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(now, allowed), most))
    if allowed < wanted:
        log.warning(
            "%d open files are allowed, and %d connections may want %d; raise the limit (ulimit -Hn, LimitNOFILE=), or "
            "set max_connections to at most %d",
            max(now, allowed),
            max_connections,
            wanted,
            max(0, max(now, allowed) - _OTHER_FILES) // 2,
        )


class BoundedProtocol(HttpToolsProtocol):
    """uvicorn's protocol, with bounds for the head of a request, for what is neither head nor body, for requests sent
    ahead, for a client that does not read, and for how many connections there are."""

    head_timeout_s: float
    write_timeout_s: float
    max_head_bytes: int
    max_pipelined: int
    max_connections: int
    refused: Callable[[str], None]
    lingering: list[int]  # how many are refused and not gone; one number for all connections
    _in_head = True  # none, or not all of one, has come
    _half_head = False  # one has begun
    _head_bytes = 0
    _body_bytes = 0  # since the idle time was last looked at
    _beside_bytes = 0  # since the last byte of a head or body: trailers, line feeds between requests
    _mixed = False  # what came last held more than a head
    _plain_head: bytes | None = None  # of a request that asks for another protocol, without that
    _owed = 0  # requests whose answer is not complete
    _closing = False  # refused: what still comes is not looked at
    _last_words: bytes | None = None  # the refusal, to be written after the answers owed
    _unwritten = 0  # bytes of answers that the client had not taken when it was last looked at
    _slow_head: asyncio.TimerHandle | None = None
    _slow_reader: asyncio.TimerHandle | None = None

    @property
    def idle(self) -> bool:
        """No request is at work, half received, or in the socket and not read yet."""
        return not self._half_head and not self._owed and not self._unread()

    def _unread(self) -> bool:
        poll = select.poll()
        poll.register(self.transport.get_extra_info("socket").fileno(), select.POLLIN)
        return bool(poll.poll(0))

    # -- what comes ------------------------------------------------------------------------------------------------

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
        """In place of uvicorn's, whose idle time ends with any byte, be it of no request, and which answers and logs
        in its own words what is not HTTP."""
        if self._closing:
            return
        self._beside_bytes += len(data)
        self._mixed = False
        self._feed(data)
        if self._closing or self.transport.is_closing():
            return
        if self._in_head:
            self._head_bytes += 0 if self._mixed else len(data)  # of what is mixed at most one read goes uncounted
            if self._head_bytes > self.max_head_bytes:
                self._too_long()
        elif self._beside_bytes > self.max_head_bytes:
            self.refused("trailers_too_large")
            self.transport.abort()

    def _feed(self, data: bytes) -> None:
        """No other protocol is spoken here: a request for one is what it also is, and parsed again as that, since the
        parser takes what follows the head for the other protocol, be it the body (curl --http2, Java's client)."""
        try:
            while True:
                try:
                    self.parser.feed_data(data)
                    return
                except httptools.HttpParserUpgrade as end:
                    if self._plain_head is None:  # refused
                        return
                    data = self._plain_head + data[end.args[0] :]
                    self._plain_head, self.parser = None, httptools.HttpRequestParser(self)
                    self.parser.set_dangerous_leniencies(lenient_data_after_close=True)  # as uvicorn's
        except httptools.HttpParserError:
            self._malformed()

    def on_message_begin(self) -> None:
        if self._closing:
            return
        super().on_message_begin()
        self._unset_keepalive_if_required()
        self._in_head, self._half_head = True, True
        self._head_bytes = self._beside_bytes = 0
        if self._slow_head is None:  # not the first request of the connection
            self._slow_head = self.loop.call_later(self.head_timeout_s, self._too_slow)

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._in_head:  # else a trailer, which may be dropped (RFC 9110, 6.5.1) and would be taken for a header
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        if self._closing:
            return
        self._stop("_slow_head")
        if sum(len(name) + len(value) for name, value in self.headers) + len(self.url) > self.max_head_bytes:
            self._too_long()
        elif len(self.pipeline) >= self.max_pipelined:
            self._refuse(
                429,
                "too_many_pipelined",
                f"{self.max_pipelined} requests wait on this connection behind one at work, which is all that may. "
                "Send the next ones when answers have come.",
                self.max_pipelined,
            )
        elif self.parser.should_upgrade() and self.parser.get_method() != b"CONNECT":
            self._plain_head = self._without_upgrade()
        else:
            super().on_headers_complete()
            self._owed += 1
            self._unset_keepalive_if_required()  # set when the last answer was complete, and half of this head there
            self._in_head = self._half_head = False
            self._beside_bytes = self._body_bytes = 0

    def _without_upgrade(self) -> bytes:
        """The head of this request, without its wish for another protocol."""
        lines = [b"%s %s HTTP/%s" % (self.parser.get_method(), self.url, self.parser.get_http_version().encode())]
        for name, value in self.headers:
            if name == b"connection":
                value = b", ".join(t for t in value.lower().split(b",") if t.strip() in (b"close", b"keep-alive"))
            if name not in (b"upgrade", b"http2-settings") and (value or name != b"connection"):
                lines.append(b"%s: %s" % (name, value))
        return b"\r\n".join([*lines, b"", b""])

    def on_body(self, body: bytes) -> None:
        if not self._closing:
            self._beside_bytes, self._mixed = 0, True
            self._body_bytes += len(body)
            super().on_body(body)

    def on_message_complete(self) -> None:
        self._mixed, self._body_bytes = True, 0
        if not self._closing and self._plain_head is None:
            super().on_message_complete()

    # -- what goes -------------------------------------------------------------------------------------------------

    def on_response_complete(self) -> None:
        self._owed -= 1
        super().on_response_complete()
        if self.transport.get_write_buffer_size():
            self._watch_reader()
        if self._last_words is not None and not self._owed:
            self._say_last()

    def timeout_keep_alive_handler(self) -> None:
        """While one turn of the loop handles what came on many connections, the next request may come on this one:
        closing would reset it (seen under overload, a dozen in 100,000)."""
        if self.transport.is_closing() or self._owed or self._half_head:
            return
        again: float | None = None
        if self._body_bytes >= _LEAST_READ:  # of a request that was answered before: it is still sent, and at a pace
            again, self._body_bytes = self.timeout_keep_alive, 0
        elif self._unread():  # a request stops the timer as it begins; what is none does not
            again = _UNREAD_S
        if again is None:
            self.transport.close()
        else:
            self.timeout_keep_alive_task = self.loop.call_later(again, self.timeout_keep_alive_handler)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._watch_reader()

    def resume_writing(self) -> None:
        super().resume_writing()
        if self.transport.get_write_buffer_size():
            self._watch_reader()
        else:
            self._stop("_slow_reader")

    def _watch_reader(self) -> None:
        """From now on, also where it was watched: what was written since is not what it did not read."""
        self._stop("_slow_reader")
        self._unwritten = self.transport.get_write_buffer_size()
        self._slow_reader = self.loop.call_later(self.write_timeout_s, self._look_at_reader)

    def _look_at_reader(self) -> None:
        """Who takes a long answer slowly is waited for, who takes next to nothing is not."""
        left = self.transport.get_write_buffer_size()
        self._slow_reader = None
        if left and self._unwritten - left < _LEAST_READ:
            self.transport.abort()
        elif left:
            self._watch_reader()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop("_slow_head")
        self._stop("_slow_reader")
        self._unset_keepalive_if_required()
        self.lingering[0] -= self._closing
        super().connection_lost(exc)

    # -- refusals --------------------------------------------------------------------------------------------------

    def _too_slow(self) -> None:
        seconds = self.head_timeout_s
        if self.flow.read_paused:  # by us, behind requests sent before; the rest of it may lie there
            self._slow_head = self.loop.call_later(seconds, self._too_slow)
            return
        message = f"The head of the request had not arrived {seconds:g} s after it began. Send it faster."
        self._refuse(408, "head_timeout", message, seconds)

    def _too_long(self) -> None:
        most = self.max_head_bytes
        message = f"Request line and headers hold more than {most:,} bytes. Send long fields in a JSON body."
        self._refuse(431, "head_too_large", message, most)

    def _malformed(self) -> None:
        message = (
            "What was sent is no HTTP/1.1 request. Percent-encode what is not ASCII in the address, and say once how "
            "long the body is."
        )
        if not self._in_head and self.cycle.more_body:
            if self.cycle.response_started:  # an answer is under way, or was given: there is no place for another
                self.refused("malformed_http")
                self.transport.abort()
                return
            self._drop_last()
        self._refuse(400, "malformed_http", message, None)

    def _drop_last(self) -> None:
        """The request whose body went wrong gets the refusal for its answer."""
        self._owed -= 1
        if self.pipeline:  # the newest is on the left
            self.pipeline.popleft()
        else:
            self.cycle.disconnected = True
            self.cycle.message_event.set()

    def _refuse(self, status: int, code: str, message: str, limit: float | None) -> None:
        """Answer what never became a request of the application, in the one shape of errors, and hang up."""
        if self._closing:
            return
        self._stop("_slow_head")
        self._unset_keepalive_if_required()
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
            *(["retry-after: 2"] if status in (429, 503) else []),
        ]
        self._last_words = "\r\n".join([*head, "", ""]).encode() + text
        self.refused(code)
        if not self._owed:
            self._say_last()

    def _say_last(self) -> None:
        assert self._last_words is not None
        if not self.transport.is_closing():
            self.transport.write(self._last_words)
            if self.transport.get_write_buffer_size():
                self._watch_reader()
            self.loop.call_later(LINGER_S, self.transport.close)
        self._last_words = None

    def _stop(self, name: str) -> None:
        timer = getattr(self, name)
        if timer is not None:
            timer.cancel()
            setattr(self, name, None)
