"""Files as somebody hands them in: results and logs told apart, checked alone and against each other."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from training.benchmark.compliance import Complaint, check_events, check_log
from training.benchmark.mllog import LogError, read_log
from training.benchmark.schema import check_result, check_result_against_log, read_result

__all__ = ["check_files"]

LOG_SUFFIX = ".mllog.txt"


def check_files(files: Sequence[Path]) -> dict[str, list[Complaint]]:
    """File -> what is wrong with it. `.json` is a result, anything else a log."""
    return {str(path): _result(path, files) if path.suffix == ".json" else check_log(path) for path in files}


def _result(path: Path, files: Sequence[Path]) -> list[Complaint]:
    try:
        result = read_result(path)
    except ValueError as error:
        return [Complaint(0, "format", str(error))]
    complaints = check_result(result)
    log = path.with_suffix(LOG_SUFFIX)
    if not complaints and log in files:
        try:
            events = read_log(log)
        except LogError:
            return complaints  # the log's own check says so
        if not check_events(events):
            complaints += check_result_against_log(result, events)
    return complaints
