"""SIGTERM to a real server under load, again and again: no request that it accepted is lost, and it ends with 0.

    python -m benchmarks.chaos.shutdown [--rounds 100] [--out benchmarks/results/shutdown.json]

A server is started, loaded by clients of three kinds (keep-alive connections that ask again at once, connections made
for one request each, keep-alive connections that pause), and told to stop at a random moment; half of the rounds with
no `drain_delay_s`, half with 0.3 s. Requests are searches, lookups and uploaded spectra.

**Accepted** is a request whose connection the client's connect() made, on which the server had not said `connection:
close` nor closed (as far as the client could read before it sent), and whose bytes were all handed to the kernel. It
is **lost** unless a whole HTTP answer comes back, be it 200, 429 or 503; answers that are not 200 are counted apart.
Only a refused connect() counts as not accepted: also a connection in the kernel's queue that the server never saw is
one.

The server is forked from a process that has imported everything, so a start takes a second instead of ten.
"""

from __future__ import annotations

import argparse
import asyncio
import io
import json
import os
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.chaos.campaign import failed
from benchmarks.chaos.forks import Child, forked
from benchmarks.chaos.server import free_port
from benchmarks.chaos.toy import parts, tiny_model
from training.evaluate.report import provenance, write_json

SHORT = ("--rounds", "6")  # for a run of a minute or two
SEED = 8
STEADY, FRESH, PAUSING = 8, 4, 8  # connections of each kind
DELAYS = (0.0, 0.3)
OBJECTS = 400


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/shutdown.json"))
    arguments = parser.parse_args()
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        report = campaign(Path(folder), arguments.rounds)
    write_json(arguments.out, {"kind": "shutdown", **provenance(seed=SEED, started=started), **report})
    print(report["marks"])
    return 1 if failed(report["marks"]) else 0


def campaign(folder: Path, rounds: int) -> dict[str, Any]:
    import service.app
    import service.life  # noqa: F401  (children are forked from a parent that has imported what they use)
    from astroclip.embed import Embedder  # noqa: F401

    forked(lambda: _prepare(folder))
    rng = np.random.default_rng(SEED)
    results = []
    for number in range(rounds):
        delay = DELAYS[number % len(DELAYS)]
        results.append(_round(folder, delay, float(rng.uniform(0.2, 0.8))))
        if results[-1]["lost"] or results[-1]["exit_code"]:
            print(number, results[-1], flush=True)
    total = {
        key: sum(result[key] for result in results) for key in ("answered", "lost", "refused", "at_term", "after_term")
    }
    statuses: Counter[str] = Counter()
    for result in results:
        statuses.update(result["statuses"])
    odd = sum(count for status, count in statuses.items() if status not in ("200", "429", "503"))
    bad = [result["exit_code"] for result in results if result["exit_code"]]
    seen = [result["unready_seen"] for result in results if result["delay_s"]]
    marks = {
        "SIGTERMs": {"found": len(results), "wanted": rounds, "passed": len(results) == rounds},
        "accepted requests lost": {"found": total["lost"], "wanted": 0, "passed": not total["lost"]},
        "exit codes other than 0": {"found": len(bad), "wanted": 0, "passed": not bad},
        "answers other than 200, 429, 503": {"found": odd, "wanted": 0, "passed": not odd},
        "readiness off while connections are accepted": {
            "found": sum(seen), "wanted": len(seen), "passed": sum(seen) == len(seen),
        },
    }  # fmt: skip
    ends = [result["end_s"] for result in results]
    return {
        "marks": marks,
        **total,
        "statuses": dict(statuses),
        "end_s": {"median": float(np.median(ends)), "most": max(ends)},
        "rounds": results,
    }


def _prepare(folder: Path) -> None:
    from index import build_index

    sha256 = tiny_model(folder / "model")
    parts(folder / "parts", OBJECTS, prefix="obj", seed=1, sha256=sha256)
    build_index(folder / "parts", folder / "index", survey="Toy")


def _serve(folder: Path, port: int, delay_s: float) -> None:
    from service.app import make_app
    from service.engine import Engine
    from service.life import serve
    from service.settings import Settings

    os.environ["OMP_NUM_THREADS"] = "1"
    settings = Settings(
        index_dir=folder / "index", model_dir=folder / "model", port=port, drain_delay_s=delay_s, log_level="error",
        encode_batch=8,
    )  # fmt: skip
    engine = Engine.load(settings)
    sys.exit(serve(make_app(settings, engine), settings, engine.close))


