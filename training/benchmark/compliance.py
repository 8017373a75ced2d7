"""The compliance check: the rules of `rules.toml` against an MLPerf log, every complaint with line and rule."""

from __future__ import annotations

import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from astroclip.errors import InputError
from training.benchmark.mllog import Event, LogError, read_log
from training.benchmark.release import Release
from training.benchmark.targets import QUALITY, TARGETS

__all__ = ["Complaint", "check_events", "check_log", "rules"]

TYPES = {"point": "POINT_IN_TIME", "start": "INTERVAL_START", "end": "INTERVAL_END"}
SAME = 1e-5  # relative: results and logs hold six digits


@dataclass(frozen=True)
class Complaint:
    """One broken rule. line: of the log, 0 where the log as a whole is meant."""

    line: int
    rule: str
    message: str

    def __str__(self) -> str:
        return f"line {self.line}: [{self.rule}] {self.message}" if self.line else f"[{self.rule}] {self.message}"


@cache
def rules() -> dict[str, Any]:
    """The shipped rules: log kind -> its table."""
    tables: dict[str, Any] = tomllib.loads(Path(__file__).with_name("rules.toml").read_text(encoding="utf-8"))["log"]
    return tables


def check_log(path: Path) -> list[Complaint]:
    """Every broken rule of the log in `path`; empty for a log that complies."""
    try:
        events = read_log(path)
    except LogError as error:
        return [Complaint(0, "format", str(error))]
    return check_events(events)


def check_events(events: Sequence[Event]) -> list[Complaint]:
    """Every broken rule of a log's events, in the order of the log."""
    if not events:
        return [Complaint(0, "format", "no MLPerf line at all; wanted lines that start with :::MLLOG")]
    kinds = [event.value for event in events if event.key == "submission_benchmark"]
    table = rules().get(str(kinds[0])) if kinds else None
    if table is None:
        found = repr(kinds[0]) if kinds else "no submission_benchmark"
        wanted = " or ".join(rules())
        return [Complaint(0, "submission_benchmark", f"found {found}; wanted {wanted}")]
    closed = any(event.key == "submission_division" and event.value == "closed" for event in events)
    broken = [*_order(events), *_pairs(events, table["pairs"])]
    for rule in table["key"]:
        broken += _key(events, rule)
    broken += [*_seeds(events, table["seeds"], closed), *_statuses(events, table["statuses"])]
    broken += _release(events, closed)
    if table.get("targets"):
        broken += _targets(events)
    if table.get("quality"):
        broken += _quality(events, closed)
    return sorted(broken, key=lambda item: item.line)


def _order(events: Sequence[Event]) -> Iterator[Complaint]:
    latest, stopped = events[0], None
    for event in events:
        if event.namespace:
            yield Complaint(event.line, "namespace", f"found {event.namespace!r}; wanted an empty namespace")
        if event.time_ms < latest.time_ms:
            yield Complaint(
                event.line,
                "time",
                f"{event.key} lies {latest.time_ms - event.time_ms:.0f} ms before line {latest.line}",
            )
        if stopped is not None:
            yield Complaint(event.line, "run_stop", f"{event.key} comes after run_stop (line {stopped.line})")
        latest = event
        stopped = stopped or (event if event.key == "run_stop" else None)


def _pairs(events: Sequence[Event], pairs: Sequence[Sequence[str]]) -> Iterator[Complaint]:
    """Intervals open and close in turn. A new session follows a kill, which closes nothing."""
    for start, stop in pairs:
        opened: Event | None = None
        for event in events:
            if event.key == "session_start":
                opened = None
            elif event.key == start:
                if opened is not None:
                    yield Complaint(event.line, "pairs", f"{start} while that of line {opened.line} is still open")
                opened = event
            elif event.key == stop:
                if opened is None:
                    yield Complaint(event.line, "pairs", f"{stop} without {start}")
                opened = None
        if opened is not None:
            yield Complaint(opened.line, "pairs", f"{start} is never followed by {stop}")


def _key(events: Sequence[Event], rule: Mapping[str, Any]) -> Iterator[Complaint]:
    name, count = rule["key"], rule["count"]
    found = [event for event in events if event.key == name]
    if count != "any" and not found:
        yield Complaint(0, name, f"no {name}; wanted {'exactly one' if count == 'one' else 'one or more'}")
    if count == "one" and len(found) > 1:
        yield Complaint(found[1].line, name, f"a second {name} (first in line {found[0].line}); wanted exactly one")
    for event in found:
        seen = {other.key for other in events if other.line < event.line}
        for message in _complaints(event, rule, seen):
            yield Complaint(event.line, name, message)


