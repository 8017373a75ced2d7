"""GET /metrics: what is counted, where, and that no caller can make a label."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path

import httpx2
import numpy as np
import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as openmetrics
from prometheus_client.parser import text_string_to_metric_families
from starlette.testclient import TestClient
from survey import image_fits

from service.app import make_app
from service.engine import Engine
from service.metrics import MOST_VALUES, Metrics
from service.routes import ROUTERS


@pytest.fixture
def served(settings, engine):
    """An application with metrics of its own."""
    engine = Engine(engine.embedder, engine.index, settings)
    with TestClient(make_app(settings, engine), raise_server_exceptions=False) as client:
        yield client
    engine.close()


def samples(client, **headers) -> dict[tuple, float]:
    page = client.get("/metrics", headers=headers).text
    return {
        (sample.name, *sorted(sample.labels.values())): sample.value
        for family in text_string_to_metric_families(page)
        for sample in family.samples
        if not sample.name.endswith("_bucket")
    }


def test_requests_are_counted_by_template_and_status(served, engine):
    known = engine.index.catalog.take([0], ["object_id"]).column(0).to_pylist()[0]
    for name in (known, known, "a", "b", "c"):
        served.get(f"/v1/objects/{name}")
    found = samples(served)
    assert found["astroclip_request_seconds_count", "/v1/objects/{object_id}", "200"] == 2
    assert found["astroclip_request_seconds_count", "/v1/objects/{object_id}", "404"] == 3
    assert found["astroclip_rejected_total", "no_such_object"] == 3
    assert 0 < found["astroclip_request_seconds_sum", "/v1/objects/{object_id}", "200"] < 60
    assert found["astroclip_stage_seconds_count", "search"] >= 2
    assert found["astroclip_requests_in_flight",] == 1  # the scrape itself


def test_no_caller_can_make_a_label(served):
    """Paths, methods, headers, parameters and bodies of a caller's own make up no series."""

    def series() -> set[str]:
        return {line.rpartition(" ")[0] for line in served.get("/metrics").text.splitlines()}

    def attack(word: str) -> None:
        served.get(f"/{word}")
        served.get(f"/v1/objects/{word}")
        served.get(f"/page/{word}")
        served.get(f"/v1/objects?{word}=1")
        served.get("/livez", headers={"x-request-id": word, word: word})
        served.request(word.upper(), "/livez")
        served.request(word.upper(), f"/{word}")
        served.post(f"/v1/embed/{word}", content=b"x")
        served.post("/v1/search", json={word: word})
        served.post("/v1/search", json={"query": {"object_id": word}, "filter": {"column": word, "range": [0, 1]}})
        served.post("/v1/search", content=b"{" + word.encode())
        served.post("/v1/embed/image", content=b"x", headers={"content-type": f"image/{word}"})
        served.post("/v1/embed/image", files={word: b"x"})

    attack("first")
    served.get("/metrics")  # counts itself
    before = series()
    for n in range(3):
        attack(f"word{n}")
    assert series() == before
    assert not any("word" in line or "first" in line for line in before)


def test_a_label_that_grows_all_the_same_ends_in_other():
    metrics = Metrics()
    for n in range(3 * MOST_VALUES):
        metrics.rejected(f"reason{n}")
        metrics.request(f"/{n}", 200, 0.1)
    page = metrics.text().decode()
    assert page.count("astroclip_rejected_total{") == MOST_VALUES + 1
    assert f'astroclip_rejected_total{{reason="other"}} {2.0 * MOST_VALUES}' in page
    assert page.count("astroclip_request_seconds_count{") == MOST_VALUES + 1


def test_refusals_before_routing_count_for_their_route(settings, engine):
    small = settings.model_copy(update={"max_body_bytes": 2000})
    engine = Engine(engine.embedder, engine.index, small)
    with TestClient(make_app(small, engine)) as client:
        assert client.post("/v1/embed/image", content=b"x" * 2001).status_code == 413
        found = samples(client)
    engine.close()
    assert found["astroclip_request_seconds_count", "/v1/embed/image", "413"] == 1
    assert found["astroclip_rejected_total", "body_too_large"] == 1


