"""Time and samples to a quality, from the logs that training writes (`training.timing`).

Time is wall-clock time of the training processes from `run_start`, evaluation included, kills and restarts added up:
of a session that was killed, all up to its last line counts. Between two sessions nothing counts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from training.benchmark.mllog import Event, read_log
from training.benchmark.targets import QUALITY

__all__ = ["RunSoFar", "run_so_far", "time_to_quality"]


@dataclass(frozen=True)
class RunSoFar:
    """What a log knows of its run. samples: objects shown to the model, those of lost steps included."""

    run_time_ms: float
    samples: int
    sessions: int
    finished: bool


def run_so_far(events: Sequence[Event]) -> RunSoFar:
    """Time and samples up to the last line."""
    time_ms, samples, sessions = 0.0, 0, 0
    begun: Event | None = None
    for event in events:
        if event.key == "session_start":
            time_ms += _spent(events, begun, event.line)
            begun, sessions = event, sessions + 1
        if isinstance(found := event.metadata.get("samples_count"), int | float):
            samples = max(samples, int(found))
    if events:
        time_ms += _spent(events, begun, events[-1].line + 1)
    return RunSoFar(time_ms, samples, sessions, any(event.key == "run_stop" for event in events))


def _spent(events: Sequence[Event], begun: Event | None, end: int) -> float:
    """From the start of a session to the last line before line `end`."""
    if begun is None:
        return 0.0
    return max(event.time_ms for event in events if begun.line <= event.line < end) - begun.time_ms


def time_to_quality(paths: Sequence[Path]) -> dict[str, Any]:
    """What the logs of a model's training say: the alignment's time to `QUALITY`, and all stages' together.

    paths: one log a stage. The one with eval_accuracy is the alignment; those of pretraining add their whole time.
    "seconds" and "samples" are None where the quality was not reached.
    """
    stages: list[dict[str, Any]] = []
    reached: dict[str, Any] | None = None
    for path in paths:
        events = read_log(path)
        so_far = run_so_far(events)
        platforms = [event.metadata for event in events if event.key == "submission_platform"]
        measured = [event for event in events if event.key == "eval_accuracy"]
        stage: dict[str, Any] = {
            "stage": next((str(event.value) for event in events if event.key == "stage"), path.parent.name),
            "seconds": so_far.run_time_ms / 1000,
            "samples": so_far.samples,
            "sessions": so_far.sessions,
            "finished": so_far.finished,
            "machine": platforms[-1] if platforms else {},
            "quality": [
                {
                    "value": event.value,
                    "seconds": event.metadata["run_time_ms"] / 1000,
                    "samples": event.metadata["samples_count"],
                }
                for event in measured
            ],
        }
        stages.append(stage)
        if measured:
            good = [point for point in stage["quality"] if point["value"] >= QUALITY.wanted]
            reached = good[0] if good else None
    pretraining = sum(stage["seconds"] for stage in stages if not stage["quality"])
    return {
        "quality": {"name": QUALITY.key, "pool": QUALITY.pool, "wanted": QUALITY.wanted},
        "reached": reached is not None,
        "seconds": reached["seconds"] if reached else None,
        "samples": reached["samples"] if reached else None,
        "seconds_with_pretraining": reached["seconds"] + pretraining if reached else None,
        "stages": stages,
    }
