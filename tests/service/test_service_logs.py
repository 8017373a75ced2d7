"""Logs: one line an event, as JSON or text, with its request; nothing of what a caller asked for, nothing forged."""

from __future__ import annotations

import io
import json
import logging
import socket
import threading
import time
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import uvicorn
from starlette.testclient import TestClient
from survey import image_fits

from service import logs
from service.app import make_app
from service.engine import Engine
from service.keys import changing, new_key
from service.logs import AccessLog
from service.trace import Trace

LOUD = "\n2026-01-01T00:00:00.000Z CRITICAL forged\x1b[31m\u2028\x85{}"


class Written(io.StringIO):
    """Where logs went."""

    def lines(self) -> list[str]:
        return self.getvalue().splitlines()

    def entries(self) -> list[dict]:
        return [json.loads(line) for line in self.getvalue().split("\n") if line]

    def access(self) -> list[dict]:
        return [entry for entry in self.entries() if entry["logger"] == "astroclip.access"]


@pytest.fixture
def configured(settings) -> Iterator:
    """configure(log_format, **settings) -> (settings, stream); undone afterwards."""
    root = logging.getLogger()
    names = ("astroclip", "uvicorn", "astropy", "transformers")
    before = {name: (logger := logging.getLogger(name), logger.level, logger.propagate, list(logger.handlers)) for name in names if name in root.manager.loggerDict}  # fmt: skip # noqa: E501
    handlers, level = list(root.handlers), root.level

    def configure(log_format: str = "json", **changes):
        stream = Written()
        changed = settings.model_copy(update={"log_format": log_format, **changes})
        logs.configure(changed, stream)
        return changed, stream

    yield configure
    logging.captureWarnings(False)
    root.handlers[:] = handlers
    root.setLevel(level)
    for logger, own_level, propagate, own in before.values():
        logger.setLevel(own_level)
        logger.propagate = propagate
        logger.handlers[:] = own


@pytest.fixture
def asking(configured, engine):
    """asking(**settings) -> (client, stream): an application that logs JSON, over an engine of its own."""
    opened = []

    def ask(log_format: str = "json", **changes):
        changed, stream = configured(log_format, **changes)
        opened.append(Engine(engine.embedder, engine.index, changed))
        return TestClient(make_app(changed, opened[-1]), raise_server_exceptions=False), stream

    yield ask
    for own in opened:
        own.close()


def test_the_access_line(asking, galaxy):
    client, stream = asking()
    body = image_fits(galaxy)
    answer = client.post("/v1/embed/image", content=body)
    (line,) = stream.access()
    assert line["request_id"] == answer.headers["x-request-id"]
    assert line["caller"] == "anonymous"
    assert (line["level"], line["method"], line["route"], line["status"]) == ("info", "POST", "/v1/embed/image", 200)
    assert (line["bytes_in"], line["bytes_out"]) == (len(body), len(answer.content))
    assert line["duration_ms"] >= line["inference_ms"] > 0
    for stage in ("queue", "decode", "inference", "search"):
        assert line[f"{stage}_ms"] == float(answer.headers[f"x-{stage}-time"])
    assert "code" not in line


def test_the_access_line_names_the_key_by_its_id(asking, tmp_path):
    with changing(tmp_path / "keys.json") as keys:
        made, key = new_key({"read"})
        keys.append(key)
    client, stream = asking(keys_file=tmp_path / "keys.json")
    client.get("/v1/objects/x", headers={"authorization": f"Bearer {made}"})
    client.get("/v1/objects/x")
    client.post("/v1/admin/x", headers={"x-api-key": made})
    assert [(line["status"], line["caller"]) for line in stream.access()] == [
        (404, made.split("_")[1]),
        (401, "anonymous"),
        (403, made.split("_")[1]),
    ]
    (audit,) = [entry for entry in stream.entries() if entry["logger"] == "astroclip.audit"]
    assert audit["message"] == "admin_call: refused"
    assert audit["audit"]["key"] == audit["caller"] == made.split("_")[1]
    assert made.split("_")[2] not in stream.getvalue()


