"""The OpenAPI document against a live server: schemathesis, every operation, every check.

    python -m benchmarks.chaos.contract [--examples 200] [--short]

schemathesis makes requests from the document, good ones and bad ones, and holds the answers against it: no server
error, only documented statuses, content types and headers, bodies of the documented schema, bad requests refused. The
server wants a key and schemathesis has one of every scope, so admin calls are asked, too, and what a key is wanted for
is asked without one.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.chaos.campaign import SEED, UNBOUNDED, mark, parser, report
from benchmarks.chaos.server import ROOT, Server
from service.keys import changing, new_key

__all__ = ["main"]

SERVER_ERRORS = ("Server error",)
# Any bytes and any object id fit the document; whether they are a galaxy of the index, no document can say.
NOTHING_TO_VARY = (  # no parameters
    "GET /livez",
    "GET /readyz",
    "GET /v1/info",
    "GET /v1/lists",
    "GET /metrics",
    "POST /v1/admin/index/reload",
)
NOT_ASKED = ("positive_data_acceptance",)


def main() -> int:
    made = parser(__doc__, "contract")
    made.add_argument("--examples", type=int, default=200, help="examples of each operation")
    made.add_argument("--log", type=Path, help="where schemathesis' own words go")
    arguments = made.parse_args()
    started = time.perf_counter()
    examples = 10 if arguments.short else arguments.examples
    with tempfile.TemporaryDirectory() as folder, _server(arguments, Path(folder) / "keys.json") as (server, key):
        events = Path(folder) / "events.ndjson"
        words = ["-m", "schemathesis.cli", "run", f"{server.url}/openapi.json", "--checks", "all"]
        words += ["--exclude-checks", ",".join(NOT_ASKED), "--header", f"Authorization: Bearer {key}"]
        words += ["--max-examples", str(examples), "--seed", str(SEED), "--workers", "1", "--continue-on-failure"]
        words += ["--phases", "examples,coverage,fuzzing", "--no-color", "--request-timeout", "30"]
        words += ["--report", "ndjson", "--report-ndjson-path", str(events)]
        done = subprocess.run(
            [sys.executable, *words],
            cwd=ROOT,
            env={**os.environ, "SCHEMATHESIS_HOOKS": "benchmarks.chaos.contract_files", "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
        )
        if arguments.log:
            arguments.log.write_text(done.stdout + done.stderr)
        alive = server.alive
        found = tally(events)
    if not found["operations"]:
        raise RuntimeError(f"schemathesis sent nothing:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    errors = sum(n for name, n in found["failures"].items() if name.startswith(SERVER_ERRORS))
    varied = [n for name, n in found["operations"].items() if name not in NOTHING_TO_VARY]
    marks = {
        "server errors": mark(errors + (not alive), 0, "most"),
        "violations of the schema": mark(sum(found["failures"].values()) - errors, 0, "most"),
        "examples of the least tried operation with parameters": mark(min(varied), examples, "least"),
    }
    return report(arguments.out, "contract", started, marks, {"examples": examples, **found, "exit": done.returncode})


@contextmanager
def _server(arguments: argparse.Namespace, keys: Path) -> Iterator[tuple[Server, str]]:
    """A server that wants a key, and one of every scope."""
    with changing(keys) as kept:
        text, key = new_key(("read", "admin"))
        kept.append(key)
    settings = {**UNBOUNDED, "keys_file": keys}
    with Server(index=arguments.index, model=arguments.model, settings=settings) as server:
        yield server, text


def tally(events: Path) -> dict[str, Any]:
    """Requests of each operation, statuses, and failures by their title, from schemathesis' event log."""
    operations: dict[str, int] = {}
    statuses: dict[str, int] = {}
    failures: dict[str, int] = {}
    samples: list[str] = []
    for line in events.read_text().splitlines():
        event = json.loads(line)
        scenario = event.get("ScenarioFinished")
        if not scenario:
            continue
        recorder = scenario["recorder"]
        for case in recorder.get("interactions", {}).values():
            label = recorder["label"]
            operations[label] = operations.get(label, 0) + 1
            status = str((case.get("response") or {}).get("status_code"))
            statuses[status] = statuses.get(status, 0) + 1
        for checks in recorder.get("checks", {}).values():
            for check in checks:
                if check["status"] == "failure":
                    title = check["failure_info"]["failure"]["title"]
                    failures[title] = failures.get(title, 0) + 1
                    if len(samples) < 40:
                        samples.append(f"{recorder['label']}: {json.dumps(check['failure_info'])[:600]}")
    return {"operations": operations, "statuses": statuses, "failures": failures, "samples": samples}


if __name__ == "__main__":
    sys.exit(main())
