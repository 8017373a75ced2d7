"""Limits that must bind before any parser runs: the size of a body, its time, the bytes of all bodies together.

Plain ASGI. The bytes are counted as they arrive, because Content-Length may be absent (chunked bodies) or
wrong, and because a multipart parser spools a whole file before the handler sees it.
"""

from __future__ import annotations

import asyncio
import time

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from astroclip.errors import AstroClipError, LimitError, OverloadError
from service.errors import MalformedRequest, from_astroclip

__all__ = ["BodyLimit"]


class BodyLimit:
    """413 as soon as a body passes `max_bytes`; 400 when it has not arrived within `timeout_s`; 429 while the bodies
    of all requests at work hold `max_total_bytes`."""

    def __init__(self, app: ASGIApp, max_bytes: int, timeout_s: float, max_total_bytes: int) -> None:
        self.app = app
        self.max_bytes = max_bytes
        self.timeout_s = timeout_s
        self.max_total_bytes = max_total_bytes
        self.total = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        declared = Headers(scope=scope).get("content-length", "")
        if declared.isdigit() and int(declared) > self.max_bytes:
            await self._refuse(self._too_large(f"{int(declared):,}"), scope, receive, send)
            return
        size, complete = 0, False
        refusal: LimitError | MalformedRequest | OverloadError | None = None
        deadline = time.monotonic() + self.timeout_s

        async def counted() -> Message:
            nonlocal size, complete, refusal
            if complete:  # only a disconnect can follow, and it may take as long as the work does
                return await receive()
            try:
                message = await asyncio.wait_for(receive(), deadline - time.monotonic())
            except TimeoutError:
                refusal = too_slow = self._too_slow()
                raise too_slow from None
            arrived = len(message.get("body", b""))
            size += arrived
            self.total += arrived
            complete = not message.get("more_body", False)
            if size > self.max_bytes:
                refusal = too_large = self._too_large(f"more than {self.max_bytes:,}")
                raise too_large
            if self.total > self.max_total_bytes and self.total > size:  # one alone is bounded by max_bytes
                refusal = too_much = self._too_much()
                raise too_much
            return message

        async def unless_refused(message: Message) -> None:
            if refusal is None:  # else the answer is ours, whatever the parser made of the exception
                await send(message)

        try:
            await self.app(scope, counted, unless_refused)
        except (LimitError, MalformedRequest, OverloadError):
            if refusal is None:
                raise
        finally:
            self.total -= size
        if refusal is not None:
            await self._refuse(refusal, scope, receive, send)

    def _too_slow(self) -> MalformedRequest:
        return MalformedRequest(
            f"The request body had not arrived {self.timeout_s:g} s after the request began. Send it faster.",
            code="body_timeout",
            limit=self.timeout_s,
        )

    def _too_large(self, found: str) -> LimitError:
        return LimitError(
            f"The request body holds {found} bytes; at most {self.max_bytes:,} are accepted. "
            "Send fewer files in a request, or cut the file down to the object wanted.",
            code="body_too_large",
            limit=self.max_bytes,
        )

    def _too_much(self) -> OverloadError:
        return OverloadError(
            f"The bodies of the requests at work hold {self.total:,} bytes; at most {self.max_total_bytes:,} are held "
            "at once. Try again in 1 s.",
            retry_after_s=1.0,
        )

    async def _refuse(self, error: AstroClipError, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer at once; what still comes of the body is `service.unread`'s."""
        response = from_astroclip(error, scope["state"]["trace"].request_id)
        response.headers["connection"] = "close"
        await response(scope, receive, send)
