"""The load generator and its statistics: what is counted, and from when."""

from __future__ import annotations

import json
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from benchmarks.chaos.all import _run, campaigns
from benchmarks.chaos.answers import Answers, percentile
from benchmarks.chaos.campaign import mark, spread
from benchmarks.chaos.nothing import Nothing
from benchmarks.chaos.overload import recovered_s
from benchmarks.chaos.soak import slope
from benchmarks.chaos.throughput import steady_rate
from benchmarks.chaos.traffic import Ask, Plan, Traffic


def answers(done: list[float], *, intended: list[float] | None = None, status: int = 200) -> Answers:
    n = len(done)
    due = np.array(intended if intended is not None else done)
    return Answers(np.zeros(n, np.int32), due, due, np.array(done), np.full(n, status, np.int16))


def judge(which: int, status: int, head: bytes, body: bytes) -> str | None:
    """A check named in a plan."""
    return None if body == b"{}" else f"body {body!r}"


@contextmanager
def answering(answer: Callable[[bytes], bytes]) -> Iterator[int]:
    """A server of one connection at a time in a thread; `answer` may sleep."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        listening.settimeout(0.1)
        over = threading.Event()

        def live() -> None:
            while not over.is_set():
                try:
                    connection, _ = listening.accept()
                except TimeoutError:
                    continue
                with connection:
                    connection.settimeout(5.0)
                    while data := connection.recv(65536):
                        connection.sendall(answer(data))

        thread = threading.Thread(target=live, daemon=True)
        thread.start()
        try:
            yield listening.getsockname()[1]
        finally:
            over.set()
            thread.join()


@pytest.mark.parametrize(("q", "wanted"), [(0, 1), (50, 50), (90, 90), (99, 99), (99.5, 100), (100, 100)])
def test_percentiles_are_observed_values(q: float, wanted: float) -> None:
    values = np.random.default_rng(1).permutation(np.arange(1, 101))
    assert percentile(values, q) == wanted


def test_the_percentile_of_nothing_is_nan_and_passes_no_mark() -> None:
    assert np.isnan(percentile([], 50))
    assert not mark(percentile([], 50), 5.0, "most")["passed"]
    assert not mark(None, 5.0, "least")["passed"]
    assert mark(5.0, 5.0, "most")["passed"] and mark(5.0, 5.0, "least")["passed"]
    assert not mark(5.1, 5.0, "most")["passed"] and not mark(4.9, 5.0, "least")["passed"]


def test_a_stall_is_counted_by_every_request_that_was_due_in_it() -> None:
    """Coordinated omission: a client that waits would report one slow request of fifty."""
    stalled = iter([0.5])

    def answer(request: bytes) -> bytes:
        time.sleep(next(stalled, 0.0))
        return b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n"

    with answering(answer) as port:
        found = Traffic(port, Plan([Ask("GET", "/")], connections=1, requests=50, rate=100.0)).run()
    assert found.statuses() == {"200": 50}
    assert np.allclose(np.diff(np.sort(found.intended)), 0.01, atol=1e-6)
    late = np.count_nonzero(found.latency_ms > 50)
    assert 40 <= late <= 49, "each request due during the stall of 0.5 s waited for its end"
    assert np.count_nonzero(found.service_ms > 50) < 10, "though it was answered soon once sent"


def test_poisson_arrivals_have_the_rate_asked_for_and_no_rhythm() -> None:
    with Nothing() as port:
        plan = Plan([Ask("GET", "/")], connections=16, seconds=2.0, rate=500.0, arrivals="poisson")
        found = Traffic(port, plan).run()
    gaps = np.diff(np.sort(found.intended))
    assert len(found) == pytest.approx(1000, abs=130)
    assert gaps.std() / gaps.mean() == pytest.approx(1.0, abs=0.2)


def test_a_closed_loop_sends_as_many_as_asked_and_checks_every_answer() -> None:
    with Nothing() as port:
        asks = [Ask("POST", "/a", b"x" * 100_000), Ask("GET", "/b")]
        plan = Plan(asks, connections=8, requests=200, keep=True, check=f"{__name__}:judge")
        found = Traffic(port, plan).run()
    assert len(found) == 200 and set(found.which) == {0, 1}
    assert found.bodies == (b"{}",) * 200 and found.fault_count == 0
    assert found.cpu_s > 0


def test_a_check_reports_what_is_wrong() -> None:
    with answering(lambda _: b"HTTP/1.1 200 OK\r\ncontent-length: 3\r\n\r\nbad") as port:
        found = Traffic(port, Plan([Ask("GET", "/")], requests=5, check=f"{__name__}:judge")).run()
    assert found.fault_count == 5 and found.faults[0] == "body b'bad'"


def test_chunked_answers_are_read_whole() -> None:
    chunks = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n3\r\nabc\r\n2\r\nde\r\n0\r\n\r\n"
    with answering(lambda _: chunks) as port:
        found = Traffic(port, Plan([Ask("GET", "/")], requests=3, keep=True)).run()
    assert found.bodies == (b"abcde",) * 3


def test_timeouts_hang_ups_and_refused_connections_are_errors_by_name() -> None:
    def slow(_: bytes) -> bytes:
        time.sleep(0.4)
        return b""

    with answering(slow) as port:
        timed = Traffic(port, Plan([Ask("GET", "/")], requests=1, timeout_s=0.1)).run()
        dropped = Traffic(port, Plan([Ask("GET", "/", drop_after_s=0.05)], requests=1)).run()
    assert timed.statuses() == {"timeout": 1} and dropped.statuses() == {"dropped": 1}
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    refused = Traffic(port, Plan([Ask("GET", "/")], connections=2, seconds=0.2, rate=50.0)).run()
    assert set(refused.statuses()) == {"ConnectionRefusedError"}


def test_traffic_runs_until_it_is_told() -> None:
    with Nothing() as port:
        traffic = Traffic(port, Plan([Ask("GET", "/")], connections=2, think_s=0.005)).start()
        time.sleep(0.3)
        found = traffic.stop()
    assert 20 < len(found) and found.rate() > 50


def test_a_steady_rate_leaves_out_the_warm_up_and_counts_batches_once() -> None:
    every = [float(t) for t in np.repeat(np.arange(0.0, 10.0, 0.5), 4)]  # batches of four, twice a second
    assert steady_rate(answers(every), items=2) == pytest.approx(16.0, rel=0.02)
    assert steady_rate(answers([1.0])) == 0.0


def test_recovery_is_where_the_first_good_seconds_begin() -> None:
    due = np.arange(100.0, 110.0, 0.05)
    slow = np.where(due < 102.0, 1.0, 0.01)
    assert recovered_s(answers(list(due + slow), intended=list(due)), 100.0, 10.0) == pytest.approx(2.0)
    assert recovered_s(answers(list(due + 0.01), intended=list(due)), 100.0, 10.0) == 0.0
    assert np.isnan(recovered_s(answers(list(due + 1.0), intended=list(due)), 100.0, 10.0)), "never well again"


def test_the_slope_of_a_line_with_noise() -> None:
    x = np.arange(0.0, 1800.0, 5.0)
    noise = np.random.default_rng(2).normal(0, 1.0, x.size)
    gradient, error = slope(x, 500.0 + x * 10 / 3600 + noise)
    assert gradient * 3600 == pytest.approx(10.0, abs=4 * error * 3600)
    assert 0 < error * 3600 < 1.0


def test_a_spread_keeps_the_repeats() -> None:
    assert spread([3.0, 1.0, 2.0]) == {"median": 2.0, "least": 1.0, "most": 3.0, "values": [3.0, 1.0, 2.0]}


def test_all_runs_every_campaign() -> None:
    found = campaigns()
    assert {"throughput", "searching", "overload", "poison", "soak"} <= set(found)
    assert not {"all", "traffic", "nothing", "poisoned", "server"} & set(found)
    assert found[-1] == "soak"


def test_the_readme_shows_a_missed_mark_as_missed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    from service_tables import service_marks  # type: ignore[import-not-found, unused-ignore]

    assert service_marks(tmp_path) == "_Not measured yet._"
    marks = {"ratio": mark(0.91, 0.9, "least"), "slope": mark(3.0, 2.0, "most")}
    record = {"marks": marks, "machine": {"cores": 2}, "created": "2026-01-01T00:00:00"}
    (tmp_path / "soak.json").write_text(json.dumps(record))
    (tmp_path / "other.json").write_text(json.dumps({"marks": [{"name": "x"}]}))
    table = service_marks(tmp_path)
    assert "| ratio | ≥ 0.9 | 0.91 | yes |" in table and "| slope | ≤ 2 | 3 | **no** |" in table


def test_a_campaign_that_takes_too_long_ends_with_all_it_started(tmp_path: Path) -> None:
    told = tmp_path / "pid"
    start = f"import subprocess; p = subprocess.Popen(['sleep', '60']); open({str(told)!r}, 'w').write(str(p.pid)); "
    assert "stopped" in str(_run([sys.executable, "-c", start + "p.wait()"], 2.0))
    child = Path(f"/proc/{told.read_text()}/status")
    for _ in range(100):
        if not child.exists() or "zombie" in child.read_text():
            break
        time.sleep(0.02)
    else:
        raise AssertionError("it lives on")
    assert _run([sys.executable, "-c", "raise SystemExit(3)"], 9.0) == "ended with code 3"
    assert _run([sys.executable, "-c", ""], 9.0) is None
