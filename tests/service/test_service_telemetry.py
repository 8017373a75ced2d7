"""Spans: one a request with its stages as children, in the caller's own trace, without what was asked for."""

from __future__ import annotations

import sys
import time

import pytest
from starlette.testclient import TestClient
from survey import image_fits

from astroclip.errors import InputError
from service.app import make_app
from service.engine import Engine
from service.telemetry import Telemetry, open_telemetry

sdk = pytest.importorskip("opentelemetry.sdk.trace", reason="the extra telemetry is not installed")
ENDPOINT = {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:9"}
PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


@pytest.fixture
def spans(settings, engine):
    """(client, finished): an application that exports into memory, and the spans that are finished."""
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    exporter = InMemorySpanExporter()
    provider = sdk.TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    own = Engine(engine.embedder, engine.index, settings)
    app = make_app(settings, own, Telemetry(provider))
    yield TestClient(app, raise_server_exceptions=False), exporter.get_finished_spans
    own.close()


def named(finished, name):
    (found,) = [span for span in finished if span.name == name]
    return found


def test_a_request_is_a_span_and_its_stages_are_children(spans, galaxy):
    client, finished = spans
    before = time.time_ns()
    answer = client.post("/v1/embed/image", content=image_fits(galaxy), headers={"x-request-id": "mine"})
    assert answer.status_code == 200
    server = named(finished(), "POST /v1/embed/image")
    assert server.attributes["astroclip.request_id"] == "mine"
    assert server.attributes["astroclip.caller"] == "anonymous"
    assert server.attributes["http.route"] == "/v1/embed/image"
    assert server.attributes["http.response.status_code"] == 200
    stages = [span for span in finished() if span is not server]
    assert {span.name for span in stages} == {"queue", "decode", "inference", "search"}
    for span in stages:
        assert span.parent.span_id == server.context.span_id
        assert span.context.trace_id == server.context.trace_id
        assert before <= server.start_time <= span.start_time + 2e6  # clocks of one machine
        assert span.start_time <= span.end_time <= server.end_time + 2e6
    for name in ("decode", "inference", "search"):
        spent = sum(span.end_time - span.start_time for span in stages if span.name == name) / 1e6
        assert spent == pytest.approx(float(answer.headers[f"x-{name}-time"]), abs=0.02)
    order = [named(stages, name).start_time for name in ("decode", "inference")]
    assert order == sorted(order)


def test_the_callers_trace_goes_on(spans):
    client, finished = spans
    client.get("/v1/objects/x", headers={"traceparent": PARENT})
    server = named(finished(), "GET /v1/objects/{object_id}")
    assert f"{server.context.trace_id:032x}" == PARENT.split("-")[1]
    assert f"{server.parent.span_id:016x}" == PARENT.split("-")[2]


@pytest.mark.parametrize(
    "sent", ["garbage", "00-0-0-0", PARENT + "-extra", "00-" + "0" * 32 + "-" + "0" * 16 + "-01", "é"]
)
def test_a_broken_traceparent_begins_a_trace(spans, sent):
    client, finished = spans
    assert client.get("/v1/objects/x", headers={"traceparent": sent.encode()}).status_code == 404
    assert named(finished(), "GET /v1/objects/{object_id}").parent is None


def test_a_caller_that_samples_nothing_is_heard(spans):
    client, finished = spans
    client.get("/v1/objects/x", headers={"traceparent": PARENT[:-2] + "00"})
    assert not finished()


def test_a_refusal_says_its_code(spans):
    client, finished = spans
    client.post("/v1/search", content=b"{", headers={"content-type": "application/json"})
    server = named(finished(), "POST /v1/search")
    assert server.attributes["astroclip.error"] == "bad_json"
    assert server.status.is_unset  # a 4xx is no fault of the server


def test_a_fault_is_an_error(spans, monkeypatch):
    client, finished = spans
    monkeypatch.setattr("service.routes.search.search_answer", lambda *a, **k: 1 / 0)
    client.post("/v1/search", json={"query": {"object_id": "x"}})
    server = named(finished(), "POST /v1/search")
    assert server.status.status_code.name == "ERROR"
    assert server.attributes["astroclip.error"] == "internal_error"


def test_nothing_of_what_was_asked_for_is_exported(spans):
    client, finished = spans
    client.get("/v1/objects?ra=188.7366&dec=-0.2&radius_arcsec=5", headers={"authorization": "Bearer secret"})
    client.get("/v1/objects/secret?x=secret")
    client.get("/secret")
    assert len(finished()) >= 3
    text = "".join(span.to_json() for span in finished())
    assert "188.7366" not in text and "secret" not in text


def test_health_and_metrics_are_not_traced(spans):
    client, finished = spans
    for path in ("/livez", "/readyz", "/metrics"):
        client.get(path)
    assert not finished()


def test_spans_of_one_request_are_bounded(spans, monkeypatch):
    client, finished = spans
    from service.trace import current_trace

    def many(*arguments, **keywords):
        for _ in range(10_000):
            current_trace().add("search", 0.0)
        return 1 / 0

    monkeypatch.setattr("service.routes.search.search_answer", many)
    client.post("/v1/search", json={"query": {"object_id": "x"}})
    assert len(finished()) <= 65


@pytest.mark.parametrize(
    ("asked", "environment", "on"),
    [
        ("auto", {}, False),
        ("auto", ENDPOINT, True),
        ("auto", {"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://127.0.0.1:9/v1/traces"}, True),
        ("auto", {**ENDPOINT, "OTEL_SDK_DISABLED": "true"}, False),
        ("auto", {**ENDPOINT, "OTEL_TRACES_EXPORTER": "none"}, False),
        ("on", {}, True),
        ("off", ENDPOINT, False),
    ],
)
def test_when_there_are_spans(settings, monkeypatch, asked, environment, on):
    pytest.importorskip("opentelemetry.exporter.otlp.proto.http", reason="the extra telemetry is not installed")
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    telemetry = open_telemetry(settings.model_copy(update={"telemetry": asked}), environment)
    assert telemetry.on == on
    if on:
        assert telemetry.provider.resource.attributes["service.name"] == "astroclip"
    telemetry.close()


def test_without_the_extra_auto_serves_and_on_says_what_to_install(settings, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    assert not open_telemetry(settings, ENDPOINT).on
    assert "pip install 'astroclip[telemetry]'" in caplog.text
    with pytest.raises(InputError, match=r"pip install 'astroclip\[telemetry\]'"):
        open_telemetry(settings.model_copy(update={"telemetry": "on"}), {})


def test_a_collector_that_is_gone_delays_neither_requests_nor_the_end(settings, engine, monkeypatch):
    pytest.importorskip("opentelemetry.exporter.otlp.proto.http", reason="the extra telemetry is not installed")
    for name, value in ENDPOINT.items():
        monkeypatch.setenv(name, value)
    own = Engine(engine.embedder, engine.index, settings)
    with TestClient(make_app(settings, own, open_telemetry(settings, ENDPOINT))) as client:
        start = time.monotonic()
        assert client.get("/v1/objects/x").status_code == 404
        assert time.monotonic() - start < 2.0
        leaving = time.monotonic()
    assert time.monotonic() - leaving < 5.0
    own.close()
