"""The service without a server: an ASGI application as the transport of the synchronous client.

httpx2 runs ASGI applications for its async client only; here an event loop in a thread of its own bridges the two.
"""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import httpx2

__all__ = ["InProcessTransport"]


class InProcessTransport(httpx2.BaseTransport):
    """`Client(transport=InProcessTransport(app))`; the application's lifespan is its owner's business."""

    def __init__(self, app: Any) -> None:
        self._inner = httpx2.ASGITransport(app)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="in-process-service", daemon=True)
        self._thread.start()

    def handle_request(self, request: httpx2.Request) -> httpx2.Response:
        return asyncio.run_coroutine_threadsafe(self._handle(request), self._loop).result()

    async def _handle(self, request: httpx2.Request) -> httpx2.Response:
        whole = httpx2.Request(request.method, request.url, headers=request.headers, content=request.read())
        answer = await self._inner.handle_async_request(whole)
        content = await answer.aread()
        return httpx2.Response(answer.status_code, headers=answer.headers, content=content)

    def close(self) -> None:
        if self._loop.is_running():
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._loop.close()
