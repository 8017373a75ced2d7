"""Half an hour of mixed traffic: does memory creep, do files stay open?

    python -m benchmarks.chaos.soak [--minutes 30] [--warm-up 4] [--rate 20] [--arenas N]
                                    [--out benchmarks/results/soak.json]

Poisson arrivals: embeddings of both modalities (grid and FITS), searches, estimates, lookups, uploads to search with,
broken files, unknown objects, and clients that hang up. The traffic pauses for two seconds every minute; open files
are counted then, when no connection is there to blur the count. Resident memory is read every five seconds, of the
service and of the model's process, of files and of their own; its slope is that of a straight line through the
readings of the `--minutes` after warm-up, with its standard error.

Memory grows in steps, each time that more comes together than ever before: buffers, the pool of Arrow, kernels for
batches of a size not seen yet. At this rate the rarest take half an hour to have come once, and a straight line cannot
tell them from a leak. So warm-up begins with a minute of the same requests from 64 connections that send as soon as
they were answered, which takes most steps beforehand; not all, so the readings say more than the slope.

--arenas sets MALLOC_ARENA_MAX for the server: glibc gives every thread an arena of its own, and what they hold back
looks like a leak.
"""

from __future__ import annotations

import threading
import time
from typing import Any

import numpy as np

from benchmarks.chaos.answers import percentile
from benchmarks.chaos.bodies import asks, body, galaxies, truncated
from benchmarks.chaos.campaign import JSON, mark, object_ids, options, parser, report, search_asks
from benchmarks.chaos.server import Server
from benchmarks.chaos.traffic import Ask, Plan, Traffic

__all__ = ["mixture", "slope"]

SLOPE_MB_H = 2.0
EVERY_S = 5.0
SEGMENT_S, PAUSE_S = 60.0, 2.0
MB, KIB_OF_MB = 2**20, 2**10


def mixture(server: Server) -> list[Ask]:
    """What comes, weighted: half of it work for the model."""
    ids = object_ids(server, 48)
    kinds: list[tuple[float, list[Ask]]] = [
        (20.0, asks("spectrum", "grid", count=12)),
        (10.0, asks("image", "grid", count=12)),
        (8.0, asks("spectrum", "fits", count=8)),
        (5.0, asks("image", "fits", count=8)),
        (3.0, asks("spectrum", "grid", items=8, count=2)),
        (20.0, search_asks(ids)),
        (10.0, search_asks(ids, estimate=True)),
        (8.0, [Ask("GET", f"/v1/objects/{i}") for i in ids]),
        (4.0, _uploads("/v1/search?k=8")),
        (3.0, [Ask("POST", "/v1/embed/spectrum", truncated("spectrum"), {"content-type": "application/fits"})]),
        (2.0, [Ask("POST", "/v1/embed/image", b"\x89PNG\r\n\x1a\n" + bytes(64), {"content-type": "image/png"})]),
        (2.0, [Ask("POST", "/v1/search", b'{"query": {"object_id": "nobody"}}', {"content-type": JSON})]),
        (1.0, [Ask("GET", "/nothing/here")]),
        (1.0, [Ask("GET", "/readyz")]),
        (2.0, [_dropped(ask) for ask in asks("spectrum", "fits", count=2, seed=5)]),
        (1.0, [_dropped(ask) for ask in search_asks(ids[:2])]),
    ]
    return [_weighted(ask, weight / len(group)) for weight, group in kinds for ask in group]


def _uploads(path: str) -> list[Ask]:
    spectra = galaxies("spectrum", 6, seed=4)
    return [Ask("POST", path, body(s, "fits"), {"content-type": "application/fits"}) for s in spectra]


def _weighted(ask: Ask, weight: float) -> Ask:
    return Ask(ask.method, ask.path, ask.body, ask.headers, weight, ask.drop_after_s)


def _dropped(ask: Ask) -> Ask:
    return Ask(ask.method, ask.path, ask.body, ask.headers, ask.weight, 0.003)


def slope(seconds: Any, values: Any) -> tuple[float, float]:
    """Least-squares slope of values over seconds, and its standard error."""
    x, y = np.asarray(seconds, float), np.asarray(values, float)
    if len(x) < 3:
        return float("nan"), float("nan")
    (gradient, _), covariance = np.polyfit(x, y, 1, cov="unscaled")
    rest = y - np.polyval(np.polyfit(x, y, 1), x)
    return float(gradient), float(np.sqrt(covariance[0, 0] * np.sum(rest**2) / (len(x) - 2)))


