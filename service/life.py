"""Starting and stopping: warm before ready; on SIGTERM readiness off, then finish what was accepted, then end with 0.

    SIGTERM --> /readyz 503, answers say `connection: close`, connections still accepted     drain_delay_s
            --> no more connections; those in the accept queue are taken                      at once
            --> requests at work, or arriving on a connection there is, are finished          drain_timeout_s
            --> 503 to the rest, workers ended, exit code 0                                    a few seconds

What uvicorn does by itself loses requests: it closes idle connections at once, also those on which a request has
arrived that it has not read yet, and drops those the kernel has accepted and it has not. Here a connection is closed
when its answer has said so, or when nothing has come on it for a while and nothing is in its socket. A second signal
ends it at once. Exit code 0 after SIGTERM and SIGINT (128 + signal when forced): it did what it was told.

The server listens when model and index are loaded and warm, so that a port that answers is a service that answers, and
a model or index that cannot be served ends the start with its message. A start that takes minutes (checksums of a large
index) is what startup probes are for.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import logging
import os
import signal
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import TYPE_CHECKING, Any

import uvicorn
from fastapi import FastAPI
from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from astroclip.errors import NotReadyError
from service.canary import canary
from service.connections import allow_files, connection_options
from service.errors import from_astroclip
from service.settings import Settings
from service.trace import Trace

if TYPE_CHECKING:
    from service.engine import Engine

__all__ = ["Drain", "DrainingServer", "Life", "serve", "warm_up"]

log = logging.getLogger("astroclip.service")

_QUIET_S = 0.5  # an idle connection is closed when no request came on it for so long after the last was accepted
_SO_ATTACH_FILTER = 26  # asm-generic/socket.h; Python has no name for it
_CUT_S = 2.0  # for the 503s to be written
_CLOSE_S = 8.0  # for all threads to end; one at work cannot be interrupted
_SMALL = 16  # batches up to which one that is the first of its size takes notably longer; all of them take 2 s
_STOPPING = "The service is stopping. Try again in a few seconds; another one may answer."


class Life:
    """Whether the service is stopping, and what is at work. One an application: `app.state.life`."""

    def __init__(self) -> None:
        self.stopping_since: float | None = None
        self.at_work: set[asyncio.Task[Any]] = set()
        self.cutting = False

    @property
    def stopping(self) -> bool:
        return self.stopping_since is not None

    def stop(self) -> None:
        """Readiness off, connections to be closed by their answers. May be called from a signal handler."""
        if self.stopping_since is None:
            self.stopping_since = time.monotonic()

    def check(self) -> None:
        """Raises NotReadyError when the service is stopping."""
        if self.stopping:
            raise NotReadyError(_STOPPING, code="stopping")

    def cut(self) -> int:
        """Answer what is at work with 503 now; how many requests that were."""
        self.cutting = True
        for task in self.at_work:
            task.cancel()
        return len(self.at_work)


class Drain:
    """ASGI middleware of `Life`; inside TraceMiddleware, outside all else."""

    def __init__(self, app: ASGIApp, life: Life) -> None:
        self.app, self.life = app, life

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        life, started = self.life, False

        async def send_closing(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                if life.stopping:
                    MutableHeaders(scope=message)["connection"] = "close"
            await send(message)

        task = asyncio.current_task()
        assert task is not None
        life.at_work.add(task)
        try:
            await self.app(scope, receive, send_closing)
        except asyncio.CancelledError:
            if not life.cutting or started:
                raise
            task.uncancel()
            trace: Trace = scope["state"]["trace"]
            response = from_astroclip(NotReadyError(_STOPPING, code="stopping"), trace.request_id)
            await response(scope, receive, send_closing)
        finally:
            life.at_work.discard(task)


class DrainingServer(uvicorn.Server):
    """uvicorn's server with another end; see the module. `exit_code` is what the process should end with."""

    def __init__(self, config: uvicorn.Config, life: Life, settings: Settings) -> None:
        super().__init__(config)
        self._life, self._settings = life, settings
        self.exit_code = 0
        self.served = threading.Event()  # set when all connections are closed

    # -- signals -----------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """As uvicorn's, but not raised again at the end: the process ends with 0 when it did as it was told."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self.handle_exit) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self._life.stopping:
            self.should_exit = self.force_exit = True
            self.exit_code = 128 + sig
        self._life.stop()

    async def on_tick(self, counter: int) -> bool:
        since = self._life.stopping_since
        if since is not None and time.monotonic() - since >= self._settings.drain_delay_s:
            self.should_exit = True
        return await super().on_tick(counter)

    # -- the end -----------------------------------------------------------------------------------------------------

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._life.stop()
        log.info("stopping: %d requests at work", len(self._life.at_work))
        await self._stop_listening()
        quiet_at = time.monotonic() + _QUIET_S
        end = time.monotonic() + self._settings.drain_timeout_s
        while self.server_state.connections and not self.force_exit and time.monotonic() < end:
            if time.monotonic() >= quiet_at:
                self._close_idle()
            await asyncio.sleep(0.02)
        if self.server_state.connections and not self.force_exit:
            cut = self._life.cut()
            log.warning("%d requests were not finished in %g s and get 503", cut, self._settings.drain_timeout_s)
            end = time.monotonic() + _CUT_S
            while self._life.at_work and time.monotonic() < end:
                await asyncio.sleep(0.02)
        for connection in list(self.server_state.connections):
            connection.transport.close()
        self.served.set()
        if not self.force_exit:
            await self.lifespan.shutdown()

    async def _stop_listening(self) -> None:
        """Close the listening sockets; connections that the kernel accepted meanwhile are served, not reset.

        First the kernel is told to take no more: between an empty accept queue and the close of its socket lies a turn
        of Python's lock, milliseconds under load, and what the kernel accepts in it is reset (seen once in 100 stops).
        Over a network, a handshake whose last packet is under way then still fails; that is what the delay is for.
        """
        loop = asyncio.get_running_loop()
        for server in self.servers:
            for listening in server.sockets:
                loop.remove_reader(listening.fileno())
                _accept_no_more(listening)
        # asyncio accepts in one turn of its loop and makes the connection in a later one, which fails once its server
        # is closed: these turns come first.
        await asyncio.sleep(0.02)
        twins = [socket.socket(fileno=os.dup(s.fileno())) for server in self.servers for s in server.sockets]
        for server in self.servers:
            server.close()  # asyncio looks no more; the twins keep the port
        accepted: list[socket.socket] = []
        for twin in twins:
            twin.setblocking(False)
            with contextlib.suppress(OSError):  # BlockingIOError: the queue is empty
                while True:
                    accepted.append(twin.accept()[0])
            twin.close()
        for connection in accepted:
            connection.setblocking(False)
            await loop.connect_accepted_socket(self._protocol, connection, ssl=self.config.ssl)

    def _protocol(self) -> asyncio.Protocol:
        make: Any = self.config.http_protocol_class
        protocol: asyncio.Protocol = make(
            config=self.config, server_state=self.server_state, app_state=self.lifespan.state
        )
        return protocol

    def _close_idle(self) -> None:
        connection: Any  # `service.connections.BoundedProtocol`
        for connection in list(self.server_state.connections):
            if connection.idle:
                connection.transport.close()


