"""The survey-wide lists: rate, memory, kill and resume, and what else could have made them.

    python benchmarks/lists.py [--index service/demo/index] [--synthetic 30000] [--large 200000] [--whole]
        [--out benchmarks/results/lists.json]

`runs`: `astroclip index lists` in a process of its own over the demo index and over a synthetic one of so many objects
(128-d float16, clustered, image and spectrum of an object alike), once undisturbed and once killed with SIGKILL three
times; the lists of both must be the same bytes. Seconds are of the processor: the machine may be shared.
`large`: the first chunks of the joins over so many objects: their rate and memory, and what all of them would take by
that rate (at most: the first chunks of images with spectra find more to keep than later ones); `--whole` makes a run of
it as of the others.
`swaps`: in the demo index 1 % of the objects get another one's spectrum; average precision of the orderings that
could make the list of disagreeing pairs. `engines`: queries a second of other ways to join the spectra of the large
index, and how much of the exact answer they find. Some five minutes on one core, 1.5 GB; 40 with `--whole`.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from index import BuildOptions, SurveyIndex, build_index
from index.backends.hnsw import HnswBackend
from index.lists import KINDS, lists_folder
from index.lists_build import build_lists
from training.evaluate.report import provenance, write_json

DEMO = Path(__file__).resolve().parents[1] / "service" / "demo" / "index"
DIM, SEED, K = 128, 0, 17
KILLS = (0.2, 0.5, 0.8)  # of the queries of all joins
ASKED = 4096  # queries of each engine
FIRST = 6144  # queries of the beginnings

Vectors = npt.NDArray[np.float32]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--index", type=Path, default=DEMO)
    parser.add_argument("--synthetic", type=int, default=30_000, help="objects of the synthetic index")
    parser.add_argument("--large", type=int, default=200_000, help="objects of the large synthetic index")
    parser.add_argument("--whole", action="store_true", help="make all lists of the large index, killed and not")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/lists.json"))
    parser.add_argument("--child", nargs=4, metavar=("INDEX", "KIND", "END_AT", "REPORT"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        child(Path(arguments.child[0]), arguments.child[1], int(arguments.child[2]), Path(arguments.child[3]))
        return
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        demo = Path(shutil.copytree(arguments.index, folder / "demo", ignore=shutil.ignore_patterns("lists")))
        report: dict[str, Any] = {"swaps": swaps(SurveyIndex.open(demo)), "runs": {"demo": both(demo)}}
        print(report, flush=True)
        report["runs"]["synthetic"] = both(synthetic(folder / "synthetic", arguments.synthetic))
        print(report["runs"]["synthetic"], flush=True)
        large = synthetic(folder / "large", arguments.large)
        report["large"] = beginnings(large)
        print(report["large"], flush=True)
        if arguments.whole:
            report["runs"]["large"] = both(large)
        report["engines"] = engines(SurveyIndex.open(large))
    write_json(arguments.out, {"kind": "lists", **provenance(seed=SEED, started=started), **report})


# --- the command, undisturbed and killed -----------------------------------------------------------------------------


def both(index: Path) -> dict[str, Any]:
    """One undisturbed run, one killed at `KILLS`; both measured, their lists compared."""
    opened = SurveyIndex.open(index)
    images, spectra = len(opened.tables["image"]), len(opened.tables["spectrum"])
    total = 2 * images + spectra
    dots = images * images + spectra * spectra + images * spectra
    lists = lists_folder(opened.folder)
    whole = run(index)
    first = digests(lists)
    shutil.rmtree(lists)
    killed = [run(index, end_at=int(total * at)) for at in KILLS]
    last = run(index)
    return {
        "objects": len(opened),
        "cpu_seconds": whole["cpu_seconds"],
        "wall_seconds": whole["wall_seconds"],
        "products_per_cpu_second": dots / whole["cpu_seconds"],
        "peak_rss_mib": whole["peak_rss_mib"],
        "rss_before_mib": whole["rss_before_mib"],
        "lists": {path.name.split("-")[0]: pq.read_metadata(path).num_rows for path in sorted(lists.glob("*.parquet"))},
        "killed": {
            "times": len(killed),
            "signals": [part["signal"] for part in killed],
            "cpu_seconds_of_last": last["cpu_seconds"],
            "identical": digests(lists) == first,
        },
    }


def beginnings(index: Path) -> dict[str, Any]:
    """The first chunks of a self-join and of the join of images with spectra."""
    count = len(SurveyIndex.open(index))
    out: dict[str, Any] = {"objects": count}
    for kind in ("isolated", "disagreeing"):
        part = run(index, kind)
        rate = part["queries"] / part["cpu_seconds_of_queries"]
        out[kind] = {**part, "queries_per_cpu_second": rate, "all_cpu_seconds": count / rate}
    out["all_lists_cpu_seconds"] = 2 * out["isolated"]["all_cpu_seconds"] + out["disagreeing"]["all_cpu_seconds"]
    return out


def run(index: Path, kind: str = "all", end_at: int = -1) -> dict[str, Any]:
    """Lists of an index, made in a process of its own, which kills itself after `end_at` queries. Of one `kind`, only
    the first `FIRST` queries, timed."""
    report = index.parent / "child.json"
    report.unlink(missing_ok=True)
    words = [sys.executable, __file__, "--child", str(index), kind, str(end_at), str(report)]
    began = time.perf_counter()
    done = subprocess.run(words, check=False)
    if done.returncode == -signal.SIGKILL:
        return {"signal": "SIGKILL"}
    if done.returncode:
        raise RuntimeError(f"the lists of {index} ended with {done.returncode}")
    return {"signal": None, "wall_seconds": time.perf_counter() - began, **json.loads(report.read_text())}


def child(index: Path, kind: str, end_at: int, report: Path) -> None:
    before: dict[str, int] = {}
    rss = began = 0.0

    def progress(name: str, done: int, total: int) -> None:
        nonlocal rss, began
        rss, began = rss or peak_rss_mib(), began or time.process_time()
        before[name] = done
        if 0 <= end_at <= sum(before.values()):
            os.kill(os.getpid(), signal.SIGKILL)
        if kind != "all" and done >= FIRST:
            used = {"queries": done, "cpu_seconds_of_queries": time.process_time() - began}
            report.write_text(json.dumps({**used, "peak_rss_mib": peak_rss_mib(), "rss_before_mib": rss}))
            sys.exit()

    build_lists(index, KINDS if kind == "all" else [kind], progress=progress)
    used = {"cpu_seconds": time.process_time(), "peak_rss_mib": peak_rss_mib(), "rss_before_mib": rss}
    report.write_text(json.dumps(used))


def peak_rss_mib() -> float:
    """Of this process: `ru_maxrss` would count what its parent held when it was started."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.glob("*.parquet")}