def test_one_line_a_request_with_the_code_of_its_error(asking):
    client, stream = asking()
    client.post("/v1/search", content=b"{", headers={"content-type": "application/json"})
    client.get("/nowhere")
    assert [(line["status"], line["code"], line["route"]) for line in stream.access()] == [
        (400, "bad_json", "/v1/search"),
        (404, "not_found", "unmatched"),
    ]


def test_health_and_metrics_are_quiet_unless_they_fail(asking, settings):
    client, stream = asking()
    for path in ("/livez", "/readyz", "/metrics"):
        assert client.get(path).status_code == 200
    assert not stream.access()
    client.app.state.engine = None
    assert client.get("/readyz").status_code == 503
    (line,) = stream.access()
    assert (line["level"], line["code"]) == ("warning", "not_ready")
    client, stream = asking(log_level="debug")
    client.get("/livez")
    assert stream.access()[0]["level"] == "debug"


def test_the_access_line_can_be_turned_off(asking):
    client, stream = asking(access_log=False)
    client.get("/nowhere")
    assert not stream.access()


def test_of_refusals_for_want_of_capacity_so_many_a_second_are_logged_and_the_rest_counted(configured):
    _, stream = configured("json")
    now = [10.0]
    log = AccessLog(2, clock=lambda: now[0])

    def ended(status):
        log(Trace(method="POST", route="/v1/search", status=status))

    for status in (429, 429, 429, 200, 429, 400):
        ended(status)
    assert [(line["status"], "unlogged" in line) for line in stream.access()] == [
        (429, False),
        (429, False),
        (200, False),
        (400, False),
    ]
    now[0] = 11.0
    for _ in range(2):
        ended(429)
    assert [line.get("unlogged") for line in stream.access()[4:]] == [2, None]


def test_level_binds(asking):
    client, stream = asking(log_level="warning")
    client.get("/nowhere")
    assert not stream.entries()


def test_a_fault_is_logged_with_its_request_and_traceback(asking, monkeypatch):
    client, stream = asking()
    monkeypatch.setattr("service.routes.search.search_answer", lambda *a, **k: 1 / 0)
    answer = client.post("/v1/search", json={"query": {"object_id": "x"}})
    fault, line = stream.entries()
    assert fault["request_id"] == line["request_id"] == answer.headers["x-request-id"]
    assert fault["level"] == line["level"] == "error"
    assert "ZeroDivisionError" in fault["exception"] and "Traceback" in fault["exception"]
    assert "ZeroDivisionError" not in answer.text
    assert line["code"] == "internal_error"


def test_lines_from_the_threads_of_the_pools_name_the_request(asking, monkeypatch, galaxy):
    client, stream = asking()
    plain, say = logging.getLogger("astroclip.test"), {}

    def noting(name, work):
        def note(*arguments, **keywords):
            plain.warning("in %s", name)
            say[name] = threading.current_thread() is not threading.main_thread()
            return work(*arguments, **keywords)

        return note

    monkeypatch.setattr("service.engine.read_images", noting("decode", __import__("astroclip.io").io.read_images))
    monkeypatch.setattr("service.routes.embed.trust_models", noting("search", lambda engine, embedded: [None]))
    answer = client.post("/v1/embed/image", content=image_fits(galaxy), headers={"x-request-id": "mine"})
    assert answer.status_code == 200
    said = [entry for entry in stream.entries() if entry["logger"] == "astroclip.test"]
    assert [entry["message"] for entry in said] == ["in decode", "in search"]
    assert {entry["request_id"] for entry in said} == {"mine"}
    assert all(say.values())


