"""One object that fails in each batch of 64: are the other 63 answered as without it, and at what price?

    python -m benchmarks.chaos.poison [--short] [--fault early ...] [--out benchmarks/results/poison.json]

Requests of 64 spectra, the size of one batch, against a server whose model fails as `poisoned` says; clean and poisoned
requests take turns, and the price is the loss of good answers a second, among the 63.

    file     a truncated file: refused where it is read, before the batch
    nan      the model's answer is NaN for one object
    early    the pass raises before it worked: an index or shape error
    late     the pass raises after it worked: the worst there is, since the work of the whole batch is lost

The bad object is the same each time, as a client's that tries again: the service knows it from the second time on
(`service.quarantine`). With --strangers it is not to know anything, so that every batch is taken apart anew; what that
costs has a file of its own.
"""

from __future__ import annotations

import io
import time
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks.chaos.answers import Answers
from benchmarks.chaos.bodies import NPY, TYPES, body, galaxies, joined, truncated
from benchmarks.chaos.campaign import mark, options, parser, report, spread
from benchmarks.chaos.poisoned import MARK
from benchmarks.chaos.server import Server
from benchmarks.chaos.throughput import steady_rate
from benchmarks.chaos.traffic import Ask, Plan, Traffic

__all__ = ["FAULTS", "measured"]

FAULTS = ("file", "nan", "early", "late")
BATCH, BAD = 64, 37
ALIKE, LOSS = 1e-6, 0.10


def asks_of(fault: str | None) -> list[Ask]:
    """The request of 64, its object BAD poisoned."""
    spectra = galaxies("spectrum", BATCH, seed=3, native=False)
    files = [body(s, "grid") for s in spectra]
    if fault == "file":
        files[BAD] = truncated("spectrum")
    elif fault is not None:
        spectra[BAD].flux[0] = MARK  # type: ignore[union-attr]
        files[BAD] = body(spectra[BAD], "grid")
    data, media_type = joined(files, TYPES["grid"] if fault != "file" else "application/octet-stream")
    return [Ask("POST", "/v1/embed/spectrum", data, {"content-type": media_type, "accept": NPY})]


def measured(server: Server, fault: str, seconds: float, rounds: int) -> dict[str, Any]:
    """Clean and poisoned requests in turn."""
    clean, poisoned = asks_of(None), asks_of(fault)
    reference = _vectors(_ask(server, clean, connections=1, requests=1))[0]
    rates: dict[str, list[float]] = {"clean": [], "poisoned": []}
    losses, apart, statuses = [], 0.0, []
    for _ in range(rounds):
        good = _ask(server, clean, connections=3, seconds=seconds)
        bad = _ask(server, poisoned, connections=3, seconds=seconds)
        again = _ask(server, clean, connections=3, seconds=seconds)
        rates["clean"] += [steady_rate(a, BATCH - 1, 0.5) for a in (good, again)]
        rates["poisoned"].append(steady_rate(bad, BATCH - 1, 0.5))
        losses.append(1.0 - rates["poisoned"][-1] / float(np.mean(rates["clean"][-2:])))
        statuses.append(bad.statuses())
        for vectors in _vectors(bad):
            others = np.delete(vectors, BAD, axis=0)
            distance = np.abs(others - np.delete(reference, BAD, axis=0)).max()
            apart = max(apart, float(distance) if np.isfinite(distance) else float("inf"))
            apart = apart if np.isnan(vectors[BAD]).all() else float("inf")  # the culprit must have failed
    found = {
        "rates": {k: spread(v) for k, v in rates.items()},
        "loss": spread(losses),
        "apart": apart,
        "statuses": statuses,
    }
    print(fault, {"loss": losses, "apart": apart, **{k: np.median(v) for k, v in rates.items()}}, flush=True)
    return found


def _ask(server: Server, asked: list[Ask], **plan: Any) -> Answers:
    return Traffic(server.port, Plan(asked, keep=True, **plan)).run()


def _vectors(answers: Answers) -> list[npt.NDArray[np.float32]]:
    """Arrays of the good answers."""
    kept = zip(answers.bodies, answers.status, strict=True)
    return [np.load(io.BytesIO(data), allow_pickle=False) for data, status in kept if status == 200]


def main() -> int:
    options_of = parser(__doc__, "poison")
    options_of.add_argument("--fault", action="append", choices=FAULTS)
    options_of.add_argument("--seconds", type=float, default=8.0, help="of a run")
    options_of.add_argument("--rounds", type=int, default=4)
    options_of.add_argument("--strangers", action="store_true", help="as if no bad object came twice")
    arguments = options_of.parse_args()
    started = time.perf_counter()
    seconds, rounds = (3.0, 1) if arguments.short else (arguments.seconds, arguments.rounds)
    results: dict[str, Any] = {}
    for fault in arguments.fault or FAULTS:
        environment = {"ASTROCLIP_FAULT": fault}
        where = options(arguments)
        where["settings"]["model_process"] = False  # the fault is put into the process that serves
        if arguments.strangers:
            where["settings"]["quarantine_s"] = 0
        with Server(**where, module="benchmarks.chaos.poisoned", environment=environment) as server:
            results[fault] = measured(server, fault, seconds, rounds)
    marks = {}
    for fault, found in results.items():
        marks[f"{fault}: others differ by"] = mark(found["apart"], ALIKE, "most")
        marks[f"{fault}: throughput lost"] = mark(found["loss"]["median"], LOSS, "most")
    return report(
        arguments.out, "poison", started, marks, {"batch": BATCH, "strangers": arguments.strangers, "faults": results}
    )


if __name__ == "__main__":
    raise SystemExit(main())