# --- orderings of disagreeing pairs ----------------------------------------------------------------------------------


def swaps(index: SurveyIndex, draws: int = 5, share: float = 0.01) -> dict[str, dict[str, float]]:
    """Mean average precision, and precision among as many as were swapped, of finding swapped partners."""
    rows = np.intersect1d(index.tables["image"].rows, index.tables["spectrum"].rows)[:10_000]
    image, spectrum = (t.take(np.searchsorted(t.rows, rows)) for t in (index.tables["image"], index.tables["spectrum"]))
    found: dict[str, list[tuple[float, float]]] = {}
    for draw in range(draws):
        rng = np.random.default_rng(SEED + draw)
        some = rng.choice(len(rows), int(share * len(rows)), replace=False)
        partner = np.arange(len(rows))
        partner[some] = np.roll(some, 1)
        swapped = np.zeros(len(rows), bool)
        swapped[some] = True
        scores = image @ spectrum[partner].T
        own = scores.diagonal().copy()
        spectra_nearer = (scores > own[:, None]).sum(axis=1)
        images_nearer = (scores > own[None]).sum(axis=0)
        orderings = {
            "cosine": -own,
            "disagreement (ranks both ways)": np.sqrt((spectra_nearer + 1.0) * (images_nearer + 1.0)),
            "rank of the spectrum": spectra_nearer.astype(float),
            "rank of the image": images_nearer.astype(float),
            "cosine less that of the nearest 16": local_scaling(scores, own),
        }
        for name, bad in orderings.items():
            found.setdefault(name, []).append(precision(bad, swapped))
    means = {name: np.mean(values, axis=0) for name, values in found.items()}
    return {name: {"average_precision": float(a), "precision_at_swapped": float(p)} for name, (a, p) in means.items()}


def local_scaling(scores: Vectors, own: Vectors) -> Vectors:
    """Cross-domain similarity local scaling (Conneau et al. 2018, arXiv:1710.04087), negated."""
    near = [np.partition(s, s.shape[1] - 16, axis=1)[:, -16:].mean(axis=1) for s in (scores, scores.T)]
    return np.asarray(near[0] + near[1] - 2.0 * own)


def precision(bad: npt.NDArray[Any], swapped: npt.NDArray[np.bool_]) -> tuple[float, float]:
    hits = swapped[np.argsort(-bad, kind="stable")]
    so_far = np.cumsum(hits) / np.arange(1, len(hits) + 1)
    return float(so_far[hits].mean()), float(hits[: swapped.sum()].mean())