def _accept_no_more(listening: Any) -> None:
    """Have Linux drop every packet to a listening socket (a filter of one instruction, `ret 0`; see socket(7)): who
    connects now hears nothing, tries again a second later, and is refused then. Connections there are do not notice."""
    instruction = ctypes.create_string_buffer(struct.pack("HBBI", 0x06, 0, 0, 0))
    program = struct.pack("HP", 1, ctypes.addressof(instruction))
    with contextlib.suppress(OSError):  # another system, or forbidden: then those few milliseconds remain
        listening.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, program)


def serve(app: FastAPI, settings: Settings, close: Callable[[], None]) -> int:
    """Serve until a signal; the exit code. close: ends the engine; what has not ended a few seconds after the last
    answer ends with the process (the call does not return then)."""
    config = uvicorn.Config(
        app,
        host=settings.host,
        port=settings.port,
        log_config=None,  # `service.logs` did it
        access_log=False,  # the access line is ours
        server_header=False,
        **connection_options(settings, app.state.metrics.rejected),
    )
    allow_files(settings.max_connections)
    server = DrainingServer(config, app.state.life, settings)
    ended = threading.Event()
    threading.Thread(target=_end_in_time, args=(server, ended), daemon=True).start()
    try:
        server.run()
    finally:
        server.served.set()
        close()
        ended.set()
    return server.exit_code


def _end_in_time(server: DrainingServer, ended: threading.Event) -> None:
    """Once nobody is served any more, end the process with threads that are still at work: those of an event loop are
    waited for without bound, and one may be reading a new index, or wait for a file server that is away."""
    server.served.wait()
    if not ended.wait(0.0 if server.force_exit else _CLOSE_S):
        if not server.force_exit:
            log.warning("threads are still busy; the process ends without them")
        logging.shutdown()
        os._exit(server.exit_code)


async def warm_up(engine: Engine) -> None:
    """First calls are slow: have the model answer for every modality, in small batches and a full one, and the index
    once.

    Torch makes and keeps kernels for every size of a batch, and takes memory for the largest: on the CPU a first
    spectrum of a size takes 10 ms longer and leaves 0.4 MB of machine code behind. Searching touches every vector and
    builds what is built at first use. Raises NotReadyError where one does not answer.
    """
    trace, most = Trace(), engine.settings.encode_batch
    start = time.perf_counter()
    for modality in engine.embedder.modalities:
        grid = await engine.workers.decode(trace, engine.embedder.prepare, canary(modality))
        for size in (most, *range(1, min(_SMALL, most - 1) + 1)):  # what the largest let go of serves the others
            await engine.encode(trace, [grid] * size, modality)
    await engine.check(now=True)
    log.info("warm after %.1f s", time.perf_counter() - start)
