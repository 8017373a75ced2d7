"""Whether a request is let in: predicted wait, requests at work, deadlines, lanes, clients that have gone."""

from __future__ import annotations

import asyncio
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest
from starlette.datastructures import Headers
from starlette.testclient import TestClient
from survey import npy

from astroclip.errors import OverloadError
from service.admission import Admission, _file_bytes
from service.app import make_app
from service.engine import Engine
from service.reading import LARGE
from service.settings import Settings
from service.trace import Trace
from service.waiting import Lane
from service.workers import PATIENT_WAITS


class Busy:
    """Workers whose predicted wait is what a test says."""

    def __init__(self, seconds: float) -> None:
        self.seconds, self.asked = seconds, []

    def predicted_wait(self, lane, caller, arriving, size):
        self.asked.append((lane, caller, arriving))
        return self.seconds


def admit(gate: Admission, wait: float, *, batch=False, caller="me", deadline=100.0) -> Busy:
    workers = Busy(wait)
    trace = Trace(caller=caller, batch=batch, deadline=time.monotonic() + deadline)
    gate._admit_one_more(trace)
    gate._admit(trace, workers)
    return workers


@pytest.fixture
def gate():
    return Admission(None, Settings(max_in_flight=10, max_wait_s=2.0))


def test_a_wait_just_below_and_just_above_the_limit(gate):
    admit(gate, 1.99)
    with pytest.raises(OverloadError, match=r"about 5\.0 s; at most 2\.0 s") as caught:
        admit(gate, 5.0)
    assert caught.value.retry_after_s == pytest.approx(3.0, abs=0.01)


def test_patient_requests_are_let_in_longer(gate):
    admit(gate, 2.0 * PATIENT_WAITS - 1, batch=True)
    with pytest.raises(OverloadError):
        admit(gate, 2.0 * PATIENT_WAITS + 1, batch=True)


def test_a_wait_beyond_the_requests_own_deadline_is_refused_at_once(gate):
    admit(gate, 0.9, deadline=1.0)
    with pytest.raises(OverloadError):
        admit(gate, 1.1, deadline=1.0)


def test_requests_at_work_just_below_and_at_the_limit(gate):
    gate.in_flight["me"] = 9
    admit(gate, 0.0)
    gate.in_flight["me"] = 10
    with pytest.raises(OverloadError, match="10 requests are at work"):
        admit(gate, 0.0)


def test_who_has_less_than_half_a_share_is_let_in_beyond(gate):
    gate.in_flight.update(greedy=10)
    admit(gate, 0.0, caller="modest")
    gate.in_flight["modest"] = 2  # of a share of 5
    admit(gate, 0.0, caller="modest")
    gate.in_flight["modest"] = 3
    with pytest.raises(OverloadError):
        admit(gate, 0.0, caller="modest")


def test_what_is_admitted_and_not_yet_read_counts(gate):
    gate.unread, gate.objects = 5, 4.0
    gate.in_flight["me"] = 5
    assert admit(gate, 0.0).asked == [(Lane.interactive, "me", 20.0)]
    assert admit(gate, 0.0, caller="other").asked[0][2] == 0.0  # turns put it before the first caller's rest


@pytest.fixture(scope="module")
def slow(settings, engine):
    """An application whose model waits at a gate."""
    own = Engine(engine.embedder, engine.index, settings.model_copy(update={"batch_window_s": 0.0}))
    encode, gate = own.embedder.encode, threading.Event()
    gate.set()
    seen: list[int] = []

    def slowly(grids):
        gate.wait(10)
        seen.append(len(grids))
        return encode(grids)

    own.embedder = SimpleNamespace(
        **{
            name: getattr(engine.embedder, name)
            for name in ("prepare", "model_id", "model_sha256", "dim", "modalities")
        },
        preprocess_version=engine.embedder.preprocess_version,
        encode=slowly,
    )
    app = make_app(own.settings, own)
    yield SimpleNamespace(app=app, gate=gate, seen=seen, engine=own)
    gate.set()
    own.close()


@pytest.fixture
def body(galaxy):
    return npy(galaxy.pixels[:, 44:108, 44:108].copy())


@pytest.mark.parametrize("value", ["urgent", "", "Batch"])
def test_priority_is_one_of_two_words(client, body, value):
    response = client.post("/v1/embed/image", content=body, headers={"x-priority": value})
    assert response.status_code == 422 and response.json()["error"]["field"] == "X-Priority"
    assert client.post("/v1/embed/image", content=body, headers={"x-priority": "batch"}).status_code == 200


@pytest.mark.parametrize("value", ["0", "-1", "1.5", "soon", "9" * 12, "٣"])
def test_a_deadline_is_a_number_of_milliseconds(client, body, value):
    response = client.post("/v1/embed/image", content=body, headers={"x-deadline-ms": value.encode()})
    assert response.status_code == 422 and response.json()["error"]["field"] == "X-Deadline-Ms"


