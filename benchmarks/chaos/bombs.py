"""Small requests that mean large work: each must be refused at once, by a server that stays as it is.

    python -m benchmarks.chaos.bombs [--endless-mb 512] [--short]

Against one server over raw sockets: a gzip of a GB in a MB, PNG and JPEG bombs, FITS headers that announce terabytes,
bodies without an end, lies about their length both ways, slow bodies and slow heads, heads without an end, pipelining,
and the requests that smuggling is made of. After each, the server must still answer, and its memory be near what it
was.
"""

from __future__ import annotations

import contextlib
import gzip
import io
import socket
import struct
import sys
import time
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks.chaos.campaign import SEED, UNBOUNDED, mark, parser, report
from benchmarks.chaos.server import Server
from service.connections import LINGER_S

__all__ = ["main"]

TIMES = {"body_timeout_s": 2.0, "head_timeout_s": 1.0}
IMAGE = "/v1/embed/image"


def main() -> int:
    made = parser(__doc__, "bombs")
    made.add_argument("--endless-mb", type=int, default=512, help="how much of an endless body is tried")
    arguments = made.parse_args()
    started = time.perf_counter()
    settings = {**UNBOUNDED, **TIMES}
    with Server(index=arguments.index, model=arguments.model, settings=settings) as server:
        for _, path, kind, body in files():  # once, so that imports are behind us
            server.ask("POST", path, body[:5000], {"content-type": kind})
        found = {name: refused(server, path, kind, body) for name, path, kind, body in files()}
        wire = {
            name: probe(server, ask) for name, ask in probes(256 if arguments.short else arguments.endless_mb).items()
        }
        alive = server.status("/readyz") == 200
    gz = found["gzip of 1 GB"]
    marks = {
        "gzip bomb: ms to the refusal": mark(gz["ms"], 100.0, "most"),
        "gzip bomb: growth of memory, MB": mark(gz["peak_growth_mb"], 100.0, "most"),
        "bombs not refused with 4xx": mark(sum(not 400 <= f["status"] < 500 for f in found.values()), 0, "most"),
        "largest growth of memory by a bomb, MB": mark(max(f["peak_growth_mb"] for f in found.values()), 250.0, "most"),
        "slowest refusal, s": mark(max(f["ms"] for f in found.values()) / 1000, 5.0, "most"),
        "endless body: MB taken": mark(wire["endless body"]["sent_mb"], 110.0, "most"),
        "slow body: s until it was cut": mark(wire["slow body"]["seconds"], TIMES["body_timeout_s"] + 1.5, "most"),
        "slow head: s until it was cut": mark(wire["slow head"]["seconds"], TIMES["head_timeout_s"] + 1.0, "most"),
        "probes answered wrongly": mark(sum(not w["right"] for w in wire.values()), 0, "most"),
        "server ready afterwards": mark(float(alive), 1.0, "least"),
    }
    return report(arguments.out, "bombs", started, marks, {"files": found, "wire": wire})


# --- files ---