# --- engines ---------------------------------------------------------------------------------------------------------


def engines(index: SurveyIndex) -> dict[str, Any]:
    """Queries a processor second over the spectra, and what share of the exact k neighbours is found."""
    import faiss
    from faiss.contrib.big_batch_search import big_batch_search

    faiss.omp_set_num_threads(1)
    table = index.tables["spectrum"]
    vectors = table.block(0, len(table))
    queries = vectors[:ASKED]
    out: dict[str, Any] = {"queries": ASKED, "vectors": len(vectors), "k": K, "threads": 1}
    out["matrix product alone"], _ = rate(lambda: product(queries, vectors))
    out["matrix product, k largest"], _ = rate(lambda: product(queries, vectors, largest=True))
    out["faiss.knn"], (_, exact) = rate(lambda: faiss.knn(queries, vectors, K, metric=faiss.METRIC_INNER_PRODUCT))
    began = time.process_time()
    graph = HnswBackend.build(table)
    built = time.process_time() - began
    out["hnsw, ef 64"], slots = rate(lambda: graph.search(queries, K, breadth=64))
    out["hnsw, ef 64"] |= {"build_seconds": built, "recall": recall(slots, exact)}
    began = time.process_time()
    lists: Any = faiss.index_factory(DIM, "IVF1024,Flat", faiss.METRIC_INNER_PRODUCT)
    lists.train(vectors[::4])
    lists.add(vectors)
    built = time.process_time() - began
    lists.nprobe = 32
    with contextlib.redirect_stdout(io.StringIO()):  # it reports every list
        out["big_batch_search, nprobe 32"], (_, slots) = rate(lambda: big_batch_search(lists, queries, K))
    out["big_batch_search, nprobe 32"] |= {"build_seconds": built, "recall": recall(slots, exact)}
    return out


def product(queries: Vectors, vectors: Vectors, largest: bool = False) -> None:
    for start in range(0, len(queries), 2048):
        some = queries[start : start + 2048]
        for low in range(0, len(vectors), 8192):
            scores = some @ vectors[low : low + 8192].T
            if largest:
                np.partition(scores, max(0, scores.shape[1] - K), axis=1)


def rate(work: Callable[[], Any]) -> tuple[dict[str, float], Any]:
    began = time.process_time()
    result = work()
    return {"queries_per_cpu_second": ASKED / (time.process_time() - began)}, result


def recall(found: npt.NDArray[np.int64], exact: npt.NDArray[np.int64]) -> float:
    return float(np.mean([len(set(a) & set(b)) / len(b) for a, b in zip(found.tolist(), exact.tolist(), strict=True)]))


# --- a synthetic index -----------------------------------------------------------------------------------------------


def synthetic(folder: Path, count: int) -> Path:
    """An index of `count` objects: clusters of 16 intrinsic dimensions in each modality; one in 2,000 is a twin."""
    rng = np.random.default_rng(SEED)
    centres = rng.standard_normal((2000, 16)).astype(np.float32)
    latent = centres[rng.integers(0, len(centres), count)] + 0.6 * rng.standard_normal((count, 16)).astype(np.float32)
    twins = rng.choice(count, count // 1000, replace=False)
    pairs = len(twins) // 2
    latent[twins[:pairs]] = latent[twins[pairs : 2 * pairs]]
    parts = folder / "parts"
    parts.mkdir(parents=True)
    columns: dict[str, Any] = {
        "object_id": [f"syn-{i:07d}" for i in range(count)],
        "ra": rng.uniform(0, 360, count),
        "dec": np.degrees(np.arcsin(rng.uniform(-1, 1, count))),
        "source": ["synthetic"] * count,
        "error": pa.nulls(count, pa.string()),
    }
    for modality in ("image", "spectrum"):
        axes = rng.standard_normal((16, DIM)).astype(np.float32)
        vectors = latent @ axes + 0.5 * rng.standard_normal((count, DIM)).astype(np.float32)
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        columns[f"{modality}_embedding"] = pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), DIM)
    path = parts / "part-00000.parquet"
    pq.write_table(pa.table(columns), path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    path.with_suffix(".done.json").write_text(json.dumps({"rows": count, "failed": 0, "parquet_sha256": digest}))
    record = {"format_version": 1, "model_id": "synthetic", "model_sha256": "0" * 64, "preprocess_version": "1"}
    (parts / "embedding.json").write_text(json.dumps({**record, "dim": DIM}))
    options = BuildOptions(hnsw="never", heads="never")
    return build_index(parts, folder / "index", survey="synthetic", options=options, plain=True)


if __name__ == "__main__":
    main()
