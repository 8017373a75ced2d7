"""What HTTP costs a vector search: `POST /v1/search/vectors` against FAISS alone on the same file, in one run.

    python -m benchmarks.chaos.searching [--vectors 500000] [--scratch DIR] [--out benchmarks/results/searching.json]

Raw: the index's own FAISS file, batches of 1,024, all cores, the least breadth that has the service's recall, but never
broader than the service searches (which rescores its proposals, and so finds a little more at the same breadth); an
index without such a file: its exact search. Service: the same batches as .npy over two connections, answered as Arrow:
ids, scores and percentiles. Recall of both is that against exact search.

Single searches, a JSON vector each over 64 connections, are reported as they are.
"""

from __future__ import annotations

import io
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from astroclip.types import Modality
from benchmarks.chaos.answers import percentile
from benchmarks.chaos.bodies import NPY
from benchmarks.chaos.campaign import JSON, UNBOUNDED, mark, parser, report, spread
from benchmarks.chaos.server import Server
from benchmarks.chaos.survey import make_index
from benchmarks.chaos.throughput import steady_rate
from benchmarks.chaos.traffic import Ask, Plan, Traffic
from index import SurveyIndex
from index.backends import ExactBackend
from index.backends.faiss_file import faiss_module
from index.planner import MeasuredSearch
from index.recall import recall_at_k
from index.table_search import Ask as Searched
from index.vectors import VectorTable

__all__ = ["measured"]

ARROW = "application/vnd.apache.arrow.stream"
BATCH, K = 1024, 10
BATCHES = 16  # different ones
JUDGED = 512  # queries whose recall is taken
WANTED = 0.80

Vectors = npt.NDArray[np.float32]


class Raw:
    """The search alone; see the module."""

    def __init__(
        self, index: SurveyIndex, modality: Modality, queries: Vectors, recall: float, truth: npt.NDArray[np.int64]
    ) -> None:
        search = index._searches[modality]
        plan = search.plan(Searched(K, modality), None)
        self.mode, self.backend, self.exact, self.rows = plan.mode, search.ann, search.exact, search.table.rows
        if plan.mode == "exact":
            self.backend = None
        self.recall, self.breadth = 0.0, 0
        for breadth in self._breadths(search.measured, plan.breadth):
            self.breadth = breadth
            self.recall = recall_at_k(self.search(queries[:JUDGED]), truth)
            if self.recall >= recall - 1e-3:
                break

    def _breadths(self, measured: MeasuredSearch | None, widest: int) -> list[int]:
        if self.backend is None or measured is None:
            return [0]
        asked = {e["breadth"] for e in measured.recall if e["filter"] == "none" and e["k"] >= K}
        return sorted(breadth for breadth in asked if breadth <= widest)

    def search(self, queries: Vectors) -> npt.NDArray[np.int64]:
        """(Q, K) rows of the catalogue."""
        if self.backend is None:
            slots = self.exact.search(queries, K)[:, :K]
        else:
            how = self.backend._parameters(K, self.breadth)
            slots = self.backend._inner.search(queries, K, params=how)[1]
        return np.where(slots >= 0, self.rows[slots], -1)

    def rate(self, batches: list[Vectors], seconds: float) -> float:
        started, done, turn = time.perf_counter(), 0, 0
        while (spent := time.perf_counter() - started) < seconds:
            done += len(self.search(batches[turn % len(batches)]))
            turn += 1
        return done / spent


def measured(
    index_dir: Path, seconds: float, rounds: int, *, model: Path | None = None, modality: Modality = "spectrum"
) -> dict[str, Any]:
    """Rates and recalls of one index and one of its tables, asked with objects of it that were moved a little."""
    index = SurveyIndex.open(index_dir)
    table = index.tables[modality]
    queries = _noisy(table)
    batches = [queries[i : i + BATCH] for i in range(0, max(1, len(queries) - BATCH + 1), BATCH)]
    truth = table.rows[ExactBackend(table).search(queries[:JUDGED], K)[:, :K]]
    path = f"/v1/search/vectors?modality={modality}&target={modality}&k={K}"
    asked = [Ask("POST", path, _npy(b), {"content-type": NPY, "accept": ARROW}) for b in batches]
    with Server(index=index_dir, model=model, settings=UNBOUNDED) as server:
        status, _, body = server.ask("POST", path, _npy(queries[:JUDGED]), asked[0].headers)
        if status != 200:
            raise RuntimeError(f"POST {path} answered {status}: {body[:300]!r}")
        recall = recall_at_k(_rows(body, index, len(truth)), truth)
        raw = Raw(index, modality, queries, recall, truth)
        alone, rates, ratios, last = [raw.rate(batches, seconds / 2)], [], [], {}
        for _ in range(rounds):
            answers = Traffic(server.port, Plan(asked, connections=2, seconds=seconds)).run()
            alone.append(raw.rate(batches, seconds / 2))
            rates.append(steady_rate(answers, len(batches[0])))
            ratios.append(rates[-1] / ((alone[-2] + alone[-1]) / 2))
            last = answers.summary()
            print(f"{index.index_id}: {rates[-1]:.0f}/s, raw {alone[-1]:.0f}/s, ratio {ratios[-1]:.3f}", flush=True)
        single = _singles(server, modality, queries, seconds)
    return {
        "vectors": len(table),
        "modality": modality,
        "mode": raw.mode,
        "batch": len(batches[0]),
        "k": K,
        "raw": {"rate": spread(alone), "recall_at_10": raw.recall, "breadth": raw.breadth, "threads": _threads()},
        "http": {"rate": spread(rates), "ratio": spread(ratios), "recall_at_10": recall, "last": last},
        "single": single,
    }


