"""A server that answers every request with the same few bytes: what is left of a measurement is the client."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from pathlib import Path
from types import TracebackType
from typing import Any

__all__ = ["Nothing"]

ANSWER = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}"


class Nothing:
    """`with Nothing() as port:`; in a process of its own."""

    def __enter__(self) -> int:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.chaos.nothing"], cwd=Path(__file__).parents[2], stdout=subprocess.PIPE
        )
        assert self._process.stdout is not None
        return int(self._process.stdout.readline())

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.wait()


class _Answering(asyncio.Protocol):
    def __init__(self) -> None:
        self.missing = -1  # bytes of the body still to come
        self.head = b""

    def connection_made(self, transport: Any) -> None:
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        if self.missing < 0:
            self.head += data
            end = self.head.find(b"\r\n\r\n")
            if end < 0:
                return
            at = self.head.lower().find(b"content-length:", 0, end)
            length = int(self.head[at + 15 : self.head.index(b"\r\n", at)]) if at >= 0 else 0
            self.missing = length - (len(self.head) - end - 4)
        else:
            self.missing -= len(data)
        if self.missing <= 0:
            self.missing, self.head = -1, b""
            self.transport.write(ANSWER)


async def _serve() -> None:
    server = await asyncio.get_running_loop().create_server(_Answering, "127.0.0.1", 0)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(_serve())
