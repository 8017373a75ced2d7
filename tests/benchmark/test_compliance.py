"""Logs: ours comply and MLCommons' parser reads them; every rule refuses the log that breaks it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from training.benchmark.compliance import check_events, check_log, rules
from training.benchmark.mllog import TOKEN, Event, EventLog, LogError, read_log
from training.benchmark.release import Release
from training.benchmark.targets import QUALITY, TARGETS
from training.benchmark.timing import run_so_far, time_to_quality

PLATFORM = {"processor": "a", "cores": 2, "memory_gib": 4.0, "accelerator": None}
Lines = list[dict[str, Any]]


def evaluation(path: Path, division: str = "closed") -> Path:
    release = Release.load("astroclip-sim-small")
    with EventLog(path) as log:
        log.start("init_start")
        _header(log, "astroclip_evaluation", division, 0, release)
        log.event("model_sha256", "ab" * 32)
        log.end("init_stop")
        log.start("run_start")
        log.start("eval_start", name="tasks")
        log.event("train_samples", 2000)
        log.event("eval_samples", 500)
        log.end("eval_stop", name="tasks")
        for target in TARGETS:
            log.event("eval_accuracy", None, name=target.name, sense=target.sense, wanted=target.wanted, passed=None)
        log.end("run_stop", status="success")
    return path


def _header(log: EventLog, benchmark: str, division: str, seed: int, release: Release) -> None:
    log.event("submission_benchmark", benchmark)
    log.event("benchmark_version", "1.0")
    log.event("submission_division", division)
    log.event("submission_org", "someone")
    log.event("submission_status", "research")
    log.event("submission_platform", "a processor", **PLATFORM)
    log.event("seed", seed)
    log.event("data_release", release.name, sha256=release.sha256, status="identical")


def training(path: Path, best: float = 0.6) -> Path:
    release = Release.load("astroclip-sim-1")
    with EventLog(path) as log:
        log.start("init_start")
        _header(log, "astroclip_training", "closed", 42, release)
        log.event("stage", "Alignment")
        for key, value in (("global_batch_size", 512), ("train_samples", 51000), ("eval_samples", 3000)):
            log.event(key, value)
        log.event("opt_name", "adamw")
        log.event("opt_base_learning_rate", 1e-3)
        log.end("init_stop")
        log.start("run_start")
        log.start("session_start", run_time_ms=0, step_num=0, samples_count=0)
        for epoch in range(2):
            so_far = {"run_time_ms": 1000 * (epoch + 1), "samples_count": 51000 * (epoch + 1)}
            log.start("epoch_start", epoch_num=epoch)
            log.start("eval_start", epoch_num=epoch)
            value = best if epoch else 0.1
            log.event("eval_accuracy", value, name=QUALITY.key, pool=QUALITY.pool, epoch_num=epoch, **so_far)
            log.end("eval_stop", epoch_num=epoch)
            log.end("epoch_stop", epoch_num=epoch)
        log.end("run_stop", status="success", run_time_ms=2500, samples_count=102000)
    return path


def tampered(path: Path, change: Callable[[Lines], Any]) -> Path:
    lines = [json.loads(line.removeprefix(TOKEN)) for line in path.read_text().splitlines()]
    change(lines)
    path.write_text("".join(f"{TOKEN}{json.dumps(line)}\n" for line in lines))
    return path


def find(lines: Lines, key: str, last: bool = False) -> dict[str, Any]:
    return [line for line in lines if line["key"] == key][-1 if last else 0]


def test_our_logs_comply_and_are_what_mlcommons_reads(tmp_path: Path):
    for path in (evaluation(tmp_path / "e.txt"), training(tmp_path / "t.txt")):
        assert check_log(path) == []
        parser = pytest.importorskip("mlperf_logging.compliance_checker.mlp_parser")
        lines, errors = parser.parse_file(str(path), ruleset="3.0.0")
        ours = read_log(path)
        assert not errors and [(line.key, line.value["value"]) for line in lines] == [(e.key, e.value) for e in ours]
        assert str(tmp_path) not in path.read_text()


def set_value(key: str, value: Any) -> Callable[[Lines], Any]:
    return lambda lines: find(lines, key).update(value=value)


def set_metadata(key: str, last: bool = False, **values: Any) -> Callable[[Lines], Any]:
    return lambda lines: find(lines, key, last)["metadata"].update(values)


def drop(key: str) -> Callable[[Lines], Any]:
    return lambda lines: lines.remove(find(lines, key))


def repeat(key: str) -> Callable[[Lines], Any]:
    return lambda lines: lines.insert(lines.index(find(lines, key)), dict(find(lines, key)))


def to_front(key: str) -> Callable[[Lines], Any]:
    def change(lines: Lines) -> None:
        line = find(lines, key)
        lines.remove(line)
        lines.insert(0, {**line, "time_ms": lines[0]["time_ms"]})

    return change


EVALUATION = [
    (drop("seed"), "seed", "no seed"),
    (repeat("seed"), "seed", "a second seed"),
    (set_value("seed", 7), "seed", "closed division"),
    (set_value("seed", "zero"), "seed", "wanted a number"),
    (set_value("submission_benchmark", "other"), "submission_benchmark", "wanted astroclip_evaluation"),
    (set_value("submission_division", "half"), "submission_division", "wanted one of"),
    (set_value("submission_org", " "), "submission_org", "wanted a text"),
    (set_value("benchmark_version", "0.9"), "benchmark_version", "wanted one of 1.0"),
    (lambda lines: find(lines, "submission_platform")["metadata"].pop("cores"), "submission_platform", "lack cores"),
    (set_value("data_release", "mine"), "data_release", "no release mine"),
    (set_metadata("data_release", sha256="00"), "data_release", "sha256 is not"),
    (set_metadata("data_release", status="different"), "data_release", "wanted identical"),
    (to_front("run_start"), "run_start", "comes before init_stop"),
    (lambda lines: find(lines, "run_start").update(event_type="POINT_IN_TIME"), "run_start", "event_type"),
    (drop("eval_stop"), "pairs", "never followed"),
    (repeat("eval_start"), "pairs", "still open"),
    (lambda lines: lines.append(dict(find(lines, "train_samples"), time_ms=2e12)), "run_stop", "after run_stop"),
    (lambda lines: find(lines, "eval_samples").update(time_ms=5), "time", "before line"),
    (lambda lines: lines[3].update(namespace="GPU0"), "namespace", "empty namespace"),
    (set_metadata("run_stop", status="aborted"), "status", "'aborted'"),
    (drop("eval_accuracy"), "targets", "no eval_accuracy for"),
    (repeat("eval_accuracy"), "targets", "second time"),
    (set_metadata("eval_accuracy", name="fastest"), "targets", "no target is named"),
    (set_metadata("eval_accuracy", wanted=0.1), "targets", "found >= 0.1"),
    (set_metadata("eval_accuracy", passed=True), "targets", "not True"),
    (set_value("eval_accuracy", 0.2), "targets", "is False"),
]
TRAINING = [
    (set_value("eval_accuracy", 1.5), "eval_accuracy", "from 0 to 1"),
    (set_metadata("eval_accuracy", pool=10), "quality", "wanted recall@10 in 1000"),
    (lambda lines: find(lines, "eval_accuracy", True).update(value=0.4), "quality", "the best"),
    (drop("session_start"), "session_start", "no session_start"),
    (drop("train_samples"), "train_samples", "no train_samples"),
    (lambda lines: find(lines, "run_stop")["metadata"].pop("run_time_ms"), "run_stop", "lack run_time_ms"),
    (set_value("seed", 5), "seed", "closed division"),
]


@pytest.mark.parametrize(("make", "change", "rule", "message"), [
    *((evaluation, *case) for case in EVALUATION), *((training, *case) for case in TRAINING)
])  # fmt: skip
def test_each_rule_refuses_what_breaks_it(tmp_path: Path, make, change, rule: str, message: str):  # type: ignore[no-untyped-def]
    broken = check_log(tampered(make(tmp_path / "log.txt"), change))
    assert any(item.rule == rule and message in item.message for item in broken), [str(item) for item in broken]


def test_an_open_run_may_use_other_seeds_data_and_quality(tmp_path: Path):
    def change(lines: Lines) -> None:
        find(lines, "submission_division")["value"] = "open"
        find(lines, "seed")["value"] = 99
        find(lines, "data_release")["metadata"]["status"] = "different"
        for line in lines:
            if line["key"] == "eval_accuracy":
                line["value"] = 0.0

    assert check_log(tampered(training(tmp_path / "t.txt"), change)) == []


@pytest.mark.parametrize("line", [
    "{", "[]", '{"key": 1}', "NaN",
    '{"namespace":"","time_ms":"x","event_type":"POINT_IN_TIME","key":"a","value":1,"metadata":{}}',
    '{"namespace":"","time_ms":1,"event_type":"SOON","key":"a","value":1,"metadata":{}}',
    '{"namespace":"","time_ms":1,"event_type":"POINT_IN_TIME","key":"a","value":NaN,"metadata":{}}',
    "[" * 60_000, "x" * 70_000,
])  # fmt: skip
def test_lines_that_cannot_be_read_are_named(tmp_path: Path, line: str):
    path = evaluation(tmp_path / "e.txt")
    path.write_text(f"a heading\n{TOKEN}{line}\n" + path.read_text())
    (complaint,) = check_log(path)
    assert complaint.rule == "format" and "line 2" in complaint.message
    assert check_events([])[0].rule == "format"
    with pytest.raises(LogError, match="not there"):
        read_log(tmp_path / "none.txt")


def test_time_adds_up_over_sessions_and_quality_is_found(tmp_path: Path):
    def event(line: int, time_ms: float, key: str, **metadata: Any) -> Event:
        return Event(line, time_ms, "POINT_IN_TIME", key, None, metadata)

    events = [
        event(1, 0, "run_start"),
        event(2, 100, "session_start", samples_count=0),
        event(3, 1100, "trained_samples", samples_count=50),  # and killed
        event(4, 9000, "session_start", samples_count=50),
        event(5, 9500, "run_stop", samples_count=80),
    ]
    found = run_so_far(events)
    assert (found.run_time_ms, found.samples, found.sessions, found.finished) == (1500, 80, 2, True)
    reached = time_to_quality([training(tmp_path / "t.txt")])
    assert reached["reached"] and (reached["seconds"], reached["samples"]) == (2.0, 102000)
    missed = time_to_quality([training(tmp_path / "u.txt", best=0.4)])
    assert not missed["reached"] and missed["seconds"] is None


def test_the_rules_name_known_fields_alone():
    known = {"key", "count", "event", "values", "min", "max", "text", "metadata", "after"}
    for table in rules().values():
        assert all(set(rule) <= known and rule["count"] in ("one", "some", "any") for rule in table["key"])