def files() -> list[tuple[str, str, str, bytes]]:
    """(name, path, type, body)."""
    fits, png, jpeg, npy, csv = "application/fits", "image/png", "image/jpeg", "application/x-npy", "text/csv"
    spectrum = "/v1/embed/spectrum"
    many = 200_000
    return [
        ("gzip of 1 GB", IMAGE, fits, _gzip_bomb()),
        ("gzip in gzip", IMAGE, fits, gzip.compress(_gzip_bomb())),
        ("gzip of empty members", IMAGE, fits, gzip.compress(b"") * many),
        ("FITS of 8 TB", IMAGE, fits, _header(("NAXIS", 2), ("NAXIS1", 10**6), ("NAXIS2", 10**6))),
        ("gzipped FITS of 50 million 8-bit pixels", IMAGE, fits, _planes_of_bytes()),
        ("FITS of 10^60 bytes", IMAGE, fits, _header(("NAXIS", 3), *((f"NAXIS{i}", 10**19) for i in (1, 2, 3)))),
        ("FITS without an end", IMAGE, fits, b"SIMPLE  =                    T".ljust(80) + b" " * 4_000_000),
        (
            "FITS of CONTINUE cards",
            IMAGE,
            fits,
            _header(("NAXIS", 0)).replace(b"END", b"X   = 'a&'", 1) + _continued(4000),
        ),
        ("PNG of 10^9 pixels", IMAGE, png, _png(30_000, 30_000)),
        ("PNG of 2^31 squared", IMAGE, png, _png(2**31 - 1, 2**31 - 1)),
        ("PNG text of 1 GB", IMAGE, png, _png(40, 40, _chunk(b"zTXt", b"k\0\0" + zlib.compress(b"\0" * 10**8)))),
        ("PNG of empty chunks", IMAGE, png, _png(40, 40, _chunk(b"quXt", b"") * many)),
        ("JPEG of fill bytes", IMAGE, jpeg, _jpeg(40, filling=b"\xff" * 20_000_000)),
        ("JPEG of 5,000 scans", IMAGE, jpeg, _scans(5000)),
        ("npy of 2^62", IMAGE, npy, _npy("(3, 1239850262, 1239850262)")),
        ("npy header of 64 kB", IMAGE, npy, _npy("(" + "1," * 32_000 + ")")),
        ("CSV of comments", spectrum, csv, b"wave,flux\n" + b"#a\n" * 5_000_000),
        ("CSV of one line", spectrum, csv, b"1" * 30_000_000),
        ("CSV unit 10**999999999", spectrum, csv, b"wave [10**999999999 nm],flux\n" + b"1,2\n" * 50),
        ("JSON of brackets", "/v1/search", "application/json", b"[" * 30_000_000),
        ("filter of 10^6 terms", "/v1/search", "application/json", _filter(10**6)),
    ]


def _gzip_bomb() -> bytes:
    stream = io.BytesIO()
    with gzip.GzipFile(fileobj=stream, mode="wb", mtime=0) as file:
        for _ in range(1000):
            file.write(b"\0" * 10**6)
    return stream.getvalue()


def _planes_of_bytes(planes: int = 3) -> bytes:
    """4096 x 4096 in each, of noise that shrinks to a tenth: less than the ratio that is refused."""
    rng = np.random.default_rng(SEED)
    block = np.where(rng.random((4096, 4096)) < 0.03, rng.integers(1, 200, (4096, 4096)), 7).astype(np.uint8)
    cards = (("BITPIX", 8), ("NAXIS", 3), ("NAXIS1", 4096), ("NAXIS2", 4096), ("NAXIS3", planes))
    lines = [b"SIMPLE  =                    T", *(f"{name:8s}= {value:>20d}".encode() for name, value in cards)]
    lines += [b"BANDS   = 'grz'", b"END"]
    head = b"".join(line.ljust(80) for line in lines).ljust(2880)
    data = block.tobytes() * planes
    return gzip.compress(head + data.ljust(-(-len(data) // 2880) * 2880, b"\0"), 6)


def _header(*cards: tuple[str, int]) -> bytes:
    lines = [b"SIMPLE  =                    T", b"BITPIX  =                  -64"]
    lines += [f"{name:8s}= {value:>20d}".encode() for name, value in cards]
    return b"".join(line.ljust(80) for line in [*lines, b"END"]).ljust(2880)


def _continued(count: int) -> bytes:
    return (b"CONTINUE  '" + b" " * 60 + b"&'").ljust(80) * count + b"END".ljust(80)


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def _png(width: int, height: int, extra: bytes = b"") -> bytes:
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    rows = zlib.compress(b"\0" * min(10**7, height * (3 * width + 1)), 9)
    return b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", head) + extra + _chunk(b"IDAT", rows) + _chunk(b"IEND", b"")


def _jpeg(side: int, filling: bytes = b"", progressive: bool = False) -> bytes:
    from PIL import Image

    stream = io.BytesIO()
    Image.fromarray(np.full((side, side, 3), 90, np.uint8)).save(stream, "JPEG", progressive=progressive)
    return stream.getvalue()[:2] + filling + stream.getvalue()[2:]


def _scans(count: int) -> bytes:
    plain = _jpeg(3000, progressive=True)
    last = plain[plain.rfind(b"\xff\xda") : -2]
    return plain[:-2] + last * count + plain[-2:]


def _npy(shape: str) -> bytes:
    head = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}, }}\n".encode()
    return b"\x93NUMPY\x02\x00" + struct.pack("<I", len(head)) + head + b"\0" * 4000


def _filter(count: int) -> bytes:
    term = b'{"column":"ra","range":[0,1]}'
    return b'{"query":{"object_id":"sim-00000042"},"filter":{"or":[' + b",".join([term] * count) + b"]}}"


