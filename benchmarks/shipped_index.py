"""Redshifts of real galaxies from the shipped index, by number of neighbours.

    python benchmarks/shipped_index.py [--shared ../shared] [--out benchmarks/results/shipped_index.json]

What a user of `make demo` gets: the demo model, the spectra of the demo index, the service's distance-weighted
mean (and a weighted median beside it). `astroclip evaluate` has the larger table and the held-out simulated objects.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from astroclip.embed import Embedder
from training.evaluate import metrics
from training.evaluate.encoders import ModelEncoder
from training.evaluate.neighbours import nearest, unit, weighted_mean, weighted_median
from training.evaluate.realsky import load_objects
from training.evaluate.report import provenance, write_json

DEMO = Path(__file__).resolve().parents[1] / "service" / "demo"
NEIGHBOURS = (1, 4, 8, 16)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", type=Path, default=Path("../shared"))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/shipped_index.json"))
    arguments = parser.parse_args()
    started = time.perf_counter()
    embedder = Embedder.from_pretrained(DEMO / "model", device="cpu")
    table = unit(np.load(DEMO / "index" / "vectors-spectrum.npy").astype(np.float32))
    redshift = pq.read_table(DEMO / "index" / "catalog.parquet")["redshift"].to_numpy()
    objects, _ = load_objects(arguments.shared / "data", embedder.spectrum_grid)
    encoder = ModelEncoder(embedder.model, "cpu")
    results = {}
    for group, low, high in (("desi", -0.01, 0.6), ("desi", 0.6, 1.5), ("sdss", -0.01, 0.6)):
        some = [o for o in objects if (o.group, o.spectype) == (group, "GALAXY") and low <= o.redshift < high]
        vectors = encoder.encode_spectra(np.stack([o.flux for o in some]), np.stack([o.ivar for o in some]))
        truth = np.array([o.redshift for o in some])
        found = nearest(unit(vectors), table, max(NEIGHBOURS))
        results[f"{group} {max(low, 0)}<z<{high}"] = {"n": len(some)} | {
            f"k={k} {name}": metrics.redshift_numbers(truth, estimate(found.first(k), redshift), 500, 0)
            for k in NEIGHBOURS
            for name, estimate in (("mean", weighted_mean), ("median", weighted_median))
        }
    model = {"id": embedder.model_id, "sha256": embedder.model_sha256}
    write_json(
        arguments.out,
        {"kind": "shipped_index", **provenance(seed=0, started=started), "model": model, "redshift": results},
    )


if __name__ == "__main__":
    main()
