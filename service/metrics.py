"""Prometheus metrics, placed by hand: what an operator of this service looks at, and nothing a middleware would guess.

One registry an application, so that two in one process (tests) do not add up. Names follow the conventions of
Prometheus: base units, `_total` for counters. One process serves one model on one device by design, so there is no
multiprocess mode; several replicas are several targets of one scrape job.

No caller can make a label: routes are templates, reasons are codes written in our own source, and a label that should
ever take more than `MOST_VALUES` values calls the rest "other".
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    GCCollector,
    Histogram,
    Info,
    ProcessCollector,
    disable_created_metrics,
)
from prometheus_client.exposition import choose_encoder, generate_latest
from prometheus_client.metrics import MetricWrapperBase

from astroclip import __version__

__all__ = ["MOST_VALUES", "Described", "Metrics"]

MOST_VALUES = 200  # of one label: twice the error codes there are

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)

# A `_created` gauge for every series would double the page, and nothing of ours reads it.
disable_created_metrics()

M = TypeVar("M", bound=MetricWrapperBase)


@dataclass(frozen=True)
class Described:
    """A metric as the documentation lists it."""

    name: str
    kind: str
    labels: tuple[str, ...]
    text: str


class _Children:
    """A metric's series by label values, found without its lock; see `MOST_VALUES`."""

    def __init__(self, metric: Any, count: int) -> None:
        self._metric = metric
        self._known: dict[tuple[str, ...], Any] = {}
        self._values: tuple[set[str], ...] = tuple(set() for _ in range(count))

    def __call__(self, *labels: str) -> Any:
        child = self._known.get(labels)
        return self._new(labels) if child is None else child

    def _new(self, labels: tuple[str, ...]) -> Any:
        bounded = []
        for value, seen in zip(labels, self._values, strict=True):
            if value not in seen and len(seen) >= MOST_VALUES:
                value = "other"
            seen.add(value)
            bounded.append(value)
        child = self._metric.labels(*bounded)
        if tuple(bounded) == labels:  # else the table of the known would be what grows
            self._known[labels] = child
        return child


