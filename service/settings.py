"""Settings of the service: one frozen model, read from the environment (prefix ``ASTROCLIP_``).

Every limit has a default, and its reason stands in the field's description, which is also what the
documentation prints. Sizes are bytes, times are seconds, angles say their unit in their name.
Limits of the file formats (HDUs, pixels, decompression ratio ...) and of filters are fields with fields of their own.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, field_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from astroclip.limits import DEFAULT_LIMITS, ReaderLimits
from index.filters import DEFAULT_FILTER_LIMITS, FilterLimits

__all__ = ["DEMO_INDEX", "DEMO_MODEL", "Settings"]

DEMO_MODEL = Path(__file__).parent / "demo" / "model"
DEMO_INDEX = Path(__file__).parent / "demo" / "index"


class Settings(BaseSettings):
    """What an operator may turn; see each field for the default and its reason."""

    model_config = SettingsConfigDict(
        env_prefix="ASTROCLIP_",
        env_nested_delimiter="__",
        frozen=True,
        extra="ignore",
        protected_namespaces=(),
    )

    index_dir: Path = Field(
        default=DEMO_INDEX, description="Index to serve; the default is the demo index shipped here."
    )
    model_dir: Path = Field(
        default=DEMO_MODEL, description="Model directory; it must be the one the index was built with."
    )
    device: str = Field(default="auto", description="Torch device: auto takes a GPU when there is one.")
    dtype: str = Field(default="auto", description="Arithmetic of the model: auto takes what the device does best.")
    encode_batch: int = Field(default=64, ge=1, le=4096, description="Items per forward pass; 64 fits every device.")

    model_process: bool = Field(
        default=True,
        description="The model runs in a process of its own: what kills it does not kill the service, and it does not "
        "wait for Python's lock beside threads that read and answer. It takes some 500 MB more, for torch twice.",
    )
    torch_threads: int = Field(
        default=0,
        ge=0,
        le=1024,
        description="Threads of one pass of the model on a processor; 0 takes all cores but one. The last is for "
        "reading and answering: threads that wait for each other in every operation are slow when one is disturbed.",
    )
    exact_search: Literal["numpy", "torch"] = Field(
        default="numpy",
        description="What makes exact searches: torch does it on the device, in half precision on a GPU, and takes "
        "memory there (256 MB a million vectors of 128); numpy needs none.",
    )
    max_body_bytes: int = Field(
        default=32 * 2**20,
        ge=1024,
        description="Largest request body: 13 times the largest DESI coadd we tested with, and small enough to be "
        "held in memory by every request in flight.",
    )
    body_timeout_s: float = Field(
        default=30.0,
        gt=0,
        description="A body must have arrived by then, so that slow senders cannot hold connections.",
    )
    max_files: int = Field(
        default=64, ge=1, description="Files in one multipart request: one forward pass of the model."
    )
    max_items: int = Field(
        default=512,
        ge=1,
        description="Objects embedded by one request: about a minute on two cores; more is a batch job.",
    )
    max_k: int = Field(default=1000, ge=1, description="Largest k: an answer of 1,000 hits is about 0.5 MB of JSON.")
    default_k: int = Field(default=16, ge=1, description="k when none is given: the published k-NN protocol uses 16.")
    max_vectors: int = Field(
        default=1024,
        ge=1,
        description="Vectors of one call of /v1/search/vectors: about 0.1 s of two cores over a million objects.",
    )
    max_hits: int = Field(
        default=100_000,
        ge=1,
        description="Hits of one call of /v1/search/vectors, vectors times k: 6 MB of JSON, or about 3 s of a core for "
        "a VOTable; with the default k all of max_vectors fit six times.",
    )
    max_query_terms: int = Field(
        default=64, ge=1, description="Queries inside one combine: each costs a lookup or a forward pass."
    )
    max_query_depth: int = Field(
        default=3, ge=1, description="Nesting of combine: deeper trees have no use we know of."
    )
    max_columns: int = Field(default=64, ge=1, description="Columns or properties named in one request.")
    max_density_bins: int = Field(
        default=1000,
        ge=1,
        description="Bins of a density: the five standard properties with 1,000 bins each are 0.2 MB of JSON, finer "
        "than a screen.",
    )
    max_explain_passes: int = Field(
        default=264,
        ge=0,
        description="Passes of the model for one explanation and modality: windows of 2,300 km/s or 3 arcsec, about "
        "1 s of one core with the demo model. Below 32, nothing is explained.",
    )
    max_explain_waiting: int = Field(
        default=4,
        ge=1,
        description="Explanations at work or waiting; one more is answered 429. Each takes seconds of the model, one "
        "at a time, and holds a place of max_in_flight meanwhile.",
    )
    max_radius_arcsec: float = Field(
        default=36000.0,
        gt=0,
        description="Largest cone of an object lookup or cone search: 10 degrees; larger regions are filters.",
    )
    max_rows: int = Field(
        default=10000, ge=1, description="Rows of one object lookup or cone search, about 5 MB of JSON."
    )
    ood_level: float = Field(
        default=0.05,
        ge=0,
        le=1,
        description="A query whose ood_p is at or below it is flagged out_of_distribution: one in twenty of the "
        "survey's own kind is flagged wrongly, as in most tests; 0 never flags.",
    )
    disagreement_level: float = Field(
        default=0.01,
        ge=0,
        le=1,
        description="A pair whose disagreement_p is at or below it is flagged modalities_disagree; lower than "
        "ood_level, since it says that two files do not belong together.",
    )
    max_metrics_rate_per_s: float = Field(
        default=5.0,
        ge=0,
        description="Requests a second of /metrics from one caller, over 10 s (429); each takes some 20 ms, and "
        "Prometheus asks every 15 s. 0 is no bound.",
    )
    max_in_flight: int = Field(
        default=256,
        ge=1,
        description="POST requests at work at once; one more is answered 429. Four full batches of single objects: "
        "more would only wait. A caller who has less than half of an equal share is let in beyond it.",
    )
    max_body_bytes_in_flight: int = Field(
        default=2**30,
        ge=2**20,
        description="Bytes of all request bodies at work together: 32 of the largest; a body that would pass it is "
        "answered 429.",
    )
    max_wait_s: float = Field(
        default=2.0,
        gt=0,
        description="Predicted waiting time beyond which a request is answered 429 at once: what a person at a page "
        "waits. Patient requests (`X-Priority: batch`) are let in up to thirty times of it.",
    )
    deadline_s: float = Field(
        default=10.0,
        gt=0,
        description="Time after which nobody waits for an answer: what still waits then is dropped with 429. Five "
        "times max_wait_s, since predictions are not promises; a request may name less in `X-Deadline-Ms`.",
    )
    batch_deadline_s: float = Field(
        default=300.0, gt=0, description="The same for patient requests: max_items objects take about a minute."
    )
    max_interactive_items: int = Field(
        default=16,
        ge=1,
        description="Objects up to which a request counts as that of a person who waits; larger ones give way to "
        "these, as `X-Priority: batch` does.",
    )
    max_waiting: int = Field(
        default=2048,
        ge=1,
        description="Objects (and files, searches, long answers) that may wait for their turn in each lane, "
        "interactive and patient: four of the largest requests. Where others have filled a lane, a caller may still "
        "add up to half of an equal share of it.",
    )
    batch_window_s: float = Field(
        default=0.004,
        ge=0,
        le=1,
        description="How long the model waits for a batch to fill, under load only: on two cores an image alone takes "
        "10 ms and one of many 2 ms, so a few milliseconds are well spent; 0 never waits.",
    )
    search_batch: int = Field(
        default=32,
        ge=1,
        le=1024,
        description="Requests whose searches are made together: a million vectors of 128 take 41 ms for one query "
        "and 4.5 ms each in a batch.",
    )
    max_worker_failures: int = Field(
        default=3,
        ge=1,
        description="Batches in a row without any success after which /readyz asks the model its known question at "
        "once, and starts of a thread in a row after which it says 503: two may be bad luck, three are not.",
    )
    stuck_after_s: float = Field(
        default=60.0,
        gt=0,
        description="Age of one batch at which its worker counts as stuck and /readyz says 503: the largest takes "
        "seconds.",
    )
    quarantine_s: float = Field(
        default=600.0,
        ge=0,
        description="How long an input that made the model fail, where others of its batch or the model's known inputs "
        "did not, is refused without another pass: clients repeat what failed; 0 never refuses.",
    )
    decode_threads: int = Field(
        default=2,
        ge=1,
        le=64,
        description="Threads that read uploads while the model runs. Of two or more, one is for what takes long: files "
        "above 1 MiB and patient requests. More than two read little more, since Python computes in one at a time.",
    )
    search_threads: int = Field(default=2, ge=1, le=64, description="Threads that search the index.")
    canary_interval_s: float = Field(
        default=10.0, ge=0, description="Age at which /readyz asks the model its known question again."
    )
    host: str = Field(default="127.0.0.1", description="Address to listen on; loopback until an operator opens it.")
    port: int = Field(default=8000, ge=0, le=65535, description="Port to listen on; 0 takes any that is free.")
    log_level: Literal["critical", "error", "warning", "info", "debug"] = Field(
        default="info",
        description="How much is logged; at debug, also the requests of health and metrics, which machines send every "
        "few seconds.",
    )

    # Connections.
    head_timeout_s: float = Field(
        default=10.0,
        gt=0,
        description="The head of a request must have arrived by then (408): it is a few hundred bytes, and a "
        "connection that sends none of it holds memory and a file.",
    )
    write_timeout_s: float = Field(
        default=30.0,
        gt=0,
        description="A client that takes less than 64 KiB of a long answer in so long is cut off: as long as a body "
        "may take, and slower than any line.",
    )
    keep_alive_s: float = Field(
        default=75.0,
        gt=0,
        description="An idle connection is closed after so long. More than the minute after which load balancers and "
        "client libraries close theirs: who closes first never meets a request that is on its way.",
    )
    max_head_bytes: int = Field(
        default=65536,
        ge=1024,
        description="Request line and headers (431): twice what proxies let through; the longest honest ones are "
        "filters in the URL. What is neither head nor body, as trailers, may be as long; then the connection is cut.",
    )
    max_pipelined: int = Field(
        default=100,
        ge=1,
        description="Requests that may wait on a connection behind the one at work; one more is answered 429 after "
        "them, and the connection closed. Some 3 kB each; clients that send ahead at all send some ten.",
    )
    max_connections: int = Field(
        default=1024,
        ge=2,
        description="Open connections; one more is answered 503 and closed, those there are served on. Many times "
        "max_in_flight; as many open files are asked of the system at the start.",
    )

    # What one JSON request, file and filter may hold.
    max_json_bytes: int = Field(
        default=4 * 2**20,
        ge=1024,
        description="Largest JSON request (413): a MOC of 250,000 cells, or 50 vectors of 4,096. It is read in the "
        "event loop, 30 ms a MB, and becomes ten times its size in objects.",
    )
    reader: ReaderLimits = Field(
        default=DEFAULT_LIMITS,
        description="Limits of the file formats, each by its name (`ASTROCLIP_READER__MAX_HDUS`); see the table of "
        "reader limits.",
    )
    filter: FilterLimits = Field(
        default=DEFAULT_FILTER_LIMITS,
        description="Limits of a filter, each by its name (`ASTROCLIP_FILTER__MAX_TERMS`); see the table of filter "
        "limits.",
    )
    # Life: readiness, stopping, replacing the index
    ready_timeout_s: float = Field(
        default=5.0,
        gt=0,
        description="Time in which model and index must answer /readyz: the question goes before all others, so it "
        "waits for one batch at most; shorter than that a busy service would be taken off.",
    )
    drain_delay_s: float = Field(
        default=1.0,
        ge=0,
        description="After SIGTERM, /readyz says 503 and answers say `connection: close` for so long before no more "
        "connections are accepted: set it to twice the interval at which a load balancer asks; 0 stops at once.",
    )
    drain_timeout_s: float = Field(
        default=20.0,
        ge=0,
        description="After that, requests at work have so long to finish; what is left gets 503. With the delay and "
        "10 s for the end 31 s: Kubernetes and others kill after 30 unless told to wait for longer.",
    )
    watch_index_s: float = Field(
        default=5.0,
        ge=0,
        description="How often the service looks whether another version of the index was published, and swaps to it; "
        "two file names and times each. 0 never looks: SIGHUP and the admin call remain.",
    )

    # Observability
    log_format: Literal["auto", "text", "json"] = Field(
        default="auto",
        description="Form of the logs: auto is text where standard error is a terminal, since a person reads it, and "
        "JSON elsewhere, since a collector does.",
    )
    access_log: bool = Field(
        default=True,
        description="One line a request; it costs some 25 microseconds. Off, warnings and errors are still logged.",
    )
    max_refusals_logged_per_s: int = Field(
        default=20,
        ge=0,
        description="Access lines a second of requests refused for want of capacity (429); the next says how many were "
        "left out. Under overload there would be thousands, all alike. Metrics count every one.",
    )
    telemetry: Literal["auto", "on", "off"] = Field(
        default="auto",
        description="OpenTelemetry spans: auto sends them where the standard environment names an endpoint "
        "(OTEL_EXPORTER_OTLP_ENDPOINT) and the extra telemetry is installed.",
    )

    # -- keys and rates --
    keys_file: Path | None = Field(
        default=None,
        description="File of API keys, made by `astroclip keys create`; every call but health and pages then wants "
        "one. None: the service is open, which is for loopback or behind a proxy that asks who calls, and admin calls "
        "are refused.",
    )
    metrics_open: bool = Field(
        default=False,
        description="Where there are keys, /metrics wants one with the scope read, as it tells how much is asked of "
        "the service; Prometheus sends one by `authorization: credentials_file`. True opens it.",
    )
    max_rate_per_s: float = Field(
        default=500.0,
        ge=0,
        description="Requests a second of one caller (a key, or an address without one), over 10 s; more are answered "
        "429. No person reaches it, a runaway loop does; small lookups take half a millisecond each, so this many are "
        "a quarter of what the event loop can do. 0: no bound.",
    )
    max_in_flight_per_caller: int = Field(
        default=128,
        ge=0,
        description="Requests of one caller, lookups too, at work at once; one more is answered 429. Two full batches "
        "of single objects, half of max_in_flight: no caller takes all places. 0: no bound.",
    )
    cors_origins: Annotated[tuple[str, ...], NoDecode] = Field(
        default=(),
        description="Origins (https://host[:port], comma between; * for all) whose web pages may call this service "
        "from a browser; none by default, since a page anybody visits could otherwise read an open service on "
        "loopback.",
    )

    @field_validator("cors_origins", mode="before")
    @classmethod
    def _origins(cls, found: object) -> object:
        """Comma-separated in the environment; an origin has no path, or no browser ever sends it."""
        origins = tuple(part.strip() for part in found.split(",") if part.strip()) if isinstance(found, str) else found
        for origin in origins if isinstance(origins, tuple | list) else ():
            if not re.fullmatch(r"\*|https?://[^/\s]+", str(origin)):
                raise ValueError(f"found the origin {origin!r}; wanted https://host[:port] without a path, or *")
        return origins
