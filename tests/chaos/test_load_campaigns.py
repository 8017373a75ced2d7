"""The load campaigns end to end, short, against a real server over the tiny model: that they find what is there."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import pytest
from serving import index_dir  # noqa: F401

from benchmarks.chaos import poison, searching, throughput
from benchmarks.chaos.bodies import asks
from benchmarks.chaos.campaign import UNBOUNDED
from benchmarks.chaos.overload import storm
from benchmarks.chaos.server import Server, ServerError
from benchmarks.chaos.soak import mixture
from benchmarks.chaos.traffic import Plan, Traffic
from service.settings import Settings

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def where(index_dir: Path, tiny_model_dir: Path) -> dict[str, object]:  # noqa: F811
    patient = {"max_wait_s": 20.0, "deadline_s": 60.0}  # on a busy machine, too, nobody is refused but by the storm
    return {"index": index_dir, "model": tiny_model_dir, "settings": {**UNBOUNDED, **patient}}


@pytest.fixture(scope="module")
def server(where: dict[str, object]) -> Iterator[Server]:
    with Server(**where) as server:  # type: ignore[arg-type]
        yield server


def test_a_server_that_cannot_start_says_why(tmp_path: Path) -> None:
    with pytest.raises(ServerError, match="no_model|holds no"):
        Server(model=tmp_path).start()


def test_a_server_starts_is_measured_and_stops(where: dict[str, object]) -> None:
    with Server(**where) as server:  # type: ignore[arg-type]
        assert server.status("/readyz") == 200
        assert server.rss_bytes() > 100 * 2**20 and server.open_files() > 3 and server.cpu_s() > 0
        assert server.peak_rss_bytes() >= server.rss_bytes()
    assert server.exit_code in (0, -15) and not server.alive


def test_throughput_measures_both_sides(server: Server, tiny_model_dir: Path) -> None:
    raw = throughput.Raw(Settings(model_dir=tiny_model_dir), threads=1, count=64)
    found = throughput.measured(server, raw, seconds=1.5, rounds=1)
    for modality in ("image", "spectrum"):
        for kind, http in found[modality]["http"].items():
            assert http["rate"]["median"] > 1, kind
            assert set(http["last"]["statuses"]) == {"200"}, kind
        assert found[modality]["idle"]["overhead_ms"]["median"] > 0
    marks = throughput.marks_of(found)
    assert len(marks) == 5 and all(mark["found"] is not None for mark in marks.values())


@pytest.mark.parametrize("fault", ["file", "nan", "early"])
def test_one_bad_object_does_not_touch_the_others(where: dict[str, object], fault: str) -> None:
    here = {**where, "settings": {**UNBOUNDED, "model_process": False}}  # where the fault is put in
    with Server(**here, module="benchmarks.chaos.poisoned", environment={"ASTROCLIP_FAULT": fault}) as server:  # type: ignore[arg-type]
        found = poison.measured(server, fault, seconds=1.0, rounds=1)
    assert found["apart"] <= 1e-6  # infinite, had the culprit been answered or another failed


def test_a_storm_is_refused_in_part_and_passes(where: dict[str, object]) -> None:
    bounded = {**where, "settings": {**UNBOUNDED, "max_in_flight": 8}}
    with Server(**bounded) as server:  # type: ignore[arg-type]
        found = storm(server, asks("spectrum", "grid", count=8), 1, seconds=4.0, calm_s=2.0)
        assert server.alive
    assert found["goodput"] > 0 and found["refused"] > 0
    assert not found["others"]


def test_batched_search_is_compared_at_equal_recall(index_dir: Path, tiny_model_dir: Path) -> None:  # noqa: F811
    found = searching.measured(index_dir, seconds=1.0, rounds=1, model=tiny_model_dir)
    assert found["http"]["recall_at_10"] > 0.99 and found["http"]["ratio"]["median"] > 0


def test_mixed_traffic_meets_no_fault_of_ours(server: Server) -> None:
    files = server.open_files()
    # The tiny model may answer before those who hang up do, unless they do it at once.
    asked = [ask if ask.drop_after_s is None else dataclasses.replace(ask, drop_after_s=0.0) for ask in mixture(server)]
    found = Traffic(server.port, Plan(asked, connections=16, seconds=6.0, rate=25.0, arrivals="poisson")).run()
    statuses = found.statuses()
    assert not [s for s in statuses if s.isdigit() and int(s) >= 500], statuses
    assert statuses["200"] > 50 and statuses.get("dropped", 0) > 0 and statuses.get("422", 0) > 0
    assert server.status("/livez") == 200
    assert server.open_files() <= files + 2