def test_a_request_past_its_deadline_is_429(slow, body):
    client = TestClient(slow.app)
    slow.gate.clear()
    answers = []

    def post(**headers):
        answers.append(client.post("/v1/embed/image", content=body, headers=headers))

    first = threading.Thread(target=post)
    first.start()
    while not slow.engine.workers.inference._busy:
        time.sleep(0.001)
    late = threading.Thread(target=post, kwargs={"x-deadline-ms": "30"})
    late.start()
    time.sleep(0.1)
    slow.gate.set()
    first.join()
    late.join()
    by_status = {answer.status_code: answer for answer in answers}
    assert set(by_status) == {200, 429}
    assert by_status[429].json()["error"]["code"] == "deadline_passed" and by_status[429].headers["retry-after"]


def test_an_overloaded_service_refuses_before_the_body_is_read(slow, body, monkeypatch):
    monkeypatch.setattr(slow.engine.workers, "predicted_wait", lambda *_: 7.0)
    sent = []

    async def post():
        async def receive():
            sent.append(1)
            return {"type": "http.request", "body": body, "more_body": False}

        started = []

        async def send(message):
            started.append(message)

        scope = {"type": "http", "method": "POST", "path": "/v1/embed/image", "headers": [], "query_string": b""}
        scope |= {"http_version": "1.1", "scheme": "http", "server": ("test", 80), "client": ("test", 1)}
        await slow.app(scope, receive, send)
        return started

    answer = asyncio.run(post())
    assert answer[0]["status"] == 429 and not sent
    assert dict(answer[0]["headers"])[b"retry-after"] == b"5"


def test_work_of_a_client_that_has_gone_is_not_done(slow, body):
    async def run():
        slow.gate.clear()
        slow.seen.clear()
        gone = asyncio.Event()

        def call(leaving):
            messages = [{"type": "http.request", "body": body, "more_body": False}]

            async def receive():
                if messages:
                    return messages.pop()
                if leaving:
                    await gone.wait()
                else:
                    await asyncio.sleep(3600)
                return {"type": "http.disconnect"}

            out = []

            async def send(message):
                out.append(message)

            scope = {"type": "http", "method": "POST", "path": "/v1/embed/image", "headers": [], "query_string": b""}
            scope |= {"http_version": "1.1", "scheme": "http", "server": ("test", 80), "client": ("test", 1)}
            return out, asyncio.create_task(slow.app(scope, receive, send))

        inference = slow.engine.workers.inference
        first_out, first = call(False)
        while not inference._busy:
            await asyncio.sleep(0.001)
        left_out, left = call(True)
        stays_out, stays = call(False)
        while len(inference) < 2:
            await asyncio.sleep(0.001)
        gone.set()
        await asyncio.wait_for(left, 5)
        slow.gate.set()
        await asyncio.gather(first, stays)
        return first_out, left_out, stays_out

    first, left, stays = asyncio.run(run())
    assert first[0]["status"] == stays[0]["status"] == 200 and not left
    assert slow.seen == [1, 1]  # the one at work, and the one that stayed
    admission = slow.app.middleware_stack
    while not isinstance(admission, Admission):
        admission = admission.app
    assert admission.unread == 0 and not admission.in_flight


def test_lookups_and_questions_without_files_wait_for_searches_alone(client, engine, body, monkeypatch):
    search = {"query": {"object_id": "sim-00000020"}, "k": 1}
    vectors = npy(np.eye(2, engine.index.dim, dtype=np.float32))

    def statuses():
        return [
            client.post("/v1/embed/image", content=body).status_code,
            client.post("/v1/search?modality=image&k=1", content=body).status_code,
            client.post("/v1/search", json=search).status_code,
            client.get("/v1/objects?random=1").status_code,
            client.get("/scs?RA=1&DEC=1&SR=0.1").status_code,
            client.post("/v1/search/vectors?modality=image&k=1", content=vectors).status_code,
            client.get("/livez").status_code,
            client.get("/metrics").status_code,
            client.get("/v1/info").status_code,
            client.get("/v1/objects/sim-00000020/image.jpg").status_code,
        ]

    with monkeypatch.context() as busy:
        busy.setattr(engine.workers.inference, "predicted_wait", lambda *_: 60.0)
        assert statuses() == [429, 429, 200, 200, 200, 200, 200, 200, 200, 200]
    with monkeypatch.context() as busy:
        busy.setattr(engine.workers.search, "predicted_wait", lambda *_: 60.0)
        assert statuses() == [429, 429, 429, 429, 429, 429, 200, 200, 200, 200]
    with monkeypatch.context() as busy:
        busy.setattr(engine.workers.reading, "predicted_wait", lambda *_: 60.0)
        assert statuses() == [429, 429, 200, 200, 200, 429, 200, 200, 200, 200]


def test_what_a_file_is_is_found_out_where_files_are_read(client, engine, body, monkeypatch):
    """In its turn and within its deadline, and not where it was said."""
    works = []
    read = engine.workers.reading.read
    monkeypatch.setattr(
        engine.workers.reading, "read", lambda trace, work, *rest: works.append(1) or read(trace, work, *rest)
    )
    assert client.post("/v1/search?k=1", content=body).status_code == 200
    assert client.post("/v1/search?k=1&modality=image", content=body).status_code == 200
    assert len(works) == 2 + 1


