"""Load on a server, from a process of its own, so that it does not share the server's or the campaign's interpreter.

    asks = [Ask("POST", "/v1/embed/spectrum", body, {"content-type": "application/x-npy"})]
    answers = Traffic(port, Plan(asks, connections=64, seconds=10)).run()              # closed loop
    answers = Traffic(port, Plan(asks, connections=256, seconds=10, rate=50)).run()    # open loop
    traffic = Traffic(port, plan).start(); ...; answers = traffic.stop()               # until told

Closed loop: every connection sends as soon as it was answered. Open loop: requests are due at their times, constant or
Poisson, whether or not earlier ones were answered; one that finds every connection taken waits in the client, and its
latency counts from when it was due.

The client is an asyncio.Protocol that sends prebuilt bytes and reads just enough of HTTP/1.1 (status, length, chunks)
to know where an answer ends: 0.02 to 0.05 ms of a core a request, where a client library takes several times that from
the server beside it (`python -m benchmarks.chaos.traffic` measures it).
"""

from __future__ import annotations

import asyncio
import importlib
import os
import pickle
import random
import resource
import signal
import subprocess
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import uvloop

from benchmarks.chaos.answers import Answers

__all__ = ["Ask", "Check", "Plan", "Traffic"]

HOST = "127.0.0.1"
FAULTS_KEPT = 100
GRACE_S = 1.0  # after the time of the plan, requests at work may finish; the server's own deadline ends them

# (index of the ask, status, head, body) -> what is wrong with the answer, or None.
Check = Callable[[int, int, bytes, bytes], "str | None"]


@dataclass(frozen=True)
class Ask:
    """One kind of request. weight: how often it comes among the asks of a plan.

    drop_after_s: hang up so long after sending, without reading the answer: a client that went away.
    """

    method: str
    path: str
    body: bytes = b""
    headers: Mapping[str, str] = field(default_factory=dict)
    weight: float = 1.0
    drop_after_s: float | None = None

    def bytes(self) -> bytes:
        lines = [f"{self.method} {self.path} HTTP/1.1", f"host: {HOST}"]
        lines += [f"{name}: {value}" for name, value in self.headers.items()]
        if self.body or self.method == "POST":
            lines.append(f"content-length: {len(self.body)}")
        return "\r\n".join([*lines, "", ""]).encode("latin-1") + self.body


@dataclass(frozen=True)
class Plan:
    """What is sent, how and for how long.

    asks:     in turn when all weights are equal, else drawn by weight (by `seed`).
    seconds:  for how long requests are sent; `requests`: at most so many. With neither, until `Traffic.stop`.
    rate:     requests a second, open loop; None is a closed loop.
    arrivals: of an open loop.
    timeout_s: a request without an answer after so long is cut and counted as an error.
    think_s:  pause of a connection between answer and next request (closed loop).
    keep:     bring bodies and heads of the answers home.
    check:    "module:function", a `Check` that judges each answer in the traffic process.
    fresh:    a new connection for each request.
    """

    asks: Sequence[Ask]
    connections: int = 1
    seconds: float | None = None
    requests: int | None = None
    rate: float | None = None
    arrivals: Literal["constant", "poisson"] = "constant"
    timeout_s: float = 60.0
    think_s: float = 0.0
    keep: bool = False
    check: str | None = None
    fresh: bool = False
    seed: int = 0