class _Readings:
    """Memory, files and threads of the server, read every five seconds by a thread."""

    COLUMNS = ("s", "rss_mb", "files", "threads", "service_mb", "service_files_mb", "model_mb", "model_files_mb")

    def __init__(self, server: Server, every_s: float) -> None:
        self.server, self.every_s = server, every_s
        self.rows: list[tuple[float, ...]] = []
        self.started = time.monotonic()
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._live, daemon=True)
        self._thread.start()

    def _live(self) -> None:
        while not self._end.wait(self.every_s) and self.server.alive:
            self.rows.append(self.read())

    def read(self) -> tuple[float, ...]:
        """Of COLUMNS; `..._files_mb` is what they have mapped of files (code, weights, vectors)."""
        server = self.server
        own, *started = server.memory_kib().values()
        parts = [own["RssAnon"], own["RssFile"], *(sum(each[k] for each in started) for k in ("RssAnon", "RssFile"))]
        after_s = time.monotonic() - self.started
        memory = [part / KIB_OF_MB for part in parts]
        return after_s, server.rss_bytes() / MB, server.open_files(), server.threads(), *memory

    def stop(self) -> None:
        self._end.set()
        self._thread.join()


def main() -> int:
    options_of = parser(__doc__, "soak")
    options_of.add_argument("--minutes", type=float, default=30.0, help="measured, after warm-up")
    options_of.add_argument("--warm-up", type=float, default=4.0, help="minutes before, the first of them at full load")
    options_of.add_argument("--rate", type=float, default=20.0, help="requests a second")
    options_of.add_argument("--arenas", type=int, help="MALLOC_ARENA_MAX of the server; default: glibc's")
    arguments = options_of.parse_args()
    started = time.perf_counter()
    minutes, warm_up = (1.0, 0.5) if arguments.short else (arguments.minutes, arguments.warm_up)
    warm_s, total = 60.0 * warm_up, 60.0 * (warm_up + minutes)
    segment = min(SEGMENT_S, total / 6)
    environment = {} if arguments.arenas is None else {"MALLOC_ARENA_MAX": str(arguments.arenas)}
    resting, statuses, p50 = [], [], []
    with Server(**options(arguments), environment=environment) as server:
        mixed, readings = mixture(server), _Readings(server, min(EVERY_S, segment / 4))
        seed = 0
        while time.monotonic() - readings.started < total:
            rate = arguments.rate if seed else None
            plan = Plan(mixed, connections=64, rate=rate, arrivals="poisson", seconds=segment, seed=seed)
            seed += 1
            answers = Traffic(server.port, plan).run()
            statuses.append(answers.statuses())
            p50.append(percentile(answers.latency_ms[answers.ok], 50))
            time.sleep(PAUSE_S)
            resting.append(readings.read())
        readings.stop()
        alive = server.alive
    rows = np.array(readings.rows)
    late = rows[rows[:, 0] > warm_s]
    per_s, error = slope(late[:, 0], late[:, 1])
    files = [row[2] for row in resting if row[0] > warm_s]
    failures = sum(n for each in statuses for status, n in each.items() if status.isdigit() and int(status) >= 500)
    marks = {
        "memory after warm-up, MB an hour": mark(3600 * per_s, SLOPE_MB_H, "most"),
        "open files at rest, most - least": mark(max(files) - min(files), 0, "most"),
        "answers of 500 and more": mark(failures, 0, "most"),
    }
    extra = {
        "minutes": minutes,
        "warm_up_minutes": warm_up,
        "rate": arguments.rate,
        "malloc_arena_max": arguments.arenas,
        "slope_mb_h": 3600 * per_s,
        "slope_error_mb_h": 3600 * error,
        "statuses": {
            name: sum(each.get(name, 0) for each in statuses) for name in sorted({n for s in statuses for n in s})
        },
        "p50_ms": p50,
        "alive": alive,
        "exit_code": server.exit_code,
        "at_rest": [dict(zip(_Readings.COLUMNS, row, strict=True)) for row in resting],
        "readings": dict(zip(_Readings.COLUMNS, rows.T, strict=True)),
    }
    return report(arguments.out, "soak", started, marks, extra)


if __name__ == "__main__":
    raise SystemExit(main())