def test_lines_from_a_search_that_shares_its_call_name_their_own_request(asking, engine, monkeypatch):
    """What runs between the steps of `service.searching` as well: before the index is asked, and after."""
    import service.answer

    client, stream = asking()
    plain, work = logging.getLogger("astroclip.test"), service.answer.search_answer

    def noting(engine, asked, embedded, request_id):
        plain.warning("before")
        answer = yield from work(engine, asked, embedded, request_id)
        plain.warning("after")
        return answer

    monkeypatch.setattr("service.routes.search.search_answer", noting)
    name = engine.index.catalog.take([0], ["object_id"]).column(0).to_pylist()[0]
    body = {"query": {"object_id": name}}

    def post(number):
        return client.post("/v1/search", json=body, headers={"x-request-id": f"r{number}"}).status_code

    with ThreadPoolExecutor(8) as pool:
        assert set(pool.map(post, range(8))) == {200}
    said = [(e["message"], e["request_id"]) for e in stream.entries() if e["logger"] == "astroclip.test"]
    assert sorted(said) == sorted((word, f"r{n}") for word in ("before", "after") for n in range(8))


def test_a_batch_that_fails_names_the_requests_in_it(asking, engine, monkeypatch, galaxy):
    client, stream = asking()
    monkeypatch.setattr(engine.embedder, "encode", lambda grids: 1 / 0)
    answer = client.post("/v1/embed/image", content=image_fits(galaxy), headers={"x-request-id": "mine"})
    assert answer.status_code == 503
    failed = next(entry for entry in stream.entries() if "failed in inference" in entry["message"])
    assert failed["request_id"] == "mine" and "ZeroDivisionError" in failed["exception"]


def test_outside_of_a_request_there_is_no_request(configured):
    _, stream = configured()
    logging.getLogger("astroclip.service").info("started")
    (entry,) = stream.entries()
    assert set(entry) == {"time", "level", "logger", "message"}
    assert entry["time"].endswith("Z") and len(entry["time"]) == len("2026-11-21T19:42:50.123Z")


SECRETS = ("secretpath", "188.7366", "secretkey", "secretbody", "secretheader", "secretcolumn")


@pytest.mark.parametrize("log_format", ["json", "text"])
def test_nothing_of_what_a_caller_asked_for_is_logged(asking, log_format):
    client, stream = asking(log_format, log_level="debug")
    headers = {"authorization": "Bearer secretkey", "x-api-key": "secretkey", "user-agent": "secretheader"}
    client.get("/v1/objects/secretpath", headers=headers)
    client.get("/secretpath", headers=headers)
    client.get("/v1/objects?ra=188.7366&dec=-0.2&radius_arcsec=5", headers=headers)
    client.get("/scs?RA=188.7366", headers=headers)
    client.post("/v1/search", json={"query": {"object_id": "secretbody"}}, headers=headers)
    client.post("/v1/search", json={"query": {"object_id": "x"}, "secretbody": 1}, headers=headers)
    client.post("/v1/search?format=secretpath", content=b"secretbody", headers=headers)
    client.post("/v1/embed/image", files={"secretheader": b"secretbody"}, headers=headers)
    client.get("/livez", headers={"x-request-id": "secretheader!"})
    text = stream.getvalue()
    assert len(stream.lines()) >= 9
    assert not [secret for secret in SECRETS if secret in text]


@pytest.mark.parametrize("where", ["message", "extra", "exception", "logger"])
def test_a_line_cannot_be_forged_in_text(configured, where):
    _, stream = configured("text")
    log = logging.getLogger(f"astroclip.{LOUD}" if where == "logger" else "astroclip.test")
    try:
        raise ValueError(LOUD if where == "exception" else "plain")
    except ValueError:
        log.exception(
            "said %s", LOUD if where == "message" else "this", extra={"found": LOUD} if where == "extra" else {}
        )
    text = stream.getvalue()
    first, *rest = text.removesuffix("\n").split("\n")
    assert first.startswith("20") and " ERROR " in first
    assert rest and all(line.startswith("    ") for line in rest)
    assert all(character == "\n" or character.isprintable() for character in text)
    assert "forged" in text