def test_a_fault_of_ours_counts_as_one(served, engine, monkeypatch):
    def broken(*arguments, **keywords):
        raise RuntimeError("broken")

    monkeypatch.setattr("service.routes.search.search_answer", broken)
    assert served.post("/v1/search", json={"query": {"object_id": "x"}}).status_code == 500
    found = samples(served)
    assert found["astroclip_rejected_total", "internal_error"] == 1
    assert found["astroclip_request_seconds_count", "/v1/search", "500"] == 1


def test_an_error_that_the_standard_answers_with_200_counts(served):
    assert served.get("/scs?RA=1").status_code == 200
    assert samples(served)["astroclip_rejected_total", "unusable_input"] == 1


def test_a_client_that_leaves_is_no_fault_of_ours(served):
    messages = [{"type": "http.request", "body": b"x", "more_body": True}, {"type": "http.disconnect"}]

    async def receive():
        return messages.pop(0)

    async def send(message):
        raise AssertionError(f"nobody is there to be told {message}")

    scope = {
        "type": "http", "method": "POST", "path": "/v1/embed/image", "raw_path": b"/v1/embed/image", "root_path": "",
        "query_string": b"", "headers": [], "http_version": "1.1", "scheme": "http", "server": ("test", 80),
    }  # fmt: skip
    asyncio.run(served.app(scope, receive, send))
    found = samples(served)
    assert found["astroclip_request_seconds_count", "/v1/embed/image", "499"] == 1
    assert found["astroclip_rejected_total", "client_left"] == 1
    assert not any("500" in key for key in found)
    assert found["astroclip_requests_in_flight",] == 1


def test_trust_and_refused_items_are_counted(served, galaxy, engine):
    broken = image_fits(galaxy)[:4000]
    files = [("file", ("a.fits", image_fits(galaxy))), ("file", ("b.fits", broken)), ("file", ("c.txt", b"no"))]
    answer = served.post("/v1/embed/image", files=files).json()
    codes = [item["error"]["code"] for item in answer["items"] if item["error"]]
    judged = [item["trust"] for item in answer["items"] if item["trust"] and item["trust"]["ood_p"] is not None]
    assert len(codes) == 2
    found = samples(served)
    for code in codes:
        assert found["astroclip_items_refused_total", *sorted(("image", code))] == codes.count(code)
    counted = {flag: found["astroclip_judged_total", *sorted((flag, "image"))] for flag in ("true", "false")}
    flagged = sum(any(flag["code"] == "out_of_distribution" for flag in trust["flags"]) for trust in judged)
    assert counted == {"true": flagged, "false": len(judged) - flagged}


def test_out_of_distribution_is_counted_as_such(settings, engine, galaxy):
    always = settings.model_copy(update={"ood_level": 1.0})
    engine = Engine(engine.embedder, engine.index, always)
    with TestClient(make_app(always, engine)) as client:
        answer = client.post("/v1/embed/image", content=image_fits(galaxy)).json()
        trust = answer["items"][0]["trust"]
        found = samples(client)
    engine.close()
    flagged = any(flag["code"] == "out_of_distribution" for flag in trust["flags"])
    assert flagged == (trust["ood_p"] is not None)
    assert found["astroclip_judged_total", "image", "true"] == flagged


def test_vectors_that_are_not_finite_are_counted(served, galaxy, engine, monkeypatch):
    real = engine.embedder.encode
    monkeypatch.setattr(
        engine.embedder, "encode", lambda grids: real(grids) * np.float32("nan" if len(grids) == 2 else 1)
    )
    files = [("file", ("a", image_fits(galaxy)))] * 2
    assert served.post("/v1/embed/image", files=files).status_code == 422
    assert samples(served)["astroclip_nonfinite_outputs_total", "image"] == 2


