"""Prometheus metrics, placed by hand: what an operator of this service looks at, and nothing a middleware would guess.

One registry an application, so that two in one process (tests) do not add up. Names follow the conventions of
Prometheus: base units, `_total` for counters. Labels are bounded: routes are templates, reasons are error codes.
"""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info, generate_latest

__all__ = ["Metrics"]

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class Metrics:
    """See the module. Every method may be called from any thread."""

    def __init__(self) -> None:
        registry = self.registry = CollectorRegistry()
        self._requests = Histogram(
            "astroclip_request_seconds",
            "Time from the request's head to the end of its answer.",
            ["route", "status"],
            buckets=_SECONDS,
            registry=registry,
        )
        self._stages = Histogram(
            "astroclip_stage_seconds",
            "Time a request spent in a stage.",
            ["stage"],
            buckets=_SECONDS,
            registry=registry,
        )
        self._rejected = Counter(
            "astroclip_rejected_total", "Requests refused, by error code.", ["reason"], registry=registry
        )
        self._batch_size = Histogram(
            "astroclip_batch_size", "Items a batch.", ["worker"], buckets=_SIZES, registry=registry
        )
        self._batch_seconds = Histogram(
            "astroclip_batch_seconds", "Time of a batch.", ["worker"], buckets=_SECONDS, registry=registry
        )
        self._queue = Gauge("astroclip_queue_items", "Items waiting for a worker.", ["worker"], registry=registry)
        self._failures = Counter(
            "astroclip_worker_failures_total", "Batches that raised, and workers restarted.", ["worker", "what"],
            registry=registry,
        )  # fmt: skip
        self._trust = Counter(
            "astroclip_judged_total", "Queries judged by trust.", ["modality", "flagged"], registry=registry
        )
        self._swaps = Counter("astroclip_index_swaps_total", "Index swaps, by outcome.", ["outcome"], registry=registry)
        self._index = Info("astroclip_index", "The index served.", registry=registry)

    def request(self, route: str, status: int, seconds: float) -> None:
        """One request answered; route: its template (`/v1/objects/{object_id}`), never its path."""
        self._requests.labels(route, str(status)).observe(seconds)

    def stage(self, stage: str, seconds: float) -> None:
        self._stages.labels(stage).observe(seconds)

    def rejected(self, reason: str) -> None:
        """One request refused; reason: the code of its error."""
        self._rejected.labels(reason).inc()

    def batch(self, worker: str, size: int, seconds: float) -> None:
        self._batch_size.labels(worker).observe(size)
        self._batch_seconds.labels(worker).observe(seconds)

    def queue(self, worker: str, waiting: Callable[[], float]) -> None:
        """Where to read how many items wait for `worker`; asked at every scrape."""
        self._queue.labels(worker).set_function(waiting)

    def failure(self, worker: str, what: str) -> None:
        """what: batch, item, restart or non_finite."""
        self._failures.labels(worker, what).inc()

    def judged(self, modality: str, flagged: bool) -> None:
        """One query judged; flagged: as out of distribution."""
        self._trust.labels(modality, str(flagged).lower()).inc()

    def swap(self, outcome: str) -> None:
        """outcome: swapped, refused or unchanged."""
        self._swaps.labels(outcome).inc()

    def serving(self, index_id: str, manifest_sha256: str, model_sha256: str) -> None:
        self._index.info({"id": index_id, "manifest_sha256": manifest_sha256, "model_sha256": model_sha256})

    def text(self) -> bytes:
        """All of it in Prometheus' text format."""
        return generate_latest(self.registry)
