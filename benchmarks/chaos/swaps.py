"""Swaps of the index under load: no request fails, no answer is of two versions, and memory comes back.

    python -m benchmarks.chaos.swaps [--swaps 100] [--objects 20000] [--out benchmarks/results/swaps.json]

Two versions of one index hold different objects (aaa-..., bbb-...). While clients search by vectors, estimate and
look objects up without a pause, CURRENT is turned from one to the other; SIGHUP and the watcher take turns to notice.
An answer is **mixed** unless the manifest it names, and every object in it, belong to one version. An **error** is
any status but 200 (429 is counted apart), or none. Memory is the server's resident set a moment after the last swap,
against that after the first ten, both of the same version and with the load paused.
"""

from __future__ import annotations

import argparse
import asyncio
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
from benchmarks.chaos.toy import DIM, parts, tiny_model
from training.evaluate.report import provenance, write_json

SHORT = ("--swaps", "6")  # for a run of a minute or two
SEED = 9
CONNECTIONS = 6
WARM = 10  # swaps before memory is first measured: caches and pools are full then
WATCH_S = 0.1


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--swaps", type=int, default=100)
    parser.add_argument("--objects", type=int, default=20_000)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/swaps.json"))
    arguments = parser.parse_args()
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        report = campaign(Path(folder), arguments.swaps, arguments.objects)
    write_json(arguments.out, {"kind": "swaps", **provenance(seed=SEED, started=started), **report})
    print(report["marks"])
    return 1 if failed(report["marks"]) else 0


def campaign(folder: Path, swaps: int, objects: int) -> dict[str, Any]:
    import service.app
    import service.life  # noqa: F401  (children are forked from a parent that has imported what they use)
    from astroclip.embed import Embedder  # noqa: F401

    versions: dict[str, str] = forked(lambda: _prepare(folder, objects), 600.0)
    port = free_port()
    server = Child(lambda: _serve(folder, port))
    clients = Child(lambda: asyncio.run(_Load(folder, port, server.pid, versions).run(swaps)))
    found = clients.wait(1200.0).value
    code = server.wait(60.0).code
    if found is None:
        raise RuntimeError("the clients failed")
    grown = found["rss_mb"][-1] / found["rss_mb"][0] - 1.0
    marks = {
        "swaps": {"found": found["swaps"], "wanted": swaps, "passed": found["swaps"] == swaps},
        "errors": {"found": len(found["errors"]), "wanted": 0, "passed": not found["errors"]},
        "mixed answers": {"found": len(found["mixed"]), "wanted": 0, "passed": not found["mixed"]},
        "memory grown": {"found": grown, "wanted": "<= 0.05", "passed": grown <= 0.05},
        "exit code": {"found": code, "wanted": 0, "passed": code == 0},
    }
    return {"marks": marks, "objects": objects, **found}


def _prepare(folder: Path, objects: int) -> dict[str, str]:
    """Build both versions; {manifest digest: prefix of its objects}."""
    from index import BuildOptions, build_index
    from index.manifest import MANIFEST, sha256_file

    sha256 = tiny_model(folder / "model")
    out = {}
    for number, prefix in enumerate(("aaa", "bbb")):
        parts(folder / prefix, objects, prefix=prefix, seed=number, sha256=sha256, per_part=objects)
        built = build_index(folder / prefix, folder / "index", survey="Toy", options=BuildOptions(heads="never"))
        out[sha256_file(built / MANIFEST)] = prefix
    return out


def _serve(folder: Path, port: int) -> None:
    from service.app import make_app
    from service.engine import Engine
    from service.life import serve
    from service.settings import Settings

    settings = Settings(
        index_dir=folder / "index", model_dir=folder / "model", port=port, log_level="error", encode_batch=8,
        watch_index_s=WATCH_S, drain_delay_s=0.0,
    )  # fmt: skip
    app = make_app(settings, engine=Engine.load(settings))  # the application alone holds the engine, as it is swapped
    sys.exit(serve(app, settings, lambda: app.state.engine.close()))


