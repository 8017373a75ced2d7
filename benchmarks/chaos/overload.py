"""Five times what the service can do, for a minute: what it still does, how it says no, and how soon it is well again.

    python -m benchmarks.chaos.overload [--short] [--out benchmarks/results/overload.json]

For single spectra (in rounds) and for requests of eight: saturation in a closed loop before and after, five times of it
as Poisson arrivals between, then a light load as before the storm. Latencies count from when a request was due. Goodput
and the time of a refusal are medians of the rounds; all else is the worst of them.

Then two kinds of neighbours: interactive requests beside batch-class ones that fill the service, and a modest key
beside a greedy one.
"""

from __future__ import annotations

import dataclasses
import os
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.chaos.answers import Answers, percentile
from benchmarks.chaos.bodies import asks
from benchmarks.chaos.campaign import mark, options, parser, report
from benchmarks.chaos.server import Server
from benchmarks.chaos.throughput import steady_rate
from benchmarks.chaos.traffic import Ask, Plan, Traffic
from service.settings import Settings

__all__ = ["recovered_s", "storm"]

TIMES = 5.0
LIGHT = 0.2  # of saturation: the load before and after
GOODPUT, REFUSAL_MS, BACK_S = 0.95, 50.0, 5.0
NEAR = 1.5  # times the p50 before: as well as before
WINDOW_S, LEAST = 0.5, 8
POOL = 2048  # connections of an open loop: more than the service takes, so that it is the service that says no
MODEST = 0.2  # of saturation, what the modest key asks for
MODEST_WANTED = 0.95


def storm(server: Server, asked: Sequence[Ask], items: int, seconds: float, calm_s: float) -> dict[str, Any]:
    """Saturation, a light load, the storm, the light load again, saturation again."""
    saturated = [_saturation(server, asked, items, calm_s)]
    light = LIGHT * saturated[0] / items
    before = _open(server, asked, light, calm_s)
    cpu = server.cpu_s()
    during = _open(server, asked, TIMES * saturated[0] / items, seconds)
    cpu = server.cpu_s() - cpu
    ended = time.monotonic()
    after = _open(server, asked, light, max(calm_s, 2 * BACK_S))
    saturated.append(_saturation(server, asked, items, calm_s))
    start = float(during.intended.min())
    good = during.where(during.ok & (during.done >= start + 1.0) & (during.done < start + seconds))
    refused = during.where(during.status == 429)
    p50 = percentile(before.latency_ms[before.ok], 50)
    goodput = items * len(good) / (seconds - 1.0)
    found = {
        "objects_a_request": items,
        "saturation": saturated,
        "asked_rate": TIMES * saturated[0],
        "goodput": goodput,
        "goodput_of_saturation": goodput / float(np.mean(saturated)),
        "accepted_p50_ms": percentile(good.latency_ms, 50),
        "accepted_p99_ms": percentile(good.latency_ms, 99),
        "refused": len(refused),
        "refused_p50_ms": percentile(refused.latency_ms, 50),
        "refused_p99_ms": percentile(refused.latency_ms, 99),
        "refused_p99_ms_from_sending": percentile(refused.service_ms, 99),
        "others": {k: v for k, v in during.statuses().items() if k not in ("200", "429")},
        "never_sent": during.queued,
        "p50_before_ms": p50,
        "p50_after_ms": percentile(after.latency_ms[after.ok], 50),
        "back_after_s": recovered_s(after, ended, p50),
        "server_cpu_s": cpu,
        "client_cpu_s": during.cpu_s,
    }
    print({k: v for k, v in found.items() if k != "others"}, flush=True)
    return found


def recovered_s(after: Answers, ended: float, p50_ms: float) -> float:
    """Seconds from `ended` until two windows in a row have a p50 within NEAR of `p50_ms`; NaN if that never came.

    A window is WINDOW_S long, or as long as LEAST requests take.
    """
    order = np.argsort(after.intended)
    due, took, ok = after.intended[order], after.latency_ms[order], after.ok[order]
    good = []
    start, last = ended, float(due.max(initial=ended))
    while start < last:
        first = int(np.searchsorted(due, start))
        stop = max(int(np.searchsorted(due, start + WINDOW_S)), min(first + LEAST, len(due)))
        good.append((start, bool(ok[first:stop].all()) and percentile(took[first:stop], 50) <= NEAR * p50_ms))
        if len(good) > 1 and good[-1][1] and good[-2][1]:
            return good[-2][0] - ended
        start = max(start + WINDOW_S, float(due[stop - 1]) + 1e-9)
    return float("nan")


