"""What estimates from neighbours add to the search they rest on, at index level: one query, and batches.

    python benchmarks/knn_cost.py --index index [index ...] [--out benchmarks/results/knn_cost.json]

For each index, every modality searched in itself: time of a call of `SurveyIndex.search` with as many neighbours as the
estimates want, of `stacked` and `estimate_many` on its hits with every default property, and their ratio. Search and
estimate take turns, and processor time is counted, which a busy machine does not stretch; medians over the rounds.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np

from astroclip.types import MODALITIES, Modality
from index import SurveyIndex, estimate_many, neighbours_wanted, stacked
from training.evaluate.report import provenance, write_json

BATCHES = {1: 300, 16: 100, 256: 15}  # queries a call: rounds
SEED = 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--index", type=Path, nargs="+", required=True)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/knn_cost.json"))
    arguments = parser.parse_args()
    started = time.perf_counter()
    results = []
    for folder in arguments.index:
        index = SurveyIndex.open(folder)
        for modality in MODALITIES:
            results += [measured(index, modality, batch, rounds) for batch, rounds in BATCHES.items()]
    write_json(arguments.out, {"kind": "knn_cost", **provenance(seed=SEED, started=started), "results": results})


def measured(index: SurveyIndex, modality: Modality, batch: int, rounds: int) -> dict[str, Any]:
    pair = (modality, modality)
    k = neighbours_wanted(index, None, pair)
    table, rng = index.tables[modality], np.random.default_rng(SEED)
    spent: list[tuple[float, float]] = []
    for _ in range(rounds + 3):
        queries = table.take(rng.choice(len(table), batch))
        start = time.process_time()
        hits, report = index.search(queries, target=modality, k=k, query_modality=modality)
        middle = time.process_time()
        estimate_many(index, *stacked(hits), pair=pair)
        spent.append((middle - start, time.process_time() - middle))
    search, regression = np.median(np.array(spent[3:]), axis=0)
    found = {
        "index": index.index_id,
        "vectors": len(table),
        "modality": modality,
        "mode": report.mode,
        "k": k,
        "properties": len(index.default_properties),
        "calibrated": pair in index.knn,
        "batch": batch,
        "search_cpu_ms": 1e3 * float(search),
        "regression_cpu_ms": 1e3 * float(regression),
        "ratio": float(regression / search),
    }
    print(found, flush=True)
    return found


if __name__ == "__main__":
    main()