class _Load:
    """The clients, and who turns CURRENT."""

    def __init__(self, folder: Path, port: int, server: int, versions: dict[str, str]) -> None:
        self.root, self.port, self.server, self.versions = folder / "index", port, server, versions
        self.errors: list[str] = []
        self.mixed: list[str] = []
        self.statuses: Counter[str] = Counter()
        self.answers: Counter[str] = Counter()
        self.go = asyncio.Event()
        self.over = False
        self.idle = 0
        self.rng = np.random.default_rng(SEED)

    async def run(self, swaps: int) -> dict[str, Any]:
        await self._until(None)
        self.go.set()
        clients = [asyncio.create_task(self._client()) for _ in range(CONNECTIONS)]
        names = sorted(path.name for path in (self.root / "versions").iterdir())
        rss: list[float] = []
        taken: list[float] = []
        done = 0
        for number in range(swaps):
            name = names[number % 2]  # v2 is current at first
            (self.root / ".turn").symlink_to(Path("versions") / name)
            os.replace(self.root / ".turn", self.root / "CURRENT")
            start = time.monotonic()
            if number % 2:
                os.kill(self.server, signal.SIGHUP)
            await self._until(self.root / "versions" / name)
            taken.append(time.monotonic() - start)
            done += 1
            await asyncio.sleep(0.05)
            if done == min(WARM, swaps - swaps % 2 - 2) or done == swaps:
                rss.append(await self._rss())
        self.over = True
        self.go.set()
        await asyncio.gather(*clients)
        os.kill(self.server, signal.SIGTERM)
        return {
            "swaps": done,
            "answers": dict(self.answers),
            "statuses": dict(self.statuses),
            "errors": self.errors[:20],
            "mixed": self.mixed[:20],
            "rss_mb": rss,
            "swap_s": {"median": float(np.median(taken)), "most": max(taken)},
        }

    async def _rss(self) -> float:
        self.go.clear()
        await asyncio.sleep(1.5)
        text = Path(f"/proc/{self.server}/status").read_text()
        self.go.set()
        return int(text.split("VmRSS:")[1].split()[0]) / 1024

    async def _until(self, version: Path | None) -> None:
        """Wait until /readyz says 200 (and names the version)."""
        from index.manifest import MANIFEST, sha256_file

        wanted = sha256_file(version / MANIFEST) if version else None
        for _ in range(3000):
            try:
                status, answer = await self._ask(None, b"GET /readyz HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
            except OSError:
                status = "refused"
            if status == "200" and wanted in (None, answer["index"]["manifest_sha256"]):
                return
            await asyncio.sleep(0.02)
        raise RuntimeError(f"the server never served {version}")

    async def _client(self) -> None:
        streams = await asyncio.open_connection("127.0.0.1", self.port)
        while not self.over:
            await self.go.wait()
            kind, payload = self._request()
            try:
                status, answer = await self._ask(streams, payload)
            except (OSError, asyncio.IncompleteReadError, TimeoutError) as error:
                self.errors.append(f"{kind}: {error!r}")
                streams = await asyncio.open_connection("127.0.0.1", self.port)
                continue
            self.statuses[status] += 1
            if status != "200":
                if status != "429":
                    self.errors.append(f"{kind}: {status} {str(answer)[:200]}")
                continue
            self.answers[kind] += 1
            self._judge(kind, answer)
        streams[1].close()

    def _judge(self, kind: str, answer: dict[str, Any]) -> None:
        prefix = self.versions.get(answer["index"]["manifest_sha256"])
        ids = [entry["object_id"] for entry in answer.get("hits") or answer.get("objects") or []]
        if prefix is None or not ids or any(not i.startswith(prefix) for i in ids):
            self.mixed.append(f"{kind}: {answer['index']['manifest_sha256'][:12]} ({prefix}): {ids[:5]}")

    def _request(self) -> tuple[str, bytes]:
        turn = int(self.rng.integers(4))
        if turn == 0:
            return "objects", b"GET /v1/objects?random=5 HTTP/1.1\r\nhost: x\r\n\r\n"
        vector = self.rng.standard_normal(DIM).tolist()
        query: dict[str, Any] = {"query": {"vector": vector, "modality": "image"}, "k": 8}
        if turn == 1:
            query["target"] = "either"
            query["filter"] = {"column": "redshift", "range": [0.1, 0.9]}
        path = "estimate" if turn == 2 else "search"
        body = json.dumps({"target": "spectrum", **query}).encode()
        head = (
            f"POST /v1/{path} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n"
        )
        return path, head.encode() + b"\r\n" + body

    async def _ask(
        self, streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None, payload: bytes
    ) -> tuple[str, dict[str, Any]]:
        reader, writer = streams or await asyncio.open_connection("127.0.0.1", self.port)
        writer.write(payload)
        head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 60)
        length = next(int(x.split(b":")[1]) for x in head.lower().split(b"\r\n") if x.startswith(b"content-length:"))
        body = await reader.readexactly(length)
        if streams is None:
            writer.close()
        return head[9:12].decode(), json.loads(body)


if __name__ == "__main__":
    raise SystemExit(main())
