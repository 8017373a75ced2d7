"""The campaigns of hostile bodies, short, against the tiny model and a small index: that they run, pass,
and can fail."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from serving import index_dir  # noqa: F401

from benchmarks.chaos import bombs, contract, fuzz
from benchmarks.chaos.mutations import cases, seeds

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

ABSOLUTE = {"gzip bomb: ms to the refusal", "slowest refusal, s", "slowest case, s"}  # a busy machine misses them


def run(module, out: Path, index: Path, model: Path, *words: str) -> dict:  # type: ignore[no-untyped-def]
    before = sys.argv
    sys.argv = [module.__name__, "--out", str(out), "--index", str(index), "--model", str(model), *words]
    try:
        module.main()
    finally:
        sys.argv = before
    result = json.loads(out.read_text())
    assert not [name for name, mark in result["marks"].items() if not mark["passed"] and name not in ABSOLUTE], result
    return result


def test_fuzz(tmp_path: Path, index_dir: Path, tiny_model_dir: Path) -> None:  # noqa: F811
    words = ("--count", "3000", "--wire", "100", "--workers", "1")
    result = run(fuzz, tmp_path / "fuzz.json", index_dir, tiny_model_dir, *words)
    assert {"200", "400", "413", "415", "422"} <= set(result["in_process"]["statuses"])
    assert len(result["in_process"]["codes"]) > 25


def test_contract(tmp_path: Path, index_dir: Path, tiny_model_dir: Path) -> None:  # noqa: F811
    result = run(contract, tmp_path / "contract.json", index_dir, tiny_model_dir, "--short")
    assert len(result["operations"]) > 12 and "POST /v1/admin/index/reload" in result["operations"]
    assert "401" in result["statuses"]


def test_bombs(tmp_path: Path, index_dir: Path, tiny_model_dir: Path) -> None:  # noqa: F811
    run(bombs, tmp_path / "bombs.json", index_dir, tiny_model_dir, "--short")


def test_the_same_seed_makes_the_same_cases() -> None:
    assert list(cases(3, 200)) == list(cases(3, 200)) != list(cases(4, 200))
    origins = {case.origin for case in cases(3, 600)}
    assert origins == set(seeds())


@pytest.mark.parametrize(
    ("status", "kind", "body"),
    [
        (500, "application/json", b"{}"),
        (200, "application/json", b'{"x": NaN}'),
        (400, "application/json", b'{"error": {"code": "x"}}'),
        (400, "text/plain", b"no"),
        (418, "application/json", b"{}"),
    ],
)
def test_a_wrong_answer_is_seen(status: int, kind: str, body: bytes) -> None:
    assert fuzz.fault(status, {"content-type": kind}, body)
