"""Heads that are slow, long or meant to smuggle, and readers that do not read: over sockets, against uvicorn."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from collections.abc import Iterator

import pytest
import uvicorn

from service.connections import connection_options
from service.settings import Settings

GET = b"GET / HTTP/1.1\r\nHost: a\r\n"
POST = b"POST / HTTP/1.1\r\nHost: a\r\n"
LARGE = 50_000_000
STALL_S, KEEP_S, MOST_AHEAD = 0.3, 1, 20
SERVERS: list[uvicorn.Server] = []
REFUSED: list[str] = []


async def app(scope, receive, send) -> None:  # type: ignore[no-untyped-def]
    """Reads the body (but for /early), answers 200; /large with more than any buffer holds, /stall when idle times end
    unseen, /slow and /slower after a while, /echo with the body, /headers with those it got, /until-it-lies-there until
    the socket takes no more."""
    if scope["type"] == "lifespan":
        return
    sent, more = b"", scope["path"] != "/early"
    while more:
        message = await receive()
        sent, more = sent + message.get("body", b""), message.get("more_body", False)
    await asyncio.sleep({"/slow": 0.2, "/slower": 1.5 * KEEP_S}.get(scope["path"], 0.0))
    if scope["path"] == "/stall":
        time.sleep(STALL_S)  # the whole loop
        for connection in list(SERVERS[0].server_state.connections):
            if connection.cycle and connection.cycle.response_complete:
                connection.timeout_keep_alive_handler()
    body = b"x" * LARGE if scope["path"] == "/large" else b"ok"
    if scope["path"] == "/echo":
        body = sent
    if scope["path"] == "/headers":
        body = repr(scope["headers"]).encode()
    if scope["path"] == "/until-it-lies-there":
        await until_it_lies_there(send, scope["client"])
        return
    headers = [(b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body})


async def until_it_lies_there(send, client) -> None:  # type: ignore[no-untyped-def]
    """A complete answer, the last of it in the buffer of the connection, which does not wait for it yet."""
    (connection,) = (one for one in SERVERS[0].server_state.connections if one.client == tuple(client))
    await send({"type": "http.response.start", "status": 200, "headers": []})
    while not connection.transport.get_write_buffer_size():
        await send({"type": "http.response.body", "body": b"x" * 4096, "more_body": True})
    assert not connection.flow.write_paused
    await send({"type": "http.response.body", "body": b""})


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    settings = Settings(
        head_timeout_s=0.4,
        write_timeout_s=0.4,
        keep_alive_s=KEEP_S,
        max_head_bytes=2048,
        max_pipelined=MOST_AHEAD,
        max_connections=20,
    )
    listening = socket.socket()
    listening.bind(("127.0.0.1", 0))
    config = uvicorn.Config(app, lifespan="off", log_level="critical", **connection_options(settings, REFUSED.append))
    server = uvicorn.Server(config)
    SERVERS[:] = [server]

    def run() -> None:
        with asyncio.Runner(loop_factory=config.get_loop_factory()) as runner:  # uvloop, as in service
            runner.run(server.serve([listening]))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield listening.getsockname()[1]
    server.should_exit = True
    thread.join(10)


def answer(port: int, data: bytes, wait: float = 5.0) -> tuple[int, float]:
    """(status, seconds) of the first answer; status 0 when the connection was closed without one."""
    start = time.monotonic()
    with socket.create_connection(("127.0.0.1", port), wait) as connection:
        connection.sendall(data)
        found = b""
        while b"\r\n" not in found and (piece := connection.recv(4096)):
            found += piece
    return (int(found.split(b" ")[1]) if found else 0), time.monotonic() - start


def padded(length: int) -> bytes:
    """A request whose head is `length` bytes."""
    return GET + b"X: ".ljust(length - len(GET) - 4, b"a") + b"\r\n\r\n"


def test_head_just_below_and_just_above(port: int) -> None:
    assert answer(port, padded(2000))[0] == 200
    assert answer(port, padded(2200))[0] == 431
    assert answer(port, GET + b"X: " + b"a" * 5000)[0] == 431  # and no end of it in sight
    assert answer(port, b"GET /?" + b"a" * 3000 + b" HTTP/1.1\r\nHost: a\r\n\r\n")[0] == 431


@pytest.mark.parametrize("data", [b"", b"G", GET, GET + b"X: a"])
def test_slow_head(port: int, data: bytes) -> None:
    status, seconds = answer(port, data)
    assert status == 408 and 0.3 < seconds < 3


def test_slow_second_head_on_a_kept_connection(port: int) -> None:
    with socket.create_connection(("127.0.0.1", port), 5) as connection:
        connection.sendall(GET + b"\r\n")
        found = b""
        while not found.endswith(b"ok"):  # head and body may come in two pieces
            found += connection.recv(4096)
        assert found.startswith(b"HTTP/1.1 200")
        time.sleep(0.6)  # idle, which is uvicorn's to bound
        connection.sendall(GET)
        start = time.monotonic()
        assert connection.recv(4096).startswith(b"HTTP/1.1 408")
        assert 0.3 < time.monotonic() - start < 3


def test_an_idle_connection_is_closed(port: int) -> None:
    with socket.create_connection(("127.0.0.1", port), 5) as connection:
        connection.sendall(GET + b"\r\n")
        start, found = time.monotonic(), b""
        while piece := connection.recv(4096):
            found += piece
        assert found.endswith(b"ok") and KEEP_S - 0.1 < time.monotonic() - start < KEEP_S + 2


def test_a_request_that_came_before_the_end_of_its_idle_time_was_noticed_is_answered(port: int) -> None:
    with (
        socket.create_connection(("127.0.0.1", port), 5) as asking,
        socket.create_connection(("127.0.0.1", port), 5) as idle,
        socket.create_connection(("127.0.0.1", port), 5) as other,
    ):
        for connection in (asking, idle):
            connection.sendall(GET + b"\r\n")
            while not connection.recv(4096).endswith(b"ok"):
                pass
        other.sendall(GET.replace(b"/", b"/stall", 1) + b"\r\n")
        time.sleep(STALL_S / 2)
        asking.sendall(GET + b"\r\n")
        assert asking.recv(4096).startswith(b"HTTP/1.1 200")
        assert idle.recv(4096) == b""


def test_a_head_that_comes_in_pieces_is_fine(port: int) -> None:
    with socket.create_connection(("127.0.0.1", port), 5) as connection:
        for piece in (GET[:9], GET[9:], b"\r\n"):
            connection.sendall(piece)
            time.sleep(0.05)
        assert connection.recv(4096).startswith(b"HTTP/1.1 200")


def test_a_body_is_not_held_to_the_time_of_a_head(port: int) -> None:
    with socket.create_connection(("127.0.0.1", port), 5) as connection:
        connection.sendall(POST + b"Content-Length: 2\r\n\r\na")
        time.sleep(0.8)
        connection.sendall(b"b")
        assert connection.recv(4096).startswith(b"HTTP/1.1 200")


def test_who_does_not_read_is_cut_off(port: int) -> None:
    with socket.create_connection(("127.0.0.1", port), 5) as connection:
        connection.sendall(b"GET /large HTTP/1.1\r\nHost: a\r\n\r\n")
        time.sleep(1.5)
        got = 0
        try:
            while piece := connection.recv(2**20):
                got += len(piece)
        except ConnectionError:
            pass
        assert got < LARGE


def test_who_reads_gets_all(port: int) -> None:
    with socket.create_connection(("127.0.0.1", port), 5) as connection:
        connection.sendall(b"GET /large HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")
        got = 0
        while piece := connection.recv(2**20):
            got += len(piece)
        assert got > LARGE


@pytest.mark.parametrize(
    "head",
    [
        b"Content-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"Transfer-Encoding: chunked\r\nContent-Length: 4\r\n\r\n0\r\n\r\n",
        b"Content-Length: 5\r\nContent-Length: 6\r\n\r\nabcdef",
        b"Content-Length: -5\r\n\r\n",
        b"Content-Length: 5x\r\n\r\nabcde",
        b"Content-Length : 5\r\n\r\nabcde",
        b"Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n",
        b"Transfer-Encoding: chunked\r\n\r\nzz\r\nabc",
        b"Transfer-Encoding: chunked\r\n\r\n" + b"f" * 17 + b"\r\nabc",
        b"X: a\0b\r\n\r\n",
        b"X: a\r\n b\r\n\r\n",
    ],
    ids=lambda head: head[:40].decode().replace("\r\n", " ").replace("\0", "0"),
)
def test_what_smuggling_lives_from(port: int, head: bytes) -> None:
    assert answer(port, POST + head)[0] == 400


def test_the_connection_too_many_is_refused_and_those_there_are_served_on(port: int) -> None:
    crowd = [socket.create_connection(("127.0.0.1", port), 5) for _ in range(20)]
    try:
        with socket.create_connection(("127.0.0.1", port), 5) as surplus:
            crowd[3].sendall(GET + b"\r\n")
            assert crowd[3].recv(4096).startswith(b"HTTP/1.1 200")
            surplus.sendall(GET + b"\r\n")
            status, body = read_whole(surplus)
    finally:
        for one in crowd:
            one.close()
    error = json.loads(body)["error"]
    assert status == 503 and error["code"] == "too_many_connections" and error["limit"] == 20
    assert "too_many_connections" in REFUSED
    time.sleep(0.2)
    assert answer(port, GET + b"\r\n")[0] == 200


def test_who_is_refused_does_not_stay(port: int) -> None:
    """Not even one who says nothing: the files of those refused are bounded, too."""
    crowd = [socket.create_connection(("127.0.0.1", port), 5) for _ in range(60)]
    try:
        time.sleep(1.5)
        assert len(SERVERS[0].server_state.connections) <= 20
    finally:
        for one in crowd:
            one.close()
    time.sleep(0.2)


def read_whole(connection: socket.socket) -> tuple[int, bytes]:
    """(status, body) of an answer after which the server hangs up."""
    found = b""
    while piece := connection.recv(4096):
        found += piece
    head, _, body = found.partition(b"\r\n\r\n")
    assert b"connection: close" in head and b"content-length: %d" % len(body) in head
    return int(found.split(b" ")[1]), body


@pytest.mark.parametrize(
    ("data", "status", "code"),
    [
        (GET, 408, "head_timeout"),
        (GET + b"X: " + b"a" * 5000, 431, "head_too_large"),
        (padded(2200), 431, "head_too_large"),
        (POST + b"Content-Length: 9\r\nX: " + b"a" * 2100 + b"\r\n\r\nnine byte", 431, "head_too_large"),
        (padded(2200) + padded(300), 431, "head_too_large"),
    ],
)
def test_what_never_became_a_request_is_refused_in_the_one_shape(port: int, data: bytes, status: int, code: str):
    with socket.create_connection(("127.0.0.1", port), 5) as connection:
        connection.sendall(data)
        found, body = read_whole(connection)
    error = json.loads(body)["error"]
    assert found == status and error["code"] == code and len(error["request_id"]) == 26
    assert set(error) == {"code", "message", "field", "limit", "request_id"}


def test_who_reads_slowly_gets_all(port: int) -> None:
    """Longer than a client may read nothing, and at every look some more of it is gone."""
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 16)
        connection.settimeout(5)
        connection.connect(("127.0.0.1", port))
        connection.sendall(b"GET /large HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")
        got, start = 0, time.monotonic()
        while piece := connection.recv(2**18):
            got += len(piece)
            if time.monotonic() - start < 1.2:  # three times the time in which something must be read
                time.sleep(0.02)
        assert got > LARGE and time.monotonic() - start > 1.2


# --- what is neither head nor body, and requests sent ahead ----------------------------------------------------------


def everything(connection: socket.socket) -> bytes:
    """What comes until the server hangs up."""
    found = b""
    try:
        while piece := connection.recv(65536):
            found += piece
    except ConnectionError:
        pass
    return found


@pytest.mark.parametrize(("count", "answers", "refusals"), [(MOST_AHEAD + 1, MOST_AHEAD + 1, 0), (300, None, 1)])
def test_requests_sent_ahead(port: int, count: int, answers: int | None, refusals: int) -> None:
    """So many may wait; then those are answered, the refusal comes last, and nothing after it is looked at."""
    with socket.create_connection(("127.0.0.1", port), 5) as connection:
        connection.sendall((GET + b"\r\n") * count)
        found = everything(connection)
    assert found.count(b"HTTP/1.1 429") == refusals
    if refusals:
        assert MOST_AHEAD < found.count(b"HTTP/1.1 200") < count and "too_many_pipelined" in REFUSED
        assert found.index(b"HTTP/1.1 429") > found.rindex(b"HTTP/1.1 200")
        assert json.loads(found.rpartition(b"\r\n\r\n")[2])["error"]["limit"] == MOST_AHEAD
    else:
        assert found.count(b"HTTP/1.1 200") == answers


def test_a_refusal_comes_after_the_answers_owed(port: int) -> None:
    with socket.create_connection(("127.0.0.1", port), 5) as connection:
        connection.sendall(GET.replace(b"/", b"/slow", 1) + b"\r\n" + GET + b"\r\n" + padded(5000))
        found = everything(connection)
    statuses = [int(part[:3]) for part in found.split(b"HTTP/1.1 ")[1:]]
    assert statuses == [200, 200, 431]


@pytest.mark.parametrize("piece", [b"a: b\r\n" * 100, b"a" * 600], ids=["many", "one"])
def test_trailers_without_an_end(port: int, piece: bytes) -> None:
    with socket.create_connection(("127.0.0.1", port), 5) as connection:
        connection.sendall(POST + b"Transfer-Encoding: chunked\r\n\r\n0\r\n" + piece)
        with pytest.raises(ConnectionError):
            for _ in range(20):
                connection.sendall(piece)
                time.sleep(0.01)
    assert "trailers_too_large" in REFUSED


def test_trailers_are_dropped(port: int) -> None:
    """They must not be taken for headers, such as a key."""
    with socket.create_connection(("127.0.0.1", port), 5) as connection:
        connection.sendall(
            POST.replace(b"/", b"/headers", 1) + b"Transfer-Encoding: chunked\r\nConnection: close\r\nX-One: 1\r\n\r\n"
            b"2\r\nok\r\n0\r\nX-Two: 2\r\n\r\n"
        )
        found = everything(connection)
    assert found.startswith(b"HTTP/1.1 200") and b"x-one" in found and b"x-two" not in found


def test_a_body_in_tiny_chunks_is_no_trailer(port: int) -> None:
    """Six bytes to carry one: far more than a head may hold is not body, but none of it between two pieces."""
    with socket.create_connection(("127.0.0.1", port), 5) as connection:
        connection.sendall(POST + b"Transfer-Encoding: chunked\r\nConnection: close\r\n\r\n")
        for _ in range(20):
            connection.sendall(b"1\r\na\r\n" * 200)
            time.sleep(0.005)
        connection.sendall(b"0\r\n\r\n")
        assert everything(connection).startswith(b"HTTP/1.1 200")


@pytest.mark.parametrize(
    ("first", "then"),
    [(GET + b"\r\n", b"\r\n"), (GET.replace(b"/", b"/early", 1) + b"Content-Length: 1000\r\n\r\n", b"a")],
    ids=["line feed", "body nobody reads"],
)
def test_bytes_of_no_request_do_not_keep_an_idle_connection(port: int, first: bytes, then: bytes) -> None:
    with socket.create_connection(("127.0.0.1", port), 5) as connection:
        connection.sendall(first)
        found = b""
        while not found.endswith(b"ok"):
            found += connection.recv(4096)
        start = time.monotonic()
        try:
            while time.monotonic() - start < 4:
                connection.sendall(then)
                connection.settimeout(0.05)
                try:
                    if not connection.recv(4096):
                        break
                except TimeoutError:
                    pass
        except ConnectionError:
            pass
        assert KEEP_S - 0.2 < time.monotonic() - start < KEEP_S + 1


def test_who_leaves_the_end_of_an_answer_unread_is_cut_off(port: int) -> None:
    """Less than the buffer at which a server would wait: the answer is complete for it, and lies there."""
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 12)
        connection.settimeout(5)
        connection.connect(("127.0.0.1", port))
        mine = connection.getsockname()
        connection.sendall(b"GET /until-it-lies-there HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")
        time.sleep(0.2)

        def there() -> bool:
            return any(one.client == mine for one in list(SERVERS[0].server_state.connections))

        assert there()
        time.sleep(1.2)  # three times the time in which something must be read
        assert not there()


@pytest.mark.parametrize(
    "data",
    [
        GET.replace(b"/", "/é".encode(), 1) + b"\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00" * 20,
        b"CONNECT a:1 HTTP/1.1\r\nHost: a\r\n\r\n",
        POST + b"Transfer-Encoding: chunked\r\n\r\nzz\r\nabc",
        POST + b"Transfer-Encoding: chunked\r\n\r\n2\r\nok\r\nzz\r\n",
    ],
    ids=["not ASCII", "TLS", "CONNECT", "first chunk", "second chunk"],
)
def test_what_is_not_http_is_refused_in_the_one_shape(port: int, data: bytes) -> None:
    with socket.create_connection(("127.0.0.1", port), 5) as connection:
        connection.sendall(data)
        status, body = read_whole(connection)
    error = json.loads(body)["error"]
    assert status == 400 and error["code"] == "malformed_http" and len(error["request_id"]) == 26


UPGRADE = b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABk\r\n"


@pytest.mark.parametrize("pieces", [1, 2, 7])
def test_the_body_of_a_request_that_asks_for_another_protocol_is_its_body(port: int, pieces: int) -> None:
    """curl --http2 and Java's client ask so of every server; the connection stays, and speaks what it spoke."""
    body = bytes(range(256)) * 8
    head = b"POST /echo HTTP/1.1\r\nHost: a\r\n" + UPGRADE + b"Content-Length: %d\r\n\r\n" % len(body)
    with socket.create_connection(("127.0.0.1", port), 5) as connection:
        for _ in range(2):
            data = head + body
            step = -(-len(data) // pieces)
            for start in range(0, len(data), step):
                connection.sendall(data[start : start + step])
                time.sleep(0.01)
            found = b""
            while len(found.partition(b"\r\n\r\n")[2]) < len(body):
                found += connection.recv(65536)
            assert found.startswith(b"HTTP/1.1 200") and found.endswith(body)
        connection.sendall((GET + UPGRADE + b"\r\n") * 3 + GET + b"Connection: close\r\n\r\n")
        assert everything(connection).count(b"HTTP/1.1 200") == 4


def test_a_request_for_another_protocol_may_close_its_connection(port: int) -> None:
    with socket.create_connection(("127.0.0.1", port), 5) as connection:
        connection.sendall(GET + b"Connection: upgrade, Close\r\nUpgrade: h2c\r\n\r\n")
        found = everything(connection)
    assert found.startswith(b"HTTP/1.1 200") and found.endswith(b"ok") and b"connection: close" in found


# --- requests sent ahead, in pieces ----------------------------------------------------------------------------------


def statuses(found: bytes) -> list[int]:
    return [int(part[:3]) for part in found.split(b"HTTP/1.1 ")[1:]]


def test_an_idle_time_does_not_end_a_request_whose_head_came_in_two_pieces(port: int) -> None:
    """The answer before it was complete when half of its head was there."""
    slower = GET.replace(b"/", b"/slower", 1) + b"Connection: close\r\n\r\n"
    with socket.create_connection(("127.0.0.1", port), 5) as connection:
        connection.sendall(GET.replace(b"/", b"/slow", 1) + b"\r\n" + slower[:20])
        time.sleep(0.3)
        connection.sendall(slower[20:])
        assert statuses(everything(connection)) == [200, 200]


def test_a_head_that_lies_unread_behind_requests_at_work_is_not_slow(port: int) -> None:
    last = GET + b"Connection: close\r\n\r\n"
    with socket.create_connection(("127.0.0.1", port), 5) as connection:
        for piece in (GET.replace(b"/", b"/slower", 1) + b"\r\n", GET + b"\r\n" + last[:20], last[20:]):
            connection.sendall(piece)
            time.sleep(0.1)
        assert statuses(everything(connection)) == [200, 200, 200]


def test_a_head_is_not_as_long_as_what_came_before_it(port: int) -> None:
    last = GET + b"Connection: close\r\n\r\n"
    with socket.create_connection(("127.0.0.1", port), 5) as connection:
        connection.sendall(POST + b"Content-Length: 5000\r\n\r\n" + b"a" * 5000 + last[:20])
        time.sleep(0.1)
        connection.sendall(last[20:])
        assert statuses(everything(connection)) == [200, 200]


def test_an_upload_that_was_answered_before_it_came_may_go_on(port: int) -> None:
    """With its connection, which has another request then."""
    piece = b"a" * 40_000
    with socket.create_connection(("127.0.0.1", port), 5) as connection:
        connection.sendall(GET.replace(b"/", b"/early", 1) + b"Content-Length: %d\r\n\r\n" % (12 * len(piece)))
        for _ in range(12):
            time.sleep(0.2 * KEEP_S)
            connection.sendall(piece)
        connection.sendall(GET + b"Connection: close\r\n\r\n")
        assert statuses(everything(connection)) == [200, 200]


def test_the_idle_time_after_a_large_upload_is_no_longer(port: int) -> None:
    with socket.create_connection(("127.0.0.1", port), 5) as connection:
        connection.sendall(POST + b"Content-Length: 200000\r\n\r\n" + b"a" * 200_000)
        start = time.monotonic()
        assert statuses(everything(connection)) == [200]
        assert KEEP_S - 0.1 < time.monotonic() - start < 1.8 * KEEP_S