class Traffic:
    """A plan at work in a process of its own; see the module."""

    def __init__(self, port: int, plan: Plan) -> None:
        self.port, self.plan = port, plan
        self._process: subprocess.Popen[bytes] | None = None
        self._result: list[bytes] = []
        self._reader: threading.Thread | None = None

    def start(self) -> Traffic:
        """Returns once the first request is about to leave."""
        root = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
        path = os.pathsep.join([root, *filter(None, sys.path)])  # where the campaign finds its checks, so do we
        process = self._process = subprocess.Popen(
            [sys.executable, "-c", "from benchmarks.chaos.traffic import _child; _child()"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=root,
            env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
        )
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(pickle.dumps((self.port, self.plan)))
        process.stdin.close()
        out = process.stdout
        out.read(1)
        # Read while it runs: a full pipe would hold up its end.
        self._reader = threading.Thread(target=lambda: self._result.append(out.read()), daemon=True)
        self._reader.start()
        return self

    def wait(self) -> Answers:
        """The answers, when the plan is done."""
        assert self._process is not None and self._reader is not None
        self._reader.join()
        if self._process.wait() != 0:
            raise RuntimeError(f"the traffic process ended with code {self._process.returncode}")
        answers: Answers = pickle.loads(self._result[0])
        return answers

    def stop(self) -> Answers:
        """Send nothing more, let requests at work finish, and return the answers."""
        assert self._process is not None
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
        return self.wait()

    def run(self) -> Answers:
        return self.start().wait()


# --- in the traffic process -------------------------------------------------------------------------------------------


def _child() -> None:
    port, plan = pickle.loads(sys.stdin.buffer.read())
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        answers = runner.run(_Sender(port, plan).run())
    # Where PYTHONUNBUFFERED is set, sys.stdout.buffer is the bare file, which may write less than it is given without
    # a word, and did, interrupted by what uvloop leaves to the kernel; a buffered writer goes on until all is out.
    with open(sys.stdout.fileno(), "wb", closefd=False) as out:
        pickle.dump(answers, out)


class _Sender:
    """Sends the plan and notes the answers."""

    def __init__(self, port: int, plan: Plan) -> None:
        self.port, self.plan = port, plan
        self.payloads = [ask.bytes() for ask in plan.asks]
        self.rows: list[tuple[int, float, float, float, int]] = []
        self.errors: Counter[str] = Counter()
        self.faults: list[str] = []
        self.fault_count = 0
        self.bodies: list[bytes] = []
        self.heads: list[bytes] = []
        self.asked = 0
        self.free: list[_Connection] = []
        self.waiting: deque[tuple[int, float]] = deque()
        self.connections: set[_Connection] = set()
        self.opening = 0
        self.stopping = False
        self.random = random.Random(plan.seed)
        self.check = _imported(plan.check) if plan.check else None
        weights = [ask.weight for ask in plan.asks]
        self.weights = None if len(set(weights)) == 1 else weights

    async def run(self) -> Answers:
        loop = asyncio.get_running_loop()
        self.over = asyncio.Event()
        loop.add_signal_handler(signal.SIGTERM, self.finish)
        if self.plan.rate is None:
            await asyncio.gather(*(self.open() for _ in range(self.plan.connections)))
        else:
            await asyncio.gather(*(self.open() for _ in range(min(self.plan.connections, 32))))
        start_cpu = _cpu()
        sys.stdout.buffer.write(b"!")
        sys.stdout.flush()
        self.started = time.monotonic()
        if self.plan.seconds is not None:
            loop.call_later(self.plan.seconds, self.finish)
        watch = asyncio.ensure_future(self.watch())
        if self.plan.rate is None:
            for connection in list(self.free):
                self.next(connection)
        else:
            await self.arrivals(self.plan.rate)
            self.finish()
        await self.over.wait()
        await self.rest()
        watch.cancel()
        for connection in list(self.connections):
            connection.transport.abort()
        which, due, sent, done, status = zip(*self.rows, strict=True) if self.rows else ((), (), (), (), ())
        return Answers(
            np.array(which, np.int32),
            np.array(due, np.float64),
            np.array(sent, np.float64),
            np.array(done, np.float64),
            np.array(status, np.int16),
            errors=self.errors,
            queued=len(self.waiting),
            faults=tuple(self.faults),
            fault_count=self.fault_count,
            bodies=tuple(self.bodies),
            headers=tuple(self.heads),
            cpu_s=_cpu() - start_cpu,
        )

    def finish(self) -> None:
        self.stopping = True
        self.over.set()

    async def rest(self) -> None:
        """Requests at work may end; those waiting for a connection too, for a moment."""
        limit = time.monotonic() + self.plan.timeout_s + GRACE_S
        while time.monotonic() < limit and (self.waiting or any(c.which >= 0 for c in self.connections)):
            await asyncio.sleep(0.01)

    async def watch(self) -> None:
        """Cut what has taken too long."""
        while True:
            await asyncio.sleep(min(0.25, self.plan.timeout_s / 4))
            now = time.monotonic()
            for connection in list(self.connections):
                if connection.which >= 0 and now - connection.sent > self.plan.timeout_s:
                    connection.fail("timeout")

    def choose(self) -> int:
        if self.weights is None:
            return self.asked % len(self.payloads)
        return self.random.choices(range(len(self.payloads)), self.weights)[0]

    def more(self) -> bool:
        return not self.stopping and (self.plan.requests is None or self.asked < self.plan.requests)

    # -- closed loop

    def next(self, connection: _Connection) -> None:
        """The connection is free: give it what waits, or in a closed loop the next request."""
        if self.waiting:
            which, due = self.waiting.popleft()
            connection.send(which, due)
        elif self.plan.rate is None and self.more():
            which = self.choose()
            self.asked += 1
            if self.plan.think_s:
                asyncio.get_running_loop().call_later(self.plan.think_s, self.after_thinking, connection, which)
            else:
                connection.send(which, None)
        else:
            self.free.append(connection)
            if self.plan.rate is None and not any(c.which >= 0 for c in self.connections) and not self.more():
                self.finish()

    def after_thinking(self, connection: _Connection, which: int) -> None:
        if connection in self.connections and not self.stopping:
            connection.send(which, None)

    # -- open loop

    async def arrivals(self, rate: float) -> None:
        due, start = 0.0, self.started
        while self.more() and (self.plan.seconds is None or due < self.plan.seconds):
            ahead = start + due - time.monotonic()
            if ahead > 0:
                await asyncio.sleep(ahead)
                if not self.more():
                    break
            which = self.choose()
            self.asked += 1
            self.submit(which, start + due)
            if self.asked % 64 == 0:
                await asyncio.sleep(0)  # behind: answers must still be read
            due += self.random.expovariate(rate) if self.plan.arrivals == "poisson" else 1.0 / rate

    def submit(self, which: int, due: float) -> None:
        if self.free:
            self.free.pop().send(which, due)
            return
        self.waiting.append((which, due))
        if len(self.connections) + self.opening < self.plan.connections:
            asyncio.ensure_future(self.open(use=True))

    # -- connections

    async def open(self, use: bool = False) -> None:
        self.opening += 1
        try:
            loop = asyncio.get_running_loop()
            _, connection = await loop.create_connection(lambda: _Connection(self), HOST, self.port)
        except OSError as error:
            self.errors[type(error).__name__] += 1
            if self.waiting:  # it was to carry one of these
                which, due = self.waiting.popleft()
                now = time.monotonic()
                self.rows.append((which, due, now, now, 0))
            if self.plan.rate is None and self.more():
                await asyncio.sleep(0.01)
                asyncio.ensure_future(self.open(use=True))
            return
        finally:
            self.opening -= 1
        self.connections.add(connection)
        if use:
            self.next(connection)
        else:
            self.free.append(connection)

    def lost(self, connection: _Connection) -> None:
        """A connection is gone: another in its place while there is work for it."""
        self.connections.discard(connection)
        if connection in self.free:
            self.free.remove(connection)
        if self.waiting or (self.plan.rate is None and self.more()):
            asyncio.ensure_future(self.open(use=True))
        elif self.plan.rate is None and not self.connections and not self.opening:
            self.finish()

    def note(self, connection: _Connection, status: int, head: bytes, body: bytes) -> None:
        which = connection.which
        self.rows.append((which, connection.due, connection.sent, time.monotonic(), status))
        if self.plan.keep:
            self.bodies.append(body)
            self.heads.append(head)
        if self.check is not None and status:
            fault = self.check(which, status, head, body)
            if fault is not None:
                self.fault_count += 1
                if len(self.faults) < FAULTS_KEPT:
                    self.faults.append(fault)


class _Connection(asyncio.Protocol):
    """One keep-alive connection; one request at a time."""

    transport: asyncio.Transport

    def __init__(self, sender: _Sender) -> None:
        self.sender = sender
        self.which, self.due, self.sent = -1, 0.0, 0.0
        self.buffer = bytearray()
        self.end = -1  # of the answer in `buffer`, once its head was read; -2: chunked
        self.head_end = 0
        self.gone = False

    def connection_made(self, transport: Any) -> None:
        self.transport = transport

    def send(self, which: int, due: float | None) -> None:
        if self.gone:
            self.sender.waiting.appendleft((which, time.monotonic() if due is None else due))
            self.sender.lost(self)
            return
        self.sent = time.monotonic()
        self.which, self.due = which, self.sent if due is None else due
        self.transport.write(self.sender.payloads[which])
        drop = self.sender.plan.asks[which].drop_after_s
        if drop is not None:
            asyncio.get_running_loop().call_later(drop, self.drop, self.sent)

    def drop(self, sent: float) -> None:
        if self.which >= 0 and self.sent == sent:
            self.fail("dropped")

    def data_received(self, data: bytes) -> None:
        buffer = self.buffer
        buffer += data
        if self.end == -1:
            self.head_end = buffer.find(b"\r\n\r\n") + 4
            if self.head_end < 4:
                return
            head = bytes(buffer[: self.head_end]).lower()
            at = head.find(b"\r\ncontent-length:")
            if at >= 0:
                self.end = self.head_end + int(head[at + 17 : head.index(b"\r\n", at + 17)])
            else:
                self.end = -2 if b"\r\ntransfer-encoding: chunked" in head else self.head_end
        if self.end == -2:
            body = _unchunked(buffer, self.head_end)
            if body is not None:
                self.answered(body)
        elif len(buffer) >= self.end:
            self.answered(bytes(buffer[self.head_end : self.end]))

    def answered(self, body: bytes) -> None:
        head = bytes(self.buffer[: self.head_end])
        self.buffer.clear()
        self.end = -1
        if self.which < 0:  # an answer to nothing, as of a server that hangs up on an idle connection
            self.transport.close()
            return
        status = int(head[9:12])
        if 100 <= status < 200:
            return
        self.sender.note(self, status, head, body)
        self.which = -1
        if self.sender.plan.fresh or b"\r\nconnection: close" in head.lower():
            self.gone = True
            self.transport.close()
        else:
            self.sender.next(self)

    def fail(self, why: str) -> None:
        self.sender.errors[why] += 1
        self.sender.note(self, 0, b"", b"")
        self.which = -1
        self.gone = True
        self.transport.abort()

    def connection_lost(self, error: Exception | None) -> None:
        self.gone = True
        if self.which >= 0:
            self.sender.errors[type(error).__name__ if error else "closed"] += 1
            self.sender.note(self, 0, b"", b"")
            self.which = -1
        self.sender.lost(self)


def _unchunked(buffer: bytearray, start: int) -> bytes | None:
    """The body of a chunked answer, None while it is not whole."""
    parts: list[bytes] = []
    while True:
        line = buffer.find(b"\r\n", start)
        if line < 0:
            return None
        size = int(bytes(buffer[start:line]).split(b";")[0], 16)
        stop = line + 2 + size
        if len(buffer) < stop + 2:
            return None
        if size == 0:
            return b"".join(parts)
        parts.append(bytes(buffer[line + 2 : stop]))
        start = stop + 2


def _imported(name: str) -> Check:
    module, _, function = name.partition(":")
    check: Check = getattr(importlib.import_module(module), function)
    return check


def _cpu() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


# --- what the client itself costs -------------------------------------------------------------------------------------


def main() -> None:
    """Ask a server that does nothing; print the client's processor time a request, by size of the body."""
    from benchmarks.chaos.nothing import Nothing

    with Nothing() as port:
        for size in (100, 32_768, 1_000_000):
            asks = [Ask("POST", "/", b"x" * size)]
            answers = Traffic(port, Plan(asks, connections=64, seconds=3.0)).run()
            print({"body": size, **answers.summary()})


if __name__ == "__main__":
    # The child unpickles the plan's classes from this module by its own name, not from __main__.
    importlib.import_module("benchmarks.chaos.traffic").main()
