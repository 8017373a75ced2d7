"""What requests leave to the garbage collector, which runs seldom (`service.app.GC_THRESHOLDS`): nothing large."""

from __future__ import annotations

import asyncio
import gc
import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from starlette.testclient import TestClient

from astroclip.errors import AstroClipError, InputError
from astroclip.io import read_images, read_spectra
from benchmarks.chaos.bodies import asks, joined, truncated
from service.app import GC_THRESHOLDS, make_app
from service.engine import Engine
from service.settings import Settings

CORPUS_DIR = Path(__file__).parents[1] / "corpus"
CORPUS = sorted(CORPUS_DIR.glob("*"))
SMALL = 1000  # bytes


@contextmanager
def left() -> Iterator[list[Any]]:
    """What was left in cycles of references meanwhile, filled in at the end."""
    found: list[Any] = []
    gc.collect()
    gc.disable()
    gc.set_debug(gc.DEBUG_SAVEALL)
    try:
        yield found
        gc.collect()
        found += gc.garbage
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.enable()


def large(garbage: list[Any]) -> list[str]:
    """Arrays, bytes and files that the garbage holds."""
    held = [(thing, by) for by in garbage for thing in (by, *gc.get_referents(by))]
    return [f"{type(thing).__name__} of a {type(by).__name__}" for thing, by in held if _size(thing) > SMALL][:20]


def _size(thing: Any) -> int:
    if isinstance(thing, io.BytesIO):
        return 0 if thing.closed else thing.getbuffer().nbytes
    if isinstance(thing, np.ndarray):
        return thing.nbytes
    return len(thing) if isinstance(thing, bytes | bytearray | memoryview) else 0


class _Node:
    def __init__(self, held: Any) -> None:
        self.held, self.itself = held, self


@pytest.mark.parametrize("held", [bytes(2000), np.zeros(2000), io.BytesIO(bytes(2000))], ids=lambda held: type(held))
def test_the_test_sees_what_a_cycle_holds(held: Any) -> None:
    with left() as garbage:
        _Node(held)
    kept = large(garbage)
    assert kept


def bodies() -> Iterator[bytes]:
    yield from (path.read_bytes() for path in CORPUS)
    for modality in ("image", "spectrum"):
        yield truncated(modality)
        for form in ("grid", "fits"):
            yield from (ask.body for ask in asks(modality, form, count=2))


@pytest.mark.parametrize("read", [read_images, read_spectra])
def test_readers_leave_nothing_large(read: Callable[..., Any]) -> None:
    given = [*bodies()]

    def read_all() -> None:
        for body in given:
            with suppress(AstroClipError):
                read(body)

    read_all()  # modules that are imported at first use keep frames of those who did
    with left() as garbage:
        read_all()
    kept = large(garbage)  # not in the assertion, which would show all the garbage
    assert not kept


def test_an_error_is_freed_of_its_frames_also_where_causes_go_in_a_circle() -> None:
    cause, error = ValueError("cause"), InputError("error")
    for part in (cause, error):
        with suppress(ValueError, InputError):
            raise part
    error.__cause__, cause.__cause__ = cause, error
    assert cause.__traceback__ and error.__traceback__
    assert error.without_frames() is error
    assert cause.__traceback__ is None and error.__traceback__ is None


def asked(client: TestClient, path: str, body: bytes, headers: dict[str, str]) -> int:
    """The status of the answer, of the application alone: an HTTP client leaves cycles of its own."""
    given = {"content-type": "application/octet-stream", "content-length": str(len(body))} | headers
    scope = {
        "type": "http",
        "http_version": "1.1",
        "method": "POST",
        "path": path,
        "raw_path": path.encode(),
        "root_path": "",
        "scheme": "http",
        "query_string": b"",
        "headers": [(name.encode(), value.encode()) for name, value in given.items()],
        "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 80),
    }
    statuses: list[int] = []
    left_to_come = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive() -> dict[str, Any]:
        while not left_to_come:
            await asyncio.sleep(3600)  # the client stays
        return left_to_come.pop()

    async def send(message: dict[str, Any]) -> None:
        if message["type"] == "http.response.start":
            statuses.append(message["status"])

    assert client.portal is not None
    client.portal.call(client.app, scope, receive, send)
    return statuses[0]


def test_requests_leave_nothing_large(client: TestClient) -> None:
    calls = ("/v1/embed/image", "/v1/embed/spectrum", "/v1/search", "/v1/estimate")
    given = [*bodies()]
    for body in given:
        asked(client, "/v1/search", body, {})
    with left() as garbage:
        statuses = {
            asked(client, call, body, headers)
            for body in given
            for call in calls
            for headers in ({}, {"x-deadline-ms": "1"})
        }
    assert {200, 422, 429} <= statuses
    kept = large(garbage)  # not in the assertion, which would show all the garbage
    assert not kept


def test_a_form_of_good_and_bad_files_leaves_nothing_large(client: TestClient) -> None:
    (whole,) = asks("image", "fits", count=1)
    form, media_type = joined(
        [whole.body, truncated("image"), (CORPUS_DIR / "png-damaged_picture").read_bytes()], "application/octet-stream"
    )
    asked(client, "/v1/embed/image", form, {"content-type": media_type})
    with left() as garbage:
        assert asked(client, "/v1/embed/image", form, {"content-type": media_type}) == 200
    kept = large(garbage)  # not in the assertion, which would show all the garbage
    assert not kept


def test_a_form_of_too_many_objects_leaves_nothing_large(settings: Settings, engine: Engine) -> None:
    """Every file beyond the bound has an error of its own."""
    own = Engine(engine.embedder, engine.index, settings.model_copy(update={"max_items": 1}))
    form, media_type = joined([ask.body for ask in asks("image", "fits", count=6)], "application/octet-stream")
    with TestClient(make_app(own.settings, own)) as client:
        asked(client, "/v1/embed/image", form, {"content-type": media_type})
        with left() as garbage:
            assert asked(client, "/v1/embed/image", form, {"content-type": media_type}) == 413
    own.close()
    kept = large(garbage)  # not in the assertion, which would show all the garbage
    assert not kept


def test_the_collector_runs_seldom_while_the_service_does(settings: Settings, engine: Engine) -> None:
    before = gc.get_threshold()
    with TestClient(make_app(settings, engine)):
        assert gc.get_threshold() == GC_THRESHOLDS
    assert gc.get_threshold() == before
