"""What every campaign shares: its options, its marks, and how its result is written.

A mark is {"found", "wanted", "at": "least" or "most", "passed"}; a result without the numbers a mark needs has not
passed it.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from benchmarks.chaos.server import Server
from benchmarks.chaos.traffic import Ask
from training.evaluate.report import provenance, write_json

__all__ = ["JSON", "SEED", "failed", "mark", "object_ids", "options", "parser", "report", "search_asks", "spread"]

SEED = 20261121
JSON = "application/json"
UNBOUNDED = {"max_rate_per_s": 0, "max_in_flight_per_caller": 0}
RESULTS = Path("benchmarks/results")


def parser(doc: str | None, noun: str) -> argparse.ArgumentParser:
    """Options of every campaign; `noun` names the result."""
    made = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--out", type=Path, default=RESULTS / f"{noun}.json")
    made.add_argument("--index", type=Path, help="index to serve; default: the demo's")
    made.add_argument("--model", type=Path, help="its model; default: the demo's")
    made.add_argument("--short", action="store_true", help="a minute or two: the same paths, wider spreads")
    return made


def options(arguments: argparse.Namespace) -> dict[str, Any]:
    """Index, model and settings as `Server` takes them: bounds of one caller are off, since all load comes from one."""
    return {"index": arguments.index, "model": arguments.model, "settings": dict(UNBOUNDED)}


def mark(found: float | None, wanted: float, at: Literal["least", "most"]) -> dict[str, Any]:
    known = found is not None and not math.isnan(found)
    passed = known and (found >= wanted if at == "least" else found <= wanted)  # type: ignore[operator]
    return {"found": found, "wanted": wanted, "at": at, "passed": bool(passed)}


def spread(values: Iterable[float]) -> dict[str, Any]:
    """Median and range of repeats, and the repeats."""
    every = list(values)
    if not every:
        return {"median": None, "least": None, "most": None, "values": []}
    return {"median": statistics.median(every), "least": min(every), "most": max(every), "values": every}


def failed(marks: Mapping[str, Mapping[str, Any]]) -> list[str]:
    return [name for name, value in marks.items() if not value["passed"]]


def report(out: Path, noun: str, started: float, marks: Mapping[str, Any], results: Mapping[str, Any]) -> int:
    """Write the result, print the marks; the exit code: 1 where one was missed."""
    write_json(out, {"kind": noun, **provenance(seed=SEED, started=started), "marks": marks, **results})
    for name, value in marks.items():
        words = "ok  " if value["passed"] else "MISS"
        print(f"{words} {name}: {_short(value['found'])} (wanted at {value['at']} {_short(value['wanted'])})")
    print(f"{time.perf_counter() - started:.0f} s; {out}", flush=True)
    return 1 if failed(marks) else 0


def object_ids(server: Server, count: int = 64) -> list[str]:
    """Some objects of the index served."""
    status, _, body = server.ask("GET", f"/v1/objects?random={count}")
    if status != 200:
        raise RuntimeError(f"/v1/objects?random={count} answered {status}: {body[:300]!r}")
    return [item["object_id"] for item in json.loads(body)["objects"]]


def search_asks(ids: Sequence[str], *, estimate: bool = False, target: str = "spectrum", k: int = 16) -> list[Ask]:
    """One search (or estimate) for each object."""
    path = "/v1/estimate" if estimate else "/v1/search"
    return [Ask("POST", path, _request(i, target, k), {"content-type": JSON}) for i in ids]


def _request(object_id: str, target: str, k: int) -> bytes:
    return json.dumps({"query": {"object_id": object_id}, "target": target, "k": k}).encode()


def _short(value: float | None) -> str:
    return "nothing" if value is None else f"{value:.4g}"
