"""What all queues of the service together say of a request's wait."""

from __future__ import annotations

import pytest

from service.settings import Settings
from service.waiting import Lane
from service.workers import Workers


@pytest.fixture
def workers(monkeypatch):
    made = Workers(Settings())
    monkeypatch.setattr(made.search, "predicted_wait", lambda *_: 0.25)
    yield made
    made.close()


@pytest.mark.parametrize(
    ("lane", "reading", "inference", "wait"),
    [
        (Lane.interactive, 3.0, 1.0, 3.25),  # the slower of the two, which go on at the same time
        (Lane.interactive, 1.0, 3.0, 3.25),
        (Lane.patient, 3.0, 1.0, 3.25),
    ],
)
def test_reading_and_inference_overlap_and_search_comes_after(workers, monkeypatch, lane, reading, inference, wait):
    monkeypatch.setattr(workers.reading, "predicted_wait", lambda *_: reading)
    monkeypatch.setattr(workers.inference, "predicted_wait", lambda *_: inference)
    assert workers.predicted_wait(lane, "somebody", 0.0) == wait
