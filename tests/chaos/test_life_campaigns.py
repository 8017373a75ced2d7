"""Short versions of the campaigns on kills, damaged files, SIGTERMs and swaps, in own processes: they fork."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("noun", "options"),
    [
        ("kills", ["--points", "12", "--starts", "1"]),
        ("flips", ["--flips", "100", "--others", "24"]),
        ("shutdown", ["--rounds", "4"]),
        ("swaps", ["--swaps", "14", "--objects", "2000"]),
    ],
)
@pytest.mark.timeout(600)
def test_short_campaign_passes_its_marks(noun, options, tmp_path):
    out = tmp_path / f"{noun}.json"
    run = subprocess.run(
        [sys.executable, "-m", f"benchmarks.chaos.{noun}", *options, "--out", str(out)],
        cwd=ROOT, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-3000:]
    marks = json.loads(out.read_text())["marks"]
    assert marks and all(mark["passed"] for mark in marks.values()), marks
