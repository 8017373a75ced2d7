"""Logs: one line an event, as JSON for machines or as text for people, with the request it belongs to.

Every line written while a request is handled carries its `request_id` and `caller`, also from the threads of the
pools. The access line is ours in place of uvicorn's: one a request, with the route's template and where the time went.

What a caller asks for is never logged: no bodies, no header values (so no keys), no query strings, no paths, which
hold positions and object ids; the route's template says which call it was. Nor is a caller's address: `caller` says who
asked, and a reverse proxy knows the rest. Nothing in a line can end it or forge another: JSON escapes control
characters, the text form does so too and indents tracebacks.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Callable, Mapping
from functools import lru_cache
from types import MappingProxyType
from typing import IO, Any

from service.settings import Settings
from service.trace import CLIENT_LEFT, Trace, current_trace

__all__ = ["AccessLog", "JsonFormatter", "TextFormatter", "configure", "is_json"]

_access = logging.getLogger("astroclip.access")

OURS = ("astroclip", "uvicorn")  # the loggers that `log_level` is for; of all others, warnings
_OWN_HANDLERS = ("astropy", "transformers")  # libraries that write to stderr by themselves
_QUIET = ("/livez", "/readyz", "/metrics")  # asked every few seconds by machines: debug unless they fail

# What every record has; all else was given as `extra` and stands in the line. color_message is uvicorn's.
_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName", "color_message"}
_JSON = json.JSONEncoder(default=str, allow_nan=False)
_ESCAPED = {
    number: f"\\x{number:02x}" if number < 256 else f"\\u{number:04x}"
    for number in (*range(32), *range(127, 160), 0x2028, 0x2029)
}


def is_json(settings: Settings, stream: IO[str] | None = None) -> bool:
    """Whether logs to `stream` (standard error) are JSON: where `log_format` is auto, when nobody sits before it."""
    if settings.log_format != "auto":
        return settings.log_format == "json"
    return not (stream or sys.stderr).isatty()


def configure(settings: Settings, stream: IO[str] | None = None) -> None:
    """Send all logs of this process to `stream` (standard error) in one form; call it after model and index are
    loaded, when the libraries have set up theirs."""
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(JsonFormatter() if is_json(settings, stream) else TextFormatter())
    logging.captureWarnings(True)
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)
    for name in OURS:
        logging.getLogger(name).setLevel(settings.log_level.upper())
    known = root.manager.loggerDict
    for name in _OWN_HANDLERS:
        logger = known.get(name)  # made here, it would be of the wrong class: astropy's import would fail
        if isinstance(logger, logging.Logger):
            logger.handlers.clear()
            logger.propagate = True


class AccessLog:
    """Called with the trace of every request that ended: writes its access line.

    Of refusals for want of capacity (429) at most `refusals_per_s` are written in a second, and the next of them says
    how many were not (`unlogged`): a thousand lines a second, all alike, help nobody, and cost what is short then.
    """

    def __init__(self, refusals_per_s: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.refusals_per_s, self._clock = refusals_per_s, clock
        self._second, self._written, self._unlogged = 0, 0, 0

    def __call__(self, trace: Trace) -> None:
        status = CLIENT_LEFT if trace.status is None else trace.status
        if status >= 500:
            level = logging.ERROR if status == 500 else logging.WARNING
        else:
            level = logging.DEBUG if trace.route in _QUIET and status < 400 else logging.INFO
        if not _access.isEnabledFor(level):
            return
        if status != 429:
            _write(level, trace, status)
        elif self._may():
            unlogged, self._unlogged = self._unlogged, 0
            _write(level, trace, status, {"unlogged": unlogged} if unlogged else {})
        else:
            self._unlogged += 1

    def _may(self) -> bool:
        """Whether another refusal may be written in this second."""
        second = int(self._clock())
        if second != self._second:
            self._second, self._written = second, 0
        self._written += 1
        return self._written <= self.refusals_per_s


def _write(level: int, trace: Trace, status: int, extra: Mapping[str, Any] = MappingProxyType({})) -> None:
    duration = round(1000.0 * trace.seconds, 2)
    fields: dict[str, Any] = {
        "method": trace.method,
        "route": trace.route,
        "status": status,
        "duration_ms": duration,
        **{f"{stage}_ms": round(ms, 2) for stage, ms in trace.ms.items() if ms},
        "bytes_in": trace.bytes_in,
        "bytes_out": trace.bytes_out,
    }
    if trace.error is not None:
        fields["code"] = trace.error
    fields.update(extra)
    _access.log(level, "%s %s %d in %.1f ms", trace.method, trace.route, status, duration, extra=fields)


class JsonFormatter(logging.Formatter):
    """One JSON object a line: time (UTC), level, logger, message, request_id, caller, what `extra` gave, exception."""

    def format(self, record: logging.LogRecord) -> str:
        entry: dict[str, Any] = {"time": _time(record), "level": record.levelname.lower(), "logger": record.name}
        entry["message"] = record.getMessage()
        fields = _fields(record)
        if "audit" in fields:  # its message is the same as JSON, for other formatters (`service.audit`)
            entry["message"] = "{action}: {outcome}".format_map(fields["audit"])
        for name, value in fields.items():
            entry.setdefault(name, value)
        if text := _exception(self, record):
            entry["exception"] = text
        try:
            return _JSON.encode(entry)
        except ValueError:  # JSON has no NaN
            return json.dumps({name: value if isinstance(value, int) else str(value) for name, value in entry.items()})


class TextFormatter(logging.Formatter):
    """``time LEVEL logger [request_id] message name=value ...``, a traceback indented below."""

    def format(self, record: logging.LogRecord) -> str:
        fields = _fields(record)
        request_id, _ = fields.pop("request_id", None), fields.pop("audit", None)
        if record.name == _access.name:  # its message holds these
            fields = {name: value for name, value in fields.items() if name not in _SAID}
        words = [_time(record), record.levelname.ljust(8), record.name]
        words += [f"[{request_id}]"] if request_id else []
        words += [record.getMessage(), *(f"{name}={value}" for name, value in fields.items())]
        lines = [" ".join(words), *(f"    {line}" for line in _exception(self, record).split("\n") if line)]
        return "\n".join(line if line.isprintable() else line.translate(_ESCAPED) for line in lines)


_SAID = ("method", "route", "status", "duration_ms")


def _fields(record: logging.LogRecord) -> dict[str, Any]:
    """The request of a record, and what its `extra` gave."""
    fields = {name: value for name, value in vars(record).items() if name not in _STANDARD}
    trace = current_trace()
    if trace is not None:
        fields = {"request_id": trace.request_id, "caller": trace.key_id or "anonymous", **fields}
    return fields


def _time(record: logging.LogRecord) -> str:
    return f"{_second(int(record.created))}.{int(record.msecs):03d}Z"


@lru_cache(maxsize=4)
def _second(seconds: int) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds))


def _exception(formatter: logging.Formatter, record: logging.LogRecord) -> str:
    text = formatter.formatException(record.exc_info) if record.exc_info else ""
    return f"{text}\n{formatter.formatStack(record.stack_info)}" if record.stack_info else text
