"""Bodies of requests that are answered before they have come: over a real socket, as only a server shows it."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
import time

import httpx2
import pytest
import uvicorn

from service.app import make_app
from service.keys import changing, new_key
from service.unread import UnreadBody

LIMIT = 400_000
CHUNK = b"4000\r\n" + b"x" * 0x4000 + b"\r\n"


@pytest.fixture(scope="module")
def address(settings, engine, tmp_path_factory):
    path = tmp_path_factory.mktemp("keys") / "keys.json"
    with changing(path) as held:
        held.append(new_key(["read"])[1])
    app = make_app(settings.model_copy(update={"keys_file": path, "max_body_bytes": LIMIT}), engine)
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="critical"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield server.servers[0].sockets[0].getsockname()
    server.should_exit = True
    thread.join()


@pytest.mark.parametrize(
    "call", ["POST /v1/embed/image", "POST /nowhere", "GET /livez", "POST /", "OPTIONS /v1/search"]
)
def test_endless_upload_is_answered_and_cut(address, call):
    with socket.create_connection(address, timeout=20) as connection:
        connection.sendall(f"{call} HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n".encode())
        sent, started = 0, time.monotonic()
        with contextlib.suppress(ConnectionError):
            while sent < 200 * LIMIT:
                connection.sendall(CHUNK)
                sent += 0x4000
        assert sent < 100 * LIMIT and time.monotonic() - started < 10  # the kernel's buffers hold some megabytes
        with contextlib.suppress(ConnectionError):
            assert connection.recv(4096).startswith(b"HTTP/1.1 ")


def test_upload_declared_endless_is_cut_too(address):
    with socket.create_connection(address, timeout=20) as connection:
        connection.sendall(b"POST /v1/search HTTP/1.1\r\nhost: x\r\ncontent-length: 99999999999\r\n\r\n")
        answer = connection.recv(4096)
        assert answer.startswith(b"HTTP/1.1 401") and b"connection: close" in answer.lower()
        with pytest.raises(ConnectionError):
            for _ in range(5000):
                connection.sendall(b"x" * 0x4000)


@pytest.mark.parametrize("size", [0, 10, LIMIT, LIMIT + 1])
def test_answer_reaches_who_sends_a_body_with_an_end(address, size):
    url = f"http://{address[0]}:{address[1]}/v1/embed/image"
    with httpx2.Client() as client:
        for content in (b"x" * size, iter([b"x" * size])):  # declared, then chunked
            answer = client.post(url, content=content)
            assert answer.status_code == 401 and answer.json()["error"]["code"] == "key_missing"
        kept = client.post(url, content=b"x" * min(size, LIMIT))
        assert "connection" not in kept.headers  # refused, and the connection may be used again


@pytest.mark.parametrize(("says", "left"), [("close", 0), ("keep-alive", 3)])
def test_who_is_refused_with_a_closing_answer_can_send_the_rest(says, left):
    """Closing on what is unread would reset the connection; one that stays open is the server's to read."""
    pieces, sent = [b"x"] * 3, []

    async def refuses(scope, receive, send):
        headers = [(b"connection", says.encode())]
        await send({"type": "http.response.start", "status": 429, "headers": headers})
        await send({"type": "http.response.body", "body": b"no"})

    async def receive():
        return {"type": "http.request", "body": pieces.pop(), "more_body": bool(pieces)}

    async def send(message):
        sent.append((message, len(pieces)))

    scope = {"type": "http", "headers": [(b"content-length", b"3")]}
    asyncio.run(UnreadBody(refuses, max_bytes=LIMIT)(scope, receive, send))
    assert b"".join(message.get("body", b"") for message, _ in sent) == b"no"
    last, unread = sent[-1]
    assert not last.get("more_body") and unread == left