def _complaints(event: Event, rule: Mapping[str, Any], seen: set[str]) -> Iterator[str]:
    value, wanted = event.value, TYPES[rule.get("event", "point")]
    if event.event_type != wanted:
        yield f"event_type is {event.event_type}; wanted {wanted}"
    if "values" in rule and value not in rule["values"]:
        yield f"value is {value!r}; wanted one of {', '.join(map(str, rule['values']))}"
    if rule.get("text") and not (isinstance(value, str) and value.strip()):
        yield f"value is {value!r}; wanted a text"
    if "min" in rule or "max" in rule:
        low, high = rule.get("min", float("-inf")), rule.get("max", float("inf"))
        if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
            yield f"value is {value!r}; wanted a number from {low:g} to {high:g}"
    missing = [key for key in rule.get("metadata", ()) if key not in event.metadata]
    if missing:
        yield f"metadata lack {', '.join(missing)}"
    early = [key for key in rule.get("after", ()) if key not in seen]
    if early:
        yield f"comes before {', '.join(early)}"


def _seeds(events: Sequence[Event], allowed: Sequence[int], closed: bool) -> Iterator[Complaint]:
    for event in events:
        if closed and event.key == "seed" and event.value not in allowed:
            wanted = ", ".join(map(str, allowed))
            yield Complaint(event.line, "seed", f"seed {event.value!r} in the closed division; wanted one of {wanted}")


def _statuses(events: Sequence[Event], allowed: Sequence[str]) -> Iterator[Complaint]:
    for event in events:
        status = event.metadata.get("status")
        if event.key == "run_stop" and status not in allowed:
            yield Complaint(event.line, "status", f"run_stop with status {status!r}; wanted {' or '.join(allowed)}")


def _release(events: Sequence[Event], closed: bool) -> Iterator[Complaint]:
    """In the closed division the data are a shipped release, by name and digest, and were found to be it."""
    for event in events:
        if not closed or event.key != "data_release":
            continue
        try:
            release = Release.load(str(event.value))
        except InputError as error:
            yield Complaint(event.line, "data_release", error.message)
            continue
        if event.metadata.get("sha256") != release.sha256:
            yield Complaint(
                event.line, "data_release", f"sha256 is not that of {release.name} ({release.sha256[:12]}...)"
            )
        if event.metadata.get("status") not in ("identical", "equal within tolerance"):
            yield Complaint(
                event.line,
                "data_release",
                f"the data were {event.metadata.get('status')!r}; wanted identical or equal within tolerance",
            )


def _targets(events: Sequence[Event]) -> Iterator[Complaint]:
    """Every target once, with its own bound, and with the verdict that follows."""
    known = {target.name: target for target in TARGETS}
    seen = set()
    for event in events:
        if event.key != "eval_accuracy":
            continue
        target = known.get(str(event.metadata.get("name")))
        if target is None:
            yield Complaint(event.line, "targets", f"no target is named {event.metadata.get('name')!r}")
            continue
        if target.name in seen:
            yield Complaint(event.line, "targets", f"{target.name!r} for the second time")
        seen.add(target.name)
        sense, wanted = event.metadata.get("sense"), event.metadata.get("wanted")
        if sense != target.sense or wanted != target.wanted:
            yield Complaint(
                event.line, "targets", f"{target.name!r} is {target.sense} {target.wanted:g}; found {sense} {wanted}"
            )
        verdict = _verdict(event.value, target.sense, target.wanted)
        if event.metadata.get("passed") is not verdict:
            yield Complaint(
                event.line, "targets", f"{event.value!r} {target.sense} {target.wanted:g} is {verdict}, not "
                f"{event.metadata.get('passed')!r}"
            )  # fmt: skip
    for name in known.keys() - seen:
        yield Complaint(0, "targets", f"no eval_accuracy for {name!r} (value null where not measured)")


def _verdict(value: Any, sense: str, wanted: float) -> bool | None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    slack = SAME * abs(wanted)  # a number at its bound may have lost its seventh digit
    return bool(value >= wanted - slack if sense == ">=" else value <= wanted + slack)


def _quality(events: Sequence[Event], closed: bool) -> Iterator[Complaint]:
    """A closed training run reaches the quality, in the fixed pool."""
    measured = [event for event in events if event.key == "eval_accuracy"]
    for event in measured:
        if event.metadata.get("name") != QUALITY.key or (closed and event.metadata.get("pool") != QUALITY.pool):
            yield Complaint(
                event.line,
                "quality",
                f"{event.metadata.get('name')} in {event.metadata.get('pool')}; wanted {QUALITY.key} in {QUALITY.pool}",
            )
    values = [event.value for event in measured if isinstance(event.value, int | float)]
    best = max(values, default=0.0)
    aligning = any(event.key == "stage" and event.value == "Alignment" for event in events)
    if closed and (measured or aligning) and best < QUALITY.wanted:
        line = measured[-1].line if measured else 0
        wanted = f"{QUALITY.wanted:g} (an open run need not reach it)"
        yield Complaint(line, "quality", f"the best {QUALITY.key} is {best:.4g}; wanted >= {wanted}")
