"""Recall and latency of filtered searches of a million vectors, for every backend, through the planner.

    python benchmarks/filtered_search.py [--vectors 1000000] [--scratch DIR]
        [--out benchmarks/results/filtered_search.json]

Vectors are clustered (`benchmarks/clustered.py`), stored as float16 like an index's. For every backend: it is built and
measured as `astroclip index build` does, then asked for the ten nearest, one query after the other, under filters that
pass 100 %, 10 %, 1 %, 0.1 % and 0.01 % of the rows: at random, or all that lies nearest to some vector. Queries are
held-out vectors of the same distribution and of one that lies apart (another modality's); for regions half of them are
the nearest to it. Recall is that against exact search under the same filter.

The campaign asks random filtered queries, a fifth of them forced through the approximate backend, and counts rows
outside the filter, rows excluded by the query, rows that come twice, and answers that are too short.

One backend is in memory at a time; `--scratch` keeps what is built between runs and is emptied at the end unless
`--keep`. About half an hour on two cores.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from clustered import DIM, SEED, clustered, draw

from index.backends import ANN, ExactBackend
from index.planner import MeasuredSearch
from index.recall import measure, recall_at_k
from index.table_search import Ask, TableSearch
from index.vectors import VectorTable
from training.evaluate.report import provenance, write_json

SHARES = (1.0, 0.1, 0.01, 0.001, 0.0001)
K = 10
FILTERS = 4  # of each kind and share
ASKED = 40  # queries a filter and distribution
GAP = 0.5  # length of what parts the second distribution from the first
WANTED = 0.99

Mask = npt.NDArray[np.bool_]
Vectors = npt.NDArray[np.float32]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vectors", type=int, default=1_000_000)
    parser.add_argument("--backend", action="append", choices=("exact", *ANN), help="only these; results are added")
    parser.add_argument("--campaign", type=int, default=100_000, help="random filtered queries, over all backends")
    parser.add_argument("--scratch", type=Path, default=Path(tempfile.gettempdir()) / "filtered-search")
    parser.add_argument("--keep", action="store_true", help="leave what was built in --scratch")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/filtered_search.json"))
    arguments = parser.parse_args()
    started = time.perf_counter()
    scratch, count = arguments.scratch, arguments.vectors
    scratch.mkdir(parents=True, exist_ok=True)
    if not (scratch / "vectors.npy").is_file():
        clustered(scratch / "vectors.npy", count, part=0)
    table = VectorTable(np.load(scratch / "vectors.npy", mmap_mode="r"), np.arange(count))
    cells = list(make_cells(table))
    if not arguments.backend:
        arguments.out.unlink(missing_ok=True)
    for name in arguments.backend or ["exact", *ANN]:
        search, built = prepared(name, table, scratch)
        result = built | {"cells": [asked(search, cell) for cell in cells]}
        if search.ann is not None:
            result["campaign"] = campaign(search, -(-arguments.campaign // len(ANN)))
        report(arguments.out, count, name, result, started)
        print(f"{name}: {time.perf_counter() - started:.0f} s", flush=True)
    if not arguments.keep:
        for path in scratch.iterdir():
            path.unlink()


def report(out: Path, count: int, name: str, result: dict[str, Any], started: float) -> None:
    """Add one backend's results to the file."""
    results = json.loads(out.read_text())["backends"] if out.is_file() else {}
    results = {key: (results | {name: result})[key] for key in ("exact", *ANN) if key in {*results, name}}
    approximate = [results[name] for name in ANN if name in results]
    recalls = [cell["recall_at_10"] for built in approximate for cell in built["cells"]]
    leaked = [built["campaign"]["rows_outside_the_filter"] for built in approximate]
    marks = {
        "recall_at_10 in every cell": {"wanted": WANTED, "worst": min(recalls, default=None)},
        "rows outside the filter": {
            "wanted": 0,
            "found": sum(leaked),
            "queries": sum(built["campaign"]["queries"] for built in approximate),
        },
    }
    data = {"vectors": count, "dim": DIM, "seed": SEED, "gap": GAP}
    record = {"kind": "filtered_search", **provenance(seed=SEED, started=started), "data": data}
    record["command"] = f"filtered_search.py --vectors {count}"  # in one go or a backend at a time: the same
    write_json(out, {**record, "marks": marks, "backends": results})


def prepared(name: str, table: VectorTable, scratch: Path) -> tuple[TableSearch, dict[str, Any]]:
    """The search with this backend, and what building it took; read from `scratch` where it lies there."""
    if name not in ANN:
        return TableSearch(table), {}
    path, notes = scratch / f"{name}.faiss", scratch / f"{name}.json"
    if not path.is_file():
        start, worked = time.perf_counter(), time.process_time()
        ANN[name].build(table).write(path)
        record = {"build_s": time.perf_counter() - start, "build_cpu_s": time.process_time() - worked}
        notes.write_text(json.dumps(record))
    record = json.loads(notes.read_text())
    ann = ANN[name].read(path, path.name, count=len(table), dim=table.dim)
    if "measured" not in record:
        start = time.perf_counter()
        others = VectorTable(draw(20_000, 3, shift=GAP), np.arange(20_000))
        record["measured"] = measure(ann, table, {"same": table, "other": others}, np.random.default_rng(SEED))
        record["measure_s"] = time.perf_counter() - start
        notes.write_text(json.dumps(record))
    built = {key: record[key] for key in ("build_s", "build_cpu_s", "measure_s")}
    built |= {"file_bytes": path.stat().st_size, "settings": ann.settings}
    built |= {key: record["measured"][key] for key in ("exact_below", "cost", "recall")}
    return TableSearch(table, ann=ann, measured=MeasuredSearch.from_record(record["measured"], len(table))), built


