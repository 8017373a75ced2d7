"""Results: the committed ones validate; what is missing, mistyped or not its own consequence is refused."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator
from typer.testing import CliRunner

from astroclip.cli import build_app
from training.benchmark.mllog import Event
from training.benchmark.release import Release
from training.benchmark.schema import check_result, check_result_against_log, schema
from training.benchmark.submission import check_files
from training.benchmark.targets import judge

RESULTS = Path(__file__).resolve().parents[2] / "benchmarks" / "results"
COMMITTED = [
    path for path in sorted(RESULTS.glob("*.json")) if json.loads(path.read_text()).get("kind") == "evaluation"
]


def test_the_schema_is_one():
    Draft202012Validator.check_schema(schema())


@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: path.name)
def test_committed_results_and_their_logs_comply(path: Path):
    log = path.with_suffix(".mllog.txt")
    assert not any(check_files([path, *([log] if log.is_file() else [])]).values())


@pytest.fixture(scope="module")
def result() -> dict[str, Any]:
    return json.loads((RESULTS / "evaluation.json").read_text())


def change(result: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    out = copy.deepcopy(result)
    node = out
    *parents, last = path.split("/")
    for key in parents:
        node = node[key]
    if value is KeyError:
        del node[last]
    else:
        node[last] = value
    return out


@pytest.mark.parametrize(
    ("path", "value", "rule"),
    [
        ("format", 1, "schema"),
        ("kind", "other", "schema"),
        ("marks", KeyError, "schema"),
        ("seed", -1, "schema"),
        ("model/sha256", "abc", "schema"),
        ("benchmark/division", "secret", "schema"),
        ("benchmark/release/status", "surely", "schema"),
        ("simulated/zero_shot/tuned/image->image/redshift", 0.9, "schema"),
        ("simulated/zero_shot/tuned/image->image/redshift/value", "high", "schema"),
        ("simulated/zero_shot/tuned/image->image/redshift/value", 0.5, "marks"),
        ("simulated/zero_shot/tuned/sideways", {}, "schema"),
        ("data/objects/test", 0, "schema"),
    ],
)
def test_what_breaks_the_schema_or_the_marks_is_refused(result: dict[str, Any], path: str, value: Any, rule: str):
    assert rule in {complaint.rule for complaint in check_result(change(result, path, value))}


def test_a_closed_result_is_on_its_release(result: dict[str, Any]):
    release = Release.load("astroclip-sim-1")
    closed = change(result, "benchmark/division", "closed")
    closed["benchmark"]["release"].update(name=release.name, sha256=release.sha256, status="identical")
    assert check_result(closed) == []
    for path, value, rule in (
        ("benchmark/release/status", "different", "schema"),
        ("benchmark/release/sha256", "0" * 64, "data_release"),
        ("benchmark/release/name", "mine", "data_release"),
        ("data/split/train", ["healpix=0000/001-of-001.hdf5"], "data_release"),
        ("seed", 3, "seed"),
    ):
        assert rule in {complaint.rule for complaint in check_result(change(closed, path, value))}, path


def test_result_and_log_must_agree(result: dict[str, Any]):
    (mark, *_) = judge(result)

    def events(value: float, sha: str) -> list[Event]:
        return [
            Event(1, 0, "POINT_IN_TIME", "model_sha256", sha, {}),
            Event(2, 0, "POINT_IN_TIME", "eval_accuracy", value, {"name": mark["name"]}),
        ]

    sha = result["model"]["sha256"]
    assert check_result_against_log(result, events(mark["value"], sha)) == []
    assert [c.line for c in check_result_against_log(result, events(mark["value"] + 0.01, "00"))] == [1, 2]


def test_the_command_says_which_file_breaks_what(tmp_path: Path, result: dict[str, Any]):
    (tmp_path / "good.json").write_text(json.dumps(result))
    (tmp_path / "bad.json").write_text('{"kind": "evaluation"}')
    (tmp_path / "torn.json").write_text('{"kind":')
    files = [str(tmp_path / name) for name in ("good.json", "bad.json", "torn.json", "none.txt")]
    done = CliRunner().invoke(build_app(), ["benchmark", "check", *files])
    assert done.exit_code == 1 and "good.json: complies" in done.output
    assert "is a required property" in done.output and "not JSON" in done.output and "not there" in done.output
    assert CliRunner().invoke(build_app(), ["benchmark", "check", files[0]]).exit_code == 0
