"""Readiness that ends when it should, and a stop that loses nothing."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import numpy as np
import pytest
from starlette.testclient import TestClient
from survey import npy

from astroclip.errors import NotReadyError
from service.app import make_app
from service.canary import canary
from service.connections import allow_files
from service.engine import Engine
from service.life import Drain, Life
from service.settings import Settings

ROOT = Path(__file__).parents[2]


@pytest.fixture
def fresh(settings) -> Engine:
    engine = Engine.load(settings)
    yield engine
    engine.close()


def test_readiness_ends_first_and_answers_close_their_connections(settings, engine):
    app = make_app(settings, engine)
    with TestClient(app) as client:
        assert client.get("/readyz").status_code == 200
        assert "connection" not in client.get("/livez").headers
        app.state.life.stop()
        answer = client.get("/readyz")
        assert answer.status_code == 503 and answer.json()["error"]["code"] == "stopping"
        assert answer.headers["retry-after"]
        still = client.get("/v1/objects/sim-00000010")
        assert still.status_code == 200 and still.headers["connection"] == "close"


def test_a_worker_that_hangs_ends_readiness_in_time(fresh, settings, monkeypatch):
    quick = Settings(**{**settings.model_dump(), "ready_timeout_s": 0.2, "canary_interval_s": 0})
    app = make_app(quick, Engine(fresh.embedder, fresh.index, quick, fresh.workers))
    with TestClient(app) as client:
        assert client.get("/readyz").status_code == 200
        real = fresh.embedder.encode
        monkeypatch.setattr(fresh.embedder, "encode", lambda grids: time.sleep(1.0) or real(grids))
        start = time.perf_counter()
        assert client.get("/readyz").status_code == 503
        assert time.perf_counter() - start < 0.9


def test_a_model_that_fails_ends_readiness_and_one_that_works_again_restores_it(fresh, settings, galaxy, monkeypatch):
    def broken(grids):
        raise RuntimeError("device lost")

    with TestClient(make_app(settings, fresh)) as client:
        assert client.get("/readyz").status_code == 200
        with monkeypatch.context() as patch:
            patch.setattr(fresh.embedder, "encode", broken)
            assert client.get("/readyz").status_code == 200  # it answered a moment ago
            for _ in range(fresh.settings.max_worker_failures):
                answer = client.post("/v1/embed/image", content=npy(galaxy.pixels))
                # not the file's fault, and not said to be: it may be sent again
                assert answer.status_code == 503 and answer.headers["retry-after"]
            assert "failed in a row" in fresh.workers.problem() and not len(fresh.workers.quarantine)
            answer = client.get("/readyz")
            assert answer.status_code == 503 and "failed in a row" in answer.json()["error"]["message"]
        assert client.get("/readyz").status_code == 200


def test_inputs_that_make_the_model_fail_do_not_end_readiness(fresh, settings, galaxy, monkeypatch):
    """One client's three bad files in a quiet hour must not take the service off its balancer."""
    real = fresh.embedder.encode
    bodies = [npy(np.roll(galaxy.pixels, n, axis=1)) for n in range(fresh.settings.max_worker_failures)]
    good = fresh.embedder.prepare(canary("image")).pixels

    def picky(grids):
        if hasattr(grids[0], "pixels") and not all(np.array_equal(grid.pixels, good) for grid in grids):
            raise RuntimeError("device-side assert")
        return real(grids)

    with TestClient(make_app(settings, fresh)) as client:
        monkeypatch.setattr(fresh.embedder, "encode", picky)
        for body in bodies:
            answer = client.post("/v1/embed/image", content=body)
            assert answer.status_code == 422 and answer.json()["error"]["code"] == "no_embedding"
            assert fresh.workers.problem() is None
        assert client.get("/readyz").status_code == 200


def test_what_is_cut_gets_503_and_what_has_begun_does_not(settings):
    """The middleware alone: one request at work without an answer, one in the middle of its answer."""

    async def test() -> None:
        from service.trace import Trace

        life = Life()

        async def silent(scope, receive, send):
            await asyncio.sleep(60)

        async def begun(scope, receive, send):
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await asyncio.sleep(60)

        outcomes = []
        for app in (silent, begun):
            sent: list[dict] = []

            async def send(message, sent=sent):
                sent.append(message)

            scope = {"type": "http", "method": "GET", "headers": [], "state": {"trace": Trace()}}
            outcomes.append((asyncio.create_task(Drain(app, life)(scope, None, send)), sent))
        await asyncio.sleep(0.01)
        life.stop()
        assert life.cut() == 2
        (first, sent), (second, other) = outcomes
        await first
        assert sent[0]["status"] == 503 and (b"connection", b"close") in sent[0]["headers"]
        with pytest.raises(asyncio.CancelledError):
            await second
        assert len(other) == 1 and not life.at_work

    asyncio.run(test())


def test_warm_up_asks_every_modality_in_small_batches_and_a_full_one(fresh, settings, monkeypatch):
    seen = []
    real = fresh.embedder.encode
    monkeypatch.setattr(fresh.embedder, "encode", lambda g: seen.append((type(g[0]).__name__, len(g))) or real(g))
    with TestClient(make_app(settings, fresh)):
        pass
    sizes = {*range(1, 17), settings.encode_batch}
    assert settings.encode_batch > 16
    assert {(kind, size) for kind in ("GridImage", "GridSpectrum") for size in sizes} <= set(seen)


# --- a real process --------------------------------------------------------------------------------------------------


