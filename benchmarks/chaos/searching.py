"""What HTTP costs a vector search: `POST /v1/search/vectors` against FAISS alone on the same file, in one run.

    python -m benchmarks.chaos.searching [--vectors 500000] [--scratch DIR] [--out benchmarks/results/searching.json]

Raw: the index's own FAISS file, batches of 1,024, all cores, the breadth the service's planner chose, or the next
broader one while its recall is below the service's (which rescores its proposals). Service: the same batches as .npy over two
connections, answered as Arrow: ids, scores and percentiles. Recall of both is that against exact search.

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

from benchmarks.chaos.answers import percentile
from benchmarks.chaos.campaign import JSON, UNBOUNDED, mark, parser, report, spread
from benchmarks.chaos.server import Server
from benchmarks.chaos.survey import make_index
from benchmarks.chaos.throughput import steady_rate
from benchmarks.chaos.traffic import Ask, Plan, Traffic
from index import SurveyIndex
from index.backends import ExactBackend
from index.backends.faiss_file import FaissBackend, faiss_module
from index.recall import recall_at_k

__all__ = ["measured"]

ARROW = "application/vnd.apache.arrow.stream"
BATCH, K = 1024, 10
BATCHES = 16  # different ones
JUDGED = 512  # queries whose recall is taken
WANTED = 0.80
TARGET = "spectrum"

Vectors = npt.NDArray[np.float32]


class Raw:
    """FAISS alone, as wide as it must be for the service's recall."""

    def __init__(self, index: SurveyIndex, queries: Vectors, recall: float, truth: npt.NDArray[np.int64]) -> None:
        search = index._searches["spectrum"]
        assert isinstance(search.ann, FaissBackend)
        self.inner, self.backend = search.ann._inner, search.ann
        self.planned = index.search(queries[:1], target="spectrum", k=K, query_modality="spectrum")[1].mode
        asked = [entry["breadth"] for entry in _measured(search)]
        self.recall, self.breadth = 0.0, 0
        for breadth in sorted(set(asked)):
            found = self.search(queries[:JUDGED], breadth)
            self.recall, self.breadth = recall_at_k(found, truth), breadth
            if self.recall >= min(recall, 1.0) - 1e-3:
                break

    def search(self, queries: Vectors, breadth: int | None = None) -> npt.NDArray[np.int64]:
        how = self.backend._parameters(K, breadth or self.breadth)
        found: npt.NDArray[np.int64] = self.inner.search(queries, K, params=how)[1]
        return found

    def rate(self, batches: list[Vectors], seconds: float) -> float:
        started, done, turn = time.perf_counter(), 0, 0
        while (spent := time.perf_counter() - started) < seconds:
            done += len(self.search(batches[turn % len(batches)]))
            turn += 1
        return done / spent


def _measured(search: Any) -> list[Any]:
    return [e for e in search.measured.recall if e["filter"] == "none" and e["k"] >= K]


def measured(index_dir: Path, seconds: float, rounds: int, queries: Vectors | None = None) -> dict[str, Any]:
    """Rates and recalls of one index; queries: (N, D), default: objects of the index with a little noise."""
    index = SurveyIndex.open(index_dir)
    if queries is None:
        queries = _noisy(index)
    batches = [queries[i : i + BATCH] for i in range(0, len(queries) - BATCH + 1, BATCH)]
    truth = index.tables["spectrum"].rows[ExactBackend(index.tables["spectrum"]).search(queries[:JUDGED], K)[:, :K]]
    path = f"/v1/search/vectors?modality=spectrum&target={TARGET}&k={K}"
    asked = [Ask("POST", path, _npy(b), {"content-type": "application/x-npy", "accept": ARROW}) for b in batches]
    with Server(index=index_dir, settings=UNBOUNDED) as server:
        status, _, body = server.ask("POST", path, _npy(queries[:JUDGED]), asked[0].headers)
        if status != 200:
            raise RuntimeError(f"POST {path} answered {status}: {body[:300]!r}")
        recall = recall_at_k(_rows(body, index), truth)
        raw = Raw(index, queries, recall, truth)
        alone, rates, ratios, last = [raw.rate(batches, seconds / 2)], [], [], {}
        for _ in range(rounds):
            answers = Traffic(server.port, Plan(asked, connections=2, seconds=seconds)).run()
            alone.append(raw.rate(batches, seconds / 2))
            rates.append(steady_rate(answers, BATCH))
            ratios.append(rates[-1] / ((alone[-2] + alone[-1]) / 2))
            last = answers.summary()
            print(f"{index.index_id}: {rates[-1]:.0f}/s, raw {alone[-1]:.0f}/s, ratio {ratios[-1]:.3f}", flush=True)
        single = _singles(server, queries, seconds)
    return {
        "vectors": len(index.tables["spectrum"]),
        "mode": raw.planned,
        "batch": BATCH,
        "k": K,
        "raw": {"rate": spread(alone), "recall_at_10": raw.recall, "breadth": raw.breadth, "threads": _threads()},
        "http": {"rate": spread(rates), "ratio": spread(ratios), "recall_at_10": recall, "last": last},
        "single": single,
    }


def _singles(server: Server, queries: Vectors, seconds: float) -> dict[str, Any]:
    """One JSON vector a request."""
    found = {}
    bodies = [
        json.dumps({"query": {"vector": q.tolist(), "modality": "spectrum"}, "target": TARGET, "k": K}).encode()
        for q in queries[:256]
    ]
    asked = [Ask("POST", "/v1/search", data, {"content-type": JSON}) for data in bodies]
    for connections in (1, 64):
        answers = Traffic(server.port, Plan(asked, connections=connections, seconds=seconds)).run()
        found[str(connections)] = {**answers.summary(), "p50_ms": percentile(answers.latency_ms[answers.ok], 50)}
    return found


def _rows(body: bytes, index: SurveyIndex) -> npt.NDArray[np.int64]:
    """(Q, K) rows of an Arrow answer (query, object_id, score ...)."""
    table = pa.ipc.open_stream(body).read_all()
    ids = index.catalog.take(np.arange(len(index)), ["object_id"]).column(0).to_pylist()
    row_of = {name: row for row, name in enumerate(ids)}
    out = np.full((JUDGED, K), -1, np.int64)
    place = np.zeros(JUDGED, int)
    for query, name in zip(table["query"].to_pylist(), table["object_id"].to_pylist(), strict=True):
        out[query, place[query]] = row_of[name]
        place[query] += 1
    return out


def _noisy(index: SurveyIndex) -> Vectors:
    """Objects of the index, each moved a little: near something, equal to nothing."""
    table, rng = index.tables["spectrum"], np.random.default_rng(5)
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
