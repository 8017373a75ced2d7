"""What HTTP costs an embedding: the service against the model alone, on one machine, in one run.

    python -m benchmarks.chaos.throughput [--short] [--threads N] [--out benchmarks/results/throughput.json]

Raw: the model on prepared grids in batches of `encode_batch`, nothing else in the way. Service: a real server and, in a
third process, a client that keeps 64 requests under way; both take from the same cores. Raw and service take turns, and
a ratio is that of a service run to the mean of the raw runs before and after it, all with the same torch threads.

    throughput   objects a second over HTTP / raw: bodies on the model's grid, alone and 32 a request; FITS files
    overhead     p50 of one request at a time - p50 of the model at batch 1 (grid bodies), in many short rounds
    tail         p99 / p50 of Poisson arrivals at 70 % of the throughput measured just before, in rounds; where
                 cores lose a third of their speed for seconds, that of a minute ago may be overload
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from astroclip.embed import Embedder
from astroclip.types import Modality
from benchmarks.chaos.answers import Answers, percentile
from benchmarks.chaos.bodies import asks, galaxies
from benchmarks.chaos.campaign import mark, options, parser, report, spread
from benchmarks.chaos.server import Server
from benchmarks.chaos.traffic import Ask, Plan, Traffic
from service.model_process import torch_threads
from service.settings import Settings

__all__ = ["KINDS", "Raw", "measured", "server_of", "steady_rate", "threads_of"]

# name: (form of the body, objects a request, connections)
KINDS = {"grid": ("grid", 1, 64), "grid x 32": ("grid", 32, 6), "fits": ("fits", 1, 64)}
RATIO_GRID, RATIO_FITS, OVERHEAD_MS, TAIL = 0.90, 0.75, 5.0, 3.0
LOAD = 0.7
PAUSE_S = 0.005  # of a client between one answer and its next request, where the service is idle
WARM_S = 1.0


class Raw:
    """The model alone, on galaxies of `bodies`."""

    def __init__(self, settings: Settings, threads: int, count: int = 128) -> None:
        torch.set_num_threads(threads)
        self.embedder = Embedder.from_pretrained(
            settings.model_dir, device=settings.device, dtype=settings.dtype, batch_size=settings.encode_batch
        )
        self.grids: dict[Modality, list[Any]] = {
            m: [self.embedder.prepare(g) for g in galaxies(m, count, native=False)] for m in self.embedder.modalities
        }

    def rate(self, modality: Modality, seconds: float) -> float:
        """Objects a second in full batches."""
        grids, size, done = self.grids[modality], self.embedder.batch_size, 0
        batches = [[grids[(start + i) % len(grids)] for i in range(size)] for start in range(0, len(grids), size)]
        self.embedder.encode(batches[0])
        started = time.perf_counter()
        while (spent := time.perf_counter() - started) < seconds:
            done += len(self.embedder.encode(batches[done // size % len(batches)]))
        return done / spent

    def single_ms(self, modality: Modality, count: int, pause_s: float = 0.0) -> list[float]:
        """Times of single objects, with pauses between."""
        grids, times = self.grids[modality], []
        for i in range(count + 3):
            time.sleep(pause_s)
            started = time.perf_counter()
            self.embedder.encode([grids[i % len(grids)]])
            times.append(1e3 * (time.perf_counter() - started))
        return times[3:]


def threads_of(asked: int | None) -> int:
    """Torch threads of both sides: as asked, else as the service is set."""
    return asked or torch_threads(Settings())


def server_of(where: dict[str, Any], threads: int, **settings: Any) -> Server:
    """A server with so many torch threads."""
    chosen = {**where.get("settings", {}), "torch_threads": threads, **settings}
    return Server(**{**where, "settings": chosen}, environment={"OMP_NUM_THREADS": str(threads)})


def steady_rate(answers: Answers, items: int = 1, warm_s: float = WARM_S) -> float:
    """Objects a second between the first good answer after warm-up and the last."""
    done = np.sort(answers.done[answers.ok])
    if len(done) < 2:
        return 0.0
    done = done[done >= min(answers.sent.min() + warm_s, done[-2])]
    # Answers of one batch come together: count what came after the first moment, over the time it took.
    first = done[0] + 1e-3
    return float(items * np.count_nonzero(done > first) / (done[-1] - done[0]))


def measured(
    server: Server, raw: Raw, seconds: float, rounds: int, kinds: Sequence[str] = tuple(KINDS)
) -> dict[str, Any]:
    """Everything, by modality."""
    return {m: _modality(server, raw, m, seconds, rounds, kinds) for m in raw.embedder.modalities}


def _modality(
    server: Server, raw: Raw, modality: Modality, seconds: float, rounds: int, kinds: Sequence[str]
) -> dict[str, Any]:
    sets = {
        name: asks(modality, form, items=items, count=96 if items == 1 else 6) for name, (form, items, _) in _of(kinds)
    }
    alone: list[float] = [raw.rate(modality, seconds / 2)]
    rates: dict[str, list[float]] = {name: [] for name in kinds}
    ratios: dict[str, list[float]] = {name: [] for name in kinds}
    details: dict[str, Any] = {}
    for _ in range(rounds):
        for name, (_, items, connections) in _of(kinds):
            before = server.cpu_s()
            answers = Traffic(server.port, Plan(sets[name], connections=connections, seconds=seconds)).run()
            spent = server.cpu_s() - before
            alone.append(raw.rate(modality, seconds / 2))
            rate = steady_rate(answers, items)
            rates[name].append(rate)
            ratios[name].append(rate / ((alone[-2] + alone[-1]) / 2))
            details[name] = {
                **answers.summary(),
                "server_cpu_ms_an_object": 1e3 * spent / max(1, items * int(answers.ok.sum())),
                "client_cpu_ms_an_object": 1e3 * answers.cpu_s / max(1, items * len(answers)),
            }
            print(f"{modality} {name}: {rate:.1f}/s, raw {alone[-1]:.1f}/s, ratio {ratios[name][-1]:.3f}", flush=True)
    out: dict[str, Any] = {
        "raw_rate": spread(alone),
        "http": {n: {"rate": spread(rates[n]), "ratio": spread(ratios[n]), "last": details[n]} for n in kinds},
        "idle": _idle(server, raw, modality, sets["grid"], rounds),
    }
    out["tail"] = _tail(server, sets["grid"], seconds, rounds)
    return out


def _of(kinds: Sequence[str]) -> list[tuple[str, tuple[Any, int, int]]]:
    return [(name, KINDS[name]) for name in kinds]


def _idle(
    server: Server, raw: Raw, modality: Modality, bodies: Sequence[Ask], rounds: int, count: int = 20
) -> dict[str, Any]:
    """One request at a time with pauses, and the model alone between, with the same pauses: after one, a pass takes
    longer, with a service around it or without. The model without pauses is there as well."""
    http, model, overhead, unpaused = [], [], [], []
    for _ in range(3 * rounds):
        alone = percentile(raw.single_ms(modality, count, PAUSE_S), 50)
        answers = Traffic(server.port, Plan(bodies, connections=1, requests=count + 5, think_s=PAUSE_S)).run()
        asked = percentile(answers.latency_ms[answers.ok][5:], 50)
        again = percentile(raw.single_ms(modality, count, PAUSE_S), 50)
        model.append((alone + again) / 2)
        http.append(asked)
        overhead.append(asked - model[-1])
        unpaused.append(percentile(raw.single_ms(modality, count), 50))
    print(f"{modality} idle: {np.median(http):.2f} ms, model {np.median(model):.2f} ms", flush=True)
    return {
        "http_p50_ms": spread(http),
        "model_p50_ms": spread(model),
        "model_without_pauses_p50_ms": spread(unpaused),
        "overhead_ms": spread(overhead),
    }


def _tail(server: Server, bodies: Sequence[Ask], seconds: float, rounds: int) -> dict[str, Any]:
    """Latencies at LOAD of saturation, which is measured before each round and once more at the end."""

    def saturation() -> float:
        answers = Traffic(server.port, Plan(bodies, connections=64, seconds=max(4.0, seconds / 2))).run()
        return steady_rate(answers)

    found, full = [], saturation()
    for _ in range(rounds):
        rate = LOAD * full
        plan = Plan(bodies, connections=256, rate=max(rate, 1.0), arrivals="poisson", seconds=3 * seconds)
        summary = Traffic(server.port, plan).run().summary()
        full, ratio = saturation(), summary["p99_ms"] / summary["p50_ms"]
        found.append({"asked_rate": rate, **summary, "p99_over_p50": ratio, "load_by_saturation_after": rate / full})
        print(f"  {rate:.1f}/s: p50 {summary['p50_ms']:.1f} p99 {summary['p99_ms']:.1f} ms, {ratio:.2f}", flush=True)
    names = ("p50_ms", "p99_ms", "p99_over_p50", "load_by_saturation_after")
    return {**{name: spread([one[name] for one in found]) for name in names}, "rounds": found}


def marks_of(results: dict[str, Any]) -> dict[str, Any]:
    """The worst modality counts."""

    def worst(kind: str) -> float:
        return min(found["http"][kind]["ratio"]["median"] for found in results.values())

    return {
        "embed over HTTP / model, bodies on the grid": mark(worst("grid"), RATIO_GRID, "least"),
        "embed over HTTP / model, 32 a request": mark(worst("grid x 32"), RATIO_GRID, "least"),
        "embed over HTTP / model, FITS": mark(worst("fits"), RATIO_FITS, "least"),
        "overhead of one request, ms": mark(
            max(f["idle"]["overhead_ms"]["median"] for f in results.values()), OVERHEAD_MS, "most"
        ),
        "p99 / p50 at 70 % load": mark(
            max(f["tail"]["p99_over_p50"]["median"] for f in results.values()), TAIL, "most"
        ),
    }


def main() -> int:
    options_of = parser(__doc__, "throughput")
    options_of.add_argument("--seconds", type=float, default=8.0, help="of a service run")
    options_of.add_argument("--rounds", type=int, default=5)
    options_of.add_argument("--threads", type=int, help="torch threads of both sides; default: the service's")
    arguments = options_of.parse_args()
    started = time.perf_counter()
    seconds, rounds = (4.0, 2) if arguments.short else (arguments.seconds, arguments.rounds)
    threads = threads_of(arguments.threads)
    where = options(arguments)
    settings = Settings(**{f"{name}_dir": where[name] for name in ("index", "model") if where[name] is not None})
    raw = Raw(settings, threads)
    with server_of(where, threads) as server:
        results = measured(server, raw, seconds, rounds)
    every = len(os.sched_getaffinity(0))
    torch.set_num_threads(every)
    best: dict[str, float] = {m: raw.rate(m, seconds / 2) for m in raw.embedder.modalities}
    settings_used = {
        "torch_threads": threads,
        "encode_batch": settings.encode_batch,
        "seconds": seconds,
        "rounds": rounds,
    }
    extra = {"settings": settings_used, "raw_rate_all_cores": {"threads": every, "rate": best}, "results": results}
    return report(arguments.out, "throughput", started, marks_of(results), extra)


if __name__ == "__main__":
    raise SystemExit(main())
