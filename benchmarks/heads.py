"""Estimates from neighbours against heads, on held-out simulated galaxies.

    python benchmarks/heads.py --data data/survey [--shards 4] [--index service/demo/index] [--model service/demo/model]
        [--out benchmarks/results/heads.json]

Labels are the index's; queries are embeddings of the first test shards of the survey. For image, spectrum and both:
k-NN as the service answers (both: over the mean of the two unit vectors), the few-shot head of upstream and the density
head of the service, with 100, 1,000 and all labels. `coverage` is the share of held-out truths inside the interval that
says 68, 90, 95 %; `crps` the continuous ranked probability score (twice the mean pinball loss over 49 quantiles), in
the property's unit. `on_own_objects` judges the density head on objects it was fitted on: why answers are flagged.
Some minutes on one core; nothing but one shard is held in memory.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from astroclip.embed import Embedder
from index import SurveyIndex, knn_regress
from index.heads import DensityHead, fit_head
from training.data import PROPERTIES, find_shards
from training.evaluate.encoders import model_sources
from training.evaluate.metrics import outlier_fraction, r2, sigma_nmad, with_interval
from training.evaluate.neighbours import nearest, unit
from training.evaluate.report import provenance, write_json
from training.evaluate.survey import encode_part
from training.split import split_shards

DEMO = Path(__file__).resolve().parents[1] / "service" / "demo"
NEIGHBOURS = (4, 16)
LABELS = (100, 1000, None)
LEAST_FOR_DENSITY = 1000  # as in an index
COVERAGES = (0.68, 0.90, 0.95)
LEVELS = np.linspace(0.02, 0.98, 49)
SEED = 0

Array = npt.NDArray[np.float64]
Vectors = dict[str, npt.NDArray[np.float32]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="the simulated survey the demo index is a part of")
    parser.add_argument("--shards", type=int, default=4, help="test shards to ask with")
    parser.add_argument("--index", type=Path, default=DEMO / "index")
    parser.add_argument("--model", type=Path, default=DEMO / "model")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/heads.json"))
    arguments = parser.parse_args()
    started = time.perf_counter()
    torch.set_num_threads(1)
    index = SurveyIndex.open(arguments.index)
    embedder = Embedder.from_pretrained(arguments.model, device="cpu")
    if embedder.model_sha256 != index.model_sha256:
        parser.error("the index was built with another model")
    table, labels = indexed(index)
    queries, truth = held_out(arguments.data, arguments.shards, embedder)
    results: dict[str, Any] = {}
    for source in ("image", "spectrum", "both"):
        print(source, flush=True)
        results[source] = knn(fused(table, source), labels, fused(queries, source), truth)
        results[source] |= heads(joined(table, source), labels, joined(queries, source), truth)
    report = {
        "kind": "heads",
        **provenance(seed=SEED, started=started),
        "model": {"id": embedder.model_id, "sha256": embedder.model_sha256},
        "objects": {"index": len(labels), "held_out": len(truth)},
        "results": results,
    }
    write_json(arguments.out, report)


def indexed(index: SurveyIndex) -> tuple[Vectors, Array]:
    """Vectors of the objects with both modalities, in an order of the seed, and their labels."""
    rows = np.intersect1d(index.tables["image"].rows, index.tables["spectrum"].rows)
    rows = np.random.default_rng(SEED).permutation(rows)
    tables = {m: index.tables[m] for m in ("image", "spectrum")}
    vectors = {m: t.take(np.searchsorted(t.rows, rows)) for m, t in tables.items()}
    return vectors, np.stack([index.catalog.values(name)[rows] for name in PROPERTIES], axis=1)


def held_out(survey: Path, shards: int, embedder: Embedder) -> tuple[Vectors, Array]:
    sources = model_sources("model", embedder, "cpu")
    part = encode_part(split_shards(find_shards(survey)).test[:shards], sources, batch=64)
    return {m: unit(part.vectors["model", m]) for m in ("image", "spectrum")}, part.targets


def fused(vectors: Vectors, source: str) -> npt.NDArray[np.float32]:
    """What k-NN searches with: for both the mean of the unit vectors, as the service does."""
    return unit(vectors["image"] + vectors["spectrum"]) if source == "both" else unit(vectors[source])


def joined(vectors: Vectors, source: str) -> npt.NDArray[np.float32]:
    """What a head reads."""
    return np.concatenate([vectors["image"], vectors["spectrum"]], axis=1) if source == "both" else vectors[source]


def knn(
    table: npt.NDArray[np.float32], labels: Array, queries: npt.NDArray[np.float32], truth: Array
) -> dict[str, Any]:
    found = nearest(queries, table, max(NEIGHBOURS))
    out: dict[str, Any] = {}
    for k in NEIGHBOURS:
        near = found.first(k)
        values, ends = [], []
        for i in range(len(PROPERTIES)):
            at = [knn_regress(labels[near.rows, i], near.distance, 1.0 - 2.0 * tail) for tail in LEVELS[:24]]
            middle = knn_regress(labels[near.rows, i], near.distance, 1e-6)
            quantiles = [a.lo for a in at] + [middle.lo] + [a.hi for a in at[::-1]]
            said = [knn_regress(labels[near.rows, i], near.distance, c) for c in COVERAGES]
            values.append(middle.value)
            ends.append((np.stack(quantiles, axis=1), [(s.lo, s.hi) for s in said]))
        out[f"knn k={k}"] = {"labels": len(labels)} | judged(truth, np.stack(values, axis=1), ends)
    return out


def heads(
    vectors: npt.NDArray[np.float32], labels: Array, queries: npt.NDArray[np.float32], truth: Array
) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for wanted in LABELS:
        n = wanted or len(labels)
        for kind in ("point", "density"):
            if kind == "density" and n < LEAST_FOR_DENSITY:
                continue
            began = time.perf_counter()
            head = fit_head(vectors[:n], labels[:n], PROPERTIES, kind=kind, seed=SEED)  # type: ignore[arg-type]
            seconds = round(time.perf_counter() - began, 1)
            ends = intervals(head, queries) if isinstance(head, DensityHead) else None
            entry = {"labels": n, "fit_seconds": seconds} | judged(truth, head.predict(queries), ends)
            if isinstance(head, DensityHead) and n == len(labels):
                own = slice(0, len(truth))
                entry["on_own_objects"] = judged(labels[own], head.predict(vectors[own]), intervals(head, vectors[own]))
            out[f"{kind} {n}"] = entry
            print(f"  {kind} {n}: {seconds} s", flush=True)
    return out


def intervals(head: DensityHead, queries: npt.NDArray[np.float32]) -> list[tuple[Array, list[tuple[Array, Array]]]]:
    """Of every property: quantiles (Q, 49), and (lo, hi) at the coverages."""
    tails = [(1.0 - c) / 2.0 for c in COVERAGES]
    found = head.quantiles(queries, [*LEVELS, *tails, *(1.0 - t for t in tails)])
    n = len(LEVELS)
    return [
        (found[:, i, :n], [(found[:, i, n + j], found[:, i, n + len(tails) + j]) for j in range(len(tails))])
        for i in range(found.shape[1])
    ]


def judged(
    truth: Array, values: Array, ends: list[tuple[Array, list[tuple[Array, Array]]]] | None
) -> dict[str, dict[str, Any]]:
    """Property -> R2 (and for redshift scatter and outliers), coverages and CRPS where there are intervals."""
    out: dict[str, dict[str, Any]] = {}
    for i, name in enumerate(PROPERTIES):
        entry: dict[str, Any] = {"r2": with_interval(r2, truth[:, i], values[:, i], n=200, seed=SEED)}
        if name == "redshift":
            entry["sigma_nmad"] = with_interval(sigma_nmad, truth[:, i], values[:, i], n=200, seed=SEED)
            entry["outliers_0.05"] = outlier_fraction(truth[:, i], values[:, i], 0.05)
        if ends is not None:
            quantiles, said = ends[i]
            inside = [np.mean((lo <= truth[:, i]) & (truth[:, i] <= hi)) for lo, hi in said]
            entry["coverage"] = {f"{c:.2f}": float(share) for c, share in zip(COVERAGES, inside, strict=True)}
            entry["width_0.68"] = float(np.median(said[0][1] - said[0][0]))
            below = truth[:, i, None] - quantiles
            entry["crps"] = float(2.0 * np.mean(np.maximum(LEVELS * below, (LEVELS - 1.0) * below)))
        out[name] = entry
    return out


if __name__ == "__main__":
    main()