def test_the_index_served_is_named(served, engine):
    index = engine.index
    found = samples(served)
    identity = sorted((index.index_id, index.manifest_sha256, index.model_sha256))
    assert found["astroclip_index_info", *identity] == 1
    assert found["astroclip_index_objects",] == len(index)
    assert found["astroclip_index_loaded_timestamp_seconds",] > found["process_start_time_seconds",]


def test_another_index_takes_the_place_of_the_first():
    metrics = Metrics()
    metrics.serving("first", "a", "m", 3)
    metrics.serving("second", "b", "m", 4)
    page = metrics.text().decode()
    assert 'id="second"' in page and 'id="first"' not in page
    assert "astroclip_index_objects 4.0" in page


def test_what_workers_tell():
    metrics = Metrics()
    waiting = [3]
    metrics.queue("inference", lambda: waiting[0])
    metrics.batch("inference", 64, 0.2)
    metrics.failure("inference", "restart")
    metrics.swap("refused")
    page = metrics.text().decode()
    assert 'astroclip_queue_items{worker="inference"} 3.0' in page
    assert 'astroclip_batch_size_bucket{le="32.0",worker="inference"} 0.0' in page
    assert 'astroclip_batch_size_bucket{le="64.0",worker="inference"} 1.0' in page
    assert 'astroclip_worker_failures_total{what="restart",worker="inference"} 1.0' in page
    assert 'astroclip_index_swaps_total{outcome="refused"} 1.0' in page
    waiting[0] = 7
    assert 'astroclip_queue_items{worker="inference"} 7.0' in metrics.text().decode()


def test_the_process_is_measured(served):
    found = samples(served)
    assert found["process_resident_memory_bytes",] > 1e7
    assert found["process_open_fds",] > 3
    assert found["python_gc_collections_total", "0"] >= 0


def test_both_formats_and_their_types(served):
    plain = served.get("/metrics")
    assert plain.headers["content-type"].startswith("text/plain; version=0.0.4")
    asked = served.get("/metrics", headers={"accept": "application/openmetrics-text; version=1.0.0, text/plain;q=0.5"})
    assert asked.headers["content-type"].startswith("application/openmetrics-text; version=1.0.0")
    assert asked.text.endswith("# EOF\n")
    names = {family.name for family in openmetrics(asked.text)}  # the classic format has no type for an info
    assert names == {re.sub("_info$", "", family.name) for family in text_string_to_metric_families(plain.text)}


@pytest.mark.parametrize("accept", ["application/openmetrics-text; version=abc", "*/*", "", "é", "application/json"])
def test_an_accept_header_that_names_nothing_known_gets_the_plain_page(served, accept):
    answer = served.get("/metrics", headers={"accept": accept.encode()})
    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")


def test_there_are_metrics_before_there_is_an_engine(settings):
    client = TestClient(make_app(settings))  # not entered: nothing is loaded
    assert client.get("/readyz").status_code == 503
    assert 'astroclip_rejected_total{reason="not_ready"} 1.0' in client.get("/metrics").text


def test_the_docs_name_metrics_and_labels_that_there_are():
    """The alert rules above all: a rule over a metric that does not exist never fires."""
    page = (Path(__file__).resolve().parents[2] / "docs/operations.md").read_text()
    labels = {item.name: set(item.labels) for item in Metrics()}
    ends = {"histogram": ("_count", "_sum", "_bucket"), "gauge": ("",), "counter": ("",), "info": ("",)}
    series = {item.name + end: item.name for item in Metrics() for end in ends.get(item.kind, ("",))}
    rules = "\n".join(re.findall(r"^ {12}.*$", page, flags=re.MULTILINE))
    named = set(re.findall(r"\b(?:astroclip|process|python)_[a-z_]+", rules))
    assert named and named <= set(series)
    selected = re.findall(r"(astroclip_\w+)\{(\w+)", rules)
    assert selected and all(label in labels[series[name]] for name, label in selected)
    assert set(re.findall(r"\bastroclip_[a-z]+_[a-z_]+", page)) <= set(series) | set(labels)