def test_the_headers_of_patience_hold_for_lookups_too(client, engine, monkeypatch):
    seen = []
    submit = engine.workers.search.submit

    def watched(items, group, trace, *rest):
        seen.append((trace.batch, trace.deadline - time.monotonic()))
        return submit(items, group, trace, *rest)

    monkeypatch.setattr(engine.workers.search, "submit", watched)
    path = "/v1/objects?random=2"
    ends = []
    for headers in ({}, {"x-priority": "batch"}, {"x-deadline-ms": "300"}):
        assert client.get(path, headers=headers).status_code == 200
        assert {patient for patient, _ in seen} == {"x-priority" in headers}
        ends.append(max(left for _, left in seen))
        seen.clear()
    settings = engine.settings
    assert ends[0] <= settings.deadline_s < settings.batch_deadline_s - 5 < ends[1] and ends[2] <= 0.3
    assert client.get(path, headers={"x-deadline-ms": "soon"}).status_code == 422
    assert client.get(path, headers={"x-priority": "high"}).status_code == 422


@pytest.mark.parametrize(("headers", "dropped"), [([], True), ([(b"content-length", b"5")], False)])
def test_a_lookup_of_a_client_that_has_gone_is_given_up(headers, dropped):
    """Unless a body was announced, which nobody reads there."""
    given_up = []

    async def run():
        started, gone = asyncio.Event(), asyncio.Event()

        async def lookup(scope, receive, send):
            started.set()
            try:
                await gone.wait()
                await asyncio.sleep(0.05)
            except asyncio.CancelledError:
                given_up.append(True)
                raise

        messages = [{"type": "http.request", "body": b"", "more_body": False}]

        async def receive():
            if messages:
                return messages.pop()
            await gone.wait()
            return {"type": "http.disconnect"}

        async def send(message):
            raise AssertionError(message)

        app = SimpleNamespace(state=SimpleNamespace(engine=None))
        scope = {"type": "http", "method": "GET", "path": "/v1/objects", "headers": headers, "app": app}
        scope["state"] = {"trace": Trace()}
        request = asyncio.create_task(Admission(lookup, Settings())(scope, receive, send))
        await started.wait()
        gone.set()
        await request

    asyncio.run(run())
    assert bool(given_up) is dropped


def test_large_requests_become_patient(client, engine, galaxy, monkeypatch):
    lanes = []
    submit = engine.workers.inference.submit

    def watched(items, group, trace, stage, lane=None):
        lanes.append(trace.batch)
        return submit(items, group, trace, stage, lane)

    monkeypatch.setattr(engine.workers.inference, "submit", watched)
    small = galaxy.pixels[:, 44:108, 44:108]
    most = engine.settings.max_interactive_items
    for count in (most, most + 1):
        assert client.post("/v1/embed/image", content=npy(np.stack([small] * count))).status_code == 200
    assert lanes == [False, True]


def test_a_request_that_turns_out_large_has_the_time_of_a_patient_one(client, engine, galaxy, monkeypatch):
    """The client's own deadline holds all the same."""
    left = []
    submit = engine.workers.inference.submit

    def watched(items, group, trace, stage, lane=None):
        left.append(trace.deadline - time.monotonic())
        return submit(items, group, trace, stage, lane)

    monkeypatch.setattr(engine.workers.inference, "submit", watched)
    settings, small = engine.settings, galaxy.pixels[:, 44:108, 44:108]
    for count in (1, settings.max_interactive_items + 1):
        body = npy(np.stack([small] * count))
        assert client.post("/v1/embed/image", content=body).status_code == 200
    assert client.post("/v1/embed/image", content=body, headers={"x-deadline-ms": "60000"}).status_code == 200
    assert left[0] <= settings.deadline_s < 60 < settings.batch_deadline_s - 30 < left[1] <= settings.batch_deadline_s
    assert 30 < left[2] <= 60


@pytest.mark.parametrize(
    ("headers", "size"),
    [
        ({"content-length": "2500000", "content-type": "application/fits"}, 2500000),
        ({"content-length": "2500000", "content-type": "multipart/form-data; boundary=x"}, 0),  # of several files
        ({"transfer-encoding": "chunked"}, 0),
        ({"content-length": "-1"}, 0),
        ({"content-length": "9" * 400}, 0),
    ],
)
def test_the_size_a_request_declares(headers, size):
    assert _file_bytes(Headers(headers)) == size


def test_a_large_file_is_judged_by_the_thread_that_reads_large_ones(settings, engine, galaxy):
    """Else it is uploaded whole, and refused when its deadline has passed."""
    own = Engine(engine.embedder, engine.index, settings)
    large, asked = own.workers.reading.large, []
    large.predicted_wait = lambda lane, caller: asked.append(lane) or 100.0  # type: ignore[method-assign]
    body = npy(galaxy.pixels)
    with TestClient(make_app(settings, own)) as client:
        asked.clear()
        assert client.post("/v1/embed/image", content=body).status_code == 200 and not asked
        found = client.post("/v1/embed/image", content=body.ljust(LARGE + 1, b"\0"))
        assert found.status_code == 429 and found.json()["error"]["code"] == "overloaded" and asked
    own.close()