def _round(folder: Path, delay_s: float, load_s: float) -> dict[str, Any]:
    port = free_port()
    server = Child(lambda: _serve(folder, port, delay_s))
    clients = Child(lambda: asyncio.run(_Load(port).run(server.pid, load_s, delay_s)))
    found = clients.wait(60.0)
    outcome = server.wait(60.0)
    value = found.value or {"lost": -1}
    return {"delay_s": delay_s, "exit_code": outcome.code, **value}


class _Load:
    """The clients of one round."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.requests = _requests()
        self.statuses: Counter[str] = Counter()
        self.lost: list[str] = []
        self.refused = self.at_work = self.after = 0
        self.term: float | None = None
        self.rng = np.random.default_rng(port)

    async def run(self, server: int, load_s: float, delay_s: float) -> dict[str, Any]:
        await self._ready()
        kinds = [(True, 0.0)] * STEADY + [(False, 0.0)] * FRESH + [(True, 0.05)] * PAUSING
        clients = [asyncio.create_task(self._client(keep, pause)) for keep, pause in kinds]
        await asyncio.sleep(load_s)
        at_term, self.term = self.at_work, time.monotonic()
        os.kill(server, signal.SIGTERM)
        unready = await self._unready() if delay_s else False
        await asyncio.gather(*clients)
        end_s = time.monotonic() - self.term
        return {
            "answered": self.statuses.total(),
            "lost": len(self.lost),
            "how": self.lost[:5],
            "refused": self.refused,
            "at_term": at_term,
            "after_term": self.after,
            "statuses": dict(self.statuses),
            "unready_seen": unready,
            "end_s": round(end_s, 3),
        }

    async def _ready(self) -> None:
        for _ in range(600):
            try:
                reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
            except OSError:
                await asyncio.sleep(0.05)
                continue
            writer.write(b"GET /readyz HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
            ready = b" 200 " in await reader.readline()
            writer.close()
            if ready:
                return
        raise RuntimeError("the server was not ready")

    async def _unready(self) -> bool:
        """Whether a new connection is told 503 by /readyz."""
        try:
            reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
            writer.write(b"GET /readyz HTTP/1.1\r\nhost: x\r\n\r\n")
            line = await reader.readline()
            writer.close()
        except OSError:
            return False
        return b" 503 " in line

    async def _client(self, keep: bool, pause_s: float) -> None:
        """Ask until a connection is refused."""
        while True:
            try:
                reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
            except OSError:
                self.refused += 1
                return
            while True:
                if pause_s:
                    await asyncio.sleep(float(self.rng.exponential(pause_s)))
                if reader.at_eof():  # as every connection pool looks before it uses one again
                    break
                payload = self.requests[int(self.rng.integers(len(self.requests)))]
                self.at_work += 1
                closes = await self._ask(reader, writer, payload)
                self.at_work -= 1
                if closes or not keep:
                    break
            writer.close()

    async def _ask(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, payload: bytes) -> bool:
        """One request; whether the connection is at its end."""
        sent = time.monotonic()
        try:
            writer.write(payload)
            await writer.drain()
        except OSError:
            return True  # not all of it was taken: not accepted
        try:
            head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 30)
            lines = head.lower().split(b"\r\n")
            length = next(int(line.split(b":")[1]) for line in lines if line.startswith(b"content-length:"))
            await asyncio.wait_for(reader.readexactly(length), 30)
        except (OSError, asyncio.IncompleteReadError, TimeoutError, StopIteration) as error:
            after = "before SIGTERM" if self.term is None else f"{sent - self.term:+.4f} s from SIGTERM"
            self.lost.append(f"{error!r}, sent {after}, {payload[:40]!r}")
            return True
        self.statuses[head[9:12].decode()] += 1
        self.after += self.term is not None
        return b"connection: close" in lines


def _requests() -> list[bytes]:
    from service.canary import canary_spectrum

    spectrum = canary_spectrum()
    stream = io.BytesIO()
    np.save(stream, np.stack([spectrum.wave, spectrum.flux, spectrum.ivar]).astype(np.float32))
    search = [
        json.dumps({"query": {"object_id": f"obj-{i:06d}"}, "target": "either", "k": 5}).encode() for i in range(8)
    ]
    asks = [_post("/v1/search", "application/json", body) for body in search]
    asks += [_post("/v1/embed/spectrum", "application/x-npy", stream.getvalue())] * 4
    asks += [b"GET /v1/objects/obj-000010 HTTP/1.1\r\nhost: x\r\n\r\n"] * 4
    return asks


def _post(path: str, media_type: str, body: bytes) -> bytes:
    head = f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-type: {media_type}\r\ncontent-length: {len(body)}\r\n\r\n"
    return head.encode() + body


if __name__ == "__main__":
    raise SystemExit(main())
