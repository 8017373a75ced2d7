"""Mutated bodies through the application: no crash, no 5xx, the right shape of every error, no time and memory lost.

    python -m benchmarks.chaos.fuzz [--count 200000] [--wire 4000] [--workers 2] [--short]

`mutations` makes the cases. Most go straight into the ASGI application, in child processes that keep the cases at
work in a mapped file: when one dies, the parent finds the culprits there, keeps them (--keep), and starts the next.
--wire sends further ones over HTTP to a real server. Memory is the resident set after a collection and a trim of
malloc's heap; it may grow by 50 MB between the end of the warm-up (the largest files the service takes, then the first
tenth) and the end.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import contextlib
import ctypes
import gc
import hashlib
import heapq
import http.client
import json
import mmap
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.chaos.campaign import SEED, UNBOUNDED, mark, object_ids, parser, report
from benchmarks.chaos.mutations import Case, cases, largest
from benchmarks.chaos.server import ROOT, Server

__all__ = ["fault", "main", "ask"]

LANES = 8  # cases at work at once in a child: enough that the model's batches are worth having
ROOM = 2**20  # bytes of one case in the mapped file
SLOW_S = 10.0  # a case that takes longer counts as hung; the machine may be busy
ERROR_KEYS = {"code", "message", "field", "limit", "request_id"}
STATUSES = {200, 400, 404, 405, 409, 413, 415, 422, 429}


def main() -> int:
    arguments = options().parse_args()
    if arguments.child is not None:
        return asyncio.run(child(arguments))
    started = time.perf_counter()
    count, wire = (4_000, 300) if arguments.short else (arguments.count, arguments.wire)
    children = [Parent(arguments, i, count // arguments.workers) for i in range(arguments.workers)]
    while any(c.running() for c in children):
        time.sleep(0.2)
    found = [r for c in children for r in c.reports]
    statuses: Counter[str] = sum((Counter(r["statuses"]) for r in found), Counter())
    codes: Counter[str] = sum((Counter(r["codes"]) for r in found), Counter())
    faults = [f for r in found for f in r["faults"]]
    crashes = [c for parent in children for c in parent.crashes]
    over_wire: dict[str, Any] = (
        on_the_wire(arguments, wire) if wire else {"sent": 0, "failures": 0, "faults": [], "growth_mb": 0.0}
    )
    sent = sum(r["sent"] for r in found)
    marks = {
        "mutated bodies sent": mark(sent + over_wire["sent"], count + wire, "least"),
        "crashes": mark(len(crashes), 0, "most"),
        "5xx answers": mark(
            sum(n for s, n in statuses.items() if s.startswith("5")) + over_wire["failures"], 0, "most"
        ),
        "wrong answers": mark(len(faults) + len(over_wire["faults"]), 0, "most"),
        "growth of memory, MB": mark(max([r["growth_mb"] for r in found] + [over_wire["growth_mb"]]), 50.0, "most"),
        "slowest case, s": mark(max((r["slowest"][0]["seconds"] for r in found), default=None), SLOW_S, "most"),
    }
    results = {
        "seed": SEED,
        "in_process": {
            "sent": sent,
            "cases_per_s": round(sum(r["sent"] / r["seconds"] for r in found), 1),
            "statuses": dict(statuses.most_common()),
            "codes": dict(codes.most_common()),
            "memory_mb": [r["memory_mb"] for r in found],  # after each tenth
            "mapped_mb": [r["mapped_mb"] for r in found],  # of these, pages of files
            "slowest": heapq.nlargest(10, (s for r in found for s in r["slowest"]), key=lambda s: s["seconds"]),
        },
        "wire": over_wire,
        "crashes": crashes,
        "faults": faults[:50],
    }
    return report(arguments.out, "fuzz", started, marks, results)


def options() -> argparse.ArgumentParser:
    made = parser(__doc__, "fuzz")
    made.add_argument("--count", type=int, default=200_000, help="cases in process")
    made.add_argument("--wire", type=int, default=4_000, help="cases over HTTP")
    made.add_argument("--workers", type=int, default=2, help="child processes")
    made.add_argument("--seed", type=int, default=SEED)
    made.add_argument("--keep", type=Path, help="folder for the cases that failed")
    made.add_argument("--child", type=int, help=argparse.SUPPRESS)
    made.add_argument("--room", type=Path, help=argparse.SUPPRESS)
    return made


# --- the parent ---


class Parent:
    """Keeps one child at work until its share is sent; a child that dies or stands still is replaced."""

    def __init__(self, arguments: argparse.Namespace, number: int, share: int) -> None:
        self.arguments, self.seed, self.left = arguments, arguments.seed * 1000 + 100 * number, share
        self.reports: list[dict[str, Any]] = []
        self.crashes: list[dict[str, Any]] = []
        self.folder = tempfile.TemporaryDirectory(prefix="astroclip-fuzz-")
        self.room, self.out = Path(self.folder.name) / "room", Path(self.folder.name) / "report.json"
        self._start()

    def _start(self) -> None:
        self.room.write_bytes(b"\0" * (LANES * ROOM + 8))
        self.out.unlink(missing_ok=True)
        words = ["-m", "benchmarks.chaos.fuzz", "--child", str(self.seed), "--count", str(self.left)]
        words += ["--room", str(self.room), "--out", str(self.out)]
        for name in ("index", "model", "keep"):
            if (value := getattr(self.arguments, name)) is not None:
                words += [f"--{name}", str(value)]
        # As in the image: with glibc's arena for every thread, files of all sizes leave 50 to 100 MB of holes, once.
        one = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "MALLOC_ARENA_MAX": "2"}
        self.process = subprocess.Popen([sys.executable, *words], cwd=ROOT, env={**os.environ, **one})
        self.seen, self.moved = b"", time.monotonic()

    def running(self) -> bool:
        code = self.process.poll()
        if code is None:
            now = self.room.read_bytes()[-8:]
            if now != self.seen:
                self.seen, self.moved = now, time.monotonic()
            elif time.monotonic() - self.moved > 120:  # includes the start of the child
                self.process.send_signal(signal.SIGABRT)
            return True
        if self.out.exists():
            self.reports.append(json.loads(self.out.read_text()))
            self.out.unlink()
            self.left = 0
        elif self.left > 0:
            done = int.from_bytes(self.room.read_bytes()[-8:], "little")
            self.crashes.append({"exit": code, "seed": self.seed, "after": done, "cases": self._culprits()})
            self.left, self.seed = max(0, self.left - done), self.seed + 1
            if self.left and len(self.crashes) < 20:
                self._start()
                return True
            self.left = 0
        return False

    def _culprits(self) -> list[dict[str, Any]]:
        """The cases that were at work."""
        data = self.room.read_bytes()
        found = []
        for i in range(LANES):
            text = data[i * ROOM : (i + 1) * ROOM].partition(b"\0")[0]
            if text:
                case = json.loads(text)
                keep(self.arguments.keep, base64.b64decode(case["body"]), "crash")
                found.append({**case, "body": case["body"][:200]})
        return found


def keep(folder: Path | None, body: bytes, why: str) -> str:
    name = f"{why}-{hashlib.sha256(body).hexdigest()[:12]}"
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(body)
    return name


# --- the child ---


async def child(arguments: argparse.Namespace) -> int:
    from service.app import make_app
    from service.engine import Engine
    from service.settings import Settings

    given = {"index_dir": arguments.index, "model_dir": arguments.model}
    bounds = {**UNBOUNDED, "max_wait_s": 60.0, "deadline_s": 120.0}  # nothing is to be refused for being slow
    bounds = {name: value for name, value in bounds.items() if name in Settings.model_fields}
    chosen: dict[str, Any] = {**{k: v for k, v in given.items() if v is not None}, **bounds}
    settings = Settings(**chosen)
    engine = Engine.load(settings)
    app = make_app(settings, engine)
    with arguments.room.open("r+b") as file, mmap.mmap(file.fileno(), 0) as room:
        result = await campaign(app, arguments, room)
    engine.close()
    arguments.out.write_text(json.dumps(result))
    return 0


async def campaign(app: Any, arguments: argparse.Namespace, room: mmap.mmap) -> dict[str, Any]:
    index = app.state.engine.index
    ids, dim = tuple(index.catalog.take([10, 11, 12, 13], ["object_id"]).column(0).to_pylist()), index.dim
    stream: Iterator[Case] = cases(arguments.child, arguments.count, ids, dim)
    statuses: Counter[str] = Counter()
    codes: Counter[str] = Counter()
    faults: list[dict[str, Any]] = []
    slowest: list[dict[str, Any]] = []
    sent, started = 0, time.perf_counter()

    async def lane(number: int, until: int) -> None:
        nonlocal sent
        while sent < until and (case := next(stream, None)) is not None:
            sent += 1
            _save(room, number, case, sent)
            status, headers, body = await ask(app, case)
            seconds = (float(headers.get("x-decode-time", 0)) + float(headers.get("x-search-time", 0))) / 1000
            statuses[str(status)] += 1
            wrong = fault(status, headers, body)
            if status != 200:
                with contextlib.suppress(ValueError, KeyError, TypeError):
                    codes[json.loads(body)["error"]["code"]] += 1
            if wrong or seconds > SLOW_S:
                name = keep(arguments.keep, case.body, "wrong" if wrong else "slow")
                where = {"path": case.path, "query": case.query[:100], "type": case.content_type, "origin": case.origin}
                faults.append({"why": wrong or "slow", "status": status, "kept": name, **where})
            note = {"seconds": round(seconds, 3), "origin": case.origin, "status": status, "bytes": len(case.body)}
            slowest.append(note)
            if len(slowest) > 500:
                slowest[:] = heapq.nlargest(10, slowest, key=lambda n: n["seconds"])

    for case in largest(ids, dim):  # what the service needs at most belongs to its warm-up
        status, _, body = await ask(app, case)
        if status != 200 and not (status == 422 and b'"method"' in case.body):  # an index may have no heads
            raise RuntimeError(f"{case.origin} was answered {status}: {body[:200]!r}")
    curve, mapped = [], []
    for tenth in range(1, 11):
        await asyncio.gather(*(lane(i, arguments.count * tenth // 10) for i in range(LANES)))
        curve.append(round(memory_mb(), 1))
        mapped.append(round(mapped_mb(), 1))
    baseline, end = curve[0], curve[-1]
    return {
        "sent": sent,
        "seconds": time.perf_counter() - started,
        "statuses": statuses,
        "codes": codes,
        "faults": faults,
        "slowest": heapq.nlargest(10, slowest, key=lambda n: n["seconds"]),
        "memory_mb": curve,
        "mapped_mb": mapped,
        "growth_mb": round(end - baseline, 1),
    }


def _save(room: mmap.mmap, number: int, case: Case, sent: int) -> None:
    text = json.dumps({**vars(case), "body": base64.b64encode(case.body).decode()}).encode()[: ROOM - 1]
    room[number * ROOM : number * ROOM + len(text) + 1] = text + b"\0"
    room[-8:] = sent.to_bytes(8, "little")


async def ask(app: Any, case: Case) -> tuple[int, dict[str, str], bytes]:
    """Status, headers and body of one case, asked without a server. What the application raises is raised."""
    scope = {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.4"},
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": case.path,
        "raw_path": case.path.encode(),
        "query_string": case.query.encode("utf-8", "replace"),
        "root_path": "",
        "headers": [
            (b"host", b"test"),
            (b"content-type", case.content_type.encode("latin-1", "replace")),
            (b"content-length", str(len(case.body)).encode()),
        ],
        "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 80),
    }
    pieces = [case.body[i : i + 65536] for i in range(0, len(case.body), 65536)] or [b""]
    answer: list[Any] = []

    async def receive() -> dict[str, Any]:
        if not pieces:
            await asyncio.sleep(3600)  # the client waits
        piece = pieces.pop(0)
        return {"type": "http.request", "body": piece, "more_body": bool(pieces)}

    async def send(message: Any) -> None:
        answer.append(message)

    await app(scope, receive, send)
    headers = {k.decode("latin-1"): v.decode("latin-1") for k, v in answer[0]["headers"]}
    return answer[0]["status"], headers, b"".join(m.get("body", b"") for m in answer[1:])


def fault(status: int, headers: dict[str, str], body: bytes) -> str | None:
    """What is wrong with an answer, None when it is right."""
    if status not in STATUSES:
        return f"status {status}"
    if not headers.get("content-type", "").startswith("application/json"):
        return None if status == 200 else f"an error of type {headers.get('content-type')}"
    try:
        answer = json.loads(body, parse_constant=_no_number)
    except ValueError as error:
        return f"an answer that is no JSON: {error}"
    if status == 200:
        return None
    said = answer.get("error") if isinstance(answer, dict) else None
    if not isinstance(said, dict) or set(said) != ERROR_KEYS or set(answer) != {"error"}:
        return "an error of another shape"
    if not (isinstance(said["code"], str) and said["code"] and isinstance(said["message"], str) and said["message"]):
        return "an error without code or message"
    if len(said["message"]) > 700 or "Traceback" in said["message"]:
        return "an error with a message of another kind"
    return None


def _no_number(word: str) -> None:
    raise ValueError(f"{word} is not JSON")


def memory_mb() -> float:
    """Resident memory of this process once Python's garbage is collected and malloc's free pages are given back."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    words = Path("/proc/self/statm").read_text().split()
    return int(words[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


def mapped_mb() -> float:
    """What of the resident memory are pages of files: libraries, and the index as far as it was looked at."""
    return int(Path("/proc/self/statm").read_text().split()[2]) * os.sysconf("SC_PAGE_SIZE") / 1e6


# --- over HTTP ---


def on_the_wire(arguments: argparse.Namespace, count: int) -> dict[str, Any]:
    """The same over a socket, one after the other on a kept connection."""
    statuses: Counter[str] = Counter()
    faults: list[dict[str, Any]] = []
    with Server(index=arguments.index, model=arguments.model, settings=dict(UNBOUNDED)) as server:
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
        baseline, ids = 0, tuple(object_ids(server, 4))
        for i, case in enumerate(cases(arguments.seed + 7, count, ids)):
            try:
                path = case.path + (f"?{case.query}" if case.query else "")
                kind = case.content_type if case.content_type.isascii() else "text/plain"
                connection.request("POST", path, case.body, {"content-type": kind})
                answer = connection.getresponse()
                body, headers = answer.read(), {k.lower(): v for k, v in answer.getheaders()}
            except (http.client.HTTPException, OSError) as error:
                faults.append(
                    {"why": f"{type(error).__name__}: {error}", "kept": keep(arguments.keep, case.body, "wire")}
                )
                connection.close()
                if not server.alive:
                    break
                continue
            statuses[str(answer.status)] += 1
            if (wrong := fault(answer.status, headers, body)) is not None:
                faults.append({"why": wrong, "path": path[:200], "kept": keep(arguments.keep, case.body, "wire")})
            if i == count // 10:
                baseline = server.rss_bytes()
        growth = (server.rss_bytes() - baseline) / 1e6 if server.alive else float("nan")
    failures = sum(n for s, n in statuses.items() if s.startswith("5"))
    return {
        "sent": sum(statuses.values()),
        "statuses": dict(statuses.most_common()),
        "failures": failures,
        "faults": faults[:50],
        "growth_mb": round(growth, 1),
    }


if __name__ == "__main__":
    sys.exit(main())
