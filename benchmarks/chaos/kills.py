"""SIGKILL at points of an index build or append: what is there afterwards opens, whole, and the next build mends.

    python -m benchmarks.chaos.kills [--points 200] [--starts 6] [--out benchmarks/results/kills.json]

Half of the points are calls: the builder dies between two of its calls that write a file, change a directory or make
either durable (tables and vectors written, mkdir, fsync, rename, replace, symlink, unlink, rmdir), taken evenly over
all of them. The other half are times, uniform over the duration of the build. Builds are first ones (nothing was
there), rebuilds and appends, in turn.

After each, in a fresh process: the root holds the version from before or the new one, every file of it verified, with
the objects that belong to it; where nothing was there, the index or a refusal by name. Then the same build is made
again and must succeed, and leave nothing of its dead predecessor. At `starts` of the points a real server is started
on what the killed builder left, and must be ready and find an object of the version it names.

A killed process is not a power cut: what was written before the kill is in the page cache and stays. The order of
fsync and rename, which matters then, is tested in `tests/index/test_index_publish.py`.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

import index.build
import index.head_fit
from astroclip.errors import IndexFileError
from astroclip.types import Modality
from benchmarks.chaos.campaign import failed
from benchmarks.chaos.forks import Child, forked
from benchmarks.chaos.toy import parts, tiny_model
from index import BuildOptions, SurveyIndex, append_index, build_index
from index.backends.faiss_file import faiss_module
from index.manifest import MANIFEST, sha256_file
from training.evaluate.report import provenance, write_json

SHORT = ("--points", "12", "--starts", "1")  # for a run of a minute or two
KINDS = ("first", "rebuild", "append")
OLD, NEW = 320, 40  # objects of the earlier version, and of what comes
SEED = 5
OPTIONS = BuildOptions(hnsw="always")
_CALLS = ("mkdir", "fsync", "rename", "replace", "symlink", "unlink", "rmdir")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--points", type=int, default=200)
    parser.add_argument("--starts", type=int, default=6, help="points after which a server is started")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/kills.json"))
    arguments = parser.parse_args()
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        report = campaign(Path(folder), arguments.points, arguments.starts)
    write_json(arguments.out, {"kind": "kills", **provenance(seed=SEED, started=started), **report})
    print(report["marks"])
    return 1 if failed(report["marks"]) else 0


def campaign(folder: Path, points: int, starts: int) -> dict[str, Any]:
    faiss_module()
    forked(lambda: _prepare(folder))
    spans = {kind: forked(partial(_measure, folder, kind)) for kind in KINDS}
    plan = _plan(points, spans)
    serve_at = set(np.linspace(0, len(plan) - 1, starts).astype(int).tolist()) if starts else set()
    found: list[dict[str, Any]] = []
    for number, (kind, how, at) in enumerate(plan):
        for _ in range(8):  # a time may come too late on a machine whose speed varies: then an earlier one
            root = _fresh(folder, kind)
            outcome = Child(partial(_victim, folder, root, kind, how, at)).wait(
                kill_after_s=at if how == "time" else 60.0
            )
            if outcome.signal or outcome.code or how == "call":
                break
            at *= 0.7
        result = {"build": kind, "how": how, "at": at, "killed": outcome.signal == signal.SIGKILL}
        if not result["killed"] and outcome.code != 0:
            result["fault"] = f"the builder ended with code {outcome.code}"
        elif number in serve_at:
            result["server"] = _served(folder, root)
        try:
            result |= forked(partial(_judge, folder, root, kind))
        except (RuntimeError, TimeoutError) as error:
            result["fault"] = repr(error)
        found.append(result)
        if "fault" in result or result.get("server", "ready") != "ready":
            print(result, flush=True)
    return _report(found, spans)


def _report(found: list[dict[str, Any]], spans: dict[str, Any]) -> dict[str, Any]:
    killed = [result for result in found if result["killed"]]
    faults = [result for result in found if "fault" in result]
    served = [result["server"] for result in found if "server" in result]
    left = Counter(f"{result['build']}: {result.get('left')}" for result in killed)
    marks = {
        "kills": {"found": len(killed), "wanted": len(found)},
        "no valid index, or next build failed": {"found": len(faults), "wanted": 0},
        "servers ready afterwards": {"found": served.count("ready"), "wanted": len(served)},
    }
    passed = (len(killed) == len(found), not faults, served.count("ready") == len(served))
    for mark, good in zip(marks.values(), passed, strict=True):
        mark["passed"] = good
    return {"marks": marks, "spans": spans, "left": dict(left), "faults": faults, "points": found}


def _plan(points: int, spans: dict[str, Any]) -> list[tuple[str, str, float]]:
    """(build, how, at): at is a half-integer of a call (k - 0.5 before the k-th, k + 0.5 after it) or a time in s."""
    rng = np.random.default_rng(SEED)
    plan: list[tuple[str, str, float]] = []
    for place, kind in enumerate(KINDS):
        share = len(range(place, points, len(KINDS)))
        calls = share // 2
        last = spans[kind]["calls"]
        plan += [(kind, "call", k + 0.5) for k in np.unique(np.linspace(0, last, calls).round()).tolist()]
        while sum(entry[0] == kind for entry in plan) < share:
            plan.append((kind, "time", float(rng.uniform(0.0, 0.97 * spans[kind]["seconds"]))))
    return plan


def _prepare(folder: Path) -> None:
    """The model, the parts, and a root with two versions, as a root is after some time."""
    sha256 = tiny_model(folder / "model")
    parts(folder / "old", OLD, prefix="old", seed=1, sha256=sha256)
    parts(folder / "new", NEW, prefix="new", seed=2, sha256=sha256)
    for _ in range(2):
        build_index(folder / "old", folder / "before", survey="Toy", options=OPTIONS)


def _fresh(folder: Path, kind: str) -> Path:
    root = folder / "root"
    shutil.rmtree(root, ignore_errors=True)
    if kind != "first":
        shutil.copytree(folder / "before", root, symlinks=True)
    return root


def _build(folder: Path, root: Path, kind: str) -> None:
    if kind == "append":
        append_index(root, folder / "new")
    else:
        build_index(folder / "new", root, survey="Toy", options=OPTIONS)


def _measure(folder: Path, kind: str) -> dict[str, Any]:
    """Calls and seconds of an undisturbed build."""
    root = _fresh(folder, kind)
    calls = _count_calls(lambda k: None)
    start = time.perf_counter()
    _build(folder, root, kind)
    return {"calls": calls[0], "seconds": round(time.perf_counter() - start, 3), "objects": len(SurveyIndex.open(root))}


def _victim(folder: Path, root: Path, kind: str, how: str, at: float) -> None:
    if how == "call":
        _count_calls(lambda k: os.kill(os.getpid(), signal.SIGKILL) if k >= at else None)
    _build(folder, root, kind)


def _count_calls(at: Callable[[float], None]) -> list[int]:
    """Wrap the calls that change directories or make them durable; `at` is asked k - 0.5 before and k + 0.5 after the
    k-th. The list holds their number so far."""
    calls = [0]

    def counted(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **keywords: Any) -> Any:
            at(calls[0] + 0.5)
            try:
                return real(*arguments, **keywords)
            finally:
                calls[0] += 1
                at(calls[0] + 0.5)

        return call

    for name in _CALLS:
        setattr(os, name, counted(getattr(os, name)))
    # What writes files: numpy and our own code by open, Arrow and FAISS by themselves.
    modules: Any = index.build
    np.save = counted(np.save)  # type: ignore[assignment]
    modules.pq.write_table = counted(modules.pq.write_table)
    Path.write_bytes = counted(Path.write_bytes)  # type: ignore[method-assign,assignment]
    modules.VectorWriter.append = counted(modules.VectorWriter.append)
    modules.VectorWriter.__exit__ = counted(modules.VectorWriter.__exit__)
    return calls


def _judge(folder: Path, root: Path, kind: str) -> dict[str, Any]:
    """What the dead builder left, and whether the next one makes it good. Faults are said, not raised."""
    left = _left(root, kind)
    if left.startswith("fault"):
        return {"left": left, "fault": left}
    littered = sorted(path.name for path in _litter(root))
    try:
        if kind == "append" and left == "new":
            shutil.rmtree(root)  # the same objects cannot be appended twice: begin anew
            root = _fresh(folder, kind)
        _build(folder, root, kind)
    except Exception as error:
        return {"left": left, "fault": f"the next build failed: {error!r}"}
    after, litter = _left(root, kind), _litter(root)
    if after != "new" or litter:
        return {"left": left, "fault": f"after the next build: {after}, {[str(path) for path in litter]}"}
    return {"left": left, "litter": littered}


def _left(root: Path, kind: str) -> str:
    """old, new or none; "fault: ..." for anything else."""
    wanted = {
        "old": [f"old-{i:06d}" for i in range(OLD) if i != OLD // 2],
        "new": [f"new-{i:06d}" for i in range(NEW) if i != NEW // 2],
    }
    if kind == "append":
        wanted["new"] = wanted["old"] + wanted["new"]
    try:
        opened = SurveyIndex.open(root)
    except IndexFileError as error:
        fair = kind == "first" and error.code == "not_an_index" and not (root / "CURRENT").exists()
        return "none" if fair else f"fault: {error.message}"
    except Exception as error:
        return f"fault: {error!r}"
    ids = opened.catalog.object_ids.to_pylist()
    state = next((name for name, expected in wanted.items() if ids == expected), None)
    if state is None or (kind == "first" and state == "old"):
        return f"fault: {len(ids)} objects of no version"
    row = len(ids) - 1
    modality: Modality = "image" if opened.vector(row, "image") is not None else "spectrum"
    vector = opened.vector(row, modality)
    assert vector is not None
    hits, _ = opened.search(vector[None], target=modality, k=1, query_modality=modality)
    return state if hits[0].object_ids == [ids[row]] else f"fault: {ids[row]} does not find itself"


def _litter(root: Path) -> list[Path]:
    """What a finished build must not leave: stagings, half-made links, versions beyond those kept, links to nothing."""
    versions = sorted((root / "versions").glob("v*")) if root.exists() else []
    found = [*root.glob("versions/.*"), *root.glob(".*.new"), *versions[: -OPTIONS.keep]]
    return found + [path for path in root.glob("*") if path.is_symlink() and not path.exists()]


def _served(folder: Path, root: Path) -> str:
    """Start a server on the root: "ready", or what went wrong. Where there is no index, it must refuse by name."""
    import json
    import subprocess
    import sys
    import urllib.request

    has_index = (root / "CURRENT").exists()
    command = [sys.executable, "-c", "from astroclip.cli import main; main()", "serve", "--index", str(root)]
    log = folder / "server.log"
    with log.open("w") as stream:
        server = subprocess.Popen(
            [*command, "--model", str(folder / "model"), "--port", "0"], stdout=stream, stderr=stream
        )
    try:
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and server.poll() is None:
            time.sleep(0.2)
            line = next((x for x in log.read_text().splitlines() if "running on http" in x), None)
            if line is None:
                continue
            url = line.split("running on ")[1].split()[0]
            with urllib.request.urlopen(f"{url}/readyz", timeout=10) as answer:
                ready = json.load(answer)
            wanted = sha256_file(root / "CURRENT" / MANIFEST)
            return "ready" if ready["index"]["manifest_sha256"] == wanted else "another index is served"
        if not has_index and server.poll() == 2 and "wanted an index directory" in log.read_text():
            return "ready"  # as ready as it can be: it refused by name
        return f"no server: {log.read_text()[-300:]}"
    finally:
        server.kill()
        server.wait()


if __name__ == "__main__":
    raise SystemExit(main())
