"""MLPerf-logging lines: written by MLCommons' own logger, read back with the number of every line.

One line an event, `:::MLLOG {"namespace", "time_ms", "event_type", "key", "value", "metadata"}`
(github.com/mlcommons/logging). Keys are those of `mlperf_logging.mllog.constants` where one exists.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

__all__ = ["EventLog", "Event", "LogError", "TOKEN", "cut_torn_line", "read_log"]

TOKEN = ":::MLLOG "
ROOT = Path(__file__).resolve().parents[2]
# An epoch writes six lines; a log of a hundred megabytes is no log of ours.
MAX_BYTES = 64 << 20
MAX_LINE = 1 << 16
FIELDS = ("namespace", "time_ms", "event_type", "key", "value", "metadata")
EVENT_TYPES = ("POINT_IN_TIME", "INTERVAL_START", "INTERVAL_END")


class LogError(ValueError):
    """A file that is no MLPerf log; the message names the line."""


@dataclass(frozen=True)
class Event:
    """One line. line: its number in the file, from 1; time_ms: milliseconds since 1970."""

    line: int
    time_ms: float
    event_type: str
    key: str
    value: Any
    metadata: dict[str, Any]
    namespace: str = ""


class EventLog:
    """A log file being written, each line on disk when the call returns; `path` None writes nothing.

    `append` goes on in a file that is there (a resumed run); otherwise it is written anew.
    """

    def __init__(self, path: Path | None, append: bool = False) -> None:
        self.handler: logging.Handler = logging.NullHandler()
        self.logger: Any = None
        if path is None:
            return
        from mlperf_logging.mllog.mllog import MLLogger

        path.parent.mkdir(parents=True, exist_ok=True)
        cut_torn_line(path) if append else path.unlink(missing_ok=True)
        self.handler = logging.FileHandler(path, encoding="utf-8")
        sink = logging.Logger(f"mllog.{path}", logging.INFO)  # outside the hierarchy: nobody else hears it
        sink.addHandler(self.handler)
        self.logger = MLLogger(sink, root_dir=str(ROOT), default_stack_offset=3)

    def event(self, key: str, value: Any = None, **metadata: Any) -> None:
        self._write("event", key, value, metadata)

    def start(self, key: str, value: Any = None, **metadata: Any) -> None:
        self._write("start", key, value, metadata)

    def end(self, key: str, value: Any = None, **metadata: Any) -> None:
        self._write("end", key, value, metadata)

    def close(self) -> None:
        self.handler.close()

    def __enter__(self) -> EventLog:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def _write(self, how: str, key: str, value: Any, metadata: Mapping[str, Any]) -> None:
        if self.logger is not None:
            getattr(self.logger, how)(key=key, value=value, metadata=dict(metadata))


def cut_torn_line(path: Path) -> None:
    """A run killed while writing left half a line at the end: cut it off."""
    if path.is_file() and not (data := path.read_bytes()).endswith(b"\n"):
        with open(path, "rb+") as file:
            file.truncate(data.rfind(b"\n") + 1)


def read_log(path: Path) -> list[Event]:
    """Every event of a log; lines without the token are passed over, as MLCommons' parser does.

    Raises LogError naming the line of the first event that cannot be read.
    """
    if not path.is_file():
        raise LogError(f"{path.name} is not there; wanted an mllog file")
    if path.stat().st_size > MAX_BYTES:
        raise LogError(f"{path.name} has {path.stat().st_size / 1e6:.0f} MB; at most {MAX_BYTES / 1e6:.0f} MB are read")
    events = []
    for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
        _, token, body = line.partition(TOKEN)
        if token:
            events.append(_event(number, body))
    return events


def _event(number: int, body: str) -> Event:
    if len(body) > MAX_LINE:
        raise LogError(f"line {number}: {len(body)} characters; at most {MAX_LINE} are read")
    try:
        found = json.loads(body, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise LogError(f"line {number}: not JSON after {TOKEN.strip()} ({error})") from error
    if not isinstance(found, dict) or set(found) != set(FIELDS):
        raise LogError(f"line {number}: wanted an object with exactly {', '.join(FIELDS)}")
    time_ms = found["time_ms"]
    if isinstance(time_ms, bool) or not isinstance(time_ms, int | float):
        raise LogError(f"line {number}: time_ms is {time_ms!r}; wanted milliseconds since 1970")
    if found["event_type"] not in EVENT_TYPES:
        raise LogError(f"line {number}: event_type is {found['event_type']!r}; wanted one of {', '.join(EVENT_TYPES)}")
    if not isinstance(found["key"], str) or not isinstance(found["metadata"], dict):
        raise LogError(f"line {number}: wanted a text as key and an object as metadata")
    return Event(
        number,
        time_ms,
        found["event_type"],
        found["key"],
        found["value"],
        found["metadata"],
        str(found["namespace"]),
    )


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON number")