@pytest.mark.parametrize("where", ["message", "extra", "exception"])
def test_a_line_cannot_be_forged_in_json(configured, where):
    _, stream = configured("json")
    try:
        raise ValueError(LOUD)
    except ValueError as error:
        logging.getLogger("astroclip.test").error(
            "said %s", LOUD if where == "message" else "this",
            extra={"found": LOUD, "level": "x"} if where == "extra" else {},
            exc_info=error if where == "exception" else None,
        )  # fmt: skip
    text = stream.getvalue()
    assert text.count("\n") == 1 and text.removesuffix("\n").isascii() and text.removesuffix("\n").isprintable()
    (entry,) = stream.entries()
    assert entry["level"] == "error"
    assert LOUD in "".join(str(value) for value in entry.values())


def test_requests_cannot_forge_lines(asking):
    client, stream = asking()
    client.request("GET", "/%0A%1b[31mforged")
    client.request("GET", "/v1/objects/%0A{}")
    client.request("FORGED", "/livez")
    assert len(stream.entries()) == 3
    assert stream.entries()[2]["method"] == "OTHER"


def test_values_that_json_has_no_word_for(configured):
    _, stream = configured("json")
    logging.getLogger("astroclip.test").warning(
        "a", extra={"ratio": float("nan"), "count": 3, "path": object, "x": "\ud800"}
    )
    (entry,) = stream.entries()
    assert (entry["ratio"], entry["count"]) == ("nan", 3)


def test_warnings_and_other_libraries_come_in_the_same_form(configured):
    _, stream = configured("json")
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        logging.captureWarnings(False)
        logging.captureWarnings(True)
        warnings.warn("of a library\nsecond line", stacklevel=1)
    logging.getLogger("astropy").warning("of astropy")
    logging.getLogger("some.library").info("too quiet")
    logging.getLogger("some.library").warning("loud enough")
    messages = [entry["message"] for entry in stream.entries()]
    assert "of a library" in messages[0]
    assert messages[1:] == ["of astropy", "loud enough"]


class Terminal(Written):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("log_format", "stream", "is_json"),
    [
        ("auto", Written(), True),
        ("auto", Terminal(), False),
        ("text", Written(), False),
        ("json", Terminal(), True),
    ],
)
def test_the_form_follows_the_reader(settings, log_format, stream, is_json):
    assert logs.is_json(settings.model_copy(update={"log_format": log_format}), stream) == is_json


def test_over_a_socket_the_lines_are_ours_and_a_client_that_leaves_is_no_fault(configured, engine):
    """uvicorn, set up as `astroclip serve` does: its lines in our form, no access line of its own."""
    changed, stream = configured("json")
    own = Engine(engine.embedder, engine.index, changed)
    config = uvicorn.Config(make_app(changed, own), port=0, log_config=None, access_log=False)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        _wait(lambda: server.started)
        port = server.servers[0].sockets[0].getsockname()[1]
        assert b"400" in _send(port, b"NONSENSE\r\n\r\n", answered=True)
        _send(port, b"POST /v1/embed/image HTTP/1.1\r\nhost: x\r\ncontent-length: 1000\r\n\r\nabc", answered=False)
        _wait(lambda: stream.access())
    finally:
        server.should_exit = True
        thread.join()
        own.close()
    (line,) = stream.access()
    assert (line["status"], line["code"], line["route"]) == (499, "client_left", "/v1/embed/image")
    assert line["bytes_in"] == 3
    assert {entry["logger"] for entry in stream.entries()} <= {"uvicorn.error", "astroclip.access", "astroclip.service"}
    assert not [entry for entry in stream.entries() if entry["level"] in ("error", "critical")]


def _wait(done) -> None:
    deadline = time.monotonic() + 20
    while not done():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def _send(port: int, data: bytes, *, answered: bool) -> bytes:
    with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
        connection.sendall(data)
        if answered:
            return connection.recv(1000)
        time.sleep(0.2)  # until it is being handled
        return b""
