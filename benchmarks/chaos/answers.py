"""Answers of a run of traffic, and what they say: rates, percentiles, what was refused.

Latency is counted from the moment a request was *meant* to be sent. A client that waits for a slow answer before it
sends the next would otherwise leave out just the requests that met the slowness (coordinated omission).
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["Answers", "percentile"]

Times = npt.NDArray[np.float64]


def percentile(values: npt.ArrayLike, q: float) -> float:
    """The q-th percentile, an observed value (the smallest that at least q per cent do not pass); NaN of nothing."""
    array = np.sort(np.asarray(values, np.float64))
    if not array.size:
        return float("nan")
    return float(array[max(0, int(np.ceil(q / 100.0 * array.size)) - 1)])


@dataclass(frozen=True)
class Answers:
    """One entry a request, in the order in which answers came.

    which:    (N,) index into the asks of the plan.
    intended, sent, done: (N,) seconds of `time.monotonic()`, which all processes of the machine share; in a closed
              loop a request is meant to be sent when it is.
    status:   (N,) HTTP status; 0 where none came: `errors` counts why, by name.
    queued:   requests whose time came but that were never sent before the end.
    faults:   what the check of the plan said of answers, the first hundred; `fault_count` of all.
    bodies:   the answers' bodies, where the plan keeps them.
    headers:  their heads, raw, where the plan keeps them.
    cpu_s:    processor time of the traffic process: what the load itself took from the machine.
    """

    which: npt.NDArray[np.int32]
    intended: Times
    sent: Times
    done: Times
    status: npt.NDArray[np.int16]
    errors: Counter[str] = field(default_factory=Counter)
    queued: int = 0
    faults: tuple[str, ...] = ()
    fault_count: int = 0
    bodies: tuple[bytes, ...] = ()
    headers: tuple[bytes, ...] = ()
    cpu_s: float = 0.0

    def __len__(self) -> int:
        return len(self.status)

    @property
    def latency_ms(self) -> Times:
        return 1e3 * (self.done - self.intended)

    @property
    def service_ms(self) -> Times:
        """From the moment a request really left: what a caller sees who had a connection free."""
        return 1e3 * (self.done - self.sent)

    @property
    def ok(self) -> npt.NDArray[np.bool_]:
        return (self.status >= 200) & (self.status < 300)

    def where(self, chosen: npt.NDArray[np.bool_]) -> Answers:
        """Only some of them; bodies and counts of errors are left behind."""
        return Answers(
            self.which[chosen], self.intended[chosen], self.sent[chosen], self.done[chosen], self.status[chosen]
        )

    def rate(self, start: float | None = None, stop: float | None = None) -> float:
        """Good answers a second in [start, stop); by default from the first send to the last answer."""
        if not len(self):
            return 0.0
        start = float(self.sent.min()) if start is None else start
        stop = float(self.done.max()) if stop is None else stop
        good = self.done[self.ok]
        return float(np.count_nonzero((good >= start) & (good <= stop)) / max(stop - start, 1e-9))

    def statuses(self) -> dict[str, int]:
        """How often each status came; requests without one under the name of their error."""
        values, counts = np.unique(self.status[self.status > 0], return_counts=True)
        return {**{str(v): int(c) for v, c in zip(values, counts, strict=True)}, **dict(sorted(self.errors.items()))}

    def summary(self) -> dict[str, Any]:
        good = self.latency_ms[self.ok]
        return {
            "requests": len(self),
            "statuses": self.statuses(),
            "rate": self.rate(),
            "p50_ms": percentile(good, 50),
            "p90_ms": percentile(good, 90),
            "p99_ms": percentile(good, 99),
            "max_ms": percentile(good, 100),
            "client_cpu_ms": 1e3 * self.cpu_s / max(len(self), 1),
        }
