"""What estimates from neighbours add to the search they rest on, at index level: one query, and batches.

    python benchmarks/knn_cost.py --index index [index ...] [--model model] [--out benchmarks/results/knn_cost.json]

For each index, every modality searched in itself: time of a call of `SurveyIndex.search` with as many neighbours as the
estimates want, of `stacked` and `estimate_many` on its hits with every default property, and their ratio. Search and
estimate take turns, and processor time is counted, which a busy machine does not stretch; medians over the rounds.
An index of 100,000 made-up objects is built from `tests/parts_fixture.py` (`write_parts`, 128 dimensions).
With --model, the first index's whole answers as well, without HTTP: `/v1/estimate` against `/v1/search` for the same
object, target and k.
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
    parser.add_argument("--model", type=Path, help="the model of the first index")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/knn_cost.json"))
    arguments = parser.parse_args()
    started = time.perf_counter()
    results = []
    for folder in arguments.index:
        index = SurveyIndex.open(folder)
        for modality in MODALITIES:
            results += [measured(index, modality, batch, rounds) for batch, rounds in BATCHES.items()]
    if arguments.model:
        results += answers(arguments.index[0], arguments.model)
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


def answers(folder: Path, model: Path) -> list[dict[str, Any]]:
    """Answers of the service to one object of the index: a search, and an estimate that rests on the same."""
    from service.answer import estimate_answer, search_answer
    from service.engine import Engine
    from service.schemas import EstimateRequest, SearchRequest
    from service.settings import Settings

    engine = Engine.load(Settings(index_dir=folder, model_dir=model, device="cpu"))
    rng, out = np.random.default_rng(SEED), []
    for modality in MODALITIES:
        k = max(neighbours_wanted(engine.index, None, (modality, modality)), engine.settings.default_k)
        spent: list[tuple[float, float]] = []
        for row in rng.choice(engine.index.tables[modality].rows, BATCHES[1] + 3):
            query = {"object_id": engine.index.catalog.row(row)["object_id"], "modality": modality}
            start = time.process_time()
            search_answer(engine, SearchRequest.model_validate({"query": query, "target": modality, "k": k}), {}, "")
            middle = time.process_time()
            estimate_answer(engine, EstimateRequest.model_validate({"query": query, "target": modality}), {}, "")
            spent.append((middle - start, time.process_time() - middle))
        search, estimate = np.median(np.array(spent[3:]), axis=0)
        found = {
            "index": engine.index.index_id,
            "answers": modality,
            "k": k,
            "search_cpu_ms": 1e3 * float(search),
            "estimate_cpu_ms": 1e3 * float(estimate),
            "ratio": float(estimate / search) - 1.0,
        }
        print(found, flush=True)
        out.append(found)
    engine.close()
    return out


if __name__ == "__main__":
    main()
