"""Do estimates from neighbours hold what they claim? Intervals and densities on held-out and on real galaxies.

    python benchmarks/coverage.py --index index --parts embeddings-of-held-out-objects
        [--model model --shared ../shared] [--out benchmarks/results/coverage.json]

Queries are held-out objects embedded by the index's model (`astroclip embed`), their truths the columns of the parts.
For every pair of query (image, spectrum, both) and target (image, spectrum, either) and every property the index has
calibrated: the k it chose, R2 and mean absolute error of the value, the share of truths inside intervals that say 68,
90, 95 %, overall, in each tercile of the mean distance of the neighbours used and in each of that of the 16 nearest,
the median width of the 68 % interval; of the density on the same neighbours the Kolmogorov-Smirnov distance of its PIT
from uniform and the continuous ranked probability score. `fixed_k` is the 68 % coverage when a caller fixes k. With
--model and --shared the same for the redshifts of real galaxies, which are not drawn as the index's objects: reported
as it is. `worst` gathers the largest deviations over all pairs and properties.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.stats import kstest

from index import SurveyIndex, estimate_many, stacked
from index.head_build import BOTH
from index.parts import read_info, read_parts
from index.regress import distances
from training.evaluate.metrics import outlier_fraction, r2, sigma_nmad
from training.evaluate.neighbours import unit
from training.evaluate.report import provenance, write_json

COVERAGES = (0.68, 0.90, 0.95)
FIXED = (1, 4, 6, 16, 24, 64, 200)
TERCILE_K = 16
TAUS = (np.arange(50) + 0.5) / 50
CRPS_OF = 1000  # objects the score of the densities is taken over
SEED = 0

Array = npt.NDArray[np.float64]
Vectors = npt.NDArray[np.float32]
Truth = dict[str, Array]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--index", type=Path, required=True)
    parser.add_argument("--parts", type=Path, required=True, help="embeddings of objects that are not in the index")
    parser.add_argument("--model", type=Path, help="the index's model, to embed the real galaxies")
    parser.add_argument("--shared", type=Path, help="folder with data/ of real galaxies")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/coverage.json"))
    arguments = parser.parse_args()
    started = time.perf_counter()
    index = SurveyIndex.open(arguments.index)
    if not index.knn:
        parser.error("the index has no calibration of k-NN estimates; build it again")
    vectors, truth = held_out(index, arguments.parts)
    simulated = every_pair(index, vectors, truth)
    report: dict[str, Any] = {
        "kind": "coverage",
        **provenance(seed=SEED, started=started),
        "model": dict(index.manifest.model),
        "objects": {"index": len(index), "held_out": {m: int(np.isfinite(v[:, 0]).sum()) for m, v in vectors.items()}},
        "worst": worst(simulated),
        "simulated": simulated,
    }
    if arguments.model and arguments.shared:
        report["real"] = real(index, arguments.model, arguments.shared)
    write_json(arguments.out, report)


def held_out(index: SurveyIndex, folder: Path) -> tuple[dict[str, Vectors], Truth]:
    """Unit vectors of every query, NaN where an object lacks a modality, and the truths."""
    info = read_info(folder)
    if info.model_sha256 != index.model_sha256:
        raise SystemExit(
            f"the parts come from model {info.model_sha256[:12]}, the index from {index.model_sha256[:12]}"
        )
    found: dict[str, list[Vectors]] = {"image": [], "spectrum": []}
    columns: dict[str, list[Array]] = {name: [] for name in index.catalog.properties}
    for part in read_parts(folder, info):
        for modality, vectors in part.vectors.items():
            wide = np.full((part.catalog.num_rows, info.dim), np.nan, np.float32)
            wide[part.catalog.column(f"has_{modality}").to_numpy()] = vectors
            found[modality].append(wide)
        for name, values in columns.items():
            values.append(part.catalog.column(name).to_numpy().astype(np.float64))
        overlap = [i for i in part.catalog.column("object_id").to_pylist() if len(index.catalog.rows_by_id(i))]
        if overlap:
            raise SystemExit(f"{len(overlap)} objects of the parts are in the index, such as {overlap[0]}")
    queries = {modality: np.concatenate(parts) for modality, parts in found.items()}
    queries[BOTH] = unit(queries["image"] + queries["spectrum"])
    return queries, {name: np.concatenate(values) for name, values in columns.items()}


def every_pair(index: SurveyIndex, vectors: dict[str, Vectors], truth: Truth) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for query, target in index.knn:
        known = np.isfinite(vectors[query][:, 0])
        some = {name: values[known] for name, values in truth.items()}
        print(f"{query} -> {target}", flush=True)
        out[f"{query}->{target}"] = judged(index, (query, target), vectors[query][known], some)
    return out


def judged(index: SurveyIndex, pair: tuple[str, str], queries: Vectors, truth: Truth) -> dict[str, Any]:
    """Property -> what was measured."""
    query, target = pair
    modality: Any = None if query == BOTH else query
    rows, scores = stacked(index.search(queries, target=target, k=max(FIXED), query_modality=modality)[0])  # type: ignore[arg-type]
    d = distances(scores)
    names = [name for name in index.knn[pair] if name in truth]
    said = {c: estimate_many(index, rows, scores, names, c, pair=pair) for c in COVERAGES}
    fixed = {k: estimate_many(index, rows, scores, names, 0.68, pair=pair, k=k) for k in FIXED}
    out: dict[str, Any] = {}
    for i, name in enumerate(names):
        y = truth[name]
        good = np.isfinite(y) & np.isfinite(said[0.68][i].value)
        y, value = y[good], said[0.68][i].value[good]
        thirds = [tercile(d[good, :k].mean(axis=1)) for k in (said[0.68][i].k, TERCILE_K)]
        entry: dict[str, Any] = {
            "n": int(good.sum()),
            "k": said[0.68][i].k,
            "r2": r2(y, value) if len(y) > 1 else None,
            "mean_absolute_error": float(np.mean(np.abs(y - value))),
        }
        if name == "redshift":
            entry["sigma_nmad"], entry["outliers_0.05"] = sigma_nmad(y, value), outlier_fraction(y, value, 0.05)
        entry["coverage"] = {}
        for c in COVERAGES:
            inside = (said[c][i].lo[good] <= y) & (y <= said[c][i].hi[good])
            used, of_16 = ([float(inside[third == j].mean()) for j in range(3)] for third in thirds)
            said_of = {"all": float(inside.mean()), "terciles": used, "terciles_of_16": of_16}
            entry["coverage"][f"{c:.2f}"] = said_of
        entry["width_0.68"] = float(np.median((said[0.68][i].hi - said[0.68][i].lo)[good]))
        entry["fixed_k"] = {
            str(k): float(np.mean((e[i].lo[good] <= y) & (y <= e[i].hi[good]))) for k, e in fixed.items()
        }
        out[name] = entry | density(index, pair, name, rows[good], d[good], y)
    return out


def tercile(distance: Array) -> npt.NDArray[np.int64]:
    return np.digitize(distance, np.quantile(distance, [1 / 3, 2 / 3]))


def density(
    index: SurveyIndex, pair: tuple[str, str], name: str, rows: npt.NDArray[np.int64], d: Array, y: Array
) -> dict[str, float]:
    entry = index.knn[pair][name]
    x, u = entry.axis.to_unit(index.catalog.values(name)[rows]), entry.axis.to_unit(y)
    pit = entry.smoothing.cdf(x, d, u[:, None])[:, 0]
    some = np.random.default_rng(SEED).permutation(len(y))[:CRPS_OF]
    off = y[some, None] - entry.axis.from_unit(entry.smoothing.quantiles(x[some], d[some], TAUS))
    return {
        "pit_ks": float(kstest(pit[np.isfinite(pit)], "uniform").statistic),
        "crps": 2.0 * float(np.nanmean(np.maximum(TAUS * off, (TAUS - 1.0) * off))),
    }


def worst(simulated: dict[str, Any]) -> dict[str, Any]:
    """The largest deviation from what is claimed, and where."""
    entries = [(f"{pair} {name}", entry) for pair, found in simulated.items() for name, entry in found.items()]
    overall = [
        (abs(said["all"] - float(c)), f"{where} {c}")
        for where, entry in entries
        for c, said in entry["coverage"].items()
    ]
    terciles, of_16 = (
        [
            (max(abs(t - float(c)) for t in said[key]), f"{where} {c}")
            for where, entry in entries
            for c, said in entry["coverage"].items()
        ]
        for key in ("terciles", "terciles_of_16")
    )
    pit = [(entry["pit_ks"], where) for where, entry in entries]
    return {
        "coverage_off_overall": max(overall),
        "coverage_off_in_a_tercile": max(terciles),
        "coverage_off_in_a_tercile_of_16": max(of_16),
        "pit_ks": max(pit),
        "coverages_off_by_more_than_2_points": sum(off > 0.02 for off, _ in overall),
        "terciles_off_by_more_than_5_points": sum(off > 0.05 for off, _ in terciles),
        "terciles_of_16_off_by_more_than_5_points": sum(off > 0.05 for off, _ in of_16),
        "pit_ks_above_0.05": sum(ks > 0.05 for ks, _ in pit),
        "coverages": len(overall),
    }


def real(index: SurveyIndex, model: Path, shared: Path) -> dict[str, Any]:
    """Redshifts of the real galaxies: spectra by survey, pictures where there are some."""
    import torch

    from astroclip.embed import Embedder
    from training.evaluate.encoders import ModelEncoder
    from training.evaluate.realsky import load_objects, load_pairs

    torch.set_num_threads(1)
    embedder = Embedder.from_pretrained(model, device="cpu")
    encoder = ModelEncoder(embedder.model, "cpu")
    objects, _ = load_objects(shared / "data", embedder.spectrum_grid)
    out: dict[str, Any] = {}
    for group, low, high in (("desi", -0.01, 0.6), ("desi", 0.6, 1.5), ("sdss", -0.01, 0.6)):
        some = [o for o in objects if (o.group, o.spectype) == (group, "GALAXY") and low <= o.redshift < high]
        vectors = unit(encoder.encode_spectra(np.stack([o.flux for o in some]), np.stack([o.ivar for o in some])))
        truth = {"redshift": np.array([o.redshift for o in some])}
        for pair in (("spectrum", "spectrum"), ("spectrum", "image")):
            label = f"{group} {max(low, 0)}<z<{high}"
            out[f"{label} {pair[0]}->{pair[1]}"] = judged(index, pair, vectors, truth)["redshift"]
    pairs = load_pairs(shared / "data", embedder.image_grid, objects)
    if pairs:
        pictures = unit(encoder.encode_images(np.stack([pair.image.pixels for pair in pairs])))
        truth = {"redshift": np.array([pair.spectrum.redshift for pair in pairs])}
        out["pictures image->image"] = judged(index, ("image", "image"), pictures, truth)["redshift"]
    return out


if __name__ == "__main__":
    main()