def make_cells(table: VectorTable) -> Iterator[dict[str, Any]]:
    """Every kind and share of filter: masks, the queries of each, and their true neighbours."""
    rng, exact = np.random.default_rng([SEED, 1]), ExactBackend(table)
    pools = {"same": draw(20_000, 1), "other": draw(20_000, 2, shift=GAP)}
    for share in SHARES:
        for kind in ("random", "region") if share < 1.0 else ("none",):
            parts = []
            for i in range(FILTERS if share < 1.0 else 1):
                mask, centre = make_mask(table, kind, share, rng)
                for modality, pool in pools.items():
                    many = ASKED if share < 1.0 else ASKED * FILTERS
                    queries = pool[rng.permutation(len(pool))[:many]]
                    if kind == "region":
                        near = pool[np.argsort(-(pool @ centre))[: many // 2]]
                        queries = np.concatenate([queries[: many // 2], near])
                    found = exact.search(queries, K, mask)
                    parts.append((modality, i, mask, queries, found))
            yield {"filter": kind, "share": share, "parts": parts}


def make_mask(table: VectorTable, kind: str, share: float, rng: np.random.Generator) -> tuple[Mask | None, Vectors]:
    centre = table.take(rng.integers(0, len(table), 1))
    if kind == "none":
        return None, centre[0]
    wanted = max(1, round(share * len(table)))
    mask = np.zeros(len(table), bool)
    if kind == "random":
        mask[rng.choice(len(table), wanted, replace=False)] = True
    else:
        mask[ExactBackend(table).search(centre, wanted)[0]] = True
    return mask, centre[0]


def asked(search: TableSearch, cell: dict[str, Any]) -> dict[str, Any]:
    """Recall, latency and modes of one cell."""
    times, found, true, modes, expected, where = [], [], [], Counter[str](), [], []
    for modality, _, mask, queries, truth in cell["parts"]:
        for query, right in zip(queries, truth, strict=True):
            start = time.perf_counter()
            answer = search.search(query[None], Ask(K, modality, mask))
            times.append(1e3 * (time.perf_counter() - start))
            modes[answer.mode] += 1
            expected.append(answer.expected_recall)
            found.append(np.pad(answer.rows[0], (0, K - answer.rows.shape[1]), constant_values=-1))
            true.append(np.pad(right, (0, K - len(right)), constant_values=-1))
            where.append(modality)
    got, wanted = np.array(found), np.array(true)
    by = {m: recall_at_k(got[np.array(where) == m], wanted[np.array(where) == m]) for m in sorted(set(where))}
    return {
        "filter": cell["filter"],
        "share": cell["share"],
        "queries": len(times),
        "recall_at_10": recall_at_k(got, wanted),
        "recall_by_distribution": by,
        "expected_recall": min(expected),
        "p50_ms": float(np.percentile(times, 50)),
        "p99_ms": float(np.percentile(times, 99)),
        "modes": dict(modes),
    }


def campaign(search: TableSearch, count: int) -> dict[str, Any]:
    """Random filtered queries; how often an answer broke a rule."""
    rng, start, batch = np.random.default_rng([SEED, 2]), time.perf_counter(), 200
    size, broken, modes = len(search.table), Counter[str](), Counter[str]()
    name = search.ann.name if search.ann else "exact"
    asked = 0
    while asked < count:
        share = float(10.0 ** rng.uniform(-5, 0))
        mask, _ = make_mask(search.table, str(rng.choice(["random", "region"])), share, rng)
        assert mask is not None
        if rng.random() < 0.3:
            mask = ~mask
        queries = draw(min(batch, count - asked), int(rng.integers(10**6, 10**9)), shift=float(rng.choice([0.0, GAP])))
        k, excluded = int(rng.integers(1, 101)), np.unique(rng.integers(0, size, int(rng.integers(0, 20))))
        force = name if rng.random() < 0.2 else None
        answer = search.search(queries, Ask(k, str(rng.choice(["same", "other"])), mask, excluded, force=force))
        rows, there = answer.rows, answer.rows >= 0
        broken["rows_outside_the_filter"] += int(np.count_nonzero(there & ~mask[rows]))
        broken["excluded_rows"] += int(np.count_nonzero(there & np.isin(rows, excluded)))
        broken["rows_twice"] += sum(len(r[t]) - len(np.unique(r[t])) for r, t in zip(rows, there, strict=True))
        passing = int(np.count_nonzero(mask)) - int(np.count_nonzero(mask[excluded]))
        broken["short_answers"] += int(np.count_nonzero(there.sum(axis=1) < min(k, passing)))
        modes[answer.mode] += len(queries)
        asked += len(queries)
    names = ("rows_outside_the_filter", "excluded_rows", "rows_twice", "short_answers")
    seconds = time.perf_counter() - start
    return {"queries": asked, **{n: broken[n] for n in names}, "modes": dict(modes), "seconds": seconds}


if __name__ == "__main__":
    main()