class Metrics:
    """See the module. Every method may be called from any thread."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.described: list[Described] = []
        self._requests = self._labelled(
            Histogram,
            "astroclip_request_seconds",
            "Requests answered, and the time from a request's head to the end of its answer; status 499: the client "
            "left before.",
            ("route", "status"),
            buckets=_SECONDS,
        )
        self._in_flight = self._plain(Gauge, "astroclip_requests_in_flight", "Requests being handled.")
        self._stages = self._labelled(
            Histogram,
            "astroclip_stage_seconds",
            "Time of a request in a stage it came to: queue (waiting), decode, inference, search.",
            ("stage",),
            buckets=_SECONDS,
        )
        self._rejected = self._labelled(
            Counter, "astroclip_rejected_total", "Requests refused or failed, by the code of the error.", ("reason",)
        )
        self._items_refused = self._labelled(
            Counter,
            "astroclip_items_refused_total",
            "Items of answered requests that carry an error in place of a vector, by its code.",
            ("modality", "reason"),
        )
        self._batch_size = self._labelled(
            Histogram, "astroclip_batch_size", "Items a batch.", ("worker",), buckets=_SIZES
        )
        self._batch_seconds = self._labelled(
            Histogram, "astroclip_batch_seconds", "Time of a batch.", ("worker",), buckets=_SECONDS
        )
        self._queue = self._labelled(Gauge, "astroclip_queue_items", "Items waiting for a worker.", ("worker",))
        self._failures = self._labelled(
            Counter,
            "astroclip_worker_failures_total",
            "What went wrong in a worker: batch or item (raised), restart (of the worker).",
            ("worker", "what"),
        )
        self._nonfinite = self._labelled(
            Counter, "astroclip_nonfinite_outputs_total", "Vectors of the model that were not finite.", ("modality",)
        )
        self._trust = self._labelled(
            Counter,
            "astroclip_judged_total",
            "Vectors judged by trust; flagged: as out of distribution.",
            ("modality", "flagged"),
        )
        self._swaps = self._labelled(
            Counter, "astroclip_index_swaps_total", "Index swaps: swapped, refused, unchanged.", ("outcome",)
        )
        self._index = self._info(
            "astroclip_index",
            "The index served, and the model it was built with.",
            ("id", "manifest_sha256", "model_sha256"),
        )
        self._loaded = self._plain(Gauge, "astroclip_index_loaded_timestamp_seconds", "When the index was taken up.")
        self._objects = self._plain(Gauge, "astroclip_index_objects", "Objects of the index.")
        self._info("astroclip_build", "The version of this software.", ("version",)).info({"version": __version__})
        ProcessCollector(registry=self.registry)
        GCCollector(registry=self.registry)
        self._bounded_series()

    # -- a request -------------------------------------------------------------------------------------------------

    def begin(self) -> None:
        """A request came in; `request` ends it."""
        self._in_flight.inc()

    def request(self, route: str, status: int, seconds: float, stages: Mapping[str, float] | None = None) -> None:
        """One request answered (and no longer in flight).

        route: its template (`/v1/objects/{object_id}`), never its path. stages: milliseconds per stage.
        """
        self._in_flight.dec()
        self._requests(route, str(status)).observe(seconds)
        for stage, ms in (stages or {}).items():
            if ms > 0.0:
                self.stage(stage, ms / 1000.0)

    def stage(self, stage: str, seconds: float) -> None:
        """Called by `request` with the sum of each stage; for work outside any request, by who does it."""
        self._stages(stage).observe(seconds)

    def rejected(self, reason: str) -> None:
        """One request refused; reason: the code of its error."""
        self._rejected(reason).inc()

    def item_refused(self, modality: str, reason: str) -> None:
        """One item of an answered request failed; reason: the code of its error."""
        self._items_refused(modality, reason).inc()

    # -- workers ---------------------------------------------------------------------------------------------------

    def batch(self, worker: str, size: int, seconds: float) -> None:
        self._batch_size(worker).observe(size)
        self._batch_seconds(worker).observe(seconds)

    def queue(self, worker: str, waiting: Callable[[], float]) -> None:
        """Where to read how many items wait for `worker`; asked at every scrape."""
        self._queue(worker).set_function(waiting)

    def failure(self, worker: str, what: str) -> None:
        """what: batch, item or restart."""
        self._failures(worker, what).inc()

    # -- answers ---------------------------------------------------------------------------------------------------

    def nonfinite(self, modality: str) -> None:
        """The model gave a vector that is not finite."""
        self._nonfinite(modality).inc()

    def judged(self, modality: str, flagged: bool) -> None:
        """One vector judged; flagged: as out of distribution."""
        self._trust(modality, "true" if flagged else "false").inc()

    # -- the index -------------------------------------------------------------------------------------------------

    def swap(self, outcome: str) -> None:
        """outcome: swapped, refused or unchanged."""
        self._swaps(outcome).inc()

    def serving(self, index_id: str, manifest_sha256: str, model_sha256: str, objects: int | None = None) -> None:
        """From now on this index is served."""
        self._index.info({"id": index_id, "manifest_sha256": manifest_sha256, "model_sha256": model_sha256})
        self._loaded.set(time.time())
        if objects is not None:
            self._objects.set(objects)

    # -- the page --------------------------------------------------------------------------------------------------

    def text(self) -> bytes:
        """All of it in Prometheus' text format."""
        return generate_latest(self.registry)

    def exposition(self, accept: str) -> tuple[bytes, str]:
        """The page in the format that an Accept header asks for (OpenMetrics or Prometheus' text), and its type."""
        try:
            encode, media_type = choose_encoder(accept)
        except (TypeError, ValueError):  # a version that is no version
            encode, media_type = choose_encoder("")
        return encode(self.registry), media_type

    # -- making ----------------------------------------------------------------------------------------------------

    def _plain(self, kind: type[M], name: str, text: str, labels: tuple[str, ...] = (), **keywords: Any) -> M:
        self.described.append(Described(name, kind.__name__.lower(), labels, text))
        return kind(name, text, labels, registry=self.registry, **keywords)

    def _info(self, name: str, text: str, labels: tuple[str, ...]) -> Info:
        """labels: for the documentation; an Info takes them when it is set."""
        self.described.append(Described(f"{name}_info", "info", labels, text))
        return Info(name, text, registry=self.registry)

    def _labelled(
        self, kind: type[MetricWrapperBase], name: str, text: str, labels: tuple[str, ...], **keywords: Any
    ) -> _Children:
        return _Children(self._plain(kind, name, text, labels, **keywords), len(labels))

    def _bounded_series(self) -> None:
        """Series that alerts divide by or take increases of exist from the start, at 0."""
        for modality in ("image", "spectrum"):
            self._nonfinite(modality)
            for flagged in ("true", "false"):
                self._trust(modality, flagged)
        for outcome in ("swapped", "refused", "unchanged"):
            self._swaps(outcome)

    def __iter__(self) -> Iterator[Described]:
        """Everything on the page: ours, then what the libraries measure of the process."""
        yield from self.described
        ours = {item.name for item in self.described}
        for family in self.registry.collect():
            name = family.name + {"counter": "_total", "info": "_info"}.get(family.type, "")
            if name not in ours:
                labels = tuple(sorted({label for sample in family.samples for label in sample.labels}))
                yield Described(name, family.type, labels, family.documentation)