def refused(server: Server, path: str, kind: str, body: bytes) -> dict[str, Any]:
    server.forget_peak()
    before, start = server.rss_bytes(), time.perf_counter()
    status, _, answer = server.ask("POST", path, body, {"content-type": kind})
    taken = time.perf_counter() - start
    return {
        "status": status,
        "code": answer.split(b'"code":"')[-1].split(b'"')[0].decode(),
        "bytes": len(body),
        "ms": round(1000 * taken, 1),
        "peak_growth_mb": round((server.peak_rss_bytes() - before) / 1e6, 1),
    }


# --- on the wire ---

Ask = Callable[[socket.socket], dict[str, Any]]


def probes(endless_mb: int) -> dict[str, Ask]:
    """What is sent, and whether the answer was right."""
    head = f"POST {IMAGE} HTTP/1.1\r\nHost: a\r\n".encode()
    get = b"GET /livez HTTP/1.1\r\nHost: a\r\n"
    post = head + b"Content-Type: application/fits\r\n"
    return {
        "endless body": lambda s: _endless(s, post + b"Transfer-Encoding: chunked\r\n\r\n", endless_mb),
        "length of a TB": lambda s: _expect(s, post + b"Content-Length: 1099511627776\r\n\r\n", 413),
        "length too long": lambda s: _expect(s, post + b"Content-Length: 1000\r\n\r\nSIMPLE", 400),
        "length too short": lambda s: _expect(s, post + b"Content-Length: 3\r\n\r\nSIMPLE  =  T", 415, 422, 400),
        "length negative": lambda s: _expect(s, post + b"Content-Length: -5\r\n\r\n", 400),
        "length no number": lambda s: _expect(s, post + b"Content-Length: 5x\r\n\r\nabcde", 400),
        "length twice": lambda s: _expect(s, post + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\nabcdef", 400),
        "length and chunks": lambda s: _expect(
            s, post + b"Content-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 400
        ),
        "chunks and length": lambda s: _expect(
            s, post + b"Transfer-Encoding: chunked\r\nContent-Length: 4\r\n\r\n0\r\n\r\n", 400
        ),
        "unknown encoding": lambda s: _expect(s, post + b"Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n", 400, 415, 501),
        "chunk of a bad size": lambda s: _expect(s, post + b"Transfer-Encoding: chunked\r\n\r\nzz\r\nabc", 400),
        "chunk of 2^64": lambda s: _expect(
            s, post + b"Transfer-Encoding: chunked\r\n\r\n" + b"f" * 17 + b"\r\nabc", 400
        ),
        "blank before the colon": lambda s: _expect(s, get + b"Content-Length : 5\r\n\r\n", 400),
        "folded header": lambda s: _expect(s, get + b"X: a\r\n b\r\n\r\n", 400, 200),
        "NUL in a header": lambda s: _expect(s, get + b"X: a\0b\r\n\r\n", 400),
        "no HTTP at all": lambda s: _expect(s, b"\x16\x03\x01\x02\x00\x01\x00" * 20, 400),
        "slow body": lambda s: _dribble(s, post + b"Content-Length: 1000\r\n\r\n", 400),
        "slow head": lambda s: _dribble(s, get + b"X: ", 408),
        "no head": lambda s: _dribble(s, b"", 408, 0),
        "head without an end": lambda s: _expect(s, get + b"X: " + b"a" * 2_000_000, 431, 400),
        "100,000 headers": lambda s: _expect(s, get + b"X: a\r\n" * 100_000 + b"\r\n", 431, 400),
        "URL of 1 MB": lambda s: _expect(s, b"GET /livez?" + b"a" * 10**6 + b" HTTP/1.1\r\nHost: a\r\n\r\n", 431, 400),
        "100 pipelined": lambda s: _pipelined(s, get + b"\r\n", 100),
        "20,000 pipelined": lambda s: _pipelined_too_many(s, get + b"\r\n", 20_000),
        "trailers without an end": lambda s: _trailers(s, post + b"Transfer-Encoding: chunked\r\n\r\n0\r\n"),
        "a thousand connections": _crowd,
    }


def probe(server: Server, ask: Ask) -> dict[str, Any]:
    before, start = server.rss_bytes(), time.perf_counter()
    with socket.create_connection(("127.0.0.1", server.port), 15) as connection:
        try:
            found = ask(connection)
        except OSError as error:
            found = {"right": False, "problem": f"{type(error).__name__}: {error}"}
    found["seconds"] = round(time.perf_counter() - start, 3)
    found["growth_mb"] = round((server.rss_bytes() - before) / 1e6, 1)
    found["right"] = bool(found["right"] and server.status("/livez") == 200)
    return found


def _expect(connection: socket.socket, data: bytes, *statuses: int) -> dict[str, Any]:
    with contextlib.suppress(ConnectionError):  # the refusal may come before all is sent
        connection.sendall(data)
    status = _status(connection)
    return {"status": status, "right": status in statuses}


def _status(connection: socket.socket) -> int:
    """Of the first answer; 0 where the connection was closed without one."""
    data = b""
    try:
        while b"\r\n" not in data and (piece := connection.recv(4096)):
            data += piece
    except ConnectionError:
        pass
    return int(data.split(b" ")[1]) if data.startswith(b"HTTP/1.1 ") else 0


def _endless(connection: socket.socket, head: bytes, most_mb: int) -> dict[str, Any]:
    connection.sendall(head)
    piece, sent = b"%x\r\n" % 2**20 + b"\0" * 2**20 + b"\r\n", 0
    try:
        while sent < most_mb:
            connection.sendall(piece)
            sent += 1
    except OSError:
        pass
    status = _status(connection)
    return {"status": status, "sent_mb": sent * 1.048576, "right": status in (413, 0) and sent < most_mb}


def _dribble(connection: socket.socket, head: bytes, *statuses: int) -> dict[str, Any]:
    """A byte every tenth of a second until the server has had enough."""
    connection.settimeout(0.1)
    deadline = time.monotonic() + 10
    with contextlib.suppress(ConnectionError):
        connection.sendall(head)
        while time.monotonic() < deadline:
            try:
                data = connection.recv(4096)
                status = int(data.split(b" ")[1]) if data else 0
                return {"status": status, "right": status in statuses}
            except TimeoutError:
                if head:
                    connection.sendall(b"a")
    return {"status": 0, "right": 0 in statuses}


def _pipelined(connection: socket.socket, request: bytes, count: int) -> dict[str, Any]:
    connection.sendall(request * count)
    data, answers = b"", 0
    while answers < count and (piece := connection.recv(65536)):
        data += piece
        answers = data.count(b"HTTP/1.1 200")
    return {"status": 200, "answers": answers, "right": answers == count}


def _pipelined_too_many(connection: socket.socket, request: bytes, count: int) -> dict[str, Any]:
    """Those that may wait are answered, and then the refusal."""
    data = b""
    with contextlib.suppress(ConnectionError):
        connection.sendall(request * count)
    with contextlib.suppress(ConnectionError):
        while piece := connection.recv(65536):
            data += piece
    answers, refusals = data.count(b"HTTP/1.1 200"), data.count(b"HTTP/1.1 429")
    return {"status": 429, "answers": answers, "right": refusals == 1 and 100 < answers < count}


def _trailers(connection: socket.socket, head: bytes) -> dict[str, Any]:
    sent = 0
    with contextlib.suppress(ConnectionError):
        connection.sendall(head)
        for _ in range(1000):
            connection.sendall(b"a: b\r\n" * 10_000)
            sent += 1
    return {"status": _status(connection), "sent_mb": sent * 0.06, "right": sent < 1000}


def _crowd(connection: socket.socket) -> dict[str, Any]:
    """Silent connections are closed, and while they are there others are served."""
    address = connection.getpeername()
    crowd = []
    for _ in range(900):
        with contextlib.suppress(OSError):
            crowd.append(socket.create_connection(address, 5))
    status = _expect(connection, b"GET /livez HTTP/1.1\r\nHost: a\r\n\r\n", 200)["status"]
    time.sleep(TIMES["head_timeout_s"] + LINGER_S + 0.5)
    open_still = 0
    for other in crowd:
        other.settimeout(0.01)
        try:
            while other.recv(4096):
                pass
        except TimeoutError:
            open_still += 1
        except OSError:
            pass
        other.close()
    return {
        "status": status,
        "connections": len(crowd),
        "open_still": open_still,
        "right": status == 200 and not open_still,
    }


if __name__ == "__main__":
    sys.exit(main())
