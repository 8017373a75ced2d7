"""A body nobody reads: of a request that was answered before it had all come, as every early refusal does.

A server goes on taking such a body, so that the client reads the answer, and without an end where the body has none: an
endless chunked upload to a call that answers 401 costs a core for as long as it lasts. Bodies that declare a length
within `max_bytes` end by themselves and are left alone, with their connection, unless the answer closes it. Others are
answered at once, read for a while longer (closing on unread data would reset the connection, and the client see that in
place of the answer), and then cut. Plain ASGI.
"""

from __future__ import annotations

import asyncio
import math
import time
from contextlib import suppress

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

__all__ = ["UnreadBody"]

DRAIN_S = 5.0  # long enough for a client at 50 Mbit/s to have sent what fits the limit


class UnreadBody:
    """Reads at most `max_bytes` and `drain_s` more of a body once its answer is out."""

    def __init__(self, app: ASGIApp, max_bytes: int, drain_s: float = DRAIN_S) -> None:
        self.app = app
        self.max_bytes = max_bytes
        self.drain_s = drain_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not _has_body(headers := Headers(scope=scope)):
            await self.app(scope, receive, send)
            return
        complete = closing = False
        taken, deadline = 0, math.inf  # of what came after the answer had begun, whoever read it

        async def noted() -> Message:
            nonlocal complete, taken
            message = await receive()
            complete = not message.get("more_body", False)  # or the client is gone
            taken += len(message.get("body", b"")) if closing else 0
            return message

        async def answered(message: Message) -> None:
            nonlocal closing, deadline
            if message["type"] == "http.response.start" and not complete:
                said = MutableHeaders(scope=message)
                if said.get("connection") == "close" or not self._ends_by_itself(headers):
                    closing, deadline = True, time.monotonic() + self.drain_s
                    said["connection"] = "close"
            elif closing and not message.get("more_body", False):
                await send({**message, "more_body": True})
                await drain()
                message = {"type": "http.response.body", "body": b"", "more_body": False}
            await send(message)

        async def drain() -> None:
            with suppress(TimeoutError):
                while not complete and taken <= self.max_bytes:
                    await asyncio.wait_for(noted(), deadline - time.monotonic())

        await self.app(scope, noted, answered)

    def _ends_by_itself(self, headers: Headers) -> bool:
        if "transfer-encoding" in headers:
            return False
        declared = headers.get("content-length", "0")
        return declared.isdigit() and int(declared) <= self.max_bytes


def _has_body(headers: Headers) -> bool:
    return "transfer-encoding" in headers or headers.get("content-length", "0") != "0"
