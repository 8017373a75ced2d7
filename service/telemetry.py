"""Optional OpenTelemetry: one server span a request with a child span for every stage it went through.

The server span is FastAPI's own (route, method, status, W3C `traceparent` honoured); this module decides whether there
is one, says where it goes, takes out what a caller asked for, and adds the request id and the stages. It needs the
extra `telemetry`, and the standard environment (`OTEL_EXPORTER_OTLP_ENDPOINT`, `OTEL_SERVICE_NAME`,
`OTEL_TRACES_SAMPLER` ...) says the rest. Metrics stay Prometheus', logs stay lines.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from opentelemetry import trace as otel

from astroclip import __version__
from astroclip.errors import InputError
from service.settings import Settings

if TYPE_CHECKING:
    from fastapi.telemetry import TelemetryConfig
    from opentelemetry.sdk.trace import TracerProvider

    from service.trace import Trace

__all__ = ["Telemetry", "open_telemetry"]

log = logging.getLogger("astroclip.service")

_ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
_UNTRACED = ("/livez", "/readyz", "/metrics")  # machines ask them every few seconds
_PRIVATE = ("url.path", "url.query")  # positions and object ids; http.route says which call it was
_MOST_CHARS = 256  # of an attribute: headers of callers enter some
_CLOSE_S = 3.0
_NO_EXTRA = "Tracing is asked for, but its packages are not installed: pip install 'astroclip[telemetry]'."


class Telemetry:
    """Spans of requests into `provider`; with None there are none, and nothing is spent on them."""

    def __init__(self, provider: TracerProvider | None = None) -> None:
        self.provider = provider
        self._tracer = None
        if provider is not None:
            provider.add_span_processor(_private_processor())
            self._tracer = provider.get_tracer("astroclip", __version__)

    @property
    def on(self) -> bool:
        return self.provider is not None

    def of_fastapi(self) -> TelemetryConfig:
        """What FastAPI is told: the server span and nothing else."""
        return {
            "tracer_provider": self.provider,
            "tracing": self.on,
            "metrics": False,
            "logs": False,
            "operation_spans": False,
            "auto_configure": False,
            "exclude": _untraced,
        }

    def began(self, trace: Trace) -> None:
        span = otel.get_current_span()
        if span.is_recording():
            span.set_attribute("astroclip.request_id", trace.request_id)
            trace.marks = []

    def answered(self, trace: Trace) -> None:
        """The headers are about to go out: the server span is still open, and who asked is known."""
        span = otel.get_current_span()
        if span.is_recording():
            span.set_attribute("astroclip.caller", trace.key_id or "anonymous")
            if trace.error is not None:
                span.set_attribute("astroclip.error", trace.error)

    def ended(self, trace: Trace) -> None:
        """Write the stages as children of the server span, with the times they had."""
        if self._tracer is None or trace.marks is None:
            return
        parent = otel.set_span_in_context(otel.get_current_span())
        shared = {"astroclip.request_id": trace.request_id}
        for stage, ended, seconds in trace.marks:
            start = ended - int(1e9 * seconds)
            self._tracer.start_span(stage, context=parent, start_time=start, attributes=shared).end(ended)

    def close(self) -> None:
        """Send what waits to be sent, for as long as a server that ends may wait for a collector that is gone."""
        if self.provider is not None:
            sending = threading.Thread(target=self.provider.shutdown, name="telemetry", daemon=True)
            sending.start()
            sending.join(_CLOSE_S)


def open_telemetry(settings: Settings, environment: Mapping[str, str] = os.environ) -> Telemetry:
    """Tracing as settings and environment ask. Raises InputError where `telemetry` is on and the extra is missing."""
    if not _wanted(settings, environment):
        return Telemetry()
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import SpanLimits, TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError:
        if settings.telemetry == "on":
            raise InputError(_NO_EXTRA, code="missing_extra", field="telemetry") from None
        log.warning("%s Serving without.", _NO_EXTRA)  # an endpoint set for every service of a cluster
        return Telemetry()
    named = environment.get("OTEL_SERVICE_NAME") or "service.name=" in environment.get("OTEL_RESOURCE_ATTRIBUTES", "")
    own = {"service.version": __version__} if named else {"service.name": "astroclip", "service.version": __version__}
    resource = Resource.create(own)
    provider = TracerProvider(
        resource=resource, span_limits=SpanLimits(max_attribute_length=_MOST_CHARS), shutdown_on_exit=False
    )
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    return Telemetry(provider)


def _wanted(settings: Settings, environment: Mapping[str, str]) -> bool:
    if settings.telemetry != "auto":
        return settings.telemetry == "on"
    refused = environment.get("OTEL_SDK_DISABLED", "").lower() == "true"
    refused |= environment.get("OTEL_TRACES_EXPORTER", "otlp").strip().lower() == "none"
    return not refused and any(environment.get(name) for name in _ENDPOINTS)


def _untraced(scope: Any) -> bool:
    return scope.get("path") in _UNTRACED


def _private_processor() -> Any:
    from opentelemetry.sdk.trace import Span, SpanProcessor

    class Private(SpanProcessor):
        """Takes out of every span, before anyone sees it, what a caller asked for."""

        def on_start(self, span: Span, parent_context: Any = None) -> None:
            for name in _PRIVATE:
                if span.attributes is not None and name in span.attributes:
                    span.set_attribute(name, "REDACTED")

    return Private()