def _singles(server: Server, modality: Modality, queries: Vectors, seconds: float) -> dict[str, Any]:
    """One JSON vector a request."""
    found = {}
    bodies = [
        json.dumps({"query": {"vector": q.tolist(), "modality": modality}, "target": modality, "k": K}).encode()
        for q in queries[:256]
    ]
    asked = [Ask("POST", "/v1/search", data, {"content-type": JSON}) for data in bodies]
    for connections in (1, 64):
        answers = Traffic(server.port, Plan(asked, connections=connections, seconds=seconds)).run()
        found[str(connections)] = {**answers.summary(), "p50_ms": percentile(answers.latency_ms[answers.ok], 50)}
    return found


def _rows(body: bytes, index: SurveyIndex, count: int) -> npt.NDArray[np.int64]:
    """(count, K) rows of an Arrow answer (query, object_id, score ...)."""
    table = pa.ipc.open_stream(body).read_all()
    ids = index.catalog.take(np.arange(len(index)), ["object_id"]).column(0).to_pylist()
    row_of = {name: row for row, name in enumerate(ids)}
    out = np.full((count, K), -1, np.int64)
    place = np.zeros(count, int)
    for query, name in zip(table["query"].to_pylist(), table["object_id"].to_pylist(), strict=True):
        out[query, place[query]] = row_of[name]
        place[query] += 1
    return out


def _noisy(table: VectorTable) -> Vectors:
    """Objects of the table, each moved a little: near something, equal to nothing."""
    rng = np.random.default_rng(5)
    found = table.take(np.sort(rng.choice(len(table), min(len(table), BATCH * BATCHES))))
    found = found + 0.3 / np.sqrt(found.shape[1]) * rng.standard_normal(found.shape).astype(np.float32)
    rng.shuffle(found)
    return np.asarray(found / np.linalg.norm(found, axis=1, keepdims=True), np.float32)


def _npy(array: Vectors) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array)
    return stream.getvalue()


def _threads() -> int:
    return int(faiss_module().omp_get_max_threads())


def main() -> int:
    options_of = parser(__doc__, "searching")
    options_of.add_argument("--vectors", type=int, default=500_000)
    options_of.add_argument("--seconds", type=float, default=6.0, help="of a run")
    options_of.add_argument("--rounds", type=int, default=5)
    options_of.add_argument(
        "--scratch", type=Path, help="keeps the indexes built; default: a folder removed at the end"
    )
    arguments = options_of.parse_args()
    started = time.perf_counter()
    seconds, rounds = (3.0, 2) if arguments.short else (arguments.seconds, arguments.rounds)
    count = min(arguments.vectors, 100_000) if arguments.short else arguments.vectors
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as aside:
        for backend in ("ivf-sq8",) if arguments.short else ("hnsw", "ivf-sq8"):
            folder = make_index(arguments.scratch or Path(aside), count, backend)  # type: ignore[arg-type]
            results[backend] = measured(folder, seconds, rounds)
    marks = {
        f"batched vector search over HTTP / FAISS, {name}": mark(found["http"]["ratio"]["median"], WANTED, "least")
        for name, found in results.items()
    }
    marks |= {
        f"recall@10 of the service - FAISS alone, {name}": mark(
            found["http"]["recall_at_10"] - found["raw"]["recall_at_10"], -0.001, "least"
        )
        for name, found in results.items()
    }
    return report(arguments.out, "searching", started, marks, {"results": results})


if __name__ == "__main__":
    raise SystemExit(main())