def started(index: Path, model: Path, fault: str = "", **settings) -> tuple[subprocess.Popen, int]:
    """A server that answers, and its port. fault: statements run before."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {f"ASTROCLIP_{name.upper()}": str(value) for name, value in settings.items()}
    process = subprocess.Popen(
        [sys.executable, "-c", f"{fault}\nfrom astroclip.cli import main; main()", "serve", "--index", str(index)]
        + ["--model", str(model), "--port", str(port)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment},
        stderr=subprocess.PIPE,
        text=True,
    )
    for _ in range(1200):
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/readyz", timeout=5):
                return process, port
        except OSError:
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.05)
    raise AssertionError("never ready")


def test_sigterm_serves_what_was_accepted_and_ends_with_0(index_dir, tiny_model_dir):
    """One connection is half way through its head when the signal comes, one is in the accept queue or just accepted,
    one is idle; the first two are answered, the third is closed."""
    process, port = started(index_dir, tiny_model_dir, drain_delay_s=0.3)
    try:
        half, idle = (socket.create_connection(("127.0.0.1", port), timeout=20) for _ in range(2))
        idle.sendall(b"GET /livez HTTP/1.1\r\nhost: x\r\n\r\n")
        said = b""
        while not said.endswith(b"}"):
            said += idle.recv(4096)
        assert b" 200 " in said
        half.sendall(b"GET /v1/objects/sim-00000010 HTTP/1.1\r\nhost: x\r\n")
        time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        late = socket.create_connection(("127.0.0.1", port), timeout=20)  # within the delay
        late.sendall(b"GET /readyz HTTP/1.1\r\nhost: x\r\n\r\n")
        answer = late.recv(4096)
        assert b" 503 " in answer and b"connection: close" in answer.lower()
        assert idle.recv(4096) == b""  # closed once it was quiet
        time.sleep(0.5)
        with pytest.raises(OSError):
            socket.create_connection(("127.0.0.1", port), timeout=5)
        half.sendall(b"\r\n")
        answer = half.recv(65536)
        assert b" 200 " in answer and b"connection: close" in answer.lower()
        assert process.wait(20) == 0
    finally:
        process.kill()
        process.communicate()


def test_what_does_not_end_gets_503_and_a_second_signal_ends_it_at_once(index_dir, tiny_model_dir):
    process, port = started(index_dir, tiny_model_dir, drain_delay_s=0, drain_timeout_s=0.5)
    try:
        slow = socket.create_connection(("127.0.0.1", port), timeout=20)
        slow.sendall(b"POST /v1/embed/spectrum HTTP/1.1\r\nhost: x\r\ncontent-length: 1000\r\n\r\n")
        time.sleep(0.2)
        process.send_signal(signal.SIGTERM)
        answer = b""
        while piece := slow.recv(4096):
            answer += piece
        assert b" 503 " in answer and b"stopping" in answer
        assert process.wait(20) == 0
    finally:
        process.kill()
        process.communicate()
    process, port = started(index_dir, tiny_model_dir, drain_delay_s=0, drain_timeout_s=60)
    try:
        slow = socket.create_connection(("127.0.0.1", port), timeout=20)
        slow.sendall(b"POST /v1/embed/spectrum HTTP/1.1\r\nhost: x\r\ncontent-length: 1000\r\n\r\n")
        time.sleep(0.2)
        process.send_signal(signal.SIGTERM)
        time.sleep(1.0)
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        assert process.wait(10) == 128 + signal.SIGINT
    finally:
        process.kill()
        process.communicate()


def test_a_signal_does_not_wait_for_a_thread_that_reads_an_index(index_dir, tiny_model_dir):
    """Minutes for a large one, for ever on a file server that is away."""
    fault = "import time, service.swap; service.swap._load = lambda *_: time.sleep(120)"
    process, _ = started(index_dir, tiny_model_dir, fault, drain_delay_s=0, drain_timeout_s=1)
    try:
        process.send_signal(signal.SIGHUP)
        time.sleep(0.5)
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0
    finally:
        process.kill()
        process.communicate()


def test_a_start_that_fails_ends_what_it_started(settings, monkeypatch):
    closed = []
    close = Engine.close

    async def not_warm(engine):
        raise NotReadyError("The model does not answer.")

    monkeypatch.setattr("service.app.warm_up", not_warm)
    monkeypatch.setattr(Engine, "close", lambda engine: closed.append(1) or close(engine))
    app = make_app(settings.model_copy(update={"model_process": False}))
    with pytest.raises(NotReadyError), TestClient(app):
        pass
    assert closed == [1]


@pytest.mark.parametrize(
    ("now", "most", "becomes", "warned"),  # for 500 connections, which want 1,256
    [
        (1024, 524288, 1256, False),
        (1024, -1, 1256, False),
        (1256, 1256, None, False),
        (-1, -1, None, False),
        (256, 1000, 1000, True),
        (256, 256, 256, True),
    ],
)
def test_as_many_files_may_be_open_as_connections_want(monkeypatch, caplog, now, most, becomes, warned):
    given = []
    monkeypatch.setattr("resource.getrlimit", lambda which: (now, most))
    monkeypatch.setattr("resource.setrlimit", lambda which, limits: given.append(limits))
    allow_files(500)
    assert given == ([] if becomes is None else [(becomes, most)])
    assert (f"max_connections to at most {((becomes or 0) - 256) // 2}" in caplog.text) == warned