def test_names_follow_the_conventions():
    for item in Metrics():
        assert re.fullmatch(r"(astroclip|process|python)_[a-z_]+", item.name)
        assert item.text
        assert item.name.endswith("_total") == (item.kind == "counter")
        if item.kind == "histogram":
            assert item.name.endswith(("_seconds", "_size"))


TIMES = ("x-queue-time", "x-decode-time", "x-inference-time", "x-search-time")


@pytest.mark.parametrize(
    ("method", "path", "body", "status"),
    [
        ("GET", "/livez", b"", 200),
        ("GET", "/", b"", 200),
        ("GET", "/metrics", b"", 200),
        ("GET", "/scs?RA=1", b"", 200),
        ("GET", "/v1/search/", b"", 307),
        ("POST", "/v1/search", b"{", 400),
        ("GET", "/nowhere", b"", 404),
        ("DELETE", "/livez", b"", 405),
        ("POST", "/v1/embed/image", b"x" * 2001, 413),
        ("POST", "/v1/search", b"\x00", 415),
        ("POST", "/v1/search", b'{"query": {"object_id": "x"}, "k": 0}', 422),
    ],
)
def test_times_and_request_id_are_on_every_answer(settings, engine, method, path, body, status):
    small = settings.model_copy(update={"max_body_bytes": 2000})
    own = Engine(engine.embedder, engine.index, small)
    client = TestClient(make_app(small, own), follow_redirects=False)
    kind = "image/webp" if status == 415 else "application/json"
    answer = client.request(method, path, content=body, headers={"x-request-id": "mine", "content-type": kind})
    own.close()
    assert answer.status_code == status
    assert answer.headers["x-request-id"] == "mine"
    assert all(float(answer.headers[name]) >= 0 for name in TIMES)
    assert re.fullmatch(
        r"((queue|decode|inference|search);dur=[\d.]+, )*total;dur=[\d.]+", answer.headers["server-timing"]
    )


def test_times_are_on_a_fault_and_on_429(settings, engine, monkeypatch):
    one = settings.model_copy(update={"max_in_flight": 1})
    own = Engine(engine.embedder, engine.index, one)
    app = make_app(one, own)

    async def both():
        release = asyncio.Event()

        async def slow():
            await release.wait()
            yield b"x"

        transport = httpx2.ASGITransport(app, raise_app_exceptions=False)
        async with httpx2.AsyncClient(transport=transport, base_url="http://test") as client:
            first = asyncio.create_task(client.post("/v1/embed/image", content=slow()))
            await asyncio.sleep(0.05)
            refused = await client.post("/v1/embed/image", content=b"x")
            release.set()
            await first
            monkeypatch.setattr("service.routes.search.read_request", lambda *a: 1 / 0)
            return refused, await client.post("/v1/search", content=b"x")

    refused, failed = asyncio.run(both())
    own.close()
    for answer, status in ((refused, 429), (failed, 500)):
        assert answer.status_code == status
        assert {*TIMES, "x-request-id", "server-timing"} <= set(answer.headers)
    assert 'reason="overloaded"' in own.workers.metrics.text().decode()


def test_server_timing_adds_up(served, engine):
    name = engine.index.catalog.take([0], ["object_id"]).column(0).to_pylist()[0]
    answer = served.post("/v1/search", json={"query": {"object_id": name}})
    times = dict(part.split(";dur=") for part in answer.headers["server-timing"].split(", "))
    assert float(times["search"]) > 0
    assert float(times["total"]) >= float(times["search"])
    assert times["search"] == answer.headers["x-search-time"]


def test_every_route_has_a_template():
    assert all(route.path_format.startswith("/") for router in ROUTERS for route in router.routes)