def _saturation(server: Server, asked: Sequence[Ask], items: int, seconds: float) -> float:
    answers = Traffic(server.port, Plan(asked, connections=max(8, 64 // items), seconds=seconds)).run()
    return steady_rate(answers, items)


def _open(server: Server, asked: Sequence[Ask], rate: float, seconds: float) -> Answers:
    plan = Plan(asked, connections=POOL, rate=max(rate, 0.5), arrivals="poisson", seconds=seconds)
    return Traffic(server.port, plan).run()


def lanes(
    server: Server, single: Sequence[Ask], many: Sequence[Ask], saturation: float, seconds: float
) -> dict[str, Any]:
    """A person's requests alone, then beside batch-class requests of 32 objects that fill the service."""
    patient = [_with(ask, {"x-priority": "batch"}) for ask in many]
    alone = _open(server, single, 0.1 * saturation, seconds)
    background = Traffic(server.port, Plan(patient, connections=8)).start()
    time.sleep(1.0)
    beside = _open(server, single, 0.1 * saturation, seconds)
    batch = background.stop()
    return {
        "interactive_alone": alone.summary(),
        "interactive_beside_batch": beside.summary(),
        "batch_objects_a_second": 32 * batch.rate(),
    }


def keys(where: Mapping[str, Any], asked: Sequence[Ask], saturation: float, seconds: float) -> dict[str, Any] | None:
    """A modest key beside one that asks for five times what there is; None where the service has no keys."""
    try:
        from service.keys import changing, new_key  # type: ignore[import-not-found,unused-ignore]
    except ImportError:
        return None
    with tempfile.TemporaryDirectory() as folder:
        path, secrets = Path(folder) / "keys.json", []
        with changing(path) as held:
            for note in ("modest", "greedy"):
                secret, key = new_key(["read"], note=note, max_rate_per_s=0, max_in_flight=0)
                held.append(key)
                secrets.append(secret)
        with Server(**{**where, "settings": {**where["settings"], "keys_file": path}}) as server:
            modest, greedy = ([_with(ask, {"authorization": f"Bearer {key}"}) for ask in asked] for key in secrets)
            _saturation(server, modest, 1, 2.0)
            storm_of = Traffic(
                server.port, Plan(greedy, connections=POOL, rate=TIMES * saturation, arrivals="poisson")
            ).start()
            time.sleep(2.0)
            quiet = _open(server, modest, MODEST * saturation, seconds)
            loud = storm_of.stop()
    return {
        "modest_asked": len(quiet) / seconds,
        "modest_answered": int(quiet.ok.sum()) / max(1, len(quiet)),
        "modest": quiet.summary(),
        "greedy": loud.summary(),
    }


def _with(ask: Ask, headers: Mapping[str, str]) -> Ask:
    return dataclasses.replace(ask, headers={**ask.headers, **headers})


def main() -> int:
    options_of = parser(__doc__, "overload")
    options_of.add_argument("--seconds", type=float, default=60.0, help="of the storm")
    options_of.add_argument("--rounds", type=int, default=5, help="of storms of single spectra")
    arguments = options_of.parse_args()
    started = time.perf_counter()
    seconds, calm, rounds = (15.0, 6.0, 1) if arguments.short else (arguments.seconds, 12.0, arguments.rounds)
    where = options(arguments)
    single, eight = asks("spectrum", "grid", count=96), asks("spectrum", "grid", items=8, count=12)
    with Server(**where) as server:
        _saturation(server, single, 1, 3.0)
        storms = {
            "one object": [storm(server, single, 1, seconds, calm) for _ in range(rounds)],
            "eight objects": [storm(server, eight, 8, seconds, calm)],
        }
        saturation = float(np.mean([found["saturation"] for found in storms["one object"]]))
        beside = lanes(server, single, asks("spectrum", "grid", items=32, count=4), saturation, calm)
        alive = server.alive
    greedy = keys(where, single, saturation, calm)
    deadline_ms = 1e3 * Settings().deadline_s

    def worst(name: str) -> float:
        return float(np.max([found[name] for rounds_of in storms.values() for found in rounds_of]))  # NaN stays

    def medians(name: str) -> list[float]:
        return [float(np.median([found[name] for found in rounds_of])) for rounds_of in storms.values()]

    marks = {
        "goodput at 5x / saturation": mark(float(np.min(medians("goodput_of_saturation"))), GOODPUT, "least"),
        "p99 of accepted, ms": mark(worst("accepted_p99_ms"), deadline_ms, "most"),
        "p99 of refusals, ms": mark(float(np.max(medians("refused_p99_ms"))), REFUSAL_MS, "most"),
        "back to normal after, s": mark(worst("back_after_s"), BACK_S, "most"),
        "answers that are neither 200 nor 429": mark(
            sum(sum(f["others"].values()) for rounds_of in storms.values() for f in rounds_of), 0, "most"
        ),
    }
    if greedy is not None:
        marks["answered of a modest key beside a greedy one"] = mark(greedy["modest_answered"], MODEST_WANTED, "least")
    extra = {"cores": len(os.sched_getaffinity(0)), "alive": alive, "storms": storms, "lanes": beside, "keys": greedy}
    return report(arguments.out, "overload", started, marks, extra)


if __name__ == "__main__":
    raise SystemExit(main())
