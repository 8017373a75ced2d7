"""The result's JSON Schema, and what a result must satisfy beyond it: marks that follow from its own numbers."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from training.benchmark.compliance import SAME, Complaint
from training.benchmark.mllog import Event
from training.benchmark.release import Release, known_releases
from training.benchmark.targets import judge

__all__ = ["check_result", "check_result_against_log", "read_result", "schema"]

MAX_BYTES = 64 << 20  # a result has 0.3 MB
MAX_COMPLAINTS = 20


@cache
def schema() -> dict[str, Any]:
    """The shipped schema."""
    content: dict[str, Any] = json.loads(Path(__file__).with_name("result.schema.json").read_text(encoding="utf-8"))
    return content


def read_result(path: Path) -> dict[str, Any]:
    """A result file; raises ValueError for anything but one JSON object."""
    if not path.is_file() or path.stat().st_size > MAX_BYTES:
        raise ValueError(f"{path.name} is no file of at most {MAX_BYTES / 1e6:.0f} MB")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path.name} is not JSON ({error})") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path.name} holds no JSON object")
    return found


def check_result(result: Mapping[str, Any]) -> list[Complaint]:
    """Where `result` breaks the schema; where its marks do not follow from its numbers, or its release is not ours."""
    from jsonschema import Draft202012Validator

    errors = sorted(Draft202012Validator(schema()).iter_errors(result), key=lambda e: list(map(str, e.absolute_path)))
    if errors:
        return [
            Complaint(0, "schema", f"{'/'.join(map(str, error.absolute_path)) or 'the root'}: {error.message[:200]}")
            for error in errors[:MAX_COMPLAINTS]
        ]
    return [*_marks(result), *_release(result)]


def _marks(result: Mapping[str, Any]) -> Iterator[Complaint]:
    stated = {mark["name"]: mark for mark in result["marks"]}
    for mark in judge(result):
        name, found = mark["name"], stated.get(mark["name"])
        if found is None:
            yield Complaint(0, "marks", f"no mark {name!r}")
        elif found["wanted"] != mark["wanted"] or found["sense"] != mark["sense"]:
            yield Complaint(0, "marks", f"{name!r} is {mark['sense']} {mark['wanted']:g}, not as stated")
        elif found["passed"] is not mark["passed"] or not same(found["value"], mark["value"]):
            yield Complaint(
                0, "marks", f"{name!r} states {found['value']} ({found['passed']}); the result's own numbers give "
                f"{mark['value']} ({mark['passed']})"
            )  # fmt: skip


def _release(result: Mapping[str, Any]) -> Iterator[Complaint]:
    benchmark = result["benchmark"]
    if benchmark["division"] != "closed":
        return
    name = benchmark["release"]["name"]
    if name not in known_releases():
        yield Complaint(0, "data_release", f"{name} is no shipped release; wanted one of {', '.join(known_releases())}")
        return
    release = Release.load(name)
    if benchmark["release"]["sha256"] != release.sha256:
        yield Complaint(0, "data_release", f"sha256 is not that of {name} ({release.sha256[:12]}...)")
    wanted = {**release.split_names, "train": release.split_names["train"][: release.table_shards]}
    for part, names in wanted.items():
        if result["data"]["split"][part] != names:
            yield Complaint(0, "data_release", f"the {part} shards are not those of {name}")
    if result["seed"] != release.seed:
        yield Complaint(0, "seed", f"seed {result['seed']}; the release has {release.seed}")


def check_result_against_log(result: Mapping[str, Any], events: Sequence[Event]) -> list[Complaint]:
    """The log of an evaluation says what the result says: model, release, division, seed, and every mark's value."""
    benchmark = result["benchmark"]
    wanted = {
        "submission_division": benchmark["division"],
        "model_sha256": result["model"]["sha256"],
        "seed": result["seed"],
        "data_release": benchmark["release"]["name"] or "none",
    }
    out = [
        Complaint(event.line, "result", f"{event.key} is {event.value!r}; the result has {wanted[event.key]!r}")
        for event in events
        if event.key in wanted and event.value != wanted[event.key]
    ]
    marks = {mark["name"]: mark["value"] for mark in result["marks"]}
    for event in events:
        name = event.metadata.get("name")
        if event.key == "eval_accuracy" and name in marks and not same(event.value, marks[name]):
            out.append(Complaint(event.line, "result", f"{name!r} is {event.value}; the result has {marks[name]}"))
    return out


def same(a: Any, b: Any) -> bool:
    """Equal to the six digits that results and logs are written with; differences of two such numbers to their sum."""
    if a is None or b is None:
        return a is b
    return abs(float(a) - float(b)) <= SAME * max(abs(float(a)), abs(float(b)), 0.2)
