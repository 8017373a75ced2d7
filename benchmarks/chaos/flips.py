"""Damage to the files of an index: every flipped byte is refused, by the name of the file it is in.

    python -m benchmarks.chaos.flips [--flips 1000] [--others 200] [--out benchmarks/results/flips.json]

The index has every kind of file there is: graphs, float16 vectors, previews, heads, calibrations, statistics. Bytes are
sampled over all listed files and the manifest, each file at least once and small ones more often than their share (the
fourth root of the size); half of the flips change one bit, half replace the byte. The others are truncations, bytes
appended or inserted, removals, and files exchanged for another file of the index. Every damaged index is opened in a
child process: it must raise `IndexFileError` whose field is the file, and neither load nor crash.
"""

from __future__ import annotations

import argparse
import os
import shutil
import tempfile
import time
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

import index.head_fit  # noqa: F401  (children are forked from a parent that has imported what they use)
from astroclip.errors import IndexFileError
from benchmarks.chaos.campaign import failed
from benchmarks.chaos.forks import Child, forked
from benchmarks.chaos.toy import parts, previews, tiny_model
from index import BuildOptions, SurveyIndex, build_index
from index.backends.faiss_file import faiss_module
from training.evaluate.report import provenance, write_json

SHORT = ("--flips", "60", "--others", "20")  # for a run of a minute or two
SEED = 6
BATCH = 50  # damages a child looks at: one that crashes is known to within so many, and then found
OTHERS = ("truncate", "append", "insert", "remove", "exchange", "empty")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--flips", type=int, default=1000)
    parser.add_argument("--others", type=int, default=200)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/flips.json"))
    arguments = parser.parse_args()
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        report = campaign(Path(folder), arguments.flips, arguments.others)
    write_json(arguments.out, {"kind": "flips", **provenance(seed=SEED, started=started), **report})
    print(report["marks"])
    return 1 if failed(report["marks"]) else 0


def campaign(folder: Path, flips: int, others: int) -> dict[str, Any]:
    faiss_module()
    root = folder / "index"
    sizes: dict[str, int] = forked(lambda: _prepare(folder, root))
    plan = _plan(sizes, flips, others)
    results: list[str] = []
    for start in range(0, len(plan), BATCH):
        batch = plan[start : start + BATCH]
        outcome = Child(partial(_tries, root, batch)).wait()
        results += outcome.value if outcome.value is not None else [_alone(root, *entry) for entry in batch]
    faults = [{"file": e[0], "damage": e[1], "result": r} for e, r in zip(plan, results, strict=True) if r != "refused"]
    hit = Counter(name for name, damage, _ in plan if damage == "flip")
    refused = sum(r == "refused" for e, r in zip(plan, results, strict=True) if e[1] == "flip")
    marks = {
        "flips refused by name": {"found": refused, "wanted": flips, "passed": refused == flips},
        "other damage refused by name": {
            "found": results.count("refused") - refused,
            "wanted": others,
            "passed": results.count("refused") == flips + others,
        },
        "files hit": {"found": len(hit), "wanted": len(sizes), "passed": len(hit) == len(sizes)},
    }
    return {
        "marks": marks,
        "files": {name: {"bytes": sizes[name], "flips": hit[name]} for name in sizes},
        "faults": faults,
    }


def _prepare(folder: Path, root: Path) -> dict[str, int]:
    sha256 = tiny_model(folder / "model")
    parts(folder / "parts", 700, prefix="obj", seed=1, sha256=sha256)
    previews(folder / "shards", [f"obj-{i:06d}" for i in range(0, 40)])
    options = BuildOptions(hnsw="always", heads="always")
    build_index(folder / "parts", root, survey="Toy", previews=folder / "shards", options=options, plain=True)
    SurveyIndex.open(root)
    return {p.relative_to(root).as_posix(): p.stat().st_size for p in sorted(root.rglob("*")) if p.is_file()}


def _plan(sizes: dict[str, int], flips: int, others: int) -> list[tuple[str, str, int]]:
    """(file, damage, seed of its place)."""
    rng = np.random.default_rng(SEED)
    names = list(sizes)
    weights = np.array(list(sizes.values()), float) ** 0.25
    drawn = [*names, *rng.choice(names, max(0, flips - len(names)), p=weights / weights.sum())][:flips]
    plan = [(str(name), "flip", int(rng.integers(2**32))) for name in drawn]
    for place in range(others):
        plan.append((names[place % len(names)], OTHERS[place % len(OTHERS)], int(rng.integers(2**32))))
    return plan


def _tries(root: Path, batch: list[tuple[str, str, int]]) -> list[str]:
    return [_try(root, *entry) for entry in batch]


def _alone(root: Path, name: str, damage: str, seed: int) -> str:
    outcome = Child(lambda: _try(root, name, damage, seed)).wait()
    return outcome.value or f"crashed: signal {outcome.signal}, code {outcome.code}"


def _try(root: Path, name: str, damage: str, seed: int) -> str:
    """Damage one file, open the index, put the file right again; "refused" or what happened instead."""
    path = root / name
    content = path.read_bytes()
    aside = root.parent / "aside"
    shutil.copy2(path, aside)
    try:
        _damage(path, content, damage, np.random.default_rng(seed), root)
        try:
            SurveyIndex.open(root)
        except IndexFileError as error:
            named = error.field == name and (name in error.message)
            return "refused" if named else f"refused as {error.field}: {error.message}"
        except Exception as error:
            return f"raised {error!r}"
        return "loaded"
    finally:
        os.replace(aside, path)


def _damage(path: Path, content: bytes, damage: str, rng: np.random.Generator, root: Path) -> None:
    at = int(rng.integers(len(content)))
    if damage == "flip":
        byte = content[at] ^ (1 << int(rng.integers(8)) if rng.random() < 0.5 else int(rng.integers(1, 256)))
        path.write_bytes(content[:at] + bytes([byte]) + content[at + 1 :])
    elif damage == "truncate":
        path.write_bytes(content[:at])
    elif damage == "append":
        path.write_bytes(content + rng.bytes(int(rng.integers(1, 64))))
    elif damage == "insert":
        path.write_bytes(content[:at] + b"\0" + content[at:])
    elif damage == "remove":
        path.unlink()
    elif damage == "empty":
        path.write_bytes(b"")
    else:
        others = [p for p in sorted(root.rglob("*")) if p.is_file() and p != path and p.read_bytes() != content]
        path.write_bytes(others[int(rng.integers(len(others)))].read_bytes())


if __name__ == "__main__":
    raise SystemExit(main())
